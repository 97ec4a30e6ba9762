"""What of the gate sees a mutant: the linter of exports, the interpreter, or the judgement of a run by profile strict."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_vl.convert.manifest import content_hash
from kimi_vl.export import legality, lint
from kimi_vl.export.bundle import MANIFEST, Bundle
from kimi_vl.export.errors import ExportError
from kimi_vl.export.plan import TARGETS
from kimi_vl.export.proto import pb
from kimi_vl.verify.candidates import inspect, open_candidate
from kimi_vl.verify.cases import DEFAULT_SEED, Plan, Source, select, suite
from kimi_vl.verify.judge import Finding, judge, load_profile
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.prompts import source_for
from kimi_vl.verify.runner import run_suite

from .remembered import Remembered
from .sampling import Mutant

LINT, LEGALITY, INTERPRETER, TAP, LOGITS, TOKENS = STAGES = (
    *("lint", "legality", "interpreter", "tap", "logits", "tokens"),
)
_STAGE_OF_TAP = {"error": INTERPRETER, "greedy": TOKENS}
_LOGITS = ("logits", "last_logits", "tapped_logits", "perplexity", "comparable")


class GateError(ValueError):
    """The bundle that faults are made from does not pass itself."""


@dataclass(frozen=True)
class Outcome:
    """Which stage saw a mutant first, empty if none did, in which case of the suite, and what it said."""

    mutant: Mutant
    stage: str
    case: str = ""
    says: str = ""

    def to_dict(self) -> dict[str, str]:
        m = self.mutant
        fault = {"target": m.target, "graph": m.graph, "operator": m.operator, "kind": m.kind, "node": m.node}
        return fault | {"what": m.what, "caught_by": self.stage, "case": self.case, "says": self.says}


@dataclass(frozen=True)
class Gate:
    """The ordinary verification of one bundle.

    Attributes:
        plans: the cases of the default suite, quickest first, with the graphs that each one runs: on a mutant of one graph
            the other cases give what they give without it.
    """

    directory: Path
    reference: Remembered
    source: Source
    plans: tuple[tuple[Plan, frozenset[str]], ...]
    seed: int

    @classmethod
    def of(cls, directory: Path, reference: Path, seed: int = DEFAULT_SEED) -> Gate:
        """Runs the bundle as it is, which also computes the reference's answers.

        Raises:
            GateError: the bundle does not pass, or a graph of it is run by no case.
        """
        oracle = build_oracle(reference)
        remembered = Remembered.of(oracle)
        source = source_for(reference, oracle.config)
        found = inspect(directory, "interpreter")
        bundle = Bundle.load(directory)
        timed = []
        gate = cls(directory, remembered, source, (), seed)
        for plan in select(suite(oracle.config, found.limits)):
            if plan.impossible:
                continue
            bad, used, seconds = gate._judged(directory, plan)
            if bad is not None:
                raise GateError(f"{directory}: does not pass without a fault: case {plan.name}, {bad.says}")
            timed.append((seconds, plan, frozenset(used)))
        timed.sort(key=lambda t: t[0])
        unused = set(bundle.graphs) - {name for *_, used in timed for name in used}
        if unused:
            raise GateError(f"{directory}: no case of the suite runs {', '.join(sorted(unused))}")
        remembered.oracle = None
        plans = tuple((plan, used) for _, plan, used in timed)
        return cls(directory, remembered, source, plans, seed)

    def outcome(self, mutant: Mutant) -> Outcome:
        """What sees it first: the checks of the exporter, then the cases that run its graph."""
        refused = self._refused(mutant)
        if refused:
            return Outcome(mutant, *refused)
        with bundle_with(self.directory, mutant.graph, mutant.content) as directory:
            for plan, used in self.plans:
                if mutant.graph in used:
                    bad, *_ = self._judged(directory, plan)
                    if bad is not None:
                        stage = _STAGE_OF_TAP.get(bad.tap, LOGITS if bad.tap in _LOGITS else TAP)
                        return Outcome(mutant, stage, plan.name, f"{bad.tap} {bad.metric} {bad.value}")
        return Outcome(mutant, "")

    def _refused(self, mutant: Mutant) -> tuple[str, str, str] | None:
        """Stage, no case, message, where `export-mindir` would not have written the graph."""
        bundle = Bundle.load(self.directory)
        target, record = TARGETS[bundle.target], bundle.graphs[mutant.graph]
        model = pb.ModelProto.FromString(mutant.content)
        inputs = {port.name: (port.shape, port.dtype) for port in record.inputs}
        try:
            lint.check(
                mutant.graph, model, [port.name for port in record.caches], inputs, bool(target.runtime)
            )
        except ExportError as e:
            return LINT, "", str(e)
        try:
            if target.runtime:
                legality.check(mutant.graph, model, target.runtime, bundle.products)
        except ExportError as e:
            return LEGALITY, "", str(e)
        return None

    def _judged(self, directory: Path, plan: Plan) -> tuple[Finding | None, set[str], float]:
        """The first place that is wrong, the graphs that ran, and what it took."""
        candidate: Any = open_candidate(inspect(directory, "interpreter"))
        run = run_suite(self.reference, candidate, [plan], self.source, self.seed)
        bad = judge(run, load_profile("strict")).first_bad
        return bad, candidate.model.used, run["header"]["seconds"][plan.name]["candidate"]


@contextmanager
def bundle_with(directory: Path, graph: str, content: bytes) -> Iterator[Path]:
    """A copy of a bundle, by links, in which one graph is another, its size and hash as the manifest says."""
    with tempfile.TemporaryDirectory(prefix=".mutant-", dir=directory.parent) as temporary:
        new = Path(temporary)
        for file in directory.iterdir():
            os.link(file, new / file.name)
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        record = manifest["graphs"][graph]
        record |= {"nbytes": len(content), "hash": content_hash(content)}
        for name, data in ((record["file"], content), (MANIFEST, json.dumps(manifest).encode())):
            (new / name).unlink()
            (new / name).write_bytes(data)
        yield new


_gate: Gate | None = None


def work_on(gate: Gate) -> None:
    """Makes a process one that answers :func:`outcome` for a gate."""
    global _gate
    os.environ.setdefault("GLOG_v", "3")
    _gate = gate


def outcome(mutant: Mutant) -> Outcome:
    assert _gate is not None, "work_on was not called"
    return _gate.outcome(mutant)


def outcomes(gate: Gate, mutants: Sequence[Mutant], workers: int) -> Iterator[Outcome]:
    """Of all mutants, in their order, from so many processes."""
    if workers == 1:
        yield from map(gate.outcome, mutants)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, work_on, (gate,)) as pool:
        yield from pool.map(outcome, mutants, chunksize=4)
