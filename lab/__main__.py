"""`python -m lab`: the same as the console script `lab`."""

from lab.cli import main

main()
