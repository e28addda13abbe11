"""Lay out what Sphinx reads, from `_quarto.yml`, README.md and nbs/: only files whose content changed are written."""

import hashlib
import json
import re
from pathlib import Path

from .api import pages as api_pages
from .cards import figure, with_cards
from .filter import prose, transform
from .settings import ROOT, parts, settings
from .translate import NAME, editions, summaries

STAGE = ROOT / "build" / "book" / "source"
EXTRA = ROOT / "build" / "book" / "extra"
SUFFIX = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


LOST = """---
orphan: true
---

# This page is not here

The address is mistyped, or the page has moved. [The home page](index.md) lists the chapters, and the search
<a href="search.html">finds sections by their words</a>.
"""


def put(file: Path, data: bytes, kept: set) -> None:
    """Write where the content is new, so that an unchanged page is not built again."""
    kept.add(file)
    if not file.exists() or file.read_bytes() != data:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def toctrees() -> str:
    blocks = []
    for title, files in parts():
        head = [f":caption: {title}"] if title else []
        names = [str(Path(file).with_suffix("")) for file in files]
        blocks.append("\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", *head, "", *names, "```"]))
    blocks.append("\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", "", "api/index", "```"]))
    names = [f"zh/{name}" for name in [*editions(), "summaries"]]
    blocks.append("\n".join(["```{toctree}", f":caption: {NAME}", ":hidden:", ":maxdepth: 1", "", *names, "```"]))
    return "\n\n".join(blocks)


def raw(page: str) -> str:
    """HTML as a block of MyST."""
    return f"```{{raw}} html\n{page}\n```"


def chinese_home(nb: dict) -> dict:
    """The Chinese home page with cards and buttons, as the English one has them."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_cards("".join(cell["source"]), raw, chinese=True)
    return nb


def home() -> str:
    """README.md as the site's first page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = "\n".join(prose(figure(with_cards(readme, raw), raw).split("\n"), "sphinx"))
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    listed = {file for _, files in parts() for file in files}

    def to_source(match):
        target = match[2].partition("#")[0]
        file = ROOT / target
        if target in listed or not file.is_file() or file.suffix in {".svg", ".png", ".jpg"}:
            return match[0]
        cfg = settings()  # a file of the repository that is no page: show it where it lives
        return f"[{match[1]}]({cfg['repository']}/blob/{cfg['branch']}/{match[2]})"

    text = re.sub(r"(?<!!)\[([^\[\]]+)\]\((?!\w+:|#)([^()\s]+)\)", to_source, text)
    return f"{text}\n\n{toctrees()}\n"


def stage() -> list:
    """Fill STAGE and EXTRA; returns the staged documents."""
    kept: set = set()
    EXTRA.mkdir(parents=True, exist_ok=True)

    def write(nb: dict, stem: str, file: Path) -> None:
        def save(data: bytes, mime: str) -> str:
            name = f"{stem}-{hashlib.sha256(data).hexdigest()[:10]}.{SUFFIX[mime]}"
            put(EXTRA / "figures" / name, data, kept)
            return f"../figures/{name}"

        put(file, json.dumps(transform(nb, "sphinx", stem, save), ensure_ascii=False, indent=1).encode(), kept)

    for _, files in parts():
        for file in files:
            path = ROOT / file
            if not path.exists():
                raise SystemExit(f"book: _quarto.yml lists {file}, which does not exist")
            write(json.loads(path.read_text(encoding="utf-8")), path.stem, STAGE / file)
    for name, one in editions().items():
        nb = one.notebook()
        write(chinese_home(nb) if name == "index" else nb, name, STAGE / "zh" / f"{name}.ipynb")
    put(STAGE / "zh" / "summaries.md", summaries().encode(), kept)
    put(STAGE / "index.md", home().encode(), kept)
    put(STAGE / "404.md", LOST.encode(), kept)
    for name, text in api_pages().items():
        put(STAGE / "api" / name, text.encode(), kept)
    for image in (ROOT / "site" / "images").glob("*"):
        put(EXTRA / "site" / "images" / image.name, image.read_bytes(), kept)
    for folder in (STAGE, EXTRA):
        for file in folder.rglob("*"):
            if file.is_file() and file not in kept:
                file.unlink()
    return sorted(kept)


if __name__ == "__main__":
    print(f"staged {len(stage())} files in {STAGE.relative_to(ROOT)}/")
