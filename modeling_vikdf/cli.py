"""The former name of `vikdf_cli`, for `accelerate launch -m modeling_vikdf.cli`."""

from vikdf_cli import main


if __name__ == "__main__":
    main()
