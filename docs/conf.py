"""Sphinx's configuration for the site: ``make docs``. What of its pages is generated: ``tools/docs/pages.py``."""

import sys
from pathlib import Path, PurePosixPath
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / 'tools' / 'docs')]

import pages  # noqa: E402
import stand_ins  # noqa: E402

stand_ins.complete()
with stand_ins.mock(stand_ins.LIBRARIES):
    import mila_mm

    pages.write(DOCS / '_generated')

project = 'mila_mm'
author = copyright = 'The mila_mm contributors'
version = release = mila_mm.__version__
extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
    'sphinx_external_toc',
]
external_toc_exclude_missing = True
exclude_patterns = ['_build']
highlight_language = 'text'
suppress_warnings = ['mystnb.unknown_mime_type']

myst_heading_anchors = 4
myst_enable_extensions = ['tasklist']
# The notebooks are run by tests/docs/test_notebooks.py; the site shows what they hold.
nb_execution_mode = 'off'

autodoc_mock_imports = stand_ins.LIBRARIES
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = 'furo'
html_title = f'mila_mm {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True


def _finish_source(app: Any, docname: str, source: list[str]) -> None:
    """Put links and tables into a page that on GitHub is read as it is."""
    if app.env.doc2path(docname).suffix == '.md':
        folder = PurePosixPath('docs', docname).parent
        source[0] = pages.relocated(source[0], folder, folder).replace(pages.MODELS_MARK, pages.model_tables())


def _shorten_defaults(*entry: Any) -> tuple[str | None, str | None]:
    """Write the default of a dataclass's field that is made anew as ``...``: ``<factory>`` is no Python."""
    *_, signature, returned = entry
    return signature and signature.replace('<factory>', '...'), returned


def setup(app: Any) -> None:
    """Connect what is done to each page."""
    app.connect('source-read', _finish_source)
    app.connect('autodoc-process-signature', _shorten_defaults)
