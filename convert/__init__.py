"""Published checkpoint to our weights and back: numpy and safetensors files, no MindSpore and no Torch.

`mapping` is the table of names and layouts, `transforms` the invertible changes between them. `source` finds a
checkpoint and opens it (`published`, `converted`; `hub` reads a repository of the Hugging Face Hub), `planning` says
what would be written, `converter` writes it (`storage`, `dual_format`, `ckpt_format`, `manifest`), and `cli` is the
command ``convert-weights``.
"""

from __future__ import annotations

from .checking import check
from .converter import convert, plan, revert
from .errors import ConversionError, EnvironmentProblem
from .planning import Plan
from .source import Weights, open_weights

__all__ = [
    "ConversionError",
    "EnvironmentProblem",
    "Plan",
    "Weights",
    "check",
    "convert",
    "open_weights",
    "plan",
    "revert",
]
