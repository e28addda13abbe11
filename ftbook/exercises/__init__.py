"""Checks for the exercises of the book, one module for each chapter; they say what is off without giving it away."""

import contextlib
import doctest
import io
from math import isclose

__all__ = ["say", "numbers", "close_to", "examples"]


def say(right, hint="") -> bool:
    """Print whether an answer is correct, and the hint where it is not."""
    print("correct" if right else f"not yet: {hint}")
    return bool(right)


def numbers(answer, n=1):
    """The answer as a list of n floats, or None where it is something else."""
    try:
        found = [float(a) for a in (answer if isinstance(answer, list | tuple) else [answer])]
    except (TypeError, ValueError):
        return None
    return found if len(found) == n else None


def close_to(answer, right, hint, asks="put one number into `answer`", rel_tol=1e-9) -> bool:
    """Say whether an answer is these numbers, each up to a relative tolerance; `asks` for them where it is something else."""
    given = numbers(answer, len(right))
    if given is None:
        return say(False, asks)
    return say(all(isclose(g, r, rel_tol=rel_tol) for g, r in zip(given, right, strict=True)), hint)


def examples(function) -> bool:
    """Run the examples of a function's docstring with this very function, and say which one fails first."""
    name, space = function.__name__, dict(function.__globals__)
    for example in doctest.DocTestParser().get_examples(function.__doc__ or ""):
        space[name] = function  # an example may import the library's own
        line, out, raised = example.source.strip(), io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(example.source, "<example>", "single"), space)
        except NotImplementedError:
            return say(False, f"the body of `{name}` is still empty")
        except Exception as error:  # an example may show an error
            raised = f"{type(error).__name__}: {error}"
        given, wanted = raised or out.getvalue(), (example.exc_msg or example.want).strip()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(wanted + "\n", given.strip() + "\n", flags):
            return say(False, f"`{line}` gives {given.strip() or 'nothing'}")
    return say(True)
