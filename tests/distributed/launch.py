"""Runs a script of this folder in a process of its own, with a time limit so that a hang fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(script: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.distributed.{script}", str(root), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PL_GLOBAL_SEED", None)  # of a test that ran before in this process: samplers are seeded with it
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def both_ranks(script: str, root: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the two processes have written."""
    finished = run(script, root, *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]
