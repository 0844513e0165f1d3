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

from fastgpt.errors import DeviceError
from fastgpt.logging import get_logger

__all__ = ["EngineProcess"]

_logger = get_logger(__name__)

_CONNECT_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 3.0


class EngineProcess:
    """Owns the engine's process and the private directory of its socket.

    The process dies with the thread that made it, so make it from the main thread.

    Args:
        module: what the process runs; it gets the socket's path and our process id.
    """

    def __init__(self, module: str = "fastgpt.server.engine_process") -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fastgpt-"))  # mode 0700
        self.socket_path = self._folder / "engine.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o177)
        try:
            self._listener.bind(str(self.socket_path))  # mode 0600
        finally:
            os.umask(umask)
        self._listener.listen(1)
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
            self._process.terminate()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _logger.warning("the engine did not end within %.0f s; killed", _END_TIMEOUT_S)
                self._process.kill()
                self._process.wait()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
