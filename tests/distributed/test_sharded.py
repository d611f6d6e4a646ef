"""ModelParallelStrategy (FSDP2) on two processes: compression before sharding, full and sharded checkpoints."""

from pathlib import Path

import pytest
import torch

from pquant_lightning import load_compressed
from tests.distributed.launch import both_ranks
from tests.models import MLP


@pytest.mark.parametrize("arguments", [[], ["--distributed-checkpoint"]], ids=["full", "sharded"])
def test_fit_test_and_resume(tmp_path: Path, arguments: list[str]) -> None:
    zero, one = both_ranks("fit_sharded", tmp_path, *arguments)
    assert zero["kinds"]["fc1"] == "low_rank_linear"
    assert zero["kinds"]["fc1.first"] == "quant_linear"
    assert zero["resumed_kinds"] == zero["kinds"]
    assert zero["tested_equal"]
    assert zero["moved"]
    assert zero["steps"] > 0
    assert one["full"] == zero["full"]
    assert (tmp_path / "compressed.safetensors").exists()


def test_pruning_sharded_weights(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_sharded", tmp_path, "--prune")
    assert zero["tested_equal"]
    assert zero["moved"]
    assert one["full"] == zero["full"]
    weights = [value for name in ("fc1", "fc2", "head") for value in zero["full"][f"{name}.weight"]]
    assert weights.count(0.0) == round(0.8 * len(weights))


def test_channels_of_sharded_weights(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_sharded", tmp_path, "--channels")
    assert zero["tested_equal"]
    assert zero["moved"]
    assert one["full"] == zero["full"]
    rows = (
        torch.tensor(zero["full"]["fc1.weight"]).reshape(32, 16),
        torch.tensor(zero["full"]["fc2.weight"]).reshape(24, 32),
    )
    dead = [int((weight == 0).all(1).sum()) for weight in rows]
    small = load_compressed(MLP, tmp_path / "compressed.safetensors")
    assert sum(dead) == 28
    assert (small.fc1.out_features, small.fc2.out_features) == (32 - dead[0], 24 - dead[1])
