"""The `pquant` command: LightningCLI with the compression callbacks at hand by short name."""

import sys
from pathlib import Path

from lightning.pytorch.cli import ArgsType, LightningCLI

from pquant_lightning.core.errors import PQuantError


def main(args: ArgsType = None) -> None:
    """Runs `pquant fit|validate|test|predict --config file.yaml`; modules of the working directory are found."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        LightningCLI(args=args, save_config_kwargs={"overwrite": True})
    except PQuantError as error:
        sys.exit(f"pquant: {error}")
