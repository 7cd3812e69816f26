"""List, fetch, verify, inspect, gather, export and strip weights, published and other ones.

mila weights list
mila weights fetch tiny-in1k mask-rcnn-tiny-3x
mila weights verify [NAME ...]
mila weights inspect FILE
mila weights gather FOLDER OUT.pth
mila weights export FILE OUT.safetensors
mila weights strip FILE OUT.pth
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence

from mila_mm import cli
from mila_mm.errors import UserError


def list_files(_: argparse.Namespace) -> None:
    """Print the published files and which of them are here."""
    from mila_mm.weights.source.cache import cache_dir, read_record
    from mila_mm.weights.source.published import PUBLISHED

    print(f'{"name":20} {"arch":6} {"published result":32} in {cache_dir()}')
    for file in PUBLISHED.values():
        path = cache_dir() / file.filename
        record = read_record(path)
        state = '-' if not path.exists() else f'{path.stat().st_size / 1e6:.0f} MB'
        if record and path.exists():
            state += f'  sha256 {record.sha256[:12]}...'
        print(f'{file.name:20} {file.arch:6} {file.result:32} {state}')


def fetch_files(args: argparse.Namespace) -> None:
    """Fetch files by name or address."""
    from mila_mm.weights.source.cache import configure
    from mila_mm.weights.source.fetching import fetch
    from mila_mm.weights.source.published import PUBLISHED

    if args.mirror:
        configure(mirrors=args.mirror)
    for name in PUBLISHED if args.all else _required(args.names, 'fetch'):
        print(fetch(name))


def verify_files(args: argparse.Namespace) -> None:
    """Hash cached files and compare them with their records."""
    from mila_mm.weights.source.fetching import verify, wanted
    from mila_mm.weights.source.published import PUBLISHED

    present = [name for name in PUBLISHED if wanted(name).path.exists()]
    if not (args.names or present):
        print('nothing in the cache')
    failures = []
    for name in args.names or present:
        target = wanted(name)
        try:
            if not target.path.exists():
                raise UserError(f'{target.path}: not in the cache; mila weights fetch {name}')
            record = verify(target, full=True)
        except UserError as error:
            failures.append(str(error))
        else:
            print(f'{name}: ok, {record.size:,} bytes, sha256 {record.sha256} ({record.source})')
    if failures:
        raise UserError('\n'.join(failures))


def inspect_file(args: argparse.Namespace) -> None:
    """Say what is in a checkpoint, without running any of it."""
    from torch import Tensor

    from mila_mm.errors import printable
    from mila_mm.weights import names
    from mila_mm.weights.file.container import sniff
    from mila_mm.weights.file.reader import read_file
    from mila_mm.weights.load import is_finite
    from mila_mm.weights.report import listed
    from mila_mm.weights.source.fetching import local_path

    path = local_path(args.source)
    content = read_file(path)
    print(f'{path}: {path.stat().st_size:,} bytes, {sniff(path)}')
    if isinstance(content, dict):
        entries = list(content.items())[:20]
        print('entries: ' + ', '.join(f'{printable(str(key))} ({type(value).__name__})' for key, value in entries))
    state_dict, layout = names.unwrap(content, key=args.key, source=str(path))
    tensors, dropped = names.to_project(state_dict)
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}  # without _extra_state
    prefix = names.backbone_prefix(tensors)
    kinds = Counter(str(value.dtype).removeprefix('torch.') for value in tensors.values())
    print(
        f'weights: {len(tensors)} tensors under {printable(layout or "the top level")}, '
        f'{sum(value.numel() for value in tensors.values()) / 1e6:.2f} M values, '
        + ', '.join(f'{count} {kind}' for kind, count in kinds.items())
    )
    print(
        'model: '
        + (f'{names.describe(tensors, prefix)}' if prefix is not None else 'no MILA in it')
        + (f', under {prefix!r}' if prefix else '')
    )
    for reason, keys in dropped.items():
        print(f'left out when loading: {len(keys)} {reason}')
    odd = [name for name, value in tensors.items() if not is_finite(value)]
    if odd:
        print(f'warning: NaN or infinity in {len(odd)} tensors: {listed(odd, 10)}')
    if args.keys:
        for name, value in tensors.items():
            print(f'  {printable(name)} {tuple(value.shape)}')


def export_file(args: argparse.Namespace) -> None:
    """Write weights under released names or as safetensors."""
    from mila_mm.weights.exporting import export

    count = export(
        args.source, args.out, naming=args.names, layout=args.layout, image_size=args.rope, key=args.key, part=args.part
    )
    print(f'{args.out}: {count} tensors')


def strip_file(args: argparse.Namespace) -> None:
    """Write a checkpoint without optimizer, schedules and logs."""
    from mila_mm.weights.exporting import strip

    before, after = strip(args.source, args.out)
    print(f'{args.out}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB')


def gather_file(args: argparse.Namespace) -> None:
    """Write one file out of the folder that the ranks of a training have written together."""
    from pathlib import Path

    import torch

    from mila_mm.errors import printable_path
    from mila_mm.files import replacing
    from mila_mm.weights.file.sharded import is_sharded, read_whole
    from mila_mm.weights.load import disarm

    if not is_sharded(args.folder):
        raise UserError(f'gather: {printable_path(args.folder)} is no folder of shards; other checkpoints are one file')
    content = disarm(read_whole(args.folder, optimizer=args.all))
    if not args.all:
        content = {'meta': content.get('meta', {}), 'state_dict': content['state_dict']}
    with replacing(Path(args.out)) as draft:
        torch.save(content, draft)
    print(f'{args.out}: {len(content["state_dict"])} tensors' + (', optimizer and schedules' if args.all else ''))


def _required(names: Sequence[str], command: str) -> Sequence[str]:
    if not names:
        raise UserError(f'{command}: give at least one name, or --all; mila weights list shows them')
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('list', help='published files, and which are here')
    command.set_defaults(run=list_files)
    command = commands.add_parser('fetch', help='fetch files into the cache')
    command.add_argument('names', nargs='*', metavar='NAME', help='name (tiny-in1k), mila://name or https address')
    command.add_argument('--all', action='store_true', help='every published file')
    command.add_argument('--mirror', action='append', metavar='BASE', help='address or folder to try first; may repeat')
    command.set_defaults(run=fetch_files)
    command = commands.add_parser('verify', help='hash cached files and compare with what was recorded')
    command.add_argument('names', nargs='*', metavar='NAME', help='default: all that are in the cache')
    command.set_defaults(run=verify_files)
    command = commands.add_parser('inspect', help='what is in a checkpoint; runs none of it')
    command.add_argument('source', metavar='FILE', help='path, mila://name or address')
    command.add_argument('--key', help='entry that holds the weights [state_dict, model or state_dict_ema]')
    command.add_argument('--keys', action='store_true', help='list every tensor')
    command.set_defaults(run=inspect_file)
    command = commands.add_parser('strip', help='leave out optimizer, schedules and logs, to pass a model on')
    command.add_argument('source', metavar='FILE', help='checkpoint of a training')
    command.add_argument('out', metavar='OUT', help='file to write, .pth')
    command.set_defaults(run=strip_file)
    command = commands.add_parser('gather', help='one file out of a folder that the ranks of a training have written')
    command.add_argument('folder', metavar='FOLDER', help='sharded checkpoint, iter_N.pth')
    command.add_argument('out', metavar='OUT', help='file to write, .pth')
    command.add_argument('--all', action='store_true', help='with the optimizer, to continue from [weights alone]')
    command.set_defaults(run=gather_file)
    command = commands.add_parser('export', help='write for the released code, or as safetensors')
    command.add_argument('source', metavar='FILE', help='path, mila://name or address')
    command.add_argument('out', metavar='OUT', help='file to write: .pth or .safetensors')
    command.add_argument('--names', choices=['released', 'project'], default='released', help='naming [released]')
    command.add_argument('--layout', choices=['model', 'state_dict'], help='top-level key of a .pth')
    command.add_argument('--rope', type=int, metavar='SIZE', help="add the released code's RoPE tables, e.g. for 224")
    command.add_argument('--part', choices=['all', 'backbone'], default='all', help='what to write [all]')
    command.add_argument('--key', help='entry of FILE that holds the weights')
    command.set_defaults(run=export_file)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        UserError: For anything the user can mend.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    args = cli.parse(add_arguments, argv, description=__doc__, formatter_class=formatter)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger('mila_mm.weights').setLevel(logging.INFO)
    args.run(args)
