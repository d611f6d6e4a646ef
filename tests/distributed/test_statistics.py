"""Two processes with half of the data each measure what one measures on all of them, layer by layer."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from pquant_lightning.core.samples import Samples
from tests.distributed.launch import ROOT
from tests.distributed.measure import SCALES, batches, measured, trained


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.distributed.measure", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


def test_statistics_of_experts_that_not_all_processes_reach(ranks: list[dict[str, Any]]) -> None:
    whole = measured(Samples((*batches(0), *batches(1)), lambda model, batch: model(batch)))
    for kind, expected in whole.items():
        assert len(flat(expected)) > 3, kind
        for rank in ranks:
            found = rank["statistics"][kind]
            if isinstance(expected, dict):
                assert sorted(found) == sorted(expected), kind
            assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-4), kind
    largest = ranks[0]["statistics"]["maximum"]
    assert all(0.4 * scale < largest[f"experts.{place}"] <= scale for place, scale in enumerate(SCALES))


def test_observers_in_training(ranks: list[dict[str, Any]]) -> None:
    expected = trained(None)
    assert len(expected) == 4
    for rank in ranks:
        assert flat(rank["trained"]) == pytest.approx(flat(expected), rel=1e-6)


def test_one_process_plans_with_the_samples_of_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["alone"] for rank in ranks] == [False, True]
