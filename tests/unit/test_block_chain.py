"""Blocks that are run one by one: which are found, how often they run, and that the moments are the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import compress_model
from pquant_lightning.core.block_chain import BlockInputs, find_chain
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.moments import MomentSource, collect_moments

BOUND = 9_000  # two moments of 32 x 32, or the inputs of one block


class Block(nn.Module):
    """A residual block that takes a mask by keyword and returns a tuple, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        update = self.down(F.relu(self.up(hidden)))
        return hidden + (update if mask is None else update * mask), None


class Blocks(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, mask = self.stem(x), (x[:, :1] > 0).float()
        for block in self.blocks:
            hidden, _ = block(hidden, mask=mask)
        return self.head(hidden)


class Crossed(Blocks):
    """The third block also reads what the first one returns."""

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.blocks[0](self.stem(x))
        second, _ = self.blocks[1](first)
        third, _ = self.blocks[2](second + first)
        return self.head(third)


class Conditioned(Blocks):
    """The first block's output is a second input of the last."""

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.blocks[0](self.stem(x))
        second, _ = self.blocks[1](first)
        return self.head(self.blocks[2](second, mask=first)[0])


def samples(*shape: int, batches: int = 3) -> Samples:
    return Samples.take([torch.randn(4, *shape) for _ in range(batches)], 4 * batches)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def calls_of(modules: dict[str, nn.Module]) -> dict[str, int]:
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            counts[name] += 1

        return hook

    for name, module in modules.items():
        module.register_forward_pre_hook(count(name))
    return counts


def test_each_block_runs_a_fixed_number_of_times() -> None:
    model, data = Blocks(6), samples(8)
    counts = calls_of({"model": model, **{f"blocks.{i}": block for i, block in enumerate(model.blocks)}})
    source = MomentSource(model, linears(model), data, BOUND)
    assert source.blocks == tuple(f"blocks.{i}" for i in range(6))
    for name in linears(model):
        assert source.get(name) is not None
    batches = len(data.batches)
    assert counts["model"] == 1 + batches + 2 * batches  # found, captured, and a pass each for the stem and the head
    # of those the block has its share; for itself it runs to collect and to advance
    assert {counts[f"blocks.{i}"] - counts["model"] for i in range(5)} == {2 * batches}
    assert source.passes == 3


def test_the_moments_are_those_of_the_whole_model() -> None:
    model, data = Blocks(), samples(8)
    whole = collect_moments(model, linears(model), data)
    source = MomentSource(model, linears(model), data, BOUND)
    assert len(source.blocks) == 4
    for name in (*linears(model), "blocks.1.up"):  # the last one starts again
        assert torch.equal(source.get(name).second, whole[name].second)


def test_a_later_block_sees_the_blocks_before_as_they_are_then() -> None:
    model, data = Blocks(), samples(8)
    source = MomentSource(model, linears(model), data, BOUND)
    before = source.get("blocks.0.up").second.clone()
    with torch.no_grad():
        model.blocks[0].down.weight.mul_(3.0)
    changed = collect_moments(model, ["blocks.1.up"], data)["blocks.1.up"]
    assert torch.equal(source.get("blocks.1.up").second, changed.second)
    assert not torch.equal(before, changed.second)


@pytest.mark.parametrize("model", [Crossed(3), Conditioned(3), nn.Sequential(Block())], ids=lambda m: type(m).__name__)
def test_what_is_no_chain(model: nn.Module) -> None:
    data = samples(32) if isinstance(model, nn.Sequential) else samples(8)
    assert find_chain(model, linears(model), data) == ()


def test_inputs_that_do_not_fit_are_not_held(package_log: pytest.LogCaptureFixture) -> None:
    model, data = Blocks(), samples(8)
    inputs = BlockInputs(model, find_chain(model, linears(model), data), data, max_bytes=1_000)
    assert not inputs.fits
    source = MomentSource(model, linears(model), data, 1_000)
    assert source.blocks == ()
    assert len(source.parts) == len(linears(model))
    assert "The inputs of the blocks take more than 1,000 bytes" in package_log.text


def test_stock_encoder_layers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    data = samples(5, 32)
    names = [name for name in linears(model) if "out_proj" not in name]
    whole = collect_moments(model, names, data)
    source = MomentSource(model, names, data, 20_000)
    assert source.blocks == ("layers.0", "layers.1", "layers.2")
    for name in names:
        torch.testing.assert_close(source.get(name).second, whole[name].second)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_blocks_of_transformers(family: str) -> None:
    """With masks, rotary embeddings, and a cache of keys that each block writes into."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = {
        "bert": lambda: transformers.BertConfig(vocab_size=50, **sizes),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=16),
        "llama": lambda: transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes),
    }[family]()
    model = transformers.AutoModel.from_config(config).eval()
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[:2, 5:] = 0
    batches = [{"input_ids": torch.randint(50, (4, 7)), "attention_mask": mask} for _ in range(2)]
    data = Samples.take(batches, 8)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
    if family == "gpt2":  # transformers' Conv1D
        names = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    whole = collect_moments(model, names, data)
    source = MomentSource(model, names, data, 40_000)
    assert len(source.blocks) == 3
    for name in names:
        torch.testing.assert_close(source.get(name).second, whole[name].second)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_block_by_block_gives_what_one_pass_gives(rounding: str, package_log: Any) -> None:
    model, batches = Blocks(), [torch.randn(16, 8) for _ in range(4)]
    options = {"bits": 3, "scheme": "weight_only", "group_size": 8, "rounding": rounding, "train_loader": batches}
    once = compress_model(model, "ptq", num_samples=64, **options)
    assert "block by block" not in package_log.text
    bounded = compress_model(model, "ptq", num_samples=64, max_statistics_bytes=17_000, **options)
    assert "do not fit into 17,000 bytes: they are measured in 4 blocks" in package_log.text
    if rounding == "gptq":
        assert torch.equal(once(batches[0]), bounded(batches[0]))
    else:  # which learns layers of equal shape together, and rounding errors decide between codes that are as good
        nearest = compress_model(model, "ptq", num_samples=64, **{**options, "rounding": "nearest"})
        x = torch.cat(batches)
        errors = [float((small(x) - model(x)).norm().detach()) for small in (once, bounded, nearest)]
        assert max(errors[:2]) < 0.9 * errors[2]


def test_low_rank_fits_block_by_block(package_log: Any) -> None:
    model, batches = Blocks(), [torch.randn(16, 8) for _ in range(4)]
    options = {"rank": 6, "train_loader": batches, "num_samples": 64}
    small = compress_model(model, "low_rank", max_statistics_bytes=17_000, **options)
    assert "block by block in 4 blocks" in package_log.text
    plain = compress_model(model, "low_rank", rank=6)
    x = torch.randn(256, 8)
    error, plain_error = ((m(x) - model(x)).norm() for m in (small, plain))
    assert error < plain_error
