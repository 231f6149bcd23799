"""``python -m trmfast``: the command line without the console script."""

import sys

from trmfast.cli import main

sys.exit(main())
