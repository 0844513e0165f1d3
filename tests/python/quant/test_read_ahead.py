"""Weights read ahead are those that were asked for, whatever is left out, and few at a time."""

import pytest
import torch

from fastgpt.quant import read_ahead
from fastgpt.quant.read_ahead import ReadAhead
from fastgpt.quant.rounding import round_in_torch
from fastgpt.scheme import Format, QuantizedTensor

NAMES = [f"w{i}" for i in range(10)]


@pytest.fixture(params=["copied", pytest.param("pinned", marks=pytest.mark.gpu)])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is no pinned memory: ordinary copies stand for it."""
    if request.param == "copied":
        monkeypatch.setattr(read_ahead, "_part_pinned", torch.Tensor.clone)
    return


def _weights() -> dict[str, torch.Tensor | QuantizedTensor]:
    weights: dict[str, torch.Tensor | QuantizedTensor] = {n: torch.randn(8, 128) for n in NAMES}
    weights["w3"] = round_in_torch(torch.randn(8, 128), Format.parse("fp8"), "w3")
    return weights


@pytest.mark.parametrize("asked", [NAMES, NAMES[3:], NAMES[::3], ["w9"], []])
def test_read_gives_what_was_asked_for(copies: None, asked: list[str]) -> None:
    weights = _weights()
    with ReadAhead(weights.__getitem__, NAMES) as ahead:
        for name in asked:
            got, wanted = ahead.read(name), weights[name]
            if isinstance(wanted, QuantizedTensor):
                assert isinstance(got, QuantizedTensor)
                assert torch.equal(got.dequantize(), wanted.dequantize())
            else:
                assert isinstance(got, torch.Tensor)
                assert torch.equal(got, wanted)
                assert got.data_ptr() != wanted.data_ptr()


def test_names_that_were_not_announced_come_from_the_source(copies: None) -> None:
    weights = _weights()
    with ReadAhead(weights.__getitem__, NAMES[1:]) as ahead:
        assert ahead.read("w0") is weights["w0"]
        ahead.read("w1")
        assert ahead.read("w1") is weights["w1"]  # again: it was given away


def test_no_more_is_read_than_there_is_room_for(
    copies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 3 * 8 * 128 * 4)
    weights, seen = {name: torch.randn(8, 128) for name in NAMES}, []

    def source(name: str) -> torch.Tensor:
        seen.append(name)
        return weights[name]

    with ReadAhead(source, NAMES) as ahead:
        assert seen == []  # nothing before the first is asked for
        for i, name in enumerate(NAMES):
            ahead.read(name)
            assert seen == NAMES[: i + 4]


def test_an_error_of_the_source_arrives(copies: None) -> None:
    with ReadAhead({}.__getitem__, NAMES) as ahead, pytest.raises(KeyError):
        ahead.read("w0")
