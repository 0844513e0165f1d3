"""The compressed-tensors export: llm-compressor's bytes, transformers' answers, nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import fastgpt
from fastgpt.checkpoint import Metadata, open_checkpoint, write_compressed_tensors
from fastgpt.cli.main import app
from fastgpt.errors import CheckpointError, ConfigError, UnsupportedFormat
from fastgpt.models.registry import family
from fastgpt.quant import Quantizer, rounding
from fastgpt.quant import family as quant_family
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor

FIXTURE = Path(__file__).parents[1] / "checkpoint" / "fixtures" / "compressed-tensors"
ASSET = Path(fastgpt.__file__).parent / "assets" / "tiny-qwen"
INT4 = {"format": "int4", "group_size": 64, "symmetric": False}
POLICY = {
    "attention_weights": "fp8",
    "residual_connections": INT4,
    "norm_params": "binary",
    "overrides": {
        r".*layers\.1\..*(gate|up)_proj\.weight": {"format": "int3", "group_size": 64},
        r".*layers\.2\..*o_proj\.weight": {"format": "fp8", "scale": "block"},
        r".*layers\.3\..*down_proj\.weight": {"format": "int4", "group_size": 32},
        r".*layers\.3\..*o_proj\.weight": "int8",
    },
}
IDS = torch.arange(40).view(2, 20) * 7 % 384


@pytest.fixture(scope="module")
def model() -> Any:
    return Quantizer(ASSET, POLICY, calibration=None).convert(progress=False)


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "out"
    model.save(path, format="compressed-tensors")
    return path


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


def bits_of(array: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return codes of a dense stream of int32 words, one Python integer a row."""
    rows = []
    for row in array.astype(np.uint32):
        whole = sum(int(word) << (32 * i) for i, word in enumerate(row))
        rows.append([whole >> (bits * j) & (2**bits - 1) for j in range(count)])
    return np.array(rows)


def independent(tensors: dict[str, torch.Tensor], module: str, bits: int = 4) -> np.ndarray:
    """Decode one exported weight with NumPy alone, float32."""
    scale = tensors[f"{module}.weight_scale"].float().numpy()
    if f"{module}.weight" in tensors:
        codes = tensors[f"{module}.weight"].view(torch.uint8).numpy()
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if scale.shape[1] > 1 or scale.shape[0] < values.shape[0]:
            scale = np.repeat(np.repeat(scale, 128, 0), 128, 1)
            scale = scale[: values.shape[0], : values.shape[1]]
        return values * scale
    rows, cols = tensors[f"{module}.weight_shape"].tolist()
    codes = bits_of(tensors[f"{module}.weight_packed"].numpy(), bits, cols)
    group_size = cols // scale.shape[1]
    zero = np.full(scale.shape, 2 ** (bits - 1))
    if f"{module}.weight_zero_point" in tensors:
        zero = bits_of(tensors[f"{module}.weight_zero_point"].numpy().T, bits, rows).T
    spread = np.repeat(codes - np.repeat(zero, group_size, 1), 1, 1).astype(np.float32)
    return spread * np.repeat(scale, group_size, 1)


def test_fixture_of_the_library_is_written_byte_for_byte(tmp_path: Path) -> None:
    """Reading what compressed-tensors wrote and writing it again changes no key, type or byte."""
    source = open_checkpoint(FIXTURE)
    assert source.config is not None
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    kind = family(config)
    names = [spec.name for spec in kind.roles(kind.parse_config(config))]
    weights = ((name, source.read(name)) for name in names)
    write_compressed_tensors(tmp_path / "out", weights, Metadata(model_config=config))
    assert (tmp_path / "out" / "config.json").read_text() == (FIXTURE / "config.json").read_text()
    wanted, got = tensors_of(FIXTURE), tensors_of(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_export_decodes_bit_exactly_in_numpy(model: Any, directory: Path) -> None:
    tensors = tensors_of(directory)
    quantized = 0
    for name in model.checkpoint.names():
        stored = model.checkpoint.read(name)
        if isinstance(stored, torch.Tensor):
            assert torch.equal(tensors[name], stored)
            continue
        values = stored.dequantize().numpy()
        if stored.format.name == "binary":
            np.testing.assert_array_equal(tensors[name].float().numpy(), values)
            continue
        module = name.removesuffix(".weight")
        bits = stored.format.bits if stored.format.has_groups else 8
        np.testing.assert_array_equal(independent(tensors, module, bits), values)
        quantized += 1
    assert quantized == 28


def test_export_reads_back_code_by_code(model: Any, directory: Path) -> None:
    again = open_checkpoint(directory)
    for name in model.checkpoint.names():
        stored, back = model.checkpoint.read(name), again.read(name)
        if isinstance(stored, QuantizedTensor) and stored.format.name != "binary":
            assert isinstance(back, QuantizedTensor)
            assert back.format == stored.format, name
            for suffix, part in stored.parts.items():
                assert torch.equal(back.parts[suffix], part), (name, suffix)
    expected = model(IDS)
    got = fastgpt.load(directory, device="cpu")(IDS)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def test_transformers_answers_as_we_do(tmp_path: Path) -> None:
    """Symmetric: transformers 5.24 does not load zero points, its own library's files included."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    policy = {**POLICY, "residual_connections": {**INT4, "symmetric": True}}
    model = Quantizer(ASSET, policy, calibration=None).convert(progress=False)
    model.save(tmp_path / "out", format="compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    with torch.no_grad():
        got = theirs(IDS).logits
    ours = fastgpt.load(tmp_path / "out", device="cpu", dtype="float32")(IDS)
    # Both compute in float32; sums of 256 and 768 terms differ by their order.
    assert float((got - ours).abs().max() / ours.abs().max()) < 1e-4
    plain = fastgpt.load(ASSET, device="cpu", dtype="float32")(IDS)
    assert float((plain - ours).abs().max() / ours.abs().max()) > 1e-2  # it is quantized indeed


def test_library_decompresses_zero_points_as_we_do(model: Any, directory: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = tensors_of(directory)
    arguments = quantization.QuantizationArgs(num_bits=4, group_size=64, symmetric=False)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    module = "model.layers.0.mlp.up_proj"
    parts = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if module in k}
    parts["weight_scale"] = parts["weight_scale"].float()
    got = library.PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(got, model.checkpoint.read(f"{module}.weight").dequantize())


def test_configuration_names_every_module_once(directory: Path) -> None:
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = quantization["config_groups"]
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head"]  # tied, but a module of the loaded model
    targets = [target for group in groups.values() for target in group["targets"]]
    assert len(targets) == len(set(targets))
    assert "re:model[.]layers[.][0-9]+[.]self_attn[.]q_proj$" in targets  # alike in all layers
    assert "model.layers.3.mlp.down_proj" in targets  # an exception: layers go by name
    kinds = {(g["format"], g["weights"]["strategy"], g["weights"]["num_bits"])
             for g in groups.values()}  # fmt: skip
    assert kinds == {
        ("naive-quantized", "channel", 8),
        ("naive-quantized", "block", 8),
        ("pack-quantized", "group", 4),
        ("pack-quantized", "group", 3),
        ("pack-quantized", "channel", 8),
    }


def test_experts_and_latent_attention_are_exported_one_by_one(tmp_path: Path) -> None:
    source = ASSET.with_name("tiny-r1")
    policy = {"attention_weights": "fp8", "residual_connections": INT4, "norm_params": "binary"}
    model = Quantizer(source, policy, calibration=None).convert(progress=False)
    model.save(tmp_path / "out", format="compressed-tensors")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())
    ignore = quantization["quantization_config"]["ignore"]
    assert ignore == [*(f"model.layers.{i}.mlp.gate" for i in (1, 2, 3)), "lm_head"]
    targets = quantization["quantization_config"]["config_groups"]["group_1"]["targets"]
    assert "re:model[.]layers[.][0-9]+[.]mlp[.]experts[.][0-9]+[.]up_proj$" in targets
    expected = model(IDS)
    got = fastgpt.load(tmp_path / "out", device="cpu")(IDS)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def test_text_files_travel(directory: Path) -> None:
    source, written = open_checkpoint(ASSET), open_checkpoint(directory)
    assert written.tokenizer_json == source.tokenizer_json
    assert written.generation_config == source.generation_config
    assert written.chat_template == source.chat_template


def test_shards_and_index(model: Any, directory: Path, tmp_path: Path) -> None:
    weights = [(n, model.checkpoint.read(n)) for n in model.checkpoint.names()]
    write_compressed_tensors(tmp_path / "s", weights, model.metadata, shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, split = open_checkpoint(directory), open_checkpoint(tmp_path / "s")
    assert split.names() == whole.names()
    tensors = tensors_of(tmp_path / "s")
    assert all(torch.equal(tensors[n], t) for n, t in tensors_of(directory).items()
               if t.dtype != torch.float8_e4m3fn)  # fmt: skip


def test_command_writes_the_directory(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(POLICY))
    out = tmp_path / "out"
    command = ["quantize", str(ASSET), "--output", str(out), "--policy"]
    command += [str(tmp_path / "policy.json"), "--calibration", "none"]
    result = CliRunner().invoke(app, [*command, "--format", "compressed-tensors"])
    assert result.exit_code == 0, result.output
    assert (out / "config.json").read_text() == (directory / "config.json").read_text()
    result = CliRunner().invoke(app, [*command, "--format", "compressed_tensors"])
    assert result.exit_code == 1
    assert "did you mean 'compressed-tensors'?" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "policy.json"]


def test_command_refuses_before_it_works(tmp_path: Path) -> None:
    command = ["quantize", str(ASSET), "--calibration", "none", "--format", "compressed-tensors"]
    (tmp_path / "p.json").write_text(json.dumps({"io_layers": "fp8"}))
    made = [*command, "--output", str(tmp_path / "x"), "--policy", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, made)
    assert "model.embed_tokens.weight is fp8" in result.output
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path)])
    assert "exists and is not a compressed-tensors directory" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


# ---- what cannot be expressed ----


def export(tmp_path: Path, name: str, stored: Any, **config: Any) -> None:
    fields = {"model_type": "llama", **config}
    write_compressed_tensors(tmp_path / "x", [(name, stored)], Metadata(model_config=fields))


def quantized(fmt: Any, shape: tuple[int, ...]) -> Any:
    generator = torch.Generator().manual_seed(1)
    return round_tensor(torch.randn(shape, generator=generator), Format.parse(fmt), "w")


def test_what_the_layout_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"a\.weight is int4 g128 with 130 columns"):
        export(tmp_path, "a.weight", quantized("int4", (4, 130)))
    with pytest.raises(UnsupportedFormat, match=r"model\.embed_tokens\.weight is fp8"):
        export(tmp_path, "model.embed_tokens.weight", quantized("fp8", (4, 128)))
    with pytest.raises(UnsupportedFormat, match="no weight is quantized"):
        export(tmp_path, "a.weight", torch.ones(2, 2))
    with pytest.raises(UnsupportedFormat, match="a module of another library"):
        write_compressed_tensors(tmp_path / "x", [], Metadata())
    assert not list(tmp_path.iterdir())  # nothing half written stays


def test_other_directories_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a compressed-tensors directory"):
        export(tmp_path, "a.weight", quantized("int4", (4, 128)))
    (tmp_path / "x" / "notes.txt").unlink()
    export(tmp_path, "a.weight", quantized("int4", (4, 128)))
    export(tmp_path, "a.weight", quantized("fp8", (4, 128)))  # its own is
    assert open_checkpoint(tmp_path / "x").imported[0].becomes == "fp8"


def test_unknown_format_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gguf'; files are written as fastgpt or compressed"):
        model.save(tmp_path / "x", format="gguf")


def test_scales_beyond_the_models_type_stay_as_they_are(tmp_path: Path) -> None:
    stored = quantized("int4", (4, 128))
    export(tmp_path, "a.weight", stored, torch_dtype="bfloat16")
    assert tensors_of(tmp_path / "x")["a.weight_scale"].dtype == torch.float16
    stored.parts["scale"].fill_(0.25)
    export(tmp_path, "a.weight", stored, torch_dtype="bfloat16")
    assert tensors_of(tmp_path / "x")["a.weight_scale"].dtype == torch.bfloat16


# ---- the tenth planted fault ----


def folded_error() -> float:
    """Return how far a model with binary norms, all else in fp32, is from its source."""
    policy = {
        "norm_params": "binary",
        "attention_weights": "fp32",
        "residual_connections": "fp32",
        "io_layers": "fp32",
    }
    folded = Quantizer(ASSET, policy, calibration=None).convert(progress=False)
    want = fastgpt.load(ASSET, device="cpu", dtype="float32")(IDS)
    got = fastgpt.models.load(folded.checkpoint, device="cpu", dtype="float32")(IDS)
    return float((got - want).abs().max() / want.abs().max())


def test_residual_folded_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folded_error() < 1e-4  # the fold is exact up to float32
    right = rounding.binary_residual
    monkeypatch.setattr(quant_family, "binary_residual", lambda *a: right(*a) ** 2)
    assert folded_error() > 1e-2
