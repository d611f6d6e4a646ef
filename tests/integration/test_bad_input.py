"""Bad input: one clear error that names the value, the layer and the remedy; the model stays as it was."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    LowRankCallback,
    PQuantError,
    QATCallback,
    compress_model,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from tests.models import MLP, fit, quiet_trainer


class Untouched:
    """Asserts at its end that a model has the modules and the values it had at its start."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modules = list(self.model.modules())
        self.state = copy.deepcopy(self.model.state_dict())

    def __exit__(self, *_: Any) -> None:
        assert list(self.model.modules()) == self.modules
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor.nan_to_num(), self.state[name].nan_to_num())


def poisoned() -> MLP:
    model = MLP()
    model.head.weight.data[1, 2] = torch.nan
    return model


class Lazy(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.LazyLinear(24)


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (
            MLP,
            lambda: [LowRankCallback(include=["fc9"])],
            r"include pattern 'fc9' .*Did you mean 'fc2'",
        ),
        (
            MLP,
            lambda: [LowRankCallback(exclude=["haed"])],
            r"exclude pattern 'haed' .*Did you mean 'head'",
        ),
        (
            MLP,
            lambda: [LowRankCallback(rank=10**6)],
            r"low_rank changes no layer of MLP:\n  fc1: would not get smaller: .* bytes",
        ),
        (
            MLP,
            lambda: [QATCallback(), LowRankCallback(rank=4)],
            r"callbacks=\[LowRankCallback\(low_rank",
        ),
        (poisoned, lambda: [LowRankCallback(rank=4)], "weight of layer 'head' holds NaN or infinite values"),
        (poisoned, lambda: [QATCallback()], "weight of layer 'head' holds NaN or infinite values"),
    ],
    ids=["include", "exclude", "nothing_to_gain", "order", "nan_low_rank", "nan_qat"],
)
def test_a_fit_that_cannot_be(tmp_path: Path, make: Any, callbacks: Any, message: str) -> None:
    model = make()
    with Untouched(model), pytest.raises(PQuantError, match=message):
        fit(quiet_trainer(tmp_path, callbacks()), model)
    assert "configure_model" not in model.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnak": 4}, "LowRankCompression has no option 'rnak'. Did you mean 'rank'"),
        ({"rank": "4"}, "takes int or 'evbmf' or None for rank, got '4'"),
        ({"rank": 0}, "rank is a count, at least 1, got 0"),
        ({"energy": 1.5}, r"energy is a share that is kept, in \(0, 1\], got 1.5"),
        ({"rank": 4, "energy": 0.9}, "one of rank, energy, param_ratio, budget; got rank=4, energy=0.9"),
        ({"method": "factorisation"}, "has no method 'factorisation'.*'factorization'"),
        ({"method": "factorization", "energy": 0.9}, "FactorizationCompression has no option 'energy'"),
        ({"retract": "orthogonal"}, "has no retract 'orthogonal'.*'orthonormal'"),
        ({"include": "fc1"}, "for include, got 'fc1'"),
        ({"min_saving": 2}, "min_saving is a share"),
    ],
)
def test_options_of_a_callback(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PQuantError, match=message):
        LowRankCallback(**options)


@pytest.mark.parametrize(
    ("name", "value"), [("bits", 1), ("bits", 9), ("weight_bits", 0), ("act_bits", 12), ("bits", 16)]
)
def test_bits(name: str, value: int) -> None:
    with pytest.raises(PQuantError, match=r"2\.\.8"):
        QATCallback(**{name: value})


def test_a_lazy_layer() -> None:
    with pytest.raises(PQuantError, match="'fc2' is a lazy layer that is not built yet: run one batch"):
        compress_model(Lazy(), "low_rank", rank=4)


def test_a_bare_layer() -> None:
    layer = nn.Linear(64, 64)
    with Untouched(layer), pytest.raises(PQuantError, match=r"bare Linear.*torch.nn.Sequential\(layer\)"):
        compress_model(layer, "low_rank", rank=4, inplace=True)


def test_what_is_no_method() -> None:
    with pytest.raises(PQuantError, match="Unknown compression method: 'lowrank'.*Did you mean 'low_rank'"):
        compress_model(MLP(), "lowrank")
    with pytest.raises(PQuantError, match="takes a method's name, a method or a configuration, got 8"):
        compress_model(MLP(), 8)  # type: ignore[arg-type]


def compressed_state() -> dict[str, Any]:
    return compress_model(MLP(), "low_rank", rank=4).state_dict()


def with_spec(name: str, **changes: Any) -> dict[str, Any]:
    state = compressed_state()
    spec = json.loads(bytes(state[f"{name}._extra_state"].tolist()))
    text = json.dumps({**spec, **changes}).encode()
    state[f"{name}._extra_state"] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def huge() -> dict[str, Any]:
    layer = {"type": "Linear", "in_features": 2**40, "out_features": 2**40, "bias": False}
    return with_spec("fc2", layer=layer, rank=2**20)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: with_spec("fc2", kind="os.system"),
            "'fc2' of the checkpoint: unknown kind .*'os.system'",
        ),
        (lambda: with_spec("fc2", layer={"type": "Nothing"}), "'fc2' has type='Nothing' in the checkpoint"),
        (lambda: with_spec("fc2", rank="many"), "spec of layer 'fc2' in the checkpoint is damaged"),
        (lambda: with_spec("fc2", version=99), "'fc2' of the checkpoint has a spec of version 99"),
        (huge, "'fc2' has in_features=1099511627776, out_features=1099511627776 in the checkpoint"),
        (lambda: {f"other.{k}": v for k, v in compressed_state().items()}, "'other.fc1' that this MLP does not have"),
    ],
    ids=["unknown_kind", "unknown_layer", "wrong_type", "newer", "huge", "another_model"],
)
def test_a_hostile_or_foreign_state_dict(state: Any, message: str) -> None:
    model = prepare(MLP())
    given = state()
    with Untouched(model), pytest.raises(PQuantError, match=message):
        model.load_state_dict(given)


def test_an_uncompressed_checkpoint_in_a_compressed_model(tmp_path: Path) -> None:
    plain = quiet_trainer(tmp_path)
    fit(plain, MLP())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    small = compress_model(MLP(), "low_rank", rank=4)
    with Untouched(small), pytest.raises(PQuantError, match=r"2 uncompressed layers.*'fc1'.*then compress"):
        load_compressed(small, tmp_path / "plain.ckpt")
    fresh = MLP()
    with Untouched(fresh), pytest.raises(PQuantError, match=r"without LowRankCallback\(low_rank\).*without ckpt_path"):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), fresh, ckpt_path=tmp_path / "plain.ckpt")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", ["ckpt", "pt"])
def test_no_code_runs_from_a_file(tmp_path: Path, ending: str) -> None:
    hit, file = tmp_path / "hit", tmp_path / f"hostile.{ending}"
    torch.save({"state_dict": {"fc1.weight": Payload(hit)}}, file)
    model = MLP()
    with Untouched(model), pytest.raises(PQuantError, match="objects other than tensors and plain data"):
        load_compressed(model, file)
    with pytest.raises((PQuantError, pickle.UnpicklingError)):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), MLP(), ckpt_path=file)
    assert not hit.exists()


@pytest.mark.parametrize("ending", ["ckpt", "pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 0.99])
def test_truncated_files(tmp_path: Path, ending: str, kept: float) -> None:
    file = tmp_path / f"model.{ending}"
    if ending == "ckpt":
        trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
        fit(trainer, MLP())
        trainer.save_checkpoint(file)
    else:
        save_compressed(compress_model(MLP(), "low_rank", rank=4), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    model = MLP()
    with Untouched(model), pytest.raises(PQuantError, match=f"model.{ending} is truncated or no"):
        load_compressed(model, file)


def test_files_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(PQuantError, match="There is no file .*gone.safetensors"):
        load_compressed(MLP, tmp_path / "gone.safetensors")
    with pytest.raises(PQuantError, match=r"holds no model\.safetensors"):
        load_compressed(MLP, tmp_path)
    with pytest.raises(PQuantError, match="writes .safetensors, .pt or a directory, got 'model.onnx'"):
        save_compressed(MLP(), tmp_path / "model.onnx")


def test_a_finalized_model_is_not_fitted(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [QATCallback()]), MLP())
    final = finalize(model)
    with Untouched(final), pytest.raises(PQuantError, match=r"is finalized.*\.ckpt"):
        fit(quiet_trainer(tmp_path, [QATCallback()]), final)


class Frozen(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch).requires_grad_()


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(PQuantError, match=r"Frozen has no parameter to train.*requires_grad_\(True\)"):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), Frozen())


@pytest.mark.parametrize(
    ("typo", "message"),
    [
        (("rank: 4", "rnk: 4"), "LowRankCallback has no option 'rnk'. Did you mean 'rank'"),
        (("LowRankCallback", "LowRankCallbak"), "has no class 'LowRankCallbak'. Did you mean 'LowRankCallback'"),
        (("rank: 4", "rank: -4"), "rank is a count, at least 1, got -4"),
    ],
    ids=["option", "callback", "value"],
)
def test_a_typo_in_the_yaml(tmp_path: Path, typo: tuple[str, str], message: str) -> None:
    yaml = """
trainer:
  accelerator: cpu
  logger: false
  callbacks: [{class_path: pquant_lightning.LowRankCallback, init_args: {rank: 4}}]
model: {class_path: tests.models.MLP}
"""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.replace(*typo))
    command = [sys.executable, "-m", "pquant_lightning", "fit", "--config", str(config)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
