"""What the server takes from the system before it serves: a port, a socket, a device."""

import socket
import tempfile

import pytest

from fastgpt.errors import ConfigError, DeviceError
from fastgpt.server.engine_process import choose_device
from fastgpt.server.process import EngineProcess
from fastgpt.server.serve import bind


def test_bind_twice_is_refused_before_anything_is_accepted():
    """The second server found out from the kernel, with a traceback: the first did not listen."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bind("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)):
            pass  # waits to be accepted


@pytest.mark.parametrize("folder", ["missing", "long" * 40])
def test_engine_socket_in_a_bad_directory_names_it(tmp_path, monkeypatch, folder: str):
    if folder != "missing":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    with pytest.raises(ConfigError, match="set TMPDIR to a writable directory"):
        EngineProcess("fastgpt.server.nothing")
    assert not list(tmp_path.glob("*/*"))


def test_gpu_id_is_ignored_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """With `auto` on a machine without a GPU it asked for a GPU."""
    monkeypatch.setenv("FASTGPT_FORCE_CPU", "1")
    assert choose_device("auto", 1).type == "cpu"
    assert choose_device("cpu", 1).type == "cpu"
    with pytest.raises(DeviceError, match="cuda:999"):
        choose_device("cuda:999", 0)
