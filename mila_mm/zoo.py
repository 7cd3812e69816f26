"""The configs and the model index that come with the package, by name.

They lie in ``mila_mm/.mim``, where OpenMMLab's tools look for them: as files in an installed package, as links to the
repository's own folders in a checkout.
"""

import difflib
from pathlib import Path

from mila_mm.errors import UserError

SCHEME = 'mila_mm::'
ROOT = Path(__file__).parent / '.mim'
CONFIGS = ROOT / 'configs'
_SUFFIX = '.py'


def find_config(name: str) -> Path | None:
    """Find a config of the package.

    Args:
        name: ``mask_rcnn_mila_t_3x``, ``scale/mask_rcnn_mila_b_3x_fsdp``, or that without its folder where no other
            config is called so; with or without ``mila_mm::`` before it and ``.py`` behind it.

    Returns:
        The file in the repository or in the installed package; None where there is none.
    """
    inner = name.removeprefix(SCHEME)
    inner = inner if inner.endswith(_SUFFIX) else inner + _SUFFIX
    path = CONFIGS / inner
    if '..' in path.parts or Path(inner).is_absolute():
        return None
    if path.is_file():
        return path.resolve()
    same = [path for path in _config_files() if path.name == inner]
    return same[0].resolve() if len(same) == 1 else None


def require_config(name: str) -> Path:
    """Find a config of the package, or say which it has.

    Args:
        name: As for :func:`find_config`.

    Raises:
        UserError: If there is no config of that name.
    """
    path = find_config(name)
    if path is None:
        raise UserError(f'config {name} does not exist in mila_mm{did_you_mean(name)}')
    return path


def config_names() -> list[str]:
    """List the names of the package's configs that can be trained, without ``.py``."""
    names = (path.relative_to(CONFIGS).with_suffix('') for path in _config_files())
    return sorted(name.as_posix() for name in names if '_base_' not in name.parts)


def nearest(name: str, count: int = 3) -> list[str]:
    """List the configs whose names are nearest to a misspelt one.

    Args:
        name: What somebody asked for.
        count: At most so many.
    """
    wanted = name.removeprefix(SCHEME).removesuffix(_SUFFIX).lower()
    short = {each.rpartition('/')[2]: each for each in reversed(config_names())}
    short.update({each: each for each in config_names()})
    found = difflib.get_close_matches(wanted, list(short), n=3 * count, cutoff=0.6)
    return list(dict.fromkeys(short[each] for each in found))[:count]


def did_you_mean(name: str) -> str:
    """Return the end of an error message that lists the nearest names, empty where none is near."""
    near = nearest(name)
    return f'; did you mean {", ".join(near)}?' if near else ''


def _config_files() -> list[Path]:
    real = CONFIGS.resolve()  # rglob would not enter the link that it is in a checkout
    return [CONFIGS / path.relative_to(real) for path in sorted(real.rglob('*' + _SUFFIX))]
