"""An option that names a share of the weights keeps that share: to 2 % of them, or to one step of a rank."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pquant_lightning import CompressedLayer, CompressionMethodRegistry, CPCompression
from pquant_lightning.core.compressed_layer import weight_of

SHARES: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank": ("low_rank", {}),
    "channel": ("low_rank", {"split": "channel"}),
    "nmf": ("factorization", {"kind": "nmf"}),
    "cur": ("factorization", {"kind": "cur"}),
    "kronecker": ("factorization", {"kind": "kronecker"}),
    "monarch": ("factorization", {"kind": "monarch", "blocks": 2}),
    "sparse_low_rank": ("factorization", {"kind": "sparse_low_rank"}),
    "tensor_train": ("tensor_train", {}),
    "two_cores": ("tensor_train", {"num_cores": 2}),
    "tucker": ("tucker", {}),
    "cp": ("cp", {}),
}
LAYERS = st.one_of(
    st.builds(nn.Linear, st.integers(6, 80), st.integers(6, 80)),
    st.builds(nn.Embedding, st.integers(20, 90), st.integers(6, 24)),
    st.builds(nn.Conv2d, st.integers(6, 24), st.integers(6, 24), st.integers(2, 3)),
    st.builds(nn.Conv1d, st.just(8), st.sampled_from([8, 16]), st.just(5), groups=st.sampled_from([1, 2])),
    st.builds(nn.ConvTranspose2d, st.integers(6, 16), st.integers(6, 16), st.just(3)),
)


def kept_numbers(layer: CompressedLayer) -> int:
    """Numbers that the layer keeps of a weight, counted in its tensors; of sparse ones those that are not zero."""
    weights = {name: p for name, p in layer.named_parameters() if not name.endswith("bias")}
    return sum(layer.spec["nonzeros"] if name == "sparse.weight" else p.numel() for name, p in weights.items())


def one_step_more(spec: dict[str, Any], layer: nn.Module) -> list[CompressedLayer]:
    """The layers with one of the ranks raised by one, as far as there are such layers."""
    raised = []
    if "rank" in spec:
        raised.append({**spec, "rank": spec["rank"] + 1})
    for place in range(len(spec.get("ranks", ()))):
        ranks = list(spec["ranks"])
        ranks[place] += 1
        tucker = spec["kind"].startswith("tucker")  # ranks of inputs and outputs, at most as many as there are
        if (ranks[place] <= layer.weight.shape[1 - place]) if tucker else (0 < place < len(ranks) - 1):
            raised.append({**spec, "ranks": ranks})
    return [CompressedLayer.build(changed, layer) for changed in raised]


def check_share(name: str, layer: nn.Module, share: float) -> None:
    method, options = SHARES[name]
    chosen = {"param_ratio": share, "min_saving": 0.0, "include": ["*"]}
    plan = CompressionMethodRegistry.get(method, {**options, **chosen}).plan(nn.Sequential(layer))
    total = weight_of(layer).numel()
    if not plan.layers:  # not even the least is so small, or it does not cover the type
        reasons = ("keeps more than", "keep more than", "has no kernel", "covers Linear layers only", "no multiples of")
        assert any(reason in plan.skipped[0].reason for reason in reasons)
        return
    spec = plan.layers[0].spec
    kept = kept_numbers(CompressedLayer.build(spec, copy.deepcopy(layer)))
    assert kept <= share * total + 1e-6
    if kept < (share - 0.02) * total:
        assert all(kept_numbers(more) > share * total for more in one_step_more(spec, copy.deepcopy(layer))), spec


@pytest.mark.parametrize("name", SHARES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(layer=LAYERS, share=st.floats(0.05, 0.95))
@example(layer=nn.Linear(256, 256), share=0.5)
@example(layer=nn.Linear(61, 97), share=0.9)
def test_param_ratio_keeps_its_share(name: str, layer: nn.Module, share: float) -> None:
    torch.manual_seed(0)
    check_share(name, layer, share)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_a_budget_of_weights_is_used_up(share: float) -> None:
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ConvTranspose2d(48, 32, 3))
    for layers in (model, nn.Sequential(nn.Linear(300, 200)), nn.Sequential(nn.ConvTranspose2d(96, 64, 3))):
        options = {"budget": {"params": share}, "min_saving": 0.0, "include": ["*"]}
        method = CompressionMethodRegistry.get("low_rank", options)
        changed = {entry.name: entry.spec for entry in method.plan(layers).layers}
        weights = {name: layer for name, layer in layers.named_children() if hasattr(layer, "weight")}
        kept = sum(
            kept_numbers(CompressedLayer.build(changed[name], layer)) if name in changed else layer.weight.numel()
            for name, layer in weights.items()
        )
        total = sum(layer.weight.numel() for layer in weights.values())
        assert (share - 0.02) * total < kept <= share * total


def test_the_sparse_part_holds_as_many_weights_as_it_says() -> None:
    model = nn.Sequential(nn.Linear(49, 41))
    for share in (0.21, 0.33, 0.47):
        method = CompressionMethodRegistry.get("factorization", {"param_ratio": share})
        small = method.compress(model)[0]
        assert int((small.sparse.weight != 0).sum()) == small.spec["nonzeros"]


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 256), (48, 120), (53, 59)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_terms_of_a_linear_are_no_slower_and_better_with_more(inputs: int, outputs: int, share: float) -> None:
    layer = nn.Linear(inputs, outputs)
    small = CPCompression(param_ratio=share, min_saving=0.0).compress(nn.Sequential(layer))[0]
    assert small.macs_per_position() <= layer.weight.numel()
    few = CPCompression(param_ratio=share / 2, min_saving=0.0).compress(nn.Sequential(layer))[0]
    errors = [float((new.weight - layer.weight).norm()) for new in (few, small)]
    assert errors[1] < errors[0] < layer.weight.norm()
