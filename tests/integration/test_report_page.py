"""The report: what it says in numbers, in every form; and that a real browser shows it, at the width of a phone."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pquant_lightning import (
    CompressionReportCallback,
    LowRankCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    save_compressed,
)
from pquant_lightning.core.errors import CallbackOrderError, CheckpointError
from pquant_lightning.core.plan import Skip
from pquant_lightning.core.report import CompressionReport, LayerReport
from pquant_lightning.utils.report_page import Figure, Metric, ReportPage
from tests.models import MLP, ConvNet, built, fit, quiet_trainer

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --virtual-time-budget=3000"
).split()


def page() -> ReportPage:
    layers = (LayerReport("net.<b>0</b>|x", "low rank 4", (1000, 250), (4000, 1000), (900, 225), 0.125),)
    report = CompressionReport(
        layers, (Skip("head", "too small & thin", "low_rank"),), (2000, 500), (8000, 1000), (1800, 450)
    )
    metrics = (Metric("latency", 3.0, 1.5, "ms"), Metric("val_acc", 0.97, 0.96, "", True))
    return ReportPage(
        "Net", report, metrics, {"val_acc": [(1.0, 0.9), (2.0, 0.96)]}, {"qat": 1.0}, {"qat": {"bits": 8}}
    )


def test_the_summary_in_a_sentence() -> None:
    expected = "Net is 8.0 times smaller (8,000 → 1,000 bytes of tensors) and 2.0 times faster; val_acc 0.97 → 0.96."
    assert page().summary == expected
    on_disk = replace(page(), report=replace(page().report, file_bytes=(9000, 1500)))
    assert on_disk.summary.startswith("Net is 6.0 times smaller (9,000 → 1,500 bytes) and")
    assert "| file | 16.7% of the bytes |  | 9,000 → 1,500 |  |  |" in on_disk.to_markdown().splitlines()


def test_json_gives_an_equal_page() -> None:
    original = replace(page(), figures=(Figure("caption", "<svg></svg>"),))
    read = ReportPage.from_json(original.to_json())
    assert read == original
    with pytest.raises(CheckpointError, match="no compression report"):
        ReportPage.from_json('{"version": 1}')
    with pytest.raises(CheckpointError, match="another version"):
        ReportPage.from_json('{"version": 99}')


def test_markdown_has_one_row_per_layer_and_no_foreign_cells() -> None:
    lines = page().to_markdown().splitlines()
    (row,) = [line for line in lines if "low rank 4" in line]
    assert row == r"| net.&lt;b&gt;0&lt;/b&gt;\|x | low rank 4 | 1,000 → 250 | 4,000 → 1,000 | 900 → 225 | 12.50% |"
    assert "| layer | method | parameters | bytes | MACs per sample | weight error |" in lines
    assert "- `head`: too small &amp; thin (low_rank)" in lines
    assert "| latency | 3 | 1.5 | ms |" in lines


def test_html_escapes_names_and_loads_nothing() -> None:
    text = page().to_html()
    assert "net.&lt;b&gt;0&lt;/b&gt;|x" in text
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    assert "default-src 'none'" in text


# -- in a fit ----------------------------------------------------------------------------------------------------------


def run(folder: Path, callbacks: list[Any], model: Any = MLP, epochs: int = 3, **options: Any) -> Any:
    report = CompressionReportCallback()
    trainer = quiet_trainer(folder, [report, *callbacks], max_epochs=epochs, **options)
    fit(trainer, built(model))
    return report, trainer


def test_a_fit_writes_the_page_beside_the_artefact(tmp_path: Path) -> None:
    report, trainer = run(tmp_path, [LowRankCallback(rank=4), PTQCallback()])
    assert report.path == tmp_path / "compression_report.html"
    read = ReportPage.from_json((tmp_path / "compression_report.json").read_text())
    artifact = trainer.callbacks[2].artifact
    assert replace(read.report, file_bytes=None) == trainer.callbacks[2].report
    files = (save_compressed(MLP(), tmp_path / "dense.safetensors"), artifact)
    assert read.report.file_bytes == tuple(file.stat().st_size for file in files)
    assert f"{artifact.stat().st_size:,} bytes" in read.summary
    assert read.report.size_ratio < 0.6
    names = [metric.name for metric in read.metrics]
    assert names[:5] == ["latency", "parameters", "size", "MACs", "val_loss"]
    assert [step for step, _ in read.curves["val_loss"]] == [4, 8, 12]
    assert read.curves["val_loss"][-1][1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert read.moments == {"LowRankCallback(low_rank)": 0, "PTQCallback(ptq)": 12}
    assert read.configuration["LowRankCallback(low_rank)"]["rank"] == 4
    assert "load_compressed(MLP, " in read.commands["Load it"]
    assert [figure.svg.count("<svg") for figure in read.figures] == [1, 1]
    assert "4.0" not in read.summary or read.summary.startswith("MLP is ")


def test_the_metric_before_is_that_of_the_uncompressed_model(tmp_path: Path) -> None:
    """Against a validation of the same model by Lightning alone; and the fit is as it would be without the page."""
    dense = quiet_trainer(tmp_path).validate(built(MLP), MLP.loader(seed=1), verbose=False)[0]["val_loss"]
    torch.manual_seed(0)
    alone = fit(quiet_trainer(tmp_path / "alone", [LowRankCallback(rank=1)], max_epochs=3), built(MLP))
    torch.manual_seed(0)
    _, trainer = run(tmp_path, [LowRankCallback(rank=1)])
    read = ReportPage.from_json((tmp_path / "compression_report.json").read_text())
    metric = next(metric for metric in read.metrics if metric.name == "val_loss")
    assert metric.before == pytest.approx(dense, rel=1e-5)
    assert metric.after == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, trainer.lightning_module.state_dict()[name])


def test_the_moment_of_a_schedule_is_when_it_is_complete(tmp_path: Path) -> None:
    run(tmp_path, [PruningCallback(sparsity=0.5, include=["*"], end=0.5, min_saving=0.0)], epochs=4)
    read = ReportPage.from_json((tmp_path / "compression_report.json").read_text())
    assert read.moments["PruningCallback(unstructured_pruning)"] == 9  # steps, of which the ninth is the first at 0.5


@pytest.mark.parametrize(
    "callback",
    [QATCallback(bits=4), StructuredPruningCallback(sparsity=0.5, round_to=1)],
    ids=lambda c: type(c).__name__,
)
def test_convolutions_and_norms(callback: Any, tmp_path: Path) -> None:
    run(tmp_path, [callback], ConvNet)
    read = ReportPage.from_json((tmp_path / "compression_report.json").read_text())
    assert read.report.layers
    assert next(m for m in read.metrics if m.name == "latency").before > 0


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_figures_go_to_the_logger(logger: Any, tmp_path: Path) -> None:
    own = logger(tmp_path)
    run(tmp_path, [LowRankCallback(rank=4)], logger=own)
    folder = Path(own.log_dir)
    assert (folder / "compression_report.html").exists()
    if logger is CSVLogger:
        assert "pquant/final_size_ratio" in (folder / "metrics.csv").read_text()
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
        assert "pquant/final_size_ratio" in events.Tags()["scalars"]


def test_another_folder_and_a_resumed_fit(tmp_path: Path) -> None:
    report = CompressionReportCallback(str(tmp_path / "page"))
    trainer = quiet_trainer(tmp_path, [QATCallback(bits=8), report], max_epochs=2)
    model = fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = CompressionReportCallback(str(tmp_path / "page"))
    fit(
        quiet_trainer(tmp_path, [QATCallback(bits=8), again], max_epochs=4),
        type(model)(),
        ckpt_path=tmp_path / "half.ckpt",
    )
    read = ReportPage.from_json((tmp_path / "page" / "compression_report.json").read_text())
    assert [step for step, _ in read.curves["val_loss"]] == [4, 8, 12, 16]
    assert read.moments == {"QATCallback(qat)": 0}


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run(tmp_path, [LowRankCallback(rank=4)])
    text = (tmp_path / "compression_report.html").read_text()
    assert "pip install &#x27;pquant-lightning[plot]&#x27;" in text
    assert "<svg" not in text


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(CallbackOrderError, match="there is none in the list"):
        fit(quiet_trainer(tmp_path, [CompressionReportCallback()]), built(MLP))


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(width: int, tmp_path: Path) -> None:
    run(tmp_path, [LowRankCallback(rank=4), QATCallback(bits=8)])
    text = (tmp_path / "compression_report.html").read_text()
    # the page itself has no script; this copy measures it, in a frame of the wanted width, and writes what it finds
    probe = f"""<!DOCTYPE html><body><iframe id=f style="width:{width}px;height:900px;border:0"></iframe>
    <pre id=out></pre><script>
    const f = document.getElementById('f');
    f.onload = () => {{ const d = f.contentDocument, e = d.documentElement, svg = d.querySelectorAll('svg');
      document.getElementById('out').textContent = JSON.stringify({{ scroll: e.scrollWidth, view: f.clientWidth,
        svgs: svg.length, wide: Math.max(...[...svg].map(s => s.getBoundingClientRect().width)),
        text: d.querySelector('.summary').innerText, rows: d.querySelectorAll('tbody tr').length,
        asked: f.contentWindow.performance.getEntriesByType('resource').length }}); }};
    f.srcdoc = {json.dumps(text).replace("</", "<" + chr(92) + "/")};
    </script>"""
    (tmp_path / "probe.html").write_text(probe)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)[1].replace("&gt;", ">"))
    assert found["scroll"] <= found["view"] == width
    assert found["svgs"] == 2
    assert 200 < found["wide"] <= width
    assert found["text"].startswith("MLP is ")
    assert found["rows"] >= 8
    assert found["asked"] == 0
