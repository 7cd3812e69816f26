"""The pages of the documentation as the checks read them: text, code blocks, and the Markdown of notebooks."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r'^(`{3,})([\w-]*)[^\n]*\n(.*?)^\1\s*$', re.MULTILINE | re.DOTALL)


def paths() -> list[Path]:
    """Return every page a reader may open: of the root, of docs/, of configs/ and of the tests' data."""
    found = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), *(ROOT / 'docs').glob('notebooks/*.ipynb')]
    return sorted([*found, *(ROOT / 'configs').rglob('*.md'), *(ROOT / 'tests' / 'data').rglob('*.md')])


def text_of(path: Path) -> str:
    """Return a page's Markdown; of a notebook its texts, and its code cells as blocks of Python."""
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb':
        return text
    cells = json.loads(text)['cells']
    sources = [(cell['cell_type'], ''.join(cell['source'])) for cell in cells]
    return '\n\n'.join(source if kind == 'markdown' else f'```ipython\n{source}\n```' for kind, source in sources)


@pytest.fixture(scope='session')
def pages() -> dict[str, str]:
    """Path from the repository's root -> Markdown, of every page."""
    return {path.relative_to(ROOT).as_posix(): text_of(path) for path in paths()}


@pytest.fixture(scope='session')
def prose() -> Callable[[str], str]:
    """Take the code blocks out of a page."""
    return lambda text: _FENCE.sub('', text)


@pytest.fixture(scope='session')
def blocks(pages: dict[str, str]) -> list[tuple[str, str, str]]:
    """Page, language and code of every block."""

    def found() -> Iterator[tuple[str, str, str]]:
        for page, text in pages.items():
            for _, language, code in _FENCE.findall(text):
                yield page, language, code

    return list(found())
