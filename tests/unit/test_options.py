"""Options: one meaning, one type, one range; a dict and keywords are the same; messages name option, value and rule."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pquant_lightning import LayerMethod, LowRankCompression, QATCompression
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.options import check_count, check_share, check_type, one_of


class _Typed:
    count: int
    share: float
    maybe: int | None
    names: list[str] | None
    sizes: dict[str, int]
    mode: str


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 3),
        ("share", 0.5),
        ("share", 1),
        ("maybe", None),
        ("maybe", 7),
        ("names", ["a", "b"]),
        ("names", None),
        ("names", []),
        ("sizes", {"a": 1}),
    ],
)
def test_values_of_the_annotated_type_pass(name, value):
    check_type(_Typed, name, value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("count", 3.0, "takes int for count, got 3.0 .float."),
        ("count", True, "takes int for count, got True .bool."),
        ("count", "3", "got '3' .str."),
        ("share", "0.5", "takes float for share"),
        ("share", False, "takes float for share"),
        ("maybe", 1.5, "takes int or None for maybe"),
        ("names", "fc*", "for names, got 'fc[*]' .str."),
        ("names", [1], "for names"),
        ("sizes", {"a": "1"}, "for sizes"),
        ("mode", 1, "takes str for mode"),
    ],
)
def test_other_types_are_refused(name, value, rule):
    with pytest.raises(OptionError, match=f"_Typed.*{rule}"):
        check_type(_Typed, name, value)


def test_one_of_gives_the_member_or_the_default():
    assert one_of(_Typed, {"a": 64}, a=None, b=None) == ("a", 64)
    assert one_of(_Typed, {"a": 64}, a=None, b=0.0) == ("b", 0.0)
    with pytest.raises(OptionError, match=r"takes one of a, b; got a=1, b=2\. Remove all but one"):
        one_of(_Typed, {"a": 64}, a=1, b=2)


@pytest.mark.parametrize("value", [1e-9, 0.5, 1])
def test_a_share_may_be_all_but_not_nothing(value):
    check_share(_Typed, "share", value)


@pytest.mark.parametrize("value", [0, -1e-9, 1.0001, math.nan, math.inf])
def test_a_share_outside_is_named(value):
    with pytest.raises(OptionError, match=r"_Typed: share is a share that is kept, in \(0, 1\], got"):
        check_share(_Typed, "share", value)


@pytest.mark.parametrize(("value", "high", "bounds"), [(0, None, "at least 1"), (9, 8, "between 1 and 8")])
def test_a_count_outside_is_named_with_its_bounds(value, high, bounds):
    check_count(_Typed, "count", 1, low=1, high=high)
    with pytest.raises(OptionError, match=f"_Typed: count is a count, {bounds}, got {value}"):
        check_count(_Typed, "count", value, low=1, high=high)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LowRankCompression, {"rnk": 8}, "no option 'rnk'.*Did you mean 'rank'"),
        (LowRankCompression, {"rank": "8"}, "takes int or 'evbmf' or None for rank, got '8'"),
        (LowRankCompression, {"rank": 8.0}, "for rank, got 8.0"),
        (LowRankCompression, {"rank": True}, "for rank, got True"),
        (LowRankCompression, {"rank": 0}, "rank is a count.*got 0"),
        (LowRankCompression, {"rank": -3}, "got -3"),
        (LowRankCompression, {"energy": 0.0}, "energy is a share.*got 0"),
        (LowRankCompression, {"energy": 1.5}, "got 1.5"),
        (LowRankCompression, {"energy": math.nan}, "got nan"),
        (LowRankCompression, {"param_ratio": 2}, "param_ratio is a share.*got 2"),
        (
            LowRankCompression,
            {"rank": 8, "energy": 0.9},
            "one of rank, energy, param_ratio, budget; got rank=8, energy=0.9",
        ),
        (LowRankCompression, {"method": "svdd"}, "no method 'svdd'.*Did you mean 'svd'"),
        (LowRankCompression, {"include": "fc*"}, r"include, got 'fc\*'"),
        (LowRankCompression, {"min_saving": 1.0}, "min_saving.*got 1.0"),
        (LowRankCompression, {"min_saving": -0.1}, "min_saving.*got -0.1"),
        (QATCompression, {"bits": 1}, "bits.*2..8.*got 1"),
        (QATCompression, {"bits": 9}, "got 9"),
        (QATCompression, {"bits": 32}, "got 32"),
        (QATCompression, {"bits": 8.0}, "bits, got 8.0"),
        (QATCompression, {"weight_bits": 12}, "weight_bits.*got 12"),
        (QATCompression, {"act_bits": 0}, "act_bits.*got 0"),
        (QATCompression, {"bits": 16}, "16 bits for weights and inputs would change nothing"),
        (QATCompression, {"bit": 4}, "no option 'bit'.*Did you mean 'bits'"),
    ],
)
def test_bad_options_of_methods(method, options, message):
    for construct in (lambda: method(**options), lambda: method(options)):
        with pytest.raises(OptionError, match=message):
            construct()


@pytest.mark.parametrize("config", ["rank=8", 8, ["rank"]])
def test_one_positional_argument_is_a_dict(config):
    with pytest.raises(OptionError, match="as keywords or as one dict"):
        LowRankCompression(config)


@settings(deadline=None, max_examples=30)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "bits": st.integers(2, 8),
            "weight_bits": st.none() | st.integers(2, 8),
            "act_bits": st.none() | st.sampled_from([2, 8, 16]),
            "include": st.none() | st.lists(st.text(min_size=1), max_size=2),
            "min_saving": st.floats(0, 0.99),
        },
    )
)
def test_dict_keywords_and_config_make_equal_methods(options):
    method = QATCompression(**options)
    assert QATCompression(options) == method
    assert QATCompression(method.config) == method
    assert method.config.items() >= options.items()


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRankCompression(rank=8).rank = 9


@pytest.mark.usefixtures("own_registries")
def test_a_subclass_adds_options_and_keeps_the_base_ones():
    class Extended(LayerMethod):
        factor: float = 2.0

    method = Extended({"factor": 3, "exclude": ["head"]})
    assert (method.factor, method.exclude, method.min_saving) == (3, ["head"], LowRankCompression().min_saving)
    with pytest.raises(OptionError, match="Extended has no option 'factr'.*'factor'"):
        Extended(factr=1)
    with pytest.raises(OptionError, match="Extended takes float for factor"):
        Extended(factor="x")
