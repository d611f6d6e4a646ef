"""Every private name of torch and Lightning in use, in one place; `tests/unit/test_private.py` fails when one moves."""

import contextlib
import importlib
import sys
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch

# torch 2.13, torch/nn/modules/module.py: the dictionaries behind register_forward_hook and its kin
MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
FULL_BACKWARD_FLAG = "_is_full_backward_hook"

# torch 2.13, torch/nn/modules/module.py: the tables of a module
TENSOR_TABLES = ("_parameters", "_buffers")
MODULE_TABLE = "_modules"

# torch 2.13: the tensor that a tensor is a view of
TENSOR_BASE = "_base"

# torch 2.13, torch/nn/modules/module.py: what `module.compile()` sets; torch/_dynamo/eval_frame.py: what is wrapped
COMPILED_CALL, COMPILED_PART = "_compiled_call_impl", "_orig_mod"

# Lightning 2.6.6, utilities/compile.py: its note in a LightningModule compiled as a whole, and what it replaces there
WHOLE_COMPILED = "_compiler_ctx"
WHOLE_COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")

# torch 2.13: how often a tensor has been written to in place
TENSOR_VERSION = "_version"

# torch 2.13: what an operation takes, and which of it it writes to
OPERATION_SCHEMA = "_schema"

# torch 2.13, torch/nn/modules/module.py and conv.py: methods that our layers override or call where they stand
LAYER_METHODS = ("_apply", "_load_from_state_dict", "_save_to_state_dict", "_conv_forward", "_output_padding")

# torch 2.13, torch/nn/modules/transformer.py: what encoder layers read of attention before they leave their fast path
ATTENTION_ATTRIBUTES = ("batch_first", "in_proj_bias", "_qkv_same_embed_dim", "num_heads")

# Lightning 2.6.6, callbacks/model_checkpoint.py: the step at which nothing is saved a second time
LAST_STEP_SAVED = "_last_global_step_saved"

# Lightning 2.6.6, utilities/parsing.py: the argument that save_hyperparameters was given as a whole, or "kwargs"
HPARAMS_NAME = "_hparams_name"

# torch 2.13: the base of modes that see every operation that torch executes, as FlopCounterMode's
DispatchMode: Any = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode

# torch 2.13, the same file: a block in which such modes see nothing
without_modes: Any = importlib.import_module("torch.utils._python_dispatch")._disable_current_modes

# torch 2.13, torch/utils/_pytree.py: tensors inside of containers, transformers' dataclasses among them
pytree: Any = importlib.import_module("torch.utils._pytree")


def is_compiled_wrapper(module: Any) -> bool:
    """Whether this is what torch.compile puts around a module; known by its name, as importing it takes seconds."""
    return type(module).__name__ == "OptimizedModule" and COMPILED_PART in getattr(module, MODULE_TABLE, ())


def compiled_in_place(wrapper: Any) -> Any:
    """The module inside of such a wrapper, compiled by the same compiler under its own name.

    A class of torch itself, such as nn.Sequential, is compiled through `wrap_inline` only, as the wrapper does it.
    """
    part = getattr(wrapper, MODULE_TABLE)[COMPILED_PART]
    call = part._call_impl
    if type(part).forward.__module__.startswith("torch."):
        call = importlib.import_module("torch._dynamo.external_utils").wrap_inline(call)
    setattr(part, COMPILED_CALL, wrapper.dynamo_ctx(call))
    return part


def shallow_copy(module: Any) -> Any:
    """A module of the same class with attributes and hook tables of its own, and no load hook bound to the original."""
    twin: Any = object.__new__(type(module))  # not copy(): parametrized and sharded modules refuse it
    copied = (dict, list, set)  # what a forward may write into
    twin.__dict__.update({k: copy(v) if type(v) in copied else v for k, v in module.__dict__.items()})
    if "_trainer" in twin.__dict__:
        twin.__dict__["_trainer"] = None
    for table in MODULE_HOOKS:
        twin.__dict__[table] = copy(module.__dict__[table])
    twin.__dict__["_load_state_dict_pre_hooks"] = OrderedDict()
    twin.__dict__.pop("_pquant_hooked", None)
    return twin


def resume_path(trainer: Any) -> str | None:
    """The checkpoint the running fit, validate, test or predict starts from; None outside a run or without one.

    `trainer.ckpt_path` is unset or stale in `setup`: the resolved path ("best", "last", "hpc" included) is only a local
    of `Trainer._run` (Lightning 2.6.6, trainer/trainer.py), so we look for that frame.
    """
    path = _local_of_run(trainer, "ckpt_path")
    return None if path is None else str(path)


def resume_switch(trainer: Any) -> bool | None:
    """The `weights_only` that the running fit, validate, test or predict was given; found as `resume_path` is."""
    switch = _local_of_run(trainer, "weights_only")
    return switch if isinstance(switch, bool) else None


def _local_of_run(trainer: Any, name: str) -> Any:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def averaged_models(trainer: Any) -> list[torch.nn.Module]:
    """The models that WeightAveraging (EMA) and StochasticWeightAveraging keep beside the trained one.

    Lightning 2.6.6, callbacks/weight_averaging.py (an AveragedModel around the copy) and stochastic_weight_avg.py.
    """
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [getattr(model, "module", model) for model in held if isinstance(model, torch.nn.Module)]


def launches_copies(trainer: Any) -> bool:
    """Whether fit runs in processes that get a copy of the model (`ddp_spawn`, `ddp_fork`, `ddp_notebook`).

    Lightning 2.6.6, strategies/launchers/multiprocessing.py; the class is private, so it is known by its name.
    """
    launcher = getattr(trainer.strategy, "launcher", None)
    return any(base.__name__ == "_MultiProcessingLauncher" for base in type(launcher).__mro__)


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int8 `(m, k)` by int8 `(k, n)` to int32 `(m, n)`; torch 2.13: oneDNN on the CPU, cuBLAS on CUDA."""
    return torch._int_mm(a, b)


def has_vnni() -> bool:
    """Whether the processor, as far as torch may use it, multiplies bytes into 32-bit sums; torch 2.13."""
    return bool(torch.cpu._is_vnni_supported())


def per_channel_tensor(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 codes `(out, in)` and scales `(out,)` as the quantized tensor that fbgemm packs; torch 2.13."""
    zeros = torch.zeros(len(codes), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)


@contextlib.contextmanager
def fbgemm_engine() -> Iterator[None]:
    """The engine that packs weights is a setting of the process: fbgemm inside, what it was afterwards; torch 2.13."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def quantized_decomposed() -> Any:
    """The operations that exporters know as QuantizeLinear and DequantizeLinear; torch 2.13 registers them here."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def takes_off_scale(optimizer: Any) -> bool:
    """Whether an optimizer's own step takes the factor of 16-bit precision off the gradients (fused ones).

    torch 2.13, torch/amp/grad_scaler.py, GradScaler.step; Lightning 2.6.6, fabric/plugins/precision/amp.py.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
