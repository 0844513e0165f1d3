"""Comparing op results with the oracle: NaN and infinity first, then a bound on the error."""

import torch
from torch import Tensor

# Half a unit in the last place at 1.0: the error of one rounding to the dtype.
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of NaN (or of the largest integer): what an op forgets to write shows."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, torch.iinfo(dtype).max, dtype=dtype, device=device)


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float, scale: float = 0.0) -> None:
    """Fail unless |actual - expected| <= tolerance * max(|expected|, scale) everywhere.

    `scale` is the magnitude of what was summed, for results that cancel. The message names the
    worst position.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    a, e = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(a.isnan(), e.isnan()), "NaN in other places"
    assert torch.equal(a.isinf(), e.isinf()), "infinity in other places"
    finite = e.isfinite()
    error = torch.where(finite, (a - e).abs(), 0.0)
    bound = torch.where(finite, tolerance * e.abs().clamp(min=scale), 1.0)
    if bool((error > bound).any()):
        worst = int((error - bound).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), e.shape))
        raise AssertionError(
            f"worst at {index}: {a.flatten()[worst]} instead of {e.flatten()[worst]}, "
            f"error {error.flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
        )
