"""Every private name of torch and Lightning in use still exists and still does what we use it for."""

import copy
import inspect
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations

from pquant_lightning import compress_model, prepare
from pquant_lightning.core._private import (
    ATTENTION_ATTRIBUTES,
    FULL_BACKWARD_FLAG,
    LAST_STEP_SAVED,
    MODULE_HOOKS,
    MODULE_TABLE,
    OPERATION_SCHEMA,
    TENSOR_TABLES,
    TENSOR_VERSION,
    DispatchMode,
    fbgemm_engine,
    has_vnni,
    launches_copies,
    per_channel_tensor,
    resume_path,
    shallow_copy,
    takes_off_scale,
)
from pquant_lightning.core.attention import UnfusedAttention
from tests.models import MLP


@pytest.mark.parametrize("table", [*MODULE_HOOKS, *TENSOR_TABLES, MODULE_TABLE])
def test_every_module_has_the_table(table):
    assert isinstance(nn.Module().__dict__[table], dict)
    assert isinstance(nn.LSTM(1, 1).__dict__[table], dict)


def test_writing_into_a_tensor_raises_its_version():
    weight = nn.Parameter(torch.zeros(2))
    before = getattr(weight, TENSOR_VERSION)
    with torch.no_grad():
        weight.add_(1)
    assert getattr(weight, TENSOR_VERSION) > before


@pytest.mark.parametrize(
    ("register", "options", "tables"),
    [
        ("register_forward_hook", {}, ["_forward_hooks"]),
        (
            "register_forward_hook",
            {"with_kwargs": True, "always_call": True},
            ["_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"],
        ),
        (
            "register_forward_pre_hook",
            {"with_kwargs": True},
            ["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"],
        ),
        ("register_full_backward_hook", {}, ["_backward_hooks"]),
        ("register_full_backward_pre_hook", {}, ["_backward_pre_hooks"]),
    ],
)
def test_hooks_land_in_the_tables(register, options, tables):
    module = nn.Module()
    handle = getattr(module, register)(lambda *args: None, **options)
    filled = [table for table in MODULE_HOOKS if module.__dict__[table]]
    assert sorted(filled) == sorted(tables)
    handle.remove()
    assert not any(module.__dict__[table] for table in MODULE_HOOKS)


def test_no_table_of_forward_and_backward_hooks_is_missing():
    tables = {name for name in nn.Module().__dict__ if "forward" in name or "backward" in name}
    assert tables == {*MODULE_HOOKS, FULL_BACKWARD_FLAG}


def test_the_flag_tells_full_backward_hooks():
    module = nn.Module()
    assert module.__dict__[FULL_BACKWARD_FLAG] is None
    module.register_full_backward_hook(lambda *args: None)
    assert module.__dict__[FULL_BACKWARD_FLAG] is True


def test_tables_hold_what_their_names_say():
    module = nn.BatchNorm1d(2)
    module.add_module("child", nn.ReLU())
    parameters, buffers = (module.__dict__[table] for table in TENSOR_TABLES)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(module.__dict__[MODULE_TABLE]) == ["child"]


class TestShallowCopy:
    def test_hooks_and_attributes_are_its_own(self):
        module = nn.Linear(2, 2)
        module.seen = []
        twin = shallow_copy(module)
        twin.seen.append(1)
        twin.register_forward_hook(lambda *args: None)
        assert type(twin) is nn.Linear
        assert module.seen == []
        assert not module.__dict__["_forward_hooks"]
        assert twin.weight is module.weight

    def test_it_is_not_hooked_as_its_original_is(self):
        """A load hook is bound to the module it was registered on: it would rebuild the original."""
        module = prepare(nn.Sequential(nn.Linear(2, 2)))
        twin = shallow_copy(module)
        assert module.__dict__["_load_state_dict_pre_hooks"]
        assert not twin.__dict__["_load_state_dict_pre_hooks"]
        twin.load_state_dict(module.state_dict())
        prepare(twin)
        assert twin.__dict__["_load_state_dict_pre_hooks"]

    def test_parametrized_modules_which_refuse_copy(self):
        module = parametrizations.weight_norm(nn.Linear(2, 2))
        with pytest.raises(RuntimeError):
            copy.copy(module)
        twin = shallow_copy(module)
        assert torch.equal(twin.weight, module.weight)

    def test_a_module_in_a_trainer_leaves_the_trainer_behind(self, tmp_path):
        module = MLP()
        module.trainer = _trainer(tmp_path)
        assert shallow_copy(module).__dict__["_trainer"] is None
        assert module.trainer is not None


class Spy(Callback):
    """Notes what `resume_path` says in `setup`."""

    def __init__(self) -> None:
        self.paths: list[str | None] = []

    def setup(self, trainer, pl_module, stage) -> None:
        self.paths.append(resume_path(trainer))


def _trainer(tmp_path, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def test_resume_path_is_the_resolved_path_in_setup(tmp_path):
    spy = Spy()
    trainer = _trainer(tmp_path, spy)
    trainer.fit(MLP(), MLP.loader(), MLP.loader())
    best = trainer.checkpoint_callback.best_model_path
    trainer.test(MLP(), MLP.loader(), ckpt_path="best", verbose=False)
    trainer.validate(MLP(), MLP.loader(), ckpt_path=best, verbose=False)
    again = _trainer(tmp_path, spy, max_epochs=2)
    again.fit(MLP(), MLP.loader(), MLP.loader(), ckpt_path=best)
    assert best
    assert spy.paths == [None, best, best, best]
    assert resume_path(trainer) is None


def test_resume_path_does_not_take_another_trainers(tmp_path):
    seen = []

    class Nested(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(resume_path(_trainer(tmp_path)))

    trainer = _trainer(tmp_path, Spy())
    trainer.fit(MLP(), MLP.loader(), MLP.loader())
    best = trainer.checkpoint_callback.best_model_path
    _trainer(tmp_path, Nested()).test(MLP(), MLP.loader(), ckpt_path=best, verbose=False)
    assert seen == [None]


@pytest.mark.parametrize(
    ("strategy", "copies"),
    [("auto", False), ("ddp", False), ("ddp_spawn", True), ("ddp_fork", True), ("ddp_notebook", True)],
)
def test_strategies_that_launch_copies_are_known(tmp_path, strategy, copies):
    devices = 1 if strategy == "auto" else 2
    assert launches_copies(_trainer(tmp_path, strategy=strategy, devices=devices)) is copies


@pytest.mark.parametrize("name", ["_apply", "_load_from_state_dict"])
def test_torch_calls_what_our_layers_override(name, monkeypatch):
    """`.bfloat16()` goes through `_apply`, `load_state_dict` through `_load_from_state_dict` of every module."""
    calls = []
    original = getattr(nn.Module, name)
    monkeypatch.setattr(nn.Module, name, lambda self, *a, **k: (calls.append(type(self)), original(self, *a, **k))[1])
    model = nn.Sequential(nn.Linear(2, 2))
    if name == "_apply":
        model.bfloat16()
    else:
        model.load_state_dict(model.state_dict())
    assert calls == [nn.Sequential, nn.Linear]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_convolutions_have_a_forward_that_takes_a_weight(dim):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](2, 4, 3, padding=1, padding_mode="circular")
    inputs = torch.randn(1, 2, *[5] * dim)
    assert torch.equal(conv._conv_forward(inputs, conv.weight, conv.bias), conv(inputs))


def test_the_step_at_which_nothing_is_saved_again():
    assert getattr(ModelCheckpoint(), LAST_STEP_SAVED) == 0


def test_a_dispatch_mode_sees_what_torch_executes():
    seen = []

    class Mode(DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert "aten::mm" in seen


def test_encoder_layers_read_nothing_else_of_attention_before_they_leave_the_fast_path():
    sources = inspect.getsource(nn.TransformerEncoderLayer), inspect.getsource(nn.TransformerEncoder)
    read = {name for source in sources for name in re.findall(r"self_attn\.(\w+)", source)}
    of_the_fast_path = {"in_proj_weight", "out_proj", "merge_masks", "embed_dim"}
    assert read == {*ATTENTION_ATTRIBUTES, *of_the_fast_path}
    model = compress_model(nn.Sequential(nn.MultiheadAttention(32, 2)), "qat")
    assert all(hasattr(model[0], name) for name in ATTENTION_ATTRIBUTES)
    assert UnfusedAttention.in_proj_bias is None  # "was passed bias=False": no fast path
    assert UnfusedAttention._qkv_same_embed_dim is False


def test_fused_optimizers_take_the_factor_of_mixed_precision_off():
    weight = nn.Parameter(torch.zeros(2))
    assert [takes_off_scale(torch.optim.Adam([weight], fused=fused)) for fused in (True, False)] == [True, False]


def test_operations_say_what_they_write_to():
    (first, *_) = getattr(torch.ops.aten.add_.Tensor, OPERATION_SCHEMA).arguments
    assert first.alias_info.is_write


def test_codes_are_packed_by_fbgemm_and_the_engine_stays():
    before = torch.backends.quantized.engine
    with fbgemm_engine():
        assert torch.backends.quantized.engine == "fbgemm"
    assert torch.backends.quantized.engine == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to replace its quantized tensors
        packed = per_channel_tensor(torch.tensor([[3, -4]], dtype=torch.int8), torch.tensor([0.5]))
    assert packed.int_repr().tolist() == [[3, -4]]
    assert packed.q_per_channel_scales().tolist() == [0.5]
    assert isinstance(has_vnni(), bool)
