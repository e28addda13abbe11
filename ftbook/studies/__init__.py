"""The experiments behind the book's numbers, a module for each chapter.

A module holds its settings, ``run(seed, split, ...)`` and the rows; ``main``
runs what is missing and stores it with `ftbook.results`. On a command line:
``python -c "from ftbook.studies import ner; ner.main('ways')"``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def run_named(known: Mapping[str, Callable], names: Iterable[str], *arguments: Any) -> None:
    """Run the named studies of a chapter one after the other, by default all.

    Every name is looked up before the first study starts.

    Parameters
    ----------
    known : dict
        Name of a study -> function that runs it.
    names : names, may be empty
    *arguments
        Passed to every function.

    Raises
    ------
    ValueError
        If a name is unknown; the message lists the known ones.

    Examples
    --------
    >>> run_named({"rates": print, "seeds": print}, ["seeds"], "running")
    running
    """
    wanted = tuple(names) or tuple(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no study {name!r}; use {', '.join(known)}")
    for name in wanted:
        known[name](*arguments)
