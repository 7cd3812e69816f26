#!/usr/bin/env python
"""List, fetch, verify, inspect, export and strip weights: ``mila weights`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.weights import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
