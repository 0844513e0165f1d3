"""The sanitizer's list covers the op registry, and every case runs."""

import op_cases


def test_every_registered_op_has_a_case_that_runs() -> None:
    assert op_cases.run("cpu") == len(op_cases.registered_ops()) > 20
