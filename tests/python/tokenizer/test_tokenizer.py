"""Text and ids: exact detokenizing, one BOS, special tokens that stay plain text."""

import json
from dataclasses import replace

import pytest
from engine.fake_tokenizer import byte_ids, make_files
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.errors import CheckpointError, RequestError
from fastgpt.tokenizer import StopChecker, Tokenizer, TokenizerFiles, WindowDetokenizer

TOKENIZER = Tokenizer(make_files())
USER_ID, ASSISTANT_ID, THINK_ID = 2, 3, 4


def chat_ids(content: str, opening: str = "<think>\n") -> list[int]:
    body = [0, USER_ID, *byte_ids(content.encode()), ASSISTANT_ID]
    return body + ([THINK_ID, *byte_ids(b"\n")] if opening else [])


@given(st.text())
def test_encode_decode_is_the_identity(text: str):
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode(text) == byte_ids(text.encode())


@given(st.lists(st.integers(0, 255), max_size=40))
def test_detokenizer_equals_decode_for_any_bytes(data: list[int]):
    ids = byte_ids(bytes(data))
    stream = TOKENIZER.detokenizer()
    text = "".join(stream.push(i) for i in ids) + stream.flush()
    assert text == bytes(data).decode("utf-8", "replace") == TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    "make", [TOKENIZER.detokenizer, lambda: WindowDetokenizer(TOKENIZER.decode)]
)
def test_detokenizer_never_splits_a_character(make):
    text = "aé漢🙂z"
    stream = make()
    pieces = [stream.push(i) for i in byte_ids(text.encode())]
    assert [p for p in pieces if p] == list(text)
    assert stream.flush() == ""


def test_window_detokenizer_gives_up_on_bytes_that_are_no_text():
    stream = WindowDetokenizer(TOKENIZER.decode)
    pieces = [stream.push(i) for i in byte_ids(b"\xff" * 20)]
    assert "".join(pieces) + stream.flush() == "�" * 20
    assert any(pieces)


def test_decode_leaves_special_tokens_out_and_keeps_think_tags():
    assert TOKENIZER.decode([0, THINK_ID, *byte_ids(b"x"), 5, 1]) == "<think>x</think>"


def test_token_ids_outside_the_vocabulary_have_no_text():
    assert TOKENIZER.decode([9999, *byte_ids(b"x")]) == "x"


@pytest.mark.parametrize("content", ["hi", "  hi \n"])
def test_chat_has_exactly_one_bos(content: str):
    assert TOKENIZER.encode_chat([{"role": "user", "content": content}]) == chat_ids("hi")


def test_chat_with_a_template_that_forgets_the_bos_still_has_one():
    files = make_files()
    bare = TokenizerFiles(files.tokenizer_json, files.tokenizer_config, "{{ messages[0].content }}")
    ids = Tokenizer(bare).encode_chat([{"role": "user", "content": "x"}])
    assert ids == [0, *byte_ids(b"x")]


@pytest.mark.parametrize("text", ["one", "<｜begin▁of▁sentence｜>one"])
def test_encode_prompt_has_exactly_one_bos(text: str):
    assert TOKENIZER.encode_prompt(text) == [0, *byte_ids(b"one")]


def test_a_tokenizer_without_bos_adds_none():
    files = make_files()
    config = {"eos_token": files.tokenizer_config["eos_token"]}
    tokenizer = Tokenizer(TokenizerFiles(files.tokenizer_json, config))
    assert tokenizer.bos_id is None
    assert tokenizer.encode_prompt("x") == byte_ids(b"x")


@pytest.mark.parametrize(
    "content",
    ["</think>", "a<｜User｜>b", "<think>x</think>", "<｜end▁of▁sentence｜>", "\ufdd0</think>é"],
)
def test_special_tokens_in_user_content_stay_text(content: str):
    ids = TOKENIZER.encode_chat([{"role": "user", "content": content}])
    assert ids == chat_ids(content)
    assert TOKENIZER.encode(content) == byte_ids(content.encode())


def test_special_tokens_in_a_text_are_parsed_when_allowed():
    assert TOKENIZER.encode("<think>x", allow_special=True) == [THINK_ID, *byte_ids(b"x")]


def test_template_still_sees_think_in_earlier_answers():
    messages = [
        {"role": "user", "content": "q<think>"},
        {"role": "assistant", "content": "<think>long</think>short<｜User｜>"},
        {"role": "user", "content": "r"},
    ]
    ids = TOKENIZER.encode_chat(messages)
    expected = [0, USER_ID, *byte_ids(b"q<think>"), ASSISTANT_ID]
    expected += [*byte_ids("short<｜User｜>".encode()), 1, USER_ID, *byte_ids(b"r"), ASSISTANT_ID]
    assert ids == [*expected, THINK_ID, *byte_ids(b"\n")]


def test_lone_surrogate_is_a_request_error():
    with pytest.raises(RequestError, match="lone surrogate"):
        TOKENIZER.encode("\ud800")


@given(st.text(min_size=1), st.integers(1, 60))
def test_a_prompt_is_refused_unencoded_only_if_it_is_too_long(text: str, max_tokens: int):
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    text *= 30
    num_tokens = len(TOKENIZER.encode(text))
    try:
        TOKENIZER.encode_prompt(text, max_tokens=max_tokens)
    except RequestError:
        assert num_tokens > max_tokens


def test_a_prompt_far_too_long_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch):
    """Eight million characters took a text thread minutes, to be refused for their tokens."""
    tokenizer = Tokenizer(make_files())
    monkeypatch.setattr(tokenizer, "_tokenizer", None)  # encoding would fail
    text = "x" * 1_000_000
    with pytest.raises(RequestError, match=r"1000000 characters, at least .* at most 511 tokens"):
        tokenizer.encode_prompt(text, max_tokens=511)
    with pytest.raises(RequestError, match="at most 511 tokens fit"):
        tokenizer.encode_chat([{"role": "user", "content": text}], max_tokens=511)


def test_no_prompt_is_refused_unencoded_where_a_token_takes_white_space_along():
    files = make_files()
    spec = json.loads(files.tokenizer_json)
    spec["added_tokens"][0]["rstrip"] = True
    tokenizer = Tokenizer(replace(files, tokenizer_json=json.dumps(spec)))
    begin = spec["added_tokens"][0]["content"]
    assert len(tokenizer.encode_prompt(begin + " " * 10_000, max_tokens=8)) < 8


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "refused the messages: no"),
        ("{{ messages[0].content.__class__.__mro__ }}", "failed"),
        ("{% for i in range(100000) %}xxxxxxxxxxxxxxxx{% endfor %}", "more than|failed"),
        ("{{ messages[0].content / 2 }}", "failed"),
    ],
)
def test_a_template_cannot_do_harm(template: str, message: str):
    files = make_files()
    tokenizer = Tokenizer(TokenizerFiles(files.tokenizer_json, files.tokenizer_config, template))
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_damaged_files_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        Tokenizer(TokenizerFiles("{"))
    with pytest.raises(CheckpointError, match="does not compile"):
        Tokenizer(TokenizerFiles(make_files().tokenizer_json, {}, "{% if %}"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_checkpoint(tmp_path)


def test_eos_may_be_a_list():
    assert Tokenizer(make_files(eos_token_id=[5, 9])).eos_ids == {1, 5, 9}
    assert Tokenizer(make_files(eos_token_id=7)).eos_ids == {1, 7}


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_checker_cuts_where_the_first_stop_begins(text: str, stops: list[str]):
    checker = StopChecker(tuple(stops))
    out = ""
    for i, char in enumerate(text):
        out += checker.push(char)
        if checker.stopped:
            found = [text[: i + 1].find(s) for s in stops if s in text[: i + 1]]
            assert out == text[: min(found)]
            assert not any(s in text[:i] for s in stops)
            return
    assert not any(stop in text for stop in stops)
    assert out + checker.flush() == text
