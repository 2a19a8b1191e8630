"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

from pathlib import Path

import sphinx_autosummary_accessors

import xr_anysat  # registers the accessor; has the version

HERE = Path(__file__).parent

# Sphinx reads pages only from this folder: copy the notebooks into it and adapt their links
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    (HERE / "notebooks" / notebook.name).write_text(notebook.read_text().replace("](../docs/", "](../"))

project = "xr_anysat"
release = version = xr_anysat.__version__
copyright = "the authors of xr_anysat"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_autosummary_accessors",
]
templates_path = ["_templates", sphinx_autosummary_accessors.templates_path]
exclude_patterns = ["_build", "jupyter_execute", "notebooks/.ipynb_checkpoints"]

html_theme = "furo"
html_title = "xr_anysat"

myst_heading_anchors = 3
# notebooks are stored without outputs: changed ones are run
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autosummary_generate = True
autodoc_typehints = "none"  # docstrings describe types in words
numpydoc_show_class_members = False
