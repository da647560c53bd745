"""`python -m vikdf_cli`: the command `vikdf`."""

from . import main


main()
