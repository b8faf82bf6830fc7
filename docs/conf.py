"""Sphinx configuration. `tox -e docs` builds with every warning an error, and without the network.

Set `DOCS_ONLINE=1` where SQLAlchemy's, Dramatiq's and the other projects' inventories can be fetched: names of theirs
then become links.
"""

from __future__ import annotations

import os
import re
from typing import Any

import broadcastable

project = "broadcastable"
author = "The broadcastable authors"
project_copyright = "2026, the broadcastable authors"
version = release = broadcastable.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # Names of other projects, and type variables: only with their inventories could they be links.
    (r"py:.*", r"(?!broadcastable\.).*"),
    # In signatures, and of no use to a reader: what streams() returns, what actors.declare() asks of a DurableStreams,
    # where the test kit's record stands.
    (r"py:class", r"broadcastable\.(declarations\.StreamDeclaration|delivery\.Delivering|testing\.recorder\.Mark)"),
]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "sqlalchemy": ("https://docs.sqlalchemy.org/en/20", None),
        "dramatiq": ("https://dramatiq.io", None),
        "redis": ("https://redis.readthedocs.io/en/stable", None),
        "jwt": ("https://pyjwt.readthedocs.io/en/stable", None),
    }
    if os.environ.get("DOCS_ONLINE")
    else {}
)

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"broadcastable {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/mark.svg"
html_theme_options = {
    "light_logo": "logo-light.svg",
    "dark_logo": "logo-dark.svg",
    "sidebar_hide_name": True,
    "light_css_variables": {"color-brand-primary": "#5048c8", "color-brand-content": "#5048c8"},
    "dark_css_variables": {"color-brand-primary": "#a9a4ff", "color-brand-content": "#a9a4ff"},
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

_CODE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?![`_\w])")


def _as_written(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Docstrings are written for an editor: `code` in single backticks, samples indented after a blank line."""
    text: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside and text and text[-1] == "" and _is_prose(text):
            text += ["::", ""]
            inside = True
        elif line and not indented:
            inside = False
        text.append(line if inside else _CODE.sub(r"``\1``", line))
    lines[:] = text


def _is_prose(text: list[str]) -> bool:
    """Whether the last paragraph is one of its own, and not an item that the indented lines belong to."""
    last = next((line for line in reversed(text) if line), "")
    return not last.startswith((" ", ":", "..", "-", "*"))


def setup(app: Any) -> None:
    # After napoleon, which takes the sections apart.
    app.connect("autodoc-process-docstring", _as_written, priority=800)
