"""What the benchmarks share: the networks, the clock and the tables."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SECONDS = 0.05  # shorter calls are repeated until a measurement takes about this long
Batch = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with batch norm beside a shortcut."""

    def __init__(self, in_: int, out: int, stride: int) -> None:
        super().__init__()
        first = [nn.Conv2d(in_, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*first, nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential()
        if stride > 1 or in_ != out:
            self.shortcut.extend([nn.Conv2d(in_, out, 1, stride, bias=False), nn.BatchNorm2d(out)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` (post-norm, GELU) with query, key, value and output as four Linear layers."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))  # (N, tokens, dim)


class PooledEncoder(nn.Module):
    """An encoder of (N, 128, 384), the mean over the tokens, and a head: 7.1 million parameters."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, activation="gelu", batch_first=True)
    return PooledEncoder(nn.TransformerEncoder(layer, num_layers=4))


def linear_encoder() -> nn.Module:
    return PooledEncoder(nn.Sequential(*(EncoderLayer(384, 6, 1536) for _ in range(4))))


def resnet18() -> nn.Module:
    """ResNet-18 with a 3x3 stem for images (N, 3, 32, 32): 11.2 million parameters."""
    layers = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    for in_, out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [ResidualBlock(in_, out, stride), ResidualBlock(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def machine() -> str:
    """The processor, the instructions that torch uses on it, the threads, and the version of torch."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    vnni = "with VNNI" if torch.cpu._is_vnni_supported() else "without VNNI"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability} {vnni}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def cpu_seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - start


def relative_times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over the rounds of the time of each contender / the time of the first one in the same round."""
    names = list(runs)
    first = names[0]
    for run in (*runs.values(), *runs.values()):  # twice: caches are filled, and what compiles has compiled
        run()
    repeats = max(1, round(MIN_SECONDS / cpu_seconds(runs[first])))
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        seconds = {name: cpu_seconds(runs[name], repeats) for name in order}
        for name in names:
            ratios[name].append(seconds[name] / seconds[first])
    return {name: statistics.median(values) for name, values in ratios.items()}


def print_table(title: str, rows: Iterator[list[str]]) -> None:
    """One markdown table, row by row; the first row is the header."""
    header = next(rows)
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
