"""An answer that is left early, at every point where it can be."""

import asyncio

import pytest

from fastgpt.request import SamplingParams
from fastgpt.server.chat import Answer, Channel
from fastgpt.server.client import Job
from fastgpt.server.generation import ChatForm, Generation, streamed_answer
from fastgpt.server.messages import Output
from fastgpt.server.metrics import Metrics


class Recorder:
    """Stands for the client of a job: notes what is aborted."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_a_stream_that_is_left_frees_its_request(num_chunks: int):
    """The first chunk names the role before the engine's tokens are asked for."""

    async def leave() -> list[str]:
        recorder = Recorder()
        job = Job(recorder, "r", [1])  # type: ignore[arg-type]
        job.put(Output("r", [2]))
        answer = Answer(None)
        answer.push = lambda token_ids: [(Channel.CONTENT, "x")]  # type: ignore[method-assign]
        metrics = Metrics(lambda: (0, 0, 0))
        generation = Generation(job, answer, SamplingParams(), metrics)
        chunks = streamed_answer(ChatForm(), generation, "id", "m", include_usage=False)
        for _ in range(num_chunks):
            await anext(chunks)
        await chunks.aclose()
        return recorder.aborted

    assert asyncio.run(leave()) == ["r"]
