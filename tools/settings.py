"""settings.ini and _quarto.yml, read once for all scripts of this folder and for docs/."""
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, RESULTS = ROOT / "nbs", ROOT / "results"
EXTRAS = "notebook", "book", "dev", "bench"


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


def chapters() -> list:
    """The notebooks of the book in reading order, as `_quarto.yml` lists them."""
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    files = re.findall(r"^\s*-\s*(nbs/[\w.-]+\.ipynb)\s*$", text, flags=re.M)
    return [ROOT / file for file in files]


def drafts() -> list:
    """Notebooks that `_quarto.yml` names as being in preparation: no pages yet, and not executed by the tests."""
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    return [ROOT / file for file in re.findall(r"^# in preparation: (nbs/[\w-]+\.ipynb)", text, flags=re.M)]


def find(chapter: str) -> Path:
    """The notebook that a command line means by `05`, `05_autoencoder` or a path."""
    name = Path(str(chapter)).stem
    found = [f for f in sorted(NBS.glob("*.ipynb")) if f.stem == name or f.stem.split("_")[0] == name]
    if len(found) != 1:
        known = ", ".join(f.stem for f in sorted(NBS.glob("*.ipynb"))) or "none yet"
        raise SystemExit(f"no single notebook {chapter!r} in nbs/: use a number or a name of {known}")
    return found[0]
