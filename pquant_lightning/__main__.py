"""`python -m pquant_lightning`: the same as the `pquant` command."""

from pquant_lightning.cli import main

if __name__ == "__main__":
    main()
