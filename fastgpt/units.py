"""Sizes and durations as people write them: 24GB, 24GiB, 0.9, -2GiB, 100ms."""

import re

from fastgpt.errors import ConfigError

__all__ = ["format_bytes", "parse_duration_ms", "resolve_bytes"]

_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MILLISECONDS = {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3, "min": 60e3}


def resolve_bytes(size: int | float | str, available: int) -> int:
    """Return a size in bytes.

    Args:
        size: bytes as an int, "24GB" (24·10⁹), "24GiB" (24·2³⁰), a share of `available` such as
            0.9 or "0.9" (more than 0, at most 1), or "-2GiB" (`available` minus that).
        available: what shares and negative sizes refer to, bytes.

    Raises:
        ConfigError: if the text cannot be read or the result is not positive.

    >>> resolve_bytes("24GB", 0), resolve_bytes("0.5", 1000), resolve_bytes("-1KB", 1500)
    (24000000000, 500, 500)
    """
    match = re.fullmatch(r"\s*(-?)(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(size), re.ASCII)
    if match is None or match[3].upper() not in _BYTES:
        raise ConfigError(
            f"size is {size!r}; expected bytes, '24GB', '24GiB', a share such as '0.9', or '-2GiB'"
        )
    value = float(match[2]) * _BYTES[match[3].upper()]
    if not match[3] and not match[1] and 0 < value <= 1 and str(size).strip() != "1":
        value *= available
    elif not match[3] and not value.is_integer():
        raise ConfigError(f"size is {size!r}, no whole number of bytes; did you mean {size}GB?")
    result = available - int(value) if match[1] else int(value)
    if result <= 0:
        raise ConfigError(f"size {size!r} is {result} bytes with {available} available; raise it")
    return result


def parse_duration_ms(duration: int | float | str) -> float:
    """Return a duration in milliseconds; a bare number is milliseconds.

    Raises:
        ConfigError: if the text cannot be read.

    >>> parse_duration_ms("100ms"), parse_duration_ms("2s"), parse_duration_ms(5)
    (100.0, 2000.0, 5.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min|)\s*", str(duration), re.ASCII)
    if match is None:
        raise ConfigError(f"duration is {duration!r}; expected '100ms', '2s' or milliseconds")
    return float(match[1]) * _MILLISECONDS[match[2]]


def format_bytes(num_bytes: int) -> str:
    """Return a size with three digits and a decimal unit.

    >>> format_bytes(5_937_000_000)
    '5.94 GB'
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
