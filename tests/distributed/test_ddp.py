"""Two processes with different seeds: one decision, equal weights and ranges, resume, errors that do not hang."""

from pathlib import Path

from pquant_lightning import load_compressed
from tests.distributed.launch import both_ranks, run
from tests.models import ConvNet


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


def test_an_error_on_rank_zero_ends_both(tmp_path: Path) -> None:
    finished = run("fit_ddp", tmp_path, "--nan")
    assert finished.returncode != 0
    assert "'head' holds NaN" in finished.stderr
