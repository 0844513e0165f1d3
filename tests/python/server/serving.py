"""Starting a server as a user does, in a process of its own, and looking at it from outside."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    """Return a port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """One running server; use it as a context manager.

    Args:
        arguments: after `python`; "PORT" is replaced by a free port.
        log: where its standard error goes.
        port: where it will listen, when the arguments do not say "PORT".
    """

    def __init__(
        self, arguments: list[str], log: Path, port: int | None = None, **environment: str
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        paths = [str(ROOT), str(ROOT / "tests" / "python"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [argument.replace("PORT", str(self.port)) for argument in arguments]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *command], stderr=stderr, env={**os.environ, **environment}
            )

    def wait_ready(self, timeout_s: float = 60.0) -> "Served":
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s: {self.log.read_text()}")

    def __enter__(self) -> "Served":
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def metric(self, name: str) -> float:
        """Return the value of one metric of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        match = re.search(rf"^fastgpt_{name} (\S+)$", text, re.MULTILINE)
        assert match, f"no metric fastgpt_{name} in\n{text}"
        return float(match[1])

    def engine_pid(self) -> int:
        """Return the process id of the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])


def wait_until(condition, timeout_s: float = 5.0) -> None:
    """Wait until condition() is true; AssertionError after the timeout."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.01)


def assert_within(measure, bound: float, tries: int = 3) -> None:
    """Assert that measure() stays within a bound at one of a few tries.

    Other processes only ever add time, so the least of a few readings is the server's own.
    """
    readings = []
    for _ in range(tries):
        readings.append(measure())
        if readings[-1] <= bound:
            return
    raise AssertionError(f"readings {readings} all exceed {bound}")


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
