"""What only looks like channels is not cut: positions, windows, caches, and numbers that are equal by chance.

Each model is pruned on one batch, and compared with itself in which the units are zero at lengths and batch sizes that
the pruning has not seen, in eval and training, and through `generate`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import StructuredPruning, finalize, load_compressed, save_compressed
from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, run_forward
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.example_sizes import other_sizes
from pquant_lightning.methods.pruning._sized import Units, as_json, decoded_lengths, take_out
from pquant_lightning.methods.pruning._widths import Widths


def pruned(model: nn.Module, batch: Any, **options: Any) -> tuple[Any, Any, Any]:
    """The model with some units zero, without them, and the plan."""
    method = StructuredPruning(**{"sparsity": 0.5, "round_to": 1, **options})
    context = CompressionContext(by="test", samples=method.samples_of([batch]))
    plan = method.checked_plan(model, context)
    masked = copy.deepcopy(model)
    method.apply(masked, plan, context)
    method.step(masked, context.state, 1.0)
    return masked, finalize(masked), plan


def assert_same(masked: nn.Module, small: nn.Module, *batches: Any) -> None:
    """Both compute the same, in eval and in training, from the same random numbers."""
    for training in (False, True):
        for batch in batches:
            found = []
            for model in (masked, small):
                torch.manual_seed(0)
                with torch.no_grad():
                    found.append(list(tensors_in(run_forward(copy.deepcopy(model).train(training), batch))))
            assert len(found[0]) == len(found[1]) > 0
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def reasons(plan: Any) -> dict[str, str]:
    return {skip.name: skip.reason for skip in plan.skipped}


# -- positions, windows, states ----------------------------------------------------------------------------------------

WIDTH = 32


class Stream(nn.Module):
    """A residual stream of tokens with a hidden layer, to which models add what looks like channels."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b, self.o = (
            nn.Linear(6, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.Linear(WIDTH, 3)
        )  # fmt: skip

    def mixed(self, h: Tensor) -> Tensor:
        return self.o(h + self.b(self.a(h).relu()))


class Positions(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, 64, WIDTH))  # a mistake does not show before these are trained

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.i(x) + self.pos[:, : x.shape[1]])


class SummedPositions(Stream):
    """Two tables that are added before the part in use is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.turn = (nn.Parameter(torch.randn(64, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.i(x) + self.a.weight.new_ones(1) * (self.pos + self.turn)[: x.shape[1]])


class ProjectedPositions(Stream):
    """A table that a layer reads before the part in use is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.p = nn.Parameter(torch.randn(64, 12)), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.i(x) + self.p(self.pos)[: x.shape[1]])


class Buffers(Stream):
    """Rotary tables for all positions in buffers."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(64)[:, None] / 10 ** torch.arange(WIDTH // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.i(x), x.shape[1]
        turned = torch.cat([-h[..., WIDTH // 2 :], h[..., : WIDTH // 2]], -1)
        return self.mixed(h * self.cos[:n] + turned * self.sin[:n])


class Mixing(Stream):
    """A causal mixture of tokens by a learned matrix for at most 64 of them (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.i(x), x.shape[1]
        return self.mixed(torch.tril(self.spatial)[:n, :n] @ h)


class Attention(Stream):
    """Heads beside numbers that equal theirs: a window of as many tokens, a kernel, a table of relative positions."""

    def __init__(self, bias: str = "none") -> None:
        super().__init__()
        self.heads, self.window, self.kernel, self.bias = 4, 4, 4, bias
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        if bias == "relative":
            self.table = nn.Parameter(torch.randn(2 * 64 - 1, self.heads))
        elif bias == "slopes":
            self.slopes = nn.Parameter(torch.rand(self.heads))
        elif bias == "buffer":
            self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, self.heads + 1))
        elif bias == "square":
            self.square = nn.Parameter(torch.randn(self.heads, 64, 64))

    def scores(self, n: int) -> Any:
        distance = torch.arange(n)[:, None] - torch.arange(n)
        if self.bias == "relative":
            return self.table[distance + 63].permute(2, 0, 1)
        if self.bias in ("slopes", "buffer"):
            return -self.slopes[:, None, None] * distance.abs()
        return self.square[:, :n, :n] if self.bias == "square" else 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        n = h.shape[1]
        q, k, v = (f(h).view(len(x), n, self.heads, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        distance = torch.arange(n)[:, None] - torch.arange(n)
        scores = q @ k.mT + self.scores(n)
        shares = scores.masked_fill(distance.abs() >= self.window, float("-inf")).softmax(-1)
        h = h + self.out((shares @ v).transpose(1, 2).flatten(2))
        return self.mixed(h.unflatten(1, (-1, 1)).squeeze(2)[:, -self.kernel :])


class WindowAttention(nn.Module):
    """Swin's: images in windows of 4 by 4 tokens, 4 heads, a bias for each pair of places in a window."""

    index: Tensor

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.shift, self.dim = 4, 4, shift, WIDTH
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, self.num_heads))
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        relative = places[:, :, None] - places[:, None] + 3
        self.register_buffer("index", relative[0] * 7 + relative[1])

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        s = self.window_size
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        parts = x.view(batch, height // s, s, width // s, s, -1).transpose(2, 3).reshape(-1, s * s, x.shape[-1])
        qkv = self.qkv(parts).view(len(parts), s * s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.relative_position_bias_table[self.index.flatten()].view(s * s, s * s, -1).permute(2, 0, 1)
        shares = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)
        y = self.proj((shares @ v).transpose(1, 2).flatten(2))
        y = y.view(batch, height // s, width // s, s, s, -1).transpose(2, 3).reshape(batch, height, width, -1)
        return torch.roll(y, (self.shift, self.shift), (1, 2))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, WIDTH, 2, 2), nn.ModuleList([WindowAttention(), WindowAttention(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).permute(0, 2, 3, 1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return self.head(h.mean((1, 2)))


class Shuffle(nn.Module):
    """Depth to space by hand, and a group norm, whose numbers equal each other."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.groups, self.c = 4, 4, 4
        self.i, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.up, self.o = nn.Conv2d(16, self.c * self.r**2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(self.i(x)).relu())
        batch, _, height, width = h.shape
        h = h.view(batch, self.c, self.r, self.r, height, width).permute(0, 1, 4, 2, 5, 3)
        return self.o(h.reshape(batch, self.c, height * self.r, width * self.r))


class State(nn.Module):
    """A recurrence written by hand, its state made from a number, a delay line of as many steps, and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.delay = 8, 8
        self.i, self.h, self.o = nn.Linear(6, self.hidden), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), self.hidden), []
        for step in range(x.shape[1]):
            state = torch.tanh(self.i(x[:, step]) + self.h(state))
            states.append(state)
        delayed = F.pad(torch.stack(states, 1), (0, 0, self.delay, 0))[:, : x.shape[1]]
        return self.o(delayed + torch.stack(states, 1))

    def generate(self, x: Tensor, steps: int = 3) -> Tensor:
        cache = x.new_zeros(len(x), self.delay + steps, 3)
        for step in range(steps):
            cache[:, self.delay + step] = self(x)[:, -1]
            x = torch.cat([x, cache[:, self.delay + step].repeat(1, 2)[:, None]], 1)
        return cache


class SizeAndWindow(nn.Module):
    """Two numbers of 8, of which one counts channels: the parameters tell that from the other by name only."""

    def __init__(self, size: int = 8, window: int = 8) -> None:
        super().__init__()
        self.size, self.window = size, window
        self.scale, self.i, self.o = nn.Parameter(torch.ones(size)), nn.Linear(6, size), nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.i(x) * self.scale)[:, -self.window :]
        return self.o(h.reshape(-1, min(x.shape[1], self.window), self.size))


class Unread(nn.Module):
    """The same, read by nothing before text is generated."""

    def __init__(self, size: int = 8, window: int = 8) -> None:
        super().__init__()
        self.size, self.window = size, window
        self.scale, self.i, self.o = nn.Parameter(torch.ones(size)), nn.Linear(6, size), nn.Linear(size, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.i(x) * self.scale)

    def generate(self, x: Tensor, max_new_tokens: int) -> Tensor:
        for _ in range(max_new_tokens):
            cache = x.new_zeros(len(x), self.window, self.size) + self.i(x[:, -1:]) * self.scale
            x = torch.cat([x, self.o(cache.mean(1, keepdim=True))], 1)
        return x


TOKENS = (5, 16, 6)  # what the pruning sees
OTHERS = ((5, 16, 6), (2, 30, 6), (1, 48, 6), (7, 3, 6))
IMAGES = (4, 3, 16, 16)
LARGER = ((4, 3, 16, 16), (1, 3, 32, 16), (3, 3, 24, 40))


@dataclass
class Case:
    """A model, what is pruned on and compared on, and shapes and numbers that are as before or are not.

    Attributes:
        make: builds it.
        kept: names of tensors and numbers that must not change.
        cut: names of those that must.
    """

    make: Callable[[], nn.Module]
    kept: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    seen: tuple[int, ...] = TOKENS
    others: tuple[tuple[int, ...], ...] = OTHERS


CASES = {
    "positions": Case(Positions, ("pos:1",), ("pos:2", "a.weight:0")),
    "summed positions": Case(SummedPositions, ("pos:0", "turn:0"), ("pos:1", "a.weight:0")),
    "projected positions": Case(ProjectedPositions, ("pos:0",), ("pos:1", "a.weight:0")),
    "buffers": Case(Buffers, ("cos:0", "cos:1", "sin:0", "i.weight:0"), ("a.weight:0",)),
    "mixing": Case(Mixing, ("spatial:0", "spatial:1"), ("a.weight:0",)),
    "heads and windows": Case(Attention, ("window", "kernel"), ("heads", "q.weight:0", "out.weight:1")),
    "relative positions": Case(lambda: Attention("relative"), ("window", "kernel", "table:0"), ("heads", "table:1")),
    "slopes": Case(lambda: Attention("slopes"), ("window", "kernel"), ("heads", "slopes:0")),
    "slopes in a buffer": Case(lambda: Attention("buffer"), ("window", "heads", "slopes:0"), ("a.weight:0",)),
    "square of positions": Case(lambda: Attention("square"), ("window", "square:1", "square:2"), ("heads", "square:0")),
    "window attention": Case(
        Windows,
        ("blocks.0.window_size", "blocks.0.relative_position_bias_table:0", "blocks.0.dim", "blocks.1.shift"),
        ("blocks.0.num_heads", "blocks.0.relative_position_bias_table:1", "blocks.0.qkv.weight:0"),
        IMAGES,
        LARGER,
    ),
    "depth to space": Case(Shuffle, ("r", "groups"), ("c", "norm.num_groups", "up.weight:0"), IMAGES, LARGER),
    "states": Case(State, ("delay",), ("hidden", "h.weight:0", "h.weight:1")),
    "size and window": Case(SizeAndWindow, ("window",), ("size", "scale:0")),
    "size and window when generating": Case(Unread, ("window",), ("size", "scale:0")),
}


def size_of(model: nn.Module, name: str) -> int:
    path, _, dim = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    value: Any = getattr(model.get_submodule(owner), attribute)
    return int(value.shape[int(dim)]) if dim else int(value)


@pytest.mark.parametrize("name", CASES)
def test_only_channels_are_cut(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make()
    masked, small, _ = pruned(model, torch.randn(case.seen))
    changed = {place: (size_of(model, place), size_of(small, place)) for place in (*case.kept, *case.cut)}
    assert {place for place, (before, now) in changed.items() if before != now} == set(case.cut), changed
    assert_same(masked, small, *map(torch.randn, case.others))
    if hasattr(small, "generate"):
        torch.testing.assert_close(small.generate(x := torch.randn(2, 4, 6), 3), masked.generate(x, 3))


def test_positions_that_are_trained_later_are_those_of_the_whole_model(tmp_path: Any) -> None:
    torch.manual_seed(0)
    masked, small, plan = pruned(model := Positions(), torch.randn(TOKENS))
    kept = [place for place in range(WIDTH) if bool(masked.i.weight[place].any())]
    with torch.no_grad():
        masked.pos[..., kept] = values = torch.randn(1, 64, len(kept))
        small.pos.copy_(values)
    assert_same(masked, small, *map(torch.randn, OTHERS))
    (reason,) = (reason for name, reason in reasons(plan).items() if name.endswith(" of pos"))
    assert reason.startswith("no layer reads them in the example")
    save_compressed(small, tmp_path / "small.safetensors")
    loaded = load_compressed(model, tmp_path / "small.safetensors")
    assert_same(small, loaded, torch.randn(2, 30, 6))


# -- numbers -----------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """The number of heads in something else than a whole number of the module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.i, self.o, self.side = kind, nn.Linear(6, 32), nn.Linear(32, 3), nn.Linear(3, 3)
        self.shape, self.sizes, self.pattern = [4, 8], {"heads": 4}, "b n (4 c) -> b n 4 c"
        self.config = type("Config", (), {"heads": 4})()

    def heads(self) -> int:
        if self.kind == "list":
            return self.shape[0]
        if self.kind == "dict":
            return self.sizes["heads"]
        return self.config.heads if self.kind == "config" else int(self.pattern.split(" ")[-2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).view(*x.shape[:-1], self.heads(), 8)
        return self.side(self.o(h.softmax(-1).flatten(-2)))


@pytest.mark.parametrize("kind", ["list", "dict", "config", "pattern"])
def test_numbers_that_cannot_be_changed_leave_the_group_alone(kind: str) -> None:
    model = nn.Sequential(Held(kind), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    masked, small, plan = pruned(model, torch.randn(2, 5, 6))
    assert small[0].i.out_features == 32
    assert small[1].out_features < 16
    (reason,) = (reason for name, reason in reasons(plan).items() if "0.i" in name)
    assert reason.startswith("without some of them the model")
    assert_same(masked, small, torch.randn(3, 9, 6))


class Either(nn.Module):
    """Two numbers, and changing either of them makes the model run and compute the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = 8, 8
        self.i, self.o, self.head = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        if h.shape[-1] not in (self.first, self.second):
            raise ValueError(f"{h.shape[-1]} channels, and {self.first} were wanted")
        return self.head(self.o(h))


def test_what_two_numbers_could_count_is_left_alone() -> None:
    _, small, plan = pruned(Either(), torch.randn(4, 6))
    assert (small.first, small.second, small.i.out_features) == (8, 8, 8)
    assert small.o.out_features < 12
    assert "it cannot be told which numbers of the model count them: first or second" in reasons(plan).values()


class Sometimes(nn.Module):
    """A number that counts channels, and is read on one of the ways through the model only."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.size, self.i, self.o = when, 8, nn.Linear(6, 8), nn.Linear(8, 6)

    def hidden(self, x: Tensor, read: bool) -> Tensor:
        h = self.i(x)
        return h.reshape(len(x), -1, self.size) if read else h

    def forward(self, x: Tensor) -> Tensor:
        read = {"training": self.training, "longer": x.shape[1] > 20, "shorter": x.shape[1] < 12, "one": len(x) == 1}
        return self.o(self.hidden(x, read.get(self.when, False)))

    def generate(self, x: Tensor, max_new_tokens: int) -> Tensor:
        return self.o(self.hidden(x, self.when == "generate"))[:, :max_new_tokens]

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.o(self.hidden(x, self.when == "predict"))


@pytest.mark.parametrize("when", ["training", "longer", "shorter", "one", "generate", "predict"])
def test_numbers_are_found_on_every_way_through_the_model(when: str) -> None:
    masked, small, _ = pruned(Sometimes(when), torch.randn(TOKENS))
    assert small.size == small.i.out_features == 4
    assert_same(masked, small, *map(torch.randn, OTHERS))


class ZeroBranch(nn.Module):
    """Heads of a branch that ends in zeros, as residual branches are often initialized."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.i, self.qkv, self.out = 4, nn.Linear(6, WIDTH), nn.Linear(WIDTH, 96), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        q, k, v = self.qkv(h).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.head(h + self.out((q.sin() @ k.sin().mT @ v).transpose(1, 2).flatten(2)))


def test_zeros_hide_no_mistake() -> None:
    masked, small, _ = pruned(ZeroBranch(), torch.randn(TOKENS), exclude=["i"])
    assert small.heads == 2
    assert small.out.in_features == 16
    kept = masked.out.weight.abs().sum(0) + masked.qkv.weight.abs().sum(1).view(3, -1)[2] > 0
    with torch.no_grad():
        masked.out.weight[:, kept] = values = torch.randn(WIDTH, int(kept.sum()))
        small.out.weight.copy_(values)
    assert_same(masked, small, *map(torch.randn, OTHERS))


class Given(Either):
    """The same numbers as arguments, of which one is seen to be the width of the layer."""

    def __init__(self, first: int = 8, second: int = 8) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.i, self.o = nn.Linear(6, first), nn.Linear(first, 12)


def test_a_number_that_does_not_move_with_the_width_is_not_changed() -> None:
    masked, small, _ = pruned(Given(), torch.randn(4, 6), sparsity=0.4)
    assert small.first == small.i.out_features < 8
    assert small.second == 8
    assert_same(masked, small, torch.randn(9, 6))


class Normed(nn.Module):
    """Groups of a norm and of a convolution, an expansion and a kernel: numbers of a block that equal each other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.expand, self.kernel, self.heads = 4, 4, 4, 4
        self.i, self.weight = nn.Conv1d(6, 16, 1), nn.Parameter(torch.ones(16))
        self.conv = nn.Parameter(torch.randn(16, 4, 4) / 8)
        self.o = nn.Conv1d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.group_norm(self.i(x.mT), self.num_groups, self.weight)
        h = F.conv1d(F.pad(h, (self.kernel - 1, 0)), self.conv, groups=self.num_groups)
        return self.o(h).mT.repeat(1, 1, self.expand)


def test_only_the_number_of_groups_follows_the_groups() -> None:
    torch.manual_seed(0)
    masked, small, _ = pruned(Normed(), torch.randn(4, 9, 6))
    assert (small.num_groups, small.expand, small.kernel, small.heads) == (2, 4, 4, 4)
    assert small.weight.shape == (8,)
    assert_same(masked, small, torch.randn(2, 30, 6), torch.randn(1, 5, 6))


def test_groups_of_an_old_file_take_every_equal_number_for_a_length() -> None:
    """As the release that wrote them did, whose outputs they must give."""
    parts = (("scale", 0, torch.arange(8)[:, None]),)
    model = SizeAndWindow()
    old = Units(parts, {}, None)
    assert decoded_lengths("i", as_json("i", [old])["lengths"][0]) is None
    take_out(model, [old], [[0, 1]])
    assert (model.size, model.window, len(model.scale)) == (6, 6, 6)


class Gate(nn.Module):
    """A module inside that holds an equal number, and parameters of its own that lose nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.w = 4, nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w)[:, : self.heads * 4]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.gate, self.i, self.o = 4, Gate(), nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(self.gate(x)).view(len(x), -1, self.heads, 8)
        return self.o(h.softmax(-1).flatten(2))


def test_equal_numbers_in_submodules_are_not_changed() -> None:
    """The example has fewer tokens than the gate lets through: that its number matters is seen at none of its sizes."""
    torch.manual_seed(0)
    masked, small, _ = pruned(Outer(), torch.randn(4, 5, 6))
    assert (small.heads, small.gate.heads) == (2, 4)
    assert_same(masked, small, torch.randn(2, 40, 6))


class Square(nn.Module):
    """A number that is given, one that is computed from it, and one that is something else."""

    def __init__(self, width: int, kernel: int = 8, config: Any = None) -> None:
        super().__init__()
        self.width, self.kernel, self.config = width, kernel, config
        self.padded = width
        self.weight = nn.Parameter(torch.randn(width, 4, kernel // 8))


def test_widths_are_told_from_other_numbers_by_building_the_module_again() -> None:
    model: Any = nn.Sequential(Square(8))
    widths = Widths(model)
    before = torch.random.get_rng_state()
    assert widths.counts("0", "width", ("weight", 0)) is True
    assert widths.counts("0", "padded", ("weight", 0)) is True
    assert widths.counts("0", "kernel", ("weight", 0)) is False
    assert torch.equal(before, torch.random.get_rng_state())
    model[0].width = 9  # not what it was built with
    assert Widths(model).counts("0", "padded", ("weight", 0)) is None


def test_an_example_is_tried_at_the_sizes_that_the_model_takes() -> None:
    def shapes(model: nn.Module, *batch: Tensor) -> list[list[tuple[int, ...]]]:
        found = other_sizes(model, Samples((batch,), run_forward))
        return [[tuple(t.shape) for t in tensors_in(b)] for b in found.batches]

    assert shapes(Positions(), torch.randn(2, 16, 6)) == [[(3, 10, 6)], [(1, 24, 6)]]
    assert shapes(Positions(), torch.randn(2, 63, 6)) == [[(3, 42, 6)], [(1, 64, 6)]]  # no longer than its table
    assert shapes(nn.Linear(6, 6), torch.randn(2, 6)) == [[(3, 6)], [(1, 6)]]
    linear = nn.Linear(16, 3)  # as many tokens as channels
    assert shapes(linear, torch.randn(2, 16, 16)) == [[(3, 10, 16)], [(1, 24, 16)]]


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_patterns_match_parameters() -> None:
    _, small, plan = pruned(Positions(), torch.randn(TOKENS), exclude=["pos"])
    assert small.pos.shape == (1, 64, WIDTH)
    assert small.i.out_features == WIDTH
    assert small.a.out_features == 20
    assert "excluded by 'pos'" in reasons(plan).values()
    _, small, _ = pruned(Positions(), torch.randn(TOKENS), include=["a.weight"])
    assert small.a.out_features < 40
    with pytest.raises(ModelError, match=r"exclude pattern 'posi' matches no layer and no parameter.*'pos'"):
        pruned(Positions(), torch.randn(TOKENS), exclude=["posi"])
