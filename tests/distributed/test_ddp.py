"""Two processes with different seeds: one decision, equal weights and ranges, resume, errors that do not hang."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from pquant_lightning import load_compressed
from tests.distributed.launch import both_ranks, run
from tests.models import BATCH_SIZE, ConvNet


def test_ranks_end_bitwise_in_sync_and_resume(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path)
    assert zero["kinds"]
    assert "low_rank_conv" in zero["kinds"].values()
    assert "quant_linear" in zero["kinds"].values()
    assert one["kinds"] == zero["kinds"]
    assert one["digest"] == zero["digest"]
    assert (zero["counts"]["plan"], one["counts"].get("plan", 0)) == (1, 0)
    assert load_compressed(ConvNet, tmp_path / "compressed.safetensors").head.kind.startswith(("int", "low_rank"))

    again = both_ranks("fit_ddp", tmp_path, "--epochs", "2", "--ckpt", str(tmp_path / "last.ckpt"))
    assert again[0]["digest"] == again[1]["digest"] != zero["digest"]
    assert [rank["kinds"] for rank in again] == [zero["kinds"]] * 2
    assert [rank["counts"] for rank in again] == [{}, {}]


def test_calibration_sees_the_data_of_both_ranks(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path, "--calibrate")
    assert set(zero["kinds"].values()) == {"quant_conv2d", "quant_linear"}
    assert one["digest"] == zero["digest"]
    deployed = load_compressed(ConvNet, tmp_path / "compressed.safetensors")
    low, high = (float(deployed.conv1.act_grid[0] * (code - deployed.conv1.act_grid[1])) for code in (0, 255))
    pixels = [batch[0] for batch in ConvNet.loader()]
    both, halves = torch.cat(pixels), [torch.cat(pixels)[rank::2] for rank in (0, 1)]
    assert any(half.max() < both.max() for half in halves)
    assert both.min() <= low + 0.05
    assert high - 0.05 <= both.max()
    assert high - low > 0.8 * (both.max() - both.min())


def test_learned_scales_start_from_the_first_batches_of_both_ranks(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path, "--learned")
    assert set(zero["kinds"].values()) == {"quant_conv2d", "quant_linear"}
    assert one["digest"] == zero["digest"]
    scale = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["conv1.act_scale"]
    pixels = torch.cat([batch[0] for batch in ConvNet.loader()])
    order = [list(DistributedSampler(range(len(pixels)), 2, rank, seed=0)) for rank in (0, 1)]  # type: ignore[arg-type]
    first = [pixels[indices[:BATCH_SIZE]] for indices in order]
    both = torch.cat(first)
    assert all(part.max() - part.min() < 0.999 * (both.max() - both.min()) for part in first)
    assert float(scale) * 255 == pytest.approx(float(both.max() - both.min()), rel=1e-3)  # the first layer has 8 bits


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "wanda", "sparsegpt"])
def test_pruned_ranks_have_equal_masks(criterion: str, tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path, "--prune", criterion, "--epochs", "2")
    assert one["digest"] == zero["digest"]
    assert zero["zeros"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("way", ["end", "during", "reconstruct"])
def test_ranks_lose_the_same_channels(way: str, tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path, "--channels", way, "--epochs", "2")
    assert one["digest"] == zero["digest"]
    small = load_compressed(ConvNet, tmp_path / "compressed.safetensors")
    assert small.conv1.out_channels + small.conv2.out_channels < 24


def test_ranks_have_one_teacher(tmp_path: Path) -> None:
    zero, one = both_ranks("fit_ddp", tmp_path, "--distil")
    assert one["digest"] == zero["digest"]
    assert one["metrics"]["pquant/distillation_loss"] == zero["metrics"]["pquant/distillation_loss"] > 0
    teachers = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["DistillationCallback"]
    assert len(teachers["teacher"]) == 64
    again = both_ranks("fit_ddp", tmp_path, "--distil", "--epochs", "2", "--ckpt", str(tmp_path / "last.ckpt"))
    assert again[0]["digest"] == again[1]["digest"] != zero["digest"]


def test_an_error_on_rank_zero_ends_both(tmp_path: Path) -> None:
    finished = run("fit_ddp", tmp_path, "--nan")
    assert finished.returncode != 0
    assert "'head' holds NaN" in finished.stderr
