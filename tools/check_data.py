#!/usr/bin/env python
"""Check a config and all of its data: ``mila check-data`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.check_data import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
