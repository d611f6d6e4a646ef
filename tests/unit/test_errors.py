"""Errors are one family, and an unknown name lists the known ones, nearest first."""

import pytest

from pquant_lightning.core import errors


@pytest.mark.parametrize(
    "child", [errors.OptionError, errors.ModelError, errors.CheckpointError, errors.CallbackOrderError]
)
def test_every_error_is_a_pquant_error_and_a_value_error(child):
    assert issubclass(child, errors.PQuantError)
    assert issubclass(child, ValueError)


def test_known_puts_the_nearest_name_first():
    assert (
        errors.known("enrgy", ["alpha", "rank", "energy"]) == "Did you mean 'energy'? Known: 'energy', 'alpha', 'rank'."
    )


def test_known_suggests_nothing_that_is_not_near():
    assert errors.known("zzz", ["rank", "energy"]) == "Known: 'energy', 'rank'."


def test_known_without_names_says_so():
    assert errors.known("rank", []) == "There are none."


def test_known_shortens_long_lists_but_keeps_the_nearest():
    text = errors.known("layer_19x", [f"layer_{i}" for i in range(30)])
    assert text.startswith("Did you mean 'layer_19'? Known: 'layer_19'")
    assert text.endswith("... (30 in all).")
    assert text.count("'layer_") == 13


def test_known_takes_names_of_any_type():
    assert errors.known(None, ["rank"]) == "Known: 'rank'."
    assert errors.known(3, ["rank"]) == "Known: 'rank'."
