"""The HTTP server: OpenAI's endpoints in one process, the engine in another."""
