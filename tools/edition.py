"""The pages of the built site as one book: what tools/pdf.py and tools/epub.py have in common.

`pages()` gives title page, parts, chapters and appendices in reading order, each chapter as a tree without what belongs to
a site only: scripts, buttons, marks beside headings. Solutions of exercises are gathered, so that a printed page does not
show the answer below the question.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Comment

from .settings import ROOT, book, parts, settings

DOCS = ROOT / "_docs"
SITE_ONLY = {"script", "style", "noscript", "button", "input", "select", "template"}
OF_SITE = {"loading", "tabindex", "contenteditable", "title", "aria-label"}
SITE_ONLY_CLASSES = {"headerlink", "toctree-wrapper"}
DULL = re.compile(r'<span(?: class="(?:p|n|w|fm|vm|nx|err|x|pre)")?>([^<]*)</span>')  # code without a color of its own
SOLUTION = re.compile(r"^\s*(solutions?|answers?)\b", re.I)
EXTERNAL = re.compile(r"^(\w+:|//)")


class Chapter(NamedTuple):
    """A page of the book: its name (the file's stem), part, title and tree."""

    name: str
    part: str
    title: str
    tree: BeautifulSoup
    file: Path


def built(docs: Path = DOCS) -> Path:
    """The folder of the site that Sphinx built; `make book` is run where there is none or an old one."""
    code = subprocess.call([sys.executable, "-m", "tools.book", "--builder", "sphinx", "--out", str(docs)], cwd=ROOT)
    if code:
        raise SystemExit("the site could not be built (see above); `make book BUILDER=sphinx` builds it alone")
    return docs


def _site_only(node) -> bool:
    return node.name in SITE_ONLY or "hidden" in node.attrs or not SITE_ONLY_CLASSES.isdisjoint(node.get("class", ()))


def _cleaned(file: Path) -> BeautifulSoup:
    """What a page says, without what only a browser needs."""
    page = file.read_text(encoding="utf-8")
    start, end = page.find("<article"), page.find("</article>")
    if start < 0:
        raise ValueError(f"{file} has no <article>: build the site with `make book BUILDER=sphinx`")
    tree = BeautifulSoup(DULL.sub(r"\1", page[start : end + len("</article>")]), "html.parser")
    for node in tree.find_all(_site_only):
        if not node.decomposed:
            node.decompose()
    for comment in tree.find_all(string=lambda s: isinstance(s, Comment)):
        comment.extract()
    for link in tree.find_all("a", href=re.compile("^https://colab")):
        line = link.find_parent("p")
        (line or link).decompose()
    for part in tree.select("details.part"):  # a section that the site folds: tools/shorter.py
        part.summary.decompose()
        part.unwrap()
    for summary in tree.select("details.hide > summary"):  # the theme has a text for each state
        above = summary.find_parent("div", class_="cell").find_previous_sibling()
        if "Show the whole code" in summary.get_text() and above is not None and "highlight-python" in above["class"]:
            above.decompose()  # the signatures of what stands open here
        summary.clear()
        summary.append("Code")
        summary.attrs.clear()
    seen = set()
    for node in tree.find_all(True):
        for name in [n for n in node.attrs if n in OF_SITE or n.startswith(("data-", "on"))]:
            del node[name]
        if "id" in node.attrs and (node["id"] in seen or seen.add(node["id"])):
            del node["id"]
    return tree


def pages(docs: Path = DOCS) -> list:
    """Home page, chapters and appendices in reading order."""
    found = []
    for part, files in [("", ["index"]), *parts()]:
        for name in files:
            file = docs / "index.html" if name == "index" else docs / Path(name).with_suffix(".html")
            if name != "index" and file.stem == "index":
                continue
            tree = _cleaned(file)
            heading = tree.find("h1")
            if name == "index":
                heading.string = "About this book"
            found.append(Chapter(file.stem, part or "", " ".join(heading.get_text().split()), tree, file))
    return found


def linked(chapters: list, address, picture) -> None:
    """Give links and pictures new addresses: `address(name, anchor)`, `picture(file)`.

    A link to a page that is no part of the book (the API reference) becomes plain text.
    """
    known = {c.file.resolve(): c.name for c in chapters}
    ids = {c.name: {n["id"] for n in c.tree.find_all(id=True)} for c in chapters}
    for chapter in chapters:
        for link in chapter.tree.find_all("a"):
            href = link.get("href", "")
            if EXTERNAL.match(href):
                continue
            to = urlsplit(href)
            target = (chapter.file.parent / unquote(to.path)).resolve() if to.path else chapter.file.resolve()
            name, anchor = known.get(target), unquote(to.fragment)
            if name is None or (anchor and anchor not in ids[name]):
                link.unwrap()
            else:
                link["href"] = address(name, anchor)
        for image in chapter.tree.find_all("img"):
            image["src"] = picture((chapter.file.parent / unquote(image["src"])).resolve())


def solutions(chapter: Chapter) -> list:
    """Take the folded solutions out of a chapter: [(title, tree)]."""
    found = []
    for details in chapter.tree.find_all("details"):
        summary = details.find("summary")
        if summary is None or not SOLUTION.match(summary.get_text()):
            continue
        title = " ".join(summary.extract().get_text().split())
        found.append((title, details))
    return found


def headings(chapter: Chapter) -> list:
    """[(anchor, text)] of a chapter's sections."""
    found = []
    for heading in chapter.tree.find_all("h2"):
        section = heading.find_parent("section")
        if section is not None and section.get("id"):
            found.append((section["id"], " ".join(heading.get_text().split())))
    return found


def colors(docs: Path = DOCS) -> str:
    """The site's colors of code, in the light theme."""
    css = (docs / "_static" / "pygments.css").read_text(encoding="utf-8")
    return "\n".join(re.findall(r'^html\[data-theme="light"\] (\.highlight \.\w+ \{.*)$', css, re.M))


def front() -> dict:
    """What stands on the title page."""
    cfg = settings()
    return {
        "title": book()["title"],
        "subtitle": book().get("subtitle", ""),
        "author": book()["author"],
        "version": cfg["version"],
        "license": cfg["license"],
        "repository": cfg["repository"],
        "language": "en",
    }
