"""Damaged and foreign GGUF files: one error each that names file, key or tensor, and fix."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest

from fastgpt.checkpoint import open_checkpoint
from fastgpt.errors import CheckpointError, UnsupportedFormat


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: metadata.__setitem__(key, value)


BAD_METADATA: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "architecture": (
        set_key("general.architecture", "mamba"), UnsupportedFormat, "architecture 'mamba'"
    ),
    "no architecture": (
        lambda m: m.pop("general.architecture"), UnsupportedFormat, "general.architecture ''"
    ),
    "unknown key": (
        set_key("llama.rope.spin", 1), UnsupportedFormat, r"unknown key 'rope\.spin'"
    ),
    "missing key": (
        lambda m: m.pop("llama.block_count"), CheckpointError, "lacks the metadata 'block_count'"
    ),
    "wrong type": (
        set_key("llama.block_count", "two"), CheckpointError, "block_count 'two'; expected int"
    ),
    "experts": (set_key("llama.expert_count", 8), UnsupportedFormat, "expert_count 8"),
    "window": (
        set_key("llama.attention.sliding_window", 9), UnsupportedFormat, "sliding_window 9"
    ),
    "alignment": (set_key("general.alignment", 3), CheckpointError, "alignment 3; expected a pow"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_METADATA)
def test_bad_metadata_is_named(tmp_path: Path, name: str) -> None:
    spoil, error, message = BAD_METADATA[name]
    metadata = dict(files.LLAMA)
    spoil(metadata)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(files.with_embedding(tmp_path, metadata))
    assert "m.gguf" in str(caught.value)


def test_parts_are_named_and_complete(tmp_path: Path) -> None:
    raw = files.encode(np.ones((4, 64)), "F32")
    norm = files.encode(np.ones(64), "F32")
    first = {"token_embd.weight": ("F32", (4, 64), raw)}
    second = {"output_norm.weight": ("F32", (64,), norm)}
    split = {"split.count": 2, "split.tensors.count": 2}
    one, two = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    files.write(one, {**files.LLAMA, **split, "split.no": 0}, first)
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf cannot be read"):
        open_checkpoint(one)
    files.write(two, {"split.count": 2, "split.no": 1}, second)
    for given in (one, two):  # either one opens both
        checkpoint = open_checkpoint(given)
        assert checkpoint.names() == ["model.embed_tokens.weight", "model.norm.weight"]
        assert checkpoint.read("model.norm.weight").shape == (64,)
        assert checkpoint.read("model.embed_tokens.weight").shape == (4, 64)
    files.write(two, {"split.count": 2, "split.no": 1}, first)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight', which another part has too"):
        open_checkpoint(one)
    files.write(two, {"split.count": 2, "split.no": 1}, {})
    with pytest.raises(CheckpointError, match="hold 1 tensors of 2"):
        open_checkpoint(one)
    renamed = one.rename(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="one of 2 parts, whose names end in"):
        open_checkpoint(renamed)


def test_file_cut_anywhere_is_one_error(tmp_path: Path) -> None:
    path, _ = files.one(tmp_path, "Q4_K")
    whole = path.read_bytes()
    for length in [4, 8, 23, 24, *range(30, len(whole) - 1, 97), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf .*(truncated|copy)"):
            open_checkpoint(path)


def test_flipped_bytes_of_the_header_never_crash(tmp_path: Path) -> None:
    """Any single damaged header byte is an error of ours or still a readable file."""
    path, _ = files.one(tmp_path, "Q4_K")
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(4, 700, 300).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.read(name)
        except (CheckpointError, UnsupportedFormat):
            pass


def test_wrong_magic_version_and_type_are_named(tmp_path: Path) -> None:
    raw = files.encode(np.ones((4, 64)), "F32")
    good: dict[str, Any] = {"token_embd.weight": ("F32", (4, 64), raw)}
    path = files.write(tmp_path / "m.gguf", files.LLAMA, good, magic=b"GGML")
    with pytest.raises(CheckpointError, match=r"m\.gguf is no GGUF file: it starts with b'GGML'"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"no config\.json; it holds GGUF files"):
        open_checkpoint(tmp_path)
    unnamed = files.write(tmp_path / "weights", files.LLAMA, good)
    assert open_checkpoint(unnamed).names() == ["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="GGUF version 1; read are"):
        open_checkpoint(files.write(path, files.LLAMA, good, version=1))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(files.write(path, files.LLAMA, good, version=3 << 24))
    for kind, known in ((10, "Q2_K"), (39, "MXFP4"), (99, "type 99")):
        bad: dict[str, Any] = {**good, "blk.0.ffn_up.weight": (kind, (1, 256), bytes(256))}
        with pytest.raises(UnsupportedFormat, match=rf"'blk\.0\.ffn_up\.weight' in {known}"):
            open_checkpoint(files.write(path, files.LLAMA, bad))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, _ = files.one(tmp_path, "F32", 2, 2, "blk.0.attn_magic.weight", bytes(16))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_magic\.weight', which means nothing"):
        open_checkpoint(path)
    path, _ = files.one(tmp_path, "Q4_K", 2, 100, raw=bytes(200))
    with pytest.raises(CheckpointError, match=r"shape \(2, 100\); Q4_K stores rows in blocks of"):
        open_checkpoint(path)
    path, _ = files.one(tmp_path, "F32", 3, 64, "blk.0.attn_q.weight", bytes(3 * 64 * 4))
    with pytest.raises(CheckpointError, match="has 3 rows, which 2 heads do not share"):
        open_checkpoint(path).read("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match="has no weight 'w'"):
        open_checkpoint(path).read("w")
    data = path.read_bytes()
    table = data.index(b"blk.0.attn_q.weight")
    at = table + len("blk.0.attn_q.weight") + 4 + 16 + 4  # past rank, two sizes, type
    path.write_bytes(data[:at] + struct.pack("<Q", 0) + data[at + 8 :])
    with pytest.raises(CheckpointError, match="overlapping tensors; 'blk"):
        open_checkpoint(path)
    path.write_bytes(data[:at] + struct.pack("<Q", 8) + data[at + 8 :])
    with pytest.raises(CheckpointError, match="offset that is not aligned"):
        open_checkpoint(path)
