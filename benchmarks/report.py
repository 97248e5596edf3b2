"""Regenerates the tables of README.md; from the root: ``python benchmarks/report.py [--check]``."""

import sys

from llmfast.bench.report import main

if __name__ == "__main__":
    sys.exit(main())
