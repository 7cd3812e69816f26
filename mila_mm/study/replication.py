"""The study in small: every row of it trained on the shapes set with one budget, and what came out as a table.

A run is one row with one seed. Its result lies as JSON in a folder of its own together with what it depends on (config,
row, seed); a second call takes it from there, so that an interrupted replication goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mmengine.config import Config

from mila_mm.datasets import write_shapes
from mila_mm.engine.config.load import load_config
from mila_mm.engine.training import train
from mila_mm.errors import UserError
from mila_mm.files import write_whole
from mila_mm.version import __version__
from mila_mm.visualization.curves import read_scalars

RESULT = 'result.json'
_FINAL_LOSSES = 4
_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@dataclass(frozen=True)
class Plan:
    """What is to be trained, alike for every row.

    Attributes:
        config: Config with a ``LinearAttentionTransformer``; its entry ``shapes`` says what data.
        work_dir: Folder of the runs.
        data_root: Folder of the shapes set, written if need be; None for the config's.
        iterations: Steps of each run, None for the config's.
    """

    config: str
    work_dir: Path
    data_root: Path | None = None
    iterations: int | None = None


def run_row(plan: Plan, row: str, switches: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train one row with one seed, or take its result from an earlier call.

    Args:
        plan: What all rows share.
        switches: Arguments of the backbone that make the row.
        seed: Seed of weights, order of the images and flips.

    Returns:
        ``row``, ``seed``, ``metrics`` (per cent), ``final_loss``, ``params`` of the backbone, ``seconds``,
        ``iterations``, ``batch_size``, ``data`` (how the set was made), ``digest`` of the config, and ``machine``.

    Raises:
        UserError: If the config or the data cannot be used.
    """
    cfg = _config_of(plan, switches, seed)
    digest = hashlib.sha256(cfg.pretty_text.encode()).hexdigest()[:16]
    folder = plan.work_dir / f'{row}_seed{seed}'
    known = read_result(folder / RESULT)
    if known is not None and known['digest'] == digest:
        return known
    write_shapes(cfg.train_dataloader.dataset.data_root, **cfg.shapes)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.dump(folder / 'config.py')
    start = time.perf_counter()
    runner = train(str(folder / 'config.py'), work_dir=str(folder))
    training, validation = read_scalars(Path(runner.log_dir) / 'vis_data' / 'scalars.json')
    result = {
        'row': row,
        'seed': seed,
        'metrics': {key: float(validation[-1][key]) for key in ('mIoU', 'mAcc', 'aAcc')},
        'final_loss': mean(entry['loss'] for entry in training[-_FINAL_LOSSES:]),
        'params': sum(p.numel() for p in runner.model.backbone.parameters()),
        'seconds': round(time.perf_counter() - start, 1),
        'iterations': cfg.train_cfg.max_iters,
        'batch_size': cfg.train_dataloader.batch_size,
        'data': dict(cfg.shapes),
        'digest': digest,
        'machine': environment(),
    }
    write_whole(folder / RESULT, json.dumps(result, indent=1) + '\n')
    return result


def _config_of(plan: Plan, switches: Mapping[str, Any], seed: int) -> Config:
    """Return the complete config of one run."""
    cfg = load_config(plan.config)
    if not cfg.get('shapes') or str(cfg.model.backbone.get('type')) != 'mila_mm.LinearAttentionTransformer':
        raise UserError(
            f'config {plan.config}: expected a backbone mila_mm.LinearAttentionTransformer and an entry '
            '`shapes`, as in configs/demo/study_nano_shapes.py'
        )
    cfg.model.backbone.update(dict(switches))
    for loader in _LOADERS:
        # absolute: the dumped config lies elsewhere
        cfg[loader].dataset.data_root = str(Path(plan.data_root or cfg.data_root).absolute())
    cfg.randomness = dict(seed=seed)
    if plan.iterations is not None:
        warmup, decay = cfg.param_scheduler
        share = warmup.end / cfg.train_cfg.max_iters
        warmup.end = decay.begin = max(1, round(share * plan.iterations))
        decay.end = cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = plan.iterations
        cfg.default_hooks.checkpoint.interval = plan.iterations
    return cfg


def read_result(path: Path) -> dict[str, Any] | None:
    """Read the result of a run; None where there is none yet."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return machine, versions and date, as they go into every result."""
    import mmengine
    import mmseg

    cuda = torch.cuda.is_available()
    return {
        'device': torch.cuda.get_device_name() if cuda else _processor(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmengine': mmengine.__version__,
        'mmseg': mmseg.__version__,
        'mila_mm': __version__,
        'date': datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), 'CPU')


@dataclass(frozen=True)
class Row:
    """The runs of one row, summed up.

    Attributes:
        name: Name of the row.
        values: mIoU of each seed, per cent.
        params: Of the backbone.
        seconds: Of a run, on average.
        published: Top-1 on ImageNet-1K that the paper gives, None where it gives none.
    """

    name: str
    values: tuple[float, ...]
    params: int
    seconds: float
    published: float | None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)


def summarise(results: Sequence[Mapping[str, Any]], published: Mapping[str, float | None]) -> list[Row]:
    """Group runs by row, in the order of ``published``.

    Args:
        results: What :func:`run_row` returned, in any order.
        published: Row to the paper's top-1.

    Returns:
        One entry for each row that has been run.
    """
    rows = []
    for name, top1 in published.items():
        runs = sorted((r for r in results if r['row'] == name), key=lambda r: r['seed'])
        if runs:
            rows.append(
                Row(
                    name,
                    tuple(r['metrics']['mIoU'] for r in runs),
                    runs[0]['params'],
                    mean(r['seconds'] for r in runs),
                    top1,
                )
            )
    return rows


def noise(rows: Sequence[Row]) -> float | None:
    """Return twice the standard error of a difference of two rows, from the scatter of seeds pooled over all rows.

    None where no row has been run with more than one seed.
    """
    squares = sum((value - row.mean) ** 2 for row in rows for value in row.values)
    freedom = sum(len(row.values) - 1 for row in rows)
    if not freedom:
        return None
    per_row = len(rows) / sum(1 / len(row.values) for row in rows)  # harmonic mean of the numbers of seeds
    return 2 * (2 * squares / freedom / per_row) ** 0.5


def verdict(row: Row, baseline: Row, margin: float | None) -> str:
    """Say whether a row moved from the baseline as in the paper.

    Args:
        margin: What :func:`noise` returned.

    Returns:
        'as in the paper', 'the other way', 'within the noise', or '' where the paper has no such row.
    """
    if row.published is None or baseline.published is None or row is baseline:
        return ''
    ours, theirs = row.mean - baseline.mean, row.published - baseline.published
    if margin is not None and abs(ours) < margin:
        return 'within the noise'
    return 'as in the paper' if ours * theirs > 0 else 'the other way'


def rank_correlation(rows: Sequence[Row]) -> float:
    """Return Spearman's rank correlation of our mIoU with the published top-1 over the rows that have both."""
    both = [row for row in rows if row.published is not None]
    pairs = torch.tensor([[row.mean, row.published] for row in both], dtype=torch.float64)
    # Ties share the mean of their ranks.
    ranks = (pairs[:, None] > pairs[None]).double().sum(1) + (pairs[:, None] == pairs[None]).double().sum(1) / 2
    return float(torch.corrcoef(ranks.T)[0, 1])
