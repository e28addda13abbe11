"""Package metadata, read from settings.ini (the one place where it stands)."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(HERE / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
url, branch = cfg["repository"], cfg["branch"]
EXTRAS = "notebook", "book", "deploy", "dev", "bench"


def requirements(key: str) -> list:
    return cfg[key].split()


def readme() -> str:
    """README.md with its relative links made absolute, as a package index shows it."""
    file = HERE / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else cfg["description"]
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{url}/raw/{branch}/", text)
    return re.sub(r"(?<!!)(\[[^\[\]]*\]\()(?!\w+:|#)", rf"\g<1>{url}/blob/{branch}/", text)


class WithResults(build_py):
    """The package with the numbers that the book states, which `ftbook.results` reads where there is no checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ftbook" / "assets" / "results"
            self.mkpath(str(target))
            for file in sorted((HERE / "results").glob("*.json")):
                self.copy_file(str(file), str(target / file.name))


extras = {name: requirements(f"{name}_requirements") for name in EXTRAS}
extras["all"] = sorted({r for group in extras.values() for r in group})
addresses = {"Source": url, "Changelog": f"{url}/blob/{branch}/CHANGELOG.md"}
if cfg["site"]:
    addresses["Documentation"] = cfg["site"]
low, high = (int(cfg[key].split(".")[1]) for key in ("min_python", "max_python"))

setup(
    cmdclass={"build_py": WithResults},
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license=cfg["license"],
    author_email=cfg["contact"] or None,
    url=cfg["site"] or url,
    project_urls=addresses,
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=["ftbook", "ftbook.exercises", "ftbook.studies"],
    package_data={"ftbook": ["assets/*", "assets/**/*"]},
    include_package_data=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(low, high + 1)),
    ],
)
