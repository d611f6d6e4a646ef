"""No method without its row."""

from pquant_lightning import CompressionMethodRegistry
from tests.contract.table import TABLE, registered_methods


def test_every_registered_method_has_a_row() -> None:
    assert set(registered_methods()) == set(TABLE), "give each method an entry in tests/contract/table.py"


def test_every_entry_has_rows_a_lossless_setting_and_a_ladder() -> None:
    for name, method in TABLE.items():
        assert method.rows, name
        assert method.lossless, name
        assert len(method.ladder) > 1 or method.merges, name


def test_every_entry_uses_the_callback_of_its_method() -> None:
    for name, entry in TABLE.items():
        method = entry.callback(**entry.rows[0]).method
        assert type(method) is CompressionMethodRegistry.get_class(name)
