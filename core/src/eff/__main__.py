"""`python -m eff`."""

from eff.cli import main

main()
