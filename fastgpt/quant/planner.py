"""What is stored and how: the policy's formats, or those that fit a budget or a limit best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.errors import ConfigError
from fastgpt.quant.allocate import Additivity, Budget, Option, Unit, keep_sensitive, solve
from fastgpt.quant.plan import PlannedTensor, keep_wide_rows, plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.refine import MeasuredPlan, Step, measure_plan, rescaled, steps_around
from fastgpt.quant.rotation import RotatedCheckpoint, why_not_rotated
from fastgpt.quant.sensitivity import is_free, measure_units
from fastgpt.scheme import Format

__all__ = ["Planner"]

_STEP = 0.7  # of the predicted loss, from one attempt to the next
# Share of positions whose top token changes, over the root of the KL: .46 to .61 in llama.cpp's
# table of Llama-3-8B from 4 to 8 bits. A first guess only: what is met is measured.
_CHANGED_TOP = 0.54


class Planner:
    """Makes the plan, once, and changes it when a finished model misses its limits.

    Args:
        checkpoint: the source; None for a module of another library, which has no plan.
        policy: roles, overrides and names.
        budget: the formats of all matrices that no override or sensitive name decides are chosen
            by it; None leaves them to the policy.
        keeps_sensitive: whether the costliest weights stay fp16.
        rotate: whether the residual stream is rotated: "never", "always", or "auto", where that
            answers better on the sequences that were held out of the search.
        device: where losses are measured.
        calibration: returns the tokens to measure them on.

    Attributes:
        notes: for the report.
        allocation: what the budget's solution promised, for the report.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        policy: Policy,
        budget: Budget | None,
        *,
        keeps_sensitive: bool,
        rotate: str,
        device: torch.device | None,
        calibration: Callable[[], Sequence[Sequence[int]]],
    ) -> None:
        self.notes: list[str] = []
        self.allocation: dict[str, Any] = {}
        self._source = checkpoint
        self._policy = policy
        self._budget = budget
        self._keeps_sensitive = keeps_sensitive
        self._rotate = rotate
        self._is_rotated = False
        self._device = device
        self._calibration = calibration
        self._planned: list[PlannedTensor] | None = None
        self._units: list[Unit] = []
        self._options: Sequence[Option] = ()  # of the last solution, one for every unit
        self._together = Additivity()
        self._max_loss: float | None = None

    def planned(self) -> list[PlannedTensor]:
        """Return every tensor of the output with its format, in file order.

        Raises:
            CheckpointError: a weight is missing or has no role.
            ConfigError: a rule that matches nothing or cannot be applied; or no calibration data
                where a loss must be measured.
        """
        if self._planned is None:
            planned, self.notes = plan_family(self._checkpoint, self._policy)
            if self._budget is not None or self._keeps_sensitive:
                planned = self._solved(planned)
            if self._rotate != "never":
                self._is_rotated = self._rotates(planned)
            self._planned = planned
        return self._planned

    def quantized_source(self, source: Checkpoint) -> Checkpoint:
        """Return what the plan quantizes: the source, or its function with a rotated stream."""
        planned = self.planned()
        return RotatedCheckpoint(source, planned, self._device) if self._is_rotated else source

    @property
    def has_limits(self) -> bool:
        """Tell whether a finished model must be measured."""
        limits = self._budget
        return limits is not None and (limits.max_kl is not None or limits.min_top1 is not None)

    def is_met_by(self, figures: Mapping[str, Any]) -> bool:
        """Tell whether measured figures meet the budget's limits, if it has any.

        Raises:
            ConfigError: there are limits, but nothing was measured.
        """
        limits = self._budget
        if limits is None or not self.has_limits:
            return True
        if not figures:
            raise ConfigError(
                "max_kl and min_top1 are checked by measuring, which needs calibration data kept "
                "apart for it: give 10 sequences or more, or leave calibration at 'self'"
            )
        kl, top1 = figures["kl_mean"], figures["same_top1"]
        return (limits.max_kl is None or kl <= limits.max_kl) and (
            limits.min_top1 is None or top1 >= limits.min_top1
        )

    def promote(self, figures: Mapping[str, Any]) -> None:
        """Change the plan: the weights that cost most get more bits, and are named in the notes.

        Raises:
            ConfigError: a size limit forbids it, or everything is promoted already.
        """
        assert self._budget is not None
        kl, top1 = figures["kl_mean"], figures["same_top1"]
        found = f"KL mean {kl:.4g}, same top token {100 * top1:.2f} %"
        if self._budget.bytes is not None or self._budget.bits_per_weight is not None:
            raise ConfigError(f"min_top1 cannot be met within the size budget: {found}")
        loss = self.allocation["predicted_kl"]
        if not loss > 0:
            raise ConfigError(f"the limits cannot be met even with the weights kept: {found}")
        before = self.planned()
        aims = [1.0]
        if self._budget.max_kl is not None:
            aims.append(self._budget.max_kl / max(kl, 1e-30))
        if self._budget.min_top1 is not None:
            aims.append(_loss_of(self._budget.min_top1) / max(_loss_of(top1), 1e-30))
        self._max_loss = _STEP * loss * min(aims)
        after = self._allocated(before)
        if after == before:  # the next smaller choice, whatever it gains
            self._max_loss = 0.0
            after = self._allocated(before)
        changed = [
            f"{a.name} {b.format or 'kept'} -> {a.format or 'kept'}"
            for a, b in zip(after, before, strict=True)
            if a.format != b.format
        ]
        self.notes.append(f"promoted to meet the limits ({found}): {', '.join(changed)}")
        self._planned = after

    def to_json(self) -> dict[str, Any]:
        """Return what `restore` turns back into the present plan."""
        return {
            "formats": {i.name: i.format and i.format.to_json() for i in self.planned()},
            "notes": self.notes,
            "allocation": self.allocation,
            "max_loss": self._max_loss,
            "rotated": self._is_rotated,
            "together": [self._together.scale, self._together.power],
            "units": [
                [
                    u.names,
                    [[o.format and o.format.to_json(), o.num_bytes, o.loss] for o in u.options],
                ]
                for u in self._units
            ],
        }

    def restore(self, plan: Mapping[str, Any]) -> None:
        """Take over the plan of a run before this one."""
        planned, _ = plan_family(self._checkpoint, self._policy)
        formats = {n: f and Format.parse(f) for n, f in plan["formats"].items()}
        self._planned = [replace(item, format=formats[item.name]) for item in planned]
        self.notes, self.allocation = list(plan["notes"]), plan["allocation"]
        self._max_loss = plan["max_loss"]
        self._is_rotated = plan["rotated"]
        self._together = Additivity(*plan["together"])
        self._units = [
            Unit(
                tuple(names),
                tuple(Option(f and Format.parse(f), size, loss) for f, size, loss in options),
            )
            for names, options in plan["units"]
        ]

    @property
    def _checkpoint(self) -> Checkpoint:
        if self._source is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        return self._source

    def _solved(self, planned: list[PlannedTensor]) -> list[PlannedTensor]:
        """Return the plan with what was measured taken into account."""
        sequences = self._calibration()
        if not sequences:
            raise ConfigError(
                'a budget and sensitive="auto" need calibration data; leave calibration '
                "at 'self' or give some"
            )
        free = [i.name for i in planned if is_free(i) and not self._policy.pins(i.name)]
        units, self._together = measure_units(
            self._checkpoint, planned, free, sequences, self._device
        )
        if self._keeps_sensitive:
            planned, kept = keep_sensitive(planned, units)
            self.notes.append(f"sensitive, kept in fp16: {', '.join(kept) or 'none'}")
            units = [u for u in units if not set(u.names) & set(kept)]
        if self._budget is not None:
            self._units, self._max_loss = units, self._budget.max_kl
            has_size = self._budget.bytes is not None or self._budget.bits_per_weight is not None
            if self._budget.max_kl is None and not has_size:
                assert self._budget.min_top1 is not None
                self._max_loss = _loss_of(self._budget.min_top1)
            planned = self._refined(self._allocated(planned), sequences)
        return planned

    def _rotates(self, planned: list[PlannedTensor]) -> bool:
        """Tell whether the residual stream is to be rotated; says in the notes why.

        Raises:
            ConfigError: it shall be and cannot be; or nothing to measure on.
        """
        reason = why_not_rotated(self._checkpoint, planned)
        if reason is not None:
            if self._rotate == "always":
                raise ConfigError(f"rotate is 'always', but the model cannot be rotated: {reason}")
            self.notes.append(f"residual stream not rotated: {reason}")
            return False
        if self._rotate == "always":
            self.notes.append("residual stream rotated, unmeasured")
            return True
        sequences = self._calibration()
        if not sequences:
            raise ConfigError(
                "rotate 'auto' needs calibration data; leave calibration at 'self', give some, or "
                "choose 'always' or 'never'"
            )
        rotated = RotatedCheckpoint(self._checkpoint, planned, self._device)
        measure = partial(measure_plan, self._checkpoint, planned, (), (), sequences, self._device)
        before, after = measure().kl, measure(rotated=rotated).kl
        verdict = "rotated" if after < before else "not rotated"
        self.notes.append(
            f"residual stream {verdict}: KL {after:.4g} with a rotation, {before:.4g} without, on "
            "held-out calibration sequences"
        )
        return after < before

    def _refined(
        self, planned: list[PlannedTensor], sequences: Sequence[Sequence[int]]
    ) -> list[PlannedTensor]:
        """Return the plan after measuring it as a whole and stepping around it; see refine.py.

        Within a size the new plan must cost less than the old one on the sequences no search saw.
        """
        assert self._budget is not None
        additive = self.allocation["predicted_kl"]
        units, options = self._units, self._options
        steps = steps_around(units, options)

        def measure(plan: list[PlannedTensor], around: Sequence[Step]) -> MeasuredPlan:
            return measure_plan(self._checkpoint, plan, units, around, sequences, self._device)

        first = measure(planned, steps)
        self._units, self._together = rescaled(units, options, steps, first)
        after = self._allocated(planned)
        loss = first.kl
        if self.allocation["max_bytes"] is not None and after != planned:
            loss = measure(after, []).kl
            if loss > first.kl:
                self._units, loss = units, first.kl
                after = self._allocated(planned)
        total = sum(option.loss for option in self._options)
        if self.allocation["max_bytes"] is not None and total > 0:
            self._together = Additivity(loss / total)
            after = self._allocated(planned)
        self.allocation["additive_kl"] = additive
        self.allocation["first_plan_kl"] = first.kl
        return after

    def _allocated(self, planned: list[PlannedTensor]) -> list[PlannedTensor]:
        """Return the plan with the formats that fit the budget best."""
        assert self._budget is not None
        chosen = {name for unit in self._units for name in unit.names}
        read = self._checkpoint.read
        fixed = 0
        for item in planned:
            if item.name in chosen:
                continue
            size = item.format.nbytes(item.shape) if item.format else read(item.name).nbytes
            # A bias or router that absorbs a scale is stored in float32.
            grows = item.format is None and item.role == "kept"
            fixed += max(size, Format("fp32").nbytes(item.shape)) if grows else size
        max_bytes = self._budget.bytes
        if self._budget.bits_per_weight is not None:
            count = sum(torch.Size(item.shape).numel() for item in planned)
            max_bytes = int(self._budget.bits_per_weight * count / 8)
        solution = solve(
            self._units,
            fixed,
            max_bytes=max_bytes,
            max_loss=self._max_loss,
            together=self._together,
        )
        self._options = solution.options
        formats = {
            name: self._policy.with_activations(option.format)
            for unit, option in zip(self._units, solution.options, strict=True)
            for name in unit.names
        }
        self.allocation = {
            "bytes": solution.num_bytes,
            "max_bytes": max_bytes,
            "predicted_kl": solution.loss,
            "frontier": [[size, loss] for size, loss in solution.frontier],
            "units": [
                {
                    "names": list(unit.names),
                    "options": [
                        [str(o.format) if o.format else "kept", o.num_bytes, o.loss]
                        for o in unit.options
                    ],
                }
                for unit in self._units
            ],
        }
        return keep_wide_rows(
            replace(item, format=formats[item.name]) if item.name in formats else item
            for item in planned
        )


def _loss_of(top1: float) -> float:
    """Return the KL at which that share of positions keeps its top token, about."""
    return ((1.0 - top1) / _CHANGED_TOP) ** 2
