"""Writing weights for others: the released code's names, or safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mila_mm.errors import UserError
from mila_mm.files import replacing
from mila_mm.weights import names
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.load import read_checkpoint
from mila_mm.weights.source.fetching import local_path

_NAMINGS = ('released', 'project')


def export(
    source: str | Path,
    target: str | Path,
    *,
    naming: str = 'released',
    layout: str | None = None,
    image_size: int | None = None,
    key: str | None = None,
    part: str = 'all',
) -> int:
    """Write weights under another naming or in another format; optimizer and logs stay behind.

    Args:
        source: A name, address or path.
        target: File to write: ``.safetensors``, or ``.pth`` / ``.pt`` for torch. It appears whole or not at all.
        naming: ``'released'`` for what the released code loads, ``'project'`` for ours.
        layout: Top-level key of a ``.pth`` under released names; see :func:`mila_mm.weights.to_released`.
        image_size: Add the released code's RoPE tables for this image size.
        key: The entry of the source that holds the weights.
        part: ``'all'``, or ``'backbone'`` to leave out heads and prefix.

    Returns:
        Number of tensors written.

    Raises:
        UserError: If the source cannot be read, an option is wrong, or the target cannot be written.
    """
    target = Path(target).expanduser()
    if naming not in _NAMINGS or part not in ('all', 'backbone'):
        raise UserError(f'export: expected naming of {_NAMINGS} and part all or backbone, got {naming!r}, {part!r}')
    if target.suffix not in ('.safetensors', '.pth', '.pt'):
        raise UserError(f'{target}: expected a name that ends in .safetensors or .pth')
    if not target.parent.is_dir():
        raise UserError(f'{target.parent}: no such folder; make it first')
    tensors: dict[str, Any] = read_checkpoint(source, key=key)['state_dict']
    if part == 'backbone':
        prefix = names.backbone_prefix(tensors)
        if prefix is None:
            raise UserError(f'{source}: no MILA backbone in it')
        tensors = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    if naming == 'released':
        content: dict[str, Any] = {**names.to_released(tensors, layout=layout, image_size=image_size)}
        tensors = next(iter(content.values()))
    else:
        content = {layout or 'state_dict': tensors}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}  # no _extra_state
    # storages of their own: views would carry the whole of what they were cut from
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    content = dict.fromkeys(content, tensors)
    _write(target, content, tensors)
    return len(tensors)


def strip(source: str | Path, target: str | Path) -> tuple[int, int]:
    """Write a checkpoint that holds the model and what it says about itself (config, classes) alone.

    Args:
        source: Checkpoint of a training. With ``--ema`` its model is the average.
        target: File to write, ``.pth`` or ``.pt``. It appears whole or not at all.

    Returns:
        Bytes of both files.

    Raises:
        UserError: If the source cannot be read or holds no ``state_dict``, or the target cannot be written.
    """
    path, target = local_path(str(source)), Path(target).expanduser()
    if target.suffix not in ('.pth', '.pt'):
        raise UserError(f'{target}: expected a name that ends in .pth')
    if target.exists() and target.resolve() == path.resolve():
        raise UserError(f'{target}: would replace the checkpoint that it is made from, which then cannot be resumed')
    content = read_file(path)
    if not isinstance(content, dict) or not isinstance(content.get('state_dict'), dict):
        raise UserError(f'{source}: holds no state_dict; mila weights inspect {source} tells what it holds')
    kept = {name: content[name] for name in ('meta', 'state_dict') if name in content}
    _write(target, kept, {})
    return path.stat().st_size, target.stat().st_size


def _write(target: Path, content: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    try:
        with replacing(target) as draft:
            if target.suffix == '.safetensors':
                save_file(tensors, draft, metadata={'format': 'pt'})
            else:
                torch.save(content, draft)
    except OSError as error:
        raise UserError(f'{target}: cannot be written ({error.strerror or error})') from error
