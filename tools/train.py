#!/usr/bin/env python
"""Train a detector or segmentor: ``mila train`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.train import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
