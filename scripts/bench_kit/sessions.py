"""What the measuring processes do: two sides that take turns, or one side alone, whose memory is watched.

Each function is a generator that :class:`bench_kit.fresh.Fresh` runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import costs
from .cases import ANSWER, DECODE, HEAD, Case, largest_context, largest_picture
from .turns import Turns, nmse, read_bandwidth, steadiness, take_turns, timed

if TYPE_CHECKING:
    from .our_side import OurSide
    from .torch_side import TorchSide

OURS = "ours"
ROUTED = 256  # tokens of the prompt whose routing is compared
COUNTED = 3  # turns in which a batch's experts are counted


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
        from kimi_vl.modeling.configuration import ModelConfig

        from .our_side import OurSide

        if self.bundle:
            return OurSide.of_bundle(self.ours)
        config = ModelConfig.from_file(self.ours)
        context = max(largest_context(self.cases, config), ROUTED)
        return OurSide.of_network(self.ours, self.kernels, context, largest_picture(self.cases), self.chunk)

    def torch_side(self, dtype: str) -> TorchSide:
        from .torch_side import TorchSide

        return TorchSide(self.published, dtype)

    def confine(self) -> None:
        """This process and its threads to `threads` processors, whatever an engine takes for its number of threads."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.threads])

    def set_torch_threads(self) -> None:
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Machine:
    """Where it ran: bytes that are read in a second, versions, our side's name."""

    bandwidth: float
    versions: dict[str, str]
    ours: str


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

    @property
    def name(self) -> str:
        return f"{self.case}{self.part and ', ' + self.part}"

    @property
    def unsteady(self) -> float:
        """The reference's median over its least."""
        return steadiness(self.theirs)


def compare(setting: Setting, dtype: str, exact: dict[str, np.ndarray]) -> Iterator[Any]:
    """Both sides take turns in all cases; the reference is Torch in `dtype`.

    Args:
        exact: what Torch in fp32 gave, by case.

    Yields:
        Machine, RoutingFound, then of each case (name, results of turn 0) and its Measured.
    """
    setting.confine()
    setting.set_torch_threads()
    bandwidth = read_bandwidth(setting.threads)
    ours = setting.our_side()
    theirs = setting.torch_side(dtype)
    from . import our_side, torch_side

    yield Machine(bandwidth, our_side.versions() | torch_side.versions(), ours.name)
    yield _routing(ours, theirs)  # also touches most of the weights of both
    for case in setting.cases:
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
        true = results if dtype == "fp32" else exact.get(str(case))
        errors = {OURS: mine, theirs.name: results}
        turns = _turns(setting, timed(run), timed(reference), theirs.name)
        work, our_work = _work(case, ours, theirs, reference)
        yield Measured(
            case, "", theirs.name, str(next(iter(variants))), {str(v): s for v, s in variants.items()}, first,
            turns.times[OURS][""], turns.times[theirs.name][""], turns.attempts, turns.others,
            {side: None if true is None else nmse(got, true) for side, got in errors.items()}, work, our_work,
        )  # fmt: skip


def _turns(setting: Setting, run: Any, reference: Any, name: str) -> Turns:
    return take_turns({OURS: run, name: reference}, name, setting.rounds, setting.budget)


def _answer(setting: Setting, case: Case, ours: OurSide, theirs: TorchSide) -> Iterator[Measured]:
    run, reference = ours.answer(case), theirs.answer(case)
    start = time.perf_counter()
    run(0)
    first = time.perf_counter() - start
    variants = theirs.fastest(case, reference)
    parts = "first token", "a token after it"
    turns = _turns(
        setting,
        lambda turn: dict(zip(parts, run(turn))),
        lambda turn: dict(zip(parts, reference(turn))),
        theirs.name,
    )
    for part in parts:
        yield Measured(
            case, part, theirs.name, str(next(iter(variants))), {str(v): s for v, s in variants.items()}, first,
            turns.times[OURS][part], turns.times[theirs.name][part], turns.attempts, turns.others,
        )  # fmt: skip


def _work(case: Case, ours: OurSide, theirs: TorchSide, reference: Any) -> tuple[float, float]:
    """Bytes or operations of the reference and of our side."""
    config = ours.config
    if case.kind not in (DECODE, HEAD):
        both = costs.operations(config, case)
        return both, both
    experts = theirs.experts_in_a_batch(reference, COUNTED) if case.kind == DECODE else 0.0
    return (
        costs.bytes_read(config, case, experts, theirs.weight_bytes, theirs.weight_bytes),
        costs.bytes_read(config, case, experts, ours.weight_bytes, ours.cache_bytes),
    )


def _routing(ours: OurSide, theirs: TorchSide) -> RoutingFound:
    config = ours.config
    ids = Case("prefill", min(ROUTED, ours.model.engine.max_context)).tokens(config, 0)[0]
    if not config.text.moe_layers:
        return RoutingFound([], None)
    chosen, mine = theirs.chosen_experts(ids), ours.chosen_experts(ids)
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
    """Runs each case once on one side, "ours" or Torch's dtype. Yields one Alone.

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
    from .torch_side import Variant

    start = time.perf_counter()
    theirs = setting.torch_side(side)
    loaded = Alone(theirs.name, time.perf_counter() - start)
    for case in setting.cases:
        theirs.use(Variant(*variants[str(case)].split(", ")))
        (theirs.answer(case) if case.kind == ANSWER else theirs.prepare(case))(0)
    yield loaded
