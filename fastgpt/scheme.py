"""Quantization formats: names, parts on disk, and how a stored tensor becomes numbers.

A weight is stored either plainly (`fp32`, `bf16`, `fp16`: one tensor under its own name) or as
parts whose names end in a suffix: `packed` codes, a `scale` that multiplies to dequantize, and,
where the format has them, `zero_point` or `offset`. This module is the one description of those
parts; the container writes them, the quantizer produces them, kernels arrange them at load.

    format            packed                              scale            the rest
    fp8               uint8 [.., n, k], e4m3fn codes      fp32 [.., n], or one per 128 x 128
    int8              int8 [.., n, k]                     fp32 [.., n]
    int4, int3, int2  uint8 [.., n, bytes of a row]       fp16 per group   zero_point uint8 per
                      padded to 16                                         group, if asymmetric
    binary            uint8 [bytes], a bit a value        fp32 per 128     offset fp32 per 128
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastgpt.errors import CheckpointError, ConfigError

__all__ = [
    "ALGORITHMS",
    "AVAILABLE_FORMATS",
    "BLOCK",
    "EIGHT_BIT",
    "PLAIN_DTYPES",
    "Format",
    "PartSpec",
    "QuantizedTensor",
    "part_name",
    "suggest",
]

PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AVAILABLE_FORMATS = (*PLAIN_DTYPES, "fp8", "int8", "int4", "int3", "int2", "binary")

# Of integer formats with groups; the first is the default.
ALGORITHMS = ("auto", "rtn", "clip", "gptq")

EIGHT_BIT = ("fp8", "int8")  # formats whose products can have activations of the same format
BLOCK = 128  # rows and columns of one fp8 block scale
_GROUP_BITS = {"int4": 4, "int3": 3, "int2": 2}
# Fewer bits repay smaller groups, so the default shrinks with them; the first is the default.
_GROUP_SIZES = {"int4": (128, 32, 64), "int3": (64, 32), "int2": (32, 64)}
_BINARY_GROUP_SIZE = 128
_ROW_ALIGNMENT = 16  # packed rows of integers are padded to this many bytes


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the choice nearest to `name`, or "" when none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def part_name(name: str, suffix: str) -> str:
    """Return the stored name of one part of a quantized tensor.

    >>> part_name("model.layers.0.mlp.up_proj.weight", "packed")
    'model.layers.0.mlp.up_proj.packed'
    """
    return f"{name.removesuffix('.weight')}.{suffix}"


class PartSpec(NamedTuple):
    """Type and shape of one stored part."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """How the values of one tensor are stored.

    Attributes:
        name: one of AVAILABLE_FORMATS.
        group_size: values that share one scale along the last dimension (int4: 32, 64 or 128;
            int3, int2: 32 or 64; binary: 128), else None.
        symmetric: integers without zero points; always True for other formats.
        scale: fp8: "channel" (one fp32 per output row) or "block" (one per 128 x 128); int8:
            "channel"; else None.
        activations: what the weight is multiplied with: "16bit" (activations as they are), or, of
            fp8 "fp8" and of int8 "int8": many rows are rounded to such codes first, with a scale a
            row, or with "block" scales one a row and 128 columns. "auto" is that where the device
            gains from it; nothing stored says "auto".
        algorithm: how codes are found, which reading them does not need, so formats that differ in
            it alone are equal. Integers: "auto" (the best of the others by output error on held-out
            data), "rtn" (round-to-nearest), "clip" (scales of least error) or "gptq"; binary:
            "two_level" (two values per group, residual folded into the next weights) or "naive"
            (sign times mean, nothing folded); else None.
    """

    name: str
    group_size: int | None = None
    symmetric: bool = True
    scale: str | None = None
    activations: str = "16bit"
    algorithm: str | None = field(default=None, compare=False)

    @staticmethod
    def parse(value: Format | str | Mapping[str, Any], where: str = "format") -> Format:
        """Return the format that a name or a mapping describes.

        Args:
            value: "int4", or {"format": "int4", "group_size": 64, "symmetric": False}.
            where: the config key that held the value, for messages.

        Raises:
            ConfigError: an unknown name, an unknown key, or a value the format does not take.

        >>> Format.parse("int4").group_size
        128
        """
        if isinstance(value, Format):
            return value
        if isinstance(value, str):
            value = {"format": value}
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where} is {value!r}; expected a format name or a mapping with the key 'format'"
            )
        options = dict(value)
        name = options.pop("format", None)
        if not isinstance(name, str):
            raise ConfigError(f"{where} has format {name!r}; expected one of {_names()}")
        if name not in AVAILABLE_FORMATS:
            hint = suggest(name, AVAILABLE_FORMATS)
            raise ConfigError(f"{where} names the unknown format {name!r}{hint}; known: {_names()}")
        return _with_options(name, options, where)

    @property
    def is_plain(self) -> bool:
        """True when the tensor is stored as it is, in one floating-point type."""
        return self.name in PLAIN_DTYPES

    @property
    def bits(self) -> int:
        """Bits of one code of an integer format with groups."""
        return _GROUP_BITS[self.name]

    @property
    def has_groups(self) -> bool:
        """True for integer codes with a scale per group of columns."""
        return self.name in _GROUP_BITS

    @property
    def folds_residual(self) -> bool:
        """True when what rounding loses is multiplied into the consumers of this tensor."""
        return self.name == "binary" and self.algorithm == "two_level"

    def to_json(self) -> dict[str, Any]:
        """Return the mapping that `parse` turns back into this format."""
        out: dict[str, Any] = {"format": self.name}
        if self.group_size is not None:
            out["group_size"] = self.group_size
        if self.has_groups:
            out["symmetric"] = self.symmetric
        if self.scale is not None:
            out["scale"] = self.scale
        if self.activations != "16bit":
            out["activations"] = self.activations
        if self.algorithm is not None:
            out["algorithm"] = self.algorithm
        return out

    def __str__(self) -> str:
        """Return a short name, such as "int4 g128"."""
        text = self.name
        if self.has_groups:
            text += f" g{self.group_size}" + ("" if self.symmetric else " asymmetric")
        elif self.scale == "block":
            text += " 128x128"
        elif self.algorithm == "naive":
            text += " naive"
        if self.activations != "16bit":
            text += f" ({self.activations} activations)"
        return text

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Return suffix -> type and shape of every stored part of a tensor of this shape.

        A plain tensor has one part with the empty suffix.

        Raises:
            ConfigError: the format cannot store a tensor of this rank.
        """
        if self.is_plain:
            return {"": PartSpec(PLAIN_DTYPES[self.name], shape)}
        if self.name == "binary":
            if len(shape) != 1:
                raise ConfigError(f"binary stores norm gains [n], not a tensor of shape {shape}")
            groups = _ceil_div(shape[0], _BINARY_GROUP_SIZE)
            return {
                "packed": PartSpec(torch.uint8, (_ceil_div(shape[0], 8),)),
                "scale": PartSpec(torch.float32, (groups,)),
                "offset": PartSpec(torch.float32, (groups,)),
            }
        if len(shape) < 2:
            raise ConfigError(f"{self.name} stores weights [n, k], not a tensor of shape {shape}")
        *lead, rows, cols = shape
        if self.name == "int8":
            return {
                "packed": PartSpec(torch.int8, shape),
                "scale": PartSpec(torch.float32, (*lead, rows)),
            }
        if self.name == "fp8":
            scale = (*lead, rows)
            if self.scale == "block":
                scale = (*lead, _ceil_div(rows, BLOCK), _ceil_div(cols, BLOCK))
            return {
                "packed": PartSpec(torch.uint8, shape),
                "scale": PartSpec(torch.float32, scale),
            }
        assert self.group_size is not None
        groups = _ceil_div(cols, self.group_size)
        row_bytes = _ceil_div(_ceil_div(cols * self.bits, 8), _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        parts = {
            "packed": PartSpec(torch.uint8, (*lead, rows, row_bytes)),
            "scale": PartSpec(torch.float16, (*lead, rows, groups)),
        }
        if not self.symmetric:
            parts["zero_point"] = PartSpec(torch.uint8, (*lead, rows, groups))
        return parts

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the stored bytes of a tensor of this shape, scales and padding included."""
        return sum(spec.nbytes for spec in self.parts(shape).values())


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight in its stored form: codes and scales, canonical layout, any device.

    Attributes:
        format: how to read the parts; never a plain format.
        shape: shape of the weight the parts describe.
        parts: suffix -> tensor, exactly those of `format.parts(shape)`.
    """

    format: Format
    shape: tuple[int, ...]
    parts: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        """Check that the parts are the ones the format prescribes."""
        expected = self.format.parts(self.shape)
        if self.parts.keys() != expected.keys():
            raise CheckpointError(
                f"{self.format} tensor of shape {self.shape} has parts {sorted(self.parts)}; "
                f"expected {sorted(expected)}"
            )
        for suffix, spec in expected.items():
            part = self.parts[suffix]
            if part.dtype != spec.dtype or tuple(part.shape) != spec.shape:
                raise CheckpointError(
                    f"part {suffix!r} of a {self.format} tensor is {part.dtype} "
                    f"{tuple(part.shape)}; expected {spec.dtype} {spec.shape}"
                )

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales and padding included."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight these parts describe, computed in float32 and rounded once to `dtype`.

        fp8:    x = e4m3(code) * scale
        int8:   x = code * scale
        int4, int3, int2: x = (code - zero_point) * scale
        binary: x = offset + (bit ? scale : -scale)
        """
        if self.format.has_groups:
            return _decode_groups(self).to(dtype)
        decode = {"fp8": _decode_fp8, "int8": _decode_int8, "binary": _decode_binary}
        return decode[self.format.name](self).to(dtype)

    def codes(self) -> torch.Tensor:
        """Return the integer codes of a format with groups, uint8, of the weight's shape."""
        packed = self.parts["packed"]
        bits = self.format.bits
        if bits == 4:
            return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)[..., : self.shape[-1]]
        cols = self.shape[-1]
        places = torch.arange(8, dtype=torch.uint8, device=packed.device)
        stream = (packed.unsqueeze(-1) >> places & 1).flatten(-2)[..., : cols * bits]
        shifts = places[:bits]
        codes: torch.Tensor = stream.unflatten(-1, (cols, bits)) << shifts
        return codes.sum(-1, dtype=torch.uint8)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same tensor with its parts on `device`."""
        return QuantizedTensor(
            self.format, self.shape, {k: v.to(device) for k, v in self.parts.items()}
        )


def _decode_fp8(q: QuantizedTensor) -> torch.Tensor:
    values = q.parts["packed"].view(torch.float8_e4m3fn).to(torch.float32)
    scale = q.parts["scale"]
    if q.format.scale == "channel":
        return values.mul_(scale.unsqueeze(-1))
    rows, cols = q.shape[-2:]
    per_row = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
    return values.mul_(per_row.repeat_interleave(BLOCK, dim=-1)[..., :cols])


def _decode_int8(q: QuantizedTensor) -> torch.Tensor:
    return q.parts["packed"].to(torch.float32).mul_(q.parts["scale"].unsqueeze(-1))


def _decode_groups(q: QuantizedTensor) -> torch.Tensor:
    group_size = q.format.group_size
    assert group_size is not None
    zero: torch.Tensor | int = 2 ** (q.format.bits - 1)
    if "zero_point" in q.parts:
        zero = _spread(q.parts["zero_point"].to(torch.float32), group_size, q.shape[-1])
    scale = _spread(q.parts["scale"].to(torch.float32), group_size, q.shape[-1])
    return q.codes().to(torch.float32).sub_(zero).mul_(scale)


def _decode_binary(q: QuantizedTensor) -> torch.Tensor:
    (n,) = q.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=q.parts["packed"].device)
    bits = (q.parts["packed"].unsqueeze(-1) >> shifts & 1).flatten()[:n]
    scale = _spread(q.parts["scale"], _BINARY_GROUP_SIZE, n)
    offset = _spread(q.parts["offset"], _BINARY_GROUP_SIZE, n)
    return offset + torch.where(bits.bool(), scale, -scale)


def _spread(per_group: torch.Tensor, group_size: int, cols: int) -> torch.Tensor:
    """Repeat one value per group to one per column; the last group may be short."""
    return per_group.repeat_interleave(group_size, dim=-1)[..., :cols]


def _with_options(name: str, options: dict[str, Any], where: str) -> Format:
    """Return Format `name` with `options` checked and the defaults filled in."""
    defaults: dict[str, tuple[Any, ...]] = {}  # option -> (default, other allowed values ...)
    if name == "fp8":
        defaults = {"scale": ("channel", "block"), "symmetric": (True,)}
    elif name == "int8":
        defaults = {"scale": ("channel",), "symmetric": (True,)}
    elif name in _GROUP_BITS:
        # Two bits on a symmetric grid are three values; zero points buy the fourth.
        defaults = {
            "group_size": _GROUP_SIZES[name],
            "symmetric": (True, False) if name != "int2" else (False, True),
            "algorithm": ALGORITHMS,
        }
    elif name == "binary":
        defaults = {"group_size": (_BINARY_GROUP_SIZE,), "algorithm": ("two_level", "naive")}
    if name in EIGHT_BIT:
        defaults["activations"] = ("16bit", name, "auto")
    for key, chosen in options.items():
        if key not in defaults:
            hint = suggest(key, defaults)
            takes = ", ".join(defaults) or "no options"
            raise ConfigError(f"{where}: {name} has no option {key!r}{hint}; it takes {takes}")
        allowed = defaults[key]
        if type(chosen) is not type(allowed[0]) or chosen not in allowed:
            names = ", ".join(str(a) for a in dict.fromkeys(allowed))
            raise ConfigError(f"{where}: {key} is {chosen!r}; {name} takes {names}")
    filled = {key: options.get(key, allowed[0]) for key, allowed in defaults.items()}
    return Format(name, **filled)


def _names() -> str:
    return ", ".join(AVAILABLE_FORMATS)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
