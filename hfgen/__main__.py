"""`python -m hfgen` is the `hfgen` command."""

from hfgen.cli import main

main()
