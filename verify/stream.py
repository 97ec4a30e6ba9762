"""A run layer by layer: reference and candidate side by side, both with one decoder layer in memory.

Every case goes through a layer before the next one is read. The candidate's layer runs twice: on what its own layers gave
so far (`layers.N`), and on the reference's output of the layer before (`forced.N`), by which a single wrong layer is named
although all that follow it are wrong too. Between layers only hidden states and figures are kept, see `stream_state`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.kernels import library
from .candidates import CandidateError, mindspore_on
from .cases import SUITE_VERSION, Case, Plan, Source, build, fitted, inputs_hash, select, suite
from .chain import ChainLink, source_of
from .comparison import Comparison, raised
from .judge import Profile, ProfileError
from .own_inputs import OwnInputs
from .runner import LONGEST_COVER, case_record
from .runs import assembled, environment, file_hashes
from .stream_state import Arrays, StreamState

CHUNK = 64  # tokens of a prefill graph: all experts run on each, padding too
KEPT = ("reference", "candidate", "comparable", "settled")  # arrays of a case


def streamed(
    links: Sequence[ChainLink], profiles: Sequence[Profile], names: Sequence[str], own: Sequence[Plan] = ()
) -> ChainLink:
    """The only one of `links`, with graphs and cases as they are layer by layer.

    No tokens are generated, and the case that looks for every expert has its greatest length at once.

    Raises:
        CandidateError: there are several, or it cannot run layer by layer.
        ProfileError: a profile needs what such a run does not measure.
        CaseError: there is no case of a name.
    """
    if len(links) > 1:
        raise CandidateError(
            f"--stream: there are {len(links)} candidates, but one at a time runs layer by layer"
        )
    (link,) = links
    found = link.found
    if found.kind != "converted directory":
        advice = {
            "bundle": "give the converted directory that it was exported from",
            "published directory": "convert it with convert-weights and give the result",
        }
        raise CandidateError(
            f"--stream: {link.path} is a {found.kind}, but only a converted directory runs layer by layer; "
            + advice[found.kind]
        )
    for profile in profiles:
        if any(gate.times_own for gate in profile.gates):
            raise ProfileError(
                f"--profile: {profile.name} judges by what rounding costs the reference, which --stream does not "
                "measure; give strict, or one like it"
            )
    found = replace(found, limits=replace(found.limits, chunk=min(CHUNK, found.limits.chunk)))
    longest = min(LONGEST_COVER, found.limits.context, found.config.text.max_position_embeddings)
    plans = []
    for plan in select([*suite(found.config, found.limits), *own], names):
        if plan.name == "long-greedy" and not plan.impossible:
            plan = replace(plan, impossible="layer by layer no tokens are generated")
        if plan.name == "experts":
            plan = replace(plan, rows=(replace(plan.rows[0], tokens=longest),))
        plans.append(replace(plan, new_tokens=0))
    return replace(link, found=found, plans=plans)


def run_stream(
    reference: Path,
    link: ChainLink,
    seed: int,
    report: Path,
    say: Callable[[str], None],
    own: OwnInputs | None = None,
) -> tuple[dict[str, Any], StreamState]:
    """As :func:`verify.chain.run_chain` of one link, see :func:`streamed`. Remove the state when the run is saved."""
    from .weights import compare

    started = time.time()
    stream = Stream(reference, link, source_of(reference, link.found.config, own), seed, report, say)
    result = stream.run()
    say("comparing weights, and hashing what was compared")
    result["weights"] = compare(reference, link.found.path, link.found.config)
    result["candidate"]["files"] = file_hashes(link.found.path)
    if own:
        result["suite"]["inputs_dir"] = own.files
    return assembled(started, environment(), file_hashes(reference), [result]), stream.state


class Stream:
    """A run of a link; see :func:`verify.runner.run_suite` for what it gives.

    Args:
        reference: the published checkpoint.
        link: see :func:`streamed`.
        report: where the state is kept, until it is removed.

    Raises:
        OracleError, ConversionError, CaseError: the checkpoints or the cases cannot be taken.
    """

    def __init__(
        self,
        reference: Path,
        link: ChainLink,
        source: Source,
        seed: int,
        report: Path,
        say: Callable[[str], None],
    ) -> None:
        from ..convert.source import open_weights
        from ..modeling.parts import NetworkInParts
        from .parts_oracle import OracleInParts

        limits, config = link.found.limits, link.found.config
        self._oracle = OracleInParts(reference)
        self._parts = NetworkInParts(
            open_weights(link.found.path), limits.context, limits.chunk, limits.patches
        )
        self._link, self._say = link, say
        plans = [fitted(plan, source, seed, config, limits) for plan in link.plans]
        self._cases = [_Turn(build(plan, source, seed)) for plan in plans if not plan.impossible]
        skipped = [{"name": p.name, "what": p.what, "why": p.impossible} for p in plans if p.impossible]
        self._suite = {"version": SUITE_VERSION, "seed": seed, "inputs": source.kind, "skipped": skipped}
        text = config.text
        self._used = {n: set[int]() for n in text.moe_layers}
        names = (f"decoder layer {n}" for n in range(text.num_hidden_layers))
        self._steps = ["pictures and embeddings", *names, "head"]
        self.state = StreamState(
            report,
            {
                "cases": {turn.case.name: inputs_hash(turn.case.inputs) for turn in self._cases},
                "sizes of graphs": [limits.context, limits.chunk],
                "files of the reference": _files(reference),
                "files of the candidate": _files(link.found.path),
                "package versions": environment(),
            },
        )

    def run(self) -> dict[str, Any]:
        """Goes on after the last step that the state has.

        Raises:
            StreamStateError: the state is another run's.
        """
        done = self._resume()
        with library.exactly(True):
            for step in range(done, len(self._steps)):
                self._say(f"[{step + 1}/{len(self._steps)}] {self._steps[step]}")
                self._step(step)
                self._save(step)
        experts = self._oracle.config.text.n_routed_experts
        layers = [{"layer": n, "used": len(of), "of": experts} for n, of in self._used.items()]
        return {
            "header": {"seconds": {turn.case.name: turn.rounded_seconds() for turn in self._cases}},
            "candidate": self._describe(),
            "suite": self._suite | {"experts": layers},
            "cases": [turn.record() for turn in self._cases],
        }

    def _describe(self) -> dict[str, Any]:
        return {
            "kind": self._link.found.kind,
            "stage": self._link.found.stage,
            "path": self._link.path,
            "runs_on": mindspore_on("CPU", library.available()),
            "on_device": False,
            "dtype": self._parts.config.dtype,
            "context": self._link.found.limits.context,
            "prefill_chunk": self._link.found.limits.chunk,
            "taps": True,
            "streamed": True,
        }

    # Steps -------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        if step == 0:
            self._embed()
        elif step < len(self._steps) - 1:
            self._layer(step - 1)
        else:
            self._head()

    def _going(self) -> list[_Turn]:
        return [turn for turn in self._cases if turn.error is None]

    def _embed(self) -> None:
        taps = {}
        with self._oracle.vision() as embed:
            for turn in self._going():
                with turn.reference_runs():
                    taps[turn.case.name] = embed(turn.case.inputs)
        self._parts.hold_vision()
        for turn in self._going():
            given, inputs = taps[turn.case.name], turn.case.inputs
            turn.reference = given["inputs_embeds"]
            with turn.candidate_runs():
                features = None
                if "pixel_values" in inputs:
                    tower, features = self._parts.vision(inputs["pixel_values"], inputs["image_grid_hws"])
                    turn.compared.pictures("vision_out", given["vision_out"], tower)
                    turn.compared.pictures("projector_out", given["projector_out"], features)
                turn.candidate = self._parts.embed(inputs["input_ids"], turn.compared.mask, features)
                turn.compared.embeddings(given["inputs_embeds"], turn.candidate)
        self._parts.release()

    def _layer(self, n: int) -> None:
        given = {}
        with self._oracle.layer(n) as layer:
            for turn in self._going():
                with turn.reference_runs():
                    after, taps = given[turn.case.name] = layer(turn.case.inputs, turn.reference)
                for chosen in taps.get("router_topk_indices", ()):
                    self._used[n].update(np.unique(chosen[chosen >= 0]).tolist())
        self._parts.hold_layer(n)
        for turn in self._going():
            after, taps = given[turn.case.name]
            with turn.candidate_runs():
                self._compare_layer(n, turn, taps)
            turn.reference = after
        self._parts.release()

    def _compare_layer(self, n: int, turn: _Turn, taps: dict[str, np.ndarray]) -> None:
        """The candidate's layer on the reference's input and on its own."""
        mask, calls = turn.compared.mask, turn.case.calls
        forced, forced_experts = self._parts.layer(turn.reference, mask, calls)
        turn.candidate, experts = self._parts.layer(turn.candidate, mask, calls)
        choices = None
        if experts is not None and forced_experts is not None:
            chosen, gap = taps["router_topk_indices"][0], taps["router_gap"][0]
            turn.compared.router(n, chosen, experts, gap)
            choices = chosen, forced_experts, gap
        turn.compared.forced(n, taps["hidden_states"][0], forced, choices)
        turn.compared.layer(n, taps["hidden_states"][0], turn.candidate)

    def _head(self) -> None:
        with self._oracle.head() as head:
            self._parts.hold_head()
            for turn in self._going():
                case = turn.case
                with turn.reference_runs():
                    logits = head(case.inputs, turn.reference)
                with turn.candidate_runs():
                    theirs = self._parts.head(turn.candidate, turn.compared.mask, case.calls)
                    turn.compared.logits(logits, theirs)
                    if case.scored:
                        turn.compared.perplexity(logits, theirs, case.inputs["input_ids"])
                    turn.compared.left_out()
            self._parts.release()

    # State -------------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        arrays: Arrays = {}
        for turn in self._going():
            of_case = (turn.reference, turn.candidate, turn.compared.comparable, turn.compared.settled)
            arrays |= {f"{turn.case.name}.{name}": array for name, array in zip(KEPT, of_case)}
        record = {
            "steps": step + 1,
            "experts": {str(n): sorted(used) for n, used in self._used.items()},
            "cases": {
                turn.case.name: {
                    "taps": turn.compared.taps,
                    "error": turn.error,
                    "seconds": turn.seconds,
                }
                for turn in self._cases
            },
        }
        self.state.save(step, record, arrays)

    def _resume(self) -> int:
        """How many steps the state has, which is then this run's."""
        found = self.state.load(self._say)
        if found is None:
            return 0
        record, arrays = found
        for turn in self._cases:
            of_case = record["cases"][turn.case.name]
            turn.compared.taps, turn.error = of_case["taps"], of_case["error"]
            turn.seconds = of_case["seconds"]
            if turn.error is None:
                turn.reference, turn.candidate, turn.compared.comparable, turn.compared.settled = (
                    arrays[f"{turn.case.name}.{name}"] for name in KEPT
                )
        self._used = {int(n): set(used) for n, used in record["experts"].items()}
        self._say(f"going on after {self._steps[record['steps'] - 1]}, which an earlier run finished")
        return int(record["steps"])


class _Turn:
    """A case on its way: both sides' hidden states `[B, S, H]` and what is known so far."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.compared = Comparison(case.inputs["attention_mask"])
        self.reference = self.candidate = np.empty(0, np.float32)
        self.error: str | None = None
        self.seconds = {"reference": 0.0, "candidate": 0.0}

    @contextmanager
    def reference_runs(self) -> Iterator[None]:
        with self._timed("reference"):
            yield

    @contextmanager
    def candidate_runs(self) -> Iterator[None]:
        """What the candidate raises is the case's error, and its end."""
        with self._timed("candidate"):
            try:
                yield
            except MemoryError:
                raise
            except Exception as e:
                self.error = raised(e)

    @contextmanager
    def _timed(self, side: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[side] += time.perf_counter() - started

    def rounded_seconds(self) -> dict[str, float]:
        return {side: round(seconds, 3) for side, seconds in self.seconds.items()}

    def record(self) -> dict[str, Any]:
        return case_record(self.case) | {"taps": self.compared.taps, "error": self.error}


def _files(directory: Path) -> dict[str, list[int]]:
    """Size and time of change of the configuration and the weights: nothing else is read from them to know a run again."""
    kinds = (".json", ".safetensors", ".ckpt")
    paths = sorted(path for path in directory.iterdir() if path.suffix in kinds)
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
