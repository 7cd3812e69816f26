"""False alarms: the part of the data checks that needs no data, on every config that comes with mmdet and mmseg.

    python -m benchmarks.check_configs [--library mmdet mmseg] [--only TEXT] [--out FILE]

Whatever is an error or a warning there is printed with its config; the end is a table of counts. The published configs
are taken to be sound, so each line is either a false alarm or a fault of the library's config that the line must name.
Fragments for ``_base_`` are left out; what cannot be read is in the JSON file with the reason.
"""

import argparse
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mila_mm.errors import UserError

STAGES = ('train', 'val', 'test')
_PACKAGES = ('torch', 'onedl-mmdetection', 'mmdet', 'onedl-mmsegmentation', 'mmsegmentation')


def alarms(name: str) -> list[str]:
    """Return the errors and warnings of a config.

    Raises:
        UserError: For a fragment, or a config that cannot be read here.
    """
    from mila_mm.engine.config.load import load_config, scope_of
    from mila_mm.engine.data.splits import splits_of
    from mila_mm.engine.data.static import check_static

    cfg = load_config(name)
    scope = scope_of(cfg)
    stages = [stage for stage in STAGES if cfg.get(f'{stage}_dataloader')]
    found = check_static(cfg, stages, scope, splits_of(cfg, stages, scope))
    return [f'{finding.level}: {finding}' for finding in found if finding.level != 'note']


def sweep(libraries: Sequence[str], only: str) -> dict[str, Any]:
    """Check every config of some libraries, and print those with an alarm."""
    from mila_mm.swap.sweep.sweep import all_configs

    counts: dict[str, Counter[str]] = {}
    told: dict[str, list[str]] = {}
    unread: dict[str, str] = {}
    for library in libraries:
        count = counts[library] = Counter()
        for name in all_configs(library):
            if only not in name or '_base_/' in name:
                continue
            try:
                found = alarms(name)
            except UserError as reason:
                count['not read'] += 1
                unread[name] = str(reason)
                continue
            count['checked'] += 1
            if found:
                count['with an alarm'] += 1
                told[name] = found
                print(name, *found, sep='\n    ', flush=True)
    return {'counts': {library: dict(count) for library, count in counts.items()}, 'alarms': told, 'not read': unread}


def versions() -> dict[str, str]:
    """Return Python's version and those of the libraries that are installed."""
    found = {'python': platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Check and print, or write, the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--library', nargs='+', choices=('mmdet', 'mmseg'), default=['mmdet', 'mmseg'])
    parser.add_argument('--only', default='', metavar='TEXT', help='configs whose name holds it')
    parser.add_argument('--out', type=Path, help='JSON file for the result')
    args = parser.parse_args(argv)
    result = {'versions': versions(), **sweep(args.library, args.only)}
    print(json.dumps(result['counts']))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
