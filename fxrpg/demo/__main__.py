"""`python -m fxrpg.demo`: the same as `fxrpg demo`, for torchrun."""

import sys

from fxrpg.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
