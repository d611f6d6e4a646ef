"""A compression method of your own in one file: k-means weight sharing (Han et al., "Deep Compression", 2016).

Each Linear keeps one byte per weight, the index into a small codebook that is trained. The one file gives the method
its callback, YAML, checkpoints, resume, artefact and report. In a package of yours, announce it in pyproject.toml:

    [project.entry-points."pquant_lightning.methods"]
    weight_sharing = "my_package.weight_sharing:WeightSharing"

Run it: python examples/custom_method.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import CompressedLayer, CompressionMethodRegistry, LayerMethod, compress_model, compression_report
from pquant_lightning.core.compression_method import CompressionContext, Stage
from pquant_lightning.core.options import check_count
from pquant_lightning.core.plan import LayerPlan, Skip


class SharedLinear(CompressedLayer, kind="shared_linear", stage=Stage.QUANTIZE):
    """Linear whose weight (out, in) is `codebook[index]`, one byte per index."""

    parameter_buffers = ("index",)

    @classmethod
    def from_spec(cls, spec: dict, replaced: nn.Module | None) -> "SharedLinear":
        layer, size = cls(), (spec["layer"]["out_features"], spec["layer"]["in_features"])
        layer.codebook = nn.Parameter(torch.empty(spec["clusters"]))
        layer.bias = nn.Parameter(torch.empty(size[0])) if spec["layer"]["bias"] else None
        layer.register_buffer("index", torch.empty(size, dtype=torch.uint8))
        return layer

    def dense_weight(self) -> Tensor:
        return self.codebook[self.index.long()]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)

    def described(self) -> str:
        return f"{self.spec['clusters']} shared weights"


def kmeans(values: Tensor, clusters: int, sweeps: int = 20) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on numbers (n,), from a linear start: centers (clusters,) and the index of each number (n,)."""
    centers = torch.linspace(float(values.min()), float(values.max()), clusters)
    for _ in range(sweeps):
        index = torch.bucketize(values, (centers[1:] + centers[:-1]) / 2)
        counts = torch.bincount(index, minlength=clusters)
        sums = torch.zeros(clusters).index_add_(0, index, values)
        centers = torch.where(counts > 0, sums / counts.clamp_min(1), centers).sort().values
    return centers, torch.bucketize(values, (centers[1:] + centers[:-1]) / 2)


@CompressionMethodRegistry.register("weight_sharing")
class WeightSharing(LayerMethod):
    """Replaces the weights of Linear layers by a few shared values.

    Args:
        clusters: number of shared values per layer, 2 to 256.
    """

    clusters: int = 16

    stage = Stage.QUANTIZE

    def validate_config(self) -> None:
        super().validate_config()
        check_count(type(self), "clusters", self.clusters, low=2, high=256)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict | Skip:
        if not isinstance(layer, nn.Linear):
            return Skip(name, "weight_sharing covers Linear layers")
        return {"kind": SharedLinear.kind, "clusters": self.clusters}

    def fill(self, new: SharedLinear, old: nn.Linear, plan: LayerPlan, context: CompressionContext) -> None:
        centers, index = kmeans(old.weight.flatten(), self.clusters)
        new.codebook.copy_(centers)
        new.index.copy_(index.view_as(new.index))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    compressed = compress_model(model, "weight_sharing", clusters=16)
    print(compression_report(model, compressed))


if __name__ == "__main__":
    main()
