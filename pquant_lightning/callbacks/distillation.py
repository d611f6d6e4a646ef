"""Distillation: the compressed model learns from the uncompressed one, copied before anything is compressed."""

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from pquant_lightning.callbacks.base import BeforeCompression
from pquant_lightning.core.calibration import main_output
from pquant_lightning.core.compressed_layer import compressed_layers, install_hook
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.errors import CheckpointError, ModelError, OptionError, known
from pquant_lightning.core.serialization import read_artifact, read_checkpoint

log = logging.getLogger(__name__)

Loss = Literal["kl", "mse", "cosine"]


def distillation_loss(student: Tensor, teacher: Tensor, loss: Loss, temperature: float = 2.0, dim: int = -1) -> Tensor:
    """How far the student's output is from the teacher's, a scalar.

    Args:
        student: outputs of any shape.
        teacher: of the same shape.
        loss: "kl" is T^2 KL(softmax(teacher / T) || softmax(student / T)) over `dim`, averaged over all else; "mse" the
            mean squared difference; "cosine" 1 - cosine over `dim`, averaged.
        temperature: T.
        dim: of the classes, or of the vectors that are compared.

    Raises:
        ModelError: "kl" or "cosine" with a single entry along `dim`, which says nothing.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(distillation_loss(logits, logits, "kl"))
    0.0
    """
    student, teacher = student.float(), teacher.float()
    if loss == "mse":
        return F.mse_loss(student, teacher)
    if student.dim() == 0 or student.shape[dim] == 1:
        raise ModelError(
            f"Distillation by {loss!r} compares the entries along dimension {dim} of the output, and an output of "
            f"shape {tuple(student.shape)} has one: it would always be zero. For regression take loss='mse'; for "
            "classes along another dimension give class_dim."
        )
    if loss == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=dim).mean()
    wanted, given = (F.log_softmax(logits / temperature, dim=dim) for logits in (teacher, student))
    divergence = F.kl_div(given, wanted, reduction="none", log_target=True).sum(dim).mean()
    return temperature**2 * divergence


class DistillationCallback(BeforeCompression, Callback):
    """Trains towards the outputs of the uncompressed model, beside the module's own loss.

    The loss of the `training_step` becomes (1 - weight) * loss + weight * distillation. The teacher is the model as it
    is before any of our callbacks acts, wherever this one stands in the list; it is frozen, in eval mode, runs on the
    same inputs under the same precision, and is in no checkpoint and no optimizer. A checkpoint holds its fingerprint:
    to resume, the model must have the same weights before it is compressed, or `teacher` must name them.

    Args:
        weight: share of the distillation in the loss, in [0, 1].
        temperature: softens the logits of teacher and student; for "kl".
        loss: "kl" for logits, "mse" or "cosine" for embeddings and regression.
        outputs: name of the submodule whose output is compared; None: the module's own `forward`.
        class_dim: dimension of the classes ("kl") or of the vectors ("cosine").
        features: glob patterns over module names; the outputs of these modules are compared, too: the mean over them of
            |student - teacher|^2 / |teacher|^2, added to the distillation.
        teacher: another teacher: a module that takes the same inputs, or a checkpoint of the uncompressed model.

    Raises:
        OptionError: a value out of range.
        ModelError: nothing to learn from was called in `training_step`; manual optimization; the model is compressed
            already and no teacher is given.
        CheckpointError: a resume with another teacher.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Romero et al., "FitNets", 2015.

    >>> DistillationCallback(temperature=4.0).weight
    0.5
    """

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 2.0,
        *,
        loss: Loss = "kl",
        outputs: str | None = None,
        class_dim: int = -1,
        features: list[str] | None = None,
        teacher: nn.Module | str | None = None,
    ) -> None:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (weight, temperature))
        if not (numbers and 0 <= weight <= 1 and 0 < temperature < math.inf):
            raise OptionError(
                "DistillationCallback: weight is a share in [0, 1] and temperature > 0, got "
                f"weight={weight!r} and temperature={temperature!r}."
            )
        if loss not in ("kl", "mse", "cosine"):
            raise OptionError(f"DistillationCallback has no loss {loss!r}. {known(loss, ('kl', 'mse', 'cosine'))}")
        self.weight, self.temperature, self.loss = weight, temperature, loss
        self.outputs, self.class_dim, self.features = outputs, class_dim, features or []
        self._given = teacher
        self._teacher: nn.Module | None = None
        self._names: list[str] = []
        self._fingerprint = ""
        self._module: LightningModule | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "teacher": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fingerprint and state_dict["teacher"] != self._fingerprint:
            raise CheckpointError(
                "The checkpoint was trained with another teacher than this model as it is before compression. Load the "
                "weights of the uncompressed model into it first, or name them: "
                "DistillationCallback(teacher='dense.ckpt')."
            )

    # -- the teacher -------------------------------------------------------------------------------------------------

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._take_teacher(trainer, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ModelError(
                "DistillationCallback adds to the loss that training_step returns, and under manual optimization it "
                "returns none. Use automatic optimization, or call distillation_loss in your training_step."
            )
        if self._teacher is None:  # no method of ours in this Trainer
            self._take_teacher(trainer, pl_module)

    def _take_teacher(self, trainer: Trainer, module: LightningModule) -> None:
        given = self._given
        if given is None and compressed_layers(module):
            raise ModelError(
                f"{type(module).__name__} is compressed already, so it is no teacher. Name the uncompressed one: "
                "DistillationCallback(teacher=module_or_checkpoint)."
            )
        teacher = given if isinstance(given, nn.Module) else deep_copy(module)
        if isinstance(given, str | Path):
            _load(teacher, Path(given))
        if teacher is given:
            teacher = deep_copy(teacher)
        if trainer.world_size > 1:  # the ranks may have made their models with seeds of their own
            teacher.load_state_dict(trainer.strategy.broadcast(teacher.state_dict()))
        self._teacher = teacher.requires_grad_(False).eval()
        self._fingerprint = fingerprint(teacher)
        self._check_names(teacher, module)

    def _check_names(self, teacher: nn.Module, module: nn.Module) -> None:
        inside = dict(teacher.named_modules())
        shared = [name for name, _ in module.named_modules() if name and name in inside]
        if self.outputs is not None and self.outputs not in shared:
            raise OptionError(f"DistillationCallback: no module {self.outputs!r}. {known(self.outputs, shared)}")
        for pattern in self.features:
            if not any(fnmatchcase(name, pattern) for name in shared):
                raise OptionError(
                    f"DistillationCallback: features pattern {pattern!r} matches no module. {known(pattern, shared)}"
                )
        self._names = [name for name in shared if any(fnmatchcase(name, pattern) for pattern in self.features)]

    # -- the loss ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._teacher is not None
        precision = pl_module.dtype if pl_module.dtype in (torch.float16, torch.bfloat16, torch.float64) else None
        self._teacher.to(pl_module.device, precision)
        self._module = pl_module
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._training_step(pl_module, original, *args, **kwargs)

        pl_module.__dict__["training_step"] = training_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._module is not None:
            self._module.__dict__.pop("training_step", None)
        self._module = self._teacher = None

    def _training_step(self, module: LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self._teacher is not None
        with _recorded(module, self._names) as features, _calls(module, self.outputs) as calls:
            result = step(*args, **kwargs)
        if result is None:  # the user skips this batch
            return None
        if not calls:
            where = "forward" if self.outputs is None else f"module {self.outputs!r}"
            raise ModelError(
                f"DistillationCallback compares the output of the {where} with the teacher's, and training_step never "
                "called it (or the module is compiled). Call self(inputs) there, or name the submodule that it calls: "
                f"DistillationCallback(outputs='...'). {known('', [name for name, _ in module.named_children()])}"
            )
        own = result["loss"] if isinstance(result, Mapping) else result
        distilled = self._distillation(calls, features)
        module.log("pquant/distillation_loss", distilled.detach(), sync_dist=True)
        total = (1 - self.weight) * own + self.weight * distilled
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def _distillation(self, calls: list[tuple[Any, Any, Any]], features: dict[str, list[Tensor]]) -> Tensor:
        teacher = self._teacher
        assert teacher is not None
        target = teacher if self.outputs is None else teacher.get_submodule(self.outputs)
        losses = []
        with _recorded(teacher, self._names) as wanted, torch.no_grad():
            outputs = [main_output(target(*args, **kwargs)) for args, kwargs, _ in calls]
        for (_, _, own), expected in zip(calls, outputs, strict=True):
            losses.append(distillation_loss(main_output(own), expected, self.loss, self.temperature, self.class_dim))
        total = torch.stack(losses).mean()
        pairs = [pair for name in self._names for pair in zip(features[name], wanted[name], strict=True)]
        if pairs:
            total = total + torch.stack([relative_square(own, other) for own, other in pairs]).mean()
        return total


def relative_square(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2, a scalar.

    >>> float(relative_square(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])))
    1.25
    """
    teacher = teacher.float()
    return (student.float() - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)


@contextmanager
def _calls(module: nn.Module, name: str | None) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Arguments, keyword arguments and outputs of the calls of a submodule (None: the module) meanwhile."""
    found: list[tuple[Any, Any, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((args, kwargs, output))

    target = module if name is None else module.get_submodule(name)
    handle = target.register_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _recorded(module: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs of the named modules meanwhile."""
    with ExitStack() as stack:
        calls = {name: stack.enter_context(_calls(module, name)) for name in names}
        found: dict[str, list[Tensor]] = {}
        yield found
        found.update({name: [main_output(output) for _, _, output in own] for name, own in calls.items()})


def fingerprint(model: nn.Module) -> str:
    """A hash of all tensors of a model by name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(teacher: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        state, _ = read_artifact(path)
    else:
        checkpoint = read_checkpoint(path)
        state = checkpoint.get("state_dict", checkpoint)
    install_hook(teacher)
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"The teacher {path} does not fit {type(teacher).__name__}: {error}") from error
