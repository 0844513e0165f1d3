"""The tokenizer in a GGUF file's metadata as tokenizer.json, for byte-level BPE.

The file names the rule that splits text before merging (`tokenizer.ggml.pre`) and does not describe
it, so only rules known here are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["tokenizer_config", "tokenizer_json"]

_CONTROL, _USER_DEFINED = 3, 4

# Text is cut at matches of these patterns, in order.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (_WORDS % "",)
_LLAMA3 = (_WORDS % "{1,3}",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Rule -> patterns, whether text is normalized to NFC, whether a whole word that is a token is one.
_RULES: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((), False, False),
    "qwen2": (_QWEN2, True, False),
    "deepseek-r1-qwen": (_QWEN2, True, False),
    "llama-bpe": (_LLAMA3, False, True),
    "llama3": (_LLAMA3, False, True),
    "llama-v3": (_LLAMA3, False, True),
    "deepseek-v3": (_DEEPSEEK3, False, False),
}


def tokenizer_json(metadata: Mapping[str, Any]) -> str | None:
    """Return the text of tokenizer.json; None for a kind of tokenizer that is not read."""
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "")
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    if kind != "gpt2" or rule not in _RULES or not tokens or merges is None:
        return None
    patterns, is_normalized, ignore_merges = _RULES[rule]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        for text in patterns
    ]
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append({**bytes_step, "use_regex": not patterns})
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if is_normalized else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": _post_processor(metadata, tokens),
            "decoder": {**bytes_step, "add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": ignore_merges,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json: special tokens and the chat template."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    fields: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            fields[f"{name}_token"] = tokens[index]
    for key in ("add_bos_token", "add_eos_token"):
        if (value := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            fields[key] = value
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        fields["chat_template"] = template
    return fields


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Return what puts the first token before every text, where the file asks for it."""
    index = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token") or index is None:
        return None
    bos = tokens[index]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
