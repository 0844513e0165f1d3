"""A whole server around the fake engine: `python -m server.fake_server STEP_MS [LENGTH]`."""

import sys

from fastgpt import logging
from fastgpt.config import ServerConfig
from fastgpt.server.serve import ServeOptions, run_server

if __name__ == "__main__":
    logging.setup("debug")
    service = {"port": 0, "max_length": int((sys.argv[2:] or ["512"])[0])}
    tree = {"service": service, "hardware": {"memory_pool_size": "80MiB"}}
    options = ServeOptions(
        model=sys.argv[1] + "ms", tokenizer=None, device="cpu", dtype="auto", log_level="debug"
    )
    run_server(ServerConfig.from_mapping(tree), options, "server.fake_engine")
