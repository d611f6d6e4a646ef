"""Model compression as Lightning callbacks: fine-tune while compressing, resume, load again, deploy."""

import importlib
import logging
import multiprocessing
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is `pquant` or `python -m pquant_lightning`, which answers a question without torch."""
    if multiprocessing.parent_process() is not None:  # a worker that a command has started
        return False
    called = sys.argv[0] if sys.argv else ""
    return PurePath(called).stem == "pquant" or (called == "-m" and "pquant_lightning" in sys.orig_argv)


if TYPE_CHECKING or not _is_command():
    from pquant_lightning._public import *  # noqa: F403
    from pquant_lightning._public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Loads the public names when the first of them is asked for."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module(f"{__name__}._public")
        globals().update({"__all__": public.__all__, **{known: getattr(public, known) for known in public.__all__}})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]


# Like Lightning, show our messages even where the program sets up no logging.
_log = logging.getLogger(__name__)
if not _log.hasHandlers():
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False
