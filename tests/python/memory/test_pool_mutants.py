"""Every planted defect of the memory pool is noticed by its tests."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "mutants_memory.py"


def test_every_mutant_still_has_its_place() -> None:
    """A defect whose text has moved is planted nowhere."""
    spec = importlib.util.spec_from_file_location("mutants_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where its dataclasses look for their module
    spec.loader.exec_module(script)
    for mutant in script.MUTANTS:
        for name, old, _ in mutant.edits:
            count = (script.ROOT / "csrc" / name).read_text().count(old)
            assert count == 1, f"{mutant.name}: {name} has its text {count} times"


@pytest.mark.slow
def test_pool_tests_kill_every_mutant() -> None:
    """The script names the survivors; it needs a compiler and GoogleTest."""
    if shutil.which("g++") is None or not Path("/usr/include/gtest/gtest.h").exists():
        pytest.skip("no g++ or no GoogleTest")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
