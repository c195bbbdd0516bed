"""Run the command line as ``python -m l2a``."""

from l2a.cli.app import main

main()
