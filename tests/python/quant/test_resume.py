"""A run that is stopped goes on to the same bytes; one that must not go on says why."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastgpt.checkpoint import Container, safetensors
from fastgpt.cli.main import app
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.quant import Calibration, Quantizer
from fastgpt.quant.journal import Journal

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model

INT4 = {"format": "int4", "group_size": 32}
POLICY = {
    "attention_weights": "fp8",
    "residual_connections": INT4,
    "norm_params": "binary",
    "io_layers": "fp16",
}
TOKENS = Calibration(num_sequences=8, num_evaluation=2, length=24)


def quantizer(directory: Path, **options) -> Quantizer:
    return Quantizer(directory, POLICY, **{"calibration": TOKENS, **options})


@pytest.fixture(scope="module", params=["qwen2", "v3"])
def directory(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    reference_model(CASES[request.param].hf_config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(directory, tmp_path_factory) -> bytes:
    """The file of a run that nobody stopped."""
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    quantizer(directory).write(path, progress=False)
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.pt"]
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_without_data(directory, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    Quantizer(directory, POLICY, calibration=None).write(path, progress=False)
    return path.read_bytes()


def snapshots(directory: Path, folder: Path, monkeypatch, count: int, seed: int) -> list[Path]:
    """Return copies of what lay on the disk at random moments of a run: what a kill would leave."""
    rng = random.Random(seed)
    taken: list[Path] = []
    moments = 0

    def moment() -> None:
        nonlocal moments
        moments += 1
        if len(taken) < count and rng.random() < 0.1 and (folder / ".m.pt.journal").exists():
            taken.append(folder.parent / f"snapshot{len(taken)}")
            shutil.copytree(folder, taken[-1])

    pwrite, append = os.pwrite, Journal._append

    def watched_pwrite(*args):
        moment()
        return pwrite(*args)

    def watched_append(self, *args):
        moment()
        append(self, *args)
        moment()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", watched_pwrite)
        patch.setattr(Journal, "_append", watched_append)
        quantizer(directory).write(folder / "m.pt", progress=False)
    assert moments > 20
    return taken


def test_resume_gives_the_same_bytes_from_any_moment(directory, whole, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    taken = snapshots(directory, tmp_path / "run", monkeypatch, count=5, seed=5)
    assert len(taken) == 5
    assert (tmp_path / "run/m.pt").read_bytes() == whole
    for folder in taken:
        report = quantizer(directory).write(folder / "m.pt", progress=False, resume=True)
        assert (folder / "m.pt").read_bytes() == whole
        assert [p.name for p in folder.iterdir()] == ["m.pt"]
        assert report.to_json() == Container(folder / "m.pt").metadata.report


def stopped(directory: Path, folder: Path, monkeypatch, blocks: int = 2) -> Path:
    """Return an output whose run ended with an error behind that many blocks."""
    output = folder / "m.pt"
    add_block = Journal.add_block

    def failing(self, block) -> None:
        add_block(self, block)
        if len(self.blocks) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add_block", failing)
        with pytest.raises(KeyboardInterrupt):
            quantizer(directory).write(output, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == [".m.pt.journal", ".m.pt.partial"]
    return output


def test_resume_does_not_count_a_line_that_was_cut(directory, whole, tmp_path, monkeypatch):
    output = stopped(directory, tmp_path, monkeypatch)
    journal = tmp_path / ".m.pt.journal"
    raw = journal.read_bytes()
    ends = [at + 1 for at, byte in enumerate(raw) if byte == ord("\n")]
    assert len(ends) == 5  # key, tokens, plan and two blocks
    damaged = bytearray(raw)
    damaged[ends[3] + 40] ^= 1  # of the second block
    journal.write_bytes(damaged[:-3])
    quantizer(directory).write(output, progress=False, resume=True)
    assert output.read_bytes() == whole


def test_resume_makes_no_block_twice(directory, whole, tmp_path, monkeypatch):
    output = stopped(directory, tmp_path, monkeypatch)
    before = len((tmp_path / ".m.pt.journal").read_bytes().splitlines())
    lines = []
    append = Journal._append

    def watched(self, kind, value) -> None:
        lines.append(kind)
        append(self, kind, value)

    monkeypatch.setattr(Journal, "_append", watched)
    model = quantizer(directory).convert(progress=False, resume=output)
    assert before == 5
    num_layers = Container(output).config["num_hidden_layers"]
    assert lines == ["block"] * num_layers  # of num_layers + 2
    assert output.read_bytes() == whole
    model.save(tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == whole
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": {"residual_connections": INT4}}, "policy was"),
        ({"calibration": Calibration(num_sequences=8, num_evaluation=2, length=24, seed=1)},
         "calibration was"),
        ({"sensitive": ["layers.0"]}, "policy was"),
        ({"budget": "5bpw"}, "budget was null"),
    ],
)  # fmt: skip
def test_resume_refuses_another_run(directory, tmp_path, monkeypatch, options, words):
    output = stopped(directory, tmp_path, monkeypatch, blocks=1)
    other = Quantizer(directory, **{"config": POLICY, "calibration": TOKENS, **options})
    with pytest.raises(ConfigError, match=words):
        other.write(output, progress=False, resume=True)
    assert (tmp_path / ".m.pt.journal").exists()  # refusing took nothing away


def test_resume_finds_a_source_that_changed(directory, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    (tmp_path / "out").mkdir()
    output = stopped(source, tmp_path / "out", monkeypatch)
    file = source / "model.safetensors"
    name = "model.layers.0.self_attn.o_proj.weight"
    at = safetensors.SafetensorsFile(file).entries[name].start
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"'{name}' is not what the unfinished run read"):
        quantizer(source).write(output, progress=False, resume=True)


def test_resume_finds_damage_in_the_partial_file(directory, tmp_path, monkeypatch):
    output = stopped(directory, tmp_path, monkeypatch)
    body = tmp_path / ".m.pt.partial"
    raw = bytearray(body.read_bytes())
    raw[1000] ^= 1  # of the embedding, a block that the journal knows
    body.write_bytes(raw)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        quantizer(directory).write(output, progress=False, resume=True)


def test_two_runs_into_one_file_are_refused(directory, tmp_path):
    journal = Journal(tmp_path / "m.pt", {}, resume=False)
    with pytest.raises(ConfigError, match="another process is quantizing into"):
        quantizer(directory).write(tmp_path / "m.pt", progress=False)
    journal.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_does_not_lose_what_is_done(
    directory, whole, tmp_path, monkeypatch
):
    output = tmp_path / "m.pt"
    pwrite = os.pwrite
    room = len(whole) // 2

    def full(descriptor, data, at) -> int:
        if at + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"No space left.*resume when there is room"):
            quantizer(directory).write(output, progress=False)
    assert not output.exists()
    quantizer(directory).write(output, progress=False, resume=True)
    assert output.read_bytes() == whole


def test_an_output_that_cannot_be_written_is_named_before_any_work(
    directory, tmp_path, monkeypatch
):
    for output, words in (
        (tmp_path / "none/m.pt", "is no directory"),
        (tmp_path, "is a directory; name a file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            quantizer(directory).write(output, progress=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="has 1 kB free"):
        Quantizer(directory, POLICY, calibration=None).write(tmp_path / "m.pt", progress=False)
    assert list(tmp_path.iterdir()) == []


def run_cli(*args: object):
    """Run `fastgpt quantize` in this process."""
    return CliRunner().invoke(app, ["quantize", *map(str, args)])


def test_cli_goes_on_after_a_kill(directory, whole_without_data, tmp_path):
    """SIGKILL as soon as a block is done; --resume gives what a run without a kill gives."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(POLICY))
    output, journal = tmp_path / "m.pt", tmp_path / ".m.pt.journal"
    arguments = [directory, "--policy", policy, "--output", output, "--calibration", "none"]
    command = [sys.executable, "-m", "fastgpt.cli.main", "quantize", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and b'["block"' in journal.read_bytes()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    refused = run_cli(*arguments)
    assert refused.exit_code == 1
    assert "go on with --resume" in refused.stderr
    done = run_cli(*arguments, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "was done before" in done.stderr  # plain lines where there is no terminal
    assert "layer 1/" in done.stderr
    assert output.read_bytes() == whole_without_data
    exists = run_cli(*arguments)
    assert exists.exit_code == 1
    assert "exists; choose another file, or replace it with --overwrite" in exists.stderr
    assert run_cli(*arguments, "--overwrite").exit_code == 0


def test_cli_output_options_are_checked(directory, tmp_path):
    assert "--output is missing" in run_cli(directory).stderr
    both = run_cli(directory, "--output", tmp_path / "m.pt", "--resume", "--overwrite")
    assert "give one of them" in both.stderr
    sizes = run_cli(directory, "--dry-run", "--calibration", "none")
    assert sizes.exit_code == 0, sizes.stderr
    for words in ("attention_weights", "int4 g128", "bits/weight", "times smaller"):
        assert words in sizes.stdout
    assert list(tmp_path.iterdir()) == []
