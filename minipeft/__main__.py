"""`python -m minipeft` is the command `minipeft`."""

import sys

from .cli import main

sys.exit(main())
