"""Cost of LoRA: time of a training step and memory, relative to full fine-tuning and beside PEFT.

    python examples/benchmarks/lora.py [--rounds 9] [--only steps memory]

The model is an encoder of 4 layers (d=384, 6 heads, feed-forward 1536, sequence 128, batch 8, AdamW), with adapters of
rank 8 on all its linear layers. Ours are what a `LoRACallback` puts in at the start of a fit, with default options but
for the dropout. "frozen" has no adapters at all: gradients go through frozen weights to the inputs. Time is CPU time on
one thread, the median over the rounds of the ratio to full fine-tuning in the same round; each round takes the
contenders in another order. Memory is what a child process grows by over the built model. The bar is what our figure is
to reach at most.
"""

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Batch, linear_encoder, machine, print_table, relative_times
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pquant_lightning import LoRACallback, compress_model

RANK = 8
BARS = {"lora": ("0.78", "150"), "lora, dropout 0.05": ("0.95", "-")}


class Classifier(LightningModule):
    """The encoder as an ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def random_batch(size: int = 8) -> Batch:
    return torch.randn(size, 128, 384), torch.randint(10, (size,))


def full() -> nn.Module:
    return Classifier()


def frozen() -> nn.Module:
    """Only the head trains, and gradients go all the way down."""
    module = Classifier()
    module.net.encoder.requires_grad_(False)
    module.net.encoder[0].norm1.bias.requires_grad_(True)
    return module


def ours(dropout: float = 0.0) -> nn.Module:
    """Adapted in place, as at the start of a fit."""
    return compress_model(Classifier(), LoRACallback(dropout=dropout).method, inplace=True)


def peft(dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    module = Classifier()
    names = [name for name, layer in module.net.named_modules() if isinstance(layer, nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=dropout, target_modules=names)
    module.net = get_peft_model(module.net, config)
    return module


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "full fine-tuning": full,
    "frozen": frozen,
    "lora": ours,
    "PEFT": peft,
    "lora, dropout 0.05": lambda: ours(0.05),
    "PEFT, dropout 0.05": lambda: peft(0.05),
}


def training_step(module: nn.Module) -> Callable[[], None]:
    optimizer, batch = module.train().configure_optimizers(), random_batch()

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def steps(rounds: int) -> Iterator[list[str]]:
    """Rows: time of a step / time of a step of full fine-tuning."""
    yield ["step", "time / full", "bar"]
    times = relative_times({name: training_step(make()) for name, make in CONTENDERS.items()}, rounds)
    for name, ratio in times.items():
        yield [name, f"{ratio:.2f}", BARS.get(name, ("-", "-"))[0]]


def memory(rounds: int) -> Iterator[list[str]]:
    """Rows: growth of the peak memory over three steps, each contender in a process of its own."""
    yield ["three steps", "MB over the built model", "bar"]
    for name in CONTENDERS:
        run = subprocess.run([sys.executable, __file__, "--grow", name], capture_output=True, text=True, check=True)
        yield [name, f"{float(run.stdout.split()[-1]):.0f}", BARS.get(name, ("-", "-"))[1]]


def peak_kb() -> int:
    """The most memory that this process has held, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def growth_mb(name: str) -> float:
    step = training_step(CONTENDERS[name]())
    before = peak_kb()
    for _ in range(3):
        step()
    return (peak_kb() - before) / 1024


def main() -> None:
    """Reads the command line and prints the tables."""
    parts = {"steps": ("LoRA step on the encoder", steps), "memory": ("Memory", memory)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="default: all")
    parser.add_argument("--grow", choices=list(CONTENDERS), help="print the growth of one contender's memory, in MB")
    options = parser.parse_args()
    logging.getLogger("pquant_lightning").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.grow:
        print(growth_mb(options.grow))
        return
    print(f"{machine()}, {options.rounds} rounds")
    for part in options.only:
        title, rows = parts[part]
        print_table(title, rows(options.rounds))


if __name__ == "__main__":
    main()
