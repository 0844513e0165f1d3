"""Streaming: memory does not grow with the number of layers; bytes leave as they are made."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.memory import GPTMemoryPool
from fastgpt.quant import Calibration, Quantizer, quantizer
from fastgpt.quant.journal import Journal

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import case, reference_model

TOKENS = Calibration(num_sequences=8, num_evaluation=2, length=24)
POLICY = {
    "attention_weights": "int8",
    "residual_connections": {"format": "int4", "group_size": 32},
    "io_layers": "fp16",
}


def directory_of(num_layers: int, folder: Path) -> Path:
    config = case("Qwen2", num_hidden_layers=num_layers, intermediate_size=256).hf_config
    path = folder / f"{num_layers}"
    reference_model(config).save_pretrained(path)
    return path


def test_pool_holds_one_layer_whatever_the_depth(tmp_path, monkeypatch):
    peaks = []
    for num_layers in (2, 6):
        pools = []

        class Pool(GPTMemoryPool):
            def __init__(self, *args, **options) -> None:
                super().__init__(*args, **options)
                pools.append(self)  # noqa: B023

        monkeypatch.setattr(quantizer, "GPTMemoryPool", Pool)
        Quantizer(directory_of(num_layers, tmp_path), POLICY, calibration=TOKENS).write(
            tmp_path / f"{num_layers}.pt", progress=False
        )
        assert len(pools) == 1  # of the run; weights, and layers that run, come from it
        assert pools[0].stats().num_allocations > 10 * num_layers
        peaks.append(pools[0].stats().peak_requested_bytes)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


def test_bytes_are_in_the_file_when_the_next_block_is_made(tmp_path, monkeypatch):
    """With at most one block behind: nothing of the output is held until the end."""
    body, sizes = tmp_path / ".m.pt.partial", []
    add_block = Journal.add_block

    def watched(self, block) -> None:
        sizes.append((block.written.end, body.stat().st_size))
        add_block(self, block)

    monkeypatch.setattr(Journal, "add_block", watched)
    Quantizer(directory_of(4, tmp_path), POLICY, calibration=None).write(
        tmp_path / "m.pt", progress=False
    )
    assert len(sizes) == 6  # embedding, four layers, norm and head
    assert all(on_disk >= end for end, on_disk in sizes)
    assert [end for end, _ in sizes] == sorted({end for end, _ in sizes})
    ends = [0, *(end for end, _ in sizes)]
    largest = max(b - a for a, b in itertools.pairwise(ends))
    assert sizes[1][1] <= sizes[1][0] + 2 * largest + 4096
    assert os.path.getsize(tmp_path / "m.pt") >= sizes[-1][0]


@pytest.mark.gpu
def test_device_memory_does_not_grow_with_depth(tmp_path):
    """With tokens given: to write its own, a model runs whole, once, before the first layer."""
    texts = [[1 + (7 * i + j) % 40 for j in range(24)] for i in range(10)]
    given = Calibration(source=texts, num_sequences=8, num_evaluation=2, length=24)
    peaks = []
    for num_layers in (4, 8):
        source = directory_of(num_layers, tmp_path)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        Quantizer(source, POLICY, calibration=given, device="cuda").write(
            tmp_path / f"{num_layers}.pt", progress=False
        )
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] * 1.02
