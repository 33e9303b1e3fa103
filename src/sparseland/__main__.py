"""``python -m sparseland``: the command line."""

import sys

from sparseland.cli import main

sys.exit(main())
