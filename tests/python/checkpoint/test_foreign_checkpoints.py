"""Whole models in other toolkits' form answer as ours do with the same codes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import foreign_files as files
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastgpt
from fastgpt.checkpoint import Container, open_checkpoint
from fastgpt.cli.main import app
from fastgpt.quant import Quantizer
from fastgpt.scheme import QuantizedTensor

ASSET = Path(fastgpt.__file__).parent / "assets" / "tiny-qwen"
INT4 = {"format": "int4", "group_size": 32, "symmetric": False, "algorithm": "rtn"}
IDS = torch.arange(40).view(2, 20) % 384


def codes_of(stored: QuantizedTensor) -> files.Weight:
    """Return codes, scales and zero points of one of our weights, as the writers take them."""
    zero = stored.parts["zero_point"].numpy().astype(np.int64)
    scale = stored.parts["scale"].numpy().astype(np.float32)
    codes = stored.codes().numpy().astype(np.int64)
    return files.Weight(codes, scale, zero, 4, stored.format.group_size, symmetric=False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-qwen in int4 with groups of 32, a file of ours."""
    path = tmp_path_factory.mktemp("ours") / "m.pt"
    policy = {"attention_weights": INT4, "residual_connections": INT4}
    Quantizer(ASSET, policy, calibration=None).write(path, progress=False)
    return path


def as_directory(ours: Path, path: Path, toolkit: str) -> Path:
    """Write the codes of our file as `toolkit` would."""
    opened = Container(ours)
    tensors: dict[str, torch.Tensor] = {}
    weight = None
    for name in opened.names():
        stored = opened.read(name)
        if isinstance(stored, torch.Tensor):
            tensors[name] = stored.clone()
            continue
        weight = codes_of(stored)
        module = name.removesuffix(".weight")
        writer: Any = {"gptq": files.gptq, "awq": files.awq, "packed": files.packed}[toolkit]
        tensors |= writer(weight, module)
    assert weight is not None
    config = {
        "gptq": files.gptq_config(weight),
        "awq": files.awq_config(weight),
        "packed": files.ct_config(files.ct_args(weight)),
    }[toolkit]
    fields = json.loads((ASSET / "config.json").read_text())
    files.write(path, tensors, config, **fields)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ASSET / name, path)
    return path


@pytest.mark.parametrize("toolkit", ["gptq", "awq", "packed"])
def test_answers_are_those_of_the_same_codes(ours: Path, tmp_path: Path, toolkit: str) -> None:
    path = as_directory(ours, tmp_path / toolkit, toolkit)
    expected = fastgpt.load(ours, device="cpu", dtype="float32")(IDS)
    assert torch.equal(fastgpt.load(path, device="cpu", dtype="float32")(IDS), expected)


def test_engine_serves_the_directory(ours: Path, tmp_path: Path) -> None:
    path = as_directory(ours, tmp_path / "gptq", "gptq")
    greedy = fastgpt.SamplingParams(max_tokens=8, temperature=0.0)
    texts = []
    for source in (ours, path):
        engine = fastgpt.Engine(source, device="cpu", memory_pool_size="64MB")
        texts.append(engine.generate(["12 + 34 ="], greedy)[0].token_ids)
    assert texts[0] == texts[1]


def test_quantizer_keeps_and_requantizes_foreign_codes(ours: Path, tmp_path: Path) -> None:
    path = as_directory(ours, tmp_path / "awq", "awq")
    out = tmp_path / "again.pt"
    Quantizer(path, {"attention_weights": "fp8"}, calibration=None).write(out, progress=False)
    again, first = Container(out), Container(ours)
    assert again.config is not None
    assert "quantization_config" not in again.config
    kept = "model.layers.0.mlp.up_proj.weight"
    assert again.metadata.tensors[kept].parts == first.metadata.tensors[kept].parts
    changed = "model.layers.0.self_attn.q_proj.weight"
    stored, source = again.read(changed), first.read(changed)
    assert isinstance(stored, QuantizedTensor)
    assert isinstance(source, QuantizedTensor)
    assert stored.format.name == "fp8"
    error = (stored.dequantize() - source.dequantize()).abs().max()
    assert error <= source.dequantize().abs().max() / 16  # e4m3 rounds by at most 1 / 16


def test_one_log_line_says_what_becomes_of_the_weights(
    ours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = as_directory(ours, tmp_path / "gptq", "gptq")
    with caplog.at_level(logging.INFO, "fastgpt"):
        open_checkpoint(path)
    (record,) = caplog.records
    assert "28 weights of GPTQ int4 g32 asymmetric, " in record.message
    assert record.message.endswith("kept as int4 g32 asymmetric")


def test_inspect_shows_the_imported_format(ours: Path, tmp_path: Path) -> None:
    path = as_directory(ours, tmp_path / "packed", "packed")
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    assert "28 weights of compressed-tensors int4 g32 asymmetric" in result.output
