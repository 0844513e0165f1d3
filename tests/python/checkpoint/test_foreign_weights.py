"""Directories of other toolkits: each reads as what an independent writer meant, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import ml_dtypes
import numpy as np
import pytest
import torch
from foreign_files import MODULE, make, make_fp8, replace, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.checkpoint import awq, codes, compressed_tensors, gptq, open_checkpoint
from fastgpt.errors import CheckpointError
from fastgpt.scheme import QuantizedTensor

NAME = f"{MODULE}.weight"
RAGGED = {"rows": 16, "cols": 104}


def read(path: Path, name: str = NAME) -> torch.Tensor | QuantizedTensor:
    return open_checkpoint(path).read(name)


def assert_means(
    stored: torch.Tensor | QuantizedTensor, values: np.ndarray, fmt: str | None
) -> None:
    """fmt: of kept codes; None: dequantized to the float32 that the test configurations name."""
    if fmt is None:
        assert isinstance(stored, torch.Tensor)
        assert stored.dtype == torch.float32
        got = stored
    else:
        assert isinstance(stored, QuantizedTensor), "codes were not kept"
        assert str(stored.format) == fmt
        got = stored.dequantize()
    np.testing.assert_array_equal(got.numpy(), values)


def gptq_case(path: Path, weight: files.Weight, **more: Any) -> Path:
    v2 = more.get("checkpoint_format") == "gptq_v2"
    return write(path, files.gptq(weight, v2=v2), files.gptq_config(weight, **more))


def awq_case(path: Path, weight: files.Weight, **more: Any) -> Path:
    gemv = more.get("version") == "gemv"
    return write(path, files.awq(weight, gemv=gemv), files.awq_config(weight, **more))


def packed_case(path: Path, weight: files.Weight, **how: Any) -> Path:
    return write(path, files.packed(weight, **how), files.ct_config(files.ct_args(weight)))


def int8_case(path: Path, weight: files.Weight, layout: str = "int-quantized") -> Path:
    return write(path, files.int8s(weight), files.ct_config(files.ct_args(weight), layout))


def fp8_case(path: Path, weight: files.Fp8, layout: str = "float-quantized") -> Path:
    scope = "block" if weight.block else "tensor" if weight.scale.size == 1 else "channel"
    args = files.fp8_args(scope, list(weight.block) if weight.block else None)
    return write(path, weight.tensors(), files.ct_config(args, layout))


SHUFFLED = np.random.default_rng(1).permutation(96) // 32
bf16 = ml_dtypes.bfloat16
# name -> writer, the weight, and the format that keeps its codes
CASES: dict[str, tuple[Callable[[Path], Path], Any, str | None]] = {}


def add(name: str, writer: Any, weight: Any, fmt: str | None, **how: Any) -> None:
    CASES[name] = (lambda path: writer(path, weight, **how), weight, fmt)


add("gptq v1", gptq_case, make(), "int4 g32 asymmetric")
add("gptq v2", gptq_case, make(), "int4 g32 asymmetric", checkpoint_format="gptq_v2")
add("gptq sym", gptq_case, make(symmetric=True), "int4 g32")
add("gptq sym v2", gptq_case, make(symmetric=True), "int4 g32", checkpoint_format="gptq_v2")
add("gptq channel", gptq_case, make(group_size=None), "int4 g128 asymmetric")
add("gptq ragged", gptq_case, make(group_size=64, **RAGGED), "int4 g64 asymmetric")
add("gptq 256", gptq_case, make(group_size=256, cols=520), "int4 g128 asymmetric")
add("gptq 16", gptq_case, make(group_size=16), None)
add("gptq 2 bits", gptq_case, make(2, 64), "int2 g64 asymmetric")
add("gptq 3 bits", gptq_case, make(3, rows=32), "int3 g32 asymmetric")
add("gptq 3 bits 32", gptq_case, make(3, 96, rows=32), "int3 g32 asymmetric")
add("gptq 8 bits", gptq_case, make(8), None)
add("gptq 8 bits v2", gptq_case, make(8, symmetric=True), None, checkpoint_format="gptq_v2")
add("gptq desc_act", gptq_case, replace(make(), group_of=SHUFFLED), None)
add("awq", awq_case, make(), "int4 g32 asymmetric")
add("awq ragged", awq_case, make(group_size=128, **RAGGED), "int4 g128 asymmetric")
add("awq gemv", awq_case, make(rows=13), "int4 g32 asymmetric", version="gemv")
add("packed", packed_case, make(), "int4 g32 asymmetric")
add("packed odd", packed_case, make(rows=7, cols=33), "int4 g32 asymmetric")
add("packed sym", packed_case, make(symmetric=True, group_size=64), "int4 g64")
add("packed channel", packed_case, make(group_size=None, cols=300), "int4 g128 asymmetric")
add("packed 1 x 1", packed_case, make(rows=1, cols=1), "int4 g32 asymmetric")
add("packed g_idx", packed_case, replace(make(), group_of=SHUFFLED), None)
for bits in (2, 3, 5, 6, 7, 8):
    kept = {2: "int2 g32 asymmetric", 3: "int3 g32 asymmetric"}.get(bits)
    add(f"packed {bits} bits", packed_case, make(bits, rows=32), kept)
    add(f"padded {bits} bits", packed_case, make(bits, rows=32), kept, padded=True)
add("packed float32 scales", packed_case, make(scale_dtype=np.float32), None,
    scale_dtype=torch.float32)  # fmt: skip
add("packed bfloat16 scales", packed_case, make(scale_dtype=bf16), "int4 g32 asymmetric",
    scale_dtype=torch.bfloat16)  # fmt: skip
add("int8 channel", int8_case, make(8, None, symmetric=True, scale_dtype=bf16), "int8")
add("gptq 8 bits channel", gptq_case, make(8, None, symmetric=True), "int8")
add("packed 8 bits channel", packed_case, make(8, None, symmetric=True), "int8")
add("int8 asymmetric", int8_case, make(8, None, scale_dtype=bf16), None, layout="naive-quantized")
add("int4 in bytes", int8_case, make(scale_dtype=bf16), "int4 g32 asymmetric")
add("fp8 tensor", fp8_case, make_fp8("tensor"), "fp8")
add("fp8 channel", fp8_case, make_fp8(), "fp8", layout="naive-quantized")
add("fp8 block", fp8_case, make_fp8("block", rows=130, cols=200), "fp8 128x128")
add("fp8 block 64x32", fp8_case, make_fp8("block", rows=70, block=(64, 32)), None)


@pytest.mark.parametrize("name", CASES)
def test_read_is_what_was_written(tmp_path: Path, name: str) -> None:
    writer, weight, fmt = CASES[name]
    path = writer(tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == [NAME]
    assert_means(checkpoint.read(NAME), weight.values, fmt)
    (said,) = checkpoint.imported
    assert (said.num_weights, said.first) == (1, NAME)
    if name != "packed float32 scales" and name != "packed g_idx":  # seen only in the bytes
        assert said.becomes == (fmt or "float32")


# ---- the ten faults: each must make one of the cases above fail ----


def patch_codes(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Let `change` edit the arguments of from_codes wherever it is called."""
    right = codes.from_codes

    def wrong(values: torch.Tensor, scale: torch.Tensor, zero: Any, **how: Any) -> Any:
        return right(*change(values, scale.contiguous(), zero), **how)

    for module in (gptq, awq, compressed_tensors):
        monkeypatch.setattr(module, "from_codes", wrong)


def swap_nibbles(monkeypatch: pytest.MonkeyPatch) -> None:
    right = codes.read_stream

    def wrong(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        raw = words.contiguous().view(torch.uint8)
        return right(raw >> 4 | raw << 4, bits, count)

    for module in (gptq, awq, compressed_tensors):
        monkeypatch.setattr(module, "read_stream", wrong)


def ragged_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last, short group takes the scale of the group before it."""

    def change(values: torch.Tensor, scale: torch.Tensor, zero: Any) -> Any:
        short = values.shape[1] % 64 and scale.shape[1] > 1
        return values, torch.cat((scale[:, :-1], scale[:, -2:-1]), 1) if short else scale, zero

    patch_codes(monkeypatch, change)


def v1_as_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gptq.Layout

    def wrong(*args: Any, **options: Any) -> gptq.Layout:
        return right(*args, **{**options, "is_v1": False})

    monkeypatch.setattr(gptq, "Layout", wrong)


def arguments(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: patch_codes(monkeypatch, change)


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "swapped nibbles": ("packed", swap_nibbles),
    "zero point off by one": (
        "packed",
        arguments(lambda c, s, z: (c, s, (z + 1) & 15)),
    ),
    "transposed scales": (
        "packed",
        arguments(lambda c, s, z: (c, s.T.reshape(s.shape), z)),
    ),
    "off-by-one group": ("packed", arguments(lambda c, s, z: (c, s.roll(1, 1), z))),
    "wrong ragged edge": ("gptq ragged", ragged_edge),
    "wrong AWQ order": (
        "awq",
        lambda m: m.setattr(awq, "ROW_OF_NIBBLE", tuple(range(8))),
    ),
    "v1 read as v2": ("gptq v1", v1_as_v2),
    "sign of the zero point": ("packed", arguments(lambda c, s, z: (c, s, (16 - z) & 15))),
    "scale divides": ("packed", arguments(lambda c, s, z: (c, (1 / s).half(), z))),
}
# The tenth, a residual folded twice, is planted in tests/python/quant/test_export.py.


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, plant = FAULTS[fault]
    writer, weight, fmt = CASES[case]
    assert_means(read(writer(tmp_path / "right")), weight.values, fmt)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_means(read(writer(tmp_path / "wrong")), weight.values, fmt)


def test_symmetric_file_of_the_other_version_raises(tmp_path: Path) -> None:
    weight = make(symmetric=True)
    config = files.gptq_config(weight, checkpoint_format="gptq_v2")
    path = write(tmp_path, files.gptq(weight), config)
    with pytest.raises(CheckpointError, match=r"qzeros' holds the zero point 7 .*probably not"):
        read(path)


# ---- codecs ----


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 70), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_streams_of_codes_round_trip(bits: int, rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**bits, (rows, cols))
    words = torch.from_numpy(files.words_of(values, bits))
    np.testing.assert_array_equal(codes.read_stream(words, bits, cols).numpy(), values)
    padded = torch.from_numpy(files.words_of(values, bits, padded=True))
    np.testing.assert_array_equal(codes.read_padded(padded, bits, cols).numpy(), values)
    row_bytes = -(-cols * bits // 8) + seed % 3
    stream = codes.pack_stream(torch.from_numpy(values.astype(np.uint8)), bits, row_bytes)
    assert stream.shape == (rows, row_bytes)
    np.testing.assert_array_equal(codes.read_stream(stream, bits, cols).numpy(), values)


@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((None, 8, 16, 32, 64, 96, 128, 256)),
    st.integers(1, 4),
    st.integers(1, 300),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_weights_of_any_shape_keep_their_values(
    bits: int, group_size: int | None, rows: int, cols: int, symmetric: bool
) -> None:
    weight = make(bits, group_size, rows=rows, cols=cols, symmetric=symmetric)
    stored = codes.from_codes(
        torch.from_numpy(weight.codes.astype(np.uint8)),
        torch.from_numpy(weight.scale),
        torch.from_numpy(weight.zero.astype(np.uint8)),
        bits=bits,
        group_size=group_size,
        dtype=torch.float32,
    )
    if isinstance(stored, QuantizedTensor):
        assert not stored.format.symmetric  # zero points stay, as experts share one format
    is_held = bits < 8 and (group_size is None or group_size % 32 == 0)
    assert isinstance(stored, QuantizedTensor) == is_held
    dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
    np.testing.assert_array_equal(dense.numpy(), weight.values)


def test_every_fp8_code_is_the_number_ml_dtypes_says(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 256)
    finite = every[(every & 0x7F) != 0x7F].reshape(1, -1)
    weight = files.Fp8(finite, np.ones((1, 1), np.float32))
    stored = read(fp8_case(tmp_path, weight))
    assert isinstance(stored, QuantizedTensor)
    want = finite.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(stored.dequantize().numpy(), want)


@pytest.mark.parametrize(("bits", "kind"), [(2, "int2"), (4, "int4"), (8, "int8")])
def test_every_integer_code_is_the_number_ml_dtypes_says(
    tmp_path: Path, bits: int, kind: str
) -> None:
    signed = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    number = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    assert (signed.astype(number).astype(np.int64) == signed).all()
    every = (signed + 2 ** (bits - 1)).reshape(1, -1)
    ones = np.ones((1, 1), np.float32)
    weight = files.Weight(every, ones, ones * 2 ** (bits - 1), bits, None, symmetric=True)
    stored = read(packed_case(tmp_path, weight))
    dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
    np.testing.assert_array_equal(dense.numpy()[0], signed.astype(number).astype(np.float32))


def test_padding_codes_mean_zero(tmp_path: Path) -> None:
    weight = make(rows=7, cols=33)
    stored = read(packed_case(tmp_path, weight))
    assert isinstance(stored, QuantizedTensor)
    packed = stored.parts["packed"]
    tail = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, 33:]
    assert torch.equal(tail, stored.parts["zero_point"][:, -1:].expand_as(tail))


# ---- the real libraries ----


def test_packing_is_the_librarys() -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng = np.random.default_rng(3)
    for bits, shape in ((4, (3, 33)), (3, (5, 64)), (2, (1, 7)), (7, (2, 40)), (8, (4, 9))):
        values = rng.integers(0, 2**bits, shape)
        signed = torch.from_numpy((values - 2 ** (bits - 1)).astype(np.int8))
        words = library.pack_to_int32(signed, bits)
        np.testing.assert_array_equal(words.numpy(), files.words_of(values, bits))
        down = library.pack_to_int32(signed, bits, packed_dim=0)
        np.testing.assert_array_equal(down.numpy(), files.words_of(values.T, bits).T)


def test_awq_is_what_its_converter_reads() -> None:
    library = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    weight = make()
    out = library.AutoAWQConverter(group_size=32).process(files.awq(weight))
    expected = files.packed(weight)
    for name, value in expected.items():
        assert torch.equal(out[name], value), name


# ---- whose scheme a module has ----


def test_groups_targets_and_ignore(tmp_path: Path) -> None:
    """Mixed precision: a name goes before a pattern, a pattern before a class; ignore wins."""
    four, eight = make(symmetric=True), make(8, symmetric=True)
    a, b, c, d = (f"model.layers.{i}.mlp.up_proj" for i in range(4))
    plain = torch.ones(2, 2)
    tensors = {
        **files.packed(eight, a),
        **files.packed(four, b),
        **files.packed(eight, c),
        f"{d}.weight": plain,
        "model.embed_tokens.weight": plain + 1,
        f"{a}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    config = files.ct_config(files.ct_args(eight), "mixed-precision", ignore=[d, "lm_head"])
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    config["config_groups"]["group_1"] = {
        "targets": [b, r"re:.*layers\.(3|9)\."],
        "weights": files.ct_args(four),
        "format": "pack-quantized",
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, config))
    assert checkpoint.names() == sorted(
        [*(f"{m}.weight" for m in (a, b, c, d)), "model.embed_tokens.weight"]
    )
    assert_means(checkpoint.read(f"{a}.weight"), eight.values, None)
    assert_means(checkpoint.read(f"{b}.weight"), four.values, "int4 g32")
    assert torch.equal(checkpoint.read(f"{d}.weight"), plain)  # type: ignore[arg-type]
    assert sorted(i.num_weights for i in checkpoint.imported) == [1, 2]


def test_gptq_dynamic_overrides_by_pattern(tmp_path: Path) -> None:
    four, eight = make(symmetric=True), make(8, symmetric=True)
    other = "model.layers.1.mlp.down_proj"
    tensors = {**files.gptq(four), **files.gptq(eight, other)}
    config = files.gptq_config(four, dynamic={r"+:.*\.down_proj": {"bits": 8}, r"-:.*o_proj": {}})
    checkpoint = open_checkpoint(write(tmp_path, tensors, config))
    assert_means(checkpoint.read(NAME), four.values, "int4 g32")
    assert_means(checkpoint.read(f"{other}.weight"), eight.values, None)
    config["dynamic"] = {r"-:.*\.down_proj": {}}
    with pytest.raises(CheckpointError, match=r"down_proj.g_idx' is quantized, but a '-:'"):
        open_checkpoint(write(tmp_path, tensors, config))


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(tmp_path: Path, file: str) -> None:
    weight = make()
    if file == "quantize_config.json":
        path = write(tmp_path, files.gptq(weight), None)
        text = '{"bits": 4, "group_size": 32, "sym": false, "desc_act": false, "damp_percent": 0.1}'
    else:
        path = write(tmp_path, files.awq(weight), None)
        text = '{"w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "GEMM"}'
    (path / file).write_text(text)
    assert_means(read(path), weight.values, "int4 g32 asymmetric")


def test_dequantized_in_the_models_type(tmp_path: Path) -> None:
    weight = make(8, symmetric=True)
    for named, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        config = files.ct_config(files.ct_args(weight))
        path = write(tmp_path, files.packed(weight), config, torch_dtype=named)
        stored = read(path)
        assert isinstance(stored, torch.Tensor)
        assert torch.equal(stored, torch.from_numpy(weight.values).to(dtype))
