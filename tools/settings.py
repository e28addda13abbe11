"""settings.ini and _quarto.yml, read once for all commands of this folder and for site/."""

import os
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, RESULTS = ROOT / "nbs", ROOT / "results"
EXTRAS = "notebook", "book", "deploy", "dev", "bench"

# glibc keeps what a training step frees, instead of asking the system for the same pages at every step (half the time
# of a convolutional network); other systems do not read these
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def settings() -> dict:
    """The [DEFAULT] section of settings.ini."""
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(cfg["DEFAULT"])


def requirements(*groups: str) -> list:
    """The requirement lines of the named groups; "" is the package itself."""
    cfg = settings()
    keys = ["requirements" if not g else f"{g}_requirements" for g in groups]
    return sorted({line for key in keys for line in cfg[key].split()})


def book() -> dict:
    """The `book:` section of `_quarto.yml`."""
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["book"]


def parts() -> list:
    """[(part's title or None, [files])] in reading order; the home page stands by itself."""
    found = []
    for entry in book()["chapters"]:
        if isinstance(entry, dict) and "part" in entry:
            found.append((entry["part"], [_file(e) for e in entry["chapters"]]))
        elif Path(_file(entry)).stem != "index":
            found.append((None, [_file(entry)]))
    return found


def _file(entry) -> str:
    """The file of a chapter, which stands alone or with the text of its link."""
    return entry["file"] if isinstance(entry, dict) else entry


def colab(notebook: str) -> str:
    """Where Colab opens a notebook of nbs/."""
    cfg = settings()
    path = cfg["repository"].removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/{cfg['branch']}/nbs/{notebook}"


def chapters() -> list:
    """The notebooks of the book in reading order."""
    return [ROOT / file for _, files in parts() for file in files]


def find(chapter: str) -> Path:
    """The notebook that a command line means by `05`, `05_autoencoder` or a path."""
    name = Path(str(chapter)).stem
    found = [f for f in sorted(NBS.glob("*.ipynb")) if f.stem == name or f.stem.split("_")[0] == name]
    if len(found) != 1:
        known = ", ".join(f.stem for f in sorted(NBS.glob("*.ipynb"))) or "none yet"
        raise SystemExit(f"no single notebook {chapter!r} in nbs/: use a number or a name of {known}")
    return found[0]


def kernel_environment() -> dict:
    """The variables of a notebook's kernel: memory is kept; `runtime.Meter` gives it back before it measures."""
    return {**KEEP_MEMORY, **os.environ}
