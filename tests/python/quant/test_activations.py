"""Eight-bit activations from the policy's key to the served product."""

from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import Engine, SamplingParams, ops
from fastgpt.checkpoint import Container
from fastgpt.errors import ConfigError, UnsupportedFormat
from fastgpt.layers.linear import Linear, SplitLinear, check_activations, multiply
from fastgpt.layers.weights import WeightLoader
from fastgpt.quant import Quantizer
from fastgpt.quant.calibration import Calibration
from fastgpt.quant.plan import PlannedTensor, keep_wide_rows
from fastgpt.quant.policy import Policy
from fastgpt.scheme import Format

QWEN = Path(fastgpt.__file__).parent / "assets" / "tiny-qwen"
INT8 = {"attention_weights": "int8", "residual_connections": "int8", "activations": "int8"}


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 200, (12, 40), generator=generator).tolist()


TEXTS = Calibration(source=texts(), num_sequences=10, num_evaluation=2)


def activations_of(policy: Policy) -> dict[str, str]:
    return {role: fmt.activations for role, fmt in policy.roles.items()}


def test_format_takes_activations_of_its_own_kind_alone() -> None:
    fmt = Format.parse({"format": "fp8", "activations": "fp8"})
    assert Format.parse(fmt.to_json()) == fmt != Format.parse("fp8")
    assert str(fmt) == "fp8 (fp8 activations)"
    assert Format.parse("fp8").to_json() == {"format": "fp8", "scale": "channel"}
    with pytest.raises(ConfigError, match="activations is 'int8'; fp8 takes 16bit, fp8, auto"):
        Format.parse({"format": "fp8", "activations": "int8"})
    with pytest.raises(ConfigError, match="int4 has no option 'activations'"):
        Format.parse({"format": "int4", "activations": "int8"})


def test_policy_key_fills_in_formats_that_name_none() -> None:
    config = {
        "attention_weights": "fp8",
        "residual_connections": {"format": "fp8", "activations": "16bit"},
        "io_layers": "int8",
        "overrides": [["down_proj", "fp8"], ["up_proj", "int4"]],
        "activations": "fp8",
    }
    policy = Policy.parse(config)
    assert activations_of(policy) == {
        "attention_weights": "fp8",
        "residual_connections": "16bit",
        "io_layers": "16bit",
    }
    assert [fmt.activations for _, fmt in policy.overrides] == ["fp8", "16bit"]
    assert Policy.parse(policy.to_json()) == policy
    with pytest.raises(ConfigError, match=r"activations is 'fp16' .* expected one of 16bit, fp8"):
        Policy.parse({"attention_weights": "fp8", "activations": "fp16"})


def test_policy_auto_is_what_the_device_gains_from() -> None:
    policy = Policy.parse(
        {"attention_weights": "fp8", "residual_connections": "int8", "activations": "auto"}
    )
    hopper, cpu, old = policy.on(["fp8", "int8"]), policy.on(["int8"]), policy.on([])
    assert list(activations_of(hopper).values()) == ["16bit", "fp8", "int8"]
    assert list(activations_of(cpu).values()) == ["16bit", "16bit", "int8"]
    assert set(activations_of(old).values()) == {"16bit"}
    # What was decided stays decided when the policy is read from the file.
    assert activations_of(Policy.parse(old.to_json()).on(["fp8", "int8"])) == activations_of(old)
    # A budget's choices take the policy's key, too.
    assert cpu.with_activations(Format.parse("int8")).activations == "int8"
    assert cpu.with_activations(Format.parse("fp8")).activations == "16bit"
    assert cpu.with_activations(None) is None


def test_weights_without_such_products_keep_16_bit_rows() -> None:
    fmt = Format.parse({"format": "fp8", "activations": "fp8"})
    names = ["mlp.experts.3.up_proj", "self_attn.kv_b_proj", "self_attn.o_proj",
             "mlp.shared_experts.up_proj"]  # fmt: skip
    planned = [
        PlannedTensor(f"model.layers.0.{name}.weight", (4, 4), "default", fmt) for name in names
    ]
    planned.append(PlannedTensor("model.norm.weight", (4,), "kept", None))
    found = [item.format and item.format.activations for item in keep_wide_rows(planned)]
    assert found == ["16bit", "16bit", "fp8", "fp8", None]


def test_few_rows_stay_16_bits_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ops.arrange(*ops.quantize_int8(torch.randn(40, 64)), format="int8")
    fewest = ops.fewest_eight_bit_rows(torch.device("cpu"))
    x = torch.randn(fewest, 64)
    codes = ops.linear_eight_bit(ops.quantize_rows(x, format="int8"), weight)
    assert torch.equal(multiply(x, weight, None, "int8"), codes)
    few = x[: fewest - 1]
    assert torch.equal(multiply(few, weight, None, "int8"), ops.linear(few, weight))
    assert torch.equal(multiply(x, weight, None, "16bit"), ops.linear(x, weight))


def test_a_gpu_without_the_units_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_eight_bit_product", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    device = torch.device("cuda", 0)
    check_activations("16bit", device)
    with pytest.raises(UnsupportedFormat, match=r"fp8 activations.*9\.0.*cuda:0 has 8\.0"):
        check_activations("fp8", device)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny-qwen in int8, with activations of both kinds."""
    folder = tmp_path_factory.mktemp("int8")
    paths = {}
    for kind in ("16bit", "int8"):
        paths[kind] = folder / f"{kind}.pt"
        policy = {**INT8, "activations": kind}
        Quantizer(QWEN, policy, calibration=TEXTS).write(paths[kind], progress=False)
    return paths


def test_the_file_says_which_activations_were_measured(files: dict[str, Path]) -> None:
    narrow, wide = (Container(files[kind]).metadata for kind in ("int8", "16bit"))
    formats = {
        record.format.get("activations", "16bit")
        for name, record in narrow.tensors.items()
        if name.endswith("proj.weight")
    }
    assert formats == {"int8"}
    fewest = ops.fewest_eight_bit_rows(torch.device("cpu"))
    assert f"int8 activations from {fewest} rows on" in narrow.certificate["arithmetic"]
    assert "activations" not in wide.certificate["arithmetic"]
    # The same codes and scales, and what rounding activations adds to the loss.
    assert narrow.certificate["kl_mean"] != wide.certificate["kl_mean"]
    assert narrow.certificate["kl_mean"] < 0.05


def test_loaded_layers_multiply_codes(files: dict[str, Path]) -> None:
    ids = torch.tensor([texts()[0]])
    logits = {kind: fastgpt.load(path, device="cpu")(ids) for kind, path in files.items()}
    difference = (logits["int8"] - logits["16bit"]).abs().max()
    assert 0 < difference < 0.05 * logits["16bit"].abs().max()
    few = {kind: fastgpt.load(path, device="cpu")(ids[:, :4]) for kind, path in files.items()}
    assert torch.equal(few["int8"], few["16bit"]), "four rows are multiplied as they are"


def test_the_engine_serves_them(files: dict[str, Path]) -> None:
    engine = Engine(files["int8"], device="cpu", max_length=256, memory_pool_size="1GB")
    chat = [{"role": "user", "content": "Start with 68. 1) add 57 2) add 94. What is the result?"}]
    params = SamplingParams(temperature=0.0, max_tokens=64)
    text = engine.generate([chat], params)[0].text
    again = engine.generate([chat], params)[0].text
    assert text == again
    assert text


def test_modules_of_other_libraries_take_the_key() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 48))
    config = {"default": "int8", "activations": "int8"}
    changed = Quantizer(module, config, calibration=None).convert(progress=False)
    x = torch.randn(16, 64)
    plain = Quantizer(module, {"default": "int8"}, calibration=None).convert(progress=False)
    difference = (changed(x) - plain(x)).abs().max()
    assert 0 < difference < 0.1
    assert torch.equal(changed(x[:4]), plain(x[:4]))


def test_layers_of_one_input_keep_their_own_activations() -> None:
    def part(activations: str) -> Linear:
        weight = ops.arrange(*ops.quantize_int8(torch.randn(24, 64)), format="int8")
        return Linear(weight, None, 24, activations)

    parts = [part("int8"), part("16bit")]
    x = torch.randn(16, 64)
    out = SplitLinear(parts)(x)
    assert torch.equal(out[:, :24], multiply(x, parts[0].weight, None, "int8"))
    assert torch.equal(out[:, 24:], ops.linear(x, parts[1].weight))


def test_a_loader_can_be_told_to_round_all_rows(files: dict[str, Path]) -> None:
    """Certificates are measured so: their figures do not depend on the length of a sequence."""
    source = Container(files["int8"]).read
    name = "model.layers.0.mlp.down_proj"
    shape = Container(files["int8"]).metadata.tensors[f"{name}.weight"].shape

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, _: str) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    loader = WeightLoader(source, torch.device("cpu"), torch.float32, allocate)
    served = loader.linear("down", [(name, shape[0])], shape[1])
    loader.fewest_eight_bit_rows = 1
    measured = loader.linear("down", [(name, shape[0])], shape[1])
    x = torch.randn(20, shape[1])
    assert torch.equal(served(x), measured(x))
    assert torch.equal(measured(x[:1]), measured(x)[:1])
    assert not torch.equal(served(x[:1]), measured(x)[:1])


@pytest.mark.gpu
def test_w8a8_on_a_gpu_measures_and_serves_fp8_activations(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    if not ops.has_eight_bit_product("fp8", cuda):
        pytest.skip("the GPU has no eight-bit products")
    path = tmp_path / "w8a8.pt"
    Quantizer(QWEN, "w8a8", device="cuda", calibration=TEXTS).write(path, progress=False)
    metadata = Container(path).metadata
    formats = {
        record.format.get("activations")
        for name, record in metadata.tensors.items()
        if name.endswith("proj.weight")
    }
    assert formats == {"fp8"}
    assert "fp8 activations" in metadata.certificate["arithmetic"]
    ids = torch.tensor(texts(), device=cuda).view(1, -1)
    found = fastgpt.load(path, device="cuda")(ids)
    expected = fastgpt.load(QWEN, device="cuda", dtype="float32")(ids)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    engine = Engine(path, device="cuda", max_length=512, memory_pool_size="2GB")
    params = SamplingParams(temperature=0.0, max_tokens=16)
    prompt = [token for row in texts()[:5] for token in row]
    assert len(engine.generate([prompt], params)[0].token_ids) > 0
