"""Every planted defect of the memory pool is noticed by its tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pool_tests_kill_every_mutant() -> None:
    """The script names the survivors; it needs a compiler and GoogleTest."""
    if shutil.which("g++") is None or not Path("/usr/include/gtest/gtest.h").exists():
        pytest.skip("no g++ or no GoogleTest")
    script = Path(__file__).resolve().parents[2] / "mutants_memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
