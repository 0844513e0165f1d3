"""Synthetic reasoning problems for the two bundled checkpoints, tiny-r1 and tiny-qwen.

Three tasks, each a chat question whose reasoning is a chain of 2 to 8 explicit steps:

    arithmetic  a running value under additions, subtractions and one-digit multiplications
    comparison  the label of the largest or smallest of 3 to 9 three-digit numbers
    sorting     3 to 9 two-digit numbers by insertion, ascending or descending

A problem is held out when the CRC-32 of its question falls into one residue class, so the training
stream and the test set are disjoint by construction, whatever the seeds. Only the standard library
is imported: the demo and the tests draw problems from here.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "HELD_OUT_MODULUS",
    "MAX_STEPS",
    "MIN_STEPS",
    "TASKS",
    "Problem",
    "check_answer",
    "count_problems",
    "draw_problems",
    "is_held_out",
    "split_response",
]

MIN_STEPS, MAX_STEPS = 2, 8
HELD_OUT_MODULUS = 32
LABELS = "ABCDEFGHI"


@dataclass(frozen=True)
class Problem:
    """One question with the reasoning and the answer that the model is taught."""

    task: str
    question: str
    reasoning: str
    answer: str

    @property
    def response(self) -> str:
        """What the model writes after the prompt's `<think>` newline, without the end token."""
        return f"{self.reasoning}\n</think>\n\n{self.answer}"


def is_held_out(question: str) -> bool:
    """Return whether a question belongs to the test set; training never sees such a question."""
    return zlib.crc32(question.encode("utf-8")) % HELD_OUT_MODULUS == 0


def _multiply_steps(value: int, factor: int) -> str:
    """Write value * factor as its place products, then their running sum.

    >>> _multiply_steps(124, 3)
    '124*3=300+60+12=360+12=372'
    """
    digits = str(value)
    parts = [int(d) * factor * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]
    text = f"{value}*{factor}"
    while len(parts) > 1:
        text += "=" + "+".join(map(str, parts))
        parts = [parts[0] + parts[1], *parts[2:]]
    return f"{text}={parts[0]}"


def _add_steps(value: int, sign: str, operand: int) -> str:
    """Write value + operand or value - operand, tens before ones.

    >>> _add_steps(37, "+", 48)
    '37+48=77+8=85'
    """
    signed = operand if sign == "+" else -operand
    tens, ones = operand - operand % 10, operand % 10
    text = f"{value}{sign}{operand}="
    if tens and ones:
        text += f"{value + (tens if sign == '+' else -tens)}{sign}{ones}="
    return f"{text}{value + signed}"


def _arithmetic(rng: random.Random) -> Problem:
    value = start = rng.randint(1, 99)
    orders, lines = [], []
    for step in range(1, rng.randint(MIN_STEPS, MAX_STEPS) + 1):
        kinds = []
        if value < 999:
            kinds += ["add", "add"]
        if value > 0:
            kinds += ["subtract", "subtract"]
        if 0 < value <= 499:
            kinds += ["multiply"] * 2
        kind = rng.choice(kinds)
        if kind == "multiply":
            factor = rng.randint(2, min(9, 999 // value))
            orders.append(f"{step}) multiply by {factor}")
            lines.append(f"{step}) {_multiply_steps(value, factor)}")
            value *= factor
        else:
            sign = "+" if kind == "add" else "-"
            operand = rng.randint(1, min(99, 999 - value if sign == "+" else value))
            orders.append(f"{step}) {kind} {operand}")
            lines.append(f"{step}) {_add_steps(value, sign, operand)}")
            value += operand if sign == "+" else -operand
    question = f"Start with {start}. {' '.join(orders)}. What is the result?"
    return Problem("arithmetic", question, "\n".join(lines), str(value))


def _comparison(rng: random.Random) -> Problem:
    num_items = rng.randint(MIN_STEPS, MAX_STEPS) + 1
    if rng.random() < 0.5:
        values = rng.sample(range(100, 1000), num_items)
    else:  # close together: equal leading digits, so the later digits decide
        low = rng.randint(100, 1000 - 40)
        values = rng.sample(range(low, low + 40), num_items)
    goal = rng.choice(("largest", "smallest"))
    best, lines = 0, []
    for i in range(1, num_items):
        is_more = values[i] > values[best]
        is_better = is_more == (goal == "largest")
        lines.append(
            f"{LABELS[i]}={values[i]} vs {LABELS[best]}={values[best]}: "
            f"{'more' if is_more else 'less'}, "
            f"{'take' if is_better else 'keep'} {LABELS[i] if is_better else LABELS[best]}"
        )
        best = i if is_better else best
    items = " ".join(f"{label}={value}" for label, value in zip(LABELS, values, strict=False))
    return Problem("comparison", f"Which is the {goal}? {items}", "\n".join(lines), LABELS[best])


def _sorting(rng: random.Random) -> Problem:
    values = rng.sample(range(10, 100), rng.randint(MIN_STEPS, MAX_STEPS) + 1)
    is_ascending = rng.random() < 0.5
    done, lines = [values[0]], []
    for value in values[1:]:
        place = sum((other < value) == is_ascending for other in done)
        where = f"after {done[place - 1]}" if place else "first"
        done.insert(place, value)
        lines.append(f"{value} {where}: {','.join(map(str, done))}")
    order = "smallest to largest" if is_ascending else "largest to smallest"
    question = f"Sort from {order}: {', '.join(map(str, values))}"
    return Problem("sorting", question, "\n".join(lines), ", ".join(map(str, done)))


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": _arithmetic,
    "comparison": _comparison,
    "sorting": _sorting,
}
TASKS = tuple(_MAKERS)


def draw_problems(task: str, count: int, *, seed: int, held_out: bool) -> list[Problem]:
    """Return `count` different problems of one task, all held out or none of them.

    Raises:
        KeyError: if the task is not one of TASKS.
    """
    make = _MAKERS[task]
    rng = random.Random(f"{task}/{seed}/{held_out}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make(rng)
        if is_held_out(problem.question) == held_out:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def count_problems(task: str) -> int:
    """Return a lower bound of the number of different questions of one task.

    Arithmetic: starts of 50 to 99 under three operands of 1 to 16, each added or subtracted, all of
    which stay within 0 to 999. The lists: ordered triples of different values, with two goals.
    """
    if task == "arithmetic":
        return 50 * (2 * 16) ** 3
    return 2 * math.perm(900 if task == "comparison" else 90, 3)


def split_response(text: str) -> tuple[str, str]:
    """Return reasoning and answer of a response, both stripped; no end of thinking: no answer."""
    reasoning, mark, answer = text.partition("</think>")
    return reasoning.strip(), answer.strip() if mark else ""


def check_answer(problem: Problem, response: str) -> bool:
    """Return whether the text after `</think>` is exactly the problem's answer."""
    return split_response(response)[1] == problem.answer
