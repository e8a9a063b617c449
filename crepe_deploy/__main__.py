"""`python -m crepe_deploy`: the command line."""

from .cli import main

main()
