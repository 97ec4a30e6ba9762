"""What an operator computes, as a rule: a function of Torch tensors, and the dtype of its result.

Rules are written from MindSpore's docstrings (and, where these are silent, CANN's), not from the network's kernels; for the
project's own operators from what `modeling/kernels` says that they compute, not from their code. They
stand in one module per kind of operator and are found through :data:`RULES`, by the name that an exported file uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import Refused
from .values import LOW, Spec, Value, mapped, name, wide

DtypeRule = Callable[..., Any]
"""Of the arguments, tensors as Values: the dtype of the result, or a tuple of dtypes."""


def common(*arguments: Any) -> torch.dtype:
    """The one dtype of all tensor arguments."""
    found = list(dict.fromkeys(a.dtype for a in arguments if isinstance(a, Value)))
    if len(found) != 1:
        raise Refused(f"its tensors are {' and '.join(map(name, found))}, expected one dtype")
    return found[0]


def first(*arguments: Any) -> torch.dtype:
    """The dtype of the first tensor."""
    for argument in arguments:
        if isinstance(argument, Value):
            return argument.dtype
    raise Refused("takes no tensor, expected one")


def always(*dtypes: torch.dtype) -> DtypeRule:
    """These, whatever the arguments."""
    return lambda *_: dtypes if len(dtypes) > 1 else dtypes[0]


@dataclass(frozen=True)
class Rule:
    """See :func:`rule`."""

    compute: Callable[..., Any]
    result: DtypeRule
    attributes: tuple[str, ...]
    floats: tuple[torch.dtype, ...]
    widen: bool
    writes: bool
    shaped: bool

    def __call__(
        self, arguments: tuple[Any, ...], attributes: dict[str, Any], declared: Any = None
    ) -> tuple[Any, Any]:
        """The data and the dtypes of the result, which the graph has `declared` to be so.

        Raises:
            Refused: arguments outside the operator's documented semantics.
        """
        missing = [a for a in self.attributes if a not in attributes]
        if missing:
            raise Refused(f"has no attribute {missing[0]}")
        mapped(self._check_float, arguments)
        dtypes = self.result(*arguments)
        unwrap = (lambda v: wide(v.data)) if self.widen else (lambda v: v.data)
        further = {a: attributes[a] for a in self.attributes}
        if self.shaped:
            further["shapes"] = _shapes(declared)
        data = self.compute(*mapped(unwrap, arguments), **further)
        return data, dtypes

    def _check_float(self, value: Value) -> None:
        if self.floats and value.dtype.is_floating_point and value.dtype not in self.floats:
            raise Refused(f"takes {name(value.dtype)}, expected {' or '.join(map(name, self.floats))}")


def _shapes(declared: Any) -> tuple[tuple[int, ...], ...]:
    parts = declared if isinstance(declared, tuple) else ()
    if len(parts) < 2 or not all(isinstance(part, Spec) for part in parts):
        raise Refused("gives several tensors, but the graph does not declare them")
    return tuple(part.shape for part in parts)


RULES: dict[str, Rule] = {}


def rule(
    *operators: str,
    result: DtypeRule = common,
    attributes: tuple[str, ...] = (),
    floats: tuple[torch.dtype, ...] = (),
    widen: bool = True,
    writes: bool = False,
    shaped: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the rule of some operators. It takes the node's inputs without monads, and `attributes` by name.

    Args:
        result: the dtype of what it gives, of all parts if it gives a tuple, or a tuple of dtypes.
        floats: the dtypes that floating tensors may have; default any.
        widen: it takes bf16 and fp16 as fp32; if not, as they are held, and it widens what it multiplies itself.
        writes: its first argument is changed in place; it gives the new content, the old one must stay as it was.
        shaped: the declared shapes of its results, a tuple of several, are an argument `shapes` too, because nothing else
            says what the operator is to give.
    """

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            assert operator not in RULES, operator
            RULES[operator] = Rule(compute, result, attributes, floats, widen, writes, shaped)
        return compute

    return register


FLOATS = (*LOW, torch.float32)
