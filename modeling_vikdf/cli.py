"""What `vikdf` runs, under its former name, by which `accelerate launch -m` finds it."""

from vikdf_cli import main


if __name__ == "__main__":
    main()
