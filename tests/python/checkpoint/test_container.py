"""The container: round trip, alignment, and one clear error for every kind of damage."""

import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
import xxhash

from fastgpt.checkpoint import container, writer
from fastgpt.checkpoint.container import Container, Metadata
from fastgpt.checkpoint.writer import ContainerWriter, write_container
from fastgpt.errors import CheckpointError
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor

FORMATS = {
    "a.weight": ("fp8", (5, 130)),
    "b.weight": ({"format": "fp8", "scale": "block"}, (130, 129)),
    "c.weight": ("int4", (7, 100)),
    "i.weight": ("int8", (5, 33)),
    "d.weight": ({"format": "int4", "group_size": 32, "symmetric": False}, (3, 45)),
    "experts.up": ("int4", (2, 3, 32)),
    "norm.weight": ("binary", (130,)),
    "e.weight": ("fp16", (3, 3)),
    "f.weight": ("bf16", (1,)),
    "g.weight": ("fp32", (2, 2, 2)),
}


def make_tensors() -> dict[str, torch.Tensor | QuantizedTensor]:
    generator = torch.Generator().manual_seed(0)
    out: dict[str, torch.Tensor | QuantizedTensor] = {
        name: round_tensor(torch.randn(shape, generator=generator), Format.parse(value), name)
        for name, (value, shape) in FORMATS.items()
    }
    out["steps"] = torch.tensor(7)  # a foreign module's integer buffer, zero-dimensional
    out["empty"] = torch.empty(0, 4)
    return out


def metadata() -> Metadata:
    return Metadata(
        model_config={"model_type": "qwen2", "hidden_size": 8},
        policy={"attention_weights": {"format": "fp8"}},
        tokenizer_json='{"model": "é\\u0001\\"quoted\\""}',
        tokenizer_config={"bos_token": "<s>"},
        chat_template="{{ messages }}",
        generation_config={"temperature": 0.6},
        report={"bytes": {"fp8": 1}},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.pt"
    write_container(file, make_tensors().items(), metadata())
    return file


def assert_same(got: torch.Tensor | QuantizedTensor, want: torch.Tensor | QuantizedTensor) -> None:
    assert type(got) is type(want)
    if isinstance(want, QuantizedTensor):
        assert (got.format, got.shape) == (want.format, want.shape)
        for suffix, part in want.parts.items():
            assert torch.equal(got.parts[suffix], part)
    else:
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def read_all(file: Path) -> None:
    opened = Container(file)
    for name in opened.names():
        opened.read(name)


def test_container_returns_what_was_written(path: Path):
    opened = Container(path)
    tensors = make_tensors()
    assert opened.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert name in opened
        assert_same(opened.read(name), tensor)
    want = metadata()
    assert opened.config == want.model_config
    for field in ("tokenizer_json", "tokenizer_config", "chat_template", "generation_config"):
        assert getattr(opened, field) == getattr(want, field)
    assert opened.metadata.policy == want.policy
    assert opened.metadata.report == want.report
    assert opened.format("c.weight") == Format.parse("int4")
    assert opened.format("steps") is None


def test_container_is_a_safetensors_file(path: Path):
    """The reference reader, which allows no gap between tensors, opens it."""
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["a.packed"], make_tensors()["a.weight"].parts["packed"])


def test_container_tensors_start_at_64_bytes(path: Path):
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    assert (8 + header_bytes) % 64 == 0
    starts = [v["data_offsets"][0] for k, v in header.items() if not k.startswith("__")]
    assert len(starts) > 10
    assert all(start % 64 == 0 for start in starts)


def test_container_is_the_same_bytes_however_much_header_room(path: Path, tmp_path: Path):
    """Reserved room only adds spaces; without it the bytes are copied behind the header."""
    other = tmp_path / "reserved.pt"
    write_container(other, make_tensors().items(), metadata(), header_bytes=20_000)
    small, large = path.read_bytes(), other.read_bytes()
    assert int.from_bytes(large[:8], "little") + 8 == 20_032
    data = len(large) - 20_032
    assert small[-data:] == large[-data:]
    read_all(other)
    again = tmp_path / "again.pt"
    write_container(again, make_tensors().items(), metadata())
    assert again.read_bytes() == small


def test_container_writing_to_a_tensor_leaves_the_file_alone(path: Path):
    before = path.read_bytes()
    Container(path).read("e.weight").fill_(0)
    assert path.read_bytes() == before


def test_write_container_leaves_nothing_behind_when_it_fails(path: Path):
    before = path.read_bytes()

    def failing():
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_container(path, failing(), metadata())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("name", ["a.weight", "__padding__.0", "a.packed"])
def test_write_container_refuses_taken_names(tmp_path: Path, name: str):
    tensors = [("a.weight", make_tensors()["a.weight"]), (name, torch.ones(1))]
    with pytest.raises(CheckpointError, match="cannot write"):
        write_container(tmp_path / "m.pt", tensors, metadata())


def test_write_container_refuses_a_directory_and_leaves_nothing_beside_it(tmp_path: Path):
    """The whole file stayed behind under a hidden name: renaming it failed last of all."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder is a directory; name a file in it"):
        write_container(tmp_path / "folder", make_tensors().items(), Metadata())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_write_container_metadata_may_be_completed_by_the_generator(tmp_path: Path):
    meta = metadata()

    def tensors():
        yield "a", torch.ones(3)
        meta.report["done"] = True

    write_container(tmp_path / "m.pt", tensors(), meta)
    assert Container(tmp_path / "m.pt").metadata.report["done"] is True


def damaged_copies(raw: bytes, seed: int):
    """Yield 100 cuts and 100 single bit flips, header and data alike."""
    rng = random.Random(seed)
    header = 8 + int.from_bytes(raw[:8], "little")
    for i in range(100):
        yield raw[: rng.randrange(header if i % 2 else len(raw))]
    for i in range(100):
        at = rng.randrange(8 * (header if i % 2 else len(raw)))
        copy = bytearray(raw)
        copy[at // 8] ^= 1 << at % 8
        yield bytes(copy)


def test_container_every_cut_and_flip_is_one_checkpoint_error(path: Path):
    raw = path.read_bytes()
    bad = path.with_name("bad.pt")
    for copy in damaged_copies(raw, seed=1):
        bad.write_bytes(copy)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            read_all(bad)


def test_container_damage_never_kills_the_process(path: Path, tmp_path: Path):
    """The same in a child process: a signal would show as a negative return code."""
    for i, copy in enumerate(damaged_copies(path.read_bytes(), seed=2)):
        (tmp_path / f"bad{i}.pt").write_bytes(copy)
    script = """
import sys
from pathlib import Path
from fastgpt.checkpoint.container import Container
from fastgpt.errors import CheckpointError
caught = 0
for file in Path(sys.argv[1]).glob("bad*.pt"):
    try:
        opened = Container(file)
        for name in opened.names():
            opened.read(name)
    except CheckpointError:
        caught += 1
print(caught)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "200"), done.stderr


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_container_never_unpickles(tmp_path: Path):
    trap = tmp_path / "sprung"
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Bomb(trap)))
    torch.save({"w": torch.ones(2)}, tmp_path / "n.pt")
    for name in ("m.pt", "n.pt"):
        with pytest.raises(CheckpointError):
            Container(tmp_path / name)
    assert not trap.exists()


def test_container_plain_safetensors_is_named(tmp_path: Path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no FastGPT container"):
        Container(tmp_path / "m.safetensors")


def test_container_unknown_tensor_is_named(path: Path):
    with pytest.raises(CheckpointError, match="has no tensor 'nope'"):
        Container(path).read("nope")


def rewrite(path: Path, change, *, data: bytes = b"") -> None:
    """Apply `change` to the parsed header and write it back with a correct checksum."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    meta = json.loads(header["__metadata__"]["fastgpt"])
    change(header, meta)
    header["__metadata__"] = {"xxh3": "0" * 16, "fastgpt": json.dumps(meta)}
    text = json.dumps(
        {"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")
    ).encode()
    text = bytearray(text.ljust(-(-(len(text) + 8) // 64) * 64 - 8))
    at = len('{"__metadata__":{"xxh3":"')
    text[at : at + 16] = xxhash.xxh3_64_hexdigest(bytes(text)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:] + data)


def test_container_rewrite_helper_is_sound(path: Path):
    rewrite(path, lambda header, meta: None)
    read_all(path)


def set_version(value):
    return lambda header, meta: meta.update(format_version=value)


def in_tensor(name: str, **fields):
    return lambda header, meta: meta["tensors"][name].update(fields)


FORGERIES = {
    "newer": (set_version(2), "format version 2; this FastGPT reads up to 1"),
    "version-text": (set_version("1"), "never existed"),
    "version-bool": (set_version(True), "never existed"),
    "unknown-format": (in_tensor("a.weight", format={"format": "fp9"}), "unknown format 'fp9'"),
    "wrong-shape": (in_tensor("a.weight", shape=[130, 5]), "needs"),
    "negative-shape": (in_tensor("g.weight", shape=[-2, -2, 2]), "shape"),
    "wrong-rank": (in_tensor("a.weight", shape=[650]), "cannot be used"),
    "huge-shape": (in_tensor("c.weight", shape=[2**62, 2**62]), "needs"),
    "wrong-parts": (in_tensor("a.weight", parts={"packed": "0" * 16}), "the parts"),
    "record-type": (in_tensor("a.weight", shape="5"), "metadata that cannot be read"),
    "unknown-tensor": (lambda h, m: m["tensors"].pop("a.weight"), "does not know"),
    "missing-tensor": (
        lambda h, m: m["tensors"].update({"z": m["tensors"]["e.weight"]}),
        "lacks 'z'",
    ),
    "shared-part": (
        lambda h, m: m["tensors"].update({"a": m["tensors"]["a.weight"]}),
        "for two tensors",
    ),
    "gap": (
        lambda h, m: h.pop(next(name for name in h if name.startswith("__padding__"))),
        "belong to no tensor",
    ),
    "not-an-object": (lambda h, m: m.update(tensors=3), "metadata that cannot be read"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_container_forged_header_is_refused(path: Path, case: str):
    """Headers with a correct checksum that say something impossible."""
    change, message = FORGERIES[case]
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_all(path)


def test_container_trailing_bytes_are_refused(path: Path):
    rewrite(path, lambda header, meta: None, data=b"\0" * 64)
    with pytest.raises(CheckpointError, match="64 bytes after its last tensor"):
        Container(path)


def test_container_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none\.pt cannot be read"):
        Container(tmp_path / "none.pt")


def test_metadata_fields_are_the_documented_ones():
    """The on-disk contract: only a field that a reader may ignore keeps the format_version."""
    fields = [f.name for f in msgspec.structs.fields(Metadata)]
    assert fields == [
        "format_version",
        "model_config",
        "policy",
        "tensors",
        "tokenizer_json",
        "tokenizer_config",
        "chat_template",
        "generation_config",
        "report",
        "certificate",
        "fp16_overflows",
    ]
    assert container.FORMAT_VERSION == 1


@pytest.mark.parametrize("num_bytes", [0, 1, 15, 16, 17, 50])
def test_part_sums_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, num_bytes: int):
    monkeypatch.setattr(container, "_PIECE_BYTES", 16)
    part = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    raw = part.numpy().tobytes()
    wanted = xxhash.xxh3_64_hexdigest(raw), hashlib.sha256(raw).hexdigest()
    assert container.part_sums(part) == wanted
    assert (container.part_xxh3(part), container.part_sha256(part)) == wanted


def test_writer_blocks_can_be_read_before_they_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Large parts are written by several threads; a block is there when it is read."""
    monkeypatch.setattr(writer, "_MAX_WRITE_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(i + 1, 997) for i in range(5)}
    target = ContainerWriter(tmp_path / "m.pt")
    blocks = []
    for name, tensor in tensors.items():
        target.add(name, tensor)
        blocks.append(target.commit())
    for name, tensor in tensors.items():
        assert torch.equal(target.read(name), tensor)
    assert all(block.is_written() for block in blocks)
    assert [list(block.wait().records) for block in blocks] == [[name] for name in tensors]
    target.finish(Metadata(policy={}))
    with_header = Container(tmp_path / "m.pt")
    assert all(torch.equal(with_header.read(name), tensor) for name, tensor in tensors.items())
