"""Run the side-by-side measurements of benchmarks/, one script per question."""
import subprocess
import sys

from settings import ROOT


def main(names: list) -> int:
    scripts = [s for s in sorted((ROOT / "benchmarks").glob("[!_]*.py")) if not names or s.stem in names]
    if not scripts:
        raise SystemExit("bench: benchmarks/ holds no script" + (f" named {' '.join(names)}" if names else " yet"))
    failed = []
    for script in scripts:
        print(f"bench: {script.relative_to(ROOT)}", flush=True)
        if subprocess.call([sys.executable, str(script)], cwd=ROOT):
            failed.append(script.stem)
    print(f"bench: {len(scripts) - len(failed)} of {len(scripts)} done" + (f"; failed: {failed}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
