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


def bag_of_words(C: float) -> Any:
    """The baseline of texts: logistic regression on counted words and pairs.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty.

    Returns
    -------
    sklearn.pipeline.Pipeline
        Not fitted; words are what stands between blanks, weighted by tf-idf.

    Examples
    --------
    >>> fitted = bag_of_words(1.0).fit(["a fine film", "dull"], [1, 0])
    >>> fitted.predict(["fine"]).tolist()
    [1]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2))
    return make_pipeline(words, LogisticRegression(C=C, max_iter=2000))
