"""Benchmarks, for batch jobs: python tools/benchmark.py attention --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from tools.throughput.command import main

if __name__ == "__main__":
    sys.exit(main())
