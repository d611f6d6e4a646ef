"""Attention in a Trainer: taken apart where its projections change, left whole where another method counts on it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning import LowRankCallback, PruningCallback, QATCallback, load_compressed
from pquant_lightning.core.attention import UnfusedAttention
from pquant_lightning.core.compressed_layer import compressed_layers
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


def test_a_pruned_attention_keeps_its_zeros_under_quantization(tmp_path: Path) -> None:
    """Pruning remembers the fused weight by its name: it stays, in floating point, and the report says why."""
    callbacks = [PruningCallback(sparsity=0.5, schedule="constant"), QATCallback(bits=8)]
    model: Any = fit(quiet_trainer(tmp_path, callbacks), built(Transformer))
    attention = model.encoder.layers[0].self_attn
    assert type(attention) is nn.MultiheadAttention
    assert 0.3 < float((attention.in_proj_weight == 0).float().mean()) < 0.7
    assert "encoder.layers.0.linear1" in compressed_layers(model)
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
