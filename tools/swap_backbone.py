#!/usr/bin/env python
"""Put MILA in place of the backbone of a config: ``mila swap`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.swap import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
