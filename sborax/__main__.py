"""`python -m sborax`: the same as the command `sborax`."""

import sys

from sborax.cli import main

if __name__ == "__main__":
    sys.exit(main())
