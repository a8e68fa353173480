"""``python -m preceptor``: the command line."""

import sys

from preceptor.cli import main

if __name__ == "__main__":
    sys.exit(main())
