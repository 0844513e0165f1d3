"""The safetensors reader: agrees with the reference library; one clear error for each damage."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgpt.checkpoint.safetensors import DTYPES, SafetensorsFile
from fastgpt.errors import CheckpointError


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor_header(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


def test_read_matches_reference_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for index, dtype in enumerate(dict.fromkeys(DTYPES.values())):
        raw = torch.randint(0, 2, (7, 5), generator=generator)
        tensors[f"t{index}"] = raw.to(dtype)
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert sorted(file.entries) == sorted(tensors)
    for name, expected in tensors.items():
        actual = file.read(name)
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual.double(), expected.double())


def test_read_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    for padding in range(4):  # one of the four puts w off a multiple of 4
        text = json.dumps(header).encode() + b" " * padding
        file = SafetensorsFile(write_raw(tmp_path / "a", text, b"\x07" + struct.pack("<f", 2.5)))
        assert file.read("w").item() == 2.5


def test_read_writes_do_not_reach_the_file_and_outlive_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", tensor_header(), struct.pack("<6f", *range(6)))
    file = SafetensorsFile(path)
    tensor = file.read("w")
    tensor[0, 0] = 9.0
    file.unmap()
    del file
    assert tensor[0].tolist() == [9.0, 1.0, 2.0]
    assert SafetensorsFile(path).read("w")[0, 0] == 0.0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not an object"),
        (b'{"w": 1, "w": 2}', "occurs twice"),
        (b"[" * 200_000, "not valid JSON"),
        ({"__metadata__": {"a": 1}}, "not a map of strings"),
        ({"w": 3}, "not an object"),
        (tensor_header(dtype="F4"), "dtype 'F4'"),
        (tensor_header(dtype=None), "dtype None"),
        (tensor_header(dtype=["F32"]), "dtype"),
        (tensor_header(shape=[2, -3]), "not a list of counts"),
        (tensor_header(shape=[2, True]), "not a list of counts"),
        (tensor_header(shape=[2**62, 2**62]), "not a list of counts"),
        (tensor_header(shape="23"), "not a list of counts"),
        (tensor_header(data_offsets=[24, 0]), r"not \[start, end\]"),
        (tensor_header(data_offsets=[0]), r"not \[start, end\]"),
        (tensor_header(data_offsets=[0, 20]), "need 24"),
        (tensor_header(data_offsets=[4, 28]), "truncated"),
        (tensor_header() | {"v": tensor_header()["w"]}, "overlapping"),
    ],
)
def test_open_bad_header_raises(tmp_path: Path, header: object, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(24))
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(error.value)


def test_open_missing_or_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(CheckpointError, match="directory"):
        SafetensorsFile(tmp_path)


def test_read_unknown_name_and_changed_file_raise(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", tensor_header(), bytes(24))
    file = SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        file.read("v")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="changed from"):
        file.read("w")


def test_every_cut_and_random_flip_is_one_error_or_readable(tmp_path: Path) -> None:
    """Each damaged file either opens with in-bounds tensors or raises CheckpointError."""
    path = tmp_path / "a"
    save_file({"w": torch.ones(3, 5), "v": torch.ones(4, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    rng = random.Random(7)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            continue
        for name in file.entries:
            file.read(name).float().sum()
