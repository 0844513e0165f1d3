"""Turning a model into a smaller one: policy, rounding, report."""

from fastgpt.quant.allocate import Budget
from fastgpt.quant.calibration import Calibration
from fastgpt.quant.loading import load
from fastgpt.quant.policy import PRESETS, Policy
from fastgpt.quant.quantizer import QuantizedModel, Quantizer
from fastgpt.quant.report import render_report

__all__ = [
    "PRESETS",
    "Budget",
    "Calibration",
    "Policy",
    "QuantizedModel",
    "Quantizer",
    "load",
    "render_report",
]
