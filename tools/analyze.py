#!/usr/bin/env python
"""Test a checkpoint and show where it errs: ``mila analyze`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.analyze import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
