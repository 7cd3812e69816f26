#!/usr/bin/env python
"""Test a detector or segmentor: ``mila test`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.test import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
