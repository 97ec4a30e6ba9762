"""What the measuring processes do: two sides that take turns, or one side alone, whose memory is watched.

Each function is a generator that :class:`bench_kit.fresh.Fresh` runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kimi_vl.convert import EnvironmentProblem

from . import costs
from .cases import ANSWER, DECODE, HEAD, Case, largest_context, largest_picture
from .turns import Reading, nmse, steadiness, take_turns, timed

if TYPE_CHECKING:
    from .our_side import OurSide
    from .torch_side import TorchSide

OURS = "ours"
READING = "reading"  # a side that only reads memory
LLAMA = "llama.cpp"
ROUTED = 256  # tokens of the prompt whose routing is compared
COUNTED = 3  # turns in which a batch's experts are counted


class Reference(Protocol):
    """The other side: Torch, see `torch_side`, or llama.cpp, see `llama_side`."""

    name: str
    weight_bytes: int  # of a number of the weights
    cache_bytes: int  # of a number in the cache
    fills_cache: bool  # whether its cache holds what the case says before a token is decoded
    versions: dict[str, str]

    def takes(self, case: Case) -> bool: ...
    def chosen_experts(self, ids: np.ndarray) -> np.ndarray | None: ...
    def use(self, variant: str) -> None: ...
    def fastest(self, case: Case, run: Callable[[int], object]) -> dict[str, float]: ...
    def prepare(self, case: Case) -> Callable[[int], np.ndarray]: ...
    def experts_in_a_batch(self, run: Callable[[int], np.ndarray], turns: int) -> float: ...


@dataclass(frozen=True)
class Setting:
    """What a session needs to know. `ours` is a converted directory, or a bundle if `bundle` says so."""

    published: Path
    ours: Path
    bundle: bool
    kernels: str | None
    chunk: int
    threads: int
    rounds: int
    budget: float
    cases: tuple[Case, ...]

    def our_side(self) -> OurSide:
        from .our_side import OurSide

        if self.bundle:
            return OurSide.of_bundle(self.ours)
        patches = largest_picture(self.cases)
        return OurSide.of_network(self.ours, self.kernels, self.context(), patches, self.chunk)

    def reference(self, name: str) -> Reference:
        """Torch in the dtype of this name, or llama.cpp."""
        if name == LLAMA:
            try:
                from .llama_side import LlamaSide
            except ModuleNotFoundError as e:
                raise EnvironmentProblem(
                    f"--reference {LLAMA}: there is no {e.name}; install llama-cpp-python and gguf"
                ) from None
            return LlamaSide(self.published, self.context(), self.threads)
        from .torch_side import TorchSide

        return TorchSide(self.published, name)

    def context(self) -> int:
        """Tokens of the largest cache."""
        from kimi_vl.modeling.configuration import ModelConfig

        return max(largest_context(self.cases, ModelConfig.from_file(self.published)), ROUTED)

    def confine(self) -> None:
        """This process and its threads to `threads` processors, whatever an engine takes for its number of threads."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.threads])

    def set_torch_threads(self) -> None:
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Machine:
    """Where it ran: versions, our side's name."""

    versions: dict[str, str]
    ours: str

    def joined(self, other: Machine) -> Machine:
        return replace(self, versions=self.versions | other.versions)


@dataclass(frozen=True)
class RoutingFound:
    """Of a prompt of ROUTED tokens: the busiest expert's load over the mean, by layer; the share of equal choices."""

    skew: list[float]
    agreement: float | None


@dataclass(frozen=True)
class Measured:
    """A case, or a part of it, on both sides.

    Attributes:
        case: and the part's name, "first token" of an answer.
        variant, variants: the reference's implementations in use, and the seconds of all that were tried.
        first: seconds of our first run, which compiles graphs.
        ours, theirs: seconds of each turn.
        attempts, others: see `turns.Turns`.
        errors: NMSE by side against Torch in fp32; `None` where that is not known.
        work, ours_work: bytes or operations that the reference and our side cannot do without, 0 where not counted.
        bandwidth: bytes that were read from memory in a second, by turn, where work is bytes.
    """

    case: Case
    part: str
    reference: str
    variant: str
    variants: dict[str, float]
    first: float
    ours: list[float]
    theirs: list[float]
    attempts: int
    others: float
    errors: dict[str, float | None] = field(default_factory=dict)
    work: float = 0
    ours_work: float = 0
    bandwidth: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.case}{self.part and ', ' + self.part}"

    @property
    def unsteady(self) -> float:
        """The reference's median over its least."""
        return steadiness(self.theirs)


def compare(setting: Setting, name: str, exact: dict[str, np.ndarray]) -> Iterator[Any]:
    """Both sides take turns in all cases; the reference is the one called `name`.

    Args:
        exact: what Torch in fp32 gave, by case.

    Yields:
        Machine, of Torch RoutingFound, then of each case that the reference takes (name, results of turn 0) and its
        Measured.
    """
    setting.confine()
    setting.set_torch_threads()
    ours = setting.our_side()
    theirs = setting.reference(name)
    yield Machine(ours.versions | theirs.versions, ours.name)
    if routing := _routing(ours, theirs):  # also touches most of the weights of both
        yield routing
    for case in filter(theirs.takes, setting.cases):
        if case.kind == ANSWER:
            yield from _answer(setting, case, ours, theirs)
            continue
        run, reference = ours.prepare(case), theirs.prepare(case)
        start = time.perf_counter()
        mine = run(0)
        first = time.perf_counter() - start
        variants = theirs.fastest(case, reference)
        results = reference(0)
        yield str(case), results
        true = results if name == "fp32" else exact.get(str(case))
        errors = {OURS: mine}
        if theirs.fills_cache or not case.cached:
            errors[theirs.name] = results
        sides = {OURS: timed(run), theirs.name: timed(reference)}
        reading = Reading() if case.kind in (DECODE, HEAD) else None
        if reading:
            sides[READING] = timed(reading)
        turns = take_turns(sides, theirs.name, setting.rounds, setting.budget)
        bandwidth = reading.speeds(turns.times[READING][""]) if reading else []
        work, our_work = _work(case, ours, theirs, reference)
        yield Measured(
            case, "", theirs.name, next(iter(variants)), variants, first,
            turns.times[OURS][""], turns.times[theirs.name][""], turns.attempts, turns.others,
            {side: None if true is None else nmse(got, true) for side, got in errors.items()}, work, our_work, bandwidth,
        )  # fmt: skip


def _answer(setting: Setting, case: Case, ours: OurSide, theirs: TorchSide) -> Iterator[Measured]:
    run, reference = ours.answer(case), theirs.answer(case)
    start = time.perf_counter()
    run(0)
    first = time.perf_counter() - start
    variants = theirs.fastest(case, reference)
    parts = "first token", "a token after it"
    sides = {
        OURS: lambda turn: dict(zip(parts, run(turn))),
        theirs.name: lambda turn: dict(zip(parts, reference(turn))),
    }
    turns = take_turns(sides, theirs.name, setting.rounds, setting.budget)
    for part in parts:
        yield Measured(
            case, part, theirs.name, next(iter(variants)), variants, first,
            turns.times[OURS][part], turns.times[theirs.name][part], turns.attempts, turns.others,
        )  # fmt: skip


def _work(case: Case, ours: OurSide, theirs: Reference, reference: Any) -> tuple[float, float]:
    """Bytes or operations of the reference and of our side."""
    config = ours.config
    if case.kind not in (DECODE, HEAD):
        both = costs.operations(config, case)
        return both, both
    experts = theirs.experts_in_a_batch(reference, COUNTED) if case.kind == DECODE else 0.0
    return (
        costs.bytes_read(config, case, experts, theirs.weight_bytes, theirs.cache_bytes),
        costs.bytes_read(config, case, experts, ours.weight_bytes, ours.cache_bytes),
    )


def _routing(ours: OurSide, theirs: Reference) -> RoutingFound | None:
    config = ours.config
    ids = Case("prefill", min(ROUTED, ours.model.engine.max_context)).tokens(config, 0)[0]
    if not config.text.moe_layers:
        return RoutingFound([], None)
    chosen, mine = theirs.chosen_experts(ids), ours.chosen_experts(ids)
    if chosen is None:
        return None
    loads = [np.bincount(layer.ravel(), minlength=config.text.n_routed_experts) for layer in chosen]
    common = None
    if mine is not None:
        equal = (mine[..., :, None] == chosen[..., None, :]).any(-1)  # (Lm, n, k)
        common = float(equal.mean())
    return RoutingFound([float(load.max() / load.mean()) for load in loads], common)


@dataclass(frozen=True)
class Alone:
    """One side ran all cases once, after `seconds` of loading."""

    name: str
    seconds: float


def alone(setting: Setting, side: str, variants: dict[str, str]) -> Iterator[Alone]:
    """Runs each case once on one side, "ours" or a reference. Yields one Alone.

    Args:
        variants: of the cases, the reference's implementations to use.
    """
    setting.confine()
    if side == OURS:
        import mindspore  # noqa: F401 (not part of loading)

        start = time.perf_counter()
        ours = setting.our_side()
        loaded = Alone(OURS, time.perf_counter() - start)
        for case in setting.cases:
            (ours.answer(case) if case.kind == ANSWER else ours.prepare(case))(0)
        yield loaded
        return
    setting.set_torch_threads()
    start = time.perf_counter()
    theirs = setting.reference(side)
    loaded = Alone(theirs.name, time.perf_counter() - start)
    for case in filter(theirs.takes, setting.cases):
        theirs.use(variants[str(case)])
        (theirs.answer(case) if case.kind == ANSWER else theirs.prepare(case))(0)
    yield loaded
