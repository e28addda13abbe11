"""Mathematics of the pages as MathML, made while the site is built: a page loads no script and no font to show a formula.

A Sphinx extension (`site/conf.py` lists it). A numbered equation scrolls in its own box when it is wide; its number stays beside it.
"""

import html
import re

from latex2mathml.converter import convert

TAG = re.compile(r"\\tag\{([^{}]*)\}")
UNKNOWN = {r"\\arg(?![a-zA-Z])": r"\\operatorname{arg}"}  # what latex2mathml lacks, in words that it has
LEFT = re.compile(r"\\[a-zA-Z]+")


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
    return out.replace("<math ", f'<math alttext="{html.escape(tex.strip(), quote=True)}" ', 1)


def equation(tex: str) -> str:
    r"""A formula of its own line; what stands in `\tag` becomes a number at the right edge."""
    tag = TAG.search(tex)
    number = f'<span class="eqno">({html.escape(tag[1])})</span>' if tag else ""
    return f'<div class="math"><div class="formula">{formula(TAG.sub("", tex).strip(), True)}</div>{number}</div>'


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
