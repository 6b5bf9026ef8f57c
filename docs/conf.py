"""Settings of the site that `make docs` builds: the pages of this folder, and the reference from docstrings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bayeslm import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import api_pages  # noqa: E402

project = "bayeslm"
author = "The bayeslm authors"
copyright = "the bayeslm authors, Apache-2.0"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",  # pages in Markdown, of which those with code cells are executed
    "api_pages",
    "plain_docstrings",
    "mathml",
    "repository_links",
    "execution_times",
]
exclude_patterns = ["extensions", "kernel"]
templates_path = ["templates"]
show_warning_types = True

# ---- the reference: pages of all that is in the `__all__` of a public package ----

api_pages.write(HERE / "api")
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
default_role = "py:obj"
modindex_common_prefix = ["bayeslm."]

# ---- Markdown ----

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # so that page.md#a-heading leads to it, as on GitHub

# ---- notebooks: executed where the cache has no result of the same code ----

# Inherited by the kernels: bars are of no use on a page, and warnings need no path of this machine.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "IPYTHONDIR": str(HERE / "kernel")}
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "docs-cache")
nb_execution_timeout = 1800  # seconds of a cell: beside other work threads wait for one another, ten times longer
nb_execution_raise_on_error = False  # a failure is a warning, so an error at the end, after all pages
nb_execution_excludepatterns = ["api/*"]
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # of other sites, and no page has a widget

# ---- the look ----

html_theme = "pydata_sphinx_theme"
html_title = f"bayeslm {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "bayeslm"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"changelog": [], "benchmarks": [], "index": []}
copybutton_exclude = ".linenos, .gp, .go"
