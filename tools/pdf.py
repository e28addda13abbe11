"""The whole book as one PDF: `python -m tools.pdf [--docs FOLDER] [--out FILE]`.

The pages of the built site, printed by Chromium in one run: so every link inside the book works, bookmarks come from the
headings, and the table of contents gets its page numbers from a first run. Needs Chromium on the PATH.
"""

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .edition import DOCS, built, colors, front, headings, linked, pages, solutions
from .settings import ROOT

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
WORK = ROOT / "build" / "pdf"
PLACE = re.compile(r"\{\{([\w.-]+)\}\}")
WIDTH = 650  # CSS pixels between the margins of site/print.css
FIT = """() => {
  const wide = [];
  for (const f of document.querySelectorAll("div.math > .formula")) {  // a wide equation becomes smaller
    const room = f.clientWidth, need = f.scrollWidth;
    if (need > room + 1) f.style.fontSize = `${Math.floor(96 * room / need)}%`;
  }
  for (const t of document.querySelectorAll("table")) {
    const room = document.body.clientWidth, need = t.getBoundingClientRect().width;
    if (need > room + 1) t.style.fontSize = `${Math.max(4.6, 7.9 * 0.96 * room / need).toFixed(2)}pt`;
  }
  const edge = document.body.getBoundingClientRect().right;
  for (const e of document.querySelectorAll("pre, table, img, p, li, h1, h2, h3, h4, math")) {
    const over = Math.max(e.getBoundingClientRect().right - edge, e.tagName == "PRE" ? e.scrollWidth - e.clientWidth : 0);
    if (over > 1.5) wide.push([e.closest("section.chapter")?.id || "", e.tagName, Math.round(over), e.textContent.slice(0, 60)]);
  }
  return wide;
}"""
HEADINGS = "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => h.textContent)"


def browser() -> str:
    """Path of Chromium."""
    found = os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), None)
    if not found:
        raise SystemExit("pdf: no Chromium on the PATH (Debian: apt-get install chromium); `make epub` needs none")
    return found


def chinese() -> bool:
    """Whether a font for the Chinese terms is installed."""
    asks = shutil.which("fc-list")
    return not asks or bool(subprocess.run([asks, ":lang=zh-cn"], capture_output=True, text=True).stdout.strip())


def _anchor(name: str, anchor: str = "") -> str:
    return f"{name}--{anchor}" if anchor else name


def _lowered(tree, by: int) -> None:
    """Headings `by` levels below; one document has one order."""
    for node in tree.find_all(re.compile(r"^h[1-5]$")):
        node.name = f"h{min(6, int(node.name[1]) + by)}"


def _entry(kind: str, name: str, text: str) -> str:
    return (
        f'<li class="of-{kind}"><a href="#{name}"><span>{html.escape(text)}</span><span class="leader"></span>'
        f'<span class="number">{{{{{name}}}}}</span></a></li>'
    )


def assembled(docs: Path, chapters: list) -> str:
    """The book as one HTML document; in the contents `{{anchor}}` stands for the number of a page."""
    about = front()
    linked(chapters, lambda name, anchor: "#" + _anchor(name, anchor), lambda file: file.as_uri())
    entries, bodies, answers, part = [], [], [], None

    def contents(kind, name, text):
        entries.append(_entry(kind, name, text))

    for chapter in chapters:
        tree, title = chapter.tree, chapter.title
        for node in tree.find_all(id=True):
            node["id"] = _anchor(chapter.name, node["id"])
        for details in tree.find_all("details"):
            details["open"] = ""
        if chapter.part != part and chapter.name != "index":
            part = chapter.part
            here = [c for c in chapters if c.part == part]
            name = "part-" + re.sub(r"\W+", "-", part.lower())
            items = "".join(f'<li><a href="#{c.name}">{html.escape(c.title)}</a></li>' for c in here)
            bodies.append(f'<section class="part" id="{name}"><h1>{html.escape(part)}</h1><ul>{items}</ul></section>')
            contents("part", name, part)
        contents("part" if chapter.name == "index" else "chapter", chapter.name, title)
        for anchor, text in headings(chapter):
            if len(text) > 1:  # not the glossary's letters
                contents("section", anchor, text)
        taken = []
        for i, (label, solution) in enumerate(solutions(chapter), 1):
            name = f"{chapter.name}--solution-{i}"
            note = tree.new_tag("p", attrs={"class": "where", "id": f"{name}-asked"})
            link = tree.new_tag("a", href=f"#{name}")
            note.append(link)
            solution.replace_with(note)
            solution.name = "div"
            solution.attrs = {}
            label = f"{label} {i}" if label == "Solution" else label
            link.string = f"{label}: at the end of the book"
            taken.append(
                f'<div id="{name}"><h3><a href="#{name}-asked">{html.escape(label)}</a></h3>{solution.decode_contents()}</div>'
            )
        if taken:
            answers.append(f"<h2>{html.escape(title)}</h2>" + "".join(taken))
        if chapter.name != "index":
            _lowered(tree, 1)
        bodies.append(f'<section class="chapter" id="{chapter.name}">{tree}</section>')
    if answers:
        contents("part", "solutions", "Solutions of the exercises")
        bodies.append(
            f'<section class="chapter" id="solutions"><h1>Solutions of the exercises</h1>{"".join(answers)}</section>'
        )
    style = (ROOT / "site" / "print.css").read_text(encoding="utf-8") + colors(docs)
    cover = (
        f'<section class="cover"><p class="title">{html.escape(about["title"]).replace("-", "&#8209;")}</p>'
        f'<p class="subtitle">{html.escape(about["subtitle"])}</p><p>{html.escape(about["author"])}</p>'
        f"<p>Version {about['version']} · {html.escape(about['license'])}</p>"
        f'<p><a href="{about["repository"]}">{about["repository"]}</a></p></section>'
    )
    return (
        f'<!doctype html><html lang="{about["language"]}"><head><meta charset="utf-8"><title>{html.escape(about["title"])}</title>'
        f'<meta name="author" content="{html.escape(about["author"])}"><style>{style}</style></head><body>{cover}'
        f'<section class="contents"><h1>Contents</h1><ol>{"".join(entries)}</ol></section>{"".join(bodies)}</body></html>'
    )


def numbered(page: str, numbers: dict) -> str:
    """The document with the numbers of its pages in the contents."""
    return PLACE.sub(lambda match: str(numbers.get(match[1], "")), page)


def numbers_of(file: Path) -> dict:
    """Anchor -> number of its page."""
    from pypdf import PdfReader

    reader = PdfReader(file)
    at = {page.indirect_reference.idnum: i for i, page in enumerate(reader.pages, 1)}
    return {name.lstrip("/"): at[place.page.idnum] for name, place in reader.named_destinations.items()}


def printed(docs: Path, out: Path, only: tuple = ()) -> list:
    """Write the PDF; returns what does not fit between the margins: [chapter, tag, pixels too wide, text]."""
    from playwright.sync_api import sync_playwright

    WORK.mkdir(parents=True, exist_ok=True)
    numbers, source = {}, WORK / "book.html"
    page = assembled(docs, [c for c in pages(docs) if not only or c.name in only])
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=FLAGS)
        tab = chromium.new_page(viewport={"width": WIDTH, "height": 960})
        tab.set_default_timeout(600_000)
        tab.emulate_media(media="print")
        for _ in ("to learn the page numbers", "to print them"):
            source.write_text(numbered(page, numbers), encoding="utf-8")
            tab.goto(source.as_uri())
            wide = tab.evaluate(FIT)
            tab.pdf(path=out, prefer_css_page_size=True, outline=True, tagged=True)
            numbers = numbers_of(out)
        titles = tab.evaluate(HEADINGS)
        chromium.close()
    compact(out, titles)
    return wide


def rename(marks, titles: dict) -> None:
    """Bookmarks with the blanks of their headings: Chromium joins two words where a line of a heading ends."""
    while marks is not None:
        said = str(marks.Title)
        marks.Title = titles.get("".join(said.split()), said)
        rename(marks.get("/First"), titles)
        marks = marks.get("/Next")


def compact(file: Path, titles: list) -> None:
    """Pack the many small objects that Chromium writes for screen readers, and all of them tighter; a third of the size is left."""
    import pikepdf

    pikepdf.settings.set_flate_compression_level(9)
    with pikepdf.open(file, allow_overwriting_input=True) as whole:
        if "/Outlines" in whole.Root:
            rename(whole.Root.Outlines.get("/First"), {"".join(t.split()): " ".join(t.split()) for t in titles})
        whole.docinfo["/Title"], whole.docinfo["/Author"] = front()["title"], front()["author"]
        tight = {"compress_streams": True, "recompress_flate": True}
        whole.save(file, object_stream_mode=pikepdf.ObjectStreamMode.generate, **tight)


def main(argv: list) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ftbook.pdf")
    args = parser.parse_args(argv)
    browser()
    if not chinese():
        print(
            "pdf: no font with Chinese characters is installed; the glossary's terms need one (Debian: fonts-wqy-zenhei)"
        )
    docs, start = built(args.docs.resolve()), time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for chapter, tag, over, text in printed(docs, args.out):
        print(f"pdf: {chapter}: <{tag.lower()}> is {over} px too wide: {text!r}")
    size = args.out.stat().st_size / 1e6
    print(f"pdf: {args.out} ({size:.1f} MB) after {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
