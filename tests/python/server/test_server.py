"""The server as clients see it: the openai client, many at once, bad input, disconnects, deaths."""

import http.client
import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from engine.fake_model import continuation
from engine.fake_tokenizer import make_files
from server.serving import PATIENCE_S, Gate, Served, is_alive, wait_until

from fastgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_files(temperature=0.0))
IGNORE_EOS = {"ignore_eos": True}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with Served(["-m", "server.fake_server", "0"], log) as server:
        yield server


@contextmanager
def gated_server(folder: Path) -> Iterator[tuple[Served, Gate]]:
    """A server that computes a step for each grant of the gate."""
    gate = Gate(folder / "gate")
    arguments = ["-m", "server.fake_server", "0"]
    with Served(arguments, folder / "log", FAKE_GATE=str(gate.path)) as server:
        yield server, gate


@pytest.fixture(scope="module")
def shared_gated(tmp_path_factory):
    with gated_server(tmp_path_factory.mktemp("gated")) as pair:
        yield pair


@pytest.fixture
def gated(shared_gated):
    """The server and its closed gate; idle before and after."""
    server, gate = shared_gated
    yield server, gate
    gate.close()
    assert server.metric("num_requests_running") == 0


def open_client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )


@pytest.fixture
def client(served: Served):
    with open_client(served) as client:
        yield client


def chat(client: openai.OpenAI, content: str, **fields):
    fields = {"max_tokens": 24, "extra_body": IGNORE_EOS, **fields}
    return client.chat.completions.create(
        model="FakeModel", messages=[{"role": "user", "content": content}], **fields
    )


def expected_ids(content: str, num_tokens: int) -> list[int]:
    prompt = TOKENIZER.encode_chat([{"role": "user", "content": content}])
    return continuation(prompt, num_tokens)


def split_reasoning(ids: list[int]) -> tuple[str, str]:
    end = ids.index(TOKENIZER.think_end_id) if TOKENIZER.think_end_id in ids else len(ids)
    return TOKENIZER.decode(ids[:end]), TOKENIZER.decode(ids[end + 1 :])


def test_chat_answer_is_the_models(client):
    answer = chat(client, "hello")
    reasoning, content = split_reasoning(expected_ids("hello", 24))
    message = answer.choices[0].message
    assert message.reasoning_content == reasoning
    assert message.content == content
    assert answer.choices[0].finish_reason == "length"
    num_prompt = len(TOKENIZER.encode_chat([{"role": "user", "content": "hello"}]))
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == num_prompt + 24


def test_chat_stream_arrives_while_the_answer_is_computed(gated):
    """The first text with a fifth of the steps computed, then ten pieces, each before the next."""
    server, gate = gated
    ids = expected_ids("hello", 100)
    texts = {"reasoning_content": "", "content": ""}
    finish, usage = None, None

    def num_received() -> int:
        return sum(map(len, texts.values()))

    def num_computed(num_tokens: int) -> int:
        return sum(map(len, split_reasoning(ids[:num_tokens])))

    with open_client(server) as client:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = iter(chat(client, "hello", max_tokens=100, **options))

        def read() -> None:
            nonlocal finish, usage
            chunk = next(chunks)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                delta = choice.delta.to_dict()
                for channel in texts:
                    texts[channel] += delta.get(channel) or ""
                finish = choice.finish_reason or finish

        num_granted = 20
        gate.grant(num_granted)
        while num_received() == 0:
            read()
        for _ in range(10):
            before, num_granted = num_computed(num_granted), num_granted + 8
            gate.grant(8)
            while num_received() <= before:
                read()
        assert num_granted == 100
        while usage is None:
            read()
        assert next(chunks, None) is None
    assert (texts["reasoning_content"], texts["content"]) == split_reasoning(ids)
    assert finish == "length"
    assert usage.completion_tokens == 100


def test_sixteen_at_once_equal_the_single_ones_and_overlap(client, gated):
    """Computed in half the steps that one after another takes, sixteen of them running at once."""
    server, gate = gated
    contents = [f"question {i}" * (1 + i % 3) for i in range(16)]
    single = [chat(client, content).choices[0].message.to_dict() for content in contents]
    num_alone = 16 * 24  # a step a token

    num_before = server.log.read_text().count("prompt tokens")
    with open_client(server) as other, ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(chat, other, content) for content in contents]
        wait_until(lambda: server.log.read_text().count("prompt tokens") == num_before + 16)
        num_granted = 0
        while server.metric("num_requests_running") < 16:
            num_granted += 1
            assert num_granted < 24, "the first ends before the last begins"
            gate.grant()
            time.sleep(0.05)
        gate.grant(num_alone // 2 - num_granted)
        together = [a.result(PATIENCE_S).choices[0].message.to_dict() for a in answers]
    assert together == single


def test_completions_text_and_token_ids(client):
    text = client.completions.create(
        model="FakeModel", prompt="one", max_tokens=12, extra_body=IGNORE_EOS
    )
    ids = TOKENIZER.encode_prompt("one")
    assert ids[0] == TOKENIZER.bos_id
    assert text.choices[0].text == TOKENIZER.decode(continuation(ids, 12))
    same = client.completions.create(
        model="FakeModel", prompt=ids, max_tokens=12, extra_body=IGNORE_EOS
    )
    assert same.choices[0].text == text.choices[0].text
    doubled = client.completions.create(
        model="FakeModel", prompt="<｜begin▁of▁sentence｜>one", max_tokens=12,
        extra_body=IGNORE_EOS,
    )  # fmt: skip
    assert doubled.usage.prompt_tokens == text.usage.prompt_tokens, "exactly one BOS"
    assert doubled.choices[0].text == text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer(client, stream: bool):
    whole = TOKENIZER.decode(continuation(TOKENIZER.encode_prompt("stop"), 24))
    stop = whole[5:7]
    assert len(stop) == 2
    answer = client.completions.create(
        model="FakeModel", prompt="stop", max_tokens=24, stop=[stop, "never"], stream=stream,
        extra_body=IGNORE_EOS,
    )  # fmt: skip
    chunks = list(answer) if stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_max_completion_tokens(client):
    answer = chat(client, "x", max_tokens=openai.omit, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_special_tokens_in_user_content_stay_text(client):
    plain = chat(client, "a</think>b<｜User｜>", max_tokens=1)
    num_bytes = len("a</think>b<｜User｜>".encode())
    assert plain.usage.prompt_tokens == num_bytes + 5  # BOS, User, Assistant, <think>, newline


def test_models_and_health(served, client):
    assert [model.id for model in client.models.list()] == ["FakeModel"]
    health = served.get("health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_request_id_is_echoed_or_made(served):
    given = served.get("v1/models", headers={"X-Request-Id": "mine-42"})
    assert given.headers["x-request-id"] == "mine-42"
    made = served.get("v1/models")
    assert made.headers["x-request-id"].startswith("req_")
    refused = served.post("v1/completions", content="{", headers={"X-Request-Id": "bad-1",
                                                               "content-type": "application/json"}
    )  # fmt: skip
    assert refused.headers["x-request-id"] == "bad-1"


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": 3}, "temperature", "not 3"),
        ({"temperature": "hot"}, "temperature", "not 'hot'"),
        ({"top_p": 0}, "top_p", "not 0"),
        ({"max_tokens": 0}, "max_tokens", "not 0"),
        ({"max_tokens": 2**63}, "max_tokens", "max_tokens"),
        ({"max_tokens": 10_000}, None, "max_length is 512"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "mean the same"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items after validation, not 17"),
        ({"stop": 5}, "stop", "a valid string or a valid list, not 5"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids.0", "less than or equal to 2147483647"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "not -1"),
        ({"\ud800": 1}, "\\ud800", "unknown field '\\ud800'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": "hi"}, "messages", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "not 'wizard'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "a user message has no content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "should be 'text', not 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "y" * 600}]}, None, "max_length 512"),
    ],
)
def test_bad_field_is_one_clear_400(served, fields, param, words):
    body = {"model": "FakeModel", "messages": MESSAGES, **fields}
    response = served.post("v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert served.get("health").status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"{} {}", "not valid JSON: Extra data at character 3"),
        (b'"text"', "the body: Input should be a valid dictionary"),
        (b'{"messages": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 60_000, "not valid JSON: "),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"null", "the body: Input should be a valid dictionary"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "a lone surrogate"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "not nan"),
    ],
    ids=["empty", "cut", "two", "text", "not-utf8", "nested", "digits", "null", "surrogate", "nan"],
)
def test_malformed_body_is_one_clear_error(served, content, words):
    response = served.post("v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert served.get("health").status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_body_above_the_limit_is_413_declared_or_not(served, declared):
    """A chunked one was a 400 that said nothing of its size."""
    huge = b" " * (9 << 20)
    content = huge if declared else (huge[i : i + 65536] for i in range(0, len(huge), 65536))
    response = served.post("v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert "larger than 8388608 bytes" in response.json()["error"]["message"]
    assert served.get("health").status_code == 200


def test_a_nul_in_a_message_is_text(served):
    content = b'{"messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 1}'
    response = served.post("v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 200, response.text


def test_a_body_that_is_not_called_json_is_refused_by_that_name(served):
    """Not read all the same: any web page may send text to a server on this machine."""
    response = served.post(
        "v1/completions",
        content=b'{"prompt": "x"}',
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "application/x-www-form-urlencoded" in message
    assert "application/json" in message


def test_several_prompts_in_one_request_are_refused_as_such(served):
    response = served.post("v1/completions", json={"prompt": ["x", "y"]})
    assert response.status_code == 400
    assert "a list of 2 prompts; send one a request" in response.json()["error"]["message"]


def test_unknown_model_path_and_method(served, client):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="x")
    response = served.get("v1/nothing")
    assert response.status_code == 404
    assert "error" in response.json()
    response = served.get("v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_request(gated, stream: bool):
    server, gate = gated
    body = {"prompt": "long", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    gate.grant(10)
    response = connection.getresponse() if stream else None
    if response is not None:
        assert response.readline().startswith(b"data: {")
    wait_until(lambda: server.metric("num_requests_running") == 1)
    if response is not None:
        response.close()
    connection.close()
    num_granted = 10

    def is_freed() -> bool:
        nonlocal num_granted
        num_granted += 1
        gate.grant()
        return server.metric("num_requests_running") == 0

    wait_until(is_freed, interval_s=0.05)
    assert num_granted < 400, "it ran to its end"
    assert server.metric("kv_cache_usage_perc") == 0


def test_metrics_count(served, client):
    before = served.metric("generation_tokens_total")
    chat(client, "count", max_tokens=7)
    assert served.metric("generation_tokens_total") == before + 7
    text = served.get("metrics").text
    for name in ("memory_fragmentation", "compute_busy", "num_requests_waiting",
                 "time_to_first_token_seconds_count", "time_per_output_token_seconds_count",
                 "request_queue_time_seconds_count", "num_preemptions_total"):  # fmt: skip
        assert f"fastgpt_{name}" in text


def test_start_log_has_a_line_for_each_fact_and_the_socket_is_private(served):
    log = served.log.read_text()
    for fact in ("model: ", "dtype: ", "kernels: ", "KV cache: ", "threads: ", "address: http://"):
        assert fact in log
    socket_path = served.engine_socket()
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700


def test_preempted_requests_answer_the_same(served, client, tmp_path):
    contents = ["p" * (20 + 7 * i) for i in range(6)]
    roomy = [chat(client, c, max_tokens=60).choices[0].message.to_dict() for c in contents]
    arguments = ["-m", "server.fake_server", "1", "128"]
    with Served(arguments, tmp_path / "log", FAKE_NUM_BLOCKS="8") as tight:
        with open_client(tight) as other, ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda c: chat(other, c, max_tokens=60), contents))
        assert [a.choices[0].message.to_dict() for a in answers] == roomy
        wait_until(lambda: tight.metric("num_preemptions_total") > 0)


@contextmanager
def half_done_stream(server: Served, gate: Gate) -> Iterator[Iterator[str]]:
    """The lines of a stream of 400 tokens, after the first line and two steps."""
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
        gate.grant(2)
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_engine_death_ends_streams_with_an_error_and_health(tmp_path):
    with gated_server(tmp_path) as (server, gate):
        with half_done_stream(server, gate) as lines:
            os.kill(server.engine_pid(), signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: {")]
        assert json.loads(rest[-1][6:])["error"]["code"] == "engine_died"
        health = server.get("health")
        assert health.status_code == 503
        assert "died" in health.json()["reason"]
        assert server.post("v1/completions", json={"prompt": "x"}).status_code == 503


def test_sigterm_ends_an_answer_that_takes_too_long_with_an_error(tmp_path):
    """It was cut off in the middle of a chunk."""
    with gated_server(tmp_path) as (server, gate), half_done_stream(server, gate) as lines:
        server.process.terminate()
        *_, error, done = [line for line in lines if line]
        assert json.loads(error[6:])["error"]["code"] == "server_ends"
        assert done == "data: [DONE]"


def test_sigterm_to_the_whole_group_lets_answers_end(tmp_path):
    """A service manager sends it to every process; the engine died of it at once."""
    with gated_server(tmp_path) as (server, gate):
        with half_done_stream(server, gate) as lines:
            os.kill(server.engine_pid(), signal.SIGTERM)
            gate.grant(400)
            *_, last, done = [line for line in lines if line]
        assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert server.get("health").status_code == 200


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(tmp_path, how):
    with gated_server(tmp_path) as (server, gate):
        engine_pid, socket_path = server.engine_pid(), server.engine_socket()
        with half_done_stream(server, gate):
            server.process.send_signal(how)
        server.process.wait(PATIENCE_S)
        wait_until(lambda: not is_alive(engine_pid))
        if how is not signal.SIGKILL:
            assert "Traceback" not in server.log.read_text()
            assert not socket_path.parent.exists()  # SIGTERM left one in /tmp each time


def test_port_in_use_is_one_clear_line(served, tmp_path):
    log = tmp_path / "log"
    arguments = ["-m", "fastgpt.cli.serve", "--model", "none.pt", "--port", str(served.port)]
    second = Served(arguments, log)
    assert second.process.wait(PATIENCE_S) == 1
    assert log.read_text().strip().splitlines() == [
        f"fastgpt-server: cannot listen on 127.0.0.1 port {served.port}: address already in use; "
        "choose another --host or --port"
    ]


def test_missing_model_is_one_clear_line(tmp_path):
    log = tmp_path / "log"
    arguments = ["-m", "fastgpt.cli.serve", "--model", "none.pt", "--port", "0"]
    server = Served([*arguments, "--device", "cpu"], log)
    assert server.process.wait(PATIENCE_S) == 1
    lines = log.read_text().strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastgpt-server: cannot serve none.pt: none.pt does not exist")
