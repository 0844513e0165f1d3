"""The `fastgpt` command as a user calls it: what is wrong is one line, and status 1."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgpt.cli import main

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "fastgpt" / "assets" / "tiny-qwen")


def run(*arguments: str) -> str:
    """Return what the command prints; it must not end in an exception of Python."""
    result = CliRunner().invoke(main.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return f"{result.exit_code}: {result.output}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", TINY, "-o", "m.pt", "--device", "mps"], "device is 'mps'; expected"),
        (["quantize", TINY, "-o", "m.pt", "--device", "cuda:999"], "device is cuda:999, but"),
        (["quantize", TINY, "-o", ""], "--output is missing"),
        (["verify", "m.pt", "--device", "gpu"], "device is 'gpu'; expected"),
        (["inspect", TINY, "report.html"], "report.html is one argument too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, arguments: list[str], words: str):
    monkeypatch.chdir(tmp_path)
    printed = run(*arguments)
    assert printed.startswith(f"1: fastgpt: {words}"), printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "m.pt"), "m.pt: No space left on device"),
        (ImportError("fastgpt._C is not built"), "fastgpt._C is not built"),
    ],
    ids=["system", "import"],
)
def test_failures_of_the_system_are_one_line(monkeypatch, error: Exception, words: str):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(main, "import_module", fail)
    assert run("verify", "m.pt") == f"1: fastgpt: {words}\n"


def test_a_closed_pipe_ends_quietly(monkeypatch):
    def fail(name: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(main, "import_module", fail)
    assert run("verify", "m.pt") == "1: "


def test_inspect_verify_claims_no_checksums_of_a_form_without():
    assert "0: " in (printed := run("inspect", TINY, "--verify"))
    assert "tensors can be read; this form has no checksums" in printed


@pytest.mark.parametrize("threads", ["3", "none"])
def test_doctor_says_what_the_kernels_will_run_with(threads: str):
    """It printed the number of cores, whatever FASTGPT_NUM_THREADS said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTGPT_NUM_THREADS": threads}
    command = [sys.executable, "-m", "fastgpt.cli.main", "doctor"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    if threads == "3":
        assert re.search(r"^cpu kernels +\w+, 3 threads$", printed, re.MULTILINE)
    else:
        assert "problem: cpu kernels: FASTGPT_NUM_THREADS is 'none'" in printed
