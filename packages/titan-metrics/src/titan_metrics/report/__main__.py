"""`python -m titan_metrics.report` is `titan-report`."""

import sys

from titan_metrics.report.cli import main

sys.exit(main())
