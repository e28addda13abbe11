"""How high a page's sections will be, estimated from what is in them: what is far from the screen is not laid out until it comes near.

The browser keeps the guess until then (site/static/book.css, content-visibility), so the scroll bar is about right from the start.
"""

import math
import re
from html.parser import HTMLParser

from .shorter import BEGINNING, SHOWN

LETTERS, LINE, CODE_LINE = (
    84,
    25.6,
    18.9,
)  # of prose in a line; pixels of a line of prose, of code, in the column at 1280 pixels
EMPTY = {"img", "br", "hr", "input", "meta", "link", "source", "wbr", "col", "path", "circle", "rect", "line", "use"}
BLOCKS = {"p", "li", "dd", "dt", "figcaption", "summary", "h2", "h3", "h4"}
MARGINS = {"p": 18, "li": 4, "dd": 4, "dt": 4, "figcaption": 10, "summary": 22, "h2": 62, "h3": 48, "h4": 40}


class Heights(HTMLParser):
    """`heights`: anchor -> pixels of the sections right below the page's title."""

    def __init__(self, page: str):
        super().__init__()
        self.heights: dict = {}
        self.open: list = []  # tags, with what each of them began
        self.letters = self.code = self.cells = self.rows = 0
        self.feed(page)

    def add(self, pixels: float) -> None:
        sections = [anchor for tag, anchor, _ in self.open if tag == "section"]
        if len(sections) > 1 and not self.inside("closed"):
            self.heights[sections[1]] = self.heights.get(sections[1], 0) + pixels

    def inside(self, *kinds: str) -> bool:
        return any(kind in kinds or tag in kinds for tag, _, kind in self.open)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if tag == "img":
            width, height = (float(a.get(k) or 0) for k in ("width", "height"))
            self.add(height * min(1, 690 / width) + 24 if width else 300)
        if tag in EMPTY:
            return
        kind = "long" if "long" in (a.get("class") or "").split() else ""  # it shows its beginning: tools/shorter.py
        if tag == "table":
            self.rows = 0
        elif tag == "button" and a.get("class") == "more":
            self.add(42)
        if tag == "details" and "open" not in a:
            self.add(30)
            kind = "closed"  # its summary is the line just added
        elif tag == "div" and "math" in (a.get("class") or "").split():
            self.add(76)
        self.open.append((tag, a.get("id", ""), kind))
        if tag == "tr":
            self.cells = 0
        if tag in BLOCKS | {"pre", "td", "th"}:
            self.letters = self.code = 0

    def handle_endtag(self, tag):
        if tag in EMPTY or not any(t == tag for t, _, _ in self.open):
            return
        if tag == "pre":
            self.add((min(self.code, BEGINNING) if self.inside("long") else self.code) * CODE_LINE + 52)
        elif tag in ("td", "th"):
            self.cells = max(self.cells, math.ceil(self.letters / 22))
        elif tag == "tr":
            self.rows += 1
            if not self.inside("long") or self.rows <= SHOWN + 1:
                self.add(self.cells * 20 + 13)
        elif tag in BLOCKS and not self.inside("table", "math"):
            self.add(math.ceil(self.letters / LETTERS) * LINE + MARGINS[tag] if self.letters else 0)
            self.letters = 0
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.code += data.count("\n")
        if not self.inside("annotation", "script", "style"):
            self.letters += len(" ".join(data.split())) + 1 if data.strip() else 0


def with_heights(page: str) -> str:
    """The page with `--height` on each of its sections; Quarto's pages, which have no <article>, stay as they are."""
    start, end = page.find('<article class="bd-article">'), page.find("</article>")
    if start < 0:
        return page
    body = page[start:end]
    for anchor, height in Heights(body).heights.items():
        body = re.sub(
            rf'<section (?=[^>]*\bid="{re.escape(anchor)}")',
            f'<section style="--height: {height:.0f}px" ',
            body,
            count=1,
        )
    return page[:start] + body + page[end:]
