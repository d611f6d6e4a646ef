"""torch_geometric: a graph network of its own `GraphConv` and `Linear` layers, batches of type `Batch`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from pquant_lightning import CompressedModule, PruningCallback, QATCallback
from tests.clients.harness import Client, check

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GraphConv, Linear, global_mean_pool

pytestmark = pytest.mark.clients


class GraphNet(CompressedModule, LightningModule):
    """Class of a graph: which of two directions its nodes' features lean to, told by their neighbours."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = GraphConv(8, hidden)
        self.second = GraphConv(hidden, hidden)
        self.head = Linear(hidden, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Scores `(graphs, 2)`."""
        x = F.relu(self.first(x, edge_index))
        x = F.relu(self.second(x, edge_index))
        return self.head(global_mean_pool(x, batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch.x, batch.edge_index, batch.batch), batch.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def graphs(seed: int, count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count):
        nodes = 5 + place % 7
        label = place % 2
        x = torch.randn(nodes, 8, generator=generator)
        x[:, label] += 0.8
        edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
        found.append(Data(x=x, edge_index=edges, y=torch.tensor([label])))
    return DataLoader(found, batch_size=16)


def predict(model: Any) -> Tensor:
    return torch.cat([model(batch.x, batch.edge_index, batch.batch) for batch in graphs(1, 128)])


@torch.no_grad()
def wrong(model: Any) -> float:
    return float(F.cross_entropy(predict(model), torch.arange(128) % 2))


def test_a_graph_network(tmp_path: Path) -> None:
    check(
        Client(
            package="torch_geometric",
            make=GraphNet,
            loader=lambda: graphs(0, 256),
            stack=lambda: [PruningCallback(sparsity=0.5), QATCallback(bits=8)],
            predict=predict,
            error=wrong,
            load=lambda path: GraphNet.load_from_checkpoint(path),
            metric="cross-entropy",
            keeps=0.45,
        ),
        tmp_path,
    )
