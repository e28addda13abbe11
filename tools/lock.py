"""Resolve settings.ini into the lock files of requirements/ (universal: Python 3.10 to 3.13, every platform)."""
import subprocess
import sys

from settings import EXTRAS, ROOT, requirements, settings

LOCKS = {"book": ["book"], "all": ["", *EXTRAS]}


def main() -> None:
    upgrade = ["--upgrade"] if "--upgrade" in sys.argv[1:] else []
    for name, groups in LOCKS.items():
        file = ROOT / "requirements" / f"{name}.lock"
        subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--universal", "--generate-hashes",
             "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", *upgrade,
             "--python-version", settings()["min_python"], "-o", str(file)],
            input="\n".join(requirements(*groups)), text=True, check=True, stdout=subprocess.DEVNULL)
        print(f"wrote {file.relative_to(ROOT)}: {sum('==' in line for line in file.read_text().splitlines())} packages")


if __name__ == "__main__":
    main()
