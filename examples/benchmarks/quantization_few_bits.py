"""Few bits: the time of GPTQ against the naive algorithm, and what is left of a pretrained sentence encoder.

    python examples/benchmarks/quantization_few_bits.py [--rounds 3] [--only speed accuracy] [--test]

Speed: an encoder of six layers, d=384, in 4 bits and groups of 32. The naive algorithm makes the second moment of each
layer by itself and updates all columns that are left after each column that is rounded, layer by layer; ours is
`compress_model` with default options, from the batches to the integer model. CPU time on one thread, in alternation,
the median of the ratios. A second row leaves out what both share: running the model and summing moments.

Accuracy: the sentence encoder of sentences.py, on the sentences that recipes are chosen with, or with --test those kept
aside. The linear layers of the encoder are quantized; figures are cosines between the embeddings before and after.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import EncoderLayer, cpu_seconds, print_table
from sentences import COUNT, PATTERN, SentenceEncoder, embeddings, load_batches, missing
from torch import Tensor, nn

from pquant_lightning import compress_model
from pquant_lightning.core.affine import blocks, mse_range
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.methods.quantization._gptq import gptq_codes

FOUR = {"bits": 4, "scheme": "weight_only", "group_size": 32}
THREE = {**FOUR, "bits": 3}


class Encoder(nn.Module):
    """Six encoder layers over (N, tokens, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(384, 6, 1536) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# -- speed -----------------------------------------------------------------------------------------------------------


def naive_moments(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """X^T X of every linear layer, each by itself."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any) -> None:
            rows = args[0].flatten(0, -2)
            found[name] = found.get(name, 0) + rows.T @ rows

        return add

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


def naive_codes(weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The published algorithm without its blocks: after each column, all that are left are updated."""
    order = moment.diagonal().argsort(descending=True)
    w, h = weight[:, order].clone(), moment[order][:, order]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for column in range(w.shape[1]):
        group = order[column] // 32
        s, z = scale[:, group], zero[:, group]
        code = (w[:, column] / s + z).round().clamp(-8, 7)
        error = (w[:, column] - (code - z) * s) / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, column:][None]
        codes[:, column] = code
    return codes[:, order.argsort()]


def speed(rounds: int) -> Iterator[list[str]]:
    """Rows: time of ours / time of the naive algorithm."""
    yield ["what is timed", "ours / naive", "bar", "ours, s", "naive, s"]
    torch.manual_seed(0)
    model, batches = Encoder().eval(), [torch.randn(8, 32, 384) for _ in range(8)]
    weights = {n: layer.weight.detach() for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    moments = naive_moments(model, batches)
    grids = {name: mse_range(blocks(weight, group_size=32), 4) for name, weight in weights.items()}
    alike: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault(weight.shape, []).append(name)

    def ours_rounding() -> None:
        for names in alike.values():
            for first in range(0, len(names), 7):
                part = names[first : first + 7]
                scale, zero = (torch.stack([grids[name][i] for name in part]) for i in (0, 1))
                stacked = torch.stack([weights[name] for name in part])
                gptq_codes(stacked, torch.stack([moments[name] for name in part]), scale, zero, 4)

    def naive_rounding() -> None:
        for name, weight in weights.items():
            naive_codes(weight, moments[name], *grids[name])

    def ours() -> None:
        compress_model(model, "ptq", train_loader=batches, num_samples=64, **FOUR)

    def naive() -> None:
        found = naive_moments(model, batches)
        for name, weight in weights.items():
            naive_codes(weight, found[name], *mse_range(blocks(weight, group_size=32), 4))

    for title, fast, slow, bar in (
        ("GPTQ from the moments", ours_rounding, naive_rounding, "0.20"),
        ("`compress_model`, all of it", ours, naive, ""),
    ):
        pairs = []
        for turn in range(rounds):
            first, second = (fast, slow) if turn % 2 else (slow, fast)
            times = {first: cpu_seconds(first), second: cpu_seconds(second)}
            pairs.append((times[fast], times[slow]))
        ratio = statistics.median(a / b for a, b in pairs)
        yield [title, f"{ratio:.2f}", bar, *(f"{statistics.median(column):.1f}" for column in zip(*pairs, strict=True))]


# -- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(test: bool) -> Iterator[list[str]]:
    """Rows: mean and least cosine, and stored bytes, per recipe."""
    if missing():
        raise SystemExit(f"Not installed: {', '.join(missing())}.")
    model = SentenceEncoder()
    calibration, scored = load_batches(test)
    expected = embeddings(model, scored)
    recipes: list[tuple[str, str, dict[str, Any], str]] = [
        ("4 bits, nearest", "ptq", {**FOUR, "rounding": "nearest"}, ""),
        ("4 bits, no data (HQQ)", "ptq", {**FOUR, "data_aware": False}, "0.965"),
        ("4 bits, data (GPTQ)", "ptq", FOUR, "0.987"),
        ("4 bits on average", "mixed_precision", {"average_bits": 4, "scheme": "weight_only", "group_size": 32}, ""),
        ("3 bits, nearest", "ptq", {**THREE, "rounding": "nearest"}, ""),
        ("3 bits, data (GPTQ)", "ptq", THREE, "0.925"),
        ("3 bits on average", "mixed_precision", {"average_bits": 3, "scheme": "weight_only", "group_size": 32}, ""),
    ]
    yield ["groups of 32", "mean cosine", "bar", "least cosine", "bytes"]
    for title, method, options, bar in recipes:
        small = compress_model(model, method, train_loader=calibration, num_samples=COUNT, include=[PATTERN], **options)
        cosines = (embeddings(small, scored) * expected).sum(1)
        figures = (f"{cosines.mean():.4f}", bar, f"{cosines.min():.4f}", f"{stored_bytes(small):,}")
        yield [title, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["speed", "accuracy"], default=["speed", "accuracy"])
    parser.add_argument("--test", action="store_true", help="score the sentences kept aside")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pquant_lightning").setLevel(logging.ERROR)
    if "speed" in options.only:
        print_table("GPTQ: time of ours / naive", speed(options.rounds))
    if "accuracy" in options.only:
        print_table("A sentence encoder in few bits", accuracy(options.test))


if __name__ == "__main__":
    main()
