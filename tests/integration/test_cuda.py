"""The life of every method on a GPU: fit, resume, artefact; skipped where there is none."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pquant_lightning import (
    LowRankCallback,
    PruningCallback,
    QATCallback,
    StructuredPruningCallback,
    benchmark_models,
    compress_model,
    finalize,
    load_compressed,
)
from pquant_lightning.utils.benchmarking import peak_bytes
from tests.contract.table import CASES, Case, output, over
from tests.models import MODELS, fit, quiet_trainer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PRUNED = [
    Case("mlp", (partial(PruningCallback, sparsity=0.5, include=["*"]), partial(QATCallback, bits=8)), "masks+qat"),
    Case("conv_net", (partial(StructuredPruningCallback, sparsity=0.5, round_to=1),), "channels"),
    Case("transformer", (partial(LowRankCallback, rank=2), partial(PruningCallback, sparsity=0.5)), "low_rank+masks"),
]


def gpu_trainer(directory, callbacks, **options):
    checkpointer = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    return quiet_trainer(directory, [*callbacks, checkpointer], **{"accelerator": "gpu", "max_epochs": 2, **options})


@over([*CASES, *PRUNED])
def test_a_fit_on_the_gpu_gives_an_artefact_that_computes_the_same_on_both_devices(case, tmp_path):
    callbacks = case.make_callbacks()
    torch.manual_seed(0)
    trainer = gpu_trainer(tmp_path, callbacks)
    fit(trainer, MODELS[case.model]())
    loaded = load_compressed(MODELS[case.model], callbacks[-1].artifact)
    here = output(loaded, case.inputs())
    there = output(loaded.cuda(), tuple(x.cuda() for x in case.inputs())).cpu()
    assert torch.isfinite(here).all()
    assert (here - there).norm() <= 0.02 * here.norm()  # one step of an 8-bit grid may fall to the other side


@over([CASES[0], *PRUNED])
def test_resume_on_the_gpu_goes_on_as_if_there_had_been_no_break(case, tmp_path):
    torch.manual_seed(0)
    whole = fit(gpu_trainer(tmp_path / "a", case.make_callbacks()), MODELS[case.model]())
    torch.manual_seed(1)
    trainer = gpu_trainer(tmp_path / "b", case.make_callbacks())
    resumed = fit(trainer, MODELS[case.model](), ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_reduced_precision_on_the_gpu(precision, tmp_path):
    callbacks = [LowRankCallback(rank=4), QATCallback(bits=8)]
    model = fit(gpu_trainer(tmp_path, callbacks, precision=precision), MODELS["conv_net"]())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert callbacks[-1].artifact.exists()


def test_integer_products_on_the_gpu_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    batches = [torch.randn(32, 64) for _ in range(4)]
    ints = finalize(compress_model(model, "ptq", train_loader=batches))
    here = output(ints, (batches[0],))
    there = output(ints.cuda(), (batches[0].cuda(),)).cpu()
    assert (here - there).abs().max() <= 1e-2 * here.abs().max()


def test_exact_zeros_in_two_of_four_run_on_sparse_kernels():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)).cuda().half()
    pruned = compress_model(model, "unstructured_pruning", pattern="2:4", include=["*"])
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    dense = pruned(x)
    for layer in (pruned[0], pruned[2]):
        layer.weight = torch.nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(pruned(x), dense, rtol=1e-2, atol=1e-2)


def test_memory_is_that_of_the_gpu_and_inputs_go_to_the_model():
    x = torch.ones(2**20, device="cuda")
    assert peak_bytes(lambda: (x + 1) * 2) == 2 * 4 * 2**20
    assert peak_bytes(lambda: torch.ones(1000)) == 4000  # what runs on the CPU is counted there
    layer = torch.nn.Linear(1024, 1024, bias=False).cuda()
    report = benchmark_models({"layer": layer}, torch.ones(256, 1024), max_rounds=7)
    assert report.device == "cuda"
    assert report.models["layer"].peak_memory_bytes >= 4 * (1024 * 1024 + 256 * 1024)
