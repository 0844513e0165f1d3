"""Expert weights in memory order of transformers 5: one 3-D parameter for all experts of a layer.

`<layer>.experts.gate_up_proj` [num_experts, 2 * width, hidden] holds gate rows, then up rows;
`<layer>.experts.down_proj` [num_experts, hidden, width]. Ours is one weight per expert.
"""

import re
from collections.abc import Iterator

from torch import Tensor

__all__ = ["ExpertSlice", "split_names"]


class ExpertSlice:
    """Where one expert's weight lies in a fused parameter."""

    __slots__ = ("expert", "fused_name", "rows")

    def __init__(self, fused_name: str, expert: int, rows: slice) -> None:
        self.fused_name = fused_name
        self.expert = expert
        self.rows = rows

    def of(self, fused: Tensor) -> Tensor:
        """Return the weight as a view of the fused parameter."""
        return fused[self.expert, self.rows]


def split_names(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, ExpertSlice]]:
    """Yield the canonical name and place of every expert in a fused parameter; else nothing.

    >>> [n for n, _ in split_names("m.experts.gate_up_proj", (1, 4, 3))]
    ['m.experts.0.gate_proj.weight', 'm.experts.0.up_proj.weight']
    """
    match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if match is None or len(shape) != 3:
        return
    prefix, kind = match.groups()
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield (
                f"{prefix}.{expert}.down_proj.weight",
                ExpertSlice(name, expert, slice(0, shape[1])),
            )
            continue
        half = shape[1] // 2
        for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, shape[1]))):
            yield f"{prefix}.{expert}.{part}.weight", ExpertSlice(name, expert, rows)
