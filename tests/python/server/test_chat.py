"""Splitting reasoning from content on token ids: nothing lost, nothing moved."""

import pytest
from engine.fake_tokenizer import byte_ids, make_files
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.server.chat import Answer, Channel, starts_in_reasoning
from fastgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_files())
START, END = 4, 5


def run(ids: list[int], in_reasoning: bool | None, stop: tuple[str, ...] = ()) -> tuple[str, str]:
    answer = Answer(TOKENIZER, stop, in_reasoning)
    pieces = [piece for i in ids for piece in answer.push([i])] + answer.finish()
    assert all(text for _, text in pieces)
    return tuple(
        "".join(text for channel, text in pieces if channel is wanted)
        for wanted in (Channel.REASONING, Channel.CONTENT)
    )


def test_answer_splits_at_the_end_tag():
    ids = [*byte_ids(b"because"), END, *byte_ids(b"\n\n42")]
    assert run(ids, True) == ("because", "\n\n42")


def test_answer_that_opens_its_own_reasoning():
    ids = [*byte_ids(b"\n"), START, *byte_ids(b"hm"), END, *byte_ids(b"42")]
    assert run(ids, False) == ("\nhm", "42")


def test_answer_without_tags_is_content():
    assert run(byte_ids(b" 42"), False) == ("", " 42")
    assert run(byte_ids(b"  "), False) == ("", "  ")


def test_answer_that_never_closes_its_reasoning_has_no_content():
    assert run(byte_ids(b"on and on"), True) == ("on and on", "")


def test_tags_where_they_mean_nothing_are_text():
    ids = [*byte_ids(b"a"), START, *byte_ids(b"b"), END]
    assert run(ids, False) == ("", "a<think>b</think>")
    assert run([END, *byte_ids(b"x"), END], True) == ("", "x</think>")


def test_text_that_spells_a_tag_does_not_switch():
    assert run(byte_ids(b"x</think>y"), True) == ("x</think>y", "")


def test_without_splitting_tags_are_text():
    assert run([START, *byte_ids(b"x"), END], None) == ("", "<think>x</think>")


def test_tag_after_half_a_character_is_text():
    """The held byte becomes content when the tag arrives, and then the tag was lost."""
    assert run([*byte_ids(b"\xc3"), START], False) == ("", "\ufffd<think>")


@given(st.lists(st.sampled_from([START, END, *byte_ids(b"ab \xc3\xa9\xff")])), st.booleans())
def test_no_byte_is_lost_or_moved(ids: list[int], in_reasoning: bool):
    reasoning, content = run(ids, in_reasoning)
    begin = 0
    if not in_reasoning:
        lead = 0
        while lead < len(ids) and ids[lead] == byte_ids(b" ")[0]:
            lead += 1
        in_reasoning = lead < len(ids) and ids[lead] == START
        begin = lead
        if in_reasoning:
            ids = ids[:lead] + ids[lead + 1 :]
    end = ids.index(END, begin) if in_reasoning and END in ids[begin:] else len(ids)
    if in_reasoning:
        assert reasoning == TOKENIZER.decode(ids[:end])
        assert content == TOKENIZER.decode(ids[end + 1 :])
    else:
        assert (reasoning, content) == ("", TOKENIZER.decode(ids))


def test_reasoning_tokens_are_counted():
    answer = Answer(TOKENIZER, (), True)
    answer.push([*byte_ids(b"abc"), END, *byte_ids(b"de")])
    assert (answer.num_tokens, answer.num_reasoning_tokens) == (6, 4)


def test_stop_string_in_either_channel_does_not_cross_the_tag():
    assert run([*byte_ids(b"a."), END, *byte_ids(b".b")], True, ("..",)) == ("a.", ".b")
    assert run([*byte_ids(b"ab"), END, *byte_ids(b"xySTOPz")], True, ("STOP",)) == ("ab", "xy")
    assert run([*byte_ids(b"aSTOPb"), END, *byte_ids(b"x")], True, ("STOP",)) == ("a", "")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([0, 2, *byte_ids(b"q"), 3, START, *byte_ids(b"\n")], True),
        ([0, 2, *byte_ids(b"q"), 3, START], True),
        ([0, 2, *byte_ids(b"q"), 3], False),
        ([0, START, *byte_ids(b"x"), END, 3], False),
        ([0, START, *byte_ids(b"x"), 3], False),
        ([], False),
    ],
)
def test_starts_in_reasoning_reads_the_end_of_the_prompt(prompt: list[int], expected: bool):
    assert starts_in_reasoning(prompt, TOKENIZER) is expected
