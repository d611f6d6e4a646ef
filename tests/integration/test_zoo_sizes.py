"""Models of transformers without half of their units, at lengths and batch sizes that pruning has not seen.

Compared with themselves in which the units are zero: in eval, in training, and token by token through `generate`.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import StructuredPruning, finalize, load_compressed, save_compressed
from pquant_lightning.core.compression_method import CompressionContext
from tests import zoo

MAMBA = {"vocab_size": zoo.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4}


def mamba() -> tuple[nn.Module, zoo.Batch]:
    """As many states as places in the kernel; in transformers' own initialization."""
    torch.manual_seed(0)
    config = zoo.transformers.MambaConfig(**MAMBA, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return zoo.transformers.MambaForCausalLM(config).eval(), {"input_ids": torch.randint(3, zoo.VOCABULARY, (2, 12))}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, zoo.VOCABULARY, shape)


def texts() -> list[zoo.Batch]:
    return [{"input_ids": tokens(3, 5)}, {"input_ids": tokens(1, 27)}, {"input_ids": tokens(2, 17)}]


def spectra() -> list[zoo.Batch]:  # as long as its table of positions
    frames = [torch.randn(n, 16, 40) for n in (3, 1)]
    return [
        {"input_features": x, "decoder_input_ids": tokens(len(x), n) % 32} for x, n in zip(frames, (4, 11), strict=True)
    ]


def scores(model: Any, batch: zoo.Batch) -> list[Tensor]:
    main = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    lengths = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return list(model.generate(**main, **lengths, return_dict_in_generate=True, output_scores=True).scores)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().nan_to_num(posinf=0).max()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "whisper"])
def test_half_of_the_units_go_at_any_size(name: str, tmp_path: Any) -> None:
    model, batch = mamba() if name == "mamba" else zoo.build(name)
    method = StructuredPruning(sparsity=0.5, round_to=1)
    context = CompressionContext(by="test", samples=method.samples_of([batch]))
    masked: Any = copy.deepcopy(model)
    method.apply(masked, method.checked_plan(model, context), context)
    method.step(masked, context.state, 1.0)
    small: Any = finalize(masked)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    save_compressed(small, tmp_path / "small.safetensors")
    loaded: Any = load_compressed(copy.deepcopy(model), tmp_path / "small.safetensors")
    if name == "mamba":
        mixer = loaded.backbone.layers[0].mixer
        assert (mixer.ssm_state_size, mixer.conv_kernel_size) == (mixer.A_log.shape[1], 4)
    for other in spectra() if name == "whisper" else texts():
        with torch.no_grad():
            for training in (False, True):
                for twin in (masked, small, loaded):
                    twin.train(training)
                    for module in twin.modules():
                        if isinstance(module, nn.Dropout):
                            module.p = 0.0
                expected = masked(**other).logits
                for twin in (small, loaded):
                    assert_close(twin(**other).logits, expected)
            for one, two in zip(scores(masked.eval(), other), scores(loaded.eval(), other), strict=True):
                assert_close(two[two.isfinite()], one[one.isfinite()])
