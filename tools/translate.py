"""The Chinese edition: `python -m tools.translate` names what is not translated and what changed since; `--stamp ID` renews.

nbs/zh/NAME.md holds the translations of nbs/NAME.ipynb, one block a text: `<!-- cell:n hash -->`, then the Chinese. The
texts of a Markdown cell are its sections (each `## ` opens one); those of a code cell are, output by output, the template
of a sentence, the caption of a table, the alt text of a figure, a caption. The hash is that of the English. A template
keeps its {fields}: they are filled from the stored output, so that no number is written twice. nbs/zh/words.md translates
what stands in tables and fields: `English = 中文` a line. A notebook whose title is translated has a page zh/NAME.html;
the summaries of all chapters stand on zh/summaries.html.
"""

import argparse
import copy
import functools
import hashlib
import html
import json
import re
import string
import sys
from pathlib import Path

from .filter import FENCE, PLAY, options_of
from .settings import NBS, ROOT, chapters, find

FOLDER = NBS / "zh"
LANGUAGE, NAME = "zh-Hans", "中文"
GENERATED = "ftbook0"  # how the ids of such cells begin
MISSING, CHANGED = "（尚未翻译）", "（原文已更改）"
MARK = re.compile(r"^<!-- ([\w-]+:\d+)(?: ([0-9a-f]{8}))? -->$", re.M)
HEADING = re.compile(r"^(#{1,6}) (.*)$")
SUMMARY = re.compile(r"^## Summary\s*$", re.M)
LINK = re.compile(r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.S)
ENGLISH = re.compile(r"(“|(?<!\*)\*)([A-Z][ -)+-~]*)(”|\*(?!\*))")  # a name of a section of an English page
CAPTION = re.compile(r"\*[^*].*\*", re.S)


def stamp(text: str) -> str:
    """The short hash of an English text."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def blocks(text: str) -> dict:
    """The blocks of a file of translations: key -> (hash, Chinese)."""
    parts = MARK.split(text)
    found: dict = {}
    for key, seen, chinese in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if key in found:
            raise ValueError(f"block {key} stands twice; one block a text is allowed: delete one of them")
        found[key] = (seen or "", chinese.strip())
    return found


def file_of(name: str) -> Path:
    """Where the translations of a notebook stand."""
    return FOLDER / f"{name}.md"


def load(name: str) -> dict:
    """The blocks of a notebook, none where it has no file."""
    file = file_of(name)
    return blocks(file.read_text(encoding="utf-8")) if file.exists() else {}


def words() -> dict:
    """nbs/zh/words.md: English -> Chinese."""
    lines = (FOLDER / "words.md").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" = ", 1) for line in lines if " = " in line and not line.startswith(("#", "<!--"))]
    return {english.strip(): chinese.strip() for english, chinese in pairs}


def outside(lines: list):
    """(line, whether it stands outside of fenced code), line by line."""
    fence = None
    for line in lines:
        match = FENCE.match(line)
        opens = match and (fence is None or line.strip().startswith(fence))
        yield line, fence is None and not opens
        if opens:
            fence = match[1] if fence is None else None


def sections(text: str) -> list:
    """Markdown cut before each `## `."""
    found: list = [[]]
    for line, free in outside(text.split("\n")):
        if free and line.startswith("## ") and any(x.strip() for x in found[-1]):
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines).strip() for lines in found]


def text_of(output: dict) -> str:
    """What is to be translated of an output, "" where there is nothing."""
    about, data = output.get("metadata", {}).get("ftbook", {}), output.get("data", {})
    if "template" in about:
        return about["template"]
    if "table" in about:
        return about["table"].get("caption") or ""
    if "alt" in about:
        return about["alt"]
    said = "".join(data.get("text/markdown", ""))
    return said if not about and CAPTION.fullmatch(said.strip()) else ""


def is_played(cell: dict) -> bool:
    """Whether a cell shows controls: their frames stay English."""
    return any(PLAY in o.get("data", {}) for o in cell.get("outputs", []))


def texts(cell: dict) -> dict:
    """The English texts of a cell: key -> text; none of the cells that tools/generate.py writes."""
    if cell["id"].startswith(GENERATED):
        return {}
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        found = sections(source)
    else:
        hidden = "hide" in options_of(source.split("\n"))[0]
        found = [] if hidden or is_played(cell) else [text_of(o) for o in cell.get("outputs", [])]
    return {f"{cell['id']}:{n}": text for n, text in enumerate(filter(str.strip, found), 1)}


def fields(template: str) -> list:
    """[(literal text before, field as it is written or "")] of a template."""
    found = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        field = "" if name is None else name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        found.append((literal, field))
    return found


def values(template: str, said: str) -> dict:
    """What stands in the fields of a template in the sentence made from it: field -> text.

    A comma between the bounds of an interval ends no field. A sentence that could be read in two ways is an error.
    """
    pattern, named = "", {}
    for literal, field in fields(template):
        pattern += re.escape(literal).replace("<", "(?:<|&lt;)")
        if field and field in named:
            pattern += f"(?P={named[field]})"
        elif field:
            named[field] = f"f{len(named)}"
            pattern += rf"(?P<{named[field]}>(?:[^\[\]]|\[[^\[\]]*\])*?)"
    first, other = (re.fullmatch(p, said) for p in (pattern, pattern.replace(")*?)", ")*)")))
    if not first or not other:
        raise ValueError(f"{said[:60]!r} was not made from {template[:60]!r}: run its notebook again")
    if first.groups() != other.groups():
        raise ValueError(f"{said[:60]!r} does not tell where its fields end: put other words between two of them")
    return {field: first[name] for field, name in named.items()}


def wrong(key: str, english: str, chinese: str, template: bool) -> list:
    """What a translation must keep and does not: fields of a template; links and formulas."""
    told = []
    if template:
        try:
            have = {f for _, f in fields(chinese) if f}
        except ValueError as error:
            return [f"{key}: {error}; a brace that is no field is written twice"]
        want = {f for _, f in fields(english) if f}
        told += [
            f"{key}: the field {{{f}}} is missing; a translation has the fields of its English"
            for f in sorted(want - have)
        ]
        told += [f"{key}: the field {{{f}}} is not in the English; it has {sorted(want)}" for f in sorted(have - want)]
    for pattern, what in ((LINK, "link"), (FORMULA, "formula")):
        a, b = (sorted(pattern.findall(t)) for t in (english, chinese))
        told += [f"{key}: the {what} {x!r} stands once more in the English" for x in _less(a, b)]
        told += [f"{key}: the {what} {x!r} stands once more in the Chinese" for x in _less(b, a)]
    return told


def _less(a: list, b: list) -> list:
    """What of `a` is left when each of `b` is taken away once."""
    rest = list(a)
    for x in b:
        if x in rest:
            rest.remove(x)
    return rest


def english(text: str, note: str) -> str:
    """A text that stays English, with its language and a note; headings stay headings."""
    out: list = []
    body: list = []
    told = f'<p class="untranslated">{note}</p>'

    def flush():
        if any(line.strip() for line in body):
            out.extend(["", '<div lang="en">', "", *body, "", "</div>", ""])
        body.clear()

    for line, free in outside(text.split("\n")):
        match = HEADING.match(line) if free else None
        if match:
            flush()
            out.append(f'{match[1]} <span lang="en">{match[2]}</span>')
        else:
            body.append(line)
        if told:
            out += ["", told, ""]
            told = ""
    flush()
    return "\n".join(out).strip()


class Edition:
    """One notebook in Chinese: `cell(cell)` translates, `problems()` tells what is missing, changed or wrong."""

    def __init__(self, nb: dict, found: dict, known: dict, name: str = ""):
        self.nb, self.found, self.known, self.name = nb, found, known, name
        self.anchors = set(re.findall(r"\]\(#([^)]+)\)", "".join("".join(c["source"]) for c in nb["cells"])))

    def whole(self) -> bool:
        """Whether the notebook's title is translated: then it has a page."""
        first = next((c for c in self.nb["cells"] if c["cell_type"] == "markdown"), None)
        return first is not None and f"{first['id']}:1" in self.found

    def state(self, key: str, text: str) -> str:
        """Note to an English text, "" where its translation stands."""
        if key not in self.found:
            return MISSING
        return "" if self.found[key][0] == stamp(text) else CHANGED

    def wanted(self) -> dict:
        """The texts that are to be translated: all of a page, else those of the summary."""
        cells = self.nb["cells"] if self.whole() else self.summary()
        every = {k: t for c in cells for k, t in texts(c).items()}
        if self.whole():
            return every
        first = [k for k, t in every.items() if SUMMARY.match(t)][:1]
        return {k: t for k, t in every.items() if k in first or not k.startswith(cells[0]["id"])}

    def summary(self) -> list:
        """The cell with the heading, and the code cell below it that says the sentences; [] where there is none."""
        for i, cell in enumerate(self.nb["cells"]):
            if cell["cell_type"] == "markdown" and SUMMARY.search("".join(cell["source"])):
                below = self.nb["cells"][i + 1 : i + 2]
                return [cell] + [c for c in below if any(t.startswith("1. ") for t in texts(c).values())]
        return []

    def problems(self) -> list:
        """Everything that a translator has to look at, a line each."""
        every = {k: t for c in self.nb["cells"] for k, t in texts(c).items()}
        outputs = [o for c in self.nb["cells"] for o in c.get("outputs", [])]
        said = {o.get("metadata", {}).get("ftbook", {}).get("template") for o in outputs}
        place = f"nbs/zh/{self.name}.md"
        told = [f"{place}: {k} is not translated: {t[:60]!r}" for k, t in self.wanted().items() if k not in self.found]
        for key, (_, chinese) in self.found.items():
            if key not in every:
                told.append(f"{place}: {key} is no text of nbs/{self.name}.ipynb any more: delete the block")
                continue
            text = every[key]
            if self.state(key, text):
                told.append(f"{place}: {key} changed in English since: {text[:60]!r}; look, then --stamp {key}")
            else:
                told += [f"{place}: {line}" for line in wrong(key, text, chinese, text in said)]
        return told

    def text(self, key: str, text: str) -> str:
        """A section in Chinese, or in English with its note."""
        note = self.state(key, text)
        return english(text, note) if note else self.found[key][1]

    def word(self, text: str) -> str:
        """A value of a field or of a cell in Chinese where words.md has it; also of a list "*a*; *b*"."""
        text = re.sub(r"(?<=\d) points\b", " 个百分点", text)
        for end, chinese in self.known.items():
            if end.startswith(",") and text.endswith(end):
                return self.word(text.removesuffix(end)) + chinese
        parts = [self.known.get(p) or self.known.get(p.strip("*")) or self.phrase(p) or p for p in text.split("; ")]
        return self.known.get(text, "；".join(parts))

    def phrase(self, said: str) -> str:
        """A text by its pattern in words.md, "" where none fits."""
        for pattern, chinese in self.known.items():
            if "{" in pattern:
                try:
                    return chinese.format(**values(pattern, said))
                except ValueError:
                    continue
        return ""

    def sentence(self, key: str, template: str, said: str) -> str:
        """A sentence in Chinese, its numbers taken from the stored English one."""
        if note := self.state(key, template):
            return english(said, note)
        if told := wrong(key, template, self.found[key][1], True):
            raise ValueError("\n".join(f"nbs/zh/{self.name}.md: {line}" for line in told))
        filled = values(template, said)
        return "".join(lit + (self.word(filled[f]) if f else "") for lit, f in fields(self.found[key][1]))

    def table(self, key: str, caption: str, said: str) -> str:
        """A table: words of words.md, the caption in Chinese."""
        lines = []
        for row in said.partition("\n\n")[0].split("\n"):
            cells = [c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]]
            lines.append("| " + " | ".join(map(self.word, cells)) + " |")
        if not caption:
            return "\n".join(lines)
        note = self.state(key, caption)
        below = f'<em lang="en">{html.escape(caption, quote=False)}</em>{note}' if note else f"*{self.found[key][1]}*"
        return "\n".join([*lines, "", below])

    def output(self, output: dict, key: str) -> dict:
        """An output in Chinese; `key` is that of its text."""
        about, data, text = output.get("metadata", {}).get("ftbook", {}), output.get("data", {}), text_of(output)
        said = "".join(data.get("text/markdown", ""))
        if "template" in about:
            data["text/markdown"] = self.sentence(key, text, said)
        elif "table" in about:
            data["text/markdown"] = self.table(key, text, said)
        elif "call" in about:
            data["text/markdown"] = self.phrase(said) or f'<span lang="en">{said}</span>'
        elif "alt" in about:
            note = self.state(key, text)
            about["alt"] = text if note else self.found[key][1]
            alt = html.escape(about["alt"], quote=True)
            lang = 'lang="en" ' if note else ""
            if "text/html" in data:
                shown = re.sub(r'\balt="[^"]*"', lambda _: f'alt="{alt}"', "".join(data["text/html"]), count=1)
                data["text/html"] = shown.replace("<img ", f"<img {lang}", 1)
        elif text:
            note = self.state(key, text)
            data["text/markdown"] = english(text, note) if note else self.found[key][1]
        return output

    def cell(self, cell: dict) -> dict:
        """A cell of the Chinese page: its text translated, code as it is."""
        cell, found = copy.deepcopy(cell), texts(cell)
        if cell["cell_type"] == "markdown":
            title = next((line for line in "".join(cell["source"]).split("\n") if line.startswith(("# ", "## "))), "")
            if not found:
                cell["source"] = re.sub(r"\[([^\[\]]+)\]", lambda m: f"[{self.word(m[1])}]", "".join(cell["source"]))
                return cell
            cell["source"] = relinked("\n\n".join(self.anchored(t, self.text(k, t)) for k, t in found.items()))
            cell["metadata"] = {"title": title}  # tools/filter.py asks for the English one
        elif found or not is_played(cell):
            keys = iter(found)
            for output in cell.get("outputs", []):
                if output.get("data"):
                    self.output(output, next(keys) if text_of(output) and found else "")
                    if "text/markdown" in output["data"]:
                        output["data"]["text/markdown"] = relinked("".join(output["data"]["text/markdown"]))
        return cell

    def anchored(self, english: str, chinese: str) -> str:
        """The Chinese text, whose headings answer to the English anchors that links of this page name."""
        lines = [line for line in english.split("\n") if HEADING.match(line)]
        anchors = iter([re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines])
        made = []
        for line in chinese.split("\n"):
            if HEADING.match(line) and (anchor := next(anchors, "")) in self.anchors:
                made.append(f"({anchor})=")
            made.append(line)
        return "\n".join(made)

    def notebook(self) -> dict:
        """The notebook of the Chinese page."""
        cells = [self.cell(c) for c in self.nb["cells"]]
        return {**self.nb, "cells": [cells[0], scope(), *cells[1:]] if self.name == "index" else cells}


def edition(file: Path) -> Edition:
    """The Chinese edition of a notebook."""
    return Edition(json.loads(file.read_text(encoding="utf-8")), load(file.stem), words(), file.stem)


def notebooks() -> list:
    """The home page and the chapters."""
    return [NBS / "index.ipynb", *chapters()]


def editions() -> dict:
    """Those with a page: name -> Edition."""
    every = {f.stem: edition(f) for f in notebooks() if file_of(f.stem).exists()}
    return {name: one for name, one in every.items() if one.whole()}


def relinked(text: str, own: str = "") -> str:
    """Links to notebooks lead to their Chinese pages where there is one, else to the English; `#x` to a section of `own`."""

    def link(match):
        target, _, anchor = match[1].partition("#")
        anchor = f"#{anchor}" if anchor else ""
        if own and not target and anchor:
            return f"](../nbs/{own}.ipynb{anchor})"
        if not re.fullmatch(r"\w+\.ipynb", target):
            return match[0]
        name = target.removesuffix(".ipynb")
        if name in whole() and not anchor:
            return f"](./{target})"
        return f"](../nbs/{target}{anchor})" if name != "index" else "](../index.md)"

    return LINK.sub(link, text)


@functools.cache
def whole() -> frozenset:
    """Names of the notebooks with a Chinese page."""
    return frozenset(f.stem for f in notebooks() if file_of(f.stem).exists() and edition(f).whole())


def titles() -> dict:
    """Chinese titles of chapters: the text of the last link that the home page has to each."""
    home = "\n".join(chinese for _, chinese in load("index").values())
    return {name: text for text, name in re.findall(r"\[([^\[\]]+)\]\((\w+)\.ipynb\)", home)}


def summaries() -> str:
    """The summaries of all chapters as one page."""
    out = ["# 各章小结", "", "每一章的结论，附实测数字；数字由存档的运行结果填入。未译各章的节名保留英文。", ""]
    named = titles()
    for file in chapters():
        one = edition(file)
        if not one.summary():
            continue
        key, body = file.stem.split("_")[0].lstrip("0"), []
        for cell in one.summary():
            for k, text in texts(cell).items():
                if SUMMARY.match(text):
                    body += [line for line in one.text(k, text).split("\n") if not line.startswith("## ")]
            if cell["cell_type"] == "code":
                told = zip(cell["outputs"], one.cell(cell)["outputs"], strict=True)
                body += [
                    "",
                    *("".join(new["data"]["text/markdown"]) for old, new in told if text_of(old).startswith("1. ")),
                ]
        out += [
            f"## [{key} · {named.get(file.stem, file.stem)}]({file.name})",
            "",
            relinked("\n".join(body), file.stem),
            "",
        ]
    return ENGLISH.sub(r'\1<span lang="en">\2</span>\3', relinked("\n".join(out)))


def scope() -> dict:
    """A cell that says which pages are in Chinese, for the home page."""
    named = titles()
    there = "、".join(f"[{named[n]}](./{n}.ipynb)" for n in sorted(whole() - {"index"}))
    text = f"已有中文版的：本页、{there}和[各章小结](summaries.md)；其余链接指向英文页面。"
    return {"cell_type": "markdown", "id": "scope", "metadata": {}, "source": text}


def problems() -> list:
    """What is missing, changed or wrong in all files of translations, and whose summary is missing."""
    known = {f.stem for f in notebooks()}
    stray = [f.name for f in sorted(FOLDER.glob("*.md")) if f.stem not in known | {"words"}]
    told = [f"nbs/zh/{name}: there is no notebook of that name in the book" for name in stray]
    for file in notebooks():
        told += edition(file).problems()
    return told


def renew(key: str) -> list:
    """Write the present hash into the blocks `cell` or `cell:n`; returns their keys."""
    done = []
    for file in notebooks():
        every = {k: t for c in edition(file).nb["cells"] for k, t in texts(c).items()}
        keys = [k for k in every if key in (k, k.partition(":")[0]) and k in load(file.stem)]
        if keys:
            text = file_of(file.stem).read_text(encoding="utf-8")
            for k in keys:
                text = re.sub(rf"^<!-- {k}( [0-9a-f]+)? -->$", f"<!-- {k} {stamp(every[k])} -->", text, flags=re.M)
            file_of(file.stem).write_text(text, encoding="utf-8")
            done += keys
    if not done:
        raise SystemExit(
            f"translate: no block {key!r} in nbs/zh/; a cell's id or `id:n` as `python -m tools.translate` names it"
        )
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="What of the Chinese edition is missing or changed.")
    parser.add_argument("--stamp", nargs="+", metavar="ID", default=[], help="renew the hash of a cell or of one text")
    parser.add_argument("--new", metavar="CH", help="print the English of what a chapter lacks, as blocks to fill")
    args = parser.parse_args()
    for key in args.stamp:
        print("translate: stamped", *renew(key))
    if args.new:
        one = edition(find(args.new))
        every = {k: t for c in one.nb["cells"] for k, t in texts(c).items()}
        print("\n\n".join(f"<!-- {k} {stamp(t)} -->\n{t}" for k, t in every.items() if k not in one.found))
        return 0
    told = problems()
    print(
        "\n".join(told) or f"translate: {len(whole())} pages and the summaries in {FOLDER.relative_to(ROOT)}/ are whole"
    )
    return bool(told)


if __name__ == "__main__":
    sys.exit(main())
