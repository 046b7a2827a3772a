"""`python -m dpgbench` is the same program as the `dpgbench` console script."""

import sys

from dpgbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
