"""Puts a fault into a candidate and holds that against the reference, with the code of `verify-parity` and its limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mutation_kit.remembered import Remembered

from kimi_vl.convert import convert
from kimi_vl.convert.errors import ConversionError
from kimi_vl.convert.manifest import content_hash
from kimi_vl.convert.transforms import DTYPES
from kimi_vl.export import export, mindir, plan_export, trace
from kimi_vl.export.bundle import MANIFEST
from kimi_vl.export.errors import ExportError
from kimi_vl.export.plan import open_converted
from kimi_vl.verify.bisect import first_bad
from kimi_vl.verify.candidates import CandidateError, inspect, open_candidate, require_same_model
from kimi_vl.verify.cases import DEFAULT_SEED, build, select, suite
from kimi_vl.verify.judge import Verdict, judge, suited
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.prompts import source_for
from kimi_vl.verify.runner import run_suite
from kimi_vl.verify.weights import compare

from .fault import REFUSED, Fault, layer_of
from .models import MODELS, Model


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the verdict on the run, or the message that refused it before one.

    `operator` is the first wrong one, "layer: point", as ``verify-parity bisect`` names it in the case of the first bad
    place; empty where that does not apply or shows none.
    """

    fault: Fault
    verdict: Verdict | None = None
    refused: str = ""
    operator: str = ""

    @property
    def caught(self) -> bool:
        return self.verdict is None or not self.verdict.passed

    @property
    def place(self) -> str:
        """The first bad place that was named; empty: none."""
        if self.verdict is None:
            return REFUSED
        bad = self.verdict.first_bad
        return bad.tap if bad else ""

    @property
    def right(self) -> bool:
        named = not self.fault.operator or self.operator == self.fault.operator
        return self.caught and layer_of(self.place) == layer_of(self.fault.place) and named


class Workshop:
    """Everything it makes lies in `room`; clean bundles and the reference's answers are kept for the next fault."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self._made: dict[tuple[Any, ...], Path] = {}
        self._references: dict[tuple[str, str], Remembered] = {}

    def clean(
        self,
        name: str,
        target: str = "ascend",
        through: str = "interpreter",
        arithmetic: str = "lifted",
        batch: int = 1,
        cases: tuple[str, ...] = (),
    ) -> Verdict:
        """The verdict on a candidate without a fault."""
        model = MODELS[name]
        return self._judged(model, self._bundle(model, target, batch), through, arithmetic, cases)

    def examine(self, fault: Fault) -> Outcome:
        """Makes the fault, runs the verification on it, and takes it away again."""
        try:
            with INJECT[fault.into](self, fault) as directory:
                model = MODELS[fault.model]
                try:
                    verdict = self._judged(model, directory, fault.through, fault.arithmetic, fault.cases)
                except CandidateError as e:
                    return Outcome(fault, refused=str(e).replace(str(directory), "the candidate"))
                return Outcome(fault, verdict, operator=self._operator(fault, model, directory, verdict))
        except (ConversionError, ExportError) as e:
            return Outcome(fault, refused=str(e))

    # ---- candidates ------------------------------------------------------------------------------------------------

    def _converted(self, model: Model) -> Path:
        def make(path: Path) -> None:
            convert(model.source(self.room), path)

        return self._kept(("converted", model.name), make)

    def _bundle(self, model: Model, target: str, batch: int) -> Path:
        def make(path: Path) -> None:
            _export(self._converted(model), path, model, target, batch)

        return self._kept((model.name, target, batch), make)

    def _kept(self, key: tuple[Any, ...], make: Callable[[Path], None]) -> Path:
        if key not in self._made:
            path = self.room / "-".join(map(str, key))
            make(path)
            self._made[key] = path
        return self._made[key]

    @contextmanager
    def fresh(self, name: str) -> Iterator[Path]:
        """A path for what one fault needs, removed after it."""
        path = self.room / f"faulty-{name}"
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def copied(self, fault: Fault) -> Iterator[Path]:
        """A bundle that may be changed."""
        bundle = self._bundle(MODELS[fault.model], fault.target, fault.batch)
        with self.fresh(fault.name) as path:
            yield Path(shutil.copytree(bundle, path))

    @contextmanager
    def exported(
        self, fault: Fault, converted: Path | None = None, around: AbstractContextManager[Any] | None = None
    ) -> Iterator[Path]:
        """A bundle of its own."""
        model = MODELS[fault.model]
        with self.fresh(fault.name) as path:
            with around or nullcontext():
                _export(converted or self._converted(model), path, model, fault.target, fault.batch)
            yield path

    def bundle_of(self, fault: Fault) -> Path:
        """The clean bundle; not to be changed."""
        return self._bundle(MODELS[fault.model], fault.target, fault.batch)

    # ---- verification ----------------------------------------------------------------------------------------------

    def _judged(
        self, model: Model, directory: Path, through: str, arithmetic: str, cases: tuple[str, ...]
    ) -> Verdict:
        source = model.source(self.room)
        found = inspect(directory, through, arithmetic)
        config = require_same_model(source, found)
        plans = select(suite(config, found.limits), cases)
        reference = self._reference(model, source)
        rounded = self._reference(model, source, found.rounded) if found.rounded else None
        inputs = source_for(source, config)
        candidate = open_candidate(found)
        link = run_suite(reference, candidate, plans, inputs, DEFAULT_SEED, rounded=rounded)
        link["weights"] = compare(source, directory, config)
        return judge(link, suited((), link["candidate"]))

    def _operator(self, fault: Fault, model: Model, directory: Path, verdict: Verdict) -> str:
        bad = verdict.first_bad
        if bad is None or bad.tap in ("inputs", "error") or fault.through != "interpreter":
            return ""
        source = model.source(self.room)
        reference, limits = self._reference(model, source), inspect(directory, fault.through).limits
        (plan,) = select(suite(reference.config, limits), (bad.case,))
        case = build(plan, source_for(source, reference.config), DEFAULT_SEED)
        try:
            found = first_bad(reference.oracle, directory, case)
        except ValueError as e:  # a graph of another form than it knows
            return f"not located ({e})"
        return f"{found.layer}: {found.point}" if found else ""

    def _reference(self, model: Model, source: Path, dtype: str = "float32") -> Remembered:
        key = model.name, dtype
        if key not in self._references:
            self._references[key] = Remembered.of(build_oracle(source, getattr(torch, dtype)))
        return self._references[key]


def _export(converted: Path, path: Path, model: Model, target: str, batch: int) -> None:
    export(plan_export(open_converted(converted), target=target, batch=batch, taps=True, **model.sizes), path)


# ---- how a fault gets in ------------------------------------------------------------------------------------------------


class Weights(MutableMapping[str, np.ndarray]):
    """A bundle's tensors: reading gives a copy, assigning writes it into its shard with the right hash."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        self._records = self._manifest["weights"]

    def __getitem__(self, name: str) -> np.ndarray:
        record = self._records[name]
        with open(self._directory / record["file"], "rb") as f:
            f.seek(record["offset"])
            content = f.read(record["nbytes"])
        return np.frombuffer(content, DTYPES[record["dtype"]]).reshape(record["shape"]).copy()

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        record = self._records[name]
        content = np.ascontiguousarray(value, DTYPES[record["dtype"]]).tobytes()
        if len(content) != record["nbytes"]:
            raise ValueError(f"{name}: {len(content)} bytes, expected {record['nbytes']}")
        with open(self._directory / record["file"], "r+b") as f:
            f.seek(record["offset"])
            f.write(content)
        record["hash"] = content_hash(content)
        (self._directory / MANIFEST).write_text(json.dumps(self._manifest), encoding="utf-8")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a bundle keeps its tensors")

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def _rehashed(directory: Path) -> None:
    """Sizes and hashes of graphs and small files as they are now."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for file, record in [(g["file"], g) for g in manifest["graphs"].values()] + [*manifest["files"].items()]:
        content = (directory / file).read_bytes()
        record |= {"nbytes": len(content), "hash": content_hash(content)}
    path.write_text(json.dumps(manifest), encoding="utf-8")


@contextmanager
def _into_weights(shop: Workshop, fault: Fault) -> Iterator[Path]:
    with shop.copied(fault) as directory:
        fault.change(Weights(directory))
        yield directory


@contextmanager
def _into_conversion(shop: Workshop, fault: Fault) -> Iterator[Path]:
    """The model's fp32 master is converted."""
    model = MODELS[fault.model]
    with shop.fresh(f"{fault.name}-converted") as converted:
        with fault.change():
            convert(model.master, converted, dtype="bf16")
        with shop.exported(fault, converted) as directory:
            yield directory


@contextmanager
def _into_network(shop: Workshop, fault: Fault) -> Iterator[Path]:
    class Tracer(trace.Tracer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            fault.change(self)

    with shop.exported(fault, around=mock.patch.object(trace, "Tracer", Tracer)) as directory:
        yield directory


@contextmanager
def _into_graph(shop: Workshop, fault: Fault) -> Iterator[Path]:
    with shop.copied(fault) as directory:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for name, record in manifest["graphs"].items():
            model = mindir.read(directory / record["file"])
            fault.change(model, name)
            (directory / record["file"]).write_bytes(mindir.serialise(model))
        _rehashed(directory)
        yield directory


@contextmanager
def _into_host(shop: Workshop, fault: Fault) -> Iterator[Path]:
    directory = shop.bundle_of(fault)
    with fault.change():
        yield directory


@contextmanager
def _into_files(shop: Workshop, fault: Fault) -> Iterator[Path]:
    with shop.copied(fault) as directory:
        fault.change(directory)
        _rehashed(directory)
        yield directory


INJECT: dict[str, Callable[[Workshop, Fault], AbstractContextManager[Path]]] = {
    "weights": _into_weights,
    "conversion": _into_conversion,
    "network": _into_network,
    "graph": _into_graph,
    "host": _into_host,
    "files": _into_files,
}
