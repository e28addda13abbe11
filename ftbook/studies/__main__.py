"""Run what is missing of a chapter's studies: ``python -m ftbook.studies ner models --jobs 2``."""

import argparse
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def main() -> None:
    """Parse the command line and run; with several jobs each run has its share of the threads."""
    parser = argparse.ArgumentParser(prog="python -m ftbook.studies", description=__doc__)
    parser.add_argument("module", help="a module of ftbook.studies, for example ner")
    parser.add_argument("names", nargs="*", help="studies of it; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process of its own")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; it must be at least 1")
    if args.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    study = importlib.import_module(f"ftbook.studies.{args.module}")
    if args.jobs == 1:
        study.main(*args.names)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        study.main(*args.names, executor=executor)


if __name__ == "__main__":
    main()
