"""What every test shares: the quick profile, an empty cache, a scratch folder for results, and no network."""
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUARD = ROOT / "tests" / "guard"
SCRATCH = tempfile.mkdtemp(prefix="ftbook-tests-")
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
sys.path[:0] = [str(GUARD), str(ROOT / "tools")]
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402,F401


def pytest_collection_modifyitems(items):
    """Long ones first, so that two workers end together."""
    long = ("test_notebooks", "test_site", "test_package")
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
