"""Round one tensor to its stored form: round-to-nearest, no data needed.

The native ops do fp8, int8 and int4, on the CPU three to five times as fast; `round_in_torch` gives
the same bits on any device, and is what they are tested against.
"""

from __future__ import annotations

import torch

from fastgpt import ops
from fastgpt.errors import CheckpointError, ConfigError, InvalidArgument
from fastgpt.quant.grid import encode, nearest_grid, pack_codes
from fastgpt.scheme import BLOCK, PLAIN_DTYPES, Format, QuantizedTensor

__all__ = ["binary_residual", "is_finite", "round_in_torch", "round_tensor"]

_FP8_MAX = 448.0  # largest finite e4m3fn
_INT8_MAX = 127.0  # of the codes that rounding gives
_FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24  # smallest positive fp16, also the smallest int4 scale
_MAX_FOLD = 64.0  # a group whose residuals leave 1/64 .. 64 stores magnitude, not clusters


def round_tensor(weight: torch.Tensor, fmt: Format, name: str) -> torch.Tensor | QuantizedTensor:
    """Return `weight` in the stored form `fmt`.

    Args:
        weight: [n] for binary, [..., n, k] for fp8 and integers, any shape for plain formats; fp32,
            bf16 or fp16.
        fmt: the target format.
        name: the tensor's name, for messages.

    Raises:
        CheckpointError: a value is NaN or infinite.
        ConfigError: the format cannot hold the tensor's values or rank.
    """
    if weight.numel() == 0:
        raise ConfigError(f"{name} has shape {tuple(weight.shape)}: there is nothing to quantize")
    _check_finite(weight, name)
    if fmt.is_plain:
        return _to_plain(weight, fmt, name)
    fmt.parts(tuple(weight.shape))  # refuses a rank the format cannot store
    if fmt.name in {"fp8", "int8", "int4"} and fmt.scale != "block":
        return _round_native(weight.contiguous(), fmt, name)
    return round_in_torch(weight, fmt, name)


def round_in_torch(weight: torch.Tensor, fmt: Format, name: str) -> QuantizedTensor:
    """Return what `round_tensor` returns for a quantized format, computed by torch alone."""
    x = weight.to(torch.float32)
    if fmt.has_groups and fmt.bits < 4:
        return _round_groups(x, fmt, name)
    rounders = {
        "fp8": _round_fp8,
        "int8": _round_int8,
        "int4": _round_int4,
        "binary": _round_binary,
    }
    try:
        return rounders[fmt.name](x, fmt)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _round_groups(x: torch.Tensor, fmt: Format, name: str) -> QuantizedTensor:
    rows = x.reshape(-1, x.shape[-1])
    try:
        grid = nearest_grid(rows, fmt)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    codes = encode(rows, grid).clamp_(min=1 if fmt.symmetric else 0)
    specs = fmt.parts(tuple(x.shape))
    parts = {k: v.view(specs[k].shape) for k, v in pack_codes(codes, grid, fmt).parts.items()}
    return QuantizedTensor(fmt, tuple(x.shape), parts)


def _round_native(weight: torch.Tensor, fmt: Format, name: str) -> QuantizedTensor:
    """Return the stored form of finite weights [..., n, k], computed by the native ops."""
    shape = tuple(weight.shape)
    rows = weight.reshape(-1, shape[-1])
    try:
        if fmt.name == "fp8":
            parts = dict(zip(("packed", "scale"), ops.quantize_fp8(rows), strict=True))
        elif fmt.name == "int8":
            parts = dict(zip(("packed", "scale"), ops.quantize_int8(rows), strict=True))
        else:
            assert fmt.group_size is not None
            packed, scale, zero_point = ops.quantize_int4(
                rows, group_size=fmt.group_size, symmetric=fmt.symmetric
            )
            parts = {"packed": packed, "scale": scale}
            if zero_point is not None:
                parts["zero_point"] = zero_point
            if weight.device.type != "cpu" and not bool(torch.isfinite(scale).all()):
                raise InvalidArgument("a scale is not finite")  # a kernel cannot refuse
    except InvalidArgument as error:  # values are finite, so a scale left fp16's range
        raise ConfigError(
            f"{name}: {error}; its largest value {float(weight.abs().amax()):.6g} needs an int4 "
            "scale above fp16's range; choose fp8 or bf16 for it"
        ) from None
    specs = fmt.parts(shape)
    return QuantizedTensor(fmt, shape, {k: v.view(specs[k].shape) for k, v in parts.items()})


def binary_residual(gain: torch.Tensor, stored: QuantizedTensor) -> torch.Tensor:
    """Return gain / stored gain [n]: what the consumers' input columns must absorb.

    The product of the two-level gain and this residual is the original gain, so folding it into
    the next weights leaves the model's function unchanged before those weights are rounded. It is
    float32, or float64 for such a gain.
    """
    dtype = torch.promote_types(gain.dtype, torch.float32)
    approx = stored.dequantize(torch.float32).to(dtype)
    residual = gain.to(dtype) / approx
    return torch.where(approx == 0, torch.ones_like(residual), residual)


def is_finite(weight: torch.Tensor) -> bool:
    """Tell whether no value is NaN or infinite: min and max carry both.

    One pass that allocates nothing of the weight's size. torch.isfinite takes 5 bytes for each
    value of 16 bits: for the embedding of a 70B model 5.3 GB.
    """
    if weight.numel() == 0:
        return True
    low, high = torch.aminmax(weight)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_finite(weight: torch.Tensor, name: str) -> None:
    if not is_finite(weight):
        bad = (~torch.isfinite(weight)).nonzero()
        raise CheckpointError(
            f"{name} holds {len(bad)} NaN or infinite values, the first at index "
            f"{tuple(bad[0].tolist())}; a damaged checkpoint is not quantized"
        )


def _to_plain(weight: torch.Tensor, fmt: Format, name: str) -> torch.Tensor:
    out = weight.to(PLAIN_DTYPES[fmt.name])
    if fmt.name == "fp16" and not is_finite(out):
        amax = float(weight.abs().amax())
        raise ConfigError(
            f"{name} reaches {amax:.6g}, above fp16's largest value {_FP16_MAX:.0f}; "
            f"store it as bf16 (an override {name!r}: 'bf16')"
        )
    return out


def _round_fp8(x: torch.Tensor, fmt: Format) -> QuantizedTensor:
    shape = tuple(x.shape)
    if fmt.scale == "channel":
        scale = _positive_scale(x.abs().amax(-1), _FP8_MAX)
        per_value = scale.unsqueeze(-1)
    else:
        rows, cols = shape[-2:]
        up, right = -rows % BLOCK, -cols % BLOCK
        padded = torch.nn.functional.pad(x, (0, right, 0, up))
        blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        scale = _positive_scale(blocks.abs().amax(dim=(-1, -3)), _FP8_MAX)
        per_row = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
        per_value = per_row.repeat_interleave(BLOCK, dim=-1)[..., :cols]
    codes = (x / per_value).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedTensor(fmt, shape, {"packed": codes.view(torch.uint8), "scale": scale})


def _round_int8(x: torch.Tensor, fmt: Format) -> QuantizedTensor:
    scale = _positive_scale(x.abs().amax(-1), _INT8_MAX)
    codes = torch.round(x / scale.unsqueeze(-1)).clamp_(-_INT8_MAX, _INT8_MAX)
    parts = {"packed": codes.to(torch.int8), "scale": scale}
    return QuantizedTensor(fmt, tuple(x.shape), parts)


def _round_int4(x: torch.Tensor, fmt: Format) -> QuantizedTensor:
    shape = tuple(x.shape)
    group_size = fmt.group_size
    assert group_size is not None
    cols = shape[-1]
    groups = torch.nn.functional.pad(x, (0, -cols % group_size)).unflatten(-1, (-1, group_size))
    zero_point = None
    if fmt.symmetric:
        scale = _fp16_scale(groups.abs().amax(-1), 7.0)
        codes = torch.round(groups / scale.float().unsqueeze(-1)).clamp_(-7, 7).add_(8)
    else:
        # Zero stays representable, so a padded tail and pruned weights decode to exactly 0.
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scale = _fp16_scale(high - low, 15.0)
        step = scale.float()
        zero = torch.round(-low / step).clamp_(0, 15)
        codes = torch.round(groups / step.unsqueeze(-1)).add_(zero.unsqueeze(-1)).clamp_(0, 15)
        zero_point = zero.to(torch.uint8)
    # Zeros that pad the last group round to its zero point, which is the pad code.
    flat = codes.to(torch.uint8).flatten(-2)
    row_bytes = fmt.parts(shape)["packed"].shape[-1]
    pad_code = 8 if zero_point is None else None
    flat = _resize_row(flat, 2 * row_bytes, pad_code, zero_point)
    packed = flat[..., 0::2] | (flat[..., 1::2] << 4)
    parts = {"packed": packed.contiguous(), "scale": scale}
    if zero_point is not None:
        parts["zero_point"] = zero_point
    return QuantizedTensor(fmt, shape, parts)


def _resize_row(
    codes: torch.Tensor, length: int, pad_code: int | None, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Cut the padded groups to `length` codes, or extend them with the code that means 0."""
    missing = length - codes.shape[-1]
    if missing <= 0:
        return codes[..., :length]
    tail = codes.new_empty((*codes.shape[:-1], missing))
    if pad_code is not None:
        tail.fill_(pad_code)
    elif zero_point is not None and zero_point.shape[-1]:
        tail.copy_(zero_point[..., -1:].expand_as(tail))
    return torch.cat((codes, tail), dim=-1)


def _round_binary(x: torch.Tensor, fmt: Format) -> QuantizedTensor:
    (n,) = x.shape
    assert fmt.group_size is not None
    bits, scales, offsets = [], [], []
    for group in x.split(fmt.group_size):
        two_level = fmt.algorithm == "two_level"
        high, scale, offset = _two_level(group) if two_level else _sign_code(group)
        bits.append(high)
        scales.append(scale)
        offsets.append(offset)
    flat = torch.nn.functional.pad(torch.cat(bits).to(torch.uint8), (0, -n % 8))
    place = 2 ** torch.arange(8, device=x.device)
    packed = (flat.unflatten(0, (-1, 8)) * place).sum(-1).to(torch.uint8)
    parts = {"packed": packed, "scale": torch.stack(scales), "offset": torch.stack(offsets)}
    return QuantizedTensor(fmt, (n,), parts)


def _two_level(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (bit, scale, offset) of the best two values for `group` by exact 2-means.

    Clusters that would fold a residual outside 1/64 .. 64 (a mean near zero) fall back to the
    sign code, whose residual is bounded by the spread of the group itself.
    """
    ordered, _ = torch.sort(group.double())
    n = len(ordered)
    sums = ordered.cumsum(0)
    counts = torch.arange(1, n + 1, dtype=torch.float64, device=group.device)
    # Splitting after position i maximizes the between-cluster sum of squares.
    left = sums**2 / counts
    right = (sums[-1] - sums) ** 2 / (n - counts).clamp(min=1)
    split = int((left + right).argmax())
    low = sums[split] / (split + 1)
    high = (sums[-1] - sums[split]) / (n - 1 - split) if split < n - 1 else low
    offset, scale = ((high + low) / 2).float(), ((high - low) / 2).float()
    bit = (group > ordered[split]) if split < n - 1 else torch.zeros_like(group, dtype=torch.bool)
    approx = offset + torch.where(bit, scale, -scale)
    residual = group / approx
    nonzero = group != 0
    bounded = (residual > 1 / _MAX_FOLD) & (residual < _MAX_FOLD)
    if bool((bounded | ~nonzero).all()) and bool((approx != 0).all()):
        return bit, scale, offset
    return _sign_code(group)


def _sign_code(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (bit, scale, offset) of sign(x) * mean |x|."""
    return group >= 0, group.abs().double().mean().float(), group.new_zeros(())


def _positive_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Return amax / largest, or 1 where every value is zero or the quotient underflows."""
    scale = amax / amax.new_tensor(largest)  # CUDA multiplies by the reciprocal of a plain number
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _fp16_scale(amax: torch.Tensor, steps: float) -> torch.Tensor:
    """Return amax / steps in fp16: 1 where all values are zero, never 0, never infinite."""
    scale = (amax / amax.new_tensor(steps)).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise ConfigError(
            f"its largest value {float(amax.amax()):.6g} needs an int4 scale above fp16's range; "
            "choose fp8 or bf16 for it"
        )
    tiny = torch.full_like(scale, _FP16_TINY)
    scale = torch.where(scale > 0, scale, tiny)
    return torch.where(amax > 0, scale, torch.ones_like(scale))
