"""Attention in a Trainer: taken apart where its projections change; masks of its fused weight follow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    LowRankCallback,
    MixedPrecisionCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    load_compressed,
)
from pquant_lightning.core.attention import UnfusedAttention
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import unpack_bits
from tests.integration._helpers import AtStart, assert_all_trained
from tests.models import Transformer, built, fit, quiet_trainer

FIRST = "encoder.layers.0.self_attn"


class EarlyOptimizer(Transformer):
    """Its optimizer is made in `__init__`, when the projections do not exist yet."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def _inputs() -> tuple[Tensor, ...]:
    return Transformer.inputs(seed=1)


def test_an_early_optimizer_trains_the_projections(tmp_path: Path) -> None:
    start, model = AtStart(), EarlyOptimizer()
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4, include=["*self_attn*"]), start]), model)
    assert isinstance(model.encoder.layers[0].self_attn, UnfusedAttention)
    assert_all_trained(model, start)


def test_low_rank_and_quantization_stack_inside_it_and_the_artefact_loads(tmp_path: Path) -> None:
    callbacks = [LowRankCallback(rank=4, exclude=["*out_proj"]), QATCallback(min_saving=0)]
    model: Any = fit(quiet_trainer(tmp_path, callbacks), built(Transformer))
    layers = compressed_layers(model)
    assert layers[FIRST].spec["by"] == callbacks[0].state_key
    assert (
        layers[f"{FIRST}.q_proj.first"].spec["by"] == layers[f"{FIRST}.out_proj"].spec["by"] == callbacks[1].state_key
    )
    loaded = load_compressed(Transformer, callbacks[1].artifact)
    model.eval()
    with torch.no_grad():
        for inputs in (_inputs(), _inputs()[:1]):  # with a padding mask, and without
            error = (loaded(*inputs) - model(*inputs)).norm() / model(*inputs).norm()
            assert error < 0.02


PRUNINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"schedule": "constant"},
    "cubic": {"end": 0.6},
    "layer": {"scope": "layer", "schedule": "constant"},
    "snip": {"criterion": "snip"},
    "movement": {"criterion": "movement"},
    "random": {"criterion": "random"},
    "rewind": {"rewind": 0.2},
    "2:4": {"pattern": "2:4"},
    "blocks": {"block_size": [4, 1], "schedule": "constant"},
}
QUANTIZERS: dict[str, Any] = {
    "qat": lambda: QATCallback(bits=8),
    "ptq": lambda: PTQCallback(bits=4),
    "mixed": lambda: MixedPrecisionCallback(average_bits=6.0),
}
PAIRS = [(p, "qat") for p in PRUNINGS] + [("magnitude", "ptq"), ("2:4", "mixed"), ("snip", "mixed")]


@pytest.mark.parametrize(("pruning", "quantizer"), PAIRS)
def test_a_pruned_attention_is_quantized_and_keeps_its_zeros(pruning: str, quantizer: str, tmp_path: Path) -> None:
    """The masks of its fused weight go on as those of the projections."""
    options = {"sparsity": 0.5} if pruning != "2:4" else {}
    prune = PruningCallback(**options, **PRUNINGS[pruning], min_saving=0.0)
    callbacks = [prune, QUANTIZERS[quantizer]()]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=2), built(Transformer))
    attention = model.encoder.layers[0].self_attn
    assert isinstance(attention, UnfusedAttention)
    loaded: Any = load_compressed(Transformer, callbacks[1].artifact)
    final = loaded.encoder.layers[0].self_attn
    zeros = total = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        assert final.get_submodule(name).kind == "int_linear"
        weight, rounded = attention.get_submodule(name).weight, final.get_submodule(name).weight_codes()
        assert not rounded[weight == 0].any()
        assert f"{FIRST}.{name}.weight" in prune._state["targets"]
        assert int((weight == 0).sum()) >= int((~_mask(prune, f"{FIRST}.{name}.weight", weight)).sum()) > 0
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert zeros > 0.2 * total
    assert not any("in_proj" in name for name in prune._state["targets"])


def _mask(callback: PruningCallback, name: str, weight: torch.Tensor) -> torch.Tensor:
    return unpack_bits(callback._state["masks"][name], weight.shape)


def test_a_pruned_attention_trains_with_the_masks_that_it_would_have_alone(tmp_path: Path) -> None:
    """Before the quantizer rounds, both fits are the same, in other parts."""
    prune, qat = {"sparsity": 0.5, "schedule": "constant"}, {"start": 0.99, "min_saving": 0.0}
    alone: Any = fit(quiet_trainer(tmp_path / "alone", [PruningCallback(**prune)]), built(Transformer))
    both: Any = fit(
        quiet_trainer(tmp_path / "both", [PruningCallback(**prune), QATCallback(**qat)]), built(Transformer)
    )
    attention = both.encoder.layers[0].self_attn
    parts = [attention.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")]
    fused = alone.encoder.layers[0].self_attn.in_proj_weight
    assert torch.equal(torch.cat(parts) == 0, fused == 0)
    assert 0.3 < float((fused == 0).float().mean()) < 0.7


def test_a_quantizer_that_comes_in_a_second_fit_takes_the_masks_over(tmp_path: Path) -> None:
    prune = PruningCallback(sparsity=0.5, schedule="constant")
    model: Any = fit(quiet_trainer(tmp_path / "first", [prune]), built(Transformer))
    before = model.encoder.layers[0].self_attn.in_proj_weight.detach() == 0
    fit(quiet_trainer(tmp_path / "second", [prune, QATCallback(bits=8)]), model)
    attention = model.encoder.layers[0].self_attn
    weight = torch.cat([attention.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")])
    assert (weight[before] == 0).all()
    trainer = quiet_trainer(tmp_path / "third", [prune, QATCallback(bits=8)], max_epochs=2)
    model.trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(trainer, resumed := Transformer(), ckpt_path=tmp_path / "last.ckpt")
    again = resumed.encoder.layers[0].self_attn  # type: ignore[union-attr]
    weight = torch.cat([again.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")])
    assert (weight[before] == 0).all()


def test_blocks_that_a_split_would_cut_keep_attention_whole(tmp_path: Path) -> None:
    callbacks = [
        PruningCallback(sparsity=0.5, schedule="constant", block_size=[3, 1], include=["*self_attn"]),
        QATCallback(),
    ]
    model: Any = fit(quiet_trainer(tmp_path, callbacks), built(Transformer))
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    reasons = {skip.name: skip.reason for skip in callbacks[1].report.skipped}
    assert "keeps track of its in_proj_weight" in reasons[FIRST]


def test_factors_of_projections_are_pruned_like_any_other(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4, include=["*self_attn*"])]), built(Transformer))
    callback = PruningCallback(sparsity=0.5, schedule="constant", include=["*self_attn*"], min_saving=0)
    pruned: Any = fit(quiet_trainer(tmp_path, [callback]), model)
    attention = pruned.encoder.layers[0].self_attn
    assert isinstance(attention, UnfusedAttention)
    factors = [
        attention.get_submodule(f"{name}.{half}") for name in ("q_proj", "v_proj") for half in ("first", "second")
    ]
    assert all(0.2 < float((factor.weight == 0).float().mean()) < 0.8 for factor in factors)
