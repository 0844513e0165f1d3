"""Which family serves a configuration."""

from typing import Any

from fastgpt.errors import CheckpointError
from fastgpt.models.decoder import LLAMA, QWEN2, QWEN3
from fastgpt.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from fastgpt.models.spec import Family

__all__ = ["FAMILIES", "family"]

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, DEEPSEEK_V2, DEEPSEEK_V3)


def family(config: dict[str, Any]) -> Family:
    """Return the family named by `architectures`, or by `model_type` when that is absent.

    Raises:
        CheckpointError: if the architecture is not one of ours; the message lists ours.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"config.json: architectures is {names!r}, not a list")
    for entry in FAMILIES:
        by_type = not names and entry.name == config.get("model_type")
        if by_type or any(name in names for name in entry.architectures):
            return entry
    asked = ", ".join(map(str, names)) or str(config.get("model_type"))
    known = ", ".join(name for entry in FAMILIES for name in entry.architectures)
    raise CheckpointError(f"architecture {asked} is not known; known are {known}")
