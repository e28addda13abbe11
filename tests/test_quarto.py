"""The site as Quarto builds it. Where Quarto is missing, pandoc makes the pages from what the notebook filter gives it."""

import json
import posixpath
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile

import pytest

from tools import pages, quarto
from tools.filter import transform
from tools.settings import chapters, parts

pypandoc = pytest.importorskip("pypandoc", reason="pip install pypandoc-binary")
FROM = "markdown+lists_without_preceding_blankline"
SHELL = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<title>{title}</title></head><body><nav id="quarto-sidebar"></nav><main class="content">{body}</main></body></html>'
)


def markdown(nb: dict) -> str:
    """A filtered notebook as one document, as Quarto reads it: text, code, outputs."""
    out = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(source)
            continue
        options = dict(re.findall(r"^#\| ([\w-]+): (.*)$", source, re.M))
        code = f"````python\n{re.sub(r'^#[|].*$', '', source, flags=re.M).strip()}\n````"
        if options.get("echo") != "false":
            folded = options.get("code-fold") == "true"
            summary = options.get("code-summary", "Code")
            block = f'<details class="code-fold"><summary>{summary}</summary>\n\n{code}\n\n</details>'
            out.append(block if folded else code)
        for output in cell["outputs"]:
            data = output.get("data", {})
            assert "text/html" not in data, "Quarto would load jQuery and require.js from another host for it"
            text = "".join(data.get("text/markdown", ""))
            out.append(text or "````\n" + "".join(data.get("text/plain", output.get("text", ""))) + "\n````")
    return "\n\n".join(out)


def html(text: str, *options: str) -> str:
    page = subprocess.run(
        [pypandoc.get_pandoc_path(), "-f", FROM, "-t", "html5", "--mathml", "--section-divs", *options],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return re.sub(r'href="(?!\w+:)([^"]*?)\.(?:ipynb|qmd)([#"])', r'href="\1.html\2', page)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """All pages, finished as `make book` does."""
    out = tmp_path_factory.mktemp("quarto")
    if shutil.which("quarto"):
        run = [sys.executable, "-m", "tools.book", "--builder", "quarto", "--out", out]
        subprocess.run(run, cwd=root, check=True)
        return out
    (out / "nbs").mkdir()
    for path in chapters():
        nb = transform(json.loads(path.read_text(encoding="utf-8")), "quarto", path.stem)
        page = SHELL.format(title=path.stem, body=html(markdown(nb)))
        (out / "nbs" / f"{path.stem}.html").write_text(page, encoding="utf-8")
    body = html((root / "README.md").read_text(encoding="utf-8"), f"--lua-filter={root / 'site' / 'home.lua'}")
    body = f'<h1 class="title">Home</h1>{body}'
    (out / "index.html").write_text(SHELL.format(title="Home", body=body), encoding="utf-8")
    shutil.copytree(root / "site" / "images", out / "site" / "images")
    quarto.finish(out)
    return out


def test_its_pages_keep_the_promises_of_the_other_builder(site):
    repository = re.compile(r"dead link: \S*(CITATION|CONTRIBUTING)")
    assert [line for line in pages.problems(site) if not repository.search(line)] == []


def test_its_titles_carry_the_numbers_that_the_text_speaks_of(site):
    for path in chapters():
        page = (site / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        number = path.stem.split("_")[0].lstrip("0")
        title = re.search(r"<h1[^>]*>(.*?)</h1>", page, re.S)
        assert title and title[1].strip().startswith(f"{number} ·"), path.stem


def test_its_pages_ask_no_other_host_and_know_the_reference_and_the_search(site):
    for file in site.rglob("*.html"):
        page = file.read_text(encoding="utf-8")
        assert "jquery" not in page.lower() and "require.min.js" not in page, file.name
        assert "api/index.html" in page and "search.html" in page, file.name
    assert 'id="tune"' in (site / "api" / "finetune.html").read_text(encoding="utf-8")
    assert 'href="../api/finetune.html#tune"' in (site / "nbs" / "08_finetune.html").read_text(encoding="utf-8")
    index = json.loads((site / "sections.js").read_text(encoding="utf-8").removeprefix("window.SECTIONS=")[:-2])
    assert any("11_peft" in address for address, *_ in index["sections"]) and "lora" in index["words"]


def test_it_reads_the_same_book_as_sphinx(root):
    listed = [file for _, files in parts() for file in files]
    assert len(listed) == len(set(listed)) and all((root / file).is_file() for file in listed)
    text = (root / "_quarto.yml").read_text(encoding="utf-8")
    assert "appendices:" not in text, "Quarto would letter them A, B, ..."
    assert len(re.findall(r'^ +text: "\w+ · .+"$', text, re.M)) == len(listed)


def test_outputs_are_well_formed(root):
    """An EPUB is XML: what a chapter's outputs hold as HTML must be, too."""
    for path in chapters():
        nb = transform(json.loads(path.read_text(encoding="utf-8")), "quarto", path.stem)
        for block in re.findall(r"^`{3,}\{=html\}\n(.*?)\n`{3,}$", markdown(nb), re.S | re.M):
            if block.startswith("<figure"):
                ET.fromstring(block)


def test_the_filter_knows_which_notebook_it_has(root):
    path = chapters()[0]
    run = subprocess.run(
        [sys.executable, root / "tools" / "filter.py"],
        input=path.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        cwd=path.parent,
    )
    assert "# 1 · " in "".join(json.loads(run.stdout)["cells"][0]["source"])


def test_links_of_an_epub_lead_to_places_in_it(root, tmp_path):
    """Quarto makes one document of all chapters; notebooks are no part of it."""
    books = [transform(json.loads(path.read_text(encoding="utf-8")), "quarto", path.stem) for path in chapters()]
    for nb in books:
        nb["cells"] = [cell for cell in nb["cells"] if cell["cell_type"] == "markdown"]
    text = "\n\n".join(["# Pretraining and Fine-tuning", *map(markdown, books)])
    made = tmp_path / "book.epub"
    run = [pypandoc.get_pandoc_path(), "-f", FROM, "-t", "epub3", "--mathml", "--metadata", "title=Book", "-o", made]
    run.append(f"--lua-filter={root / 'site' / 'epub.lua'}")
    subprocess.run(run, input=text, text=True, check=True, cwd=chapters()[0].parent, capture_output=True)
    with zipfile.ZipFile(made) as book:
        files = {name: book.read(name).decode() for name in book.namelist() if name.endswith(".xhtml")}
        names = set(book.namelist())
    places = {name: set(re.findall(r' id="([^"]+)"', page)) for name, page in files.items()}
    links, dead = 0, []
    for name, page in files.items():
        for link in re.findall(r'href="(?!\w+:)([^"]+)"', page):
            file, _, place = link.partition("#")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(name), file)) if file else name
            links += 1
            if there not in names or (place and place not in places.get(there, {place})):
                dead.append((name, link))
    assert links > 1_000 and dead == []
    glossary = next(name for name, page in files.items() if "A7 · Glossary" in page and "ch" in name)
    chapter = next(page for page in files.values() if "6 · Masked-language-model pretraining</h1>" in page)
    assert f'href="{posixpath.basename(glossary)}#' in chapter, "terms lead to the glossary"
