"""`.safetensors`: weights and what rebuilds their layers, for `load_compressed`; the archival form without a graph."""

from pathlib import Path

import torch
from safetensors import safe_open

from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.core.compressed_layer import install_hook
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import dense_form
from pquant_lightning.core.serialization import artifact_metadata, read_artifact, write_artifact
from pquant_lightning.exporters.base import PACKED, Exporter, Run, run_in_torch


class SafetensorsExporter(Exporter):
    """The file that `save_compressed` writes."""

    bits = PACKED

    def write(self, traced: Traced, path: Path) -> None:
        write_artifact(traced.model, path, artifact_metadata(traced.model))

    def open(self, path: Path, traced: Traced) -> Run:
        state, _ = read_artifact(path)
        model = deep_copy(dense_form(traced.model)).to_empty(device="cpu")
        install_hook(model)
        model.load_state_dict(state)
        model.eval()
        for name, buffer in traced.model.named_buffers():  # those that no file has
            if name not in state and name in dict(model.named_buffers()):
                model.get_buffer(name).copy_(buffer)
        return run_in_torch(model, traced)

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        return safetensors_types(path)


def safetensors_types(path: Path) -> dict[str, tuple[str, int]]:
    """Type and bytes of each tensor of a safetensors file, from its header."""
    found = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            kind, count = part.get_dtype(), int(torch.Size(part.get_shape()).numel())
            found[name] = kind, count * _BYTES[kind[-2:].lstrip("IUF")]
    return found


_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1, "OL": 1}
