"""Files of every release so far load in this one and compute what they computed when they were written."""

import json
import zipfile
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pquant_lightning import load_compressed
from pquant_lightning.core.partial import HINT
from pquant_lightning.core.serialization import read_artifact, read_checkpoint
from tests.data.models import MODELS
from tests.data.write import STACKS, made, plain_output, specs_in
from tests.models import quiet_trainer

RELEASES = sorted((Path(__file__).parents[1] / "data").glob("*.zip"))
NAMES = [(release, name) for release in RELEASES for name in zipfile.ZipFile(release).namelist()]
FILES = [(release, name) for release, name in NAMES if name not in ("outputs.safetensors", "models.json", "./")]
over_files = pytest.mark.parametrize(("release", "name"), FILES, ids=[f"{r.stem}-{n}" for r, n in FILES])


@cache
def unpacked(release: Path) -> Path:
    directory = Path(mkdtemp())
    zipfile.ZipFile(release).extractall(directory)
    return directory


def model_of(release: Path, name: str) -> str:
    return json.loads((unpacked(release) / "models.json").read_text())[name.rpartition(".")[0]]


def assert_same_output(model: nn.Module, release: Path, name: str) -> None:
    wanted = load_file(unpacked(release) / "outputs.safetensors")[name]
    output = plain_output(model, MODELS[model_of(release, name)].inputs())
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


@over_files
def test_a_file_gives_the_outputs_of_its_time(release: Path, name: str) -> None:
    model = load_compressed(made(model_of(release, name)), unpacked(release) / name)
    assert_same_output(model, release, name)


@over_files
def test_what_a_file_holds_is_loaded_unchanged(release: Path, name: str) -> None:
    path = unpacked(release) / name
    state = read_artifact(path)[0] if path.suffix == ".safetensors" else read_checkpoint(path)
    loaded = load_compressed(made(model_of(release, name)), path).state_dict()
    stored: dict[str, Any] = state.get("state_dict", state)
    for key, value in stored.items():
        if not key.endswith("_extra_state") and key != HINT:
            assert torch.equal(loaded[key], value), key


CHECKPOINTS = [(release, name) for release, name in FILES if name.endswith(".ckpt")]


@pytest.mark.parametrize(("release", "name"), CHECKPOINTS, ids=[f"{r.stem}-{n}" for r, n in CHECKPOINTS])
def test_a_fit_goes_on_from_a_checkpoint(release: Path, name: str, tmp_path: Path) -> None:
    model_name, callbacks = STACKS[name.removesuffix(".ckpt")]
    model: Any = made(model_name)
    trainer = quiet_trainer(tmp_path, callbacks(), max_epochs=2)
    trainer.fit(model, model.loader(), ckpt_path=unpacked(release) / name)
    assert trainer.current_epoch == 2
    assert trainer.global_step == 8
    assert (tmp_path / "compressed.safetensors").exists()


@pytest.mark.parametrize("release", RELEASES, ids=[release.stem for release in RELEASES])
def test_the_files_hold_many_kinds(release: Path) -> None:
    held = {spec["kind"] for path in unpacked(release).iterdir() for spec in specs_in(path).values()}
    assert len(held) >= 46
