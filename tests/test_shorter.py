"""What is folded on a chapter's page: tools/shorter.py."""

import re

import pytest

from tools.heights import with_heights
from tools.shorter import label, shorter


def fold(said: str, code: str, kind: str = "", shown: str = "") -> str:
    """A folded cell as Sphinx writes it."""
    return (
        f'<div class="cell tag_hide-input{kind} docutils container">\n<details class="admonition hide above-input">\n'
        f'<summary><p class="collapsed">{said}</p><p class="expanded">{said}</p></summary>\n'
        f'<div class="cell_input docutils container"><pre>{code}</pre></div>\n</details>\n{shown}</div>\n'
    )


def quarto_fold(said: str, code: str) -> str:
    return f'<details class="code-fold"><summary>{said}</summary>\n<pre>{code}</pre>\n</details>\n'


def page_of(body: str, tag: str = "article") -> str:
    return f'<{tag} class="bd-article"><section id="t"><h1>T</h1>\n{body}</section></{tag}>'


def table(rows: int) -> str:
    return f"<table><thead><tr><th>a</th></tr></thead><tbody>{'<tr><td>1</td></tr>' * rows}</tbody></table>"


def printed(lines: int) -> str:
    text = "\n".join(map(str, range(lines)))
    return f'<div class="cell"><div class="cell_output"><div class="output"><pre>{text}\n</pre></div></div></div>'


def section(title: str, body: str) -> str:
    return f'<section id="s"><h2>{title}<a class="headerlink" href="#s">#</a></h2>\n{body}</section>\n'


def test_folds_below_one_another_become_one_that_says_how_many_they_are():
    shown = '<div class="cell_output"><p>said</p></div>\n'
    body = fold("Show code: f", "A") + fold("Show code: g, h", "B", " tag_export", shown) + fold("Show code", "C")
    page = shorter(page_of(body))
    assert page.count("<details") == 2 and page.count("<summary>") == 2
    assert '<p class="collapsed">Show code (2 cells): f, g, h</p>' in page
    places = [page.index(mark) for mark in (">A<", ">B<", "</details>", "said", ">C<")]
    assert places == sorted(places), "code in order, what it shows below it"
    assert re.search(r'<div class="cell tag_hide-input tag_export[^>]*>\s*<div class="cell_input', page), (
        "its edge stays"
    )


@pytest.mark.parametrize("between", ["<p>Text.</p>", "Text", '<div class="highlight-python"><pre>def f</pre></div>'])
def test_what_stands_between_folds_keeps_them_apart(between):
    page = page_of(fold("Show code", "A") + between + fold("Show code", "B"))
    assert shorter(page) == page


def test_folds_of_the_other_builder_join_as_well():
    page = shorter(page_of(quarto_fold("Show code: f", "A") + quarto_fold("Show code: checks", "B"), "main"))
    assert page.count("<details") == 1 and "<summary>Show code (2 cells): f, checks</summary>" in page
    assert page.index(">A<") < page.index(">B<")


def test_the_name_of_a_joined_fold_is_short():
    assert label(["Show the whole code", "Show code: _a, _b"]) == "Show the whole code (2 cells): _a, _b"
    assert label(["Show code: a, b, c, d, …", "Show code: a, e"]) == "Show code (2 cells): a, b, c, d, …"
    assert label(["Show code", "Show code"]) == "Show code (2 cells)"


@pytest.mark.parametrize("tag", ["article", "main"])
def test_sections_that_one_looks_up_are_folded_below_their_title(tag):
    body = section("Summary", "<p>s</p>") + section("The rest of the module", "<p>r</p>")
    page = shorter(page_of(body + section("References", "<ul><li>a</li><li>b</li></ul>"), tag))
    assert page.count('<details class="part">') == 2 and "<p>s</p></section>" in page
    assert re.search(
        r'</h2>\s*<details class="part">\s*<summary>Show this section</summary>\s*<p>r</p></details>', page
    )
    assert "<summary>Show 2 entries</summary>" in page and not re.search(r"<summary>[^/]*<h2", page)


def test_long_tables_and_outputs_are_marked_and_nothing_of_them_goes():
    first, later = section("Result", table(14)), section("More", table(10) + table(11) + printed(12) + printed(13))
    page = shorter(page_of(first + later))
    assert page.count('<table class="long">') == 1 and page.count('<pre class="long">') == 1
    assert re.findall(r'class="more" aria-expanded="false">(.*?)<', page) == ["Show all 11 rows", "Show all 13 lines"]
    assert page.count("<tr>") == 14 + 10 + 11 + 3 and "\n12\n" in page
    assert 'class="long"' in shorter(page_of(section("Result", table(15))))


def test_what_is_not_shown_takes_no_height():
    def height(body):
        return int(re.search(r"--height: (\d+)px", with_heights(shorter(page_of(body))))[1])

    assert abs(height(section("A", table(8))) + 42 - height(section("A", table(40)))) < 3
    assert height(section("A", printed(12))) + 10 > height(section("A", printed(60)))
    assert height(section("References", "<p>a</p>" * 50)) < 200
