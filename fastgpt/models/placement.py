"""Where a model runs and in which type: the meaning of device and dtype `auto`."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fastgpt import env
from fastgpt.errors import ConfigError, DeviceError
from fastgpt.logging import get_logger

__all__ = ["resolve_device", "resolve_dtype"]

_log = get_logger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device; `auto` is the first GPU unless FASTGPT_FORCE_CPU or none is there.

    Raises:
        ConfigError: if the text names no device.
        DeviceError: if the device is not there.
    """
    if isinstance(device, str) and device == "auto":
        use_gpu = torch.cuda.is_available() and not env.flag("FASTGPT_FORCE_CPU")
        device = "cuda:0" if use_gpu else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = resolved.index if resolved.index is not None else 0
        if not 0 <= index < count:  # torch keeps an index in 8 bits: 999 is -25
            raise DeviceError(
                f"device is {device}, but {count} CUDA devices are visible; use --device cpu or "
                "see `fastgpt doctor`"
            )
        resolved = torch.device("cuda", index)
    return resolved


def resolve_dtype(
    dtype: str | torch.dtype,
    device: torch.device,
    config: dict[str, Any],
    fp16_overflows: Mapping[str, float] = MappingProxyType({}),
) -> torch.dtype:
    """Return the type of activations and cache.

    `auto` is the checkpoint's own on GPUs of compute capability 8.0 and newer, float16 on older
    ones; on the CPU bfloat16 where the CPU multiplies it (AVX512-BF16), else float32. Where
    activations leave float16's range, bfloat16 takes its place, and float32 on GPUs without it.

    Args:
        dtype: "auto", "float32", "bfloat16", "float16", or the type itself.
        device: where the model runs.
        config: fields of config.json.
        fp16_overflows: see `Checkpoint`.

    Raises:
        ConfigError: if the text names no such type, or float16 where activations overflow it.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "float16" and fp16_overflows:
        raise ConfigError(
            f"dtype is float16, but {_describe(fp16_overflows)}; use bfloat16, float32 or auto"
        )
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    if device.type == "cpu":
        has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return torch.bfloat16 if has_bf16 and env.cpu_isa() in (None, "avx512") else torch.float32
    if torch.cuda.get_device_capability(device) < (8, 0):
        if not fp16_overflows:
            return torch.float16
        _log.warning(
            "%s, and this GPU has no bfloat16: running in float32, at half the speed or less; "
            "a GPU of compute capability 8.0 or newer runs it in bfloat16",
            _describe(fp16_overflows),
        )
        return torch.float32
    named = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if named == "float16" and not fp16_overflows else torch.bfloat16


def _describe(fp16_overflows: Mapping[str, float]) -> str:
    name, amax = max(fp16_overflows.items(), key=lambda item: item[1])
    return f"activations at {name} reach {amax:.4g}, too near to float16's largest value 65504"
