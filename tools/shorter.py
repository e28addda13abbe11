"""Shorter pages, nothing taken out: what one looks up is folded, neighboring folds are one, long tables and outputs show their beginning.

`shorter(page)` works on the finished HTML of a chapter, of Sphinx and of Quarto. site/static/book.css and book.js do the rest: without a
script, and on paper, all rows, all lines and all folded sections are shown.
"""

import re

TAG = re.compile(r"""<!--.*?-->|<(/?)([a-zA-Z][\w-]*)((?:[^<>"']|"[^"]*"|'[^']*')*?)(/?)>""", re.S)
EMPTY = set("img br hr input meta link source wbr col path circle rect line use".split())
ROWS, SHOWN = 10, 8  # a table of more rows than ROWS shows SHOWN
RESULT = 14  # rows that the chapter's result, in its first section, may have
LINES, BEGINNING = 12, 10  # the same of the lines that a cell prints
NAMES = 4  # on the fold of several cells
LOOKED_UP = re.compile(r"rest of the module|^References$|^参考文献$", re.I)


class Node:
    """An element: its tag, its attributes, where it begins (`start`, `inner`) and ends (`outer`, `end`) in the page."""

    def __init__(self, tag: str, attributes: str, start: int, inner: int):
        self.tag, self.start, self.inner, self.outer, self.end = tag, start, inner, inner, inner
        self.attributes, self.children = attributes, []

    def has(self, *names: str) -> bool:
        """Whether it is of these classes."""
        found = re.search(r'\bclass="([^"]*)"', self.attributes)
        return bool(found) and set(names) <= set(found[1].split())

    def walk(self):
        """Itself and all elements in it, in the page's order."""
        yield self
        for child in self.children:
            yield from child.walk()


def tree(page: str, start: int, end: int) -> Node:
    """The elements between two places of a page."""
    root = Node("", "", start, start)
    root.outer = root.end = end
    path = [root]
    for m in TAG.finditer(page, start, end):
        tag = (m[2] or "").lower()
        if not tag:
            continue
        if not m[1]:
            node = Node(tag, m[3], m.start(), m.end())
            path[-1].children.append(node)
            if tag not in EMPTY and not m[4]:
                path.append(node)
        elif any(node.tag == tag for node in path[1:]):
            while True:
                node = path.pop()
                node.outer, node.end = m.start(), m.end()
                if node.tag == tag:
                    break
    return root


def text_of(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", "", html).split())


def fold_of(node: Node):
    """The folded code of a cell, None where its code is open or other things stand beside it."""
    if node.tag == "details" and node.has("code-fold"):
        return node
    if node.tag == "div" and node.has("cell") and node.children:
        first = node.children[0]
        return first if first.tag == "details" and (first.has("hide") or first.has("code-fold")) else None
    return None


def label_of(page: str, fold: Node) -> str:
    """What stands on a fold."""
    summary = fold.children[0]
    line = summary.children[0] if summary.children and summary.children[0].tag == "p" else summary
    return text_of(page[line.inner : line.outer])


def label(labels: list) -> str:
    """What stands on the fold of several cells: how many they are, and the first of their names."""
    said = "Show the whole code" if labels[0].startswith("Show the whole code") else "Show code"
    names = [n for one in labels if ": " in one for n in one.split(": ", 1)[1].split(", ")]
    names = list(dict.fromkeys(n for n in names if n != "…"))
    names = names[:NAMES] + ["…"] * (len(names) > NAMES)
    return f"{said} ({len(labels)} cells)" + (f": {', '.join(names)}" if names else "")


def joined_folds(page: str, root: Node) -> list:
    """Edits that make one fold of folded cells that stand below one another; what the last of them shows stays below it."""
    edits = []
    for parent in root.walk():
        run: list = []
        for node in [*parent.children, None]:
            fold = node and fold_of(node)
            beside = bool(run) and node is not None and not page[run[-1][0].end : node.start].strip()
            if run and not (fold and beside):
                if len(run) > 1:
                    edits.append((run[0][0].start, run[-1][0].end, one_fold(page, run)))
                run = []
            if fold:
                run.append((node, fold))
                if len(node.children) > 1 and node is not fold:  # an output ends the run
                    if len(run) > 1:
                        edits.append((run[0][0].start, run[-1][0].end, one_fold(page, run)))
                    run = []
    return edits


def one_fold(page: str, run: list) -> str:
    """The HTML of several folded cells as one."""
    said = label([label_of(page, fold) for _, fold in run])
    first, summary = run[0][1], run[0][1].children[0]
    lines = said
    if summary.children and summary.children[0].tag == "p":
        lines = f'<p class="collapsed">{said}</p><p class="expanded">{said}</p>'
    inside = []
    for node, fold in run:
        code = page[fold.children[0].end : fold.outer].strip()
        inside.append(f"<div{node.attributes}>\n{code}\n</div>" if node is not fold else code)
    last, fold = run[-1]
    shown = page[fold.end : last.outer].strip() if last is not fold else ""
    body = "\n".join(inside)
    whole = f"<details{first.attributes}>\n<summary>{lines}</summary>\n{body}\n</details>"
    if last is fold:
        return whole
    return f'<div class="cell folds docutils container">\n{whole}\n{shown}\n</div>'


def with_class(page: str, node: Node, name: str) -> tuple:
    """The edit that adds a class to an element."""
    if known := re.search(r'\bclass="([^"]*)"', node.attributes):
        attributes = node.attributes.replace(known[0], f'class="{known[1]} {name}"', 1)
    else:
        attributes = f' class="{name}"{node.attributes}'
    return node.start, node.inner, f"<{node.tag}{attributes}>"


def more(count: int, what: str) -> str:
    return f'\n<button type="button" class="more" aria-expanded="false">Show all {count} {what}</button>'


def long_ones(page: str, root: Node) -> list:
    """Edits that mark long tables and outputs and put a button below them."""
    sections = [n for n in root.walk() if n.tag == "section" and n.children and n.children[0].tag == "h2"]
    first = range(sections[0].start, sections[0].end) if sections else range(0)  # where the chapter's result stands
    edits: list = []

    def look(node: Node, closed: bool, printed: bool) -> None:
        closed = closed or (node.tag == "details")
        printed = printed or node.has("cell_output") or node.has("cell-output")
        if node.tag == "table" and not closed and "span=" not in page[node.start : node.end]:
            rows = sum(n.tag == "tr" for part in node.children if part.tag == "tbody" for n in part.children)
            if rows > (RESULT if node.start in first else ROWS):
                edits.extend([with_class(page, node, "long"), (node.end, node.end, more(rows, "rows"))])
        elif node.tag == "pre" and printed and not closed:
            lines = page[node.inner : node.outer].rstrip().count("\n") + 1
            if lines > LINES:
                edits.extend([with_class(page, node, "long"), (node.end, node.end, more(lines, "lines"))])
        if not node.has("play"):
            for child in node.children:
                look(child, closed, printed)

    look(root, False, False)
    return edits


def folded_sections(page: str, root: Node) -> list:
    """Edits that fold what is looked up, below its title."""
    edits = []
    for node in root.walk():
        if node.tag != "section" or not node.children or node.children[0].tag != "h2":
            continue
        title = node.children[0]
        said = re.sub(
            r'<a class="headerlink.*?</a>|<a class="anchorjs.*?</a>', "", page[title.inner : title.outer], flags=re.S
        )
        said = text_of(said).rstrip("#")
        if not LOOKED_UP.search(said):
            continue
        body = page[title.end : node.outer]
        entries = body.count("<li")
        code = body.count("<pre")
        found = f"{entries} entries" if said in ("References", "参考文献") and entries > 1 else "this section"
        found = f"{code} pieces of code" if "rest" in said.lower() and code > 1 else found
        opening = f'\n<details class="part">\n<summary>Show {found}</summary>'
        edits += [(title.end, title.end, opening), (node.outer, node.outer, "</details>\n")]
    return edits


def edited(page: str, edits: list) -> str:
    """The page with edits (start, end, text) that do not overlap."""
    for start, end, text in sorted(edits, key=lambda e: (e[0], e[1]), reverse=True):
        page = page[:start] + text + page[end:]
    return page


def shorter(page: str) -> str:
    """The page with fewer and shorter pieces open; a page without sections of a chapter stays as it is."""
    tag = "article" if "<article" in page else "main"
    for find in (joined_folds, long_ones, folded_sections):
        start, end = page.find(f"<{tag}"), page.find(f"</{tag}>")
        if start < 0:
            return page
        page = edited(page, find(page, tree(page, start, end)))
    return page
