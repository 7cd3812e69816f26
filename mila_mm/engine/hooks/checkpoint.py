"""Checkpoints that are whole or not there: written beside the old ones, then renamed."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mila_mm.engine.resumed_state import check_resumed
from mila_mm.engine.runner.own_checkpoints import (
    best_name,
    is_earlier,
    is_of_run,
    is_remote_of_run,
    new_run_id,
    origin_of,
    own_best,
    own_steps,
    run_id_of,
)
from mila_mm.engine.runner.sharded_checkpoint import ShardedSaving, remove
from mila_mm.engine.runner.sharded_model import FullyShardedModel
from mila_mm.errors import UserError
from mila_mm.files import UNFINISHED, replacing
from mila_mm.registry import HOOKS

STOPPED_TEMPLATE = 'stop_iter_{}.pth'
_STOPPED = re.compile(r'stop_iter_(\d+)\.pth')


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that at every moment, also after a crash, its name leads to the old or the new content.

    Args:
        path: The file; its folder is made if need be.

    Raises:
        UserError: If it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open('wb') as file:
            _fill(file, content)
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({len(content) / 2**20:.1f} MiB): {error.strerror}\n'
            'What was saved before is whole: make room, then continue with --resume.'
        ) from error


def _fill(file: Any, content: bytes) -> None:
    file.write(content)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed runs have left half written.

    Args:
        folder: Folder of checkpoints, in which no other run is writing; sharded checkpoints are folders in it.
    """
    for pattern in (f'.*{UNFINISHED}', f'*.pth/.*{UNFINISHED}'):
        for path in Path(folder).glob(pattern):
            remove(path)


class AtomicLocalBackend(LocalBackend):
    """mmengine's local file backend, except that binary files, as checkpoints are, are whole or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_atomically(filepath, obj)


def register_atomic_backend() -> None:
    """Let mmengine write local files through :class:`AtomicLocalBackend`.

    All of ``Runner.save_checkpoint``, the strategies' and ``publish`` end in ``save_checkpoint``, which asks
    this registry for the backend: the one seam that serves them all.
    """
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook, which never removes a checkpoint before the one that replaces it is whole.

    It also writes ``last_checkpoint`` atomically, saves when a run is stopped between two regular checkpoints,
    and notes in a checkpoint whether its validation has been done and which run wrote it. A run that continues removes
    only what carries its id; what a resumed checkpoint lists is not believed.

    Args:
        sharded: Whether the ranks of a model under ``fully_shard`` write their pieces themselves, into a folder,
            instead of gathering them on rank 0. The best checkpoint is one file in any case. Defaults to False.
        in_background: Whether training goes on while pieces are written. Defaults to False.
        **kwargs: As for :class:`mmengine.hooks.CheckpointHook`.
    """

    saved_iter: int | None = None
    _validated_iter: int | None = None
    _run_id: str | None = None
    _origins: tuple[str, ...] = ()
    _best: Mapping[str, Any] = MappingProxyType({})
    _surplus: int | None = None
    _position: dict[str, int] | None = None
    _meta: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, sharded: bool = False, in_background: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharded = sharded or in_background
        self.in_background = in_background
        self._saving = ShardedSaving()

    @property
    def run_id(self) -> str | None:
        """The run that the checkpoints are of, None before the training begins."""
        return self._run_id

    def before_train(self, runner: Runner) -> None:
        """Find out where to write, and clear away what a killed run left half written."""
        register_atomic_backend()  # also where a config with this hook is trained by other tools
        info = runner.message_hub.runtime_info
        for key in [key for key in info if key.startswith(('keep_ckpt_ids', 'best_ckpt'))]:
            del info[key]  # by which mmengine's hook would remove files
        super().before_train(runner)
        if self._is_local():
            self.out_dir = os.path.abspath(self.out_dir)  # what last_checkpoint names is found from elsewhere as well
        inherited, self._run_id = self._run_id, self._run_id or new_run_id()
        if not is_main_process():
            return
        if self._is_local():
            for folder in {str(self.out_dir), runner.work_dir}:
                remove_unfinished(folder)
            if self.max_keep_ckpts > 0:
                self._take_over_regular(runner, inherited)
        if self.save_best is not None:
            self._take_over_best(runner)

    def _take_over_regular(self, runner: Runner, run_id: str | None) -> None:
        """Find what earlier starts of this run have written, and remove what a kill left too many of."""
        folder, at = Path(self.out_dir), runner.epoch if self.by_epoch else runner.iter
        found = {origin: own_steps(folder, self.filename_tmpl, origin, at) for origin in self._origins}
        steps = sorted({step for each in found.values() for step in each})
        self.keep_ckpt_ids.extend(steps)  # which keeps as many as it may
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        for step in steps[: -self.max_keep_ckpts]:
            # of those without an id an earlier version may have been told to keep more
            if step in found.get(run_id or '', ()):
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _take_over_best(self, runner: Runner) -> None:
        """Find the best checkpoint that an earlier start of this run has written, to be removed after a better one."""
        for key_indicator in self.key_indicators:
            key = 'best_ckpt' if len(self.key_indicators) == 1 else f'best_ckpt_{key_indicator}'
            best = self._find_best(self._best.get(key), runner.work_dir)
            if best is not None:
                runner.message_hub.update_info(key, best)
                if len(self.key_indicators) == 1:
                    self.best_ckpt_path = best
                else:
                    self.best_ckpt_path_dict[key_indicator] = best

    def _find_best(self, named: Any, work_dir: str) -> str | None:
        if self._is_local():
            found = (own_best(named, [Path(self.out_dir), Path(work_dir)], origin) for origin in self._origins)
            return next((str(path) for path in found if path is not None), None)
        name = best_name(named)
        address = self.file_backend.join_path(self.out_dir, name) if name else ''
        ours = name and any(is_remote_of_run(self.file_backend, address, origin) for origin in self._origins)
        return address if ours else None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember which iteration was validated, by which run, and what it calls its best checkpoint."""
        if getattr(runner, '_resume', False):
            check_resumed(checkpoint, f'--resume: {runner._load_from}')
            self._validated_iter = checkpoint.get('validated_iter')
            self._run_id, before = run_id_of(checkpoint), checkpoint['meta'].get('origin')
            self._origins = tuple(filter(None, (origin_of(checkpoint), before if is_earlier(before) else None)))
            self._best = checkpoint['named_best']

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the position and the last validation."""
        # FlexibleRunner works the position out anew, and wrongly outside of after_train_iter and after_train_epoch
        checkpoint['meta'].update(self._meta)
        checkpoint['meta']['run_id'] = self._run_id
        # a run that mmengine or an earlier version has begun
        checkpoint['meta']['origin'] = next((origin for origin in self._origins if origin != self._run_id), None)
        checkpoint['validated_iter'] = self._validated_iter

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Finish what was written in the background, and save where it is time."""
        self._saving.poll()
        super().after_train_iter(runner, *args, **kwargs)

    def after_train(self, runner: Runner) -> None:
        """Finish what is written in the background."""
        self._saving.wait()
        super().after_train(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Save the best checkpoint."""
        self._validated_iter = runner.iter
        super().after_val_epoch(runner, metrics)

    def save_stopped(self, runner: Runner, meta: dict[str, int]) -> str:
        """Save where a run is stopped, unless a regular checkpoint has just done it.

        The checkpoint is removed once a later one is whole.

        Args:
            meta: 'epoch' and 'iter' that the run continues from.
        """
        if self.saved_iter != meta['iter'] or not self.save_optimizer:
            options = dict(self.args, save_optimizer=True, save_param_scheduler=True)
            self._write(runner, STOPPED_TEMPLATE.format(meta['iter']), meta, by_epoch=False, **options)
        self._saving.wait()
        barrier()
        return str(self.last_ckpt)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, int]) -> None:
        self._saving.wait()  # which removes what the one before has made superfluous
        self._surplus = None
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._surplus = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        # saved again for a best score: FlexibleRunner has then moved the position in meta on by one
        meta = self._position or meta
        options = dict(save_optimizer=self.save_optimizer, save_param_scheduler=self.save_param_scheduler)
        self._write(runner, self.filename_tmpl.format(step), meta, by_epoch=self.by_epoch, **options, **self.args)

    def _remove_surplus(self) -> None:
        """Remove the regular checkpoint that the last one made superfluous."""
        if self._surplus is not None:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(self._surplus)))
            self._surplus = None

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        self._position = dict(epoch=runner.epoch, iter=runner.iter)
        # bbox_mAP stands for coco/bbox_mAP, as for --early-stop; full names first, of which 'auto' takes one
        ends = Counter(key.rpartition('/')[2] for key in metrics)
        metrics = {**metrics, **{end: v for key, v in metrics.items() if ends[end := key.rpartition('/')[2]] == 1}}
        wanted = self.key_indicators if self.save_best else ()
        if lacking := [name for name in wanted if name not in (*metrics, 'auto')]:
            raise UserError(f'save_best: the validation gives no {lacking[0]!r}; it gives {", ".join(sorted(metrics))}')
        try:
            with self._removals_last():
                super()._save_best_checkpoint(runner, metrics)
        finally:
            self._position = None

    def _write(self, runner: Runner, filename: str, meta: dict[str, int], **options: Any) -> None:
        before, self.last_ckpt = self.last_ckpt, self.file_backend.join_path(self.out_dir, filename)
        again = self.saved_iter == meta['iter'] and self.last_ckpt == before
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.call_hook('gather_for_checkpoint')
        self._meta = {key: meta[key] for key in ('epoch', 'iter')}
        options.update(meta=meta, file_client_args=self.file_client_args, backend_args=self.backend_args)
        done = partial(self._after_saving, runner, meta['iter'])
        try:
            if not self.sharded or not isinstance(runner.model, FullyShardedModel):
                runner.save_checkpoint(self.out_dir, filename, **options)
                barrier()  # where every rank writes its shard, nothing older may go before all have
                if is_main_process():
                    done()
            elif again:  # for a best score: the tensors are those that are there
                self._saving.wait()
                runner.save_state(Path(self.last_ckpt), **options)
            else:
                runner.save_sharded(self._saving, Path(self.last_ckpt), done, self.in_background, **options)
        finally:
            self._meta = MappingProxyType({})
        self.saved_iter = meta['iter']

    def _after_saving(self, runner: Runner, iteration: int) -> None:
        """Remove what the checkpoint that is whole now makes superfluous; called on rank 0."""
        write_atomically(Path(runner.work_dir) / 'last_checkpoint', str(self.last_ckpt).encode())
        self._remove_stopped(iteration)
        self._remove_surplus()

    def _remove_stopped(self, iteration: int) -> None:
        """Remove what earlier stops have saved, now that a later checkpoint is whole."""
        if self._is_local():
            for path in Path(self.out_dir).glob(STOPPED_TEMPLATE.format('*')):
                match = _STOPPED.fullmatch(path.name)
                # names, not paths: both lie in out_dir, which may be written as ./x, x//y or through a link
                earlier = match and int(match[1]) <= iteration and path.name != Path(self.last_ckpt).name
                if earlier and is_of_run(path, self._run_id):
                    self._remove(str(path))

    def _remove(self, path: str) -> None:
        try:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # a sharded checkpoint
                self.file_backend.rmtree(path)
        except OSError as error:  # no reason to end a run: it costs room, until somebody removes it
            print_log(f'{path} cannot be removed: {error.strerror}', logger='current', level=logging.WARNING)

    def _is_local(self) -> bool:
        return isinstance(self.file_backend, LocalBackend)

    @contextmanager
    def _removals_last(self) -> Iterator[None]:
        """Put off the removals that mmengine's code asks for until it has also written."""
        backend = self.file_backend
        self.file_backend = _PutOff(backend)
        try:
            yield
        finally:
            put_off, self.file_backend = self.file_backend.put_off, backend
        kept = [self.last_ckpt, getattr(self, 'best_ckpt_path', None)]
        kept += getattr(self, 'best_ckpt_path_dict', {}).values()
        real = {os.path.realpath(path) for path in kept if path is not None}
        for path in put_off:
            if os.path.realpath(path) not in real:
                self._remove(path)


class _PutOff:
    """A file backend that notes removals instead of doing them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.put_off: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Note a file to remove."""
        self.put_off.append(path)

    rmtree = remove
