"""Look through the built pages, whoever built them: `python -m tools.pages FOLDER` names every broken promise and exits with 1.

Dead links and anchors, missing pictures, pictures without alt text, requests to other hosts, leftovers of the notebook's
syntax, more or fewer than one title.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SKIP = {"search.html", "genindex.html", "404.html"}
LEFTOVER = re.compile(
    r"\?@\w|^:::|\{#[\w-]+ \.|^#\| |\[!(NOTE|TIP|WARNING|IMPORTANT|CAUTION)\]|: could not be found", re.M
)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}


class Page(HTMLParser):
    """What a page links to, loads, shows and names."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads, self.no_alt, self.titles = set(), [], [], [], 0
        self.text, self.quiet = [], 0

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {v for v in (a.get("id"), a.get("name") if tag == "a" else None) if v}
        self.titles += (tag == "h1") - (a.get("id") == "jb-print-docs-body")  # the theme repeats the title for printing
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" and a.get("rel", "").lower() in {
            "stylesheet",
            "preload",
            "icon",
            "shortcut icon",
            "modulepreload",
        }:
            self.loads.append(a.get("href", ""))
        if a.get(LOADS.get(tag, "")):
            self.loads.append(a[LOADS[tag]])
        if tag == "img" and not (a.get("alt") or "").strip() and a.get("role") != "presentation":
            self.no_alt.append(a.get("src", "")[:80])
        if tag in {"script", "style", "pre", "code"}:
            self.quiet += 1

    def handle_endtag(self, tag):
        if tag in {"script", "style", "pre", "code"}:
            self.quiet = max(0, self.quiet - 1)

    def handle_data(self, data):
        if not self.quiet:
            self.text.append(data)


def pages(root: Path) -> dict:
    found = {}
    for file in sorted(root.rglob("*.html")):
        if "_static" in file.parts or "site_libs" in file.parts:
            continue
        page = found[file] = Page()
        page.feed(file.read_text(encoding="utf-8"))
    return found


def external(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in {"http", "https", "ws", "wss"}


def problems(root: Path) -> list:
    """Every problem as one line."""
    found, out = pages(root), []
    if not found:
        return [f"{root}: no pages"]
    for file, page in found.items():
        name = file.relative_to(root)
        out += [f"{name}: picture without alt text: {src}" for src in page.no_alt]
        if file.name not in SKIP and page.titles != 1:
            out.append(f"{name}: {page.titles} titles (h1), one is expected")
        text = "".join(page.text)
        out += [f"{name}: left over on the page: {text[m.start() : m.start() + 60]!r}" for m in LEFTOVER.finditer(text)]
        for address in page.loads:
            if external(address):
                out.append(f"{name}: loads from another host: {address}")
            elif not address.startswith(("data:", "#")):
                target = file.parent / unquote(urlsplit(address).path)
                out += [] if target.is_file() else [f"{name}: missing file: {address}"]
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address.startswith("#!"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if parts.path.endswith((".ipynb", ".qmd", ".md")) or not target.is_file():
                out.append(f"{name}: dead link: {address}")
            elif parts.fragment and target in found and unquote(parts.fragment) not in found[target].ids:
                out.append(f"{name}: dead anchor: {address}")
    for css in root.rglob("*.css"):
        for address in re.findall(
            r"""(?:url\(\s*|@import\s+)["']?([^"')\s]+)""", css.read_text(encoding="utf-8", errors="replace")
        ):
            if external(address):
                out.append(f"{css.relative_to(root)}: loads from another host: {address}")
    return sorted(set(out))


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit(bool(lines))
