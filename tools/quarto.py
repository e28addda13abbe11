"""What Quarto's pages still need: the book's scripts, an API reference, the search by sections, descriptions, a page for lost addresses.

`finish(folder)` goes over what `quarto render` wrote. New pages are the home page with other contents, so they look like the rest.
"""

import re
import shutil
from pathlib import Path

from .api import pages as api_pages
from .finish import DONE, article, beside, index, linked, promise
from .settings import ROOT
from .shorter import shorter

STATIC = ROOT / "site" / "static"
SHARED = "book.css", "book.js", "play.js", "find.js", "favicon.svg", "card.png"
MAIN = re.compile(r"(<main\b[^>]*>)(.*)(</main>)", re.S)
ADDRESS = re.compile(r'\b(href|src)="(?!\w+:|//|#|/)(?:\./)?([^"]*)"')
SEARCH = """<h1 class="title">Search</h1>
<form class="bd-search" action="search.html" role="search"><label for="q">Words</label> <input id="q" name="q" type="search"></form>
<div id="search-results" aria-live="polite"></div>
<script src="sections.js"></script>
<script src="_static/find.js"></script>"""
LOST = """<h1 class="title">This page is not here</h1>
<p>The address is mistyped, or the page has moved. <a href="index.html">The home page</a> lists the chapters,
<a href="search.html">the search</a> finds sections by their words.</p>"""


def html_of(markdown: str) -> str:
    """A page of the reference as HTML, with the anchors that chapters link to."""
    from markdown_it import MarkdownIt

    text = re.sub(r"```\{toctree\}.*?```", "", markdown, flags=re.S)
    text = re.sub(
        r"\]\((\w+)\.md(#[^)]*)?\)", r"](\1.html\2)", re.sub(r"\]\((\.\./nbs/\w+)\.ipynb\)", r"](\1.html)", text)
    )
    page = MarkdownIt("commonmark").enable("table").render(text)

    def section(match):
        anchor = match[1].lower().strip("_").replace("_", "-")
        return f'<h2 id="{anchor}" data-anchor-id="{anchor}">{match[1]}</h2>'

    return re.sub(r"<h2>([^<]*)</h2>", section, page)


def with_main(page: str, contents: str, title: str, up: str = "") -> str:
    """The home page with other contents, for a folder `up` from the root."""
    page = re.sub(r"<title>.*?</title>", lambda _: f"<title>{title}</title>", page, count=1, flags=re.S)
    page = re.sub(r'<nav class="page-navigation">.*?</nav>|<nav id="TOC".*?</nav>', "", page, flags=re.S)
    around = [up_one(piece, up) for piece in MAIN.split(page)]
    return around[0] + around[1] + contents + around[3] + around[4]


def up_one(piece: str, up: str) -> str:
    return ADDRESS.sub(lambda m: f'{m[1]}="{up}{m[2]}"', piece) if up else piece


def dressed(page: str, address: str) -> str:
    """A page with the scripts of the book and links to what Quarto does not list."""
    from html import escape

    if DONE in page:
        return page
    up = "../" * address.count("/")
    head = [f'<link rel="stylesheet" href="{up}_static/book.css">', f'<link rel="icon" href="{up}_static/favicon.svg">']
    head += [f'<script src="{up}_static/{name}" defer></script>' for name in ("book.js", "play.js")]
    if text := promise(article(page)):
        head.append(f'<meta name="description" content="{escape(text)}">')
    page = page.replace("</head>", "\n".join([*head, DONE, "</head>"]), 1)
    more = f'<p class="more"><a href="{up}search.html">Search by section</a> · <a href="{up}api/index.html">API reference</a></p>'
    at = (
        page.find("</nav>", page.find('id="quarto-sidebar"')) if 'id="quarto-sidebar"' in page else page.find("</main>")
    )
    return page[:at] + more + page[at:]


def finish(out: Path) -> None:
    """Finish Quarto's pages below `out`; may run again over the same ones."""
    from .api import names

    (out / "_static").mkdir(exist_ok=True)
    for name in SHARED:
        shutil.copy2(STATIC / name, out / "_static" / name)
    home = (out / "index.html").read_text(encoding="utf-8")
    if DONE not in home:  # the others are copies of it
        (out / "api").mkdir(exist_ok=True)
        for name, markdown in api_pages().items():
            title = markdown.split("\n", 1)[0].removeprefix("# ")
            page = with_main(home, html_of(markdown), title, "../")
            (out / "api" / name.replace(".md", ".html")).write_text(page, encoding="utf-8")
        for name, contents, title in (("search.html", SEARCH, "Search"), ("404.html", LOST, "Not here")):
            (out / name).write_text(with_main(home, contents, title), encoding="utf-8")
    said = {}
    for file in sorted(out.rglob("*.html")):
        if "site_libs" in file.parts:
            continue
        page, address = file.read_text(encoding="utf-8"), file.relative_to(out).as_posix()
        if file.parent.name == "nbs" and DONE not in page:
            page = linked(page, names(file.stem))
            page = page if "glossary" in file.stem else shorter(page)
        page = dressed(page, address)
        file.write_text(page, encoding="utf-8")
        said[address] = article(page)
    index(out, {name: text for name, text in said.items() if "/" in name or name == "index.html"})
    beside(out, list(said))
