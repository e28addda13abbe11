"""Fetch pretrained models into the cache folder: `models.py [NAME ...]`, by default the three of the cpu profile."""

import sys
import time

from ftbook import models


def fetch(name: str) -> bool:
    """Whether the model is there now; says where, or what to do."""
    start = time.perf_counter()
    try:
        place = models.path(name)
    except (OSError, ValueError, ImportError) as error:
        print(f"models: {error}", file=sys.stderr, flush=True)
        return False
    size = sum(f.stat().st_size for f in place.iterdir()) / 1e6
    print(f"{name:<20} {size:5.0f} MB {time.perf_counter() - start:6.1f} s  {place}", flush=True)
    return True


def main(names: list) -> int:
    chosen = names or [n for n in models.names("cpu") if models.card(n).files]
    done = [fetch(name) for name in chosen]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
