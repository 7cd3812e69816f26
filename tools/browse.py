#!/usr/bin/env python
"""Draw batches as the model sees them: ``mila browse`` from a checkout."""

import sys

from mila_mm import cli
from mila_mm.cli.browse import main

if __name__ == '__main__':
    sys.exit(cli.execute(main))
