"""What the theme's pages still need after Sphinx: lighter, searchable, described, allowed to load from their own site only.

`finish(folder)` goes over built pages in place and may run again over the same ones. It also writes the files beside them:
the index of the search, sitemap.xml and robots.txt where settings.ini names the site, llms.txt and llms-full.txt.
"""

import base64
import hashlib
import html
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

from .api import names as api_names
from .heights import with_heights
from .settings import ROOT, book, parts, settings
from .shorter import shorter
from .translate import LANGUAGE

DONE = "<!-- finished -->"
UNUSED = re.compile(
    r'\s*<script[^>]*src="[^"]*(?:fontawesome|searchtools|language_data|searchindex)\.js[^"]*"></script>'
)
INLINE = re.compile(r"<script(?![^>]*(?:\bsrc=|application/json))[^>]*>(.*?)</script>", re.S)
SECTION = "h1", "h2", "h3"
DEFINED = 1000  # added to the count of a name where it is defined
WORDS = 90  # of a section that the index keeps: what a result shows is cut from them
LETTERS = 900  # of these at most: Chinese has few spaces
WORD = re.compile(r"[\u4e00-\u9fff]+|[^\W_\u4e00-\u9fff]+")
CHROME = {  # what the theme says beside a Chinese page
    "In this chapter": "本章内容",
    ">previous<": ">上一页<",
    ">next<": ">下一页<",
    'title="previous page"': 'title="上一页"',
    'title="next page"': 'title="下一页"',
    '="Chapters"': '="目录"',
    '="Source repository"': '="源代码仓库"',
    '="Search"': '="搜索"',
    '="Color mode"': '="配色"',
    '="Color mode: light, dark, or as the system"': '="配色：浅色、深色或跟随系统"',
    "System Settings": "跟随系统",
    "></i>Light<": "></i>浅色<",
    "></i>Dark<": "></i>深色<",
    "Show the whole code": "显示完整代码",
    ">Show code<": ">显示代码<",
    ">Show code: checks<": ">显示代码：检验<",
    ">Show code: ": ">显示代码：",
    ">Show code of the study": ">显示实验的代码",
    ">Show code (": ">显示代码 (",
    ">Show the whole code (": ">显示完整代码 (",
    ">Show all ": ">显示全部 ",
    " cells)": " 格)",
    " rows</button>": " 行</button>",
    " lines</button>": " 行</button>",
    "<summary>Show this section<": "<summary>展开本节<",
    "<summary>Show ": "<summary>展开 ",
    " entries</summary>": " 条</summary>",
}


def policy(page: str) -> str:
    """The content-security policy of a page: the site itself, and the very scripts that stand on the page."""
    sums = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in INLINE.findall(page)]
    scripts = " ".join(["'self'", *(f"'sha256-{s}'" for s in dict.fromkeys(sums))])
    return (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'"
    )


SIGNS = dict(zip("times cdot leq le geq ge neq approx to infty pm sum in mid".split(), "×·≤≤≥≥≠≈→∞±Σ∈|", strict=True))
FUNCTIONS = {"log", "ln", "exp", "max", "min", "arg"}


def spoken(formula: str) -> str:
    """A formula's LaTeX as a search result shows it: Greek letters and signs, no commands and no braces."""

    def sign(match):
        name = match[1]
        case = "CAPITAL" if name[0].isupper() else "SMALL"
        try:
            return unicodedata.lookup(f"GREEK {case} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}")
        except KeyError:
            return f" {name} " if name in FUNCTIONS else SIGNS.get(name, " ")

    text = re.sub(r"\\(?:begin|end|text|operatorname)\b\*?(?:\{(?:aligned|cases|array|matrix)\})?", " ", formula)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2 ", text)
    text = re.sub(r"\\([a-zA-Z]+)", sign, text)
    return " ".join(re.sub(r"[{}]", "", re.sub(r"\\[^|]|[&~]", " ", text)).replace("\\", "").split())


class Reader(HTMLParser):
    """The sections of a page in one pass: [anchor, title, words, names defined] from title to title; formulas in plain signs."""

    EMPTY = {"img", "br", "hr", "input", "meta", "link", "source", "wbr", "col"}

    def __init__(self, page: str):
        super().__init__()
        self.sections, self.anchors, self.depth, self.skipped, self.title, self.paragraphs = [], [], 0, 0, None, []
        self.in_paragraph = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if tag in ("article", "main") or self.depth:
            self.depth += tag not in self.EMPTY
        if not self.depth or tag in self.EMPTY:
            return
        quiet = tag in {"script", "style", "math"} or "headerlink" in (a.get("class") or "")
        if self.skipped or quiet:
            if quiet and tag == "math" and self.sections and not self.skipped:
                self.handle_data(f" {spoken(a.get('alttext', ''))} ")
            self.skipped += 1
            return
        if tag == "section":
            self.anchors.append(a.get("id", ""))
        elif tag in SECTION:
            self.title = tag
            anchor = a.get("id") or a.get("data-anchor-id") or (self.anchors[-1] if self.anchors else "")
            self.sections.append([f"#{anchor}" if anchor and tag != "h1" else "", "", [], []])
        elif tag == "p":
            self.in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        if not self.depth or tag in self.EMPTY:
            return
        self.depth -= 1
        if self.skipped:
            self.skipped -= 1
        elif tag == "section" and self.anchors:
            self.anchors.pop()
        elif tag == self.title:
            self.title = None
        elif tag == "p":
            self.in_paragraph = False

    def handle_data(self, data):
        if not self.sections or self.skipped:
            return
        if self.title:
            self.sections[-1][1] += data
        else:
            self.sections[-1][2] += data.split()
            self.sections[-1][3] += re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", data, re.M)
        if self.in_paragraph and not self.title:
            self.paragraphs[-1] += data


def article(page: str) -> Reader:
    """What a page says; the theme's copy of its title for printers is left out. Quarto's pages have a <main> only."""
    tag = "article" if "<article" in page else "main"
    start, end = page.find(f"<{tag}"), page.find(f"</{tag}>")
    return Reader(re.sub(r"</?span[^>]*>", "", page[start : end + len(tag) + 3]) if start >= 0 else "")


def promise(said: Reader) -> str:
    """The sentence below a page's title: its description."""
    text = " ".join(next(iter(said.paragraphs), "").split())
    return text if len(text) <= 200 else text[:199].rsplit(" ", 1)[0] + " …"


def head(page: str, said: Reader, address: str) -> str:
    """The lines that the page's head gains."""
    title = re.search(r"<title>(.*?)</title>", page, re.S)
    title = " ".join(title[1].split()) if title else ""
    lines = [f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(page), quote=True)}" />']
    text = html.escape(promise(said), quote=True)
    if text:
        lines.append(f'<meta name="description" content="{text}" />')
    lines += [f'<meta property="og:title" content="{title}" />', '<meta property="og:type" content="article" />']
    lines += [f'<meta property="og:description" content="{text}" />'] if text else []
    if site := settings()["site"].rstrip("/"):
        lines.append(f'<meta property="og:url" content="{site}/{address}" />')
        lines.append(f'<meta property="og:image" content="{site}/_static/card.png" />')
        lines.append('<meta name="twitter:card" content="summary_large_image" />')
        if address == "404.html":  # it is shown at any address, so what it loads is named in full
            lines.insert(0, f'<base href="{site}/" />')
    return "\n    ".join(lines)


OURS = re.compile(r'\s*<script defer src="[^"]*/(?:book|play)\.js[^"]*"></script>')
# marks that look as the text around them: half of a page's elements
PLAIN = re.compile(r'<span class="[npw]">([^<]*)</span>|<span></span>(?=<)')
# the empty header of a table of facts
BARE = re.compile(r'<thead>\s*<tr[^>]*>(?:\s*<td class="head"></td>)+\s*</tr>\s*</thead>\s*')
# a formula with the signs beside it: no line begins with its comma
HELD = re.compile(r"([(\[“‘]?)(<span class=\"math\"><math .*?</math></span>)((?:[,.;:!?)\]”’%]|-\w+)*)", re.S)
# what a reader takes as one: a number with its unit, the two ends of an interval, a date, a small number's exponent
JOINED = re.compile(r"(?<=\d) (?=%|[kMG]B\b|ms\b|s\b|°)|(?<=[\d%],) (?=[-+−]?[\d.]+ ?%?\])")
WHOLE = re.compile(r"(?<![\w-])(?:\d{4}-\d\d-\d\d|\d[\d.]*e-\d+)(?![\w-])")
VERBATIM = re.compile(r"(<(pre|code|script|style|math|textarea)\b.*?</\2>|<[^>]*>)", re.S)
CAPTION = re.compile(r"<p>(<em>(?:(?!</?em>|</p>).)*</em>)</p>", re.S)
WAITS = re.compile(r'<script src=(?!"[^"]*/documentation_options\.js)')


def joined(said: str) -> str:
    """The text of a page whose lines break beside "20.3 %" and "[19.4, 21.2]" and not in them."""
    pieces = VERBATIM.split(said)
    for i in range(0, len(pieces), 3):
        text = JOINED.sub("\N{NO-BREAK SPACE}", pieces[i])
        pieces[i] = WHOLE.sub(lambda m: f'<span class="held">{m[0]}</span>', text)
    return "".join(piece for i, piece in enumerate(pieces) if i % 3 != 2)


def repair(page: str) -> str:
    """What the theme writes and a reader, a reader's screen reader or a slow line would trip over."""
    page = UNUSED.sub("", page)
    page = WAITS.sub("<script defer src=", page)  # each then runs in a task of its own: a phone can scroll in between
    page = OURS.sub("", page).replace("</body>", "".join(OURS.findall(page)) + "\n</body>")  # the theme's come first
    page = PLAIN.sub(lambda m: m[1] or "", page)
    page = HELD.sub(lambda m: f'<span class="held">{m[0]}</span>' if m[1] or m[3] else m[0], page)
    start, end = page.find("<article"), page.find("</article>")
    if start >= 0:
        page = page[:start] + CAPTION.sub(r'<p class="caption">\1</p>', joined(page[start:end])) + page[end:]
    above, viewport, below = re.split(r'(<meta name="viewport"[^>]*>)', page, maxsplit=1)
    page = above + viewport + re.sub(r'\s*<meta name="viewport"[^>]*>', "", below)
    page = re.sub(r"<title>(.*?) &#8212; \1</title>", r"<title>\1</title>", page)
    page = re.sub(r'\s*<div id="ethical-ad-placement".*?</div>', "", page, flags=re.S)
    page = page.replace(
        'placeholder="Search..."\n         aria-label="Search..."', 'placeholder="Search" aria-label="Search"'
    )
    page = page.replace('aria-label="Color mode"', 'aria-label="Color mode: light, dark, or as the system"')
    page = page.replace(
        ' class="bd-sidebar-primary bd-sidebar',
        ' role="navigation" aria-label="Book" class="bd-sidebar-primary bd-sidebar',
    )
    page = re.sub(r'(<button class="btn search-button-field[^>]*?) title="Search" aria-label="Search"', r"\1", page)
    page = page.replace('<th class="head"><p></p></th>', '<td class="head"></td>')
    page = BARE.sub("", page)
    page = page.replace(
        '<summary><span class="toctree-toggle"', '<summary aria-label="Its pages"><span class="toctree-toggle"'
    )
    page = page.replace('<summary aria-label="Toggle hidden content">', "<summary>")  # its name is what it shows
    page = re.sub(
        r'<div class="sidebar-primary-items__end[^>]*>\s*<div class="sidebar-primary-item"></div>\s*</div>', "", page
    )
    for name in ("primary", "secondary"):
        label = {"primary": "Chapters", "secondary": "In this chapter"}[name]
        page = page.replace(f'title="Toggle {name} sidebar"', f'title="{label}" aria-label="{label}"')
    return page


def counterpart(address: str, out: Path) -> str:
    """The same page in the other language, "" where there is none."""
    folder, _, name = address.rpartition("/")
    other = {"": "zh/index.html" * (name == "index.html"), "nbs": f"zh/{name}", "zh": f"nbs/{name}"}.get(folder, "")
    other = "index.html" if other == "nbs/index.html" else other
    return other if other and (out / other).is_file() else ""


def switched(page: str, address: str, out: Path) -> str:
    """A link to the page in the other language in the header, and what a Chinese page needs: its language, the theme's words."""
    chinese = address.startswith("zh/")
    links = (
        r'(<a )([^<>]*href="(?:\.\./)?zh/[^"]*")' if not chinese else r'(<a )([^<>]*href="(?!\.\./|https?:|\#)[^"]*")'
    )
    tag = rf'\1lang="{LANGUAGE}" hreflang="{LANGUAGE}" \2'
    start, end = page.find("<article"), page.find("</article>")
    above, said, below = page[:start], page[start:end], page[end:]
    if chinese:
        above = above.replace('<html lang="en"', f'<html lang="{LANGUAGE}"', 1)
        above = above.replace(' class="bd-sidebar-primary', ' lang="en" class="bd-sidebar-primary', 1)
        for english, other in CHROME.items():
            above, said, below = (part.replace(english, other) for part in (above, said, below))
        said = said.replace('<div class="play" ', '<div class="play" lang="en" ')
    side = above.find("bd-sidebar-primary bd-sidebar")
    main = above.find("<main", side)
    shelf = re.sub(links, tag, above[side:main])
    shelf = shelf.replace('<span class="caption-text">中文', f'<span class="caption-text" lang="{LANGUAGE}">中文')
    if chinese:
        shelf = shelf.replace(
            '<a class="current reference internal"', f'<a lang="{LANGUAGE}" class="current reference internal"'
        )
    else:
        below = re.sub(links, tag, below)
    above = above[:side] + shelf + above[main:]
    if other := counterpart(address, out):
        up = "../" * address.count("/")
        lang, name = ("en", "English") if chinese else (LANGUAGE, "中文")
        link = f'<a class="language" href="{up}{other}" lang="{lang}" hreflang="{lang}" rel="alternate">{name}</a>'
        above = above.replace(
            '<div class="article-header-buttons">', f'<div class="article-header-buttons">\n{link}', 1
        )
        for code, target in ((lang, up + other), (LANGUAGE if chinese else "en", address.rpartition("/")[2])):
            above = above.replace(
                "</head>", f'  <link rel="alternate" hreflang="{code}" href="{target}" />\n  </head>', 1
            )
    return above + said + below


ICONS = re.compile(r"@font-face\{[^}]*\}|(?:\.fa-[\w-]+(?::before)?,?)+\{--fa:[^}]*\}")


def lighter(out: Path) -> None:
    """Without the theme's icons: two fonts of 110 kB each and two thousand rules; site/static/book.css draws the few in use."""
    for file in out.glob("_static/styles/*.css"):
        text = file.read_text(encoding="utf-8")
        if (short := ICONS.sub("", text)) != text:
            file.write_text(short, encoding="utf-8")
    for font in out.glob("_static/vendor/fontawesome/webfonts/*"):
        font.unlink()


SCROLLED = re.compile(r'document\.querySelectorAll\(\["pre",[^\]]*\]\.join\(", "\)\)')


def calmer(out: Path) -> None:
    """The theme lays the page out again for every box it looks at, seconds on a phone; site/static/book.js looks at all of them at once."""
    script = out / "_static/scripts/pydata-sphinx-theme.js"
    text = script.read_text(encoding="utf-8")
    if (short := SCROLLED.sub("[]", text)) != text:
        script.write_text(short, encoding="utf-8")
    elif "[].forEach" not in text:
        raise ValueError(
            f"{script.name}: this version of the theme measures its boxes elsewhere; see tools/finish.py, calmer"
        )
    script = out / "_static/scripts/sphinx-book-theme.js"  # a button that is pressed from the keyboard keeps the focus
    text = script.read_text(encoding="utf-8")
    if (short := text.replace("(()=>{t.blur()})", "(e=>{e.detail&&t.blur()})")) != text:
        script.write_text(short, encoding="utf-8")
    elif "e.detail&&" not in text:
        raise ValueError(
            f"{script.name}: this version of the theme takes the focus elsewhere; see tools/finish.py, calmer"
        )


CODE = re.compile(
    r'<code(?: class="docutils literal notranslate")?>(?:<span class="pre">)?([\w.]+)(\(\))?(?:</span>)?</code>'
)


def linked(page: str, known: dict) -> str:
    """`train.fit` in a chapter's text leads to its entry of the API reference, and so does `fit` where it is built."""

    def link(match):
        name = match[1].removeprefix("ftbook.") if match[1].count(".") > 1 else match[1]
        address = known.get(name)
        if page.rfind("<a ", 0, match.start()) > page.rfind("</a>", 0, match.start()):
            return match[0]  # it stands in a link already
        return f'<a class="api" href="{address}">{match[0]}</a>' if address else match[0]

    return CODE.sub(link, page)


TABLE = re.compile(r'<table class="table">(.*?)</table>', re.S)


def stacking(page: str) -> str:
    """Tables whose cells stand below one another on a phone, each with the title of its column."""

    def table(match):
        titles = [re.sub("<[^>]+>", "", t).strip() for t in re.findall(r"<th\b[^>]*>(.*?)</th>", match[1], re.S)]
        rows = match[1].split("<tr")
        for i, row in enumerate(rows):
            of_row = iter(titles)
            rows[i] = re.sub("<td", lambda _: f'<td data-label="{html.escape(next(of_row))}"', row)  # noqa: B023
        return f'<table class="table stacks">{"<tr".join(rows)}</table>'

    return TABLE.sub(table, page)


CELL = re.compile(r"<td((?:\s[^>]*)?)>(.*?)</td>", re.S)
LONG_CELL = 60  # letters; a cell with more of them keeps a column that can be read on a phone


def worded(page: str) -> str:
    """Cells of many words say so: on a phone they are not squeezed between columns of one word."""

    def cell(match):
        if len(re.sub(r"<[^>]+>", "", match[2]).strip()) <= LONG_CELL:
            return match[0]
        marks = match[1].replace('class="', 'class="words ') if "class=" in match[1] else match[1] + ' class="words"'
        return f"<td{marks}>{match[2]}</td>"

    return CELL.sub(cell, page)


def finish_page(file: Path, out: Path) -> Reader:
    """Finish a page where that was not done yet; returns what it says."""
    page = file.read_text(encoding="utf-8")
    said = article(page)
    if DONE in page:
        return said
    page = repair(page)
    if file.parent.name in ("nbs", "zh", "api"):
        page = linked(page, api_names(file.stem))
    if file == out / "search.html":
        page = searching(page)
    if file.name == "index.html" and file.parent.name != "api":
        page = stacking(page)
    if file.parent.name in ("nbs", "zh") and file.name != "index.html" and "glossary" not in file.name:
        page = shorter(page)
    page = with_heights(worded(page))
    page = switched(page, file.relative_to(out).as_posix(), out)
    at = page.index("<head>") + len("<head>")
    charset = page.find("/>", page.index("charset", at)) + 2 if "charset" in page[at : at + 300] else at
    added = head(page, said, file.relative_to(out).as_posix())
    file.write_text(f"{page[:charset]}\n    {added}\n    {DONE}{page[charset:]}", encoding="utf-8")
    return said


def searching(page: str) -> str:
    """The search page with the book's own search in place of the theme's."""
    page = re.sub(r"\s*<script>\s*// Activate the search field.*?</script>", "", page, flags=re.S)
    page = page.replace('<div id="search-results"></div>', '<div id="search-results" aria-live="polite"></div>')
    scripts = '<script src="sections.js"></script>\n    <script src="_static/find.js"></script>\n  </body>'
    return page.replace("</body>", scripts, 1)


def sections(said: Reader, address: str) -> list:
    """[address, page's title, section's title, words, names it defines] of every section of a page."""
    found = said.sections
    titles = [" ".join(title.split()) for _, title, *_ in found]
    return [
        [address + anchor, titles[0], title if i else "", words, names]
        for i, ((anchor, _, words, names), title) in enumerate(zip(found, titles, strict=True))
    ]


def pieces(text: str) -> list:
    """The words of a text; of Chinese, which has no spaces, each two signs that stand together."""
    found = []
    for word in WORD.findall(text.lower()):
        chinese = len(word) > 1 and "\u4e00" <= word[0] <= "\u9fff"
        found += [word[i : i + 2] for i in range(len(word) - 1)] if chinese else [word]
    return found


def index(out: Path, pages: dict) -> None:
    """sections.js: what the search knows. Every word of a section counts, its first WORDS can be shown."""
    rows, words = [], {}
    for name, said in pages.items():
        for address, page, title, text, names in sections(said, name):
            for word in pieces(" ".join(text)):
                at = words.setdefault(word, {})
                at[len(rows)] = at.get(len(rows), 0) + 1
            for name in names:  # where a name is made, it is explained
                at = words.setdefault(name.lower(), {})
                at[len(rows)] = at.get(len(rows), 0) + DEFINED
            rows.append([address, page, title, " ".join(text[:WORDS])[:LETTERS]])
    counts = {w: [x for pair in at.items() for x in pair] for w, at in sorted(words.items()) if len(w) < 40}
    data = json.dumps({"sections": rows, "words": counts}, ensure_ascii=False, separators=(",", ":"))
    (out / "sections.js").write_text(f"window.SECTIONS={data};\n", encoding="utf-8")


def chapters_text() -> tuple:
    """(llms.txt, llms-full.txt): the pages with their promises, and the whole book as Markdown."""
    short, full = [f"# {book()['title']}", "", f"> {settings()['description']}", ""], []
    for part, files in parts():
        short += [f"## {part or 'Start'}", ""]
        for file in files:
            if not file.endswith(".ipynb"):
                continue
            cells = json.loads((ROOT / file).read_text(encoding="utf-8"))["cells"]
            texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
            lines = [line for line in "\n".join(texts[:2]).split("\n") if line.strip()]
            name = lines[0].lstrip("# ")
            said = next((line for line in lines[1:] if not line.startswith(("#", "|", "[!", "<", ">"))), "")
            short.append(f"- [{name}]({file.replace('.ipynb', '.html')}): {said}")
            for c in cells:
                source = "".join(c["source"])
                full.append(source if c["cell_type"] == "markdown" else f"```python\n{source}\n```")
        short.append("")
    return "\n".join(short), "\n\n".join(full) + "\n"


def finish(out: Path) -> None:
    """Finish every page below `out`, then write the files beside them."""
    files = [f for f in sorted(out.rglob("*.html")) if "_static" not in f.parts]
    said = {f.relative_to(out).as_posix(): finish_page(f, out) for f in files}
    index(out, {name: page for name, page in said.items() if "/" in name or name == "index.html"})
    lighter(out)
    calmer(out)
    beside(out, list(said))
    for pattern in (
        "searchindex.js",
        "_static/searchtools.js",
        "_static/language_data.js",
        "_static/scripts/fontawesome.js*",
    ):
        for unused in out.glob(pattern):
            unused.unlink()


def beside(out: Path, pages: list) -> None:
    """The files for programs beside the pages."""
    short, full = chapters_text()
    (out / "llms.txt").write_text(short, encoding="utf-8")
    (out / "llms-full.txt").write_text(full, encoding="utf-8")
    if site := settings()["site"].rstrip("/"):
        places = [f"  <url><loc>{site}/{n}</loc></url>" for n in pages if n not in ("404.html", "search.html")]
        opening = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
        (out / "sitemap.xml").write_text("\n".join([opening, *places, "</urlset>\n"]), encoding="utf-8")
        (out / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {site}/sitemap.xml\n", encoding="utf-8")
