"""Starting, watching and ending the engine's process."""

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from fastgpt.errors import ConfigError, DeviceError

__all__ = ["EngineProcess"]

_CONNECT_TIMEOUT_S = 60.0


def _bind_private(listener: socket.socket, path: Path) -> None:
    """Listen at path, for our own user alone (mode 0600); nothing is left if that fails."""
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise
    finally:
        os.umask(umask)
    listener.listen(1)


class EngineProcess:
    """Owns the engine's process and the private directory of its socket.

    The process dies with the thread that made it, so make it from the main thread.

    Args:
        module: what the process runs; it gets the socket's path and our process id.

    Raises:
        ConfigError: if the socket cannot be made.
    """

    def __init__(self, module: str = "fastgpt.server.engine_process") -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="fastgpt-"))  # mode 0700
            self.socket_path = self._folder / "engine.sock"
            _bind_private(self._listener, self.socket_path)
        except OSError as error:
            self._listener.close()
            raise ConfigError(
                f"the engine's socket cannot be made in {tempfile.gettempdir()}: {error}; set "
                "TMPDIR to a writable directory with a short name"
            ) from error
        self._listener.setblocking(False)
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                module,
                str(self.socket_path),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    async def connect(self) -> socket.socket:
        """Return the socket connected to the engine.

        Raises:
            DeviceError: if the process ends first, or another process connects.
        """
        loop = asyncio.get_running_loop()
        accepted = asyncio.ensure_future(loop.sock_accept(self._listener))
        end_s = loop.time() + _CONNECT_TIMEOUT_S
        while not accepted.done():
            await asyncio.wait({accepted}, timeout=0.2)
            if not accepted.done() and (self.exit_status is not None or loop.time() > end_s):
                accepted.cancel()
                raise DeviceError(f"the engine process did not start ({self.describe_exit()})")
        connection, _ = accepted.result()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        peer_pid = struct.unpack("3i", credentials)[0]
        if peer_pid != self.pid:
            connection.close()
            raise DeviceError(f"process {peer_pid} connected instead of the engine {self.pid}")
        return connection

    def describe_exit(self) -> str:
        """Return how the process ended, in words."""
        status = self.exit_status
        if status is None:
            return "still running"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def close(self) -> None:
        """End the process and remove the directory; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()  # it has nothing to save, and a weight may still be loading
            self._process.wait()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
