"""Formats: parsing, parts, and every code against an independent definition."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.scheme import AVAILABLE_FORMATS, Format, QuantizedTensor, part_name

INT4_FORMATS = [
    {"format": "int4", "group_size": g, "symmetric": s}
    for g in (32, 64, 128)
    for s in (True, False)
]


@pytest.mark.parametrize("name", AVAILABLE_FORMATS)
def test_format_survives_its_json(name: str):
    fmt = Format.parse(name)
    assert Format.parse(fmt.to_json()) == fmt


@pytest.mark.parametrize("value", INT4_FORMATS)
def test_int4_options_survive_their_json(value: dict):
    fmt = Format.parse(value)
    assert Format.parse(fmt.to_json()) == fmt
    assert (fmt.group_size, fmt.symmetric) == (value["group_size"], value["symmetric"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("in4", "did you mean 'int4'"),
        ({"format": "int4", "groupsize": 64}, "did you mean 'group_size'"),
        ({"format": "int4", "group_size": 100}, "int4 takes 128, 32, 64"),
        ({"format": "int4", "group_size": True}, "group_size is True"),
        ({"format": "fp8", "group_size": 128}, "no option 'group_size'"),
        ({"format": "int8", "scale": "block"}, "scale is 'block'; int8 takes channel"),
        ({"format": "int8", "symmetric": False}, "symmetric is False; int8 takes True"),
        ({"format": "fp16", "scale": "channel"}, "takes no options"),
        ({"group_size": 64}, "format None"),
        (4, "expected a format name"),
        ({"format": "binary", "algorithm": "fancy"}, "two_level, naive"),
    ],
)
def test_format_errors_name_the_fix(value, message: str):
    with pytest.raises(ConfigError, match=message):
        Format.parse(value, "residual_connections")


def test_part_name_drops_weight():
    assert part_name("a.weight", "scale") == "a.scale"
    assert part_name("experts.gate_up_proj", "packed") == "experts.gate_up_proj.packed"


def test_format_refuses_a_rank_it_cannot_store():
    with pytest.raises(ConfigError, match="norm gains"):
        Format.parse("binary").parts((2, 3))
    with pytest.raises(ConfigError, match="weights"):
        Format.parse("int4").parts((3,))


def test_quantized_tensor_refuses_foreign_parts():
    fmt = Format.parse("fp8")
    parts = {"packed": torch.zeros(2, 3, dtype=torch.uint8), "scale": torch.ones(2)}
    QuantizedTensor(fmt, (2, 3), parts)
    with pytest.raises(CheckpointError, match="expected"):
        QuantizedTensor(fmt, (3, 2), parts)
    with pytest.raises(CheckpointError, match="has parts"):
        QuantizedTensor(fmt, (2, 3), {"packed": parts["packed"]})


def test_fp8_decodes_every_code_as_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    parts = {"packed": torch.from_numpy(codes).view(1, 256), "scale": torch.ones(1)}
    got = QuantizedTensor(Format.parse("fp8"), (1, 256), parts).dequantize()[0].numpy()
    np.testing.assert_array_equal(got, expected)  # equal_nan: both NaN codes stay NaN


def unpack_int4(q: QuantizedTensor) -> np.ndarray:
    """Decode a 2-D int4 tensor value by value, from the definition alone."""
    packed, scale = q.parts["packed"].numpy(), q.parts["scale"].numpy()
    zero = q.parts["zero_point"].numpy() if "zero_point" in q.parts else None
    out = np.empty(q.shape, dtype=np.float32)
    for row in range(q.shape[0]):
        for col in range(q.shape[1]):
            byte = int(packed[row, col // 2])
            code = byte >> 4 if col % 2 else byte & 15
            group = col // q.format.group_size
            offset = 8 if zero is None else int(zero[row, group])
            out[row, col] = np.float32(code - offset) * np.float32(scale[row, group])
    return out


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 300),
    value=st.sampled_from(INT4_FORMATS),
    seed=st.integers(0, 2**31),
)
def test_int4_decodes_as_its_definition(rows: int, cols: int, value: dict, seed: int):
    fmt = Format.parse(value)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for suffix, spec in fmt.parts((rows, cols)).items():
        if suffix == "scale":
            parts[suffix] = torch.rand(spec.shape, generator=generator).half()
        else:
            top = 16 if suffix == "zero_point" else 256
            parts[suffix] = torch.randint(
                0, top, spec.shape, generator=generator, dtype=torch.uint8
            )
    q = QuantizedTensor(fmt, (rows, cols), parts)
    np.testing.assert_array_equal(q.dequantize().numpy(), unpack_int4(q))
    assert q.nbytes == fmt.nbytes((rows, cols))
    assert q.parts["packed"].shape[-1] % 16 == 0


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_binary_decodes_as_its_definition(n: int, seed: int):
    fmt = Format.parse("binary")
    rng = np.random.default_rng(seed)
    specs = fmt.parts((n,))
    packed = rng.integers(0, 256, specs["packed"].shape, dtype=np.uint8)
    scale = rng.random(specs["scale"].shape, dtype=np.float32)
    offset = rng.standard_normal(specs["offset"].shape, dtype=np.float32)
    parts = {"packed": packed, "scale": scale, "offset": offset}
    q = QuantizedTensor(fmt, (n,), {k: torch.from_numpy(v) for k, v in parts.items()})
    expected = [
        offset[i // 128] + (scale[i // 128] if packed[i // 8] >> (i % 8) & 1 else -scale[i // 128])
        for i in range(n)
    ]
    np.testing.assert_array_equal(q.dequantize().numpy(), np.array(expected, dtype=np.float32))


def test_int8_decodes_every_code():
    fmt = Format.parse("int8")
    assert Format.parse(fmt.to_json()) == fmt
    assert str(fmt) == "int8"
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)
    scale = torch.tensor([0.5, 3.0])
    values = QuantizedTensor(fmt, (2, 128), {"packed": codes, "scale": scale}).dequantize()
    assert torch.equal(values[0], torch.arange(-128, 0) * 0.5)
    assert torch.equal(values[1], torch.arange(128) * 3.0)
    assert fmt.nbytes((3, 5, 7)) == 3 * 5 * (7 + 4)


def test_fp8_block_scale_covers_ragged_edges():
    fmt = Format.parse({"format": "fp8", "scale": "block"})
    one = torch.tensor([1.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    parts = {
        "packed": one.expand(130, 257).contiguous(),
        "scale": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    }
    x = QuantizedTensor(fmt, (130, 257), parts).dequantize()
    assert x[127, 127] == 1
    assert x[127, 128] == 2
    assert x[128, 256] == 6


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("cols", [1, 5, 43, 64, 130])
def test_narrow_integers_decode_as_an_independent_reader(bits, symmetric, group_size, cols):
    """Every code of every width, read bit by bit: code j of a row is at its bit j * bits."""
    fmt = Format.parse({"format": f"int{bits}", "symmetric": symmetric, "group_size": group_size})
    assert Format.parse(fmt.to_json()) == fmt
    rng = np.random.default_rng(cols)
    specs = fmt.parts((3, cols))
    packed = rng.integers(0, 256, specs["packed"].shape, dtype=np.uint8)
    scale = rng.random(specs["scale"].shape).astype(np.float16)
    zero = rng.integers(0, 2**bits, specs["scale"].shape, dtype=np.uint8)
    parts = {"packed": torch.from_numpy(packed), "scale": torch.from_numpy(scale)}
    if not symmetric:
        parts["zero_point"] = torch.from_numpy(zero)
    got = QuantizedTensor(fmt, (3, cols), parts).dequantize().numpy()
    seen = set()
    for row in range(3):
        number = int.from_bytes(packed[row].tobytes(), "little")
        for j in range(cols):
            code = number >> (j * bits) & (2**bits - 1)
            middle = 2 ** (bits - 1) if symmetric else int(zero[row, j // group_size])
            expected = np.float32(code - middle) * np.float32(scale[row, j // group_size])
            assert got[row, j] == expected, (row, j)
            seen.add(code)
    assert cols < 43 or seen == set(range(2**bits))
