"""Checks for the exercises of the book, one module for each chapter; they say what is off without giving it away."""

__all__ = ["numbers", "say"]


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
