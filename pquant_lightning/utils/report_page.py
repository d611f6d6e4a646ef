"""What a compression did on one page: HTML that needs nothing else, Markdown for a pull request, JSON to build both."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pquant_lightning.core.errors import CheckpointError, OptionError
from pquant_lightning.core.plan import Skip
from pquant_lightning.core.report import HEADINGS, CompressionReport, LayerReport
from pquant_lightning.core.serialization import atomic_file

NAME = "compression_report"
_VERSION = 1
_HEADINGS = tuple(heading if heading.startswith("MAC") else heading.lower() for heading in HEADINGS)
Pair = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """One figure before and after; None where it is not known before. The summary names those of the `headline`."""

    name: str
    before: float | None
    after: float
    unit: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Figure:
    """One plot: a caption, and the SVG element."""

    caption: str
    svg: str


@dataclass(frozen=True)
class ReportPage:
    """All that the page shows.

    Attributes:
        title: of the page, e.g. the model's class.
        report: parameters, bytes, MACs and errors by layer.
        metrics: figures before and after, e.g. latency and the validation metrics.
        curves: metrics over training, `(step, value)` pairs by name.
        moments: what happened at which step.
        configuration: the methods with their options, as plain data.
        commands: lines of code or shell by what they are for.
        figures: plots.
        note: why something is missing.
    """

    title: str
    report: CompressionReport
    metrics: Sequence[Metric] = ()
    curves: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    moments: Mapping[str, float] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    note: str = ""

    @property
    def summary(self) -> str:
        """What was reached, in one sentence.

        >>> report = CompressionReport((), (), (100, 50), (400, 100), None)
        >>> ReportPage("Net", report, [Metric("latency", 4.0, 2.0, "ms")]).summary
        'Net is 4.0 times smaller (400 → 100 bytes of tensors) and 2.0 times faster.'
        """
        before, after = self.report.file_bytes or self.report.size_bytes
        of = "" if self.report.file_bytes is not None else " of tensors"
        parts = [f"{self.title} is {_times(before, after)} ({before:,} → {after:,} bytes{of})"]
        latency = next((m for m in self.metrics if m.name == "latency" and m.before), None)
        if latency is not None and latency.before is not None:
            ratio = latency.before / latency.after
            word = "faster" if ratio >= 1 else "slower"
            parts.append(f"{max(ratio, 1 / ratio):.1f} times {word}")
        shown = [
            f"{m.name} {_number(m.after)}" if m.before is None else f"{m.name} {_number(m.before)} → {_number(m.after)}"
            for m in self.metrics
            if m.headline
        ]
        return " and ".join(parts) + ("; " + ", ".join(shown) if shown else "") + "."

    # -- forms ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal page."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ReportPage":
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: the text is no report, or of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != _VERSION:
                raise CheckpointError(f"The report is of another version than {_VERSION}, which this release reads.")
            report = data.pop("report")
            data["metrics"] = tuple(Metric(**metric) for metric in data["metrics"])
            data["figures"] = tuple(Figure(**figure) for figure in data["figures"])
            data["curves"] = {k: [tuple(pair) for pair in pairs] for k, pairs in data["curves"].items()}
            return cls(report=_report_from(report), **data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"This text is no compression report ({error!r}).") from error

    def to_markdown(self) -> str:
        """Tables for a pull request."""
        lines = [f"### {_cell(self.title)}", "", _cell(self.summary), ""]
        if self.metrics:
            lines += ["| | before | after | |", "|---|---:|---:|---|"]
            rows = [(m.name, _number(m.before), _number(m.after), m.unit) for m in self.metrics]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
            lines.append("")
        headings = ("layer", "method", *_HEADINGS)
        lines += [f"| {' | '.join(headings)} |", "|---|---|---:|---:|---:|---:|"]
        for row in _rows(self.report):
            first = f"**{row[0]}**" if row[0] == "whole model" else _cell(row[0])
            lines.append(f"| {' | '.join([first, *map(_cell, row[1:])])} |")
        if self.report.skipped:
            lines += ["", "Left alone:", ""]
            lines += [f"- `{_cell(s.name)}`: {_cell(s.reason)} ({_cell(s.by)})" for s in self.report.skipped]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """One page: no script, nothing from elsewhere; for phones, print, light and dark."""
        sections = [
            _section("Before and after", _metrics_table(self.metrics)) if self.metrics else "",
            _section("Plots", "".join(_figure(figure) for figure in self.figures)) if self.figures else "",
            _section("Layers", _layers_table(self.report)),
            _section("Left alone", _skips(self.report.skipped)) if self.report.skipped else "",
            _section("Use it", _commands(self.commands)) if self.commands else "",
            _section("Configuration", _code(json.dumps(self.configuration, indent=2))) if self.configuration else "",
        ]
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        title = html.escape(self.title)
        return _PAGE.format(
            title=title, style=_STYLE, summary=html.escape(self.summary), note=note, sections="\n".join(sections)
        )

    def write_file(self, path: Path) -> Path:
        """Writes one form of the page, the one that the ending says: `.html`, `.md` or `.json`.

        Raises:
            OptionError: another ending.
        """
        forms = {".html": self.to_html, ".md": self.to_markdown, ".json": self.to_json}
        if path.suffix.lower() not in forms:
            raise OptionError(f"A page is a file that ends in {', '.join(forms)}, got {path.name!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(forms[path.suffix.lower()]().encode())
        return path

    def write(self, folder: Path) -> Path:
        """Writes `compression_report.html`, `.md` and `.json` into a directory; returns the path of the HTML."""
        return [self.write_file(folder / f"{NAME}{ending}") for ending in (".json", ".md", ".html")][-1]


def _report_from(data: dict[str, Any]) -> CompressionReport:
    def pair(value: Any) -> Any:
        return None if value is None else tuple(value)

    layers = tuple(
        LayerReport(
            entry["name"],
            entry["method"],
            pair(entry["params"]),
            pair(entry["size_bytes"]),
            pair(entry["macs"]),
            entry["error"],
        )
        for entry in data["layers"]
    )
    skipped = tuple(Skip(**entry) for entry in data["skipped"])
    totals = [pair(data.get(key)) for key in ("params", "size_bytes", "macs", "file_bytes")]
    return CompressionReport(layers, skipped, *totals)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _change(pair: tuple[int, int] | None) -> str:
    return "" if pair is None else f"{pair[0]:,} → {pair[1]:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _cell(text: str) -> str:
    """Text that neither ends a Markdown cell nor begins an element."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>{content}</section>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table in a box that scrolls by itself; the last `numbers` columns are figures."""
    first = len(headings) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= first else ''}>{html.escape(str(cell))}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    return f'<div class="box" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _metrics_table(metrics: Sequence[Metric]) -> str:
    rows = [(m.name, m.unit, _number(m.before), _number(m.after)) for m in metrics]
    return _table(("metric", "", "before", "after"), rows, 2)


def _layers_table(report: CompressionReport) -> str:
    return _table(("layer", "method", *_HEADINGS), _rows(report), 4)


def _rows(report: CompressionReport) -> list[Sequence[str]]:
    """A row for each layer, one for the whole model, and one for its file where that is known."""
    rows: list[Sequence[str]] = [
        (layer.name, layer.method, *map(_change, (layer.params, layer.size_bytes, layer.macs)), _share(layer.error))
        for layer in report.layers
    ]
    total = ("whole model", f"{report.size_ratio:.1%} of the bytes")
    rows.append((*total, *map(_change, (report.params, report.size_bytes, report.macs)), ""))
    if report.file_bytes is not None:
        before, after = report.file_bytes
        rows.append(("file", f"{after / max(before, 1):.1%} of the bytes", "", _change(report.file_bytes), "", ""))
    return rows


def _times(before: float, after: float) -> str:
    ratio = before / max(after, 1)
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"


def _skips(skipped: Sequence[Skip]) -> str:
    return _table(("layer", "why", "by"), [(skip.name, skip.reason, skip.by) for skip in skipped], 0)


def _figure(figure: Figure) -> str:
    return f"<figure>{figure.svg}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def _commands(commands: Mapping[str, str]) -> str:
    return "".join(f"<h3>{html.escape(purpose)}</h3>{_code(code)}" for purpose, code in commands.items())


def _code(text: str) -> str:
    return f'<pre class="box" tabindex="0"><code>{html.escape(text)}</code></pre>'


_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --card: #f6f8fa; --mark: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --card: #151b23; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .9rem; margin: 1rem 0 .25rem; color: var(--soft); font-weight: 600; }
.summary {
  font-size: 1.15rem; margin: 0; padding: .75rem 1rem; overflow-wrap: anywhere;
  background: var(--card); border-left: 4px solid var(--mark); border-radius: 4px;
}
.note { color: var(--soft); font-size: .9rem; }
.box { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td:nth-child(2):not(.n) { min-width: 10rem; }
.n { text-align: right; white-space: nowrap; }
pre { margin: 0; padding: .75rem; background: var(--card); border-radius: 4px; font-size: .8125rem; }
figure { margin: 1rem 0; max-width: 34rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .25rem; }
@media (min-width: 60rem) {
  section figure { display: inline-block; width: 48%; margin-right: 1%; vertical-align: top; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11px; }
  .box { overflow: visible; }
  .n, th { white-space: normal; }
  pre { white-space: pre-wrap; }
  figure, tr { break-inside: avoid; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: compression report</title>
<style>{style}</style>
</head>
<body>
<h1>{title}: compression report</h1>
<p class="summary">{summary}</p>
{note}
{sections}
</body>
</html>
"""
