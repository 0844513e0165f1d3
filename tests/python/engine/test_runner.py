"""Which steps run with overlapping launches."""

import threading

import pytest
import torch
from engine.fake_model import FakeModel

from fastgpt import _C
from fastgpt.engine import Engine
from fastgpt.request import SamplingParams


class Watching(FakeModel):
    """Notes for every forward whether it is a decode step and whether launches may overlap."""

    seen: list[tuple[bool, bool]]

    def forward(self, batch, kv_cache):
        self.seen.append((batch.max_seqlen_q == 1, _C.overlap_launches()))
        return super().forward(batch, kv_cache)


def run_watched() -> list[tuple[bool, bool]]:
    model = Watching()
    model.seen = []
    engine = Engine(model, max_batch=2, max_length=64)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    return model.seen


def test_decode_steps_overlap_and_others_do_not():
    seen = run_watched()
    assert (True, True) in seen
    assert (False, False) in seen
    assert all(overlap == is_decode for is_decode, overlap in seen)
    assert not _C.overlap_launches(), "the scope ends with the step"


def test_disable_pdl_turns_it_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTGPT_DISABLE_PDL", "1")
    assert not any(overlap for _, overlap in run_watched())


def test_scope_ends_when_a_step_fails():
    class Failing(FakeModel):
        fails = False

        def forward(self, batch, kv_cache):
            if self.fails:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(batch, kv_cache)

    model = Failing()
    engine = Engine(model, max_batch=1, max_length=64)
    model.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert not _C.overlap_launches()


def test_scope_belongs_to_one_thread():
    _C.set_overlap_launches(True)
    try:
        other: list[bool] = []
        thread = threading.Thread(target=lambda: other.append(_C.overlap_launches()))
        thread.start()
        thread.join()
        assert other == [False]
        assert _C.overlap_launches()
    finally:
        _C.set_overlap_launches(False)
