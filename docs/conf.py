"""How Sphinx builds the site. `make site` calls it on a copy of this folder with the lessons beside it."""

import re
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "dfqlib"
author = "the dfqlib contributors"
version = release = installed_version("dfqlib")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_templates", "lessons/table.md"]
templates_path = ["_templates"]

# The lessons are shown with the outputs they were committed with.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# One file with everything in it, drawing formulas as SVG: no font or script comes from elsewhere, so that the
# pages also work offline and straight from a folder.
MATHJAX = "tex-svg-full.js"
(mathjax_folder,) = find_spec("sphinx-mathjax-offline").submodule_search_locations
mathjax_path = MATHJAX
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "furo"
html_title = "dfqlib"
html_static_path = ["_static", str(Path(mathjax_folder, "static", "mathjax", MATHJAX))]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a browser lets no page read another one from a folder
html_show_copyright = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
napoleon_numpy_docstring = False
# A name of the package is documented in its module and once more where it is offered directly.
suppress_warnings = ["ref.python"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def link_lessons(app: Sphinx, what: str, name: str, object_: object, options: object, lines: list[str]) -> None:
    """Make "Taught in notebook 07." in a docstring lead to that lesson."""
    if lines and lines[0].startswith("Alias for field number"):  # what a NamedTuple says of a field without words
        lines.clear()
    lessons = {path.stem[:2]: path.stem for path in (HERE / "lessons").glob("[0-9]*.ipynb")}

    def link(match: re.Match[str]) -> str:
        number = match[1]
        return f"lesson :doc:`{number} </lessons/{lessons[number]}>`" if number in lessons else match[0]

    lines[:] = [re.sub(r"\bnotebook (\d\d)\b", link, line) for line in lines]


def setup(app: Sphinx) -> None:
    """Register what this project adds."""
    app.connect("autodoc-process-docstring", link_lessons)
