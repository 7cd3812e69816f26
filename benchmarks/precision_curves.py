"""Loss curves of one training in fp32, bf16 and fp16, against what another seed changes in fp32.

    python -m benchmarks.precision_curves                          # all runs, then the plot
    python -m benchmarks.precision_curves --runs fp16-0 --steps 50 # one run: precision and seed

Trains the demo's Mask R-CNN with MILA nano on generated shapes, on a GPU where there is one, else under the CPU's
autocast, and adds each run to benchmarks/results/precision_curves.json. The plot goes to docs/images.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mila_mm  # noqa: F401 - before anything imports mmcv
from benchmarks import measure
from benchmarks.backbone_cpu import machine as cpu_machine

ROOT = Path(__file__).resolve().parent.parent

CONFIG = ROOT / 'configs/demo/mask_rcnn_mila_nano_shapes.py'
RUNS = ['fp32-0', 'bf16-0', 'fp16-0', 'fp32-1', 'fp32-2']
COLOURS = {'fp32': '#777777', 'bf16': '#2a7fb8', 'fp16': '#c8502d'}


def train(precision: str, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """Train and return the loss of every step with what tells of overflows.

    Args:
        precision: 'fp32', 'bf16' or 'fp16'.
        seed: Of weights and data.
        steps: Number of steps.
        batch: Images in a step.

    Returns:
        A row of the result.
    """
    import torch

    from mila_mm.datasets.shapes import write_shapes
    from mila_mm.engine.config.load import load_config
    from mila_mm.engine.config.prepare import prepare
    from mila_mm.engine.optimizers.amp import use_amp
    from mila_mm.engine.runner.runner import build_runner
    from mila_mm.engine.training import without_testing

    with tempfile.TemporaryDirectory() as folder:
        data = write_shapes(Path(folder) / 'shapes', num_train=400, num_val=1, size=96, seed=0)
        cfg = load_config(str(CONFIG))
        cfg.train_dataloader.update(batch_size=batch, num_workers=0, persistent_workers=False)
        cfg.train_dataloader.dataset.data_root = str(data)
        cfg.merge_from_dict(
            {
                'train_cfg.max_iters': steps,
                'randomness.seed': seed,
                'work_dir': f'{folder}/run',
                'default_hooks.checkpoint.interval': 10**9,
                'default_hooks.checkpoint.save_last': False,
                'default_hooks.logger.interval': 100,
            }
        )
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        if precision != 'fp32':
            use_amp(cfg, precision)  # and no check_precision(): fp16 on a CPU is for this comparison alone
        prepare(cfg, 'mmdet')
        runner = build_runner(without_testing(cfg))
        start = time.perf_counter()
        runner.train()
        seconds = time.perf_counter() - start
        history = {key: list(map(float, value.data[0])) for key, value in runner.message_hub.log_scalars.items()}
        finite = all(bool(p.isfinite().all()) for p in runner.model.parameters())
    losses, norms = history['train/loss'], history['train/grad_norm']
    scales = history.get('train/loss_scale', [])
    return {
        'precision': precision,
        'seed': seed,
        'steps': steps,
        'batch': batch,
        'losses': [round(x, 5) for x in losses],
        'nonfinite_losses': sum(not math.isfinite(x) for x in losses),
        'nonfinite_gradients': sum(not math.isfinite(x) for x in norms),
        'skipped_steps': sum(after < before for before, after in itertools.pairwise(scales)),
        'last_loss_scale': scales[-1] if scales else None,
        'finite_weights': finite,
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_machine()['cpu'],
        'seconds': round(seconds, 1),
        'torch': torch.__version__,
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
    }


def smooth(losses: list[float], window: int = 25) -> list[float]:
    """Mean over the steps around each."""
    half = window // 2
    around = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in around]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw all curves and, below, their distance from the mean of the fp32 runs."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    steps = min(row['steps'] for row in rows)
    curves = [(row, smooth(row['losses'][:steps])) for row in rows]
    exact = [curve for row, curve in curves if row['precision'] == 'fp32']
    centre = [sum(values) / len(values) for values in zip(*exact, strict=True)]
    figure, axes = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2))
    for row, curve in curves:
        style = dict(color=COLOURS[row['precision']], lw=1 if row['precision'] == 'fp32' else 1.8, alpha=0.9)
        axes[0].plot(curve, label=f'{row["precision"]}, seed {row["seed"]}', **style)
        axes[1].plot([a - b for a, b in zip(curve, centre, strict=True)], **style)
    axes[0].set(ylabel='loss, mean of 25 steps', title=f'Mask R-CNN, MILA nano, shapes, {rows[0]["device"]}')
    axes[0].legend()
    axes[1].set(xlabel='step', ylabel='minus the mean of fp32')
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f'wrote {path}')


def table(rows: list[dict[str, Any]]) -> str:
    """The runs as Markdown."""
    lines = [
        '| precision | seed | steps | mean loss of the last 100 | losses not finite '
        '| steps skipped by loss scaling | weights finite | where, when |',
        '| --- ' * 8 + '|',
    ]
    for row in sorted(rows, key=lambda row: (row['precision'] != 'fp32', row['precision'], row['seed'])):
        last = row['losses'][-100:]
        lines.append(
            f'| {row["precision"]} | {row["seed"]} | {row["steps"]} | {sum(last) / len(last):.3f} '
            f'| {row["nonfinite_losses"]} | {row["skipped_steps"]} '
            f'| {"yes" if row["finite_weights"] else "NO"} '
            f'| {row["device"]}, torch {row["torch"]}, {row["date"][:10]} |'
        )
    return '\n'.join(lines)


def main() -> int:
    """Train what is asked for, add it to the result and draw it. Returns 1 where something was not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', nargs='*', default=RUNS, metavar='PRECISION-SEED', help='none: draw what is there')
    parser.add_argument('--steps', type=int, default=500)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'precision_curves.json')
    parser.add_argument('--plot', type=Path, default=ROOT / 'docs/images/precision_curves.png')
    parser.add_argument('--docs', action='store_true', help='write the table of all runs into docs/scale.md')
    args = parser.parse_args()
    for name in args.runs:
        precision, _, seed = name.partition('-')
        row = train(precision, int(seed or 0), args.steps, args.batch)
        # Read again now: another process may have added its run.
        rows = json.loads(args.out.read_text())['rows'] if args.out.is_file() else []
        rows = [old for old in rows if (old['precision'], old['seed']) != (row['precision'], row['seed'])]
        measure.save(args.out, {'benchmark': 'precision_curves', 'rows': [*rows, row]})
    rows = json.loads(args.out.read_text())['rows']
    print(table(rows))
    if args.docs:
        measure.write_docs(table(rows), 'benchmarks/precision_curves.py')
    if any(row['precision'] == 'fp32' for row in rows):
        plot(rows, args.plot)
    return int(any(row['nonfinite_losses'] or not row['finite_weights'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
