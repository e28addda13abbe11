"""The cards of the home page: what each chapter gives, how long it takes, what it asks for, and a small drawing."""

import html
import json
import re

from .settings import NBS, RESULTS, ROOT

ROW = re.compile(r"^\| (\w+) \| \[([^\]]+)\]\(([\w./]*?)(\w+)\.ipynb\) \| (.*?) \| .*\|$", re.M)
START = re.compile(r"^\[([^\]]+)\]\(([\w./]*01_background)\.ipynb\) · \[([^\]]+)\]\((https://colab[^)]+)\)$", re.M)
LEVELS = {1: "first steps", 2: "some PyTorch", 3: "for those who tune often"}
LEVELS_ZH = {1: "入门", 2: "略懂 PyTorch", 3: "适合经常微调的人"}
LEVEL = {"01": 1, "02": 2, "03": 2, "04": 2, "08": 2, "09": 2, "10": 2, "16": 2}  # of the others: 3
PACE = 200  # words a minute
# line drawings of 64 x 36: a path each, in the color of the text
DRAWN = {
    "01": "M4 30h14v-8h14v-8h14V6h14",  # steps
    "02": "M4 6c10 0 14 24 28 24S50 6 60 6M4 30h56",  # a curve above its axis
    "03": "M4 18a28 14 0 1 0 56 0a28 14 0 1 0-56 0M16 18a16 8 0 1 0 32 0a16 8 0 1 0-32 0M6 8l14 14 8-8 6 6",
    "04": "M50 12A16 14 0 1 0 50 26M50 4v9h-9",  # a loop
    "05": "M4 4v28l16-8V12zM20 18h24M60 4v28l-16-8V12z",  # an hourglass
    "06": "M4 18h14M46 18h14M22 10h20v16H22zM29 15q3-3 5 0t-2 4M32 23v.5",  # a gap
    "07": "M4 26h10v-12H4zM18 26h10v-12H18zM32 26h10v-12H32zM48 20h10M54 15l5 5-5 5",  # what comes next
    "08": "M8 30h48M8 24h48M8 18h48M8 12h48M8 6h48M32 4v28",
    "09": "M4 4h20v28H4zM9 9h10v8H9zM28 8h14v20H28zM46 12h6v12h-6zM56 16h4v4h-4z",
    "10": "M4 10h14M22 10h20M46 10h14M22 14v8h20v-8M32 22v8",  # a span
    "11": "M4 4h22v28H4zM36 4h6v28h-6zM48 4h12v6H48zM30 18h2",  # thin matrices
    "12": "M4 4h44v18H22l-9 8v-8H4zM12 10h28M12 16h16",  # a prompt
    "13": "M4 2h32v13H18l-6 5v-5H4zM28 18h32v12h-6v5l-6-5H28z",  # question and answer
    "14": "M32 4v28M22 32h20M12 8h40M12 8L4 22h16zM52 8l-8 10h16z",  # scales
    "15": "M4 32V4M4 32h56M32 18a12 10 0 1 0 24 0a12 10 0 1 0-24 0M22 6L4 22",
    "16": "M4 8h18v20H4zM28 10l16-4 4 18-16 4zM52 8v20l8-4V12z",
    "17": "M4 6h56M4 14h40M4 22h22M4 30h10",  # halving
    "18": "M4 4h14v8H4zM25 4h14v8H25zM46 4h14v8H46zM11 12l16 11M32 12v11M53 12L37 23M24 23h16v9H24z",  # several in one
    "19": "M4 4h26v28H4zM34 18h8M39 15l3 3-3 3M46 12h14v12H46z",  # a large one teaches a small one
    "20": "M4 4h28v28H4zM38 18h8M43 15l3 3-3 3M50 12h10v12H50z",  # the same, smaller
    "21": "M4 18a12 10 0 1 0 24 0a12 10 0 1 0-24 0M36 18a12 10 0 1 0 24 0a12 10 0 1 0-24 0M29 18h5M31 15l3 3-3 3",  # two domains
    "22": "M4 30C20 30 22 8 38 8S56 6 60 4M12 8h10v10H12zM38 18h10v10H38zM17 13h.1M43 23h.1",  # a boundary, balls
    "23": "M4 8h12v12H4zM24 8h12v12H24zM44 8h12v12H44zM16 14h8M36 14h8M10 20c0 12 40 12 40 2",  # one after the other, and back
    "24": "M4 26h10v6H4zM19 18h10v14H19zM34 10h10v22H34zM49 20h10v12H49zM35 5l3 3 5-6",  # bars, one of them ticked
    "25": "M26 4h12v10H26zM4 22h12v10H4zM48 22h12v10H48zM26 12L14 22M38 12l12 10M16 27h32",  # a ring of three
    "26": "M4 18h14M14 14l4 4-4 4M24 4h16v28H24zM28 10h8M28 18h8M28 26h8M46 12h14M46 18h14M46 24h14",  # in, a service, out
    "27": "M4 4h56v28H4zM10 10h16v14H10zM34 8h.1M34 28V16M40 28V12M46 28V20M52 28V10",  # a box, a spectrum
}


def _time(stem: str, chinese: bool) -> str:
    """How long a chapter takes to read and to run."""
    cells = json.loads((NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    pace = 5 * max(1, round(words / PACE / 5))
    read = f"阅读 {pace} 分钟" if chinese else f"{pace} min to read"
    file = RESULTS / f"{stem}.json"
    run = json.loads(file.read_text(encoding="utf-8")).get("cpu", {}).get("run", {}) if file.exists() else {}
    minutes = run.get("value", run).get("minutes")
    if not minutes:
        return read
    run = max(1, round(minutes))
    return f"{read}，运行 {run} 分钟" if chinese else f"{read}, {run} to run"


def _inline(markdown: str) -> str:
    """Code in backticks of an otherwise plain text, as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(markdown.strip(), quote=False))


def _card(number: str, title: str, folder: str, stem: str, builds: str, chinese: bool) -> str:
    key = stem.split("_")[0]
    path, levels = DRAWN.get(key, DRAWN["01"]), LEVELS_ZH if chinese else LEVELS
    drawing = f'<svg viewBox="0 0 64 36" aria-hidden="true" focusable="false"><path d="{path}"/></svg>'
    return (
        f'<li class="card-of-chapter"><a href="{folder}{stem}.html">{drawing}<strong>{number} · {_inline(title)}</strong></a>'
        f'<p>{_inline(builds)}</p><p class="card-facts">{levels[LEVEL.get(key, 3)]} · {_time(stem, chinese)}</p></li>'
    )


def cards(home: str, chinese: bool = False) -> str:
    """The rows of a home page's table of chapters as a list of cards, in HTML."""
    return '<ul class="cards">' + "".join(_card(*row, chinese) for row in ROW.findall(home)) + "</ul>"


def with_cards(home: str, raw, chinese: bool = False) -> str:
    """README.md, or the Chinese home page, with cards and buttons; `raw(html)` is a block of HTML in the builder's Markdown."""
    lines = home.split("\n")
    at = [i for i, line in enumerate(lines) if ROW.match(line)]
    if at:
        lines[at[0] - 2 : at[-1] + 1] = [raw(cards(home, chinese))]
    text = "\n".join(lines)
    buttons = r'<p class="buttons"><a class="button first" href="\2.html">\1</a> <a class="button" href="\4">\3</a></p>'
    return START.sub(lambda match: raw(match.expand(buttons)), text, count=1)


def figure(markdown: str, raw) -> str:
    """Pictures of README.md with their size, so that nothing moves while they load."""
    from .filter import framed, size_of

    def sized(match):
        file = ROOT / match[2]
        size = size_of(file.read_bytes(), "image/svg+xml" if file.suffix == ".svg" else "image/png")
        place = "".join(f' {k}="{v}"' for k, v in size.items())
        return raw(
            f'{framed(size.get("width", 0))}<img src="{match[2]}" alt="{html.escape(match[1])}"{place} />'
            f"<figcaption>{html.escape(match[3])}</figcaption></figure>"
        )

    return re.sub(r"^!\[([^\]]*)\]\(([^)]+)\)\\\n\*([^*\n]+)\*$", sized, markdown, flags=re.M)
