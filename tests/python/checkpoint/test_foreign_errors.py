"""Directories of other toolkits that are not read: one error each, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import pytest
import torch
from foreign_files import MODULE, make, write

from fastgpt.checkpoint import open_checkpoint
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.scheme import QuantizedTensor

NAME = f"{MODULE}.weight"


def read(path: Path) -> torch.Tensor | QuantizedTensor:
    return open_checkpoint(path).read(NAME)


UNSUPPORTED = {
    "nvfp4": (lambda c: c.update(format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    "mxfp4": (lambda c: c.update(format="mxfp4-pack-quantized"), "mxfp4-pack-quantized"),
    "sparse": (
        lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask",
    ),
    "rotations": (lambda c: c.update(transform_config={"config_groups": {"R1": {}}}), "transform"),
    "unknown key": (lambda c: c.update(scale_order="rows"), "unknown key 'scale_order'"),
    "misspelt key": (lambda c: c.update(ignroe=[]), r"'ignroe' \(did you mean 'ignore'\?\)"),
    "frozen": (lambda c: c.update(quantization_status="frozen"), "frozen"),
    "unknown argument": (
        lambda c: c["config_groups"]["group_0"]["weights"].update(offset=1),
        "group_0: weights has the unknown key 'offset'",
    ),
    "class": (
        lambda c: c["config_groups"]["group_0"].update(targets=["LlamaAttention"]),
        "LlamaAttention",
    ),
    "9 bits": (
        lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=9),
        "num_bits 9",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_compressed_tensors_are_named(tmp_path: Path, name: str) -> None:
    change, message = UNSUPPORTED[name]
    weight = make()
    config = files.ct_config(files.ct_args(weight))
    change(config)
    with pytest.raises(UnsupportedFormat, match=message):
        open_checkpoint(write(tmp_path, files.packed(weight), config))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("gptq", {"bits": 5}, "bits 5"),
        ("gptq", {"secret": 1}, "unknown key 'secret'"),
        ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard'"),
        ("awq", {"version": "gemv_fast"}, "'gemv_fast'"),
        ("awq", {"version": "marlin"}, "'marlin'"),
        ("awq", {"bits": 8}, "bits 8"),
        ("awq", {"zero_pint": True}, r"did you mean 'zero_point'"),
    ],
)
def test_unsupported_settings_are_named(
    tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    weight = make()
    case = {"gptq": files.gptq, "awq": files.awq}[method]
    config = {"gptq": files.gptq_config, "awq": files.awq_config}[method](weight, **change)
    with pytest.raises(UnsupportedFormat, match=message) as caught:
        open_checkpoint(write(tmp_path, case(weight), config))
    assert str(tmp_path / "config.json") in str(caught.value)


def without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{MODULE}.{suffix}")


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    name = f"{MODULE}.{suffix}"
    return lambda tensors: tensors.update({name: change(tensors[name])})


BAD = {
    "gptq no scales": (files.gptq, without("scales"), "scales'"),
    "gptq no qweight": (files.gptq, without("qweight"), "lacks its .*qweight'"),
    "gptq no qzeros": (files.gptq, without("qzeros"), "lacks its .*qzeros'"),
    "gptq transposed scales": (
        files.gptq,
        changed("scales", lambda t: t.T.contiguous()),
        r"scales' has shape \(24, 3\); .*needs \(3, 24\)",
    ),
    "gptq float qweight": (files.gptq, changed("qweight", torch.Tensor.float), "expected int32"),
    "gptq g_idx": (files.gptq, changed("g_idx", lambda t: t + 1), "names groups 1 to 3 of 3"),
    "awq no qzeros": (files.awq, without("qzeros"), "lacks its .*qzeros'"),
    "awq scales": (files.awq, changed("scales", lambda t: t[:2]), r"needs \(3, 24\)"),
    "packed no scale": (files.packed, without("weight_scale"), "lacks its .*weight_scale'"),
    "packed no shape": (files.packed, without("weight_shape"), "lacks its .*weight_shape'"),
    "packed no zeros": (files.packed, without("weight_zero_point"), "lacks its .*zero_point'"),
    "packed words": (
        files.packed,
        changed("weight_packed", lambda t: t[:, :-1]),
        "has 11 words a row; 96 codes of 4 bits need 12",
    ),
    "packed shape": (
        files.packed,
        changed("weight_shape", lambda t: t + 1),
        r"weight_shape' says \[25, 97\] beside 24 rows",
    ),
    "packed groups": (
        files.packed,
        changed("weight_scale", lambda t: t[:, :2]),
        r"weight_scale' has shape \(24, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_names_file_and_tensor(tmp_path: Path, name: str) -> None:
    writer, spoil, message = BAD[name]
    weight = make()
    tensors = writer(weight)
    spoil(tensors)
    config: Any = {
        files.gptq: files.gptq_config,
        files.awq: files.awq_config,
        files.packed: lambda w: files.ct_config(files.ct_args(w)),
    }[writer](weight)
    path = write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(path / "model.safetensors") in str(caught.value) or "lacks" in message
    assert re.search(rf"'{re.escape(MODULE)}\.\w+'", str(caught.value))


def test_activation_order_without_its_index_raises(tmp_path: Path) -> None:
    weight = make()
    config = files.ct_config({**files.ct_args(weight), "actorder": "group"})
    with pytest.raises(CheckpointError, match=r"weight_packed' lacks its .*weight_g_idx'"):
        open_checkpoint(write(tmp_path, files.packed(weight), config))


def test_zero_points_that_should_not_be_raise(tmp_path: Path) -> None:
    weight = make()
    config = files.awq_config(weight, zero_point=False)
    with pytest.raises(CheckpointError, match=r"qzeros' holds zero points, but"):
        read(write(tmp_path, files.awq(weight), config))
    config = files.ct_config({**files.ct_args(weight), "symmetric": True})
    with pytest.raises(CheckpointError, match=r"weight_zero_point' is not 0 everywhere"):
        read(write(tmp_path, files.packed(weight), config))


def test_zero_points_a_symmetric_file_stores_needlessly(tmp_path: Path) -> None:
    weight = make(symmetric=True)
    config = files.awq_config(weight, zero_point=False)
    stored = read(write(tmp_path, files.awq(weight), config))
    assert isinstance(stored, QuantizedTensor)
    assert str(stored.format) == "int4 g32"
    tensors = files.packed(files.replace(weight, symmetric=False))
    stored = read(write(tmp_path, tensors, files.ct_config(files.ct_args(weight))))
    assert isinstance(stored, QuantizedTensor)
    assert str(stored.format) == "int4 g32"


def test_config_without_quantized_weights_raises(tmp_path: Path) -> None:
    config = files.gptq_config(make())
    with pytest.raises(CheckpointError, match="holds no such weights; if"):
        open_checkpoint(write(tmp_path, {NAME: torch.ones(2, 2)}, config))


def test_weight_twice_raises(tmp_path: Path) -> None:
    weight = make()
    tensors = {**files.gptq(weight), NAME: torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="is there twice"):
        open_checkpoint(write(tmp_path, tensors, files.gptq_config(weight)))


def test_ambiguous_packing_raises(tmp_path: Path) -> None:
    weight = make(3, 32, rows=32, cols=12, symmetric=True)
    with pytest.raises(CheckpointError, match="both the dense and the older padded packing"):
        read(write(tmp_path, files.packed(weight), files.ct_config(files.ct_args(weight))))
