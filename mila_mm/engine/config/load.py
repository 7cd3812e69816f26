"""Configs as the commands take them: a path, or ``mmdet::`` / ``mmseg::`` and a path in that package."""

import ast
import difflib
import importlib.util
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mila_mm import zoo
from mila_mm.errors import UserError, printable

SCOPES = ('mmdet', 'mmseg', 'mmpretrain')
# mmengine up to 0.10 puts this before the message of whatever a constructor raised, once per level
REGISTRY_PREFIX = re.compile(r'class `\w+` in [^:]*: ')

# Read by mmengine, mmdet, mmseg or this package at the top of a config, besides the runner's own arguments.
_EXTRA_KEYS = (
    'activation_checkpointing',
    'amp',
    'channels_last',
    'compile',
    'compile_backbone',
    'graph_backbone',
    'custom_imports',
    'efficient_conv_bn_eval',
    'load_strict',
    'mila_weights',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
)


# Entries at the top of a config of mmdet 2 or mmseg 0, with what took their place.
_OLD_KEYS = {
    'data': 'train_dataloader, val_dataloader and test_dataloader',
    'optimizer': 'optim_wrapper',
    'optimizer_config': 'optim_wrapper',
    'lr_config': 'param_scheduler',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg',
    'evaluation': 'val_evaluator and val_cfg',
    'checkpoint_config': 'default_hooks',
    'log_config': 'default_hooks',
    'dist_params': 'env_cfg',
    'fp16': 'optim_wrapper',
}


def load_config(name: str, cfg_options: Sequence[str] = (), import_custom_modules: bool = True) -> Config:
    """Read a config and apply the overrides of the command line.

    Args:
        name: Path of a config file, the name of one of this package's (:mod:`mila_mm.zoo`), or
            ``mmdet::FOLDER/FILE`` / ``mmseg::FOLDER/FILE`` for one that comes with those (``.py`` may be left out).
        cfg_options: Overrides as ``key.of.entry=value``.
        import_custom_modules: Whether to import what ``custom_imports`` names. Defaults to True.

    Returns:
        The config; its ``filename`` is the file read.

    Raises:
        UserError: If the file or one of its bases does not exist or cannot be read, or an
            override does not fit.
    """
    path = resolve_config(name)
    try:
        cfg = Config.fromfile(path, import_custom_modules=import_custom_modules)
    except FileNotFoundError as error:
        raise UserError(f'config {name} builds on a file that does not exist: {one_line(error)}') from error
    except Exception as error:  # a config is a program of the user's: whatever it raises is an error in it
        raise UserError(f'config {name} cannot be read: {type(error).__name__}: {one_line(error)}') from error
    _merge_cfg_options(cfg, cfg_options)
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        raise UserError(f"config {name} has no model with a 'type': it is a fragment for _base_, or not a config")
    return cfg


def resolve_config(name: str) -> Path:
    """Find the file that a config's name stands for.

    Returns:
        Path of an existing file.

    Raises:
        UserError: If there is none.
    """
    if '::' not in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        own = zoo.find_config(name)
        if own is not None:
            return own
        what = 'is a folder' if path.is_dir() else 'does not exist'
        hint = _did_you_mean(path) or zoo.did_you_mean(path.name)
        raise UserError(f'config {name} {what} (looked in {Path.cwd()}){hint}')
    if name.startswith(zoo.SCHEME):
        return zoo.require_config(name)
    scope, _, inner = name.partition('::')
    if scope not in SCOPES:
        raise UserError(f'config {name}: unknown package {scope!r}, expected one of mila_mm, {", ".join(SCOPES)}')
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise UserError(f'config {name} needs the package {scope}, which is not installed: {_install_hint()}')
    root = Path(spec.origin).parent / '.mim' / 'configs'
    path = root / (inner if inner.endswith('.py') else f'{inner}.py')
    if not path.is_file():
        raise UserError(f'config {name} does not exist (looked for {path}){_did_you_mean(path, root)}')
    return path


def parse_cfg_options(items: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` strings by mmengine's rules.

    Returns:
        Dotted key to value.

    Raises:
        UserError: If an item is not of the form ``key=value`` or its brackets do not match.
    """
    options: dict[str, Any] = {}
    parser = ArgumentParser()
    parser.add_argument('--item', nargs=1, action=DictAction)
    for item in items:
        key, sign, value = item.partition('=')
        if not sign or not key.strip():
            raise UserError(f'--cfg-options: expected KEY=VALUE, got {item!r} (CONFIG goes before --cfg-options)')
        if value.count('(') != value.count(')') or value.count('[') != value.count(']'):
            raise UserError(f'--cfg-options: the brackets in {item!r} do not match (quote the value, no spaces in it)')
        if 'dict(' in value or '{' in value:
            options[key] = _literal(item, value)
            continue
        try:
            options.update(parser.parse_args([f'--item={item}']).item)
        except (AssertionError, RecursionError) as error:  # what mmengine makes of brackets that it does not expect
            raise UserError(f'--cfg-options: the value in {item!r} cannot be read') from error
    return options


def _literal(item: str, value: str) -> Any:
    """Read a value with dicts in it, written as in a config, which mmengine's rules do not know; nothing is run."""

    def read(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
            return {str(keyword.arg): read(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.Dict):
            return {read(key): read(entry) for key, entry in zip(node.keys, node.values, strict=True) if key}
        if isinstance(node, (ast.List, ast.Tuple)):
            entries = [read(entry) for entry in node.elts]
            return entries if isinstance(node, ast.List) else tuple(entries)
        return ast.literal_eval(node)

    try:
        return read(ast.parse(value, mode='eval').body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f'--cfg-options: the value in {item!r} cannot be read: expected it as in a config, all of it in quotes: '
            'key="[dict(type=\'StepLR\',step_size=2)]"'
        ) from error


def _merge_cfg_options(cfg: Config, items: Sequence[str]) -> None:
    """Apply overrides to a config in place.

    A first part of a key that neither the config nor the runner knows is refused: it would
    be merged and never be read.

    Raises:
        UserError: If an override does not parse or does not fit the config.
    """
    for key, value in parse_cfg_options(items).items():
        top = key.partition('.')[0]
        if top not in cfg and top not in _known_keys(cfg):
            close = difflib.get_close_matches(top, _known_keys(cfg), n=1)
            raise UserError(
                f'--cfg-options {key}={value}: nothing reads an entry {top!r} of this config'
                + (f'; did you mean {close[0]!r}?' if close else '')
            )
        try:
            cfg.merge_from_dict({key: value})
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(f'--cfg-options {key}={value} does not fit the config: {one_line(error)}') from error


def refuse_old(cfg: Config) -> None:
    """Refuse a config of mmdet 2 or mmseg 0, whose entries nothing reads any more.

    Raises:
        UserError: If it is one, with the successors of its entries.
    """
    old = [key for key in _OLD_KEYS if key in cfg]
    if not old or 'train_dataloader' in cfg or 'test_dataloader' in cfg:
        return
    shown = ', '.join(old[:4]) + (f' and {len(old) - 4} more' if len(old) > 4 else '')
    raise UserError(
        f'config {cfg.filename}: it is of mmdet 2 or mmseg 0 ({shown}), which mmengine does not read: '
        + '; '.join(f'{key} is now {_OLD_KEYS[key]}' for key in old[:3])
        + "\nStart from a config of today (_base_ = 'mmdet::...') and carry the data set over: docs/custom_data.md"
    )


def scope_of(cfg: Config) -> str:
    """Tell which library a config is for.

    Returns:
        'mmdet', 'mmseg' or 'mmpretrain'.

    Raises:
        UserError: If the config does not say, or the library is not installed.
    """
    prefix, dot, _ = str(cfg.model.get('type')).partition('.')
    named = [cfg.get('default_scope'), prefix if dot else None, cfg.model.get('_scope_')]
    scope = next((name for name in named if name in SCOPES), None)
    if scope is None:
        refuse_old(cfg)
        raise UserError(
            'is the config a detector, a segmentor or a classifier? '
            f'Its default_scope is {cfg.get("default_scope")!r}\n'
            "Set default_scope='mmdet', default_scope='mmseg' or default_scope='mmpretrain' in it."
        )
    if importlib.util.find_spec(scope) is None:
        raise UserError(f'the config needs the package {scope}, which is not installed: {_install_hint()}')
    return scope


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of an exception on one line, without control characters.

    Args:
        limit: Length after which it is cut. Defaults to 300.

    Returns:
        The message; the type's name where the message is empty.
    """
    # str(KeyError('x')) carries quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = ' '.join(text.split()) or type(error).__name__
    text = printable(text, len(text))
    return text if len(text) <= limit else text[: limit - 3] + '...'


def _install_hint() -> str:
    """Return how to install what is missing."""
    return 'pip install -r requirements.txt'


def _known_keys(cfg: Config) -> set[str]:
    from mmengine.runner import Runner  # and torch, a second's work that most overrides do without

    arguments = inspect.signature(Runner.__init__).parameters
    return set(cfg.keys()) | (set(arguments) - {'self', 'cfg'}) | set(_EXTRA_KEYS)


def _did_you_mean(path: Path, root: Path | None = None) -> str:
    """Return '; did you mean X?' for a file with a name like it beside it, else ''."""
    if not path.parent.is_dir():
        return ''
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix in ('.py', '.yml', '.yaml', '.json')]
    close = difflib.get_close_matches(path.name, names, n=1)
    if not close:
        return ''
    suggestion = path.parent / close[0]
    return f'; did you mean {suggestion.relative_to(root) if root else suggestion}?'
