"""`python -m fxrpg`: the command line."""

import sys

from fxrpg.cli import main

sys.exit(main())
