"""Environment variables and log lines."""

import logging as std_logging

import pytest
import torch
from engine.fake_model import FakeModel

from fastgpt import env, logging
from fastgpt.engine import Engine
from fastgpt.errors import ConfigError, DeviceError
from fastgpt.request import SamplingParams


def test_env_values_are_checked(monkeypatch):
    monkeypatch.setenv("FASTGPT_NUM_THREADS", "3")
    assert env.num_threads() == 3
    monkeypatch.setenv("FASTGPT_NUM_THREADS", "many")
    with pytest.raises(ConfigError, match="FASTGPT_NUM_THREADS is 'many'"):
        env.num_threads()
    monkeypatch.setenv("FASTGPT_CPU_ISA", "sse")
    with pytest.raises(ConfigError, match="portable, avx2 or avx512"):
        env.cpu_isa()
    monkeypatch.setenv("FASTGPT_SYNC", "maybe")
    with pytest.raises(ConfigError, match="FASTGPT_SYNC is 'maybe'"):
        env.flag("FASTGPT_SYNC")


def test_env_every_variable_is_documented_once():
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names)
    assert all(name.startswith("FASTGPT_") for name in names)
    assert all(variable.doc.endswith(".") for variable in env.VARIABLES)


def test_check_numerics_names_the_bad_row(monkeypatch):
    class Broken(FakeModel):
        def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
            logits = super().logits(hidden_rows)
            logits[-1, 3] = float("nan")
            return logits

    settings = {"max_batch": 4, "max_length": 64, "memory_pool_size": "80MiB"}
    monkeypatch.setenv("FASTGPT_CHECK_NUMERICS", "1")
    engine = Engine(Broken(), warmup_iterations=0, **settings)
    with pytest.raises(DeviceError, match="row 1 of 2 has a NaN"):
        engine.generate([[1], [2]], SamplingParams(max_tokens=2, temperature=0.0))


def test_logging_one_record_is_one_line(capsys):
    root = std_logging.getLogger("fastgpt")
    before = (root.handlers, root.level, root.propagate)
    try:
        logging.setup("info")
        logger = logging.get_logger("fastgpt.place")
        logger.info("a\nforged line \x1b[31m")
        logger.debug("hidden")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("INFO    place: a\\nforged line \\x1b[31m")
    finally:
        root.handlers, root.level, root.propagate = before
    with pytest.raises(ConfigError, match="loud"):
        logging.setup("loud")
