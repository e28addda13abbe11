"""Sphinx settings. Title, authors and chapters come from _quarto.yml, version and repository from settings.ini."""

from pathlib import Path

from tools.settings import book, settings
from tools.stage import EXTRA

SITE = Path(__file__).resolve().parent

cfg = settings()
project, author = book()["title"], book()["author"]
copyright, version = f"{author}, {cfg['license']}", cfg["version"]  # noqa: A001
language = "en"

extensions = ["myst_nb", "tools.mathml", "sphinx_copybutton"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
root_doc = "index"

# notebooks: stored outputs only, no widget scripts from other hosts
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "colon_fence", "strikethrough"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.strikethrough"]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = [str(SITE / "static")]
html_css_files = ["book.css"]
html_js_files = ["book.js", "play.js"]
html_extra_path = [str(EXTRA)]
html_favicon = str(SITE / "static" / "favicon.svg")
html_baseurl = cfg["site"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": cfg["repository"],
    "use_repository_button": True,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "toc_title": "In this chapter",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "logo": {"text": project},
}
html_context = {"default_mode": "auto"}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
