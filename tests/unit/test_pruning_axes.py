"""Along which axis each criterion ranks, for every layer type, told by what reaches what when the layer is run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pquant_lightning import UnstructuredPruning, compress_model
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CalibrationError, ModelError
from pquant_lightning.methods.pruning._layout import layout_of
from pquant_lightning.methods.pruning._second_order import sparse_gpt

ANY: dict[str, Any] = {"include": ["*"], "min_saving": 0.0}

# layer, its input, and the dimension of the channels in inputs and outputs
LAYERS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(8, 12), (30, 8), -1),
    "linear_square": (lambda: nn.Linear(8, 8), (4, 9, 8), -1),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3, padding=1), (6, 8, 7), 1),
    "conv2d": (lambda: nn.Conv2d(4, 4, (3, 2), stride=2, padding=1), (6, 4, 7, 6), 1),
    "conv2d_grouped": (lambda: nn.Conv2d(8, 6, 2, groups=2), (6, 8, 5, 4), 1),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (4, 4, 3, 4, 3), 1),
    "transposed1d": (lambda: nn.ConvTranspose1d(8, 4, 3, stride=2, padding=1), (6, 8, 7), 1),
    "transposed2d_grouped": (lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), (6, 8, 5, 4), 1),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (4, 4, 3, 4, 3), 1),
    "transformers": (lambda: Conv1D(12, 8), (30, 8), -1),
    "transformers_square": (lambda: Conv1D(8, 8), (30, 8), -1),
}
UNFIT: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "odd": (lambda: nn.Linear(7, 5), (30, 7), -1),
    "tall": (lambda: nn.Linear(1, 9), (30, 1), -1),
    "wide": (lambda: nn.Linear(9, 1), (30, 9), -1),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (6, 6, 8), 1),
    "transposed_depthwise": (lambda: nn.ConvTranspose1d(6, 6, 3, groups=6), (6, 6, 8), 1),
}


def made(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    make, shape, dim = {**LAYERS, **UNFIT}[name]
    layer = make()
    nn.init.normal_(layer.weight)
    mixing = torch.randn(shape[dim], shape[dim]) + 2 * torch.eye(shape[dim])
    x = (torch.randn(shape).movedim(dim, -1) @ mixing * torch.logspace(0, -1, shape[dim])).movedim(-1, dim)
    return layer, x.contiguous(), dim


def ends(layer: Any, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The input and the output that each weight lies between, shaped as the weight: by gradients of one layer run."""
    inputs, outputs = (torch.full(layer.weight.shape, -1) for _ in range(2))
    for channel in range(x.shape[dim]):
        one = torch.zeros_like(x).movedim(dim, 0).index_fill_(0, torch.tensor(channel), 1.0).movedim(0, dim)
        out = layer(one).movedim(dim, 0)
        for output in range(len(out)):
            (grad,) = torch.autograd.grad(out[output].sum(), layer.weight, retain_graph=True)
            inputs[grad != 0], outputs[grad != 0] = channel, output
    assert inputs.min() >= 0
    return inputs, outputs


def products(layer: Any, x: Tensor, dim: int) -> list[Tensor]:
    """Flat indices of the weights of each output at each place of the kernel, by the number of their input."""
    inputs, outputs = ends(layer, x, dim)
    place = torch.arange(layer.weight[0, 0].numel()).expand(*layer.weight.shape[:2], -1).reshape(layer.weight.shape)
    found = []
    for output in outputs.unique():
        for k in place.unique():
            flat = ((outputs == output) & (place == k)).flatten().nonzero().flatten()
            found.append(flat[inputs.flatten()[flat].argsort()])
    return found


def norms_by_single_weights(layer: Any, x: Tensor) -> Tensor:
    """What each weight contributes to the outputs where it is 1 and alone; the root of the sum of squares."""
    found, kept = torch.zeros(layer.weight.numel()), layer.weight.detach().clone()
    with torch.no_grad():
        layer.bias.zero_()
        for place in range(layer.weight.numel()):
            layer.weight.zero_().view(-1)[place] = 1.0
            found[place] = layer(x).square().sum().sqrt()
        layer.weight.copy_(kept)
    return found.view_as(layer.weight)


def pruned(layer: nn.Module, x: Tensor, **options: Any) -> Any:
    return compress_model(nn.Sequential(layer), "unstructured_pruning", train_loader=[x], **ANY, **options)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_patterns_lie_along_the_inputs_of_each_output(name: str) -> None:
    layer, x, dim = made(name)
    groups = torch.cat([flat.unflatten(0, (-1, 4)) for flat in products(layer, x, dim)])
    assert groups.unique().numel() == layer.weight.numel()
    norms = norms_by_single_weights(layer, x)
    for criterion in ("magnitude", "random", "wanda", "sparsegpt"):
        weight = pruned(layer, x, pattern="2:4", criterion=criterion).weight.detach()
        kept = weight.flatten()[groups] != 0
        assert (kept.sum(1) == 2).all(), criterion
        score = layer.weight.detach().abs() * (norms if criterion == "wanda" else 1)
        if criterion in ("magnitude", "wanda"):
            expected = torch.zeros(groups.shape).scatter_(1, score.flatten()[groups].topk(2).indices, 1.0)
            assert torch.equal(kept, expected != 0), criterion


@pytest.mark.parametrize("name", [*LAYERS, *UNFIT])
def test_wanda_ranks_the_weights_of_each_output(name: str) -> None:
    layer, x, dim = made(name)
    _, outputs = ends(layer, x, dim)
    score = layer.weight.detach().abs() * norms_by_single_weights(layer, x)
    weight = pruned(layer, x, criterion="wanda", sparsity=0.5).weight.detach()
    for output in outputs.unique():
        own, kept = score[outputs == output], weight[outputs == output] != 0
        assert int((~kept).sum()) == min(round(0.5 * own.numel()), own.numel() - 1)
        assert kept.all() or own[~kept].max() <= own[kept].min()


@pytest.mark.parametrize("name", [*LAYERS, *UNFIT])
def test_what_data_choose_loses_less_of_the_output(name: str) -> None:
    layer, x, _ = made(name)
    with torch.no_grad():
        full = layer(x)
        losses = {
            criterion: float((pruned(layer, x, criterion=criterion, sparsity=0.4, **scope)(x) - full).norm())
            for criterion, scope in (("magnitude", {"scope": "layer"}), ("sparsegpt", {}))
        }
    assert losses["sparsegpt"] <= losses["magnitude"] * 1.001


def test_a_block_of_outputs_and_inputs_in_every_layout() -> None:
    for name in ("linear", "conv2d_grouped", "transposed2d_grouped", "transformers_square"):
        layer, x, dim = made(name)
        inputs, outputs = ends(layer, x, dim)
        weight = pruned(layer, x, sparsity=0.5, block_size=(1, layer.weight[0, 0].numel() or 1), scope="layer").weight
        for place in range(0, weight.numel(), 7):  # all that lies between one input and one output goes together
            same = (inputs == inputs.flatten()[place]) & (outputs == outputs.flatten()[place])
            assert len((weight[same] == 0).unique()) == 1
        tiles = pruned(layer, x, sparsity=0.5, block_size=(3 if name != "transformers_square" else 2, 1)).weight
        assert int((tiles == 0).sum()) == tiles.numel() // 2


def test_embeddings_are_ranked_within_their_rows_and_have_no_inputs_to_weigh() -> None:
    embedding = nn.Embedding(6, 8)
    weight = pruned(embedding, torch.arange(6), pattern="2:4").weight
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    plan = UnstructuredPruning(criterion="wanda", **ANY).plan(nn.Sequential(embedding, nn.Linear(8, 8)))
    assert "wanda does not cover Embedding" in str(plan)


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_are_undone(name: str) -> None:
    layer, _, _ = made(name)
    layout, weight = layout_of(layer, layer.weight), layer.weight.detach()
    assert layout is not None
    for there, back in (("to_product", "from_product"), ("to_rows", "from_rows"), ("to_matrices", "from_matrices")):
        assert torch.equal(getattr(layout, back)(getattr(layout, there)(weight), weight.shape), weight)


# -- units, precision and what cannot be ranked ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv2d_grouped", "transposed1d"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_the_unit_of_the_inputs_does_not_count(name: str, criterion: str) -> None:
    layer, x, dim = made(name)
    x.movedim(dim, 0)[3] = 0  # an input that is always zero
    first = pruned(layer, x, criterion=criterion, sparsity=0.5).weight
    for unit in (2.0**-30, 2.0**20):
        assert torch.equal(pruned(layer, x * unit, criterion=criterion, sparsity=0.5).weight, first)


def test_silent_inputs_go_first_and_no_more_than_the_sparsity_asks_for() -> None:
    layer, x, _ = made("linear")
    x[:, 2:] = 0
    weight = pruned(layer, x, criterion="sparsegpt", sparsity=0.5).weight
    assert int((weight == 0).sum()) == 48
    assert (weight[:, :2] != 0).float().mean() > 0.9
    silent = pruned(layer, torch.zeros_like(x), criterion="sparsegpt", sparsity=0.5).weight
    by_size = pruned(layer, x, sparsity=0.5, scope="layer").weight
    torch.testing.assert_close(silent, by_size)  # nothing is known but the weights


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["linear", "conv2d_grouped", "transposed3d", "transformers"])
def test_double_precision(name: str, criterion: str) -> None:
    layer, x, _ = made(name)
    single = pruned(layer, x, criterion=criterion, sparsity=0.5).weight
    double = pruned(layer.double(), x.double(), criterion=criterion, sparsity=0.5).weight
    assert double.dtype == torch.float64
    assert ((double == 0) == (single == 0)).float().mean() > 0.97
    torch.testing.assert_close(
        double.float()[(double != 0) & (single != 0)], single[(double != 0) & (single != 0)], atol=1e-3, rtol=1e-3
    )


def test_a_hessian_that_is_not_definite_is_damped_more() -> None:
    x = torch.randn(3, 200) * 1e3 + 1e3
    weight = sparse_gpt(torch.randn(1, 4, 200), (x.T @ x)[None] - 2e3 * torch.eye(200), 0.5, None)
    assert weight.isfinite().all()
    assert int((weight == 0).sum()) == 400


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_that_are_not_finite_are_refused(criterion: str, value: float) -> None:
    layer, x, _ = made("linear")
    x[7, 3] = value
    with pytest.raises((CalibrationError, ModelError), match="'0.*NaN or infinite|NaN or infinite.*'0"):
        pruned(layer, x, criterion=criterion)


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "movement"])
def test_scores_that_are_not_finite_are_refused(criterion: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    method = UnstructuredPruning(criterion=criterion, **ANY)
    context = CompressionContext(by="test")
    method.apply(model, method.plan(model, context), context)
    context.state["scores"] = {"0.weight": torch.full((8, 8), torch.nan)}
    if criterion == "magnitude":
        model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=f"'0.weight' by criterion='{criterion}' hold NaN or infinite"):
        method.step(model, context.state, 1.0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 2)])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "sparsegpt"])
def test_no_layer_is_emptied(criterion: str, shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape)
    weight = pruned(layer, torch.randn(20, shape[0]), criterion=criterion, sparsity=0.99).weight
    assert (weight != 0).any()
    if criterion == "wanda":
        assert (weight != 0).any(1).all()  # each output keeps one


def test_layers_of_names_with_equal_letters_have_other_random_masks() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in ("fc1", "fc2")}) for _ in "12")

    small = compress_model(Two(), "unstructured_pruning", criterion="random", scope="layer", **ANY)
    masks = [layer.weight == 0 for layer in small.modules() if isinstance(layer, nn.Linear)]
    assert all(int(mask.sum()) == 128 for mask in masks)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
