"""The whole book as an EPUB: `python -m tools.epub [--docs FOLDER] [--out FILE]`.

EPUB 3 from the pages of the built site: an XHTML file for each page with MathML, the pictures with their alt text, a
navigation by parts, chapters and sections. Nothing is loaded from elsewhere.
"""

import argparse
import html
import re
import sys
import uuid
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from bs4 import NavigableString, Tag

from .edition import DOCS, built, colors, front, headings, linked, pages
from .settings import ROOT, settings

VOID = {"img", "br", "hr", "col", "wbr", "source", "area", "embed", "track"}
TYPES = {
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
NAME = re.compile(r"^[A-Za-z_][\w.-]*$")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
OLD = {"align", "valign", "border", "bgcolor", "width", "height"}  # of tables and cells: no longer HTML
STYLE = """
body { line-height: 1.5; margin: 0 2%; }
h1, h2, h3, h4 { line-height: 1.25; page-break-after: avoid; break-after: avoid; }
pre { font-size: 0.78em; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.6em 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
pre code { font-size: 1em; }
div.cell_input { border-left: 3px solid #bbb; padding-left: 0.6em; }
div.tag_export div.cell_input { border-left-color: #0b4a7a; }
img { max-width: 100%; height: auto; }
figure { margin: 1em 0 0.3em; }
table { border-collapse: collapse; font-size: 0.8em; }
th, td { padding: 0.2em 0.5em; border-bottom: 1px solid #bbb; text-align: left; vertical-align: top; }
th p, td p { margin: 0; }
.text-right { text-align: right; }
.admonition { border-left: 3px solid #0b4a7a; padding-left: 0.8em; }
.admonition.hide { border: 0; padding: 0; }
details > summary { font-size: 0.85em; }
.eqno { float: right; }
.held { white-space: nowrap; }
.formula { overflow-x: auto; }
ul.cards { list-style: none; padding: 0; }
ul.cards svg { display: block; height: 2.4em; width: auto; fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round; }
nav ol { list-style: none; padding-left: 1em; }
"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" lang="{language}" xml:lang="{language}">
<head><title>{title}</title><link rel="stylesheet" type="text/css" href="book.css"/></head>
<body>{body}</body>
</html>
"""


def xhtml(node) -> str:
    """A tree as XML: every element closed, every attribute with a value, characters instead of entities."""
    if isinstance(node, NavigableString):
        return html.escape(CONTROL.sub("", str(node)), quote=False)
    inside = "".join(map(xhtml, node.children))
    if not isinstance(node, Tag) or node.name == "[document]":
        return inside
    attributes = ""
    for name, value in node.attrs.items():
        if not NAME.match(name.replace(":", "_")) or (name in OLD and node.name != "img"):
            continue
        value = " ".join(value) if isinstance(value, list) else value
        attributes += f' {name}="{html.escape(CONTROL.sub("", value or name))}"'
    if node.name in VOID:
        return f"<{node.name}{attributes}/>"
    return f"<{node.name}{attributes}>{inside}</{node.name}>"


def repaired(tree) -> None:
    """What HTML forgives and XHTML does not."""
    for node in tree.find_all("article"):
        node.name = "section"
    for node in tree.find_all(["td", "th"]):
        node.attrs.pop("scope", None) if node.name == "td" else None
    for math in tree.find_all("math"):
        math.attrs["xmlns"] = "http://www.w3.org/1998/Math/MathML"
    for drawn in tree.find_all("svg"):
        drawn.attrs["xmlns"] = "http://www.w3.org/2000/svg"
        if "viewbox" in drawn.attrs:  # HTML's parser writes names in small letters
            drawn.attrs["viewBox"] = drawn.attrs.pop("viewbox")
    for image in tree.find_all("img"):
        image["alt"] = image.get("alt") or ""
        for size in ("width", "height"):
            if not str(image.get(size, "0")).isdigit():
                del image[size]
    for link in tree.find_all("a", href=True):
        link["href"] = link["href"].strip().replace(" ", "%20")
    for inline in tree.find_all(["p", "span", "em", "strong"]):  # a block within a line of text
        if inline.find(["p", "div", "ul", "ol", "table", "pre", "figure", "details"]):
            inline.name = "div"
    for node in tree.find_all("details"):
        if node.find("summary") is None:
            node.name = "div"


def drawing(file: Path) -> bytes:
    """A picture's bytes; an SVG without a reference to a DTD of another host."""
    data = file.read_bytes()
    if file.suffix == ".svg":
        text = re.sub(r"<!DOCTYPE[^>\[]*(\[[^\]]*\])?[^>]*>", "", data.decode("utf-8"), flags=re.S)
        data = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S).encode()
    return data


def navigation(chapters: list, about: dict) -> tuple:
    """(nav.xhtml, toc.ncx of older readers): parts, chapters, sections."""

    def item(href, text, below=""):
        return f'<li><a href="{href}">{html.escape(text)}</a>{below}</li>'

    lines, points, part = [], [], ""
    for chapter in chapters:
        if chapter.part != part:
            lines += ["</ol></li>"] if part else []
            part = chapter.part
            lines.append(f"<li><span>{html.escape(part)}</span><ol>")
        sections = "".join(item(f"{chapter.name}.xhtml#{a}", t) for a, t in headings(chapter))
        lines.append(item(f"{chapter.name}.xhtml", chapter.title, f"<ol>{sections}</ol>" if sections else ""))
        points.append(
            f'<navPoint id="n{len(points) + 1}" playOrder="{len(points) + 1}"><navLabel><text>{html.escape(chapter.title)}</text>'
            f'</navLabel><content src="{chapter.name}.xhtml"/></navPoint>'
        )
    lines += ["</ol></li>"] if part else []
    body = f'<nav epub:type="toc" id="toc"><h1>Contents</h1><ol>{"".join(lines)}</ol></nav>'
    ncx = (
        '<?xml version="1.0" encoding="utf-8"?>\n<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/" version="2005-1"><head>'
        f'<meta name="dtb:uid" content="{identifier()}"/></head><docTitle><text>{html.escape(about["title"])}</text></docTitle>'
        f"<navMap>{''.join(points)}</navMap></ncx>"
    )
    return PAGE.format(language=about["language"], title="Contents", body=body), ncx


def identifier() -> str:
    """The same name for every build of one version."""
    cfg = settings()
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, cfg['repository'] + '#' + cfg['version'])}"


def contents(docs: Path) -> dict:
    """Every file of the EPUB: name -> bytes or text, the manifest among them."""
    about, chapters, pictures = front(), pages(docs), {}

    def picture(file: Path) -> str:
        name = f"images/{file.name}"
        pictures[name] = file
        return name

    linked(chapters, lambda name, anchor: f"{name}.xhtml" + (f"#{anchor}" if anchor else ""), picture)
    files = {"book.css": STYLE + colors(docs)}
    cover = (
        f"<section><h1>{html.escape(about['title'])}</h1><p>{html.escape(about['subtitle'])}</p>"
        f"<p>{html.escape(about['author'])}</p><p>Version {about['version']} · {html.escape(about['license'])}</p></section>"
    )
    files["cover.xhtml"] = PAGE.format(language=about["language"], title=html.escape(about["title"]), body=cover)
    files["nav.xhtml"], files["toc.ncx"] = navigation(chapters, about)
    held = {}  # name -> what a reader has to know of a page: formulas, drawings
    for chapter in chapters:
        repaired(chapter.tree)
        kinds = ("mathml", "math"), ("svg", "svg")
        held[f"{chapter.name}.xhtml"] = [kind for kind, tag in kinds if chapter.tree.find(tag)]
        files[f"{chapter.name}.xhtml"] = PAGE.format(
            language=about["language"], title=html.escape(chapter.title), body=xhtml(chapter.tree)
        )
    files |= {name: drawing(file) for name, file in sorted(pictures.items())}
    files["book.opf"] = package(files, held, about, [f"{c.name}.xhtml" for c in chapters])
    return files


def package(files: dict, held: dict, about: dict, order: list) -> str:
    """The manifest and the reading order."""
    kinds = {".xhtml": "application/xhtml+xml", ".css": "text/css", ".ncx": "application/x-dtbncx+xml", **TYPES}
    ids = {name: f"f{i}" for i, name in enumerate(files)}
    items = []
    for name, key in ids.items():
        properties = ["nav"] if name == "nav.xhtml" else held.get(name, [])
        extra = f' properties="{" ".join(properties)}"' if properties else ""
        items.append(f'<item id="{key}" href="{name}" media-type="{kinds[Path(name).suffix]}"{extra}/>')
    spine = "".join(f'<itemref idref="{ids[name]}"/>' for name in ["cover.xhtml", "nav.xhtml", *order])
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    access = "".join(
        f'<meta property="schema:{name}">{value}</meta>'
        for name, value in [
            ("accessMode", "textual"),
            ("accessMode", "visual"),
            ("accessModeSufficient", "textual,visual"),
            ("accessibilityFeature", "alternativeText"),
            ("accessibilityFeature", "MathML"),
            ("accessibilityFeature", "tableOfContents"),
            ("accessibilityHazard", "none"),
        ]
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<package xmlns="http://www.idpf.org/2007/opf" version="3.0" '
        f'unique-identifier="id" xml:lang="{about["language"]}"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f'<dc:identifier id="id">{identifier()}</dc:identifier><dc:title>{html.escape(about["title"])}</dc:title>'
        f"<dc:language>{about['language']}</dc:language><dc:creator>{html.escape(about['author'])}</dc:creator>"
        f'<dc:rights>{html.escape(about["license"])}</dc:rights><meta property="dcterms:modified">{now}</meta>{access}</metadata>'
        f'<manifest>{"".join(items)}</manifest><spine toc="{ids["toc.ncx"]}">{spine}</spine></package>'
    )


def write(docs: Path, out: Path) -> None:
    """Write the EPUB; a file that is no XML is an error."""
    files = contents(docs)
    for name, data in files.items():
        if Path(name).suffix in {".xhtml", ".opf", ".ncx", ".svg"}:
            try:
                ElementTree.fromstring(data)
            except ElementTree.ParseError as error:
                raise SystemExit(f"epub: {name} is no XML: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    container = (
        '<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="EPUB/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr(
            "mimetype", "application/epub+zip", zipfile.ZIP_STORED
        )  # first and uncompressed: readers look there
        book.writestr("META-INF/container.xml", container)
        for name, data in files.items():
            book.writestr(f"EPUB/{name}", data)


def main(argv: list) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ftbook.epub")
    args = parser.parse_args(argv)
    write(built(args.docs.resolve()), args.out)
    print(f"epub: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
