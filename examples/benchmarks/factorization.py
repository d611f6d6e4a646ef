"""Time, error and peak memory of the truncated SVD, beside torch's SVD, `torch.svd_lowrank` and PEFT's PiSSA.

    python examples/benchmarks/factorization.py [--rounds 11] [--only speed|large|encoder|memory]

Time is CPU time on one thread relative to `torch.linalg.svd` of the same weight in the same round, the median over the
rounds; each round takes the contenders in another order. The error is relative to the least possible one for that rank
(Eckart-Young). `large` is a (4096, 4096) layer, whose full SVD takes half a minute. `encoder` is the data-aware
compression of a whole encoder beside what it cannot do without: the moments of the inputs of all layers, and one
`torch.linalg.svd` of each weight. Memory is the growth of the peak resident size over the built model, measured in a
child process.
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import linear_encoder
from torch import Tensor, nn

from pquant_lightning import compress_model
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.moments import collect_moments
from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank.svd import TruncatedSVDLinear

RANK, ENERGY = 64, 0.95
SHAPES = [(768, 768), (768, 3072), (3072, 768)]


class Contender(NamedTuple):
    """What is timed, and how to see the weight it gives."""

    name: str
    run: Callable[[nn.Linear], Any]
    weight: Callable[[Any], Tensor]


def product(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, s, vh = (factor.double() for factor in factors)
    return (u * s) @ vh


def pissa(layer: nn.Linear, init: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=init)  # type: ignore[arg-type]
    return get_peft_model(nn.Sequential(layer), config)  # type: ignore[arg-type]


def pissa_weight(model: Any) -> Tensor:
    adapted = model.base_model.model[0]
    return adapted.lora_B["default"].weight.double() @ adapted.lora_A["default"].weight.double()


def svd_lowrank(layer: nn.Linear, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(layer.weight, q=RANK, niter=niter)
    return u, s, v.T


BY_RANK = [
    Contender(
        f"TruncatedSVDLinear.from_linear(layer, rank={RANK})",
        lambda layer: TruncatedSVDLinear.from_linear(layer, rank=RANK),
        lambda low_rank: low_rank.weight.double(),
    ),
    Contender(
        f'compress_model(model, "low_rank", rank={RANK}, inplace=True)',
        lambda layer: compress_model(nn.Sequential(layer), "low_rank", rank=RANK, min_saving=0, inplace=True),
        lambda model: model[0].weight.double(),
    ),
    Contender("truncated_svd", lambda layer: _truncated_svd.truncated_svd(layer.weight, RANK), product),
    Contender("torch.svd_lowrank, niter=2", lambda layer: svd_lowrank(layer, 2), product),
    Contender("torch.svd_lowrank, niter=4", lambda layer: svd_lowrank(layer, 4), product),
]
PEFT = [
    Contender('PEFT, init_lora_weights="pissa"', lambda layer: pissa(layer, "pissa"), pissa_weight),
    Contender('PEFT, init_lora_weights="pissa_niter_4"', lambda layer: pissa(layer, "pissa_niter_4"), pissa_weight),
]
BY_ENERGY = [
    Contender(
        f'compress_model(model, "low_rank", energy={ENERGY}, inplace=True)',
        lambda layer: compress_model(nn.Sequential(layer), "low_rank", energy=ENERGY, min_saving=0, inplace=True),
        lambda model: model[0].weight.double(),
    ),
    Contender(
        "truncated_svd_by_energy", lambda layer: _truncated_svd.truncated_svd_by_energy(layer.weight, ENERGY), product
    ),
]


def gaussian(out: int, in_: int) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(0))


def power_law(out: int, in_: int, exponent: float = 0.5) -> Tensor:
    """A random matrix (out, in) with singular values i^-exponent."""
    k = min(out, in_)
    left, right = torch.linalg.qr(gaussian(out, k)).Q, torch.linalg.qr(gaussian(in_, k)).Q
    return (left * torch.arange(1, k + 1) ** -exponent) @ right.T


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


@torch.no_grad()
def measure(contenders: list[Contender], weight: Tensor, rounds: int) -> list[tuple[str, float, float]]:
    """Name, median time ratio and error / optimum (same rank) of each contender on one weight `(out, in)`."""
    layer, peer = linear(weight), "torch.linalg.svd"
    ratios: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    results: dict[str, Any] = {}
    for turn in range(rounds):
        unit, _ = cpu_seconds(lambda: torch.linalg.svd(weight, full_matrices=False))
        for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            own = copy.deepcopy(layer)
            seconds, results[contender.name] = cpu_seconds(lambda c=contender, own=own: c.run(own))
            ratios[contender.name].append(seconds / unit)
    singular = torch.linalg.svdvals(weight.double())
    rows = [(peer, 1.0, 1.0)]
    for contender in contenders:
        approximation = contender.weight(results[contender.name])
        rank = int(torch.linalg.matrix_rank(approximation, rtol=1e-6))
        error = float((weight.double() - approximation).norm() / singular[rank:].norm())
        rows.append((f"{contender.name} (r={rank})", statistics.median(ratios[contender.name]), error))
    return rows


def speed(rounds: int) -> None:
    torch.set_num_threads(1)
    by_rank = list(BY_RANK)
    if find_spec("peft") is None:
        print("PEFT is not installed; `pip install peft` adds its rows.\n")
    else:
        by_rank += PEFT
    for spectrum, make in (("singular values i^-0.5", power_law), ("Gaussian", gaussian)):
        for shape in SHAPES:
            print(f"### {shape}, {spectrum}\n\n| contender | time ratio | error / optimum |\n|---|---|---|")
            for contenders in (by_rank, BY_ENERGY):
                for name, ratio, error in measure(contenders, make(*shape), rounds)[contenders is BY_ENERGY :]:
                    print(f"| {name} | {ratio:.3f} | {error:.5f} |", flush=True)
            print()


def large(rounds: int) -> None:
    """One Gaussian weight of the size of a large language model's, through `compress_model` with default options."""
    torch.set_num_threads(1)
    contender = Contender(
        f'compress_model(model, "low_rank", rank={RANK})',
        lambda layer: compress_model(nn.Sequential(layer), "low_rank", rank=RANK),
        lambda model: model[0].weight.double(),
    )
    contender.run(linear(gaussian(512, 512)))  # what is loaded once is loaded
    print("### (4096, 4096), Gaussian\n\n| contender | time ratio | error / optimum |\n|---|---|---|")
    for name, ratio, error in measure([contender], gaussian(4096, 4096), rounds):
        print(f"| {name} | {ratio:.4f} | {error:.5f} |", flush=True)
    print()


def encoder(rounds: int) -> None:
    torch.set_num_threads(1)
    model, data = linear_encoder(), [torch.randn(16, 128, 384) for _ in range(4)]
    samples = Samples.take(data, 64)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def floor() -> None:
        collect_moments(model, list(layers), samples)
        for layer in layers.values():
            torch.linalg.svd(layer.weight.detach(), full_matrices=False)

    options: dict[str, Any] = {"train_loader": data, "num_samples": 64, "param_ratio": 0.5}
    ratios = []
    for _ in range(rounds):
        unit, _ = cpu_seconds(floor)
        ratios.append(cpu_seconds(lambda: compress_model(model, "low_rank", **options))[0] / unit)
    print("### Encoder of 4 layers, width 384, 64 samples of 128 tokens, data-aware\n")
    print("| contender | time ratio |\n|---|---|")
    print(f"| moments of all inputs + torch.linalg.svd of {len(layers)} weights | 1.000 |")
    print(f'| compress_model(model, "low_rank", param_ratio=0.5, train_loader=...) | {statistics.median(ratios):.3f} |')
    print(flush=True)


MEMORY = {
    "nothing": None,
    f"rank={RANK}": {"rank": RANK},
    f"energy={ENERGY}": {"energy": ENERGY},
}
WIDTH, DEPTH = 1024, 8


def resident_mib(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_growth(options: dict[str, Any] | None, channel: Any) -> None:
    """In a child process: peak resident size while a model is compressed in place, over that before."""
    torch.set_num_threads(1)
    weight = power_law(WIDTH, WIDTH, exponent=1.0)
    model = nn.Sequential(*(linear(weight.clone()) for _ in range(DEPTH)))
    compress_model(nn.Sequential(linear(gaussian(300, 300))), "low_rank", rank=8)  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mib("VmRSS")
    if options is not None:
        compress_model(model, "low_rank", inplace=True, **options)
    channel.put(resident_mib("VmHWM") - before)


def memory() -> None:
    layer_mib = WIDTH * WIDTH * 4 / 2**20
    print(f"### Peak memory in place: {DEPTH} x Linear({WIDTH}, {WIDTH}), {layer_mib:.0f} MiB each, values i^-1\n")
    print("| compress_model(model, ...) | growth of the peak, MiB | in layers |\n|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name, options in MEMORY.items():
        channel = context.SimpleQueue()
        child = context.Process(target=peak_growth, args=(options, channel))
        child.start()
        growth = channel.get()
        child.join()
        print(f"| {name} | {growth:.1f} | {growth / layer_mib:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=["speed", "large", "encoder", "memory"])
    args = parser.parse_args()
    if args.only in (None, "speed"):
        speed(args.rounds)
    if args.only in (None, "large"):
        large(min(args.rounds, 2))
    if args.only in (None, "encoder"):
        encoder(args.rounds)
    if args.only in (None, "memory"):
        memory()
