"""Mathematics of the pages as MathML, made while the site is built: a page loads no script and no font to show a formula.

A Sphinx extension (`site/conf.py` lists it). A numbered equation scrolls in its own box when it is wide; its number stays beside it.
"""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

TAG = re.compile(r"\\tag\{([^{}]*)\}")
UNKNOWN = {r"\\arg(?![a-zA-Z])": r"\\operatorname{arg}"}  # what latex2mathml lacks, in words that it has
LEFT = re.compile(r"\\[a-zA-Z]+")
MATHML = "http://www.w3.org/1998/Math/MathML"
APART = {"mfrac", "mroot"}  # their children stand in places of their own
SCRIPTED = {"msub", "msup", "msubsup", "munder", "mover", "munderover"} | APART
WORD = re.compile(r"<m([io])[^>]*>[A-Za-z]{2,}</m\1>")
THIN = "0.167em"


def _base(node):
    """What stands at the base of scripts and at the beginning of a row: of a sum with limits, the sum."""
    while len(node) and _name(node) in SCRIPTED - APART | {"mrow"}:
        node = node[0]
    return node


def _name(node) -> str:
    return node.tag.rpartition("}")[2]


def spaced(out: str) -> str:
    """Thin spaces around log, max and other words as TeX sets them: "p log q", but "log(q)". Else log p is read as one word."""
    if not WORD.search(out):
        return out
    ElementTree.register_namespace("", MATHML)
    tree = ElementTree.fromstring(out)
    above = {child: parent for parent in tree.iter() for child in parent}
    for word in tree.iter():
        if _name(word) not in ("mi", "mo") or not re.fullmatch("[A-Za-z]{2,}", word.text or ""):
            continue
        place = word
        while _name(above[place]) in SCRIPTED - APART and above[place][0] is place:
            place = above[place]
        row, left, right = above[place], "0", "0"
        if _name(row) not in SCRIPTED:
            i = list(row).index(place)
            before, after = (_base(row[k]) if 0 <= k < len(row) else None for k in (i - 1, i + 1))
            if before is not None and (_name(before) not in ("mo", "mspace") or before.text in (")", "]", "}")):
                left = THIN
            sign = (
                after is not None and _name(after) == "mo" and not re.fullmatch("[∑∏∫]|[A-Za-z]{2,}", after.text or "")
            )
            if after is not None and _name(after) != "mspace" and not sign:
                right = THIN
        word.tag = f"{{{MATHML}}}mo"
        word.attrib |= {"lspace": left, "rspace": right}
    return ElementTree.tostring(tree, encoding="unicode")


def formula(tex: str, display: bool = False) -> str:
    r"""LaTeX as a `<math>` element that keeps its source for copying and screen readers' menus.

    Raises ValueError where a command is not understood, so that no page shows one.
    """
    source = tex
    for name, known in UNKNOWN.items():
        source = re.sub(name, known, source)
    try:
        out = convert(source, display="block" if display else "inline")
    except Exception as error:  # the converter raises what its parser raises
        raise ValueError(f"no formula: {tex!r} ({type(error).__name__}: {error})") from error
    if left := LEFT.findall(re.sub(r"<[^>]*>", "", out)):
        raise ValueError(f"{tex!r} uses {', '.join(left)}, which latex2mathml does not know; add it to UNKNOWN")
    if "<mi>&</mi>" in out:
        raise ValueError(f"{tex!r} has an & that latex2mathml does not read: only matrices, cases and arrays may align")
    return spaced(out).replace("<math ", f'<math alttext="{html.escape(tex.strip(), quote=True)}" ', 1)


def statements(tex: str) -> list:
    r"""What a line of equations says, cut at the `\qquad` between them; those inside of braces and environments stay."""
    found, depth = [""], 0
    for piece in re.split(r"(\\begin\b|\\end\b|\\left\b|\\right\b|\\[{}]|[{}]|\\qquad\b)", tex):
        depth += (piece in ("{", r"\begin", r"\left")) - (piece in ("}", r"\end", r"\right"))
        if piece == r"\qquad" and not depth:
            found.append("")
        else:
            found[-1] += piece
    return [s.strip() for s in found if s.strip()]


def equation(tex: str) -> str:
    r"""A formula of its own line; what stands in `\tag` becomes a number at the right edge.

    Equations side by side stand below one another where the line is short, as on a phone.
    """
    tag = TAG.search(tex)
    number = f'<span class="eqno">({html.escape(tag[1])})</span>' if tag else ""
    said = "".join(formula(s, True) for s in statements(TAG.sub("", tex)))
    return f'<div class="math"><div class="formula">{said}</div>{number}</div>'


def setup(app) -> dict:
    from docutils.nodes import SkipNode
    from sphinx.util import logging

    log = logging.getLogger(__name__)

    def visitor(render):
        def visit(self, node):
            try:
                self.body.append(render(node.astext()))
            except ValueError as error:
                log.warning(str(error), location=node)
            raise SkipNode

        return visit

    inline = visitor(lambda tex: f'<span class="math">{formula(tex)}</span>')
    app.add_html_math_renderer("mathml", (inline, None), (visitor(equation), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
