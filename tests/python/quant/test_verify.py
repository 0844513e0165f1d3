"""The certificate: figures against an independent computation, every flipped byte found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastgpt.checkpoint import Container, write_container
from fastgpt.checkpoint.container import stored_name
from fastgpt.checkpoint.safetensors import SafetensorsFile
from fastgpt.cli.main import app
from fastgpt.errors import CheckpointError
from fastgpt.quant import Calibration, Quantizer
from fastgpt.quant.verify import verify
from fastgpt.scheme import QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parent))
from test_family import logits_with
from tiny_models import CASES, reference_model

TOKENS = Calibration(num_sequences=12, num_evaluation=3, length=32)


@pytest.fixture(scope="module", params=["qwen2", "v3"])
def made(request, tmp_path_factory):
    """A reference model, its directory, and the file made from it."""
    reference = reference_model(CASES[request.param].hf_config)
    directory = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(directory)
    Quantizer(directory, calibration=TOKENS).write(directory / "m.pt", progress=False)
    return reference, directory, directory / "m.pt"


def test_certificate_figures_match_transformers(made):
    reference, _, path = made
    container = Container(path)
    figures = container.metadata.certificate
    stored = {name: container.read(name) for name in container.names()}
    assert {t.format.name for t in stored.values() if isinstance(t, QuantizedTensor)} == {
        "fp8",
        "int4",
        "binary",
    }
    kl, same, change = [], [], []
    for ids in figures["evaluation_tokens"]:
        prompt = torch.tensor([ids])
        with torch.no_grad():
            log_p = reference(prompt).logits[0].double().log_softmax(-1)
        log_q = logits_with(reference, stored, prompt).double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        picked = prompt[0, 1:, None]
        change.append((log_p[:-1].gather(1, picked) - log_q[:-1].gather(1, picked)).flatten())
    # Activations of the file run in the arithmetic that is served, bf16 or float32.
    assert figures["positions"] == sum(map(len, kl))
    assert figures["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=0.15)
    assert figures["same_top1"] == pytest.approx(float(torch.cat(same).double().mean()), abs=0.05)
    ratio = float(torch.cat(change).mean().exp())
    assert figures["perplexity_ratio"] == pytest.approx(ratio, abs=0.02)
    low, high = figures["perplexity_ratio_95"]
    assert low <= figures["perplexity_ratio"] <= high
    assert 0 < figures["noise_floor_kl"] < figures["kl_mean"]


def test_verify_passes_on_the_file_and_its_source(made):
    _, directory, path = made
    assert len(list(verify(path))) == 2
    lines = list(verify(path, directory))
    assert any(line.startswith("kl_mean") for line in lines)


def test_verify_finds_a_flipped_byte_and_scale(made, tmp_path):
    """Whatever byte of whatever tensor flips, also when all other sums are made anew."""
    _, _, path = made
    container = Container(path)
    names = [n for n in container.names() if isinstance(container.read(n), QuantizedTensor)]
    for name in (names[0], names[-1]):
        for suffix in ("packed", "scale"):
            tensors = {n: container.read(n) for n in container.metadata.tensors}
            part = tensors[name].parts[suffix]
            changed = part.clone()
            changed.view(-1).view(torch.uint8)[0] ^= 1
            parts = {**tensors[name].parts, suffix: changed}
            tensors[name] = QuantizedTensor(tensors[name].format, tensors[name].shape, parts)
            forged = tmp_path / "forged.pt"
            write_container(forged, tensors.items(), container.metadata)
            records = Container(forged).metadata.tensors
            assert records[name].sha256[suffix] != container.metadata.tensors[name].sha256[suffix]

            raw = bytearray(path.read_bytes())
            start = raw.find(part.reshape(-1).view(torch.uint8).numpy().tobytes())
            raw[start] ^= 1
            damaged = tmp_path / "damaged.pt"
            damaged.write_bytes(raw)
            with pytest.raises(CheckpointError, match="damaged"):
                list(verify(damaged))


def test_verify_finds_a_claim_that_does_not_hold(made, tmp_path):
    _, directory, path = made
    container = Container(path)
    tensors = [(n, container.read(n)) for n in container.metadata.tensors]
    for key, value, message in (
        ("nll", container.metadata.certificate["nll"] * 0.9, "states a negative log-likelihood"),
        ("kl_mean", container.metadata.certificate["kl_mean"] * 0.5, "states a kl_mean"),
        ("evaluation_sha256", "0" * 64, "another hash of its evaluation tokens"),
        ("source_sha256", "0" * 64, "was not made from"),
    ):
        metadata = Container(path).metadata
        metadata.certificate = {**metadata.certificate, key: value}
        write_container(tmp_path / "m.pt", tensors, metadata)
        with pytest.raises(CheckpointError, match=message):
            list(verify(tmp_path / "m.pt", directory))


def test_cli_verify_names_the_tensor_of_a_flipped_byte_or_scale(made, tmp_path):
    """Every stored part of a few tensors: the first byte, the last, and one in the middle."""
    _, _, path = made
    container = Container(path)
    file = SafetensorsFile(path)
    raw = path.read_bytes()
    kinds = {}
    for name, record in container.metadata.tensors.items():
        kinds.setdefault((record.format["format"], tuple(record.parts)), name)
    assert len(kinds) > 3
    damaged = tmp_path / "damaged.pt"
    for name in kinds.values():
        for suffix in container.metadata.tensors[name].parts:
            stored = stored_name(name, suffix)
            entry = file.entries[stored]
            for at in {entry.start, (entry.start + entry.end) // 2, entry.end - 1}:
                copy = bytearray(raw)
                copy[at] ^= 0x10
                damaged.write_bytes(copy)
                done = CliRunner().invoke(app, ["verify", str(damaged)])
                assert done.exit_code == 1
                assert f"the bytes of {stored!r} do not match" in done.stderr


def test_cli_verify_and_inspect(made):
    _, _, path = made
    command = [sys.executable, "-m", "fastgpt.cli.main"]
    done = subprocess.run([*command, "verify", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stated" in done.stdout
    shown = subprocess.run([*command, "inspect", path], capture_output=True, text=True, check=False)
    for words in ("KL mean", "noise floor", "perplexity ratio", "same top token"):
        assert words in shown.stdout
