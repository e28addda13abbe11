"""The site as a reader meets it: built by Sphinx, served from this machine, opened in headless Chromium."""
import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]
browser = pytest.importorskip("browser")
if not browser.binary() and not os.environ.get("CI"):
    pytest.skip("no Chromium on the PATH: install it (Debian: apt-get install chromium) to test the pages in a browser",
                allow_module_level=True)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "html"
    run = subprocess.run([sys.executable, root / "tools" / "book.py", "--builder", "sphinx", "--out", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def page():
    with browser.Browser() as b:
        yield b.page()


@pytest.fixture(scope="module")
def pages(site) -> list:
    return ["index.html", *sorted(f"nbs/{f.name}" for f in (site / "nbs").glob("*.html"))]


def test_every_page_loads_quietly_from_its_own_host(pages, address, page):
    page.size(1280)
    for name in pages:
        page.open(f"{address}/{name}")
        assert page.complaints() == [], name
        hosts = {urlsplit(url).netloc for url in page.requests() if urlsplit(url).scheme not in ("data", "blob")}
        assert hosts == {urlsplit(address).netloc}, name


def test_mathematics_is_rendered(pages, address, page):
    formulas = 0
    for name in pages:
        page.open(f"{address}/{name}")
        wanted = page.run("document.querySelectorAll('.math').length")
        if wanted:
            assert page.wait("document.querySelectorAll('mjx-container svg, math').length >= document.querySelectorAll('.math').length"), name
            assert page.run("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0, name
            formulas += wanted
    assert formulas > 50


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(pages, address, page, width):
    page.size(width)
    wide = {}
    for name in pages:
        page.open(f"{address}/{name}")
        page.wait("!document.querySelector('.math') || !!document.querySelector('mjx-container, math')")
        overhang = page.run("document.documentElement.scrollWidth - window.innerWidth")
        if overhang > 0:
            wide[name] = overhang
        hidden = page.run("[...document.querySelectorAll('div.math')].filter(d => d.firstElementChild && "
                          "d.firstElementChild.getBoundingClientRect().left < d.getBoundingClientRect().left - 2).length")
        if hidden:  # what lies left of its box cannot be scrolled to
            wide[name] = f"{hidden} equations begin left of their box"
    page.size(1280)
    assert wide == {}


def test_the_theme_switches_to_dark_and_back(address, page):
    page.open(f"{address}/index.html")
    seen = {}
    for mode in ("dark", "light", "dark"):
        page.run(f"document.querySelector('.theme-change-button[data-mode={mode}]').click()")
        assert page.wait(f"document.documentElement.dataset.theme === '{mode}'", 5)
        seen[mode] = page.run("getComputedStyle(document.body).backgroundColor")
    assert seen["dark"] != seen["light"]


def test_search_finds_a_word(address, page):
    page.open(f"{address}/search.html?q=calibration")
    assert page.wait("document.querySelectorAll('#search-results li a').length > 0", 30)
    assert page.run("[...document.querySelectorAll('#search-results li a')].some(a => a.href.includes('02_math'))")


def test_pictures_are_drawn(pages, address, page):
    drawn = 0
    for name in pages:
        page.open(f"{address}/{name}")
        broken = page.run("[...document.images].filter(i => i.complete && i.naturalWidth === 0 && i.loading !== 'lazy').map(i => i.src.slice(0, 80))")
        assert broken == [], name
        drawn += page.run("document.images.length")
    assert drawn > 10


def test_no_directive_of_the_notebooks_reaches_a_page(site):
    leaked = [f.name for f in (site / "nbs").glob("*.html") if "#|" in f.read_text(encoding="utf-8")]
    assert leaked == []
