"""The documentation site: `make docs`."""

from pathlib import Path
import sys

from sami_ppl import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "sami_ppl"
author = "The sami_ppl developers"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "cyclopts.sphinx_ext", "docstrings"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 84

html_theme = "furo"
html_title = "sami_ppl"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
