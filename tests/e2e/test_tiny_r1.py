"""One real request through the whole house: bundled model, real command, real client."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from server.serving import PATIENCE_S, Served, wait_until

import fastgpt
from fastgpt import Engine, SamplingParams
from fastgpt.tokenizer import Tokenizer

MODEL = Path(fastgpt.__file__).parent / "assets" / "tiny-r1"
QUESTIONS = [f"What is {11 + 3 * i} + {7 + 5 * i} - {2 + i}?" for i in range(16)]
GREEDY = {"temperature": 0.0, "max_tokens": 48, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_r1")
    config = folder / "fastgpt_config.yaml"
    config.write_text(
        "service:\n  batch_size: 32\n  max_length: 1024\n"
        "hardware:\n  memory_pool_size: 1GB\n"
        "optimization:\n  async_pipeline: true\n  precision: mixed\n  warmup_iterations: 1\n"
    )
    arguments = ["-m", "fastgpt.cli.serve", "--config", str(config), "--model", str(MODEL)]
    flags = ["--device", "cpu", "--log-level", "debug", "--port", "0"]
    with Served([*arguments, *flags], folder / "log") as server:
        yield server


@pytest.fixture
def client(served: Served):
    url = f"{served.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, device="cpu", max_length=1024, memory_pool_size="1GB")


def ask(client: openai.OpenAI, question: str, **fields):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="tiny-r1", messages=messages, **{**GREEDY, **fields}
    )


def split(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str]:
    """Return the reasoning and content of an answer that starts inside <think>."""
    end = ids.index(tokenizer.think_end_id) if tokenizer.think_end_id in ids else len(ids)
    return tokenizer.decode(ids[:end]), tokenizer.decode(ids[end + 1 :])


def test_answers_equal_the_engine_of_this_process_one_by_one_and_together(client, engine):
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    expected = [
        split(engine.tokenizer, output.token_ids) for output in engine.generate(chats, params)
    ]

    def answer(question: str) -> tuple[str, str]:
        message = ask(client, question).choices[0].message
        return message.reasoning_content, message.content

    assert [answer(question) for question in QUESTIONS] == expected
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(answer, QUESTIONS)) == expected


def test_stream_says_the_same_in_pieces(client, engine):
    chat = [{"role": "user", "content": QUESTIONS[3]}]
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    expected = split(engine.tokenizer, engine.generate([chat], params)[0].token_ids)
    num_pieces, text = 0, {"reasoning_content": "", "content": ""}
    for chunk in ask(client, QUESTIONS[3], stream=True, max_tokens=400):
        delta = chunk.choices[0].delta.to_dict()
        for channel in text:
            text[channel] += delta.get(channel) or ""
            num_pieces += bool(delta.get(channel))
    assert (text["reasoning_content"], text["content"]) == expected
    assert num_pieces >= 100


def test_seeded_sampling_repeats_and_follows_generation_config(client):
    fields = {"temperature": openai.omit, "max_tokens": 32}
    first = ask(client, QUESTIONS[0], seed=5, **fields).choices[0].message
    again = ask(client, QUESTIONS[0], seed=5, **fields).choices[0].message
    explicit = (
        ask(client, QUESTIONS[0], seed=5, max_tokens=32, temperature=0.6, top_p=0.95)
        .choices[0]
        .message
    )
    assert first.to_dict() == again.to_dict() == explicit.to_dict()


def test_the_model_ends_its_answer(client):
    answer = ask(client, QUESTIONS[1], max_tokens=512, extra_body={})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content
    assert "<" not in answer.choices[0].message.content


def test_disconnect_frees_the_blocks(served, client):
    for _ in range(5):  # the model may outrun a client that a busy machine holds up
        before = served.metric("generation_tokens_total")
        stream = ask(client, QUESTIONS[2], stream=True, max_tokens=900)
        next(iter(stream))
        stream.close()
        wait_until(lambda: served.metric("num_requests_running") == 0)
        assert served.metric("kv_cache_usage_perc") == 0
        if served.metric("generation_tokens_total") - before < 900:
            return
    raise AssertionError("every abandoned request ran to its end")


def test_preempted_requests_get_the_same_tokens(engine):
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS[:6]]
    roomy = engine.generate(chats, params)
    tight = Engine(MODEL, device="cpu", max_length=160, num_blocks=12, memory_pool_size="1GB")
    outputs = tight.generate(chats, params)
    assert tight.stats().num_preemptions > 0
    assert [o.token_ids for o in outputs] == [o.token_ids for o in roomy]
