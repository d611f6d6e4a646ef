"""Artefacts: one safetensors file that others can read, written whole or not at all; hostile files are refused."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pquant_lightning import CompressedLayer, compress_model, finalize, load_compressed, save_compressed
from pquant_lightning.core.compressed_layer import Stage
from pquant_lightning.core.errors import CheckpointError, PQuantError
from pquant_lightning.core.serialization import artifact_bytes, read_artifact, read_checkpoint, write_artifact


class Tied(nn.Module):
    """Embedding and head share one matrix; a norm brings buffers of other types."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def _trained():
    model = compress_model(Tied(), "qat", bits=8)
    model(torch.arange(20))
    return model


def _plain_stack():
    return nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 32, 1), nn.PReLU())


def _stack():
    return compress_model(compress_model(_plain_stack(), "low_rank", rank=4), "qat")


MODELS = {"tied": _trained, "stack": _stack, "plain": Tied, "bfloat16": lambda: _stack().bfloat16()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def _header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


class TestWriting:
    def test_the_file_holds_the_finalized_state_dict(self, model, path):
        write_artifact(model, path)
        state, _ = read_artifact(path)
        expected = finalize(model).state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)

    def test_safetensors_itself_reads_the_same(self, model, path):
        write_artifact(model, path)
        ours, _ = read_artifact(path)
        theirs = load_file(path)
        assert theirs.keys() <= ours.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def test_tensors_are_aligned_contiguous_and_fill_the_file(self, model, path):
        write_artifact(model, path)
        entries = {name: entry for name, entry in _header(path).items() if name != "__metadata__"}
        sizes = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "I8": 1, "U8": 1}
        start = path.stat().st_size - max(entry["data_offsets"][1] for entry in entries.values())
        position = 0
        for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
            assert (start + position) % sizes[entry["dtype"]] == 0
            assert entry["data_offsets"][0] == position
            position = entry["data_offsets"][1]

    def test_predicted_bytes_are_the_bytes_on_disk(self, model, path):
        metadata = {"class": "Tied", "note": "é"}
        predicted = artifact_bytes(model, metadata)
        assert write_artifact(model, path, metadata) == predicted == path.stat().st_size

    def test_the_model_is_not_changed(self, model, path):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        write_artifact(model, path)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_metadata_is_kept(self, path):
        write_artifact(_stack(), path, {"class": "Net", "hparams": '{"width": 3}'})
        assert read_artifact(path)[1] == {"width": 3}
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["class"] == "Net"

    def test_shared_tensors_are_stored_once_and_shared_again(self, path):
        write_artifact(_trained(), path)
        names = load_file(path).keys()
        assert sum(name.endswith(".codes") for name in names) == 1
        state, _ = read_artifact(path)
        assert torch.equal(state["embed.codes"], state["head.codes"])
        loaded = load_compressed(Tied(), path)
        assert loaded.embed.codes is loaded.head.codes
        indices = torch.arange(20)
        assert loaded(indices).shape == (20, 50)

    @pytest.mark.parametrize("ending", ["safetensors", "pt"])
    def test_a_layer_used_in_two_places(self, tmp_path, ending):
        def make():
            layer = nn.Linear(64, 64)
            return nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})

        trained = compress_model(make(), "qat")
        trained["a"](torch.randn(4, 64))
        saved = save_compressed(trained, tmp_path / f"model.{ending}")
        loaded = load_compressed(make(), saved)
        inputs = torch.randn(4, 64)
        assert loaded["a"][0] is loaded["b"][0]
        assert torch.equal(loaded["b"](inputs), finalize(trained)["a"](inputs))

    def test_empty_and_scalar_tensors_and_views(self, path):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("empty", torch.empty(0, 3))
                self.register_buffer("scalar", torch.tensor(7, dtype=torch.int16))
                self.register_buffer("flag", torch.tensor([True, False]))
                self.register_buffer("column", torch.randn(4, 3).T)
                self.wide = nn.Parameter(torch.randn(2, dtype=torch.float64))

        odd = Odd()
        write_artifact(odd, path)
        state = load_file(path)
        assert state.keys() == odd.state_dict().keys()
        for name, tensor in odd.state_dict().items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)

    def test_a_missing_directory_is_made(self, tmp_path):
        path = tmp_path / "a" / "b" / "model.safetensors"
        assert write_artifact(_stack(), path) == path.stat().st_size


class ExtraState(nn.Module):
    """A user's module with extra state that is no tensor."""

    def get_extra_state(self):
        return {"counter": 3}

    def set_extra_state(self, state):
        self.counter = state["counter"]


def test_extra_state_that_is_not_json_is_named(path):
    model = nn.Sequential(nn.Linear(2, 2), ExtraState())
    model[1].get_extra_state = lambda: {"counter": {1, 2}}
    with pytest.raises(CheckpointError, match=r"'1._extra_state' is of type dict.*\.pt"):
        write_artifact(model, path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_extra_state_that_is_plain_data_is_stored(tmp_path, ending):
    model = nn.Sequential(nn.Linear(64, 64), ExtraState())
    path = save_compressed(compress_model(model, "qat"), tmp_path / f"model.{ending}")
    loaded = load_compressed(nn.Sequential(nn.Linear(64, 64), ExtraState()), path)
    assert loaded[1].counter == 3
    assert loaded[0].kind == "int_linear"


def test_a_type_that_safetensors_does_not_have_is_named(path):
    model = nn.Sequential()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match="'phase' is of type torch.complex64"):
        write_artifact(model, path)


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, ending):
    class Broken(CompressedLayer, nn.Linear, kind="broken_linear", stage=Stage.QUANTIZE):
        @classmethod
        def from_spec(cls, spec, replaced):
            return cls(4, 4)

        def finalized(self):
            if self.weight.is_meta:
                return self
            raise OSError("no space left on device")

    path = tmp_path / f"model.{ending}"
    save_compressed(nn.Sequential(nn.Linear(3, 3)), path)
    before = path.read_bytes()
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), CompressedLayer.build({"kind": "broken_linear"}, layer))
    with pytest.raises(OSError, match="no space left"):
        save_compressed(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


class TestDamagedFiles:
    @pytest.fixture
    def artefact(self, path):
        save_compressed(_stack(), path)
        return path

    @pytest.fixture
    def checkpoint(self, tmp_path):
        file = tmp_path / "model.ckpt"
        torch.save({"state_dict": _stack().state_dict()}, file)
        return file

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="There is no file"):
            read_artifact(tmp_path / "nowhere.safetensors")
        with pytest.raises(CheckpointError, match="There is no file"):
            read_checkpoint(tmp_path / "nowhere.ckpt")

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
    def test_truncated(self, artefact, checkpoint, keep):
        for file, read in ((artefact, read_artifact), (checkpoint, read_checkpoint)):
            data = file.read_bytes()
            file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
            with pytest.raises(CheckpointError, match="truncated or no"):
                read(file)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 64])
    def test_foreign(self, tmp_path, content):
        for name, read in (("model.safetensors", read_artifact), ("model.ckpt", read_checkpoint)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                read(tmp_path / name)

    @settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 2**32))
    def test_damaged_bytes_are_refused_or_harmless(self, artefact, seed):
        """A few bytes of the header and the specs are overwritten: one of our errors, or none."""
        generator = random.Random(seed)
        damaged = artefact.with_name("damaged.safetensors")
        data = bytearray(artefact.read_bytes())
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(min(len(data), 3000))] = generator.randrange(256)
        damaged.write_bytes(data)
        try:
            load_compressed(_plain_stack(), damaged)
        except PQuantError as error:
            assert str(error)  # noqa: PT017 (some damage is harmless)

    @pytest.mark.parametrize(
        "structure",
        [b".", b"K\x01Q.", b"ccollections\nOrderedDict\nNR.", b"]K\x05a" + b"r" * 4 + b".", b"}K\x01b."],
        ids=["empty_stack", "storage_id", "call", "memo", "state"],
    )
    def test_damaged_structure_of_a_checkpoint(self, tmp_path, structure):
        file = tmp_path / "model.ckpt"
        torch.save({"state_dict": {}}, tmp_path / "good.ckpt")
        with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(file, "w") as bad:
            for entry in good.namelist():
                bad.writestr(entry, b"\x80\x02" + structure if entry.endswith("data.pkl") else good.read(entry))
        with pytest.raises(CheckpointError, match=r"model\.ckpt"):
            read_checkpoint(file)

    @pytest.mark.parametrize("what", [[1, 2], torch.zeros(2), "text"])
    def test_something_else_in_a_checkpoint(self, tmp_path, what):
        torch.save(what, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint or state dict"):
            read_checkpoint(tmp_path / "model.pt")

    def test_a_plain_safetensors_file_is_a_state_dict(self, path):
        save_file({"weight": torch.ones(2)}, path)
        assert torch.equal(read_artifact(path)[0]["weight"], torch.ones(2))


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


class TestHostileFiles:
    @pytest.mark.parametrize("place", ["state_dict", "callbacks"])
    def test_no_code_is_run_from_a_pickle(self, tmp_path, place):
        marker, file = tmp_path / "ran", tmp_path / "model.ckpt"
        torch.save({"state_dict": {}, place: {"x": Payload(marker)}}, file)
        with pytest.raises(CheckpointError, match="can run code from the file"):
            load_compressed(nn.Linear(2, 2), file)
        assert not marker.exists()

    def test_no_code_is_run_from_a_bare_pickle(self, tmp_path):
        marker, file = tmp_path / "ran", tmp_path / "model.pt"
        file.write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(CheckpointError):
            load_compressed(nn.Linear(2, 2), file)
        assert not marker.exists()

    def test_a_newer_artefact(self, path):
        save_file({"weight": torch.ones(2)}, path, metadata={"version": "2"})
        with pytest.raises(CheckpointError, match="version 2; this release reads up to 1"):
            read_artifact(path)

    @pytest.mark.parametrize("aliases", ["[]", '"x"', "{", '{"a": "nowhere"}'])
    def test_aliases_that_are_none(self, path, aliases):
        save_file({"weight": torch.ones(2)}, path, metadata={"aliases": aliases})
        with pytest.raises(CheckpointError):
            read_artifact(path)

    @pytest.mark.parametrize(
        "metadata",
        [
            {"version": "one"},
            {"aliases": '{"a": ["weight"]}'},
            {"hparams": "no json"},
            {"hparams": "[1, 2]"},
        ],
        ids=["version", "unhashable_alias", "hparams_text", "hparams_list"],
    )
    def test_metadata_of_wrong_types(self, path, metadata):
        save_file(nn.Linear(2, 2).state_dict(), path, metadata=metadata)
        with pytest.raises(PQuantError):
            load_compressed(nn.Linear, path)

    def test_the_header_is_read_by_safetensors_alone(self, path):
        save_compressed(_stack(), path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pquant_lightning"
            assert isinstance(file.get_tensor(next(iter(file.keys()))), Tensor)
