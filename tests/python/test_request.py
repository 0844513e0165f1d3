"""What a generation job may ask for: every value checked, in Python as over HTTP."""

from typing import Any

import pytest

from fastgpt.errors import RequestError
from fastgpt.request import SamplingParams


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected >= 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; expected an integer"),
        ({"max_tokens": True}, "max_tokens is True; expected an integer"),
        ({"top_k": "5"}, "top_k is '5'; expected an integer"),
        ({"seed": 1.5}, "seed is 1.5; expected an integer"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"temperature": float("nan")}, "temperature is nan; expected >= 0 and <= 2"),
        ({"top_p": 0}, "top_p is 0; expected > 0 and <= 1"),
        ({"stop": 5}, "stop is 5; expected a list"),
        ({"stop": [5]}, "stop holds 5; expected texts"),
        ({"stop": [""]}, "a stop string has 0 characters"),
        ({"stop": ["x"] * 17}, "stop has 17 strings; at most 16"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; expected a list"),
        ({"stop_token_ids": [1.5]}, "a stop token id is 1.5; expected an integer"),
        ({"stop_token_ids": [-1]}, "a stop token id is -1; expected >= 0"),
        ({"stop_token_ids": [10**30]}, f"a stop token id is {10**30}; expected >= 0"),
    ],
    ids=str,
)
def test_sampling_params_refuse_by_name(fields: dict[str, Any], words: str):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**fields)
    assert words in str(refused.value)


def test_sampling_params_lists_become_tuples():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3])  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert SamplingParams(stop="a").stop == ("a",)  # type: ignore[arg-type]
    hash(params)
