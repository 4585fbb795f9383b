"""`python -m megaarch` is the `megaarch` command."""

import sys

from megaarch.cli import main

sys.exit(main())
