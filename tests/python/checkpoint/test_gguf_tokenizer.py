"""Tokenizers in GGUF metadata: the same ids as their sources, or a warning with the fix."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import gguf_files as files
import pytest
import tokenizers
from transformers.convert_slow_tokenizer import Qwen2Converter

import fastgpt
from fastgpt.checkpoint import open_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "models"))
from test_gguf import metadata_of, tensors_of
from tiny_models import case, reference_logits, reference_model

TEXTS = [
    "Hello, world! It's 12345 o'clock.",
    "def f(x):\n\treturn x\r\n\n",
    "  naïve café 你好 ",
    "",
]


def vocabulary() -> tuple[list[str], list[str]]:
    """Return tokens and merges of a small byte-level BPE trained here."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text("utf-8")], trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
    return sorted(vocab, key=vocab.__getitem__), pairs


def tokenizer_metadata(rule: str, kind: str = "gpt2") -> dict[str, Any]:
    tokens, merges = vocabulary()
    tokens = [*tokens, "<s>", "</s>", "<think>"]
    return {
        **files.LLAMA,
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        "general.sampling.temp": 0.5,
    }


@pytest.mark.parametrize("rule", ["gpt-2", "qwen2", "llama-bpe", "deepseek-v3"])
def test_tokenizer_of_the_file_round_trips(tmp_path: Path, rule: str) -> None:
    metadata = tokenizer_metadata(rule)
    checkpoint = open_checkpoint(files.with_embedding(tmp_path, metadata))
    tokenizer = fastgpt.tokenizer.Tokenizer.from_checkpoint(checkpoint)
    bos = metadata["tokenizer.ggml.bos_token_id"]
    for text in TEXTS:
        ids = tokenizer.encode_prompt(text)
        assert ids[0] == bos
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode_prompt("a<think>b")[2] == bos + 2
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.generation_config["temperature"] == 0.5
    assert checkpoint.generation_config["eos_token_id"] == bos + 1
    metadata["tokenizer.ggml.eot_token_id"] = bos + 2
    again = open_checkpoint(files.with_embedding(tmp_path, metadata))
    assert again.generation_config["eos_token_id"] == [bos + 1, bos + 2]


def test_qwen2_tokenizer_is_transformers(tmp_path: Path) -> None:
    metadata = tokenizer_metadata("qwen2")
    checkpoint = open_checkpoint(files.with_embedding(tmp_path, metadata))
    tokens, merges = vocabulary()
    pairs = [tuple(m.split(" ")) for m in merges]
    theirs = Qwen2Converter(None).converted({t: i for i, t in enumerate(tokens)}, pairs)
    ours = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json or "")
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids


def test_unread_tokenizer_is_named_with_the_fix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fastgpt"):
        checkpoint = open_checkpoint(
            files.with_embedding(tmp_path, tokenizer_metadata("x", "llama"))
        )
    assert checkpoint.tokenizer_json is None
    assert "kind 'llama', rule 'x', which is not read; give one with --tokenizer" in caplog.text


def test_engine_serves_a_file_with_its_tokenizer(tmp_path: Path) -> None:
    reference = reference_model(case("Llama", vocab_size=420, num_key_value_heads=3).hf_config)
    metadata = metadata_of(reference.config, "llama")
    metadata |= {k: v for k, v in tokenizer_metadata("llama-bpe").items() if "token" in k}
    path = files.write(tmp_path / "m.gguf", metadata, tensors_of(reference, "llama"))
    engine = fastgpt.Engine(path, device="cpu", dtype="float32", memory_pool_size="64MB")
    greedy = fastgpt.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (answer,) = engine.generate(["Hello"], greedy)
    ids = fastgpt.tokenizer.Tokenizer.from_checkpoint(open_checkpoint(path)).encode_prompt("Hello")
    for _ in range(4):
        ids.append(int(reference_logits(reference, ids)[-1].argmax()))
    assert list(answer.token_ids) == ids[-4:]
