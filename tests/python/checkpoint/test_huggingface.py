"""Hugging Face directories: what is read, and one clear error for each thing that can be wrong."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgpt.checkpoint import HuggingFaceCheckpoint, open_checkpoint
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.scheme import QuantizedTensor

INDEX = "model.safetensors.index.json"


def write(path: Path, tensors: dict[str, torch.Tensor], **files: object) -> Path:
    (path / "config.json").write_text(json.dumps(files.pop("config", {"model_type": "llama"})))
    save_file(tensors, path / "model.safetensors")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def write_sharded(path: Path) -> Path:
    (path / "config.json").write_text("{}")
    for shard in "ab":
        save_file({f"{shard}.weight": torch.full((2,), float(ord(shard)))}, path / f"{shard}.st")
    (path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "a.st", "b.weight": "b.st"}}))
    return path


def test_open_single_file_with_text_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"w": torch.arange(3.0)},
        tokenizer={"version": "1.0"},
        tokenizer_config={"chat_template": "old", "bos_token": "<s>"},
        generation_config={"eos_token_id": [1, 2]},
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["w"]
    assert "w" in checkpoint
    assert "v" not in checkpoint
    assert torch.equal(checkpoint.read("w"), torch.arange(3.0))
    assert checkpoint.config == {"model_type": "llama"}
    assert json.loads(checkpoint.tokenizer_json or "") == {"version": "1.0"}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert open_checkpoint(tmp_path).chat_template == "new"


def test_chat_template_default_of_several(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, {"w": torch.ones(1)}, tokenizer_config={"chat_template": named})
    assert open_checkpoint(tmp_path).chat_template == "d"


def test_open_without_text_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"w": torch.ones(1)}))
    assert checkpoint.tokenizer_json is None
    assert checkpoint.chat_template is None
    assert checkpoint.tokenizer_config == checkpoint.generation_config == {}


def test_open_sharded_keeps_one_shard_mapped(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(write_sharded(tmp_path))
    for name in ("a", "b", "a"):
        assert checkpoint.read(f"{name}.weight").tolist() == [float(ord(name))] * 2
        assert [file.mapping.is_mapped for file in checkpoint._files.values()].count(True) == 1


def test_two_threads_read_two_shards(tmp_path: Path) -> None:
    """Each read may unmap the shard that the other thread is about to read."""
    checkpoint = HuggingFaceCheckpoint(write_sharded(tmp_path))

    def read(name: str) -> bool:
        return all(
            checkpoint.read(f"{name}.weight").tolist() == [float(ord(name))] * 2 for _ in range(500)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read, "ab"))


def test_fused_experts_are_listed_one_by_one(tmp_path: Path) -> None:
    gate_up, down = torch.rand(2, 6, 4), torch.rand(2, 4, 3)
    layer = "model.layers.1.mlp.experts"
    write(tmp_path, {f"{layer}.gate_up_proj": gate_up, f"{layer}.down_proj": down})
    checkpoint = open_checkpoint(tmp_path)
    parts = ("down_proj", "gate_proj", "up_proj")
    assert checkpoint.names() == [f"{layer}.{e}.{part}.weight" for e in (0, 1) for part in parts]
    assert torch.equal(checkpoint.read(f"{layer}.1.up_proj.weight"), gate_up[1, 3:])
    assert torch.equal(checkpoint.read(f"{layer}.0.gate_proj.weight"), gate_up[0, :3])
    assert torch.equal(checkpoint.read(f"{layer}.1.down_proj.weight"), down[1])


def test_fp8_block_scale_inv_becomes_scale(tmp_path: Path) -> None:
    codes = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.5
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write(
        tmp_path,
        {"a.weight": codes, "a.weight_scale_inv": scale, "b.weight": torch.ones(2)},
        config={"quantization_config": fp8},
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["a.weight", "b.weight"]
    stored = checkpoint.read("a.weight")
    assert isinstance(stored, QuantizedTensor)
    full = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(stored.dequantize(torch.float32), codes.float() * full)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "without its scale"),
        (
            {"w": torch.ones(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 1)},
            r"needs \(1, 1\)",
        ),
        ({"w": torch.ones(2, 2), "w_scale_inv": torch.ones(1, 1)}, "expected a float8_e4m3fn"),
    ],
)
def test_read_bad_fp8_raises(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, tensors)).read("w")


def test_open_other_quantization_raises(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(1)}, config={"quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(UnsupportedFormat, match="'hqq'"):
        open_checkpoint(tmp_path)


def test_open_missing_shard_raises(tmp_path: Path) -> None:
    (write_sharded(tmp_path) / "b.st").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards, first b\.st"):
        open_checkpoint(tmp_path)


def test_open_truncated_shard_raises(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path) / "b.st"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"b\.st is truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not an object"),
        ('{"weight_map": {}}', "without a weight_map"),
        ('{"weight_map": 3}', "without a weight_map"),
        ('{"weight_map": {"a.weight": 3}}', "not a file name"),
        ('{"weight_map": {"a.weight": "../a.st"}}', "not a file name"),
        ('{"weight_map": {"c.weight": "a.st"}}', "which lacks it"),
    ],
)
def test_open_bad_index_raises(tmp_path: Path, index: str, message: str) -> None:
    (write_sharded(tmp_path) / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_open_incomplete_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"0 \.safetensors files"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_read_unknown_name_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight 'v'"):
        open_checkpoint(write(tmp_path, {"w": torch.ones(1)})).read("v")
