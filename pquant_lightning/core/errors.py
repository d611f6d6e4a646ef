"""The errors a user meets, and the one way to say "unknown name, did you mean ...?"."""

import difflib
from collections.abc import Iterable


class PQuantError(ValueError):
    """Base of every error this package raises on purpose. The message says what was given, the rule, the remedy."""


class OptionError(PQuantError):
    """An option has a wrong name, type or value."""


class ModelError(PQuantError):
    """The model cannot be compressed as asked (no layer matched, NaN weights, lazy layers, nothing to train)."""


class NothingToCompressError(ModelError):
    """A method would change no layer; the message gives the reason for each."""


class CheckpointError(PQuantError):
    """A file is damaged, foreign, hostile, or does not fit the model or the callbacks."""


class CalibrationError(PQuantError):
    """The calibration data are empty, do not fit the model, or make it give values that are not finite."""


class BudgetError(PQuantError):
    """A budget over layers cannot be met, or what it is shared among is not well defined."""


class CallbackOrderError(PQuantError):
    """The callbacks stand in an order in which they would undo or miss each other's work."""


def counted(count: int, noun: str) -> str:
    """A number of things in words.

    >>> counted(1, "layer"), counted(14, "layer")
    ('1 layer', '14 layers')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def a_or_an(word: str) -> str:
    """A word with its article.

    >>> a_or_an("Embedding"), a_or_an("Linear")
    ('an Embedding', 'a Linear')
    """
    spelled = word.startswith(("LSTM", "RNN", "MLP"))  # read letter by letter
    return f"an {word}" if spelled or word[:1].lower() in tuple("aeio") else f"a {word}"


def known(name: object, names: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest name, then all known ones, nearest first.

    >>> known("rnk", ["energy", "rank"])
    "Did you mean 'rank'? Known: 'rank', 'energy'."
    """
    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if not names:
        return "There are none."
    ordered = [*near, *(n for n in names if n not in near)]
    shown = ", ".join(map(repr, ordered[:12])) + (f", ... ({len(ordered)} in all)" if len(ordered) > 12 else "")
    return f"Did you mean {near[0]!r}? Known: {shown}." if near else f"Known: {shown}."


def named(names: Iterable[str], most: int = 5) -> str:
    """The names of layers in a sentence; of many, some and their number.

    >>> named(["fc"]), named(["a", "b"]), named("abcd", most=2)
    ("layer 'fc'", "2 layers ('a', 'b')", "4 layers ('a', 'b', ...)")
    """
    found = list(names)
    shown = ", ".join(map(repr, found[:most])) + (", ..." if len(found) > most else "")
    return f"layer {shown}" if len(found) == 1 else f"{len(found)} layers ({shown})"
