#!/usr/bin/env python
"""Swap MILA into every config of mmdet and mmseg, and report per family: swapped, refused, failed."""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mila_mm  # noqa: F401  installs the stand-in for mmcv._ext before anything imports mmcv
from mila_mm import cli

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: Sequence[str] | None) -> cli.argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description='Swap MILA into every config that comes with mmdet and mmseg, and report.')
    parser.add_argument('--library', choices=['mmdet', 'mmseg', 'all'], default='all', help='whose configs [all]')
    parser.add_argument('--filter', default='', metavar='TEXT', help='only configs whose name contains TEXT')
    parser.add_argument('--arch', default='tiny', help='size of MILA for the swaps [tiny]')
    parser.add_argument('--workers', type=int, default=1, help='processes for the swaps [1]')
    parser.add_argument(
        '--build',
        action='store_true',
        help='also train one swapped config of each family by one step and predict, with MILA nano, on the CPU',
    )
    parser.add_argument('--limit', type=float, default=300.0, metavar='SECONDS', help='for one such step [300]')
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'benchmarks' / 'results' / 'swap_sweep.json',
        metavar='FILE',
        help='JSON to write [benchmarks/results/swap_sweep.json]',
    )
    parser.add_argument('--docs', type=Path, metavar='FILE', help='page to write, say docs/swap_results.md')
    parser.add_argument('--from', dest='source', type=Path, metavar='FILE', help='JSON to write --docs from; no sweep')
    parser.add_argument('--steps-of', type=Path, metavar='FILE', help='keep the swaps of this JSON, do the steps anew')
    parser.add_argument('--failed', action='store_true', help='of --steps-of: only the steps that failed anew')
    parser.add_argument('--step', metavar='CONFIG', help='train and predict this one, print JSON; what --build starts')
    args = parser.parse_args(argv)
    if args.failed and args.steps_of is None:
        parser.error('--failed: expected --steps-of FILE as well')
    if args.workers < 1:
        parser.error(f'--workers: expected at least 1, got {args.workers}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep as the command line says."""
    args = parse_args(argv)
    if args.step:
        _step(args.step)
        return
    if args.source is None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(_sweep(args))
        print(f'written: {args.out}')
    if args.docs is not None:
        from mila_mm.swap.sweep.docs import write_page

        write_page(args.docs, json.loads((args.source or args.out).read_text()))
        print(f'written: {args.docs}')


def _step(name: str) -> None:
    from torch import distributed

    from mila_mm.errors import UserError
    from mila_mm.swap.sweep.steps import StepFailed, train_and_predict

    # mmcv's own SyncBN asks for a process group when it is built
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        print(json.dumps(dataclasses.asdict(train_and_predict(name))))
    except StepFailed as error:
        raise UserError(str(error)) from error


def _sweep(args: cli.argparse.Namespace) -> str:
    from mila_mm.swap.sweep.sweep import Record, all_configs, representatives, step_in_process, sweep, to_json

    libraries = ['mmdet', 'mmseg'] if args.library == 'all' else [args.library]
    names = [name for library in libraries for name in all_configs(library) if args.filter in name]
    chosen: dict[str, str] = {}
    old: dict[str, Any] = {}
    if args.steps_of is not None:
        old = json.loads(args.steps_of.read_text())
        known = {entry['config']: Record(**entry) for entry in old['reasons']}
        records = [known.get(name, Record(name, 'swapped', '')) for name in names]
    else:
        records = []
        for record in sweep(names, args.arch, args.workers):
            records.append(record)
            print(f'{len(records)}/{len(names)} {record.status}: {record.config} {record.reason}', flush=True)
    steps = []
    done = {step['config']: step for step in old['steps'] if step['ok']} if args.failed else {}
    if args.build:
        chosen = representatives(records)
        for index, (family, name) in enumerate(chosen.items(), 1):
            steps.append(done.get(name) or step_in_process(Path(__file__), name, args.limit))
            outcome = 'ok' if steps[-1]['ok'] else steps[-1]['reason']
            print(f'step {index}/{len(chosen)} {family}: {name}: {outcome}', flush=True)
    return to_json(records, steps, _about(args.arch))


def _about(arch: str) -> dict[str, str]:
    from importlib.metadata import distributions

    wanted = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmcv-lite', 'mmdet', 'mmsegmentation')
    wanted += tuple(f'onedl-{name}' for name in ('mmengine', 'mmcv', 'mmdetection', 'mmsegmentation'))
    versions = {d.metadata['Name']: d.version for d in distributions() if d.metadata['Name'] in wanted}
    return {
        'arch': arch,
        'date': time.strftime('%Y-%m-%d'),
        'machine': f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}',
        'versions': ', '.join(f'{name} {versions[name]}' for name in sorted(versions)),
    }


if __name__ == '__main__':
    sys.exit(cli.execute(main))
