"""What every test shares: the quick profile, an empty cache, a scratch folder for results, and no network."""

import contextlib
import dataclasses
import hashlib
import http.server
import os
import random
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
GUARD = ROOT / "tests" / "guard"
SCRATCH = tempfile.mkdtemp(prefix="ftbook-tests-")
os.environ.setdefault(
    "FTBOOK_TEST_MODELS", os.environ.get("FTBOOK_DATA", "")
)  # where real models may lie; "" is the user's cache
os.environ |= {
    "FTBOOK_PROFILE": "quick",
    "FTBOOK_RESULTS": str(Path(SCRATCH) / "results"),
    "FTBOOK_DATA": str(Path(SCRATCH) / "data"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")])),
}
os.environ.pop("FTBOOK_FRAMES", None)  # who runs chapters draws what a control shows; a test asks for it itself
sys.path.insert(0, str(GUARD))
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402,F401


def pytest_collection_modifyitems(items):
    """Long files first, so that two workers end together."""
    long = ("test_edition", "test_notebooks", "test_site", "test_package")
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


hypothesis.settings.register_profile("repeatable", derandomize=True)
if not os.environ.get("FTBOOK_TEST_SEED"):
    hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test draws the same numbers whatever ran before it; FTBOOK_TEST_SEED=1 gives it others."""
    seed = zlib.crc32(item.nodeid.encode()) + int(os.environ.get("FTBOOK_TEST_SEED") or 0)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def own_stand_ins(monkeypatch):
    """That one test loads substituted data does not forbid the next one to store its numbers."""
    if "ftbook.results" in sys.modules:
        monkeypatch.setattr(sys.modules["ftbook.results"], "_stand_ins", {})


@pytest.fixture
def untraced():
    """Without the tracer of coverage: nothing of ftbook runs in the test, and a thousand pages are read."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, the cpu profile, and no waiting between attempts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FTBOOK_DATA", str(folder))
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")
    monkeypatch.delenv("FTBOOK_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return folder


@pytest.fixture
def fake(cache, monkeypatch):
    """Puts made-up files of a data set into the cache and their sums onto its card."""

    def make(name, variant, contents):
        from ftbook import data

        card, files = data.card(name), []
        for file in card.variants[variant]:
            raw = contents.get(file.name, b"unused")
            path = cache / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
            files.append(dataclasses.replace(file, sha256=hashlib.sha256(raw).hexdigest(), size=len(raw)))
        variants = {**card.variants, variant: tuple(files)}
        monkeypatch.setitem(data._CARDS, name, dataclasses.replace(card, variants=variants))

    return make


@pytest.fixture
def server():
    """Serves answers[path]: (status, content, announced length), a function of the handler, or a list of these.

    Of a list the last one is repeated. What was asked for stands in `requests`.
    """
    answers, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            queue = answers.get(self.path, (404, b"<html>not found</html>", None))
            queue = queue if isinstance(queue, list) else [queue]
            answer = queue.pop(0) if len(queue) > 1 else queue[0]
            if callable(answer):
                with contextlib.suppress(OSError):  # until the other side hangs up
                    answer(self)
                return
            status, content, length = answer
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.answers, httpd.requests = answers, requests
    httpd.base = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()
