"""What every op must compute, in plain torch: one module per family, the signatures of fastgpt.ops.

Functions take any device and compute in the dtype `compute` (float64 by default), rounding once to
the result's dtype, so that they are the truth that kernels are measured against.
"""
