#!/usr/bin/env python3
"""Train two models of less than a million parameters on the CPU, in minutes.

    python benchmarks/train_micro.py --out build/micro [--models micro-text micro-chain]

    micro-text   prose and Python: this project's documents and the standard library of the Python
                 that runs this; 512 learnt byte pairs, tied head.
    micro-chain  the reasoning chains of tiny_tasks.py with tiny-r1's tokenizer; untied head.

Both are Qwen2-shaped and small enough to train where they are measured, so no weights are kept.
Text whose CRC-32 falls into one residue class is held out. All that is drawn at random follows
--seed; the text depends on the version of Python, so its hash is printed. A directory that holds a
finished model of the same text, seed and steps is left as it is. The last line is a JSON report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_networks import CONFIGS, TinyCausalLM, export_state
from tiny_tasks import HELD_OUT_MODULUS, TASKS, draw_problems
from tiny_tokenizer import BOS, BOS_ID, EOS, PAD, build_tokenizer, encode_problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "MICRO_CONFIGS",
    "chain_sequences",
    "make_model",
    "split_documents",
    "text_sequences",
]

ROOT = Path(__file__).resolve().parents[1]
ROW_TOKENS = 256
PIECE_CHARACTERS = 600  # about as many tokens as a row has
HELD_OUT_CLASSES = 3  # of HELD_OUT_MODULUS
_SHAPE = {
    **CONFIGS["tiny-qwen"],
    "hidden_size": 128,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
MICRO_CONFIGS: dict[str, dict[str, Any]] = {
    "micro-text": {
        **_SHAPE,
        "intermediate_size": 384,
        "max_window_layers": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
    "micro-chain": {
        **_SHAPE,
        "intermediate_size": 512,
        "max_window_layers": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}


def documents() -> Iterator[str]:
    """Yield the project's documents and the standard library's modules, tests left out."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("LICENSE*")]):
        yield path.read_text("utf-8")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests", "lib2to3", "encodings"} & set(path.parts):
            yield path.read_text("utf-8", errors="replace")


def split_documents() -> tuple[list[str], list[str]]:
    """Return pieces of text to train on and held-out ones, each once, in a fixed order."""
    pieces = {
        text[i : i + PIECE_CHARACTERS]: None
        for text in documents()
        for i in range(0, len(text), PIECE_CHARACTERS)
    }
    parts: tuple[list[str], list[str]] = ([], [])
    for text in pieces:
        parts[zlib.crc32(text.encode()) % HELD_OUT_MODULUS < HELD_OUT_CLASSES].append(text)
    return parts


def text_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE learnt from the texts; ids 0 to 2 are BOS, EOS and PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def text_sequences(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return every text as BOS and its tokens, cut to rows of ROW_TOKENS."""
    return [
        [BOS_ID, *encoding.ids][:ROW_TOKENS]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


def chain_sequences(
    tokenizer: Tokenizer, per_task: int, *, seed: int, held_out: bool
) -> list[list[int]]:
    """Return problems of every task with their solutions, question and answer joined."""
    problems = [p for t in TASKS for p in draw_problems(t, per_task, seed=seed, held_out=held_out)]
    return [prompt + response for prompt, response in encode_problems(tokenizer, problems)]


def train_micro(
    name: str, sequences: list[list[int]], *, steps: int, batch: int, seed: int
) -> tuple[TinyCausalLM, float]:
    """Return the model after `steps` batches of rows cut from the joined sequences, and its loss.

    The loss is the mean over the last hundred steps.
    """
    torch.manual_seed(seed)
    model = TinyCausalLM(MICRO_CONFIGS[name])
    order = torch.randperm(len(sequences)).tolist()
    stream = torch.tensor([token for at in order for token in sequences[at]])
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start, losses = time.monotonic(), []
    offsets = torch.arange(ROW_TOKENS + 1)
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(progress / 0.02 + 0.01, 1.0, (1.0 - progress) / 0.6)
        first = torch.randint(len(stream) - ROW_TOKENS, (batch, 1))
        rows = stream[first + offsets]
        logits = model.lm_head(model(rows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 99:
            mean = sum(losses[-100:]) / 100
            print(f"{name} step {step + 1} {time.monotonic() - start:.0f} s loss {mean:.3f}")
    return model, sum(losses[-100:]) / len(losses[-100:])


def make_model(
    name: str, directory: Path, *, steps: int = 800, batch: int = 4, seed: int = 20261125
) -> dict[str, Any]:
    """Train one model into a Hugging Face directory; return its report."""
    if name == "micro-text":
        texts, _ = split_documents()
        tokenizer = text_tokenizer(texts, MICRO_CONFIGS[name]["vocab_size"])
        sequences = text_sequences(tokenizer, texts)
    else:
        tokenizer = build_tokenizer(seed)
        sequences = chain_sequences(tokenizer, 20_000, seed=seed, held_out=False)
    wanted = {
        "model": name,
        "seed": seed,
        "steps": steps,
        "tokens_sha256": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
    }
    path = directory / "training_report.json"
    if path.exists():
        report = json.loads(path.read_text())
        if wanted.items() <= report.items():
            return dict(report)
    start = time.monotonic()
    model, loss = train_micro(name, sequences, steps=steps, batch=batch, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(export_state(model), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.dumps(MICRO_CONFIGS[name], indent=2, sort_keys=True)
    (directory / "config.json").write_text(config + "\n")
    report = {
        **wanted,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": sum(map(len, sequences)),
        "seen_tokens": steps * batch * ROW_TOKENS,
        "loss": loss,
        "train_s": round(time.monotonic() - start, 1),
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/micro")
    parser.add_argument(
        "--models", nargs="+", choices=list(MICRO_CONFIGS), default=[*MICRO_CONFIGS]
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {ROW_TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reports = [
        make_model(name, args.out / name, steps=args.steps, batch=args.batch, seed=args.seed)
        for name in args.models
    ]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
