#!/usr/bin/env python
"""What safe, strict loading costs over a bare ``torch.load(weights_only=True)`` of the same file.

Makes MILA-T's published layout once (the values do not matter), puts it into a cache of its own, and times in turn, so
that a busy machine slows all alike:

- bare: ``torch.load(path, weights_only=True, map_location='cpu')``
- read: ``read_checkpoint('mila://tiny-in1k')``, the cached file looked up, screened, read and renamed
- load: the same into a model, with matching, NaN check and report, against bare + ``load_state_dict``

    python -m benchmarks.weights_load --out benchmarks/results/weights_load.json
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 1.3


def make_file(folder: Path) -> Path:
    """Write a tiny classifier in the published layout into a cache.

    Args:
        folder: The cache.
    """
    import torch

    from mila_mm.models import MILA
    from mila_mm.weights.names import rope_tables

    torch.manual_seed(0)
    weights = {name: value for name, value in MILA('tiny').state_dict().items() if not name.startswith('norm')}
    weights.update(
        {
            'norm.weight': torch.ones(512),
            'norm.bias': torch.zeros(512),
            'head.weight': torch.randn(1000, 512),
            'head.bias': torch.zeros(1000),
        }
    )
    weights.update(rope_tables(weights, '', 224))
    path = folder / 'mila-tiny-in1k.pth'
    torch.save({'model': weights, 'epoch': 299}, path)
    return path


def seconds(function: Callable[[], object]) -> float:
    """Time one call.

    Args:
        function: What to call.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, object]:
    """Time all in turn.

    Args:
        repeats: Rounds, after two that do not count.

    Returns:
        Medians in milliseconds, and quartiles of the ratio within each round.
    """
    import torch

    from benchmarks.backbone_cpu import machine
    from mila_mm.models import MILA
    from mila_mm.weights import load_backbone, read_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        os.environ['MILA_HOME'] = folder
        path, name = make_file(Path(folder)), 'mila://tiny-in1k'
        model = MILA('tiny')

        def bare() -> dict:
            return torch.load(path, weights_only=True, map_location='cpu')

        runs = {
            'bare': bare,
            'read': lambda: read_checkpoint(name),
            'bare_into_model': lambda: model.load_state_dict(bare()['model'], strict=False),
            'load': lambda: load_backbone(model, name),
        }
        times = {label: [] for label in runs}
        for turn in range(repeats + 2):
            for label, run in runs.items():
                elapsed = seconds(run)
                if turn >= 2:
                    times[label].append(elapsed)
        size = path.stat().st_size
    result: dict[str, object] = {'machine': machine(), 'file_bytes': size, 'rounds': repeats}
    result['median_ms'] = {label: round(statistics.median(values) * 1e3, 2) for label, values in times.items()}
    for label, base in (('read', 'bare'), ('load', 'bare_into_model')):
        ratios = [ours / theirs for ours, theirs in zip(times[label], times[base], strict=True)]
        result[f'{label}_over_{base}'] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return result


def main() -> int:
    """Measure, print, write.

    Returns:
        0 if reading stays within the limit, else 1.
    """
    import logging

    import torch
    from mmengine.logging import MMLogger

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=31, help='rounds [31]')
    parser.add_argument(
        '--threads',
        type=int,
        default=1,
        help="torch's threads [1]: barriers between threads would be most of what is timed on a busy machine",
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    result = measure(args.repeats)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')
    within = result['read_over_bare'][1] <= LIMIT and result['load_over_bare_into_model'][1] <= LIMIT
    print(f'median ratios {"within" if within else "ABOVE"} {LIMIT}')
    return 0 if within else 1


if __name__ == '__main__':
    raise SystemExit(main())
