"""Runs a MindIR graph node by node in Torch, so that a graph for a device that is not there can be judged.

Nothing is fused or reordered: every node of the file runs in its order, with the arguments that the file holds, and what
it gives is held against the type that the file declares for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from . import attention, cpu_operators, elementwise, experts, norms, products, selection, shaping  # noqa: F401  they fill RULES
from .errors import InterpreterError, Refused, require
from .graph import CALL, Function, Graph, Node
from .noise import EXACT, Noise
from .parameters import Parameters
from .rules import RULES, Rule
from .values import (
    LOW,
    MONAD,
    Closure,
    Monad,
    Spec,
    Value,
    described,
    from_numpy,
    mapped,
    name,
    to_numpy,
    wide,
)

Arithmetic = Literal["lifted", "rounded"]


class Interpreter:
    """A graph that can be called; what it writes into its parameters is there in the next call.

    Args:
        graph: from :func:`load_graph`.
        parameters: arrays by plain name, see :class:`Parameters`; they are read when a node needs them and not kept.
        arithmetic: "lifted" computes everything that the graph declares as bf16 or fp16 in fp32, from inputs and
            weights as they are: what the graph computes apart from rounding. "rounded" rounds what every operator gives
            to the dtype that the graph declares; inside an operator it is fp32 still.
        noise: what is added to the results of operators that compute; only with "rounded".

    Raises:
        InterpreterError: an operator has no rule, or a parameter is missing.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, np.ndarray],
        arithmetic: Arithmetic = "lifted",
        noise: Noise | None = None,
    ) -> None:
        if arithmetic not in ("lifted", "rounded"):
            raise InterpreterError(f"arithmetic: {arithmetic!r}, expected 'lifted' or 'rounded'")
        self.graph = graph
        self.lifted = arithmetic == "lifted"
        if noise and self.lifted:
            raise InterpreterError(
                "noise: is in units of a rounded result, so arithmetic has to be 'rounded'"
            )
        self._noise = noise
        for node in graph.nodes:
            if node.operator not in {CALL, *RULES, *_STRUCTURE}:
                raise InterpreterError(f"there is no rule for {graph.describe(node)}")
        self.parameters = Parameters(graph, parameters, self.lifted)
        self._watched: dict[str, Any] = {}

    def __call__(
        self, inputs: Mapping[str, np.ndarray], watched: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs for inputs by name.

        Floats may be given in fp32 where the graph takes bf16 or fp16: "lifted" uses them so, "rounded" rounds them.

        Args:
            watched: by what nodes give, see :class:`Node`; filled with the values.

        Raises:
            InterpreterError: an input is missing or of another shape or dtype; a node's arguments are outside its
                operator's documented semantics, or its result is not what the graph declares.
        """
        given = {inner: self._input(plain, inputs) for inner, plain in self.graph.values.items()}
        self._watched = {} if watched is None else watched
        with torch.inference_mode():
            result = self._run(self.graph.main, given)
        results = result if isinstance(result, tuple) else (result,)
        outputs = {}
        for (output, spec), value in zip(self.graph.outputs.items(), results, strict=True):
            if not isinstance(value, Value) or value.spec != spec:
                raise InterpreterError(f"{output}: is {described(value)}, but the graph declares {spec}")
            data = wide(value.data) if self.lifted else value.data
            outputs[output] = to_numpy(data.clone())
        return outputs

    def _input(self, plain: str, inputs: Mapping[str, np.ndarray]) -> Value:
        spec = self.graph.inputs[plain]
        if plain not in inputs:
            raise InterpreterError(f"{plain}: the graph takes {spec}, but no such input was given")
        data = from_numpy(inputs[plain])
        wider = spec.dtype in LOW and data.dtype == torch.float32
        if tuple(data.shape) != spec.shape or not (data.dtype == spec.dtype or wider):
            raise InterpreterError(
                f"{plain}: the graph takes {spec}, but the input is {name(data.dtype)} {list(data.shape)}"
            )
        return Value(data if self.lifted else data.to(spec.dtype), spec.dtype)

    # Nodes -----------------------------------------------------------------------------------------------------------

    def _run(self, function: Function, values: dict[str, Any]) -> Any:
        for node in function.nodes:
            arguments = tuple(self._value(i, values) for i in node.inputs)
            for i in node.last_use:
                values.pop(i, None)
            values[node.output] = self._result(node, arguments)
            if node.output in self._watched:
                self._watched[node.output] = values[node.output]
        return self._value(function.result, values)

    def _value(self, key: str, values: dict[str, Any]) -> Any:
        if key in values:
            return values[key]
        if key in self.graph.references:
            return self.parameters.value(self.graph.references[key])
        if key in self.graph.constants:
            return self.graph.constants[key]
        return Closure(key)

    def _result(self, node: Node, arguments: tuple[Any, ...]) -> Any:
        """What a node gives."""
        if node.operator == CALL:
            return self._call(*arguments)
        try:
            if node.operator in _STRUCTURE:
                return _STRUCTURE[node.operator](*arguments)
            rule = RULES[node.operator]
            arguments = tuple(a for a in arguments if not isinstance(a, Monad))
            if rule.writes:
                return self._write(node, rule, arguments)
            result = self._finished(*rule(arguments, node.attributes, node.declared))
            _check(result, node.declared)
            return mapped(self._noise, result) if self._noise and node.operator not in EXACT else result
        except Refused as e:
            shown = ", ".join(map(described, arguments))
            raise InterpreterError(f"{node.operator} ({node.name}) {e}; its arguments are {shown}") from None
        except (TypeError, RuntimeError, IndexError, ValueError) as e:
            shown = ", ".join(map(described, arguments))
            raise InterpreterError(
                f"{node.operator} ({node.name}) fails ({e}); its arguments are {shown}"
            ) from e

    def _write(self, node: Node, rule: Rule, arguments: tuple[Any, ...]) -> Value:
        """What a node gives that writes into a parameter, which is the parameter again."""
        parameter = arguments[0].parameter
        require(parameter in self.parameters.written, "writes into what is no parameter")
        now = self.parameters.value(parameter)  # the argument may be what it was before another write
        result = self._finished(*rule((now, *arguments[1:]), node.attributes))
        _check(result, node.declared)
        self.parameters.update(parameter, result.data)
        return replace(result, parameter=parameter)

    def _call(self, closure: Any, *arguments: Any) -> Any:
        function = self.graph.functions.get(closure.graph) if isinstance(closure, Closure) else None
        if function is None:
            raise InterpreterError(f"{described(closure)}: is called, but it is no sub-graph of the file")
        given = (*closure.bound, *arguments)
        return self._run(function, dict(zip(function.inputs, given, strict=True)))

    def _finished(self, data: Any, dtypes: Any) -> Any:
        """The data of a result as a value of the graph, or a tuple of these."""
        if isinstance(data, tuple):
            each = dtypes if isinstance(dtypes, tuple) else (dtypes,) * len(data)
            return tuple(self._finished(d, t) for d, t in zip(data, each, strict=True))
        low = dtypes in LOW and data.is_floating_point()
        return Value(data if low and self.lifted else data.to(dtypes), dtypes)


def _check(result: Any, declared: Any) -> None:
    """Raises Refused: the result has not the type that the graph declares. A length of -1 is unknown to it."""
    if isinstance(result, tuple):
        expected = declared if isinstance(declared, tuple) else ()
        if len(expected) != len(result):
            raise Refused(f"gives {len(result)} results, but the graph declares {described(declared)}")
        for part, kind in zip(result, expected):
            _check(part, kind)
        return
    spec = result.spec
    if (
        not isinstance(declared, Spec)
        or declared.dtype != spec.dtype
        or not _fits(spec.shape, declared.shape)
    ):
        raise Refused(f"gives {spec}, but the graph declares {described(declared)}")


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(d in (-1, n) for n, d in zip(shape, declared))


# What a graph is made of beside operators -----------------------------------------------------------------------------


def _item(parts: tuple[Any, ...], index: int) -> Any:
    return parts[index]


def _make_tuple(*parts: Any) -> tuple[Any, ...]:
    return parts


def _pass_on(value: Any, *_: Any) -> Any:
    return value


def _load(value: Any, *_: Any) -> Any:
    """The content at this moment."""
    return replace(value, parameter=None) if isinstance(value, Value) else value


def _partial(closure: Closure, *bound: Any) -> Closure:
    return Closure(closure.graph, (*closure.bound, *bound))


def _switch(condition: Any, true: Closure, false: Closure) -> Closure:
    chosen = condition.data.item() if isinstance(condition, Value) else condition
    return true if chosen else false


def _monad(*_: Any) -> Monad:
    return MONAD


_STRUCTURE = {
    "MakeTuple": _make_tuple,
    "MakeList": _make_tuple,
    "TupleGetItem": _item,
    "ListGetItem": _item,
    "Load": _load,
    "Depend": _pass_on,
    "Return": _pass_on,
    "UpdateState": _monad,
    "Partial": _partial,
    "Switch": _switch,
}
