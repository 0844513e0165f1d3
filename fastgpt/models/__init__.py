"""The model families we serve, and loading one from a checkpoint."""

from fastgpt.models.causal_lm import CausalLM, load
from fastgpt.models.model import KVLayout, Model
from fastgpt.models.registry import FAMILIES, family
from fastgpt.models.spec import ROLES, Family, ParamSpec

__all__ = [
    "FAMILIES",
    "ROLES",
    "CausalLM",
    "Family",
    "KVLayout",
    "Model",
    "ParamSpec",
    "family",
    "load",
]
