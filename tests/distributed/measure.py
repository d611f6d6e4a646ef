"""Run by test_statistics.py in two processes: statistics of a mixture of experts whose parts not both of them reach."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, collect_inputs, output_ranges, run_samples
from pquant_lightning.core.moments import MomentSource, collect_moments
from pquant_lightning.methods.pruning._importance import activation
from pquant_lightning.methods.pruning._second_order import squared_input_norms
from pquant_lightning.methods.quantization._layers import QuantLayer
from pquant_lightning.methods.quantization._smoothing import largest_inputs
from pquant_lightning.methods.quantization.qat import QATCompression

NAMES = [f"experts.{place}" for place in range(4)]
ROUTES = ((0, 1, 2), (0, 2, 3))  # of each process
SCALES = (1.0, 30.0, 5.0, 290.0)  # largest input of each expert


class Experts(nn.Module):
    """Sample i goes to the expert that its first number names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(6, 3 + place) for place in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 8)
        for place, expert in enumerate(self.experts):
            chosen = x[:, 0].long() == place
            if chosen.any():
                out[chosen, : 3 + place] = expert(x[chosen, 1:])
        return out


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for expert in ROUTES[rank]:
        x = torch.rand(8, 6, generator=generator) * SCALES[expert] * (0.5 + rank / 2)
        found.append(torch.cat([torch.full((8, 1), float(expert)), x], 1))
    return found


def measured(samples: Samples) -> dict[str, Any]:
    """Everything that is collected, as plain numbers."""
    model = Experts()
    inputs = collect_inputs(model, NAMES, samples)
    with output_ranges(model, dict(zip("abcd", NAMES, strict=True)), samples) as outputs:
        for _ in run_samples(model, samples):
            pass
    moments = collect_moments(model, NAMES, samples, reference=Experts())
    source = MomentSource(model, NAMES, samples, 1)
    parts = {name: source.get(name) for name in NAMES}
    units = [[(f"{name}.weight", 1, torch.arange(6)[:, None])] for name in NAMES]
    return {
        "minimum": {name: found.minimum for name, found in inputs.items()},
        "maximum": {name: found.maximum for name, found in inputs.items()},
        "mean": {name: found.mean.tolist() for name, found in inputs.items()},
        "histogram": {name: float(found.histogram.sum()) for name, found in inputs.items()},
        "outputs": {name: list(ends) for name, ends in outputs.items()},
        "count": {name: found.count for name, found in moments.items()},
        "covariance": {name: found.covariance.tolist() for name, found in moments.items()},
        "parts": {name: found.second.tolist() for name, found in parts.items() if found is not None},
        "norms": {name: found.tolist() for name, found in squared_input_norms(model, NAMES, samples).items()},
        "largest": {name: found.tolist() for name, found in largest_inputs(model, NAMES, samples).items()},
        "activation": [found.tolist() for found in activation(model, units, samples)],
    }


def trained(rank: int | None) -> dict[str, list[float]]:
    """The ranges after three steps of training, from the observers; in one process on the batches of both."""
    model = QATCompression(num_samples=0, min_saving=0.0).compress(Experts())
    method = QATCompression(num_samples=0, min_saving=0.0)
    method.attach(model, {})
    for step in range(3):
        own = [batches(0)[step], batches(1)[step]] if rank is None else [batches(rank)[step]]
        model.train()(torch.cat(own))
        method.observe(model, {})
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}
    return {name: layer.act_range.tolist() for name, layer in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    root, rank = parser.parse_args().root, int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    samples = Samples(tuple(batches(rank)), lambda model, batch: model(batch))
    everyone = samples.of_all_processes()
    found = {"statistics": measured(samples), "trained": trained(rank), "alone": everyone is None}
    (root / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
