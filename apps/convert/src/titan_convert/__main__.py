"""`python -m titan_convert` is `titan-convert`."""

import sys

from titan_convert.cli import main

sys.exit(main())
