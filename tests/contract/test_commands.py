"""The commands beside fit: what they print, in tables and as JSON, and what they say to a newcomer's mistakes."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.digits import DigitsConvNet
from pquant_lightning import QATCallback, load_compressed, save_compressed
from pquant_lightning._arguments import COMMANDS
from pquant_lightning.cli import main
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.models import MLP, built, fit, quiet_trainer

MODEL = ["--model", "tests.models.MLP"]
DATA = ["--data", "tests.models.SmallData"]
LOW_RANK = ["--method", "low_rank", "--option", "rank=4", "--option", "min_saving=0.0"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*JSONARGPARSE_DEPRECATION_WARNINGS"),
    pytest.mark.filterwarnings("ignore:(?s).*deprecated in v4.49.0"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pquant"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path.cwd())])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Weights of the model, as Lightning writes them."""
    torch.save({"state_dict": built(MLP).state_dict()}, tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.fixture
def small(dense: Path, tmp_path: Path, capsys: Any) -> Path:
    path = tmp_path / "small.safetensors"
    main(["compress", *MODEL, "--ckpt_path", str(dense), *LOW_RANK, "--output", str(path)])
    capsys.readouterr()
    return path


def as_json(capsys: Any, *arguments: str) -> Any:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_plan_says_what_would_happen_and_changes_nothing(dense: Path, capsys: Any) -> None:
    main(["plan", *MODEL, "--ckpt_path", str(dense), *LOW_RANK, "--option", "exclude=[head]"])
    shown = capsys.readouterr().out
    assert "fc1: kind=low_rank_linear, rank=4" in shown
    assert "head: left alone, excluded by 'head'" in shown
    assert "Weight errors are ||W - W'|| / ||W||, estimated" in shown
    data = as_json(capsys, "plan", *MODEL, "--ckpt_path", str(dense), *LOW_RANK)
    layers = {layer["name"]: layer for layer in data["report"]["layers"]}
    weight = built(MLP).fc1.weight.detach()
    values = torch.linalg.svdvals(weight)
    expected = float((values[4:].square().sum() / values.square().sum()).sqrt())
    assert expected - 1e-6 <= layers["fc1"]["error"] < 1.05 * expected  # a bound, without a decomposition
    assert layers["fc1"]["params"] == [16 * 32 + 32, 4 * (16 + 32) + 32]


@pytest.mark.parametrize(
    "method",
    [
        ["low_rank", "rank=4"],
        ["factorization", "rank=4"],
        ["tensor_train"],
        ["unstructured_pruning", "sparsity=0.8"],
        ["ptq", "scheme=dynamic"],
        ["ptq", "weight_bits=4", "scheme=weight_only", "group_size=8", "rounding=nearest"],
    ],
    ids=" ".join,
)
def test_a_dry_run_tells_what_compressing_gives(method: list[str], dense: Path, capsys: Any) -> None:
    name, *options = method
    given = [*MODEL, "--ckpt_path", str(dense), "--method", name]
    for option in [*options, *([] if name == "unstructured_pruning" else ["min_saving=0.0"])]:
        given += ["--option", option]
    planned, made = (as_json(capsys, command, *given)["report"] for command in ("plan", "compress"))
    assert planned["layers"]
    assert planned["size_bytes"] == made["size_bytes"]
    for before, after in zip(planned["layers"], made["layers"], strict=True):
        assert before["error"] == pytest.approx(after["error"], rel=0.05, abs=1e-6)
        assert (before["params"], before["size_bytes"]) == (after["params"], after["size_bytes"])


def test_a_plan_is_written_edited_and_applied(dense: Path, tmp_path: Path, capsys: Any) -> None:
    plan = tmp_path / "plan.json"
    main(["plan", *MODEL, "--ckpt_path", str(dense), *LOW_RANK, "--output", str(plan)])
    data = json.loads(plan.read_text())
    layers = data["plans"][0]["plan"]["layers"]
    next(layer for layer in layers if layer["name"] == "fc1")["spec"]["rank"] = 2
    data["plans"][0]["plan"]["layers"] = [layer for layer in layers if layer["name"] != "head"]
    plan.write_text(json.dumps(data))
    main(["compress", *MODEL, "--ckpt_path", str(dense), "--plan", str(plan), "--output", "small.safetensors"])
    assert "load_compressed(MLP, 'small.safetensors')" in capsys.readouterr().out
    model = load_compressed(MLP, "small.safetensors")
    assert {name: layer.spec["rank"] for name, layer in compressed_layers(model).items()} == {"fc1": 2, "fc2": 4}


def test_several_methods_of_a_fits_yaml(dense: Path, tmp_path: Path, capsys: Any) -> None:
    config = {
        "model": {"class_path": "tests.models.MLP"},
        "data": {"class_path": "tests.models.SmallData"},
        "trainer": {
            "callbacks": [
                {"class_path": "pquant_lightning.LowRankCallback", "init_args": {"rank": 4, "min_saving": 0.0}},
                {"class_path": "PTQCallback"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
            ]
        },
    }
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    data = as_json(capsys, "plan", "--config", "fit.yaml", "--ckpt_path", str(dense))
    assert [entry["method"] for entry in data["plans"]] == ["low_rank", "ptq"]
    assert "fc1.first" in [layer["name"] for layer in data["plans"][1]["plan"]["layers"]]
    Path("plan.json").write_text(json.dumps(data))
    main(["compress", "--config", "fit.yaml", "--ckpt_path", str(dense), "--plan", "plan.json"])
    kinds = {layer.kind for layer in compressed_layers(load_compressed(MLP, "compressed.safetensors")).values()}
    assert kinds == {"low_rank_linear", "int_linear"}


def test_compress_by_a_configuration_with_training(dense: Path, tmp_path: Path, capsys: Any) -> None:
    config = {
        "compression": {"methods": ["low_rank", "ptq"], "low_rank": {"rank": 4}},
        "training": {"epochs": 1},
        "evaluation": {"metrics": ["params"]},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    arguments = ["compress", "--config", "c.yaml", *MODEL, *DATA, "--ckpt_path", str(dense), "--dirpath", "run"]
    found = as_json(capsys, *arguments)
    assert found["size_bytes"] == Path(found["path"]).stat().st_size
    assert found["report"]["size_ratio"] < 0.6
    assert json.loads(Path("run/pipeline.json").read_text())["finished"][0]["name"] == "low_rank+ptq"
    trained = load_compressed(MLP, "compressed.safetensors")
    assert not torch.equal(trained.fc1.second.bias, built(MLP).fc1.bias)


def test_a_run_from_random_weights_goes_on(capsys: Any) -> None:
    compression = {"methods": ["low_rank"], "low_rank": {"rank": 4}}
    Path("c.yaml").write_text(yaml.safe_dump({"compression": compression, "training": {"epochs": 1}}))
    arguments = ["compress", "--config", "c.yaml", *MODEL, *DATA, "--dirpath", "run", "--output"]
    main([*arguments, "first.safetensors"])
    torch.manual_seed(7)
    main([*arguments, "second.safetensors"])
    assert Path("first.safetensors").read_bytes() == Path("second.safetensors").read_bytes()


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 4), (0, True)])
def test_the_seed_of_a_configuration(first: int, second: int, capsys: Any) -> None:
    found = []
    for seed in (first, second):
        callbacks = [{"class_path": "pquant_lightning.LowRankCallback", "init_args": {"rank": 4}}]
        config = {"seed_everything": seed, "trainer": {"callbacks": callbacks}}
        Path("fit.yaml").write_text(yaml.safe_dump(config))
        main(["compress", "--config", "fit.yaml", *MODEL, "--output", f"{len(found)}.safetensors"])
        found.append(Path(f"{len(found)}.safetensors").read_bytes())
    assert (found[0] == found[1]) == ((first, second) != (3, 4))


def test_a_stack_of_methods_with_their_own_options(dense: Path, capsys: Any) -> None:
    """Each --option belongs to the --method before it, and all methods act, in their order."""
    ptq = ["--method", "ptq", "--option", "bits=4", "--option", "scheme=weight_only", "--option", "min_saving=0.0"]
    stacks = [[*LOW_RANK, *ptq], [*ptq, *LOW_RANK]]
    plans = [as_json(capsys, "plan", *MODEL, "--ckpt_path", str(dense), *stack)["plans"] for stack in stacks]
    assert plans[0] == plans[1]
    assert [(entry["method"], entry["config"].get("rank"), entry["config"].get("bits")) for entry in plans[0]] == [
        ("low_rank", 4, None),
        ("ptq", None, 4),
    ]
    main(["compress", *MODEL, "--ckpt_path", str(dense), *stacks[0]])
    layers = compressed_layers(load_compressed(MLP, "compressed.safetensors"))
    assert {layers[name].spec["rank"] for name in ("fc1", "fc2")} == {4}
    assert {layers[name].spec["bits"] for name in ("fc2.first", "fc2.second")} == {4}


def test_the_errors_of_a_plan_that_is_applied_are_those_against_the_given_weights(dense: Path, capsys: Any) -> None:
    given = [*MODEL, "--ckpt_path", str(dense)]
    main(["plan", *given, *LOW_RANK, "--output", "plan.json"])
    main(["compress", *given, "--plan", "plan.json", "--output", "x.safetensors"])
    capsys.readouterr()
    found = as_json(capsys, "compress", *given, "--plan", "plan.json")["report"]
    weights = torch.load(dense)["state_dict"]
    small = load_compressed(MLP, "compressed.safetensors")
    assert [layer["name"] for layer in found["layers"]] == ["fc1", "fc2"]
    for layer in found["layers"]:
        weight, module = weights[f"{layer['name']}.weight"].double(), small.get_submodule(layer["name"])
        product = module.second.weight.detach().double() @ module.first.weight.detach().double()
        assert layer["error"] == pytest.approx(float((weight - product).norm() / weight.norm()), rel=1e-5, abs=1e-6)
    size = Path("compressed.safetensors").stat().st_size
    assert found["file_bytes"][1] == size
    save_compressed(built(MLP), "dense.safetensors")
    assert found["file_bytes"][0] == Path("dense.safetensors").stat().st_size


def test_the_errors_of_a_plan_on_data_are_those_of_the_weights(dense: Path, capsys: Any) -> None:
    """Factors that are fitted to outputs are further from the weights than the truncated SVD."""
    given = [*MODEL, *DATA, "--ckpt_path", str(dense), *LOW_RANK, "--option", "energy=null"]
    planned, made = (as_json(capsys, command, *given)["report"]["layers"] for command in ("plan", "compress"))
    errors = [layer["error"] for layer in planned]
    assert errors == pytest.approx([layer["error"] for layer in made], rel=1e-3)
    weights = torch.load(dense)["state_dict"]
    for layer in planned:
        values = torch.linalg.svdvals(weights[f"{layer['name']}.weight"])
        assert layer["error"] > 1.001 * float((values[4:].square().sum() / values.square().sum()).sqrt())


class Recording(MLP):
    """Notes in which mode it trains; the second epoch is interrupted where there is a file that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.BatchNorm1d(16).eval()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        modes = [self.training, self.fc1.training, self.dropout.training, self.frozen.training]
        Path("modes.json").write_text(json.dumps(modes))
        if Path("interrupt").exists() and self.current_epoch == 1:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


RECORDING = ["--model", "tests.contract.test_commands.Recording", *DATA]


def test_compress_trains_in_training_mode(capsys: Any) -> None:
    torch.save({"state_dict": Recording().state_dict()}, "dense.pt")
    Path("c.yaml").write_text("compression: {methods: [low_rank], low_rank: {rank: 4}}\ntraining: {epochs: 1}\n")
    main(["compress", "--config", "c.yaml", *RECORDING, "--ckpt_path", "dense.pt"])
    assert json.loads(Path("modes.json").read_text()) == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("dirpath", [True, False])
def test_an_interruption_says_how_to_go_on(dirpath: bool, capsys: Any) -> None:
    Path("c.yaml").write_text("compression: {methods: [low_rank], low_rank: {rank: 4}}\ntraining: {epochs: 2}\n")
    Path("interrupt").touch()
    place = ["--dirpath", "run"] if dirpath else []
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, said = failing(capsys, "compress", "--config", "c.yaml", *RECORDING, *place)
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning has switched off
    assert code == 130
    assert ("run holds what was done" if dirpath else "With --dirpath DIR") in said
    if dirpath:
        Path("interrupt").unlink()
        data = as_json(capsys, "compress", "--config", "c.yaml", *RECORDING, *place)
        assert Path(data["path"]).exists()


def test_compress_by_one_budget_alone(dense: Path, capsys: Any) -> None:
    found = as_json(capsys, "compress", *MODEL, *DATA, "--ckpt_path", str(dense), "--budget", "size=0.5")
    assert found["report"]["size_ratio"] <= 0.5


def test_compress_by_one_budget(dense: Path, capsys: Any) -> None:
    options = ["--method", "ptq", "--option", "scheme=weight_only", "--option", "min_saving=0.0"]
    found = as_json(capsys, "compress", *MODEL, *DATA, "--ckpt_path", str(dense), *options, "--budget", "size=0.4")
    assert found["report"]["size_ratio"] <= 0.4


def test_evaluate_benchmark_and_report(dense: Path, small: Path, capsys: Any) -> None:
    both = [*MODEL, *DATA, "--ckpt_path", str(dense), "--compressed", str(small)]
    data = as_json(capsys, "evaluate", *both, "--metric", "params", "--metric", "val_loss", "--metric", "output_error")
    assert data["metrics"]["params"]["before"] == sum(p.numel() for p in built(MLP).parameters())
    assert data["metrics"]["params"]["after"] < data["metrics"]["params"]["before"]
    assert 0.01 < data["metrics"]["output_error"]["after"] < 2
    assert data["metrics"]["val_loss"]["before"] > 0
    timed = as_json(capsys, "benchmark", *both)
    assert set(timed["models"]) == {"original", "compressed"}
    found = as_json(capsys, "report", *both, "--metric", "val_loss", "--output", "page")
    assert "val_loss" in found["summary"]
    assert "low rank 4" in Path("page/compression_report.html").read_text()
    again = as_json(capsys, "report", "--run", "page", "--output", "again")
    assert again["summary"] == found["summary"]
    size = small.stat().st_size
    assert f"{size:,} bytes" in found["summary"]
    for ending, start in ((".html", "<!DOCTYPE html>"), (".md", "### MLP"), (".json", "{")):
        shown = as_json(capsys, "report", "--run", "page", "--output", f"sub/r{ending}")
        assert shown["path"] == f"sub/r{ending}"
        assert Path(shown["path"]).read_text().startswith(start)
    assert sorted(path.name for path in Path("sub").iterdir()) == ["r.html", "r.json", "r.md"]


def test_the_default_figures_of_evaluate(dense: Path, capsys: Any) -> None:
    """A file a quarter as large has about as many parameters, so both are told."""
    ptq = [
        "--method",
        "ptq",
        "--option",
        "scheme=weight_only",
        "--option",
        "min_saving=0.0",
        "--model_arg",
        "width=512",
    ]
    torch.save({"state_dict": MLP(width=512).state_dict()}, "wide.pt")
    main(["compress", *MODEL, "--ckpt_path", "wide.pt", *ptq])
    save_compressed(MLP(width=512), "wide.safetensors")
    capsys.readouterr()
    wide = [*MODEL, *DATA, "--model_arg", "width=512", "--ckpt_path", "wide.pt"]
    found = as_json(capsys, "evaluate", *wide, "--compressed", "compressed.safetensors")["metrics"]
    assert list(found) == ["accuracy", "compression_ratio", "size", "latency"]
    files = [Path(name).stat().st_size for name in ("wide.safetensors", "compressed.safetensors")]
    assert [found["size"]["before"], found["size"]["after"]] == files
    assert found["compression_ratio"]["unit"] == "parameters before / after"


def test_analyze(dense: Path, capsys: Any) -> None:
    data = as_json(capsys, "analyze", *MODEL, *DATA, "--ckpt_path", str(dense), "--sensitivity")
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers["fc1"]["params"] == 16 * 32 + 32
    assert "low_rank" in layers["fc1"]["candidates"]
    assert layers["fc1"]["macs"] == 16 * 32  # of one sample, though the batches have more
    main(["analyze", *MODEL, "--model_arg", "width=48", "--no_spectra"])
    shown = capsys.readouterr().out
    assert "compress first" in shown
    assert "MACs per sample" in shown


# -- mistakes ----------------------------------------------------------------------------------------------------------


def failing(capsys: Any, *arguments: str) -> tuple[Any, str]:
    """Exit code, and what was said."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compres"], 2, "there is no command 'compres'. Did you mean 'compress'"),
        (["plan", "--modle", "x"], 2, "unrecognized arguments: --modle"),
        (["evaluate", *MODEL], 2, "--compressed"),
        (["plan"], 2, "No model was named"),
        (["plan", *MODEL], 2, "Nothing says how to compress"),
        (["plan", "--model", "tests.models.MPL"], 2, "no class 'MPL'. Did you mean 'MLP'"),
        (["plan", "--model", "nowhere.Net"], 2, "'nowhere.Net' cannot be imported"),
        (["plan", *MODEL, "--model_arg", "widht=3"], 2, "no argument 'widht'. Did you mean 'width'"),
        (["plan", *MODEL, "--model_arg", "width"], 2, "key=value"),
        (["plan", *MODEL, "--method", "low_rnk"], 2, "Did you mean 'low_rank'"),
        (["plan", *MODEL, "--method", "low_rank", "--option", "rnk=3"], 2, "no option 'rnk'. Did you mean 'rank'"),
        (["plan", *MODEL, "--option", "rank=3"], 2, "goes with the --method before it"),
        (["plan", *MODEL, "--option", "rank=3", "--method", "low_rank"], 2, "goes with the --method before it"),
        (["plan", *MODEL, "--method", "low_rank"], 1, "changes no layer of MLP"),
        (["plan", *MODEL, "--config", "none.yaml"], 2, "cannot be read"),
        (["plan", *MODEL, "--ckpt_path", "none.ckpt", *LOW_RANK], 2, "none.ckpt"),
        (["compress", *MODEL, "--plan", "none.json"], 2, "none.json"),
        (["compress", *MODEL, *DATA, "--method", "qat"], 2, "qat must be trained: give a YAML"),
        (["compress", *MODEL, *DATA, *LOW_RANK, "--budget", "sise=0.1"], 2, "Did you mean 'size'"),
        (["compress", *MODEL, *DATA, *LOW_RANK, "--budget", "size"], 2, "size=0.1"),
        (["compress", *MODEL, *LOW_RANK, "--budget", "size=0.5"], 2, "give run a train_loader"),
        (["compress", *MODEL, *LOW_RANK, "--output", "a.onnx"], 2, "pquant export writes other formats"),
        (["report"], 2, "--run DIR, or --compressed FILE"),
        (["report", *MODEL, "--compressed", "x", "--output", "page.pdf"], 2, "ends in .html, .md, .json"),
        (["export", *MODEL, "--output", "a.pt2", "--format", "onnx"], 2, "'a.pt2' is that of 'pt2'"),
        (["export", *MODEL, "--output", "a.onnx", "--format", "openvino"], 2, "OpenVINO reads ONNX"),
        (["export", *MODEL, *DATA, "--output", "a.onnx", "--target", "arm"], 2, "no target 'arm'"),
        (["fit", *MODEL, "--trainer.max_epochz=1"], 2, "Did you mean 'max_epochs'"),
        (["fit", *MODEL, *DATA, "--trainer.callbacks+=LowRankCallback", "--trainer.callbacks.rank=0"], 2, "rank"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], code: int, message: str, capsys: Any) -> None:
    found, said = failing(capsys, *arguments)
    assert message in said
    assert found == code
    assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"pquant {command}" in shown
    assert "example:" in shown
    assert "--json" in shown


def test_the_overview_names_all_commands(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*COMMANDS, "fit", "validate", "test", "predict"))


# -- compressed files in LightningCLI's own commands -----------------------------------------------------------------


def test_compressed_files_are_tested_without_callbacks(tmp_path: Path) -> None:
    callback = QATCallback(bits=8)
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=1)
    model = fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    save_compressed(model, tmp_path / "int8.safetensors")
    for name in ("qat.ckpt", "int8.safetensors"):
        for command in ("test", "validate"):
            quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
            main([command, *MODEL, *DATA, "--ckpt_path", str(tmp_path / name), *quiet])


def test_the_configuration_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    repository = Path(__file__).parents[2]
    config = yaml.safe_load((repository / "configs/pipeline/digits.yaml").read_text("utf-8"))
    config["training"]["epochs"] = 1
    Path("digits.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.syspath_prepend(str(repository))
    data = as_json(capsys, "compress", "--config", "digits.yaml", "--output", "digits.safetensors")
    assert data["report"]["size_ratio"] < 0.35
    kinds = {layer.kind for layer in compressed_layers(load_compressed(DigitsConvNet, data["path"])).values()}
    assert kinds >= {"low_rank_conv", "int_conv2d"}
    found = as_json(capsys, "evaluate", "--config", "digits.yaml", "--compressed", "digits.safetensors")
    assert {"accuracy", "latency"} <= set(found["metrics"])


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_export(kind: str, dense: Path, capsys: Any) -> None:
    given = [*MODEL, *DATA, "--ckpt_path", str(dense), "--output", f"net.{kind}"]
    data = as_json(capsys, "export", *given)
    assert data["format"] == kind  # as the ending says
    assert Path(data["path"]).stat().st_size == data["size_bytes"]
    assert data["max_error"] < 1e-5
    assert failing(capsys, "export", *given)[0] == 1
    if kind == "onnx":
        assert as_json(capsys, "export", *given, "--overwrite", "--target", "vnni")["target"] == "vnni"
    main(["export", *given, "--overwrite", "--dynamic_axes", "{x: {0: samples}}", "--no_verify"])
    assert "float weights" in capsys.readouterr().out
