"""`python -m prunelm` is `prunelm`."""

import sys

from prunelm.cli import main

if __name__ == "__main__":
    sys.exit(main())
