"""Files that a data set names and that are not there, and what explains it."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from mila_mm.datasets.checks.findings import Finding, error


def absent_files(key: str, kind: str, paths: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """Name the first of some files that does not exist, and say why that may be.

    Args:
        key: Where the data set stands in the config.
        kind: What they are: 'image', 'label map'.
        paths: Those that are looked for.
    """
    absent = [path for path in paths if not Path(path).is_file()]
    if not absent:
        return []
    told = f'{kind} {absent[0]} does not exist ({len(absent)} of {len(paths)} looked for){_why_absent(Path(absent[0]))}'
    return [error(key, told)]


def _why_absent(path: Path) -> str:
    """Say what is there instead of a file, as far as it explains its absence."""
    parts = path.parent.parts
    plain = Path(unquote(str(path)).replace('\\', '/'))
    said = ''
    if path.is_symlink():
        said = '; it is a link that leads nowhere'
    elif path.is_dir():
        said = '; it is a folder'
    elif len(parts) > 1 and parts[-1] == parts[-2]:
        said = f'; {parts[-1]} stands in data_prefix and again in the file names'
    elif plain != path and plain.is_file():
        said = f'; there is {plain}: file names are paths with /, and not escaped'
    elif '\\' in path.name:
        said = '; its name has backslashes, which part no folders here: write file names with /'
    elif path.name.startswith('.') and path.suffix == '':
        said = '; a name in the list is empty: a blank line in ann_file?'
    elif path.name.startswith('\ufeff'):
        said = '; the list begins with a byte order mark: save it as UTF-8 without BOM'
    elif path.with_suffix('').is_file() or (path.suffix in path.stem and ' ' in path.stem):
        said = f'; each line of ann_file is one name without {path.suffix!r}, which is put behind it'
    elif path.parent.is_dir():
        near = [other.name for other in path.parent.glob(f'{glob.escape(path.stem)}.*')][:1]
        said = f'; there is {near[0]}' if near else ''
    else:
        said = f'; the folder {path.parent} does not exist'
    return said
