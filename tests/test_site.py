"""The site as a reader meets it: built by Sphinx, served from this machine, opened in headless Chromium by playwright."""

import ast
import functools
import gzip
import html
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tools.filter import LEGIBLE, WIDE
from tools.pdf import NAMES

CHROMIUM = os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), "")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.slow
if not CHROMIUM and not os.environ.get("CI"):
    pytest.skip(
        "no Chromium on the PATH: install it (Debian: apt-get install chromium) to test the pages in a browser",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    """The built site; FTBOOK_TEST_SITE names one that was built before, to look at it only."""
    if built := os.environ.get("FTBOOK_TEST_SITE"):
        return Path(built).resolve()
    out = tmp_path_factory.mktemp("site") / "html"
    run = subprocess.run(
        [sys.executable, "-m", "tools.book", "--builder", "sphinx", "--out", out],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send_head(self):
        del self.headers[
            "If-Modified-Since"
        ]  # "not modified" has no body: the tour weighs what comes, whoever came before
        return super().send_head()


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=address, viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def holds(page, script: str, seconds: float = 20) -> bool:
    """Whether a JavaScript expression becomes true in time; asked again from here, since the page's
    policy forbids a script that is a text, which is how Playwright would ask again.
    """
    for _ in range(int(20 * seconds)):
        if page.evaluate(f"Boolean({script})"):
            return True
        page.wait_for_timeout(50)
    return False


@pytest.fixture(scope="module")
def pages(site) -> list:
    return [
        "index.html",
        *sorted(f"{f.parent.name}/{f.name}" for g in ("nbs", "api", "zh") for f in (site / g).glob("*.html")),
    ]


# One element of every look is enough for the rules of color: those of the thousand same ones are the same.
LOOKS = """() => {
  const looks = new Set();
  for (const e of document.body.querySelectorAll('*')) {
    e.removeAttribute('data-look');
    if (![...e.childNodes].some(c => c.nodeType === Node.TEXT_NODE && c.data.trim())) continue;
    const s = getComputedStyle(e), look = [e.tagName, e.closest('pre') ? e.className : '', s.color, s.fontSize, s.fontWeight, s.opacity];
    for (let a = e; a; a = a.parentElement) look.push(getComputedStyle(a).backgroundColor);
    const key = look.join('|');
    if (!looks.has(key)) { looks.add(key); e.setAttribute('data-look', ''); }
  }
  for (const e of document.querySelectorAll('pre span:not([data-look])')) e.replaceWith(...e.childNodes);
}"""
COLOR = ["color-contrast", "link-in-text-block"]
WIDTHS = (1280, 390)
EVERYWHERE = {"rules": {rule: {"enabled": False} for rule in COLOR}}, None
COLORS = {"runOnly": {"type": "rule", "values": COLOR}}, {"include": [["[data-look]"]]}
SEEN = """width => {
  const boxes = s => [...document.querySelectorAll(s)].map(e => e.getBoundingClientRect());
  return {
    formulas: document.querySelectorAll('.math').length,
    rendered: document.querySelectorAll('.math:has(math)').length,
    numbers: boxes('.eqno').length,
    lost: boxes('.eqno').filter(r => r.left < 0 || r.right > width).length,
    overhang: document.documentElement.scrollWidth - window.innerWidth,
    hidden: [...document.querySelectorAll('div.math')].filter(d => d.firstElementChild
      && d.firstElementChild.getBoundingClientRect().left < d.getBoundingClientRect().left - 2).length,
    images: document.images.length,
    broken: [...document.images].filter(i => i.complete && i.naturalWidth === 0 && i.loading !== 'lazy').map(i => i.src.slice(0, 80)),
  };
}"""


CODE = """() => {
  const blocks = [...document.querySelectorAll('article div.highlight pre')];
  const over = p => p.scrollWidth > p.clientWidth + 1;
  const sideways = blocks.filter(over).length;
  for (const p of blocks) p.style.whiteSpace = 'pre';
  const short = p => p.innerText.split('\\n').every(line => line.length <= 80);
  return {sideways, wrapped: blocks.filter(p => over(p) && short(p)).length};
}"""


def violations(page) -> dict:
    """What axe-core finds on the page, rule and theme -> the first places: colors in both themes, the rest in the light one."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.add_style_tag(content="section { content-visibility: visible !important; }")  # what is far away, too
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.evaluate("dispatchEvent(new Event('resize'))")
    found = {}
    for theme, asked in (("light", (EVERYWHERE, COLORS)), ("dark", (COLORS,))):
        page.evaluate(f"document.querySelector('.theme-change-button[data-mode={theme}]').click()")
        assert holds(page, f"document.documentElement.dataset.theme === '{theme}'")
        page.evaluate(LOOKS)
        for options, context in asked:
            for v in Axe().run(page, context, {"resultTypes": ["violations"], **options}).response["violations"]:
                found[v["id"], theme] = [n["html"][:160] for n in v["nodes"][:3]] + [len(v["nodes"])]
    page.evaluate("document.querySelector('.theme-change-button[data-mode=auto]').click()")
    return found


@pytest.fixture(scope="module")
def tour(pages, page) -> dict:
    """Every page, looked at once in each width: {(page, width): what it loads, says, shows and hides}."""
    seen, packed = {}, {}
    page.emulate_media(reduced_motion="reduce")  # else axe may measure a color on its way from one theme to the other
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for name in [*pages, "search.html", "404.html"]:
            responses, complaints = [], []
            listeners = {
                "response": lambda r, all_=responses: all_.append(r),
                "pageerror": lambda error, said=complaints: said.append(str(error)),
                "console": lambda m, said=complaints: said.extend([m.text] if m.type == "error" else []),
            }
            for event, listener in listeners.items():
                page.on(event, listener)
            page.goto(f"/{name}")
            for event, listener in listeners.items():
                page.remove_listener(event, listener)
            for response in responses:
                if response.url not in packed:
                    packed[response.url] = len(gzip.compress(response.body()))
            one = seen[name, width] = page.evaluate(SEEN, width)
            one["complaints"], one["bytes"] = complaints, sum(packed[r.url] for r in responses)
            one["hosts"] = {urlsplit(r.url).netloc for r in responses if not r.url.startswith(("data:", "blob:"))}
            one["axe"] = violations(page)  # this opens what is folded
            one |= page.evaluate(CODE)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(reduced_motion="no-preference")
    return seen


def unlike(tour: dict, key: str, wanted=0) -> dict:
    return {place: one[key] for place, one in tour.items() if one[key] != wanted}


def test_every_page_loads_quietly_from_its_own_host(tour, address):
    assert unlike(tour, "complaints", []) == {}
    assert unlike(tour, "hosts", {urlsplit(address).netloc}) == {}


def test_mathematics_is_rendered(tour):
    assert {p: one["rendered"] for p, one in tour.items() if one["rendered"] != one["formulas"]} == {}
    assert sum(one["formulas"] for one in tour.values()) > 500 * len(WIDTHS)


def test_a_wide_equation_keeps_its_number(tour):
    assert unlike(tour, "lost") == {}
    assert sum(one["numbers"] for one in tour.values()) > 50 * len(WIDTHS)


def test_no_line_begins_with_the_comma_of_a_formula(site):
    held = re.compile(r'<span class="held">[(\[“‘]?<span class="math"><math .*?</math></span>[^<]*</span>', re.S)
    for file in (site / "nbs").glob("*.html"):
        left = held.sub("", file.read_text(encoding="utf-8"))
        assert not re.search(r"</math></span>[,.;:?!)]", left), file.name


def test_pictures_use_the_width_of_a_phone_and_wide_ones_move_in_their_box(page):
    boxes = """() => [...document.querySelectorAll('article figure.plot')].map(f => ({
      drawn: Number(f.querySelector('img').getAttribute('width')), shown: f.querySelector('img').clientWidth,
      room: f.clientWidth, moves: f.scrollWidth > f.clientWidth && f.tabIndex === 0 }))"""
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("index", "nbs/02_math", "nbs/04_train", "zh/01_background"):
        page.goto(f"/{name}.html")
        page.add_style_tag(content="section { content-visibility: visible !important; }")
        page.evaluate("dispatchEvent(new Event('resize'))")
        for one in page.evaluate(boxes):
            least = LEGIBLE * one["drawn"] if one["drawn"] > WIDE else 0
            assert one["room"] >= 340 and one["shown"] >= min(one["drawn"], max(one["room"], least)) - 1, (name, one)
            assert one["moves"] == (least > one["room"]), (name, one)
    page.set_viewport_size({"width": 1280, "height": 900})


def test_no_page_scrolls_sideways(tour):
    assert {p: one["overhang"] for p, one in tour.items() if one["overhang"] > 0} == {}
    assert unlike(tour, "hidden") == {}, "what lies left of its box cannot be scrolled to"


def test_code_of_80_columns_fits_and_none_scrolls_on_a_desktop(tour):
    wide = {place: one for place, one in tour.items() if place[1] == max(WIDTHS)}
    assert unlike(wide, "sideways") == {} and unlike(wide, "wrapped") == {}


@pytest.fixture
def visitor(page, address):
    """A page of somebody who comes for the first time: nothing is remembered."""
    context = page.context.browser.new_context(viewport={"width": 1280, "height": 900}, base_url=address)
    yield context.new_page()
    context.close()


def test_the_height_of_what_is_not_laid_out_yet_is_guessed_well(pages, visitor):
    for name in [p for p in pages if p.startswith("nbs/")][::4]:
        visitor.goto(f"/{name}")
        guessed = visitor.evaluate("document.documentElement.scrollHeight")
        visitor.add_style_tag(content="section { content-visibility: visible !important; }")
        real = visitor.evaluate("document.documentElement.scrollHeight")
        assert 0.75 < guessed / real < 1.33, (name, guessed, real)
        visitor.evaluate("sessionStorage.clear()")


SCREENS = 36  # the longest chapter; each is at most as long as this in screens of 1280 x 800


def test_no_chapter_is_longer_than_its_screens(pages, visitor):
    visitor.set_viewport_size({"width": 1280, "height": 800})
    seen = {}
    for name in [p for p in pages if re.match(r"nbs/\d", p)]:
        visitor.goto(f"/{name}")
        visitor.add_style_tag(content="section { content-visibility: visible !important; }")
        seen[name] = round(visitor.evaluate("document.documentElement.scrollHeight") / 800, 1)
    assert {name: screens for name, screens in seen.items() if screens > SCREENS} == {}
    assert sum(seen.values()) / len(seen) < 31, seen


def test_a_link_into_a_folded_section_opens_it(visitor, site):
    opened = "document.querySelector('#references > details.part').open"
    visitor.goto("/nbs/10_ner.html")
    assert not visitor.evaluate(opened)
    visitor.evaluate("location.hash = '#references'")
    assert holds(visitor, opened, 5)
    for address in ("/nbs/10_ner.html", (site / "nbs" / "10_ner.html").as_uri()):
        visitor.goto("about:blank")
        visitor.goto(f"{address}#the-rest-of-the-module")
        assert holds(visitor, "document.querySelector('#the-rest-of-the-module > details.part').open", 5)
        top = "document.querySelector('#the-rest-of-the-module').getBoundingClientRect().top"
        assert holds(visitor, f"Math.abs({top}) < 200", 5)
    inside = "document.querySelector('#references details.part li, #references details.part p')"
    visitor.goto("/nbs/10_ner.html")
    visitor.evaluate(f"{inside}.id = 'inside'; location.hash = '#inside'")
    assert holds(visitor, f"{opened} && {inside}.getBoundingClientRect().top < innerHeight", 5)


def test_a_section_one_looks_up_opens_by_keyboard(visitor):
    visitor.goto("/nbs/10_ner.html")
    visitor.locator("#references > details.part > summary").focus()
    visitor.keyboard.press("Enter")
    assert visitor.evaluate("document.querySelector('#references > details.part').open")
    assert visitor.evaluate("document.querySelector('#references > h2').offsetHeight") > 0


def test_a_long_table_shows_its_beginning_and_all_of_it_when_asked_on_paper_and_without_scripts(page, address):
    shown = "[...document.querySelector('table.long').tBodies[0].rows].filter(r => getComputedStyle(r).display !== 'none').length"
    rows = "document.querySelector('table.long').tBodies[0].rows.length"
    name = "/nbs/15_regularize.html"
    page.goto(name)
    page.add_style_tag(content="section { content-visibility: visible !important; }")
    total = page.evaluate(rows)
    assert total > 10 and page.evaluate(shown) == 8
    button = page.locator("table.long + button.more").first
    said = button.inner_text()
    assert said == f"Show all {total} rows" and button.get_attribute("aria-expanded") == "false"
    page.locator("table.long .sorter").first.press("Enter")
    assert page.evaluate(shown) == 8, "the first ones in the new order"
    for pressed, wanted in (("true", total), ("false", 8)):
        button.press("Enter")
        assert page.evaluate(shown) == wanted and button.get_attribute("aria-expanded") == pressed
    page.emulate_media(media="print")
    assert page.evaluate(shown) == total and not button.is_visible()
    assert page.evaluate("document.querySelector('#references li, #references p').checkVisibility()")
    page.emulate_media(media="null")
    context = page.context.browser.new_context(java_script_enabled=False, base_url=address)
    plain = context.new_page()
    plain.goto(name)
    assert plain.locator("button.more >> visible=true").count() == 0
    assert plain.evaluate(shown) == total
    assert plain.locator("#references details.part p, #references details.part li").first.is_visible()
    context.close()


def test_a_reload_keeps_the_place(visitor):
    seen = "() => [...document.querySelectorAll('article h2, article p')].findIndex(e => e.getBoundingClientRect().bottom > 90)"
    top = "i => document.querySelectorAll('article h2, article p')[i].getBoundingClientRect().top"
    visitor.goto("/nbs/04_train.html")
    for _ in range(12):
        visitor.mouse.wheel(0, 1500)
        visitor.wait_for_timeout(50)
    assert holds(visitor, "scrollY > 5000")
    place = -1
    while place != (place := visitor.evaluate("scrollY")):  # the wheel runs out, on a slow machine late
        visitor.wait_for_timeout(600)
    first = visitor.evaluate(seen)
    before = visitor.evaluate(top, first)
    visitor.reload()
    assert holds(visitor, f"Math.abs(scrollY - {place}) < 40 && Math.abs(({top})({first}) - {before}) < 40", 10)


def test_scripts_wait_for_the_text_and_code_has_no_marks_that_show_nothing(page, site, pages):
    for name in pages:
        text = (site / name).read_text(encoding="utf-8")
        early = [s for s in re.findall(r"<script [^>]*src=[^>]*>", text) if " defer " not in s]
        assert len(early) == 1 and "documentation_options" in early[0], (name, early)
        assert not re.search(r'<span class="[npw]">', text), name
    page.goto("/nbs/10_ner.html")
    for mode in ("dark", "light"):
        page.evaluate(f"document.querySelector('.theme-change-button[data-mode={mode}]').click()")
        assert holds(page, f"document.documentElement.dataset.theme === '{mode}'", 5)
        color = "c => { const p = document.querySelector('.highlight pre'); const s = document.createElement('span'); s.className = c; p.append(s); return getComputedStyle(s).color }"
        assert {page.evaluate(color, c) for c in "npw"} == {page.evaluate(color, "nothing")}


def test_pages_are_light(tour):
    """Bytes as a server compresses them."""
    heavy = {
        p: one["bytes"] for p, one in tour.items() if one["bytes"] > (300_000 if p[0] == "index.html" else 1_500_000)
    }
    assert heavy == {}


def test_pictures_are_drawn(tour):
    assert unlike(tour, "broken", []) == {}
    assert sum(one["images"] for one in tour.values()) > 10 * len(WIDTHS)


def test_axe_finds_nothing_on_any_page_in_either_theme(tour):
    assert unlike(tour, "axe", {}) == {}


def test_the_theme_switches_to_dark_and_back(page):
    page.goto("/index.html")
    seen = {}
    for mode in ("dark", "light", "dark"):
        page.evaluate(f"document.querySelector('.theme-change-button[data-mode={mode}]').click()")
        assert holds(page, f"document.documentElement.dataset.theme === '{mode}'", 5)
        seen[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert seen["dark"] != seen["light"]


def test_the_theme_is_chosen_from_the_keyboard(page):
    page.goto("/nbs/02_math.html")
    page.locator(".theme-switch-button").focus()
    page.keyboard.press("Enter")
    assert holds(page, "document.activeElement.matches('.theme-switch-button[aria-expanded=true]')", 5)
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert holds(page, "document.documentElement.dataset.theme === 'dark'", 5)
    page.evaluate("document.querySelector('.theme-change-button[data-mode=auto]').click()")


def test_what_has_the_focus_is_framed_and_the_frame_is_not_cut(page):
    """Walks through a chapter with the Tab key; a frame that no ancestor cuts stands around every stop inside the text."""
    look = """() => {
      const e = document.activeElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);
      if (!e.closest('article, .bd-header-article') || e.closest('table, .formula') && e.tagName !== 'TABLE' && !e.matches('.formula')) return '';
      if (s.outlineStyle === 'none' && s.boxShadow === 'none') return 'no frame: ' + e.outerHTML.slice(0, 80);
      const out = Math.max(0, parseFloat(s.outlineWidth) + parseFloat(s.outlineOffset)) - 0.5;
      for (let a = e.parentElement; a.tagName !== 'BODY'; a = a.parentElement) {
        const t = getComputedStyle(a), q = a.getBoundingClientRect();
        const cuts = t.overflowX !== 'visible' || t.contentVisibility === 'auto';
        if (cuts && (r.left - out < q.left || r.right + out > q.right)) return 'cut: ' + e.outerHTML.slice(0, 80);
      }
      return '';
    }"""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto("/nbs/10_ner.html")
        found = set()
        for _ in range(130):
            page.keyboard.press("Tab")
            found.add(page.evaluate(look))
        assert found == {""}, width
    page.set_viewport_size({"width": 1280, "height": 900})


def test_a_dark_page_is_printed_dark_on_white_without_what_is_folded(page):
    page.goto("/nbs/10_ner.html")
    page.evaluate("document.querySelector('.theme-change-button[data-mode=dark]').click()")
    theme = "document.documentElement.dataset.theme"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {theme}; }})")
    page.pdf()
    assert page.evaluate("printed") == "light" and page.evaluate(theme) == "dark"
    page.emulate_media(media="print")
    shown = "[...document.querySelectorAll('div.cell details:not([open])')].filter(d => d.offsetHeight).length"
    assert page.evaluate(shown) == 0
    page.emulate_media(media="null")
    page.evaluate("document.querySelector('.theme-change-button[data-mode=auto]').click()")


QUERIES = {
    "LoRA": "11_peft",
    "fit": "04_train",
    "learning rate": "03_optim",
    "lerning rate": "03_optim",
    "freeze layers": "08_finetune",
    "F1": "10_ner",
    "calibration": "02_math",
    "dropout": "15_regularize",
    "mixup": "16_augment",
    "masked language": "06_mlm",
    "autoencoder": "05_autoencoder",
    "halving": "17_search",
    "Grad-CAM": "09_vision",
    "viterbi": "10_ner",
    "checkpoint": "04_train",
    "quantization": "20_compress",
    "quantisation": "20_compress",
    "AdamW": "03_optim",
    "glosary": "A7_glossary",
    "warmup": "03_optim",
}


@pytest.mark.parametrize("query", QUERIES)
def test_search_finds_the_chapter_first(page, query):
    page.goto(f"/search.html?q={query}")
    assert holds(page, "document.querySelectorAll('#search-results li a').length > 0", 30)
    first = page.evaluate("document.querySelector('#search-results li a').getAttribute('href')")
    assert QUERIES[query] in first


def test_a_slip_in_one_of_two_words_finds_what_the_words_find(page):
    page.goto("/search.html")
    for slip, meant in (
        ("catastrophic forgeting", "catastrophic forgetting"),
        ("gradient cliping", "gradient clipping"),
    ):
        first = [page.evaluate("q => (findSections(q)[0] || [])[0]", q) for q in (slip, meant)]
        assert first[0] and first[0] == first[1], first


def test_a_search_result_shows_formulas_in_plain_signs(site):
    from tools.finish import spoken

    assert spoken(r"s_k = \frac{1}{m}\sum_{j=1}^m \log p_\theta(w_j \mid c)") == "s_k = 1/m Σ_j=1^m log p_θ(w_j | c)"
    assert (
        spoken(r"\begin{aligned} \Lambda &\leq 10^{-3} \\ d &\to \mathrm{KL}(p \| q) \end{aligned}")
        == "Λ ≤ 10^-3 d → KL(p | q)"
    )
    index = (site / "sections.js").read_text(encoding="utf-8")
    assert "p_θ" in index and not re.search(r"\\(?:frac|mathrm|theta)", index)


def test_the_field_of_the_search_page_shows_what_was_asked_and_finds_while_one_types(site, page):
    first = "document.querySelector('#search-results li a').getAttribute('href')"
    for address in ("/search.html", (site / "search.html").as_uri()):
        page.goto(f"{address}?q=LoRA")
        field = page.locator("main input[name=q]")
        assert field.input_value() == "LoRA" and field.evaluate("e => e === document.activeElement")
        field.fill("viterbi")
        assert "10_ner" in page.evaluate(first)
        page.locator("#search-results li a").first.click()
        page.wait_for_selector("article h1")
        page.go_back()
        assert holds(page, "document.querySelector('main input[name=q]')?.value === 'viterbi'", 5)
        assert "10_ner" in page.evaluate(first)


def test_pages_and_search_work_from_the_disk(site, page):
    page.goto((site / "search.html").as_uri() + "?q=LoRA")
    page.locator("#search-results li a").first.click()
    page.wait_for_selector("article h1")
    assert page.url.startswith("file:") and "/nbs/11_peft.html" in page.url


def test_every_page_says_what_it_may_load_and_what_it_is(pages, site):
    for name in [*pages, "search.html"]:
        text = html.unescape((site / name).read_text(encoding="utf-8"))
        assert text.count('http-equiv="Content-Security-Policy"') == 1, name
        assert "unsafe-inline'; img-src" in text and "script-src 'self'" in text, name
        assert text.count('<meta name="viewport"') == 1, name
        if name != "search.html":
            assert text.count('<meta name="description"') == 1, name


def test_every_public_name_has_an_entry_that_the_text_links_to(site):
    from tools.api import listed, modules

    for name, file in modules().items():
        text = (site / "api" / f"{name}.html").read_text(encoding="utf-8")
        for entry in listed(ast.parse(file.read_text(encoding="utf-8"))):
            assert f'id="{entry.lower().strip("_").replace("_", "-")}"' in text, (name, entry)
        assert not re.search(r"\(<em>[^<()]*[“”‘’]", text), f"{name}: the quotes of a value in a type are straight"
    assert 'href="../api/finetune.html#tune"' in (site / "nbs" / "08_finetune.html").read_text(encoding="utf-8")
    train = (site / "api" / "train.html").read_text(encoding="utf-8")
    assert train.count('href="../api/checkpoint.html#checkpoint"') and train.count(
        'href="../api/train.html#earlystopping"'
    )


def test_the_book_can_be_read_by_programs(site):
    short, full = ((site / f).read_text(encoding="utf-8") for f in ("llms.txt", "llms-full.txt"))
    assert short.startswith("# ") and "nbs/10_ner.html" in short
    assert "def viterbi" in full


@pytest.fixture(scope="module")
def playground(root, site) -> str:
    """A page of the site with the controls of tests/test_filter.py, under the site's own policy; its name."""
    from tests.test_filter import KEPT
    from tools.filter import playable
    from tools.finish import policy

    body = f"<!doctype html><title>Play</title><link rel=icon href=_static/favicon.svg><link rel=stylesheet href=_static/book.css><main class=bd-article>{playable(KEPT)}</main>"
    body += '<script src="_static/play.js"></script>'
    rule = html.escape(policy(body), quote=True)
    (site / "play.html").write_text(f'<meta http-equiv="Content-Security-Policy" content="{rule}">{body}')
    yield "play.html"
    (site / "play.html").unlink()


def test_a_slider_and_a_menu_choose_a_drawing_by_keyboard_and_without_a_server(playground, site, page):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    for address in (f"/{playground}", (site / playground).as_uri()):
        page.goto(address)
        picture = page.locator(".play-stage img")
        assert picture.get_attribute("alt") == "Bar 2."
        page.locator(".play input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_selector('.play-stage img[alt="Bar 0."]')
        assert page.locator(".play-value").inner_text() == "1"
        assert page.locator(".play input").get_attribute("aria-valuetext") == "1"
        assert page.locator(".play-said").inner_text() == "Bar 0."
        page.keyboard.press("End")
        page.wait_for_selector('.play[data-frame="6"]')
        page.locator(".play select").select_option(label="<b> & c")
        page.wait_for_selector('.play[data-frame="7"]')
        assert page.locator(".play-stage figcaption").inner_text() == "3 < 9 & more"
        assert page.evaluate("document.querySelector('.play-stage img').naturalWidth") > 0
    assert errors == []


def test_controls_move_by_themselves_only_when_asked_and_where_motion_is_welcome(playground, page):
    page.goto(f"/{playground}")
    page.locator(".play-run").click()
    page.wait_for_selector('.play[data-frame="4"]')
    page.wait_for_selector('.play[data-frame="6"]')
    assert page.locator(".play-run").inner_text().endswith("Run"), "it stops at the end"
    page.emulate_media(reduced_motion="reduce")
    assert not page.locator(".play-run").is_visible()
    page.emulate_media(reduced_motion="no-preference")


def test_every_control_of_the_book_chooses_among_its_drawings(pages, site, page):
    for name in pages:
        if 'class="play"' not in (site / name).read_text(encoding="utf-8"):
            continue
        page.goto(f"/{name}")
        for box in page.locator("div.play").all():
            fields = box.locator("[data-control]").all()
            assert fields, name
            seen = set()
            for field in fields:
                last = "e => { e.value = e.tagName === 'SELECT' ? e.options.length - 1 : e.max; e.dispatchEvent(new Event('input')); }"
                field.evaluate(last)
                page.wait_for_timeout(100)
                assert any(box.get_attribute("data-frame") or page.wait_for_timeout(50) for _ in range(400))
                seen.add(box.get_attribute("data-frame"))
                assert box.evaluate("b => [...b.querySelectorAll('img')].every(i => i.naturalWidth > 0 && i.alt)"), name
            assert seen, name


TABLE = """<main class=bd-article><table><thead><tr><th>way</th><th>score</th></tr></thead><tbody>
<tr><td>b</td><td>9.5 % [1, 2]</td></tr><tr><td>a</td><td>1,200</td></tr><tr><td>d</td><td>10 %</td></tr>
<tr><td>c</td><td>\u22123</td></tr><tr><td>e</td><td>under 0.1</td></tr><tr><td>f</td><td></td></tr></tbody></table></main>"""


def test_one_switch_below_the_promise_opens_all_folded_code_and_is_remembered(visitor):
    states = "[...new Set([...document.querySelectorAll('div.cell details')].map(d => d.open))]"
    visitor.goto("/nbs/02_math.html")
    assert visitor.evaluate(states) == [False]
    assert visitor.evaluate("document.querySelector('.code-switch').previousElementSibling.matches('h1 + p')")
    for opened, wanted in (("true", True), ("false", False)):
        visitor.locator(".code-switch").press("Enter")
        assert visitor.locator(".code-switch").get_attribute("aria-pressed") == opened
        assert visitor.evaluate(states) == [wanted]
        visitor.goto("/nbs/01_background.html")
        assert visitor.evaluate(states) == [wanted], "another page knows it"
        visitor.goto("/nbs/02_math.html")


def test_columns_sort_numbers_as_numbers(site, page):
    (site / "table.html").write_text(
        f"<!doctype html><meta charset=utf-8>{TABLE}<link rel=stylesheet href=_static/book.css><script src=_static/book.js></script>",
        "utf-8",
    )
    page.goto("/table.html")
    order = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent).join('')"
    for column, orders in ((1, ("cebdaf", "adbecf")), (0, ("abcdef", "fedcba"))):
        for wanted in orders:
            page.locator(".sorter").nth(column).press("Enter")
            assert page.evaluate(order) == wanted
        arrows = [h.evaluate("b => getComputedStyle(b, '::after').content") for h in page.locator(".sorter").all()]
        assert arrows == ['"↓"' if i == column else '"↕"' for i in range(2)]
    assert page.locator("th").nth(0).get_attribute("aria-sort") == "descending"
    (site / "table.html").unlink()


def test_a_table_without_titles_has_no_bar_above_it(pages, page):
    bare = "[...document.querySelectorAll('article thead')].filter(t => !t.textContent.trim()).length"
    for name in ("nbs/A1_data.html", "nbs/A2_models.html"):
        page.goto(f"/{name}")
        assert page.evaluate(bare) == 0, name
        assert page.evaluate("[...document.querySelectorAll('article table')].filter(t => !t.tHead).length") > 3


def test_the_glossary_filters_in_both_languages(page):
    page.goto("/nbs/A7_glossary.html")
    shown = (
        "[...document.querySelectorAll('article h3')].filter(h => h.offsetHeight).map(h => h.firstChild.textContent)"
    )
    for asked in ("ablat", "消融"):
        page.locator("#term-filter").fill(asked)
        assert page.evaluate(shown) == ["ablation"]
    assert page.locator(".term-filter [role=status]").inner_text().startswith("1 of ")
    page.locator("#term-filter").fill("")
    assert len(page.evaluate(shown)) > 100


def test_a_choice_opens_by_keyboard_and_what_was_answered_is_kept(site, page):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for address in ("/nbs/11_peft.html", (site / "nbs" / "11_peft.html").as_uri()):
        page.goto(address)
        page.evaluate("localStorage.clear()")
        page.reload()
        count = page.locator(".quiz-count")
        total = page.locator("details.choice.right").count()
        assert count.text_content() == f"0 of {total} answered" and count.get_attribute("role") == "status"
        for kind, opened in (("wrong", 0), ("right", 1)):
            choice = page.locator(f"details.choice.{kind}").first
            choice.locator("summary").focus()
            page.keyboard.press("Enter")
            assert choice.locator("p").is_visible()
            assert holds(
                page, f"document.querySelector('.quiz-count').textContent === '{opened} of {total} answered'", 5
            )
        assert page.locator("p.question.answered").count() == 1
        page.reload()
        assert page.locator("details.choice[open]").count() == 0
        assert count.text_content() == f"1 of {total} answered"
        assert "answered" in page.locator("p.question").first.get_attribute("class")
        page.goto(address.replace("11_peft", "10_ner"))
        assert count.text_content().startswith("0 of "), "each page counts its own"
    assert errors == []


def test_no_letter_of_another_script_stands_without_its_language(pages, page):
    for name in ("nbs/A7_glossary.html", "index.html"):
        page.goto(f"/{name}")
        bare = """() => { const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT), out = [];
        while (walk.nextNode()) if (/[\u4e00-\u9fff]/.test(walk.currentNode.data) && !walk.currentNode.parentElement.closest('[lang=zh]')) out.push(walk.currentNode.data);
        return out; }"""
        assert page.evaluate(bare) == [], name


def test_a_page_in_two_languages_leads_from_one_to_the_other(site, page):
    for start in ("/nbs/01_background.html", (site / "nbs" / "01_background.html").as_uri(), "/index.html"):
        page.goto(start)
        english = page.url
        assert page.evaluate("document.documentElement.lang") == "en"
        page.locator("a.language[hreflang=zh-Hans]").click()
        page.wait_for_url("**/zh/*.html")
        assert page.evaluate("document.documentElement.lang") == "zh-Hans"
        assert page.evaluate("/[\u4e00-\u9fff]/.test(document.querySelector('article h1').textContent)")
        page.locator("a.language[hreflang=en]").click()
        page.wait_for_url(english)
    page.goto("/nbs/02_math.html")
    assert page.locator("a.language").count() == 0


def test_a_chinese_page_has_the_figures_and_the_code_of_the_english_one(site):
    one, other = ((site / g / "01_background.html").read_text(encoding="utf-8") for g in ("nbs", "zh"))
    for mark in ("<img ", 'class="cell_input', "<math", "<table"):
        assert one.count(mark) == other.count(mark) > 0, mark
    assert "尚未翻译" not in other and "原文已更改" not in other


def test_chinese_words_are_found(page):
    page.goto("/search.html?q=灾难性遗忘")
    assert holds(page, "document.querySelectorAll('#search-results li a').length > 0", 30)
    assert "/zh/" in f"/{page.evaluate('findSections(`线性探测`)[0][0]')}"


def test_the_home_page_says_in_its_first_screen_what_the_book_is(page):
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto("/index.html")
    for place in ("article h1", "article p", ".buttons .first", "article figure img"):
        box = page.locator(place).first.bounding_box()
        assert box["y"] + box["height"] <= 800, place
    assert page.locator(".cards li").count() == page.locator(".cards li svg").count() > 10
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.parametrize("home, first", [("index", "Start reading"), ("zh/index", "开始阅读")])
def test_a_home_page_has_cards_and_buttons_and_its_table_stacks_on_a_phone(page, home, first):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"/{home}.html")
    assert page.locator(".buttons .button").count() == 2 and page.locator(".buttons .first").inner_text() == first
    chapters = page.locator(".cards li a").evaluate_all("all => all.map(a => a.href)")
    assert len(chapters) > 10 and page.locator("article table").count() == 1
    table = page.locator("article table")
    assert table.evaluate("t => t.scrollWidth <= t.clientWidth + 1")
    cells = table.locator("tbody tr").first.locator("td")
    tops = cells.evaluate_all("all => all.map(c => c.getBoundingClientRect().top)")
    assert tops == sorted(set(tops)) and len(tops) > 3, "one cell below another"
    titles = cells.evaluate_all("all => all.map(c => getComputedStyle(c, '::before').content.slice(1, -1))")
    assert titles == [t.strip() for t in table.locator("th").all_text_contents()]
    page.set_viewport_size({"width": 1280, "height": 900})
    links = {page.request.get(link).status for link in chapters}
    assert links == {200}


def test_no_directive_of_the_notebooks_reaches_a_page(site):
    leaked = [f.name for f in (site / "nbs").glob("*.html") if "#|" in f.read_text(encoding="utf-8")]
    assert leaked == []
