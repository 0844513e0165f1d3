"""Starting a server as a user does, in a process of its own, and looking at it from outside."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]

# How long anything may take before a test gives up. A busy machine is slow, not wrong, so nothing
# here measures time: this only keeps a hanging server from hanging the tests.
PATIENCE_S = 300.0


class Served:
    """One running server; use it as a context manager.

    Args:
        arguments: after `python`; with port 0 the system chooses, and the log names the port.
        log: where its standard error goes.
    """

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self.log = log
        paths = [str(ROOT), str(ROOT / "tests" / "python"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["FASTGPT_LOG_LEVEL"] = "info"  # --log-level wins
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stderr=stderr, env={**os.environ, **environment}
            )

    def wait_ready(self) -> "Served":
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            if address := re.search(r"address: http://127\.0\.0\.1:(\d+)\n", self.log.read_text()):
                self.port = int(address[1])
                self.url = f"http://127.0.0.1:{self.port}"
                assert self.get("health").status_code == 200
                return self
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            time.sleep(0.05)
        raise AssertionError(f"not ready after {PATIENCE_S} s: {self.log.read_text()}")

    def get(self, path: str, **options: object) -> httpx.Response:
        """Return the response to a GET of http://HOST:PORT/path."""
        return httpx.get(f"{self.url}/{path}", timeout=PATIENCE_S, **options)

    def post(self, path: str, **options: object) -> httpx.Response:
        """Return the response to a POST to http://HOST:PORT/path."""
        return httpx.post(f"{self.url}/{path}", timeout=PATIENCE_S, **options)

    def __enter__(self) -> "Served":
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def metric(self, name: str) -> float:
        """Return the value of one metric of /metrics."""
        text = self.get("metrics").text
        match = re.search(rf"^fastgpt_{name} (\S+)$", text, re.MULTILINE)
        assert match, f"no metric fastgpt_{name} in\n{text}"
        return float(match[1])

    def engine_pid(self) -> int:
        """Return the process id of the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])

    def engine_socket(self) -> Path:
        """Return the path of the socket between the server and the engine."""
        command = Path(f"/proc/{self.engine_pid()}/cmdline").read_bytes().decode().split("\0")
        return next(Path(part) for part in command if part.endswith(".sock"))


class Gate:
    """Lets the fake engine compute: one forward pass for each grant.

    What a test sees between two grants was computed before the second one, however slow or busy
    the machine is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def grant(self, num_steps: int = 1) -> None:
        """Allow num_steps more forward passes."""
        os.write(self._fifo, b"." * num_steps)

    def close(self) -> None:
        """Take back the grants that were not used."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fifo, 1 << 16)


def wait_until(condition: Callable[[], bool], interval_s: float = 0.01) -> None:
    """Wait until condition() is true; AssertionError when that takes unreasonably long."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"the condition did not come true in {PATIENCE_S} s"
        time.sleep(interval_s)


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
