"""Where the studies that train several models print to."""

import sys

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
