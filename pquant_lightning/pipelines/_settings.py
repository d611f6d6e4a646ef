"""The specification's configuration, section by section: what may stand there, and every mistake as one error."""

from dataclasses import dataclass
from typing import Any

from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.errors import OptionError, known
from pquant_lightning.core.options import check_type
from pquant_lightning.core.registry import CompressionMethodRegistry

SECTIONS = ("compression", "training", "evaluation")


@dataclass(frozen=True)
class TrainingSettings:
    """The section `training`: how the compressed model is fine-tuned.

    Attributes:
        epochs: of the fine-tuning; 0 does without.
        lr: learning rate in place of the module's own; None leaves it.
        batch_size: samples per batch in place of the data's own; None leaves it.
    """

    epochs: int = 0
    lr: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "batch_size"):
            check_type(type(self), name, getattr(self, name))
        low = self.epochs < 0 or (self.lr is not None and self.lr <= 0)
        if low or (self.batch_size is not None and self.batch_size < 1):
            raise OptionError(f"training: epochs >= 0, lr > 0 and batch_size >= 1, got {self}.")


@dataclass(frozen=True)
class GuardSettings:
    """What a metric of the model's own validation may lose.

    Attributes:
        monitor: the metric, as `validation_step` logs it.
        max_drop: what it may be worse than before, in its own unit.
        mode: whether more of the metric is better ("max") or less ("min").
    """

    monitor: str | None = None
    max_drop: float | None = None
    mode: str = "max"

    def __post_init__(self) -> None:
        for name in ("monitor", "max_drop", "mode"):
            check_type(type(self), name, getattr(self, name))
        if self.mode not in ("max", "min"):
            raise OptionError(f"mode is 'max' or 'min', got {self.mode!r}.")
        if self.max_drop is not None and (self.monitor is None or self.max_drop < 0):
            raise OptionError(
                "max_drop is at least 0 and goes with monitor='...', the metric of the validation that may lose it; "
                f"got max_drop={self.max_drop}, monitor={self.monitor!r}."
            )


_FOR_COMMANDS = ("model", "data")  # `{class_path, init_args}`, which the command line reads
_GUARD_KEYS = ("monitor", "max_drop", "mode")
_OTHER_KEYS = ("budget", *_GUARD_KEYS)


@dataclass(frozen=True)
class Settings:
    """A whole configuration, checked."""

    methods: tuple[CompressionMethod, ...]
    training: TrainingSettings
    metrics: tuple[str, ...]
    guard: GuardSettings
    budget: dict[str, float] | None

    @classmethod
    def read(cls, config: Any) -> "Settings":
        """Checks a configuration of the specification's layout.

        Raises:
            OptionError: a section or key is missing or unknown, or a value is wrong.
        """
        if not isinstance(config, dict) or "compression" not in config:
            raise OptionError(f"Missing required key: 'compression'. The sections are {', '.join(SECTIONS)}.")
        for section in config:
            sections = (*SECTIONS, *_FOR_COMMANDS)
            if section not in sections:
                raise OptionError(f"Unknown section {section!r} in the configuration. {known(section, sections)}")
        compression = config["compression"]
        names = compression.get("methods") if isinstance(compression, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise OptionError(f"compression needs methods: a list of method names, got {names!r}.")
        for key in compression:
            if key not in ("methods", *_OTHER_KEYS, *names):
                allowed = [*names, *_OTHER_KEYS]
                raise OptionError(
                    f"compression has options for {key!r}, which methods does not list. {known(key, allowed)}"
                )
        budget = compression.get("budget")
        if not (budget is None or (isinstance(budget, dict) and len(budget) == 1)):
            raise OptionError(f"compression: budget is one entry such as {{size: 0.1}}, got {budget!r}.")
        return cls(
            tuple(CompressionMethodRegistry.get(name, compression.get(name)) for name in names),
            TrainingSettings(**_section(config, "training", ("epochs", "lr", "batch_size"))),
            _metrics(_section(config, "evaluation", ("metrics",))),
            GuardSettings(**{key: compression[key] for key in _GUARD_KEYS if key in compression}),
            budget,
        )


def _section(config: dict[str, Any], name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise OptionError(f"The section {name!r} is a mapping with {', '.join(keys)}, got {section!r}.")
    for key in section:
        if key not in keys:
            raise OptionError(f"The section {name!r} has no key {key!r}. {known(key, keys)}")
    return section


def _metrics(section: dict[str, Any]) -> tuple[str, ...]:
    metrics = section.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(metric, str) for metric in metrics):
        raise OptionError(f"evaluation: metrics is a list of names, got {metrics!r}.")
    return tuple(metrics)
