#!/usr/bin/env python
"""Train, test and draw a small model on the embedded shapes set: ``mila demo`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.demo import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
