"""Sizes as people write them: what reads as something else than was meant is refused."""

import pytest

from fastgpt.errors import ConfigError
from fastgpt.units import parse_duration_ms, resolve_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1.5KB", 1500),
        ("0.5", 500),
        (0.25, 250),
        ("1", 1),
        ("1.0", 1000),
        (" 1 kib ", 1024),
        ("-10", 990),
    ],
)
def test_resolve_bytes(size, expected: int):
    assert resolve_bytes(size, 1000) == expected


@pytest.mark.parametrize(
    "size", ["1.5", 4.5, "-0.5", "-1.5", "24 G", "1e9", "nan", "", "٣GB", True]
)
def test_resolve_bytes_refuses_what_is_no_size(size):
    """'4.5' was four bytes: a budget that searched for minutes for what nothing fits in."""
    with pytest.raises(ConfigError, match="size is"):
        resolve_bytes(size, 1000)


def test_parse_duration_refuses_other_digits():
    with pytest.raises(ConfigError, match="duration is"):
        parse_duration_ms("٣ms")
