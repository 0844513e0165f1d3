"""An engine process around the fake model: `python -m server.fake_engine SOCKET PARENT`.

FAKE_NUM_BLOCKS sets the cache's size, FAKE_GATE names the fifo of a `serving.Gate`.
"""

import os
import sys
from typing import Any

from engine.fake_model import FakeModel
from engine.fake_tokenizer import make_files

from fastgpt.engine import Engine
from fastgpt.server.engine_process import main, make_ready
from fastgpt.server.messages import Configure, Ready
from fastgpt.tokenizer import Tokenizer


def load(configure: Configure) -> tuple[Any, Ready]:
    """Make the engine; the model's name is its milliseconds per step."""
    model = FakeModel(step_s=float(configure.model.removesuffix("ms")) / 1e3)
    engine = Engine(
        model,
        tokenizer=Tokenizer(make_files(temperature=0.0)),
        memory_pool_size=configure.memory_pool_size,
        max_batch=configure.max_batch,
        max_length=configure.max_length,
        num_blocks=int(os.environ.get("FAKE_NUM_BLOCKS", "0")) or None,
        warmup_iterations=configure.warmup_iterations,
    )
    if path := os.environ.get("FAKE_GATE"):
        model.gate = os.open(path, os.O_RDWR)  # after warm-up, which no test sees
    return engine, make_ready(engine, 0.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), load))
