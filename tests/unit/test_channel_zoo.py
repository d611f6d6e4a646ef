"""The groups of real architectures: most are free, and without half of each the model is much smaller."""

import math
from collections import Counter

import pytest
from torch import nn

from pquant_lightning.core.calibration import Samples, run_forward
from pquant_lightning.core.channel_labels import FIXED_SIZE
from pquant_lightning.core.channel_rules import NORMALIZED
from pquant_lightning.core.channel_rules import SUMMED as REDUCED
from pquant_lightning.core.channels import Group, find_groups
from tests import zoo

# model: free groups, and why the others are not
GROUPS: dict[str, tuple[int, dict[str, int]]] = {
    "bert": (5, {NORMALIZED: 1}),
    "distilbert": (4, {NORMALIZED: 1}),
    "roberta": (5, {NORMALIZED: 1}),
    "electra": (6, {NORMALIZED: 2}),
    "deberta": (6, {NORMALIZED: 1}),
    "albert": (2, {NORMALIZED: 2}),
    "llama": (4, {REDUCED: 1}),
    "mistral": (4, {REDUCED: 1}),
    "qwen2": (4, {REDUCED: 1}),
    "qwen3": (4, {REDUCED: 1}),
    "gemma": (4, {REDUCED: 1}),
    "phi": (4, {NORMALIZED: 1}),
    "gpt2": (4, {NORMALIZED: 1}),
    "gptj": (4, {NORMALIZED: 1}),
    "gpt_neox": (4, {NORMALIZED: 1}),
    "opt": (4, {NORMALIZED: 1}),
    "bloom": (2, {NORMALIZED: 1, FIXED_SIZE: 2}),
    "falcon": (4, {NORMALIZED: 1}),
    "mixtral": (4, {REDUCED: 1}),
    "qwen2_moe": (6, {REDUCED: 1}),
    "qwen3_moe": (4, {REDUCED: 1}),
    "t5": (7, {REDUCED: 1}),
    "bart": (10, {NORMALIZED: 1}),
    "resnet": (11, {}),
    "regnet": (11, {}),
    "convnext": (6, {NORMALIZED: 2}),
    "mobilenet": (25, {}),
    "efficientnet": (14, {}),
    "vit": (4, {NORMALIZED: 1}),
    "deit": (4, {NORMALIZED: 1}),
    "beit": (4, {NORMALIZED: 1}),
    "swin": (8, {NORMALIZED: 2}),
    "segformer": (12, {NORMALIZED: 5}),
    "clip": (10, {NORMALIZED: 2, REDUCED: 1}),
    "wav2vec2": (6, {NORMALIZED: 2}),
    "hubert": (6, {NORMALIZED: 2}),
    "whisper": (11, {NORMALIZED: 2}),
}
MOSTLY_FROZEN = {"albert", "bloom", "segformer"}  # layers are shared; positions are tied to heads; norms in each layer


def _share_kept(model: nn.Module, groups: list[Group]) -> float:
    """Share of the parameters without half of the units of each free group."""
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    before = sum(parameter.numel() for parameter in model.parameters())
    for group in groups:
        for (name, dim), indices in zip(group.tensors, group.indices, strict=True):
            if group.fixed is None and name in sizes:
                sizes[name][dim] -= len(indices) // 2 * indices.shape[1]
    after = sum(map(math.prod, sizes.values()))
    return after / before


def test_the_table_has_the_whole_zoo() -> None:
    assert set(GROUPS) == set(zoo.NAMES)
    assert len(zoo.NAMES) >= 24
    assert len(MOSTLY_FROZEN) <= len(zoo.NAMES) * 2 / 24


@pytest.mark.parametrize("name", zoo.NAMES)
def test_groups_of(name: str) -> None:
    model, batch = zoo.build(name)
    groups = find_groups(model, Samples((batch,), run_forward))
    free, reasons = GROUPS[name]
    assert sum(group.fixed is None for group in groups) == free
    assert Counter(group.fixed for group in groups if group.fixed is not None) == reasons
    assert (sum(reasons.values()) <= (free + sum(reasons.values())) / 4) == (name not in MOSTLY_FROZEN)
    assert _share_kept(model, groups) <= 0.75
