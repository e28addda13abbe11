"""Chapters in JupyterLab as a reader uses them: opened in Chromium, run from top to bottom, every control moved, saved and opened again."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.test_site import CHROMIUM, FLAGS, holds

pytest.importorskip("jupyterlab")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]

CHAPTERS = "24_choose", "27_tasks"
COUNTED = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"
DONE = f"{COUNTED}.filter(t => /\\d/.test(t)).length > 10 && !{COUNTED}.some(t => t.includes('*'))"
ERRORS = "[...document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.error\"]')].map(e => e.textContent.slice(0, 300))"
PLAYED = ".jp-CodeCell:has(.jupyter-widgets :is(select, .noUi-handle, input))"
DRAWN = (
    "c => [...c.querySelectorAll('.jp-OutputArea-output')].map(o => o.innerHTML).filter(h => h.includes('<img')).join()"
)
HIDDEN = "document.querySelectorAll('.jp-CodeCell .jp-InputPlaceholder, .jp-CodeCell .jp-Placeholder').length"


@pytest.fixture(scope="module")
def lab(root, tmp_path_factory):
    """Address of a JupyterLab with the settings of `make lab`, on copies of the chapters; all cells stay in the page."""
    folder, config = tmp_path_factory.mktemp("nbs"), tmp_path_factory.mktemp("config")
    for name in CHAPTERS:
        shutil.copy(root / "nbs" / f"{name}.ipynb", folder)
    settings = json.loads((root / "tools/labconfig/default_setting_overrides.json").read_text())
    settings["@jupyterlab/notebook-extension:tracker"] = {"windowingMode": "none"}
    settings["@jupyterlab/apputils-extension:notification"] = {"fetchNews": "false", "checkForUpdates": False}
    (config / "labconfig").mkdir()
    (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = {"JUPYTER_CONFIG_PATH": str(config), "JUPYTER_CONFIG_DIR": str(config), "IPYTHONDIR": str(config)}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", f"--notebook-dir={folder}"]
        + ["--ip=127.0.0.1", "--IdentityProvider.token=lab", "--allow-root"],
        env={**os.environ, **paths, "PYTHONPATH": str(root)},
        stdout=(config / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).read()
            break
        except OSError:
            assert server.poll() is None, (config / "log").read_text()
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def asked(address: str, method: str = "GET"):
    request = urllib.request.Request(address, method=method, headers={"Authorization": "token lab"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def moved(page, cell) -> list:
    """Every value of every control of a cell is chosen; what was drawn for each."""
    seen = [cell.evaluate(DRAWN)]

    def drawn():
        for _ in range(200):
            if (new := cell.evaluate(DRAWN)) and new != seen[-1]:
                break
            page.wait_for_timeout(100)
        seen.append(cell.evaluate(DRAWN))

    for menu in cell.locator(".jupyter-widgets select").all():
        chosen = menu.evaluate("s => s.selectedIndex")
        for i in range(menu.evaluate("s => s.options.length")):
            if i != chosen:
                menu.select_option(index=i)
                drawn()
    for handle in cell.locator(".jupyter-widgets .noUi-handle").all():
        for key in ("Home", "End"):
            handle.press(key)
            drawn()
    for box in cell.locator(".jupyter-widgets input[type=checkbox]").all():
        box.click()
        drawn()
    return seen


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_runs_in_jupyterlab_and_every_control_draws(lab, page, name):
    address = lab
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token=lab")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    assert holds(page, f"{HIDDEN} > 3", 30), "cells that only import or draw are closed"
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    ended = holds(page, f"({DONE}) || {ERRORS}.length > 0", 300)
    assert page.evaluate(ERRORS) == [] and ended, page.evaluate(COUNTED)
    cells = page.locator(PLAYED).all()
    assert cells
    for cell in cells:
        cell.scroll_into_view_if_needed()
        seen = moved(page, cell)
        assert all(seen) and len(set(seen)) == len(seen) > 2, "each value has a picture of its own"
    last = cells[-1].evaluate(DRAWN)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    assert holds(page, "!document.querySelector('.jp-mod-dirty')", 30)
    page.goto("about:blank")
    for session in asked(f"{address}/api/sessions"):
        asked(f"{address}/api/sessions/{session['id']}", "DELETE")
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token=lab")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell img")
    again = [c.evaluate(DRAWN) for c in page.locator(".jp-CodeCell:has(img)").all()]
    assert any(picture in last for picture in again if picture), "the last picture is there without a kernel"
