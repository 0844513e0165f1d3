"""`make demo`: quantize the bundled model, serve it, ask it a question over HTTP, check the answer.

The question comes from a seed the model never saw in training. The demo fails unless the streamed
answer is right and equal, token for token, to what the in-process Engine generates.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tiny_tasks import Problem, check_answer, draw_problems

from fastgpt import Engine, Quantizer, SamplingParams
from fastgpt.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "fastgpt/assets/tiny-r1"
POLICY = {"attention_weights": "fp8", "residual_connections": "int4", "norm_params": "binary"}
CONFIG = """\
service:
  port: {port}
  batch_size: 32
  max_length: 2048
hardware:
  gpu_id: 0
  memory_pool_size: 1GB
optimization:
  async_pipeline: {asynchronous}
  precision: mixed
"""
START_LIMIT_S = 60.0


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(model: Path, config: Path, url: str, device: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run fastgpt-server until the block ends; it must then stop by itself on SIGINT."""
    command = [
        sys.executable, "-m", "fastgpt.cli.serve",
        "--config", str(config), "--model", str(model), "--device", device, "--log-level", "info",
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if process.poll() is not None:
                sys.exit(f"demo: the server ended with code {process.returncode} while starting")
            try:
                if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                sys.exit(f"demo: the server was not ready after {START_LIMIT_S:.0f} s")
            time.sleep(0.05)
        yield process
        process.send_signal(signal.SIGINT)
        if process.wait(timeout=20) not in {0, -signal.SIGINT, 130}:
            sys.exit(f"demo: the server stopped with code {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ask(url: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Stream one chat completion to the terminal; return its text, counts and times."""
    request = {
        "model": "tiny-r1",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": 1024,
    }
    reasoning, content, usage, first_s = "", "", {}, None
    part = ""
    start = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=60) as response:
        if response.status_code != 200:
            sys.exit(f"demo: the server answered {response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                for key in ("reasoning_content", "content"):
                    if not (text := choice["delta"].get(key)):
                        continue
                    first_s = first_s or time.perf_counter() - start
                    if part != key:
                        print(f"\n[{'reasoning' if key == 'reasoning_content' else 'answer'}]")
                        part = key
                    print(text, end="", flush=True)
                    reasoning += text if key == "reasoning_content" else ""
                    content += text if key == "content" else ""
    total_s = time.perf_counter() - start
    print()
    if first_s is None:
        sys.exit("demo: the answer was empty")
    return {
        "reasoning": reasoning,
        "content": content,
        "num_tokens": usage["completion_tokens"],
        "first_s": first_s,
        "total_s": total_s,
    }


def metrics(url: str, prefixes: tuple[str, ...]) -> list[str]:
    lines = httpx.get(f"{url}/metrics", timeout=5).text.splitlines()
    return [line for line in lines if line.startswith(prefixes)]


def check(problem: Problem, answer: dict[str, Any], model: Path, device: str) -> None:
    """Exit non-zero unless the answer is right and equals the in-process Engine's."""
    engine = Engine(model, device=device, max_batch=1, max_length=2048, memory_pool_size="1GB")
    messages = [{"role": "user", "content": problem.question}]
    (expected,) = engine.generate([messages], SamplingParams(max_tokens=1024, temperature=0.0))
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    served = answer["reasoning"] + answer["content"]
    expected_text = expected.text.replace("</think>", "", 1)
    same_text = "".join(served.split()) == "".join(expected_text.split())
    if not same_text or answer["num_tokens"] != len(expected.token_ids):
        sys.exit(f"demo: the Engine generates {expected.text!r}, the server sent {served!r}")
    if not check_answer(problem, expected.text):
        sys.exit(f"demo: the answer is {answer['content']!r}, expected {problem.answer!r}")


def main() -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="fastgpt-demo-") as folder:
        say("quantize the bundled model with the four-tier policy")
        model = Path(folder) / "tiny-r1.pt"
        quantized = Quantizer(SOURCE, config=POLICY).convert()
        quantized.save(str(model))
        before = sum(path.stat().st_size for path in SOURCE.glob("*.safetensors"))
        print(f"{format_bytes(before)} (bf16) -> {format_bytes(model.stat().st_size)} on disk")

        say(f"serve it on {device}")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        config = Path(folder) / "fastgpt_config.yaml"
        config.write_text(CONFIG.format(port=port, asynchronous="true"))
        (problem,) = draw_problems("arithmetic", 1, seed=secrets.randbits(32), held_out=True)
        with server(model, config, url, device):
            say("ask it a question it was not trained on")
            print(problem.question)
            answer = ask(url, [{"role": "user", "content": problem.question}])
            say("speed and memory")
            decode_s = max(answer["total_s"] - answer["first_s"], 1e-9)
            print(
                f"{answer['num_tokens']} tokens, {(answer['num_tokens'] - 1) / decode_s:.0f} "
                f"tokens/s, first after {answer['first_s'] * 1e3:.0f} ms"
            )
            print("\n".join(metrics(url, ("fastgpt_memory_", "fastgpt_pool_", "fastgpt_kv_"))))
        check(problem, answer, model, device)
        say("the answer is right and equal to the in-process Engine's; the server stopped cleanly")


if __name__ == "__main__":
    main()
