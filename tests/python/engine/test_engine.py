"""The engine around a fake model: batching, sampling, preemption, streaming, aborts."""

import asyncio

import pytest
from engine.fake_model import VOCAB, FakeModel, continuation
from engine.fake_tokenizer import make_files

from fastgpt.engine import Engine, StepOutput
from fastgpt.engine.text_stream import TextStream
from fastgpt.errors import ConfigError, OutOfMemory, RequestError
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


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch": 0},
        {"max_batch": "4"},
        {"max_length": 1},
        {"block_size": 0},
        {"block_size": 256},
        {"max_batch_tokens": 0},
        {"min_batch": 9},
        {"batch_timeout_s": -1},
        {"num_blocks": 0},
        {"warmup_iterations": True},
    ],
    ids=str,
)
def test_engine_refuses_settings_by_name_before_it_loads(settings: dict):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=rf"{name} is .*{value}.*; expected"):
        Engine("no such model", **{"max_batch": 8, **settings})


def test_engine_refuses_what_is_no_model_by_its_type():
    with pytest.raises(ConfigError, match="of type int; expected a path"):
        Engine(5)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, "of type int"),
        (None, "of type NoneType"),
        ({"role": "user", "content": "x"}, "of type dict"),
        (b"abc", "of type bytes"),
        ([None], "of type NoneType"),
        ([[1.5]], "a list of float"),
        ([[True]], "a list of bool"),
        ([[1, "a"]], "a list of int and str"),
    ],
    ids=str,
)
def test_generate_refuses_what_is_no_prompt(tokenizer: Tokenizer, prompts, words: str):
    engine = make_engine(tokenizer=tokenizer)
    with pytest.raises(RequestError, match=words):
        engine.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match="expected SamplingParams"):
        engine.generate([[1]], [{"max_tokens": 3}])


def test_add_request_refuses_an_id_that_waits_in_the_inbox():
    """It overwrote the waiting one: both ended in a KeyError and a block was lost for good."""
    engine = make_engine()
    engine.add_request([9], GREEDY, request_id="request-0")
    with pytest.raises(RequestError, match="'request-0' is in use"):
        engine.add_request([9], GREEDY, request_id="request-0")
    assert engine.add_request([9], GREEDY) == "request-1"
    while engine.has_work:
        engine.step()
    assert engine.add_request([9], GREEDY, request_id="request-0") == "request-0"


def test_generate_keeps_nothing_of_a_request_that_ended_at_a_stop_string(tokenizer: Tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    stop = engine.generate(["abc"], GREEDY)[0].text[3:5]
    others: list[StepOutput] = []
    request_id = engine.add_request([9], SamplingParams(max_tokens=99), on_output=others.append)
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, stop=stop)
    engine.generate(["abc"], params)
    assert list(engine._sinks) == [request_id]
    # An abort that generate takes from the inbox is told to who waits for it.
    engine.abort(request_id)
    engine.generate([[1]], SamplingParams(max_tokens=1))
    assert others[-1].finish_reason == "abort"
    assert not engine._sinks


def test_generate_after_a_stream_whose_loop_is_closed(tokenizer: Tokenizer):
    """The abort of the stream that was left reached a closed event loop in another's step."""
    engine = make_engine(tokenizer=tokenizer)

    async def leave() -> None:
        async for _ in engine.stream("abc", SamplingParams(max_tokens=90, ignore_eos=True)):
            break

    asyncio.run(leave())
    assert engine.generate([[9]], GREEDY)[0].token_ids == continuation([9], 9)


def test_a_failing_sink_keeps_no_output_from_the_others():
    engine = make_engine()
    got: list[StepOutput] = []

    def fail(output: StepOutput) -> None:
        raise ZeroDivisionError

    engine.add_request([9], GREEDY, on_output=fail)
    engine.add_request([9], GREEDY, on_output=got.append)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert [output.token_ids for output in got] == [continuation([9], 1)]


def test_request_that_ends_in_another_thread_before_its_id_is_known(tokenizer: Tokenizer):
    """The stepping thread asked the stream for an id that add_request had not returned yet."""
    engine = make_engine(tokenizer=tokenizer)

    class StepsAtOnce:
        tokenizer = engine.tokenizer
        abort, find_request = engine.abort, engine.find_request

        def add_request(self, *args, **kwargs) -> str:
            request_id = engine.add_request(*args, **kwargs)
            while engine.has_work:
                engine.step()
            return request_id

    stop = engine.generate(["abc"], GREEDY)[0].text[0]
    ids = tokenizer.encode_prompt("abc")
    assert TextStream(StepsAtOnce(), ids, SamplingParams(stop=stop)).finish_reason == "stop"
