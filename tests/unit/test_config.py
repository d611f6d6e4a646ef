"""Configurations: read, checked, written, run; every mistake in a YAML file is one clear error."""

from pathlib import Path

import pytest
import yaml
from torch import nn

from pquant_lightning import ConfigManager, LowRankCompression, QATCompression, compress_model
from pquant_lightning.core.errors import OptionError, PQuantError

FILE = """
compression:
  methods: [low_rank, qat]
  low_rank: {rank: 8, method: svd}
  qat: {bits: 4}
training: {epochs: 10, lr: 0.0001, batch_size: 32}
evaluation:
  metrics: [accuracy, compression_ratio, latency]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(FILE)
    return file


def _compression(**entries):
    return {"compression": entries}


def test_load_reads_the_file(path):
    assert ConfigManager.load_config(path) == yaml.safe_load(FILE)
    assert ConfigManager.load_config(str(path)) == yaml.safe_load(FILE)


def test_load_without_a_path_gives_valid_defaults():
    assert ConfigManager.load_config() == ConfigManager.default_config()
    assert ConfigManager.validate_config(ConfigManager.default_config()) == ConfigManager.default_config()


def test_defaults_are_a_new_copy_each_time():
    ConfigManager.default_config()["compression"]["methods"].clear()
    assert ConfigManager.default_config()["compression"]["methods"]


def test_methods_have_the_options_of_the_file(path):
    methods = ConfigManager.methods(ConfigManager.load_config(path))
    assert methods == [LowRankCompression(rank=8), QATCompression(bits=4)]


def test_a_method_without_options_has_its_defaults():
    assert ConfigManager.methods(_compression(methods=["qat"])) == [QATCompression()]
    assert ConfigManager.methods(_compression(methods=["qat"], qat=None)) == [QATCompression()]


def test_save_and_load_round_trip(path, tmp_path):
    config = ConfigManager.load_config(path)
    ConfigManager.save_config(config, tmp_path / "again.yaml")
    assert ConfigManager.load_config(tmp_path / "again.yaml") == config


def test_save_checks_first(tmp_path):
    with pytest.raises(OptionError, match="bits"):
        ConfigManager.save_config(_compression(methods=["qat"], qat={"bits": 99}), tmp_path / "bad.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("give", [lambda path: path, str, ConfigManager.load_config], ids=["path", "str", "dict"])
def test_a_configuration_is_run(path, give):
    model = compress_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), give(path))
    assert (model[0].kind, model[0].first.kind) == ("low_rank_linear", "quant_linear")
    assert (model[0].spec["rank"], model[0].second.spec["bits"]) == (8, 4)


def test_methods_in_another_order_act_in_the_right_one():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = compress_model(net, _compression(methods=["qat", "low_rank"], low_rank={"rank": 8}))
    assert (model[0].kind, model[0].first.kind) == ("low_rank_linear", "quant_linear")


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("training", {"epoch": 3}, "'training' has no key 'epoch'. Did you mean 'epochs'"),
        ("training", {"epochs": "ten"}, "takes int for epochs, got 'ten'"),
        ("training", {"epochs": 3, "lr": -1.0}, "lr > 0"),
        ("training", [3], "'training' is a mapping"),
        ("evaluation", {"metric": []}, "'evaluation' has no key 'metric'. Did you mean 'metrics'"),
        ("evaluation", {"metrics": "accuracy"}, "metrics is a list of names"),
        ("traning", {}, "Unknown section 'traning' in the configuration. Did you mean 'training'"),
    ],
)
def test_mistakes_in_the_other_sections(section, content, message):
    with pytest.raises(OptionError, match=message):
        ConfigManager.validate_config({**_compression(methods=["qat"]), section: content})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_drop": 0.1}, "goes with monitor"),
        ({"monitor": "val_acc", "max_drop": -1.0}, "at least 0"),
        ({"monitor": "val_acc", "mode": "maximum"}, "mode is 'max' or 'min'"),
        ({"budget": 0.1}, "budget is one entry"),
    ],
)
def test_mistakes_in_what_guards_the_metric(keys, message):
    with pytest.raises(OptionError, match=message):
        ConfigManager.validate_config(_compression(methods=["qat"], **keys))


def test_python_tags_are_refused(tmp_path):
    file = tmp_path / "hostile.yaml"
    file.write_text("compression: !!python/object/apply:os.system ['true']")
    with pytest.raises(OptionError, match="plain YAML .* never names Python objects"):
        ConfigManager.load_config(file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "Missing required key: 'compression'"),
        ({"training": {}}, "Missing required key: 'compression'"),
        ({**_compression(methods=["qat"]), "trainig": {}}, "Unknown section 'trainig'.*Did you mean 'training'"),
        (_compression(), "compression needs methods: a list of method names, got None"),
        (_compression(methods=[]), "compression needs methods"),
        (_compression(methods="qat"), "compression needs methods.*'qat'"),
        ({"compression": None}, "compression needs methods"),
        ({"compression": ["qat"]}, "compression needs methods"),
        (_compression(methods=["low_rnk"]), "'low_rnk'.*Did you mean 'low_rank'"),
        (_compression(methods=["qat"], qta={}), "options for 'qta', which methods does not list.*'qat'"),
        (_compression(methods=["qat"], low_rank={"rank": 8}), "options for 'low_rank', which methods does not list"),
        (_compression(methods=["qat"], qat={"bit": 4}), "no option 'bit'.*Did you mean 'bits'"),
        (_compression(methods=["qat"], qat={"bits": "8"}), "bits, got '8'"),
        (_compression(methods=["low_rank"], low_rank={"rank": 8, "energy": 0.9}), "one of rank, energy"),
    ],
)
def test_mistakes(config, message):
    with pytest.raises(PQuantError, match=message):
        ConfigManager.validate_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_compression(methods=["low_rank"], low_rank=8), "low_rank.*8"),
        (_compression(methods=["low_rank"], low_rank=["rank", 8]), "low_rank"),
        (_compression(methods=[{"low_rank": {"rank": 8}}]), "methods"),
        (_compression(methods=[["low_rank"]]), "methods"),
        (None, "compression"),
    ],
    ids=["number", "list", "nested_dict", "nested_list", "none"],
)
def test_mistakes_of_structure(config, message):
    with pytest.raises(PQuantError, match=message):
        ConfigManager.validate_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compression: [", "is no YAML"),
        ("- a\n- b", "holds a list; a configuration is a mapping"),
        ("", "holds a NoneType"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        ConfigManager.load_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OptionError, match="nowhere.yaml.*No such file"):
        ConfigManager.load_config(tmp_path / "nowhere.yaml")
