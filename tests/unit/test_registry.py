"""Methods by name: built in, registered by call or decorator, announced by installed packages."""

from pathlib import Path

import pytest
from torch import nn

from pquant_lightning import CompressionMethodRegistry, LayerMethod, LowRankCompression, QATCompression, compress_model
from pquant_lightning.core import registry
from pquant_lightning.core.errors import OptionError, PQuantError
from pquant_lightning.core.registry import ENTRY_POINT_GROUP

pytestmark = pytest.mark.usefixtures("own_registries")


class Mine(LayerMethod):
    """A method of a user."""

    strength: int = 1


def test_the_built_in_methods_are_there():
    assert {"low_rank", "qat"} <= set(CompressionMethodRegistry.list_available())
    assert CompressionMethodRegistry.get_class("low_rank") is LowRankCompression
    assert LowRankCompression().name == "low_rank"


def test_register_as_a_call():
    assert CompressionMethodRegistry.register("mine", Mine) is Mine
    assert "mine" in CompressionMethodRegistry.list_available()
    assert CompressionMethodRegistry.get("mine", {"strength": 3}) == Mine(strength=3)


def test_register_as_a_decorator():
    @CompressionMethodRegistry.register("decorated")
    class Decorated(LayerMethod):
        pass

    assert isinstance(Decorated, type)
    assert CompressionMethodRegistry.get_class("decorated") is Decorated
    assert Decorated().name == "decorated"


def test_options_come_as_a_dict_as_keywords_or_both():
    expected = LowRankCompression(rank=4, min_saving=0.1)
    assert CompressionMethodRegistry.get("low_rank", {"rank": 4, "min_saving": 0.1}) == expected
    assert CompressionMethodRegistry.get("low_rank", rank=4, min_saving=0.1) == expected
    assert CompressionMethodRegistry.get("low_rank", {"rank": 4}, min_saving=0.1) == expected
    assert CompressionMethodRegistry.get("low_rank") == LowRankCompression()
    assert CompressionMethodRegistry.get("low_rank", None) == LowRankCompression()


def test_a_class_under_two_names_keeps_the_first():
    CompressionMethodRegistry.register("svd", LowRankCompression)
    assert isinstance(CompressionMethodRegistry.get("svd", rank=2), LowRankCompression)
    assert LowRankCompression().name == "low_rank"


def test_an_unregistered_method_is_named_by_its_class():
    assert Mine().name == "Mine"


def test_a_name_belongs_to_one_class():
    with pytest.raises(PQuantError, match="'low_rank' is already taken by LowRankCompression"):
        CompressionMethodRegistry.register("low_rank", Mine)
    assert CompressionMethodRegistry.get_class("low_rank") is LowRankCompression
    CompressionMethodRegistry.register("low_rank", LowRankCompression)


@pytest.mark.parametrize("thing", [object(), int, "QATCompression", QATCompression.plan])
def test_only_classes_with_compress_are_methods(thing):
    with pytest.raises(PQuantError, match=r"register\('thing', .*takes a method class with a `compress` method"):
        CompressionMethodRegistry.register("thing", thing)
    assert "thing" not in CompressionMethodRegistry.list_available()


def test_an_unknown_name_lists_the_nearest_first():
    with pytest.raises(PQuantError, match="Unknown compression method: 'lowrank'.*Did you mean 'low_rank'"):
        CompressionMethodRegistry.get("lowrank", {"rank": 4})


def test_options_that_are_no_mapping():
    with pytest.raises(OptionError, match="low_rank.*8"):
        CompressionMethodRegistry.get("low_rank", 8)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a distribution with one module and one entry point on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._announced.cache_clear()

    def install(module: str, code: str, entry_point: str) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry_point}\n")

    yield install
    registry._announced.cache_clear()


PLUGIN = """
from pquant_lightning import LowRankCompression

class RankOne(LowRankCompression):
    rank: int | None = 1
"""


def test_an_installed_package_adds_a_method(install):
    install("pquant_plugin_a", PLUGIN, "rank_one = pquant_plugin_a:RankOne")
    assert "rank_one" in CompressionMethodRegistry.list_available()
    small = compress_model(nn.Sequential(nn.Linear(64, 64)), "rank_one")
    assert small[0].first.out_features == 1
    assert CompressionMethodRegistry.get("rank_one").name == "rank_one"


def test_a_package_that_decorates_its_class_as_well(install):
    code = PLUGIN.replace("class RankOne", '@CompressionMethodRegistry.register("rank_one")\nclass RankOne')
    code = code.replace("import LowRank", "import CompressionMethodRegistry, LowRank")
    install("pquant_plugin_b", code, "rank_one = pquant_plugin_b:RankOne")
    assert CompressionMethodRegistry.get("rank_one").rank == 1


def test_a_package_cannot_take_a_built_in_name(install):
    install("pquant_plugin_c", PLUGIN, "low_rank = pquant_plugin_c:RankOne")
    assert CompressionMethodRegistry.get_class("low_rank") is LowRankCompression


def test_a_broken_package_is_named_and_leaves_the_others_usable(install):
    install("pquant_plugin_d", "import no_such_module", "broken = pquant_plugin_d:Nothing")
    assert CompressionMethodRegistry.get("low_rank", rank=2).rank == 2
    with pytest.raises(PQuantError, match="broken.*pquant_plugin_d"):
        CompressionMethodRegistry.get("broken")
