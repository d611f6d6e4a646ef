"""Every callback by short name in YAML and on the command line, with help for every option."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from pquant_lightning import load_compressed
from pquant_lightning.cli import main
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.contract.table import TABLE, Options, specs_of
from tests.models import MLP

pytestmark = [  # Lightning 2.6 on jsonargparse 4.53
    pytest.mark.filterwarnings("ignore:(?s).*JSONARGPARSE_DEPRECATION_WARNINGS"),
    pytest.mark.filterwarnings("ignore:(?s).*deprecated in v4.49.0"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]

ROWS = [(name, options) for name, entry in TABLE.items() for options in entry.rows]
over_rows = pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{n}-{dict(o)}" for n, o in ROWS])
over_names = pytest.mark.parametrize("name", TABLE)


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's arguments are not ours, and `main` adds the working directory to the path."""
    monkeypatch.setattr(sys, "argv", ["pquant"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def callback_of(name: str) -> str:
    callback: Any = TABLE[name].callback
    return callback.__name__


def parsed(*arguments: str) -> list[Any]:
    """The callbacks that LightningCLI makes of the arguments."""
    cli = LightningCLI(MLP, args=[*arguments, "--trainer.logger=false"], run=False, save_config_callback=None)
    return cli.trainer.callbacks


@over_rows
def test_arguments_make_the_callback(name: str, options: Options) -> None:
    given = [f"--trainer.callbacks.{key}={value}" for key, value in options.items()]

    callback = next(c for c in parsed(f"--trainer.callbacks+={callback_of(name)}", *given) if hasattr(c, "method"))

    assert callback.method == TABLE[name].callback(**options).method


def test_callbacks_are_stacked_by_arguments() -> None:
    callbacks = parsed(
        "--trainer.callbacks+=LowRankCallback",
        "--trainer.callbacks.rank=2",
        "--trainer.callbacks+=QATCallback",
        "--trainer.callbacks.bits=4",
    )

    methods = [callback.method for callback in callbacks if hasattr(callback, "method")]
    assert [method.name for method in methods] == ["low_rank", "qat"]
    assert methods[0].rank == 2
    assert methods[1].bits == 4


@over_rows
def test_yaml_makes_the_callback(name: str, options: Options, tmp_path: Path) -> None:
    path = write_config(tmp_path, [{"class_path": callback_of(name), "init_args": {**options, "name": "mine"}}])

    callback = next(c for c in parsed(f"--config={path}") if hasattr(c, "method"))

    assert callback.method == TABLE[name].callback(**options).method
    assert callback.name == "mine"


def write_config(directory: Path, callbacks: list[dict[str, Any]], **sections: Any) -> Path:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = {**quiet, "max_epochs": 1, "default_root_dir": str(directory), "callbacks": callbacks}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer, **sections}))
    return path


@over_names
def test_help_prints_every_option_with_its_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    callback: Any = TABLE[name].callback
    method = type(callback(**TABLE[name].rows[0]).method)
    options = [field.name for field in dataclasses.fields(method)]
    assert len(options) > 3

    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--trainer.callbacks.help={callback.__name__}"])

    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines may end at a hyphen
    assert stopped.value.code == 0
    for option in [*options, "name", "reset_monitors"]:
        documented = docstring_of(callback if option in ("name", "reset_monitors") else method, option)
        assert f".{option} " in printed
        assert documented.replace("- ", "-") in printed


def docstring_of(documented: Any, option: str) -> str:
    """The text of one option in the `Args:` of a docstring, on one line."""
    args = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", documented.__doc__, re.DOTALL)
    assert args is not None
    text = re.search(rf"^ {{8}}{option}: (.*?)(?=^ {{8}}\S|\Z)", args[1], re.DOTALL | re.MULTILINE)
    assert text is not None, f"{documented.__name__} does not document {option}"
    return " ".join(text[1].split())


@over_names
def test_a_typo_is_answered_with_the_nearest_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = dataclasses.fields(type(TABLE[name].callback(**TABLE[name].rows[0]).method))[-1].name
    typo = f"--trainer.callbacks.{option}z=1"

    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model=tests.models.MLP", f"--trainer.callbacks+={callback_of(name)}", typo])

    assert stopped.value.code != 0
    assert f"Did you mean {option!r}" in f"{stopped.value.code}{capsys.readouterr().err}"


def test_pquant_fits_a_stack_and_resumes(tmp_path: Path) -> None:
    stack = [
        {"class_path": "LowRankCallback", "init_args": {"rank": 2}},
        {"class_path": "QATCallback", "init_args": {"bits": 4}},
    ]
    model = {"class_path": "tests.models.MLP", "init_args": {"width": 48}}
    config = write_config(tmp_path, stack, model=model, data={"class_path": "tests.models.SmallData"})

    main(["fit", f"--config={config}"])
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    main(["fit", f"--config={config}", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"])
    main(["test", f"--config={config}", f"--ckpt_path={checkpoint}"])

    assert load_compressed(MLP, checkpoint).hparams.width == 48
    deployed = load_compressed(MLP, tmp_path / "compressed.safetensors")
    assert deployed.hparams.width == 48
    assert specs_of(deployed)["fc1"]["kind"] == "low_rank_linear"
    assert specs_of(deployed)["fc1.second"]["bits"] == 4


def test_the_command_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    callback = {"class_path": "QATCallback", "init_args": {"bits": 8}}
    config = write_config(tmp_path, [callback], data={"class_path": "tests.models.SmallData"})
    command = [sys.executable, "-m", "pquant_lightning", "fit", f"--config={config}", "--model=tests.models.MLP"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    assert done.returncode == 0, done.stderr
    assert "load_compressed(MLP" in done.stderr
    assert compressed_layers(load_compressed(MLP, tmp_path / "compressed.safetensors"))


@over_names
def test_help_in_python_shows_the_options_with_their_texts(name: str) -> None:
    """`help(QATCallback)`: the options stand in the docstring of the callback as in that of the method."""
    callback: Any = TABLE[name].callback
    method = type(callback(**TABLE[name].rows[0]).method)
    shown = inspect.getdoc(callback)
    assert shown is not None
    assert "**options" not in shown
    for field in dataclasses.fields(method):
        owner = next(c for c in method.__mro__ if f"\n        {field.name}: " in (c.__dict__.get("__doc__") or ""))
        assert f"{field.name}: {docstring_of(owner, field.name)}" in " ".join(shown.split())
