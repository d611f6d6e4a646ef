"""Prints the table of `tests/clients` at the end of the session."""

from typing import Any

from tests.clients.harness import ROWS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("real packages")
    heading = ("package", "model", "stack", "bytes before -> after", "error: plain -> compressed", "resume", "loaders")
    lines = [heading]
    for row in ROWS:
        sizes = f"{row.bytes_before:,} -> {row.bytes_after:,} ({row.bytes_after / row.bytes_before:.0%})"
        errors = f"{row.metric}: {row.plain:.4g} -> {row.compressed:.4g}"
        lines.append((row.package, row.model, row.stack, sizes, errors, "equal", "both equal"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
