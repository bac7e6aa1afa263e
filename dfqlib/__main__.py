"""``python -m dfqlib``: the command line."""

import sys

from dfqlib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
