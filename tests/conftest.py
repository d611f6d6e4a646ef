"""Shared by all tests: one thread, reproducible weights, and the package's log."""

import logging
from collections.abc import Iterator

import pytest
import torch

from pquant_lightning import CompressedLayer, CompressionMethodRegistry
from pquant_lightning.core import layer_adapter

torch.set_num_threads(1)  # the models are tiny; threads would only wait for each other


NOT_OURS = (
    "The dirpath has changed",  # a resumed fit that writes to a place of its own
    "Be aware that when using `ckpt_path`",  # a Trainer without the ModelCheckpoint of the fit
    "Checkpoint directory .* exists and is not empty",
    "Found .* in eval mode at the start of training",  # a loaded model that is fitted again
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
    "The PyTorch API of nested tensors",
)


def pytest_configure(config: pytest.Config) -> None:
    for message in NOT_OURS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs at INFO and above, whether its logger propagates to the root logger or not."""
    logger = logging.getLogger("pquant_lightning")
    propagates, level = logger.propagate, logger.level
    logger.propagate = False
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagates


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods, kinds and adapters registered in this test are forgotten after it."""
    monkeypatch.setattr(CompressionMethodRegistry, "_methods", dict(CompressionMethodRegistry._methods))
    monkeypatch.setattr(CompressedLayer, "kinds", dict(CompressedLayer.kinds))
    monkeypatch.setattr(layer_adapter, "_ADAPTERS", dict(layer_adapter._ADAPTERS))
