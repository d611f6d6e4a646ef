"""Configurations in the specification's YAML layout: read, checked, written; no state."""

from pathlib import Path
from typing import Any

import yaml

from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.errors import OptionError, known
from pquant_lightning.core.registry import CompressionMethodRegistry

_SECTIONS = ("compression", "training", "evaluation")


class ConfigManager:
    """Loads, checks and saves configurations such as

    ```yaml
    compression:
      methods: [low_rank, quantization]
      low_rank: {rank: 64, method: svd}
      quantization: {bits: 8, method: ptq}
    training: {epochs: 10, lr: 0.0001, batch_size: 32}
    evaluation: {metrics: [accuracy, compression_ratio, latency]}
    ```

    >>> ConfigManager.validate_config(ConfigManager.load_config())["compression"]["methods"]
    ['low_rank', 'quantization']
    """

    @staticmethod
    def load_config(config_path: str | Path | None = None) -> dict[str, Any]:
        """Reads a YAML file, or gives the defaults.

        Raises:
            OptionError: the file is missing, no YAML, or not a mapping.
        """
        if config_path is None:
            return ConfigManager.default_config()
        try:
            config = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"The configuration {str(config_path)!r} cannot be read: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise OptionError(f"{config_path} is no YAML: {error}") from error
        if not isinstance(config, dict):
            raise OptionError(f"{config_path} holds a {type(config).__name__}; a configuration is a mapping.")
        return config

    @staticmethod
    def default_config() -> dict[str, Any]:
        """A new copy of the default configuration."""
        return {
            "compression": {
                "methods": ["low_rank", "quantization"],
                "low_rank": {"rank": 64, "method": "svd"},
                "quantization": {"bits": 8, "method": "ptq"},
            },
            "training": {"epochs": 10, "lr": 1e-4, "batch_size": 32},
            "evaluation": {"metrics": ["accuracy", "compression_ratio", "latency"]},
        }

    @staticmethod
    def validate_config(config: dict[str, Any]) -> dict[str, Any]:
        """Checks sections, method names and every option; returns the configuration.

        Raises:
            OptionError: a key is missing or unknown, or an option has a wrong value.
        """
        ConfigManager.methods(config)
        return config

    @staticmethod
    def save_config(config: dict[str, Any], config_path: str | Path) -> None:
        """Checks a configuration and writes it as YAML.

        Raises:
            OptionError: as `validate_config`.
        """
        text = yaml.safe_dump(ConfigManager.validate_config(config), sort_keys=False)
        Path(config_path).write_text(text, encoding="utf-8")

    @staticmethod
    def methods(config: dict[str, Any]) -> list[CompressionMethod]:
        """The configured methods, in the order of `compression: methods`.

        Raises:
            OptionError: as `validate_config`.
        """
        if not isinstance(config, dict) or "compression" not in config:
            raise OptionError(f"Missing required key: 'compression'. The sections are {', '.join(_SECTIONS)}.")
        for section in config:
            if section not in _SECTIONS:
                raise OptionError(f"Unknown section {section!r} in the configuration. {known(section, _SECTIONS)}")
        compression = config["compression"]
        names = compression.get("methods") if isinstance(compression, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise OptionError(f"compression needs methods: a list of method names, got {names!r}.")
        for key in compression:
            if key != "methods" and key not in names:
                raise OptionError(
                    f"compression has options for {key!r}, which methods does not list. {known(key, names)}"
                )
        return [CompressionMethodRegistry.get(name, compression.get(name)) for name in names]
