"""Resolve settings.ini into the lock files of requirements/ (universal: Python 3.11 to 3.13, every platform).

`lowest` is for one Python and this platform: the oldest versions that settings.ini allows.
"""

import subprocess
import sys

from .settings import EXTRAS, ROOT, requirements, settings

LOCKS = {"book": ["book"], "all": ["", *EXTRAS], "lowest": ["", "notebook", "dev"]}
OF = {"lowest": ["--resolution", "lowest-direct"]}  # the lower bounds of settings.ini, which `make lowest` tests


def main() -> None:
    upgrade = ["--upgrade"] if "--upgrade" in sys.argv[1:] else []
    only = [a for a in sys.argv[1:] if not a.startswith("-")]
    for name, groups in ((n, g) for n, g in LOCKS.items() if not only or n in only):
        file = ROOT / "requirements" / f"{name}.lock"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "compile",
                "-",
                "--quiet",
                "--generate-hashes",
                "--no-header",
                "--no-annotate",
                "--no-emit-index-url",
                "--no-emit-find-links",
                *upgrade,
                *OF.get(name, ["--universal"]),
                "--python-version",
                settings()["min_python"],
                "-o",
                str(file),
            ],
            input="\n".join(requirements(*groups)),
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        print(f"wrote {file.relative_to(ROOT)}: {sum('==' in line for line in file.read_text().splitlines())} packages")


if __name__ == "__main__":
    main()
