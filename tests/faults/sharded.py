"""What a model in pieces computes and holds beside DDP, and what kills in its saves leave behind; for the results.

python tests/faults/sharded.py --keep      # make faults
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from results import record
from running import ROOT, say

STEPS, SAVED = 20, 10
PIECES = dict(checkpoint=dict(interval=SAVED, sharded=True))


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--keep', action='store_true', help='put what is seen into benchmarks/results/no_run_lost.json')
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests/engine/runner')]
    from kills_in_saves import kill_saves

    with TemporaryDirectory() as name, mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda code, **_: (code, True)):
        figures = compare(Path(name))
        say(f'beside DDP: {figures}')
        kill_saves(Path(name) / 'kills', args.kills)
    say(f'{args.kills} kills in saves of pieces: the end equals the undisturbed run bit for bit')
    if args.keep:
        record('fully_shard beside DDP, two processes', kind='figures', **figures)
        where = 'before, on either rank, in the index, before the rename; half of them in the background'
        record('micro model in pieces, two processes', kind='end', disturbed=f'killed {args.kills} times: {where}')


def compare(folder: Path) -> dict[str, float]:
    """Train with DDP and in pieces; continue what two ranks have saved on one, on two and on four.

    Returns:
        Greatest relative differences of losses, and shares of the bytes that a rank of DDP holds.
    """
    from jobs_on_ranks import FSDP, on_ranks, trained

    def losses(ranks: list[dict[str, Any]]) -> list[float]:
        return [sum(step) / len(ranks) for step in zip(*(rank['losses'] for rank in ranks), strict=True)]

    def difference(got: list[float], expected: list[float]) -> float:
        return max(abs(one / two - 1) for one, two in zip(got, expected, strict=True))

    ddp = on_ranks(2, folder, trained, folder / 'ddp', STEPS)
    fsdp = on_ranks(2, folder, trained, folder / 'fsdp', STEPS, FSDP, **PIECES)
    expected = losses(fsdp)
    figures: dict[str, float] = dict(steps=STEPS, losses=difference(expected, losses(ddp)))
    for what in ('parameters', 'optimizer'):
        figures[what] = max(two[what] / one[what] for one, two in zip(ddp, fsdp, strict=True))
    saved = folder / f'fsdp/iter_{SAVED}.pth'
    for count in (1, 2, 4):
        more = dict(resume=True, load_from=str(saved))
        again = on_ranks(count, folder, trained, folder / f'on{count}', STEPS, FSDP, **more)
        figures[f'resumed_on_{count}'] = difference(losses(again), expected[SAVED:])
    return figures


if __name__ == '__main__':
    main()
