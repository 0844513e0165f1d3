"""A whole server around the fake engine: `python -m server.fake_server PORT STEP_MS [LENGTH]`."""

import sys

from fastgpt import logging
from fastgpt.config import ServerConfig
from fastgpt.server.serve import ServeOptions, run_server

if __name__ == "__main__":
    logging.setup("debug")
    service = {"port": int(sys.argv[1]), "max_length": int((sys.argv[3:] or ["512"])[0])}
    tree = {"service": service, "hardware": {"memory_pool_size": "80MiB"}}
    options = ServeOptions(
        model=sys.argv[2] + "ms", tokenizer=None, device="cpu", dtype="auto", log_level="debug"
    )
    run_server(ServerConfig.from_mapping(tree), options, "server.fake_engine")
