"""Any module with linear layers: replaced in place, usable, saved, loaded into its own class."""

import copy

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.quant import Quantizer, load
from fastgpt.quant.foreign import QuantizedLinear


class Experts(nn.Module):
    """Fused expert weights, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 24, 16) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bk,enk->ben", x, self.gate_up_proj).mean(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.BatchNorm1d(16)
        self.fc1 = nn.Linear(16, 33)
        self.fc2 = nn.Linear(33, 16, bias=False)
        self.experts = Experts()
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight  # tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x) + self.experts(x)[:, :11]


IDS = torch.arange(11)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def run(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS)


@pytest.mark.parametrize(("value", "tolerance"), [("fp16", 1e-3), ("fp8", 0.06), ("int4", 0.2)])
def test_foreign_copy_runs_saves_and_loads(net: Net, tmp_path, value: str, tolerance: float):
    before = run(net)
    state = copy.deepcopy(net.state_dict())
    quantized = Quantizer(net, {"default": value}).convert(progress=False)
    assert isinstance(quantized, Net)
    assert type(net.fc1) is nn.Linear
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert isinstance(quantized.fc1, QuantizedLinear)
    assert type(quantized.head) is nn.Linear  # shared with the embedding: kept
    after = run(quantized)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < tolerance

    path = tmp_path / "m.pt"
    quantized.save(path)
    torch.manual_seed(1)
    restored = load(path, into=Net().eval())
    assert torch.equal(run(restored), after)
    restored.save(tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()


def test_foreign_state_dict_round_trip(net: Net):
    first = Quantizer(net, {"default": "int4"}).convert(progress=False)
    torch.manual_seed(2)
    second = Quantizer(Net().eval(), {"default": "int4"}).convert(progress=False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second), run(first))
    assert "fc1.packed" in first.state_dict()
    assert "experts.gate_up_proj.packed" in first.state_dict()


def test_foreign_copies_and_casts_keep_the_stored_parts(net: Net):
    quantized = Quantizer(net, {"default": "fp8"}).convert(progress=False)
    twin = copy.deepcopy(quantized)
    assert torch.equal(run(twin), run(quantized))
    twin.double().float()
    assert twin.fc1.scale.dtype == torch.float32
    assert torch.equal(twin.fc1.scale, quantized.fc1.scale)
    half = quantized.to(torch.bfloat16)
    assert run(half).dtype == torch.bfloat16
    assert half.fc1.scale.dtype == torch.float32


def test_foreign_in_place_changes_the_module_itself(net: Net):
    result = Quantizer(net, {"default": "fp8"}, in_place=True).convert(progress=False)
    assert result is net
    assert isinstance(net.fc1, QuantizedLinear)


def test_foreign_report_and_printed_form(net: Net, capsys):
    quantizer = Quantizer(net, {"default": "int4"}, sensitive=["fc2"])
    quantized = quantizer.convert()
    out = capsys.readouterr().out
    assert "int4 g128" in out
    assert "times smaller" in out
    rows = {(r["role"], r["format"]): r for r in quantizer.report.to_json()["rows"]}
    assert rows["default", "int4 g128"]["num_tensors"] == 2  # fc1 and the experts
    assert rows["default", "fp16"]["num_tensors"] == 1
    assert "format=int4 g128" in repr(quantized)


def test_foreign_mistakes_are_named(net: Net, tmp_path):
    with pytest.raises(ConfigError, match="attention_weights takes no bytes"):
        Quantizer(net, {"attention_weights": "fp8"}).convert(progress=False)
    with pytest.raises(ConfigError, match="no linear layer"):
        Quantizer(nn.Sequential(nn.ReLU())).convert(progress=False)
    with pytest.raises(ConfigError, match=r"nn\.Sequential"):
        Quantizer(nn.Linear(4, 4)).convert(progress=False)
    path = tmp_path / "m.pt"
    Quantizer(net, {"default": "fp8"}).convert(progress=False).save(path)
    with pytest.raises(ConfigError, match="pass an instance"):
        load(path)
    with pytest.raises(CheckpointError, match=r"fc1|experts"):
        load(path, into=nn.Sequential(nn.Linear(4, 4)))
    net.fc1.weight.data[3, 2] = float("nan")
    with pytest.raises(CheckpointError, match=r"fc1\.weight holds 1 NaN"):
        Quantizer(net, {"default": "fp8"}).convert(progress=False)


def test_public_names_are_the_documented_ones():
    assert fastgpt.__all__ == [
        "Engine",
        "GPTMemoryPool",
        "Quantizer",
        "SamplingParams",
        "load",
        "ops",
    ]
    for name in fastgpt.__all__:
        assert getattr(fastgpt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Quantiser'"):
        _ = fastgpt.Quantiser
