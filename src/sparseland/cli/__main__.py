"""``python -m sparseland.cli``."""

import sys

from sparseland.cli import main

if __name__ == "__main__":
    sys.exit(main())
