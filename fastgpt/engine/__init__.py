"""Serving one model: scheduling, the paged cache, the step loop.

Names are imported when first used: the scheduler alone needs neither torch nor the op library.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.engine.engine import Engine, EngineStats, StepOutput, StreamPiece

__all__ = ["Engine", "EngineStats", "StepOutput", "StreamPiece"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastgpt.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
