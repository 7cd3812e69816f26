"""mmengine's checkpoint loaders, replaced by ones that never unpickle more than data.

onedl-mmengine reads local files with a safe load that falls back to a full unpickle, and addresses
with torch.hub, which unpickles fully at once. Its ``CheckpointLoader`` is a registry of readers by
prefix, made to be extended: registering ours for every prefix is the one seam through which
``load_from``, ``--resume``, ``init_cfg=dict(type='Pretrained')``, ``init_detector`` and the
inferencers all read. ``mila_mm`` registers them as soon as mmengine's module is imported.

In all of them ``map_location`` is that of :func:`torch.load`, and ``None`` means the CPU.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mila_mm.errors import UserError
from mila_mm.weights import names
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.file.sharded import read_path
from mila_mm.weights.load import disarm, load_backbone
from mila_mm.weights.source.fetching import local_path
from mila_mm.weights.source.published import PUBLISHED, SCHEME

if TYPE_CHECKING:
    from mmengine.model import BaseModule

_OPENMMLAB = ('open-mmlab://', 'openmmlab://')
_TORCHVISION = ('modelzoo://', 'torchvision://')
_MMCLS = 'mmcls://'
_OBJECT_STORES = (r'(\S+\:)?s3://', r'(\S+\:)?petrel://')


def _prepared(content: Any, source: str) -> Any:
    """Give files with a MILA in them our names; leave all others as they are."""
    content = disarm(content)
    if not isinstance(content, dict):
        return content
    layout = next((name for name in names.LAYOUTS if isinstance(content.get(name), dict)), '')
    state_dict = content[layout] if layout else content
    if names.backbone_prefix({key: None for key in state_dict if isinstance(key, str)}) is None:
        return content
    state_dict, layout = names.unwrap(content, source=source)
    tensors, _ = names.to_project(state_dict)
    rest = {name: value for name, value in content.items() if name != layout} if layout else {}
    return {**rest, 'state_dict': tensors}


def load_from_mila(filename: str, map_location: Any = None) -> Any:
    """Read published weights by name, fetching them if need be.

    Args:
        filename: ``mila://`` and a name.

    Returns:
        The checkpoint with our names under ``state_dict``.

    Raises:
        UserError: If it is unknown, cannot be fetched or cannot be read.
    """
    return _prepared(read_file(local_path(filename), map_location), filename)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a local ``.pth`` or ``.safetensors`` file.

    Args:
        filename: Path; ``~`` is expanded.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read safely.
    """
    return _prepared(read_path(local_path(filename), map_location), filename)


def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None, progress: Any = None) -> Any:
    """Read a checkpoint from an address, fetching it once for all ranks of the machine.

    Args:
        filename: http or https address.
        model_dir: Ignored; files go to the cache.
        progress: Whether to show a progress bar; ``None`` shows it on terminals.

    Raises:
        UserError: If it cannot be fetched or read.
    """
    return _prepared(read_file(local_path(_known(filename), progress=progress), map_location), filename)


def load_from_torchvision(filename: str, map_location: Any = None) -> Any:
    """Read a model of torchvision's zoo.

    Args:
        filename: ``torchvision://`` (or ``modelzoo://``) and a name.

    Raises:
        UserError: If it is unknown, cannot be fetched or cannot be read.
    """
    return load_from_http(_place_in_zoo(filename), map_location)


def load_from_openmmlab(filename: str, map_location: Any = None) -> Any:
    """Read a model of OpenMMLab's zoo.

    Args:
        filename: ``open-mmlab://`` (or ``openmmlab://``) and a name.

    Raises:
        UserError: If it is unknown, cannot be fetched or cannot be read.
    """
    return _prepared(read_file(local_path(_place_in_zoo(filename)), map_location), filename)


def load_from_mmcls(filename: str, map_location: Any = None) -> Any:
    """Read the backbone of a model of mmpretrain's zoo.

    Args:
        filename: ``mmcls://`` and a name.

    Returns:
        The backbone's state dict, without prefix.

    Raises:
        UserError: If it is unknown, cannot be fetched or cannot be read.
    """
    content = load_from_http(_place_in_zoo(filename), map_location)
    state_dict, _ = names.unwrap(content, source=filename)
    return {
        'state_dict': {
            key.removeprefix('backbone.'): value for key, value in state_dict.items() if key.startswith('backbone.')
        }
    }


def load_from_ceph(filename: str, map_location: Any = None, backend: str = 'petrel') -> Any:
    """Read a checkpoint from an object store through mmengine's file backends.

    Args:
        filename: Address that starts with ``s3://`` or ``petrel://``, possibly after a cluster's name.

    Raises:
        CheckpointError: If it cannot be read safely.
    """
    from mmengine.fileio import get_file_backend

    with tempfile.NamedTemporaryFile(suffix=Path(filename).suffix) as file:
        file.write(get_file_backend(filename, backend_args={'backend': backend}).get(filename))
        file.flush()
        return _prepared(read_file(file.name, map_location), filename)


def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse: nothing is known of this service's files here.

    Args:
        filename: ``pavi://`` address.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f'{filename}: pavi:// is not supported; download the file and give its path')


def fetch_beforehand(filename: str) -> None:
    """Bring to this machine what a checkpoint's name stands for, if it is not here yet and can be fetched.

    Args:
        filename: As for the loaders here; paths and what lies in object stores are left alone.

    Raises:
        UserError: If it is unknown or cannot be fetched.
    """
    place = _place_in_zoo(filename) if filename.startswith((*_TORCHVISION, *_OPENMMLAB, _MMCLS)) else filename
    if place.startswith((SCHEME, 'http://', 'https://')):
        local_path(_known(place))


def _known(address: str) -> str:
    """Return the name of a published file where the address is its own: it has one place in the cache."""
    return next((file.label for file in PUBLISHED.values() if file.url == address), address)


def _place_in_zoo(filename: str) -> str:
    """Return the address, or the path, that a name of a zoo stands for."""
    from mmengine.runner import checkpoint as zoo

    scheme, _, name = filename.partition('://')
    if filename.startswith(_TORCHVISION):
        return _look_up(filename, zoo.get_torchvision_models())
    if filename.startswith(_MMCLS):
        return _look_up(filename, zoo.get_mmcls_models())
    place = _look_up(f'{scheme}://{zoo.get_deprecated_model_names().get(name, name)}', zoo.get_external_models())
    return place if place.startswith(('http://', 'https://')) else str(Path(zoo._get_mmengine_home()) / place)


def _look_up(filename: str, zoo: dict[str, str]) -> str:
    name = re.sub(r'^[\w-]+://', '', filename)
    if name not in zoo:
        raise CheckpointError(f'{filename}: no such model in that zoo ({len(zoo)} models)')
    return zoo[name]


def safe_torch_load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Take the place of mmengine's ``_safe_torch_load``, which unpickles fully what it cannot read safely.

    Args:
        file: Path, or a file that is open for reading in binary mode.
        weights_only: Ignored: nothing but weights is ever read.

    Raises:
        CheckpointError: If it cannot be read safely.
    """
    if not hasattr(file, 'read'):
        return disarm(read_file(file, map_location))
    with tempfile.NamedTemporaryFile(suffix='.pth') as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        return disarm(read_file(copy.name, map_location))


def load_url(url: str, model_dir: str | None = None, map_location: Any = None, **_: Any) -> Any:
    """Take the place of ``torch.utils.model_zoo.load_url``, which mmengine passes on, and which unpickles fully.

    Args:
        url: http or https address.
        model_dir: Ignored; files go to the cache.

    Raises:
        UserError: If it cannot be fetched or read.
    """
    return load_from_http(url, map_location, model_dir)


_LOADERS: tuple[tuple[str | tuple[str, ...], Callable[..., Any]], ...] = (
    ('', load_from_local),
    (SCHEME, load_from_mila),
    (('http://', 'https://'), load_from_http),
    (_TORCHVISION, load_from_torchvision),
    (_OPENMMLAB, load_from_openmmlab),
    (_MMCLS, load_from_mmcls),
    (_OBJECT_STORES, load_from_ceph),
    ('pavi://', load_from_pavi),
)


def register_loaders() -> None:
    """Make every checkpoint that mmengine reads in this process go through this module.

    ``import mila_mm`` sees to it; a second call changes nothing.
    """
    from mmengine.runner import checkpoint

    for prefixes, loader in _LOADERS:
        checkpoint.CheckpointLoader.register_scheme(prefixes, loader, force=True)
        setattr(checkpoint, loader.__name__, loader)  # they are called by name as well
    checkpoint._safe_torch_load = safe_torch_load
    checkpoint.load_url = load_url


_OPTIONS = frozenset({'type', 'checkpoint', 'prefix', 'strict', 'adapt_in_channels', 'key', 'map_location'})


def init_pretrained(backbone: BaseModule, base_init: Callable[[], None]) -> None:
    """Initialise a backbone as its ``init_cfg`` says, loading ``Pretrained`` weights completely or not at all.

    mmengine's own ``Pretrained`` loads what fits and prints the rest. Beyond its ``checkpoint``,
    ``prefix`` and ``map_location``, this one takes ``strict=False`` (load what fits), ``adapt_in_channels=True``
    (another number of input channels) and ``key`` (the entry of the file, e.g. ``'state_dict_ema'``).

    Args:
        backbone: A ``BaseModule``.
        base_init: Its base class's ``init_weights``, bound.

    Raises:
        UserError: If an option is unknown, or the weights cannot be had or do not fit.
    """
    original = backbone.init_cfg
    configs = [original] if isinstance(original, Mapping) else list(original or ())
    backbone.init_cfg = [_Pretrained.config(cfg) if _is_pretrained(cfg) else cfg for cfg in configs] or None
    try:
        base_init()
    finally:
        backbone.init_cfg = original


class _Pretrained:
    """Takes the place of mmengine's initialiser of that name."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    @classmethod
    def config(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what mmengine builds this initialiser from."""
        _check(options)
        return dict(type=cls, options=dict(options))

    def __call__(self, module: nn.Module) -> None:
        """Load the weights and note where they came from."""
        options = self.options
        load_backbone(
            module,
            options['checkpoint'],
            prefix=options.get('prefix'),
            strict=options.get('strict', True),
            adapt_in_channels=options.get('adapt_in_channels', False),
            key=options.get('key'),
        )
        if hasattr(module, '_params_init_info'):
            from mmengine.model import update_init_info

            update_init_info(module, init_info=f'Pretrained: load from {options["checkpoint"]}')


def _is_pretrained(cfg: Any) -> bool:
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    return kind == 'Pretrained' or getattr(kind, '__name__', '') == 'PretrainedInit'


def _check(cfg: Mapping[str, Any]) -> None:
    unknown = sorted(set(cfg) - _OPTIONS)
    if unknown:
        raise UserError(
            f'init_cfg of type Pretrained: unknown option {", ".join(unknown)}; '
            f'expected some of {", ".join(sorted(_OPTIONS))}'
        )
    if not isinstance(cfg.get('checkpoint'), str) or not cfg['checkpoint']:
        raise UserError(
            f'init_cfg of type Pretrained: expected a checkpoint, got {cfg.get("checkpoint")!r}; '
            "say checkpoint='mila://tiny-in1k' or a path"
        )
