"""What do activations of eight bits cost a small model's answers, beside its weights?

Quantizes with the same weights and each kind of activations and prints the certificates' figures:
KL from the source over held-out tokens of the model's own texts, every row rounded.

    python benchmarks/activation_quality.py [--models tiny-qwen tiny-r1] [--device cuda]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from fastgpt import Quantizer
from fastgpt.checkpoint import Container

ASSETS = Path(__file__).resolve().parents[1] / "fastgpt/assets"
FORMATS = {
    "int8": "int8",
    "fp8": "fp8",
    "fp8 128x128": {"format": "fp8", "scale": "block"},
}


def certificate(model: str, weights: object, activations: str, device: str) -> dict:
    policy = {"attention_weights": weights, "residual_connections": weights}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.pt"
        quantizer = Quantizer(ASSETS / model, {**policy, "activations": activations}, device=device)
        quantizer.write(path, progress=False)
        return Container(path).metadata.certificate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["tiny-qwen", "tiny-r1"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        for name, weights in FORMATS.items():
            for activations in ("16bit", name.split()[0]):
                found = certificate(model, weights, activations, args.device)
                row = {"model": model, "weights": name, "activations": activations}
                keys = ("kl_mean", "kl_mean_95", "same_top1", "perplexity_ratio", "noise_floor_kl")
                row |= {key: found[key] for key in (*keys, "positions", "arithmetic")}
                rows.append(row)
                low, high = found["kl_mean_95"]
                print(
                    f"{model:10} {name:12} {activations:6} KL {found['kl_mean']:.2e} "
                    f"({low:.1e} to {high:.1e}), top-1 {100 * found['same_top1']:.2f} %, "
                    f"perplexity x {found['perplexity_ratio']:.4f}",
                    flush=True,
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
