"""``python -m r2kit`` is the command ``r2kit``."""

from r2kit.cli import main

main()
