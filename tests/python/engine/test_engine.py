"""The engine around a fake model: batching, sampling, preemption, streaming, aborts."""

import asyncio

import pytest
from engine.fake_model import VOCAB, FakeModel, continuation
from engine.fake_tokenizer import make_files

from fastgpt.engine import Engine
from fastgpt.errors import OutOfMemory, RequestError
from fastgpt.request import SamplingParams
from fastgpt.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
PROMPTS = [[7 + (3 * i + j) % 200 for j in range(1 + 5 * i)] for i in range(7)]


def make_engine(**settings) -> Engine:
    settings = {"max_batch": 8, "max_length": 128, "block_size": 16, **settings}
    settings.setdefault("memory_pool_size", "80MiB")
    return Engine(FakeModel(), **settings)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_files())


def test_generate_follows_the_model_whatever_the_batch():
    engine = make_engine()
    together = engine.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == continuation(prompt, 9)
        assert output.prompt_token_ids == prompt
        assert output.finish_reason == "length"
        assert 0 <= output.timings.queue_s <= output.timings.ttft_s <= output.timings.total_s
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert max(num_reqs for num_reqs, _ in engine.loaded.model.batches) == 8  # warm-up
    assert engine.stats().num_generated_tokens == 9 * len(PROMPTS)


def test_generate_in_chunks_gives_the_same_tokens():
    long = [5 + i % 240 for i in range(100)]
    whole = make_engine(max_batch_tokens=512).generate([long], GREEDY)[0]
    chunked = make_engine(max_batch_tokens=8).generate([long], GREEDY)[0]
    assert whole.token_ids == chunked.token_ids == continuation(long, 9)


def test_generate_with_seeds_does_not_depend_on_neighbours():
    params = [
        SamplingParams(max_tokens=12, temperature=1.5, seed=i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    together = make_engine().generate(PROMPTS, params)
    for prompt, one, output in zip(PROMPTS, params, together, strict=True):
        alone = make_engine(max_batch=1).generate([prompt], one)[0]
        assert alone.token_ids == output.token_ids
    other = make_engine().generate(PROMPTS, SamplingParams(max_tokens=12, temperature=1.5, seed=99))
    assert [o.token_ids for o in other] != [o.token_ids for o in together]


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty"])
def test_generate_preempted_requests_repeat_their_tokens(penalty: str):
    value = {"repetition_penalty": 1.7, "presence_penalty": 1.3}[penalty]
    params = SamplingParams(
        max_tokens=40, temperature=0.9, seed=3, ignore_eos=True, **{penalty: value}
    )
    roomy = make_engine(num_blocks=64).generate(PROMPTS, params)
    tight_engine = make_engine(num_blocks=9)
    tight = tight_engine.generate(PROMPTS, params)
    assert tight_engine.stats().num_preemptions > 0
    assert [o.token_ids for o in roomy] == [o.token_ids for o in tight]


def test_generate_penalties_change_the_tokens_of_their_request_only():
    plain = make_engine().generate(PROMPTS, GREEDY)
    strong = SamplingParams(
        max_tokens=9, temperature=0.0, ignore_eos=True, repetition_penalty=9.0, presence_penalty=2.0
    )
    params = [strong if i == 3 else GREEDY for i in range(len(PROMPTS))]
    mixed = make_engine().generate(PROMPTS, params)
    for i, (a, b) in enumerate(zip(plain, mixed, strict=True)):
        assert i == 3 or a.token_ids == b.token_ids
    assert len(set(mixed[3].token_ids)) == 9, "a token came twice in spite of the penalty"


def test_generate_stops_at_a_stop_string_and_cuts_it(tokenizer: Tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    whole = engine.generate(["abc"], GREEDY)[0]
    assert whole.text == tokenizer.decode(whole.token_ids)
    stop = whole.text[3:5]
    cut = engine.generate(["abc"], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True,
                                                  stop=(stop,)))[0]  # fmt: skip
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) < 9
    assert not engine.has_work
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_generate_ends_at_a_stop_token_that_is_not_text(tokenizer: Tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    ids = continuation(tokenizer.encode_prompt("abc"), 9)
    params = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=(ids[4],))
    output = engine.generate("abc", params)[0]
    end = ids.index(ids[4]) + 1
    assert output.token_ids == ids[:end]
    assert output.finish_reason == "stop"
    assert output.text == tokenizer.decode(ids[: end - 1])


def test_generate_takes_defaults_from_generation_config():
    greedy = Tokenizer(make_files(do_sample=False, eos_token_id=[1, 77]))
    engine = make_engine(tokenizer=greedy)
    assert engine.loaded.eos_ids == {1, 77}
    output = engine.generate("abc", SamplingParams(max_tokens=9, ignore_eos=True))[0]
    assert output.token_ids == continuation(greedy.encode_prompt("abc"), 9)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "empty"),
        ([VOCAB], GREEDY, f"token id {VOCAB}"),
        ([-1], GREEDY, "token id -1"),
        ([1] * 128, SamplingParams(), "prompt has 128 tokens"),
        ([1] * 100, SamplingParams(max_tokens=29), "together 129"),
    ],
)
def test_add_request_refuses_what_cannot_run(prompt, params, message):
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, params)
    assert not engine.has_work


def test_add_request_refuses_what_can_never_fit_in_the_cache():
    engine = make_engine(num_blocks=2)
    with pytest.raises(RequestError, match="can never fit"):
        engine.add_request([1] * 20, SamplingParams(max_tokens=14))
    output = engine.generate([[1] * 20], SamplingParams(max_tokens=13, ignore_eos=True))[0]
    assert len(output.token_ids) == 13


def test_engine_without_room_for_one_request_is_refused():
    with pytest.raises(OutOfMemory, match="KV cache of one request"):
        Engine(FakeModel(), max_batch=1, max_length=4096, memory_pool_size="24KiB")


def test_abort_frees_the_blocks_before_the_next_step():
    engine = make_engine()
    request_id = engine.add_request([9] * 50, SamplingParams(max_tokens=60, ignore_eos=True))
    engine.step()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks - 4
    engine.abort(request_id)
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [(request_id, "abort")]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert not engine.has_work


def test_stream_yields_the_same_text_and_frees_on_leaving(tokenizer: Tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    whole = engine.generate("héllo", params)[0]

    async def read(limit: int) -> list[str]:
        texts = []
        async for piece in engine.stream("héllo", params):
            texts.append(piece.text)
            if len(texts) == limit:
                break
        return texts

    async def run() -> None:
        several = await asyncio.gather(*(read(1000) for _ in range(5)))
        for texts in several:
            assert "".join(texts) == whole.text
            assert len(texts) > 10
        stream = engine.stream("héllo", params)
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(6000):
            if not engine.has_work:
                break
            await asyncio.sleep(0.01)
        assert not engine.has_work
        assert engine.stats().num_free_blocks == engine.stats().num_blocks

    asyncio.run(run())
