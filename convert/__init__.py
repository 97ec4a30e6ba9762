"""Published checkpoint to our weights and back: numpy and safetensors files, no MindSpore and no Torch.

`mapping` is the table of names and layouts, `transforms` the invertible changes between them, `safetensors_file`
the format, `source` what a checkpoint is read through.
"""

from __future__ import annotations

from .errors import ConversionError, EnvironmentProblem
from .source import Weights, open_weights

__all__ = ["ConversionError", "EnvironmentProblem", "Weights", "open_weights"]
