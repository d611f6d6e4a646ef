"""Configurations in the specification's YAML layout: read, checked, written; no state."""

from pathlib import Path
from typing import Any

import yaml

from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.errors import OptionError, a_or_an
from pquant_lightning.pipelines._settings import Settings


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
        except yaml.constructor.ConstructorError as error:
            tag = str(error.problem).split("'")[1::2][-1:]
            raise OptionError(
                f"{config_path} holds {tag[0] if tag else 'a tag'!r}; a configuration is plain YAML (mappings, lists, "
                "text, numbers) and never names Python objects. Take the tag out."
            ) from error
        except yaml.YAMLError as error:
            raise OptionError(f"{config_path} is no YAML: {error}") from error
        if not isinstance(config, dict):
            raise OptionError(f"{config_path} holds {a_or_an(type(config).__name__)}; a configuration is a mapping.")
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
        Settings.read(config)
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
        return list(Settings.read(config).methods)
