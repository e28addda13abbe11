"""Make a virtual environment from a lock file: `env.py FOLDER LOCK [--editable]`. Standard library only.

Written so that an old interpreter can still read it far enough to say that it is too old.
"""

import os
import re
import subprocess
import sys

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "settings.ini")) as file:
    LOW, HIGH = re.findall(r"^m(?:in|ax)_python = (\S+)$", file.read(), flags=re.M)


def stop(text):
    sys.exit("ftbook: " + text)


def run(*command):
    if subprocess.call(command):
        stop("this step failed: " + " ".join(command))


def uv(*command):
    """Run a uv command; where it fails, once more with this system's certificates (some networks have their own)."""
    return subprocess.call(command) and subprocess.call(command + ("--system-certs",))


def main(folder, lock, editable):
    low, high = [tuple(int(part) for part in text.split(".")) for text in (LOW, HIGH)]
    if not low <= sys.version_info[:2] <= high:
        stop(
            "Python %d.%d cannot be used: ftbook needs %s to %s. Name another one: make PYTHON=python%s ..."
            % (sys.version_info[:2] + (LOW, HIGH, HIGH))
        )
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        print("environment: making %s/ with Python %d.%d" % ((folder,) + sys.version_info[:2]), flush=True)
        if subprocess.call([sys.executable, "-m", "venv", folder]):
            stop(
                "`%s -m venv` failed: this Python comes without venv (on Debian: apt-get install python3-venv)"
                % sys.executable
            )
    if subprocess.call([python, "-c", "import uv"], stderr=subprocess.DEVNULL):
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    print("environment: installing %s into %s/ (first time: minutes)" % (lock, folder), flush=True)
    os.environ.setdefault("UV_LINK_MODE", "copy" if os.name == "nt" else "hardlink")
    install = (python, "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", python)
    if uv(*install, "--requirements", lock):
        stop("the packages of %s could not be installed: see the lines above" % lock)
    if editable and uv(*install, "--no-deps", "--editable", "."):
        stop("ftbook itself could not be installed: see the lines above")


def locked(folder, job):
    """Run job() while no other make fills the same folder."""
    try:
        import fcntl
    except ImportError:
        return job()
    with open(folder.rstrip("/") + ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return job()


if __name__ == "__main__":
    where, what = sys.argv[1:3]
    locked(where, lambda: main(where, what, "--editable" in sys.argv[3:]))
