"""Strategies that train a copy of the model: refused, unless the model can take the compressed layers over."""

import json
from pathlib import Path

from tests.distributed.launch import run


def test_without_prepare_it_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    finished = run("fit_spawned", tmp_path, "--unprepared")
    assert finished.returncode != 0
    assert "Call pquant_lightning.prepare(model) before fit" in finished.stderr


def test_with_prepare_the_calling_process_has_the_compressed_model(tmp_path: Path) -> None:
    finished = run("fit_spawned", tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "main.json").read_text())
    assert found["kinds"]["fc1"] == "low_rank_linear"
    assert found["kinds"]["fc1.first"] == "quant_linear"
    assert found["difference"] < 1e-5
