"""`python -m modeling_vikdf`: the command `vikdf`, where its script is not on the path."""

from vikdf_cli import main


main()
