"""One budget over several methods against each method alone at the same bytes.

    python examples/benchmarks/joint_budget.py [--only digits text] [--quick] [--test]

digits: the MLP and the conv net of examples/digits.py, accuracy; text: a causal byte-level transformer (4 layers,
d=128) trained on the docstrings of the standard library, in bits per byte of text that is kept aside. Nothing is
fine-tuned after compression. What cannot be reached is "-". Figures are of validation data, with --test of test data.
"""

import argparse
import ast
import copy
import logging
import math
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import print_table
from torch import Tensor, nn

from pquant_lightning import LowRankCompression, PTQCompression, StructuredPruning, compress_model
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.deploy import deploy
from pquant_lightning.core.errors import PQuantError
from pquant_lightning.core.joint_budget import apply_share, share_budget

SIZES = (0.25, 0.15, 0.10, 0.08, 0.06)
TOKENS = 128


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """The next byte of a text: logits (N, tokens, 256) of bytes (N, tokens)."""

    def __init__(self, dim: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(TOKENS, dim)
        self.blocks = nn.Sequential(*(Block(dim, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def text() -> Tensor:
    """Docstrings of the standard library, as bytes."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        found += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return torch.frombuffer(bytearray("\n\n".join(found).encode()), dtype=torch.uint8).long()


def windows(data: Tensor, count: int, seed: int) -> Tensor:
    """`(count, TOKENS + 1)` bytes from random places."""
    starts = torch.randint(len(data) - TOKENS - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + TOKENS + 1] for start in starts])


def trained_text_model(data: Tensor, steps: int) -> ByteModel:
    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        batch = windows(data, 32, step)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor) -> float:
    batch = windows(data, 64, 12345)
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    return float(loss) / math.log(2)


Contender = Callable[[nn.Module, float, Any], nn.Module]


def by_budget(*methods: Any) -> Contender:
    """A copy compressed to a share of the bytes, by one budget over the methods."""

    def compress(model: nn.Module, size: float, data: Any) -> nn.Module:
        samples = Samples.take(data, 300)
        share = share_budget(model, methods, {"size": size}, samples)
        small = copy.deepcopy(model)
        apply_share(small, share, samples)
        deploy(small)
        return small.eval()

    return compress


def uniform_bits(options: dict[str, Any]) -> Contender:
    """The most bits, alike in all layers, that keep to the bytes."""

    def compress(model: nn.Module, size: float, data: Any) -> nn.Module:
        from pquant_lightning import compression_report

        for bits in range(8, 1, -1):
            small = compress_model(model, "ptq", train_loader=data, bits=bits, **options)
            if compression_report(model, small).size_ratio <= size:
                return small.eval()
        raise PQuantError("not reached")

    return compress


def rows(
    model: nn.Module, data: Any, score: Callable[[nn.Module], float], form: str, sizes: tuple[float, ...], scheme: str
) -> Iterator[list[str]]:
    """One row per size: what each contender has kept."""
    ptq = {"scheme": scheme, "group_size": 32} if scheme == "weight_only" else {"scheme": scheme}
    quantize = PTQCompression(first_last_bits=2, min_saving=0.0, **ptq)
    factorize, prune = LowRankCompression(min_saving=0.0), StructuredPruning(min_saving=0.0)
    contenders = {
        "together": by_budget(factorize, prune, quantize),
        "bits alike": uniform_bits({**ptq, "first_last_bits": 2, "min_saving": 0.0}),
        "bits per layer": by_budget(quantize),
        "ranks": by_budget(factorize),
        "channels": by_budget(prune),
    }
    yield [f"bytes kept (all: {score(model):{form}})", *contenders]
    for size in sizes:
        figures = []
        for compress in contenders.values():
            try:
                figures.append(f"{score(compress(model, size, data)):{form}}")
            except PQuantError:
                figures.append("-")
        yield [f"{size:.0%}", *figures]


def digits(quick: bool, test: bool) -> Iterator[tuple[str, Iterator[list[str]]]]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from digits import DigitsConvNet, DigitsDataModule, DigitsMLP, accuracy, quiet
    from lightning.pytorch import Trainer

    data = DigitsDataModule()
    data.setup("fit")
    scored = data.test_dataloader() if test else data.val_dataloader()
    for build in (DigitsConvNet,) if quick else (DigitsMLP, DigitsConvNet):
        torch.manual_seed(0)
        model = build()
        with quiet():
            options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = Trainer(max_epochs=40, accelerator="cpu", enable_model_summary=False, **options)
            trainer.fit(model, data.train_dataloader())
        model.trainer = None
        table = rows(model, data, lambda m: 100 * accuracy(m, scored), ".2f", SIZES[2:4] if quick else SIZES, "static")
        yield f"{build.__name__}: accuracy, %", table


def texts(quick: bool, test: bool) -> Iterator[tuple[str, Iterator[list[str]]]]:
    data = text()
    cut = len(data) * 8 // 10, len(data) * 9 // 10
    train, held = data[: cut[0]], data[cut[1] :] if test else data[cut[0] : cut[1]]
    model = trained_text_model(train, 150 if quick else 1500)
    calibration = [windows(train, 32, 10_000 + i)[:, :-1] for i in range(4)]
    table = rows(
        model, calibration, lambda m: bits_per_byte(m, held), ".3f", SIZES[2:3] if quick else SIZES, "weight_only"
    )
    yield f"Byte transformer on {len(data):,} bytes of docstrings: bits per byte", table


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["digits", "text"], default=["digits", "text"])
    parser.add_argument("--quick", action="store_true", help="a smaller form for CI")
    parser.add_argument("--test", action="store_true", help="score the data kept aside")
    options = parser.parse_args()
    for logger in ("lightning.pytorch", "pquant_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, make in (("digits", digits), ("text", texts)):
        if name in options.only:
            for title, table in make(options.quick, options.test):
                print_table(title, table)


if __name__ == "__main__":
    main()
