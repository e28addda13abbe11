#!/usr/bin/env python3
"""Turn a notebook as it is worked on into a notebook as it is read: JSON on stdin, JSON on stdout (Quarto's ipynb-filters).

tools/stage.py calls `transform` with target="sphinx". Standard library only, because Quarto runs it with any Python.
What it does: nbdev directives go, hidden cells go, `#| echo: false` and the like become what the builder understands, alerts
(`> [!NOTE]`) become callouts, pictures become figures with their alt text, the file's number stands before the title, and code
that a reader need not see at once is folded: imports, private helpers, cells that only draw, tabulate or say. Of a long definition
the signature and the first line of its docstring stay.
"""

import ast
import base64
import html
import json
import re
import sys
from pathlib import Path

OPTION = re.compile(r"^#\|\s*([\w-]+)(?:\s*:\s*|\s+|$)(.*?)\s*$")  # Quarto's `name: value`, nbdev's `name value`
QUARTO = {"echo", "include", "output", "code-fold", "code-summary", "warning", "error", "label", "fig-cap", "fig-alt"}
ALERT = re.compile(r"^ {0,3}> ?\[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]\s*(.*)$", re.I)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
IMAGES = "image/svg+xml", "image/png", "image/jpeg"
INLINE = re.compile(r'src="data:(image/[\w+]+);base64,([^"]+)"')
NUMBER = re.compile(r"(?<=\d) %|\[[-+\d.,]+ [-+\d.,]+\]")
CHAPTER = re.compile(r"^(\d+|[A-Z]\d*)_")
SHOWS = {
    "show",
    "status",
    "say",
    "table",
    "curves",
    "display",
    "render",
    "Image",
    "HTML",
    "Markdown",
    "interact",
    "plot",
    "bars",
    "widget",
}
PLAY = "application/vnd.ftbook.play+json"  # what ftbook.plot.widget keeps for the page
VOID = re.compile(r"""<(img|br|hr|input|wbr|col)\b((?:[^<>"']|"[^"]*"|'[^']*')*?)\s*/?>""")
LONG = 25  # lines of code that stand open on the page
# a picture of more pixels than WIDE does not shrink further than to the share LEGIBLE; site/static/play.js knows both
WIDE, LEGIBLE = 560, 0.6
DEFINITION = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


def lines_of(source) -> list:
    """Notebook source as a list of lines without their ends."""
    return ("".join(source)).split("\n")


def source_of(lines: list) -> list:
    """Back to the list form that both builders read without losing line ends."""
    return [line + "\n" for line in lines[:-1]] + lines[-1:]


def options_of(lines: list) -> tuple:
    """(options of the leading `#|` lines: name -> value, the lines below them)."""
    options, rest = {}, 0
    for rest, line in enumerate(lines):  # noqa: B007
        match = OPTION.match(line)
        if not match:
            break
        options[match[1]] = (match[2] or "").strip("\"'")
    else:
        rest = len(lines)
    return options, lines[rest:]


def callouts(lines: list, target: str) -> list:
    """Rewrite alert quotes as callouts of the builder; fenced code stays as it is."""
    out, body, fence = [], None, None
    close = ":::"

    def flush():
        nonlocal body
        if body is not None:
            out.extend([*body, close, ""])
            body = None

    for line in lines:
        match = FENCE.match(line)
        if fence is None and body is not None:
            if line.lstrip().startswith(">"):
                body.append(re.sub(r"^ {0,3}> ?", "", line))
                continue
            flush()
        if match and (fence is None or line.strip().startswith(fence)):
            fence = match[1] if fence is None else None
        alert = ALERT.match(line) if fence is None else None
        if alert:
            kind, title = alert[1].lower(), alert[2].strip()
            if target == "quarto":
                body = ["", f"::: {{.callout-{kind}}}", *([f"## {title}", ""] if title else []), ""]
            else:
                body = ["", f":::{{admonition}} {title}\n:class: {kind}\n" if title else f":::{{{kind}}}"]
                body = "\n".join(body).split("\n")
        else:
            out.append(line)
    flush()
    return out


def prose(lines: list, target: str) -> list:
    """Markdown of a cell or of an output, as the builder wants it."""
    lines = callouts(lines, target)
    text = "\n".join(lines)
    text = re.sub(r"\]\(index\.ipynb(#[^)]*)?\)", "](../index.qmd)" if target == "quarto" else "](../index.md)", text)
    if target == "quarto":  # pandoc's MathML knows no \tag
        text = re.sub(r"\\tag\{([^{}]*)\}", r"\\qquad\\text{(\1)}", text)
    return text.split("\n")


def unbroken(lines: list) -> list:
    """Table rows in which "20.3 % [19.4, 21.2]" may break before the interval and nowhere else."""
    return [NUMBER.sub(lambda m: m[0].replace(" ", "\u00a0"), line) if line.startswith("|") else line for line in lines]


def numbered(lines: list, name: str) -> list:
    """`# Title` of 05_name.ipynb becomes `# 5 · Title`."""
    match = CHAPTER.match(name)
    if not match:
        return lines
    number = match[1].lstrip("0") or "0"
    for i, line in enumerate(lines):
        if line.startswith("# "):
            return [*lines[:i], f"# {number} · {line[2:]}", *lines[i + 1 :]]
    return lines


def alt_of(output: dict, mime: str) -> str:
    meta = output.get("metadata", {})
    return meta.get("alt") or meta.get(mime, {}).get("alt") or meta.get("ftbook", {}).get("alt", "")


def size_of(data: bytes, mime: str) -> dict:
    """Width and height of a picture in CSS pixels, so that the page keeps its place; {} where the file does not say."""
    if mime == "image/png" and data[12:16] == b"IHDR":
        return {"width": int.from_bytes(data[16:20], "big"), "height": int.from_bytes(data[20:24], "big")}
    box = re.search(rb'<svg[^>]*\bviewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', data[:3000]) if "svg" in mime else None
    scale = 4 / 3 if box and re.search(rb'<svg[^>]*\bwidth="[\d.]+pt"', data[:3000]) else 1  # points
    return {"width": round(scale * float(box[1])), "height": round(scale * float(box[2]))} if box else {}


def framed(width: float) -> str:
    """The tag that opens a figure. On a phone a wide one, of several panels, moves in its box: shrunk to the screen it has no legible text."""
    if width <= WIDE:
        return '<figure class="plot">'
    return f'<figure class="plot wide" style="--least: {round(LEGIBLE * width)}px">'


def figure(output: dict, mime: str, save=None) -> str:
    """An image output as HTML; `save(bytes, suffix)` may store it as a file and return its address."""
    raw = "".join(output["data"][mime])
    data = raw.encode() if mime == "image/svg+xml" else base64.b64decode(raw)
    address = save(data, mime) if save else f"data:{mime};base64,{base64.b64encode(data).decode()}"
    meta = output.get("metadata", {})
    caption = meta.get("caption") or meta.get("ftbook", {}).get("caption") or meta.get(mime, {}).get("caption", "")
    known = {k: meta[mime][k] for k in ("width", "height") if k in meta.get(mime, {})} or size_of(data, mime)
    size = "".join(f' {k}="{v}"' for k, v in known.items())
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'{framed(known.get("width", 0))}<img src="{address}" alt="{html.escape(alt_of(output, mime), quote=True)}"'
        f' loading="lazy"{size} />{text}</figure>'
    )


def _texts(kept: dict, ranges: str) -> str:
    """The lines "0-3 7" of a playable picture."""
    pairs = [list(map(int, r.split("-"))) for r in ranges.split()]
    return "\n".join("\n".join(kept["lines"][p[0] : p[-1] + 1]) for p in pairs)


def _part(kept: dict, part: dict, save=None) -> str:
    """What a control shows at its start; site/static/play.js makes the same of the other values."""
    if "html" in part or "text" in part:
        return _texts(kept, part["html"]) if "html" in part else f"<pre>{html.escape(_texts(kept, part['text']))}</pre>"
    if "svg" in part:
        mime, raw = "image/svg+xml", _texts(kept, part["svg"])
    else:
        mime, raw = re.fullmatch(r"data:(.*?);base64,(.*)", part["image"], re.S).groups()
    about = {k: part[k] for k in ("alt", "caption") if k in part}
    size = {"width": part["width"], **({"height": part["height"]} if "height" in part else {})}
    if "svg" in part and (own := size_of(raw.encode(), mime)):
        size["height"] = round(part["width"] * own["height"] / own["width"])
    return figure({"data": {mime: raw}, "metadata": {**about, mime: size}}, mime, save)


def playable(kept: dict, save=None) -> str:
    """Controls that choose among drawings made when the chapter ran; without a script the first one is a picture like others."""
    rows, at = [], 0
    for i, control in enumerate(kept["controls"]):
        values, start, name = control["values"], control["start"], html.escape(control["name"])
        at = at * len(values) + start
        if len(values) < 2:
            continue
        shown = html.escape(values[start])
        if control["slider"]:
            field = (
                f'<input type="range" data-control="{i}" min="0" max="{len(values) - 1}" step="1" value="{start}" '
                f'aria-valuetext="{shown}" />'
            )
            rows.append(
                f'<div class="play-control"><label><span>{name}</span> {field}</label> '
                f'<span class="play-value" aria-hidden="true">{shown}</span></div>'
            )
            continue
        chosen = ' selected="selected"'
        options = "".join(
            f'<option value="{k}"{chosen if k == start else ""}>{html.escape(v)}</option>' for k, v in enumerate(values)
        )
        rows.append(
            f'<div class="play-control"><label><span>{name}</span> '
            f'<select data-control="{i}">{options}</select></label></div>'
        )
    first = "\n".join(_part(kept, kept["parts"][int(n)], save) for n in kept["frames"][at].split())
    data = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&":  # neither HTML nor XML sees a tag in it
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    names = ", ".join(html.escape(c["name"]) for c in kept["controls"])
    return (
        f'<div class="play" role="group" aria-label="Play: {names}">\n'
        f'<div class="play-controls" hidden="hidden">{"".join(rows)}</div>\n'
        f'<div class="play-stage">{first}</div>\n<p class="play-said" aria-live="polite"></p>\n'
        f'<script type="application/json">{data}</script>\n</div>'
    )


def raw_html(text: str, target: str) -> dict:
    """HTML for the page. For Quarto a raw block of Markdown: an output of HTML would load jQuery from another host."""
    text = VOID.sub(r"<\1\2 />", text)
    if target != "quarto":
        return {"text/html": source_of(lines_of(text))}
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return {"text/markdown": source_of(lines_of(f"{fence}{{=html}}\n{text}\n{fence}"))}


def _saved(data: bytes, mime: str, save, text: str) -> str:
    """The attributes of a picture that `save` stores as a file; its height follows from the width that `text` asks for."""
    size, wanted = size_of(data, mime), re.search(r'<img [^>]*\bwidth="(\d+)"', text)
    if size and wanted:
        size = {"height": round(int(wanted[1]) * size["height"] / size["width"])}
    return f'src="{save(data, mime)}" loading="lazy"' + "".join(f' {k}="{v}"' for k, v in size.items())


def shown(output: dict, target: str, save=None):
    """The output as the page shows it, or None."""
    data = output.get("data")
    if data is None:
        return output
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    if PLAY in data:
        return {**output, "data": raw_html(playable(data[PLAY], save), target), "metadata": {}}
    mime = next((m for m in IMAGES if m in data), None)
    if "text/html" in data:
        text = "".join(data["text/html"])
        if save:
            text = INLINE.sub(lambda m: _saved(base64.b64decode(m[2]), m[1], save, m.string), text)
        if text.startswith("<img "):
            wide = re.search(r'<img [^>]*\bwidth="(\d+)"', text)
            text = f"{framed(int(wide[1]) if wide else 0)}{text}</figure>"
        data = raw_html(text, target)
    elif mime:
        data = raw_html(figure(output, mime, save), target)
    elif "text/markdown" in data:
        data = {"text/markdown": source_of(unbroken(prose(lines_of(data["text/markdown"]), target)))}
    return {**output, "data": data, "metadata": {}}


def tree_of(lines: list) -> list:
    """The statements of a cell without its magics; none where it is no Python."""
    try:
        return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in lines)).body
    except SyntaxError:
        return []


def _is_text(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _calls(node) -> str:
    """The last name of what a statement calls, of the first of two choices; "" where it is no call."""
    said = node.value if isinstance(node, ast.Expr) else None
    said = said.body if isinstance(said, ast.IfExp) else said
    if not isinstance(said, ast.Call):
        return ""
    called = said.func
    return getattr(called, "attr", getattr(called, "id", ""))


def _shows(node) -> bool:
    """Whether a statement is a call that draws, tabulates or says."""
    return _calls(node) in SHOWS


def is_folded(lines: list) -> bool:
    """Whether code is folded whole: it imports, it helps in private, or it ends by showing and checks nothing."""
    body = [n for n in tree_of(lines) if not _is_text(n)]
    if not body:
        return False
    listed = [n for n in body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    named = [n for n in body if isinstance(n, DEFINITION)]
    if len(imports) + len(listed) == len(body):
        return True
    if any(_calls(n) == "widget" for n in body):  # its function draws for the controls alone
        return True
    if named and all(n.name.startswith("_") for n in named) and not any(map(_shows, body)):
        return not any(isinstance(n, (ast.Assert, ast.Expr, ast.For, ast.With, ast.Try)) for n in body)
    return not named and _shows(body[-1]) and not any(isinstance(n, ast.Assert) for n in body)


def checks(lines: list) -> bool:
    """Whether a cell asserts something: so it says what it is for, where it is folded."""
    return any(isinstance(n, ast.Assert) for statement in tree_of(lines) for n in ast.walk(statement))


def is_long(lines: list) -> bool:
    return sum(bool(line.strip()) for line in lines) > LONG


def _first_lines(node) -> list:
    """The lines of a docstring's first sentence."""
    text = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0].split("\n")


def _opening(node, lines: list) -> list:
    """The lines from a definition's decorators to the colon of its signature."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    return lines[start : max(start + 1, node.body[0].lineno - 1)]


def outline(lines: list) -> list:
    """What stands on the page for long definitions: signatures and first lines; [] where together they are short."""
    body = tree_of(lines)
    named = [n for n in body if isinstance(n, DEFINITION)]
    if sum(n.end_lineno - n.lineno for n in named) < LONG:
        return []
    shown: list = []
    for node in named:
        if node.name.startswith("_"):
            continue
        shown += ["", ""] * bool(shown) + _opening(node, lines)
        text = "\n".join(f"    {line}" for line in _first_lines(node)).strip()
        shown += f'    """{text}"""'.split("\n") if text else []
        inner = node.body if isinstance(node, ast.ClassDef) else []
        shown += [""] if inner else ["    ..."]
        for method in [m for m in inner if isinstance(m, DEFINITION) and (m.name[0] != "_" or m.name == "__init__")]:
            *opening, last = _opening(method, lines)
            shown += [*opening, f"{last.rstrip()} ..."]
    return shown


def is_rest(lines: list, rest: bool) -> bool:
    """Whether what follows a text belongs to "The rest of the module"; a text without a title changes nothing."""
    title = next((line for line in lines if line.startswith(("# ", "## "))), "")
    return "rest of the module" in title.lower() if title else rest


def is_study(options: dict) -> bool:
    """Whether a cell is a piece of the chapter's long experiments, `ftbook.studies`: one reads its table and looks it up."""
    return options.get("export", "").startswith("studies.")


def folds(options: dict, lines: list, also: bool) -> bool:
    """Whether a cell is folded: as its directive says, else by the rule, or `also` for another reason."""
    if "code-fold" in options:
        return options["code-fold"] == "true"
    return also or is_study(options) or is_folded(lines)


def collapsed(nb: dict) -> list:
    """The ids of the code cells that JupyterLab and Colab show closed.

    As on the page: what is not for readers, imports, private helpers, what only draws or says, what stands before the first picture,
    long cells, and the rest of the module. A long definition stays open there: a closed cell would show its first line and not its
    signature.
    """
    found, rest, early = [], False, any(map(is_drawn, nb["cells"]))
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            rest = is_rest(lines_of(cell["source"]), rest)
        elif cell["cell_type"] == "code":
            options, lines = options_of(lines_of(cell["source"]))
            unseen = options.keys() & {"hide", "default_exp"} or "false" in (
                options.get("include"),
                options.get("echo"),
            )
            defines = any(isinstance(n, DEFINITION) for n in tree_of(lines))
            also = rest or (early and not options.keys() & {"export", "exports"}) or (is_long(lines) and not defines)
            if unseen or folds(options, lines, also):
                found.append(cell["id"])
            early = early and not is_drawn(cell)
    return found


def code_cells(cell: dict, target: str, save=None, early: bool = False, rest: bool = False) -> list:
    """A code cell without directives, below the signatures of the library's definitions in it; [] where readers do not see it.

    `early` says that no figure stands above it: a page opens with a picture and not with the code that draws it.
    `rest` says that it is of "The rest of the module", which one looks up: there the names of the definitions stand on the fold.
    """
    options, lines = options_of(lines_of(cell["source"]))
    silent = "default_exp" in options and not any(line.strip() for line in lines)
    if "hide" in options or options.get("include") == "false" or silent:
        return []
    while lines and not lines[0].strip():
        lines = lines[1:]
    tags, meta = list(cell.get("metadata", {}).get("tags", [])), {}
    study = is_study(options)
    exported = options.keys() & {"export", "exports"}
    made = [n.name for n in tree_of(lines) if isinstance(n, DEFINITION)]
    named = [n for n in made if n[0] != "_" and exported]
    # a directive decides alone: open, or folded whole below the names
    short = outline(lines) if exported and not (study or rest or "code-fold" in options) else []
    opening = early and not exported
    if folds(options, lines, bool(short or opening or rest or is_long(lines))):
        options["code-fold"] = "true"
        label = "Show the whole code" if short else "Show code of the study" if study else "Show code"
        said = named or (made[:4] + ["…"] * (len(made) > 4)) or (["checks"] if checks(lines) else [])
        options.setdefault("code-summary", ": ".join([label, *([", ".join(said)] if said and not short else [])]))
    if target == "quarto":
        lines = [f"#| {k}: {v}" for k, v in options.items() if k in QUARTO and v] + lines
    else:
        tags += [
            tag
            for option, value, tag in (
                ("echo", "false", "remove-input"),
                ("output", "false", "remove-output"),
                ("code-fold", "true", "hide-input"),
            )
            if options.get(option) == value
        ]
        tags += ["export"] if exported else []
        if "code-summary" in options:
            meta["mystnb"] = {"code_prompt_show": options["code-summary"], "code_prompt_hide": options["code-summary"]}
    outputs = cell.get("outputs", [])
    if any(PLAY in o.get("data", {}) for o in outputs):  # what the controls drew last stands among their frames
        outputs = [o for o in outputs if "live" not in o.get("metadata", {})]
    outputs = [o for o in (shown(o, target, save) for o in outputs) if o]
    if not outputs and (not any(line.strip() for line in lines) or "remove-input" in tags):
        return []
    kept = {
        **cell,
        "source": source_of(lines),
        "outputs": outputs,
        "metadata": {**meta, **({"tags": tags} if tags else {})},
    }
    if not short:
        return [kept]
    text = source_of(["```python", *short, "```"])
    return [{"cell_type": "markdown", "id": f"{cell['id']}-s", "metadata": {}, "source": text}, kept]


def is_drawn(cell: dict) -> bool:
    """Whether a cell shows a picture."""
    data = [o.get("data", {}) for o in cell.get("outputs", [])]
    return any(m in d for d in data for m in IMAGES) or any("<img " in "".join(d.get("text/html", "")) for d in data)


def transform(nb: dict, target: str = "quarto", name: str = "", save=None) -> dict:
    """The notebook that the builder reads; `name` is the file's, `save` stores pictures."""
    cells, first, early, rest = [], True, any(map(is_drawn, nb["cells"])), False
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cells += code_cells(cell, target, save, early, rest)
            early = early and not is_drawn(cell)
            continue
        if cell["cell_type"] == "markdown":
            lines = prose(lines_of(cell["source"]), target)
            title = cell.get("metadata", {}).get("title")  # the English one of a translated cell
            rest = is_rest([title] if title else lines, rest)
            if first:
                lines = numbered(lines, name)
            cell, first = {**cell, "source": source_of(lines), "metadata": {}}, False
        cells.append(cell)
    return {**nb, "cells": cells}


def name_of(nb: dict, folder: Path) -> str:
    """Which notebook of a folder this is, "" where none: Quarto says it to no filter."""
    for file in sorted(folder.glob("*.ipynb")):
        try:
            if json.loads(file.read_text(encoding="utf-8"))["cells"] == nb["cells"]:
                return file.stem
        except (OSError, ValueError, KeyError):  # half a file of an editor, for example
            continue
    return ""


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    notebook = json.load(sys.stdin)
    json.dump(transform(notebook, name=name_of(notebook, Path.cwd())), sys.stdout, ensure_ascii=False)
