"""The rotated residual stream: orthogonal, the same function, kept where it answers better."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt import Quantizer
from fastgpt.checkpoint import Container, StateDict
from fastgpt.errors import ConfigError
from fastgpt.quant import Calibration
from fastgpt.quant.plan import plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.rotation import ResidualRotation, RotatedCheckpoint, why_not_rotated
from fastgpt.quant.verify import verify
from fastgpt.scheme import QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parent))
from test_family import FAMILIES, logits_with, plain_logits, state_of
from tiny_models import CASES, SWEEP, reference_model, worst_error

NEAREST = {"format": "int4", "group_size": 32, "algorithm": "rtn"}
NORMS = ("input_layernorm", "post_attention_layernorm")
TOKENS = Calibration(num_sequences=8, num_evaluation=3, length=24)


def policy(fmt: object, **more: object) -> dict:
    return {"attention_weights": fmt, "residual_connections": fmt, "io_layers": "fp16", **more}


def outlier_gains(reference) -> StateDict:
    """Return the same function with one gain in sixteen 64 times as large, its readers less."""
    state = {k: v.detach().clone() for k, v in reference.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for name in list(state):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in NORMS:
            continue
        chosen = torch.rand(state[name].numel(), generator=generator) < 1 / 16
        factor = torch.where(chosen, 64.0, 1.0)
        state[name] *= factor
        parts = ("q_proj", "k_proj", "v_proj") if norm == NORMS[0] else ("gate_proj", "up_proj")
        for reader in state:
            if reader.startswith(layer) and reader.split(".")[-2] in parts:
                state[reader] /= factor
    return StateDict(reference.config.to_dict(), state)


@pytest.mark.parametrize("size", [1, 2, 3, 24, 37, 256, 896])
def test_rotation_is_orthogonal_and_mixes_all_columns(size: int):
    q = ResidualRotation(size).rows(torch.eye(size, dtype=torch.float64))
    assert float((q @ q.T - torch.eye(size)).abs().max()) < 1e-12
    assert float(q.abs().max()) <= (2 / size) ** 0.5 * (1 + 1e-9)
    x = torch.randn(size, 5, dtype=torch.float64)
    torch.testing.assert_close(ResidualRotation(size).columns(x), q.T @ x)


def with_gains(name: str):
    """Return a family's reference with gains away from one."""
    reference = reference_model(CASES[name].hf_config)
    with torch.no_grad():
        for key, value in reference.named_parameters():
            if "norm" in key:
                value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(key)))
    return reference


@pytest.mark.parametrize("name", FAMILIES)
def test_rotated_model_computes_the_same(name: str):
    """All families: experts, routers, latents and biases too."""
    reference = with_gains(name)
    checkpoint = state_of(reference)
    planned, _ = plan_family(checkpoint, Policy.parse(policy("int4")))
    assert why_not_rotated(checkpoint, planned) is None
    rotated = RotatedCheckpoint(checkpoint, planned, None)
    stored = {item.name: rotated.read(item.name) for item in planned}
    moved = [n for n, value in stored.items() if not torch.equal(value, checkpoint.read(n))]
    assert {n.split(".")[-2] for n in moved} >= {"embed_tokens", "o_proj", "down_proj", "lm_head"}
    assert worst_error(logits_with(reference, stored), plain_logits(reference)) < 1e-4


def test_reader_and_writer_undo_each_other_in_float64():
    """One norm and one reader, one writer: the identity to the rounding of float64."""
    reference = with_gains("llama").double()
    checkpoint = state_of(reference)
    planned, _ = plan_family(checkpoint, Policy.parse(policy("int4")))
    rotated = RotatedCheckpoint(checkpoint, planned, None)
    layer = "model.layers.0"
    gain, q, o = (
        checkpoint.read(f"{layer}.{n}.weight")
        for n in ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj")
    )
    x = torch.randn(7, len(gain), dtype=torch.float64)
    turned = ResidualRotation(len(gain)).rows(x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-13, atol=0)
    read = turned @ rotated.read(f"{layer}.self_attn.q_proj.weight").T
    torch.testing.assert_close(read, (gain * x) @ q.T, rtol=1e-12, atol=1e-13)
    y = torch.randn(7, o.shape[1], dtype=torch.float64)
    written = y @ rotated.read(f"{layer}.self_attn.o_proj.weight").T
    expected = ResidualRotation(len(gain)).rows(y @ o.T)
    torch.testing.assert_close(written, expected, rtol=1e-12, atol=1e-13)


def test_rotation_undoes_outlier_gains():
    """Round-to-nearest of a twin with large gains: the rotation takes most of the error away."""
    reference = reference_model(CASES["llama"].hf_config)
    twin = outlier_gains(reference)
    plain = plain_logits(reference)
    same = logits_with(reference, {n: twin.read(n) for n in twin.names()})
    assert worst_error(same, plain) < 1e-4
    errors = {}
    for rotate in ("never", "always"):
        quantizer = Quantizer(
            reference_with(twin), policy(NEAREST), calibration=None, rotate=rotate
        )
        tensors = quantizer.convert(progress=False).checkpoint
        stored = {name: tensors.read(name) for name in tensors.names()}
        errors[rotate] = float((logits_with(reference, stored) - plain).square().mean())
    assert errors["always"] < 0.5 * errors["never"]


def reference_with(state: StateDict):
    """Return a transformers model that holds these weights."""
    model = reference_model(CASES["llama"].hf_config)
    model.load_state_dict({name: state.read(name) for name in state.names()}, strict=False)
    return model


def test_rotation_is_kept_where_held_out_answers_say_so():
    """A twin with large gains keeps it, and the note names both figures."""
    twin = reference_with(outlier_gains(reference_model(CASES["llama"].hf_config)))
    quantizer = Quantizer(twin, policy(NEAREST), calibration=TOKENS, rotate="auto")
    quantizer.convert(progress=False)
    (note,) = [n for n in quantizer.report.notes if n.startswith("residual stream")]
    assert note.startswith("residual stream rotated: KL ")
    plain = Quantizer(twin, policy(NEAREST), calibration=TOKENS)
    plain.convert(progress=False)
    assert quantizer.certificate["kl_mean"] < plain.certificate["kl_mean"]


def test_rotation_is_dropped_where_it_answers_worse(monkeypatch):
    monkeypatch.setattr(
        "fastgpt.quant.rotation.ResidualRotation.rows", lambda self, x: torch.zeros_like(x)
    )
    reference = reference_model(CASES["llama"].hf_config)
    quantizer = Quantizer(reference, policy("fp8"), calibration=TOKENS, rotate="auto")
    tensors = quantizer.convert(progress=False).checkpoint
    assert any(n.startswith("residual stream not rotated: KL") for n in quantizer.report.notes)
    gain = tensors.read("model.norm.weight")
    assert torch.equal(gain, reference.state_dict()["model.norm.weight"])


def test_rotated_binary_norms_are_exact_and_the_file_is_whole(tmp_path):
    """Gains are ones, so two levels hold them; bytes of the source stay the source's."""
    reference = reference_model(CASES["qwen2"].hf_config)
    config = policy("int4", norm_params="binary")
    quantizer = Quantizer(reference, config, calibration=TOKENS, rotate="always")
    quantizer.write(tmp_path / "m.pt", progress=False)
    file = Container(tmp_path / "m.pt")
    norm = file.read("model.layers.0.input_layernorm.weight")
    assert isinstance(norm, QuantizedTensor)
    assert torch.equal(norm.dequantize(), torch.ones(norm.shape))
    assert file.read("model.embed_tokens.weight").dtype == torch.float16
    assert file.read("lm_head.weight").dtype == torch.float16
    before = sum(p.nbytes for p in reference.state_dict().values())
    assert quantizer.report.before_bytes == before
    assert len(list(verify(tmp_path / "m.pt"))) >= 2
    again = Quantizer(reference, config, calibration=TOKENS, rotate="always")
    again.convert(progress=False).save(tmp_path / "n.pt")
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "n.pt").read_bytes()


def test_rotation_mistakes_are_named():
    tied = reference_model(SWEEP["qwen2_tied"].hf_config)
    with pytest.raises(ConfigError, match="expected 'never', 'always' or 'auto'"):
        Quantizer(tied, rotate="yes")
    with pytest.raises(ConfigError, match="cannot be rotated: the head is the embedding"):
        Quantizer(tied, policy("int4"), calibration=TOKENS, rotate="always").plan()
    quantizer = Quantizer(tied, policy("fp8"), calibration=TOKENS, rotate="auto")
    quantizer.plan()
    assert any("head is the embedding" in note for note in quantizer.dry_run().notes)
    with pytest.raises(ConfigError, match="foreign module's residual stream is not known"):
        Quantizer(torch.nn.Sequential(torch.nn.Linear(8, 8)), rotate="auto")
    untied = reference_model(CASES["qwen2"].hf_config)
    with pytest.raises(ConfigError, match="rotate 'auto' needs calibration data"):
        Quantizer(untied, policy("fp8"), calibration=None, rotate="auto").plan()
