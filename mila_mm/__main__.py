"""``python -m mila_mm`` is the command ``mila``."""

import sys

from mila_mm.cli.command import main

sys.exit(main())
