"""``bundle.json``: what a bundle holds.

It has no times and no paths of a machine in it: the same weights, exported by the same version with the same arguments,
give the same bytes. Hashes are BLAKE3 in hexadecimal.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..convert.dual_format import ALIGNMENT
from ..convert.manifest import FileRecord, ShardRecord, plain_name
from ..convert.transforms import DTYPES
from .errors import BundleError

MANIFEST = "bundle.json"
FORMAT = "kimi_vl-mindir"
SCHEMA = 1


@dataclass(frozen=True)
class Port:
    """An input, an output or a cache parameter of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class GraphRecord:
    """One static graph.

    Attributes:
        kind: "vision"; "prefill" (gives the logits of each row's token number `last`), "prefill-logits" (of all
            tokens) or "decode" (one token).
        patches: of a vision graph; `tokens` per row and `context` (cache slots) of the others.
        taps: it has more outputs than another graph that is the same otherwise.
        caches: parameters that the graph writes in place, layer by layer and row by row; zeros before the first use.
        external_data: its other parameters find their data in the shards by themselves; if not, whoever loads the
            graph sets each one from `weights`.
        live_bytes: of the tensors that it has in memory at most, inputs and outputs included; see ``liveness``.
    """

    file: str
    nbytes: int
    hash: str
    kind: str
    patches: int | None
    tokens: int | None
    context: int | None
    taps: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    caches: tuple[Port, ...]
    external_data: bool
    live_bytes: int = 0


@dataclass(frozen=True)
class WeightRecord:
    """A parameter's data: its place (`offset` from the start of the file, a multiple of 64) and its content."""

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    hash: str


@dataclass(frozen=True)
class Bundle:
    """See the module.

    Attributes:
        version: of this program.
        mindspore: which wrote the graphs; `mind_ir` is the format's version.
        target: where the graphs run.
        dtype: what the model's weights are rounded to.
        parameter_dtype: what the loader widens weights to; None where each parameter is what is stored.
        batch: rows of every text graph.
        contexts: cache lengths, ascending; `patches` likewise of pictures.
        prefill_chunk: tokens per row of the largest prefill graphs.
        taps: whether there are graphs with taps.
        weights: by the name of the parameter.
        files: configuration, tokenizer and processor files, and what judges the bundle on a device.
        attention, experts: which operators were chosen, "fused" or "plain", where the target has both.
        products: of Atlas that every graph was found legal on.
        releases: of MindSpore whose front end takes the graphs, and the CANN that belongs to each.
        cache_write: which operator writes into the caches, where the target has several.
        kernels: the module of ``modeling.kernels`` that the graphs were traced with; "cpu" needs the library of operators.
    """

    version: str
    mindspore: str
    mind_ir: int
    target: str
    dtype: str
    parameter_dtype: str | None
    batch: int
    contexts: tuple[int, ...]
    prefill_chunk: int
    patches: tuple[int, ...]
    taps: bool
    graphs: dict[str, GraphRecord]
    weights: dict[str, WeightRecord]
    shards: dict[str, ShardRecord]
    files: dict[str, FileRecord]
    attention: str | None = None
    experts: str | None = None
    products: tuple[str, ...] = ()
    releases: dict[str, str] = field(default_factory=dict)
    cache_write: str | None = None
    kernels: str | None = None

    @property
    def smaller_chunks(self) -> tuple[int, ...]:
        """Tokens per row of the other prefill graphs, ascending.

        The graphs' own records say so: a second list could contradict them, and bundles of one chunk size stay as they
        were, for the programs that read no others too.
        """
        sizes = {g.tokens for g in self.graphs.values() if g.kind == "prefill" and g.tokens}
        return tuple(sorted(n for n in sizes if n < self.prefill_chunk))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Bundle:
        """The manifest of a bundle, checked in itself.

        Raises:
            BundleError: there is none, or it is damaged or of a newer version.
        """
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{directory}: has no {MANIFEST}; export-mindir makes bundles") from None
        except (ValueError, RecursionError) as e:
            raise BundleError(f"{path}: is not valid JSON ({e}); export again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise BundleError(f"{path}: is no manifest of a bundle (format {FORMAT!r}); export again")
        schema = raw.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            raise BundleError(
                f"{path}: has schema {schema!r}, this version reads {SCHEMA}; "
                + ("update kimi_vl" if newer else "export again")
            )
        try:
            bundle = decode(cls, {k: v for k, v in raw.items() if k not in ("format", "schema")}, "")
            bundle.check()
        except TypeError as e:
            raise BundleError(f"{path}: {e}; export again") from None
        return bundle

    def check(self) -> None:
        """Raises TypeError: records contradict each other, or name files outside the bundle."""
        names = [*self.shards, *self.files, *(g.file for g in self.graphs.values())]
        for name in names:
            if not plain_name(name):
                raise TypeError(f"{name!r} is no plain file name")
        if len(set(names)) != len(names):
            raise TypeError("two of its files have one name")
        for name, w in self.weights.items():
            if w.file not in self.shards:
                raise TypeError(f"weights.{name} is in {w.file!r}, which is no shard")
            if w.dtype not in DTYPES or w.nbytes != math.prod(w.shape) * DTYPES[w.dtype].itemsize:
                raise TypeError(
                    f"weights.{name} has {w.nbytes} bytes, which is not {w.dtype} of shape {list(w.shape)}"
                )
            if w.offset % ALIGNMENT or w.offset + w.nbytes > self.shards[w.file].nbytes:
                raise TypeError(
                    f"weights.{name} is at offset {w.offset}, expected a multiple of {ALIGNMENT} in the file"
                )


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`: a dataclass, int, str, bool, a union with None, or tuples and dicts of these.

    Raises:
        TypeError: it is something else; the message begins with `where`.
    """
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{where or 'it'} is {type(value).__name__}, expected an object")
        hints = typing.get_type_hints(kind)
        for known in fields(kind):
            optional = known.default is not MISSING or known.default_factory is not MISSING
            if known.name not in value and not optional:
                raise TypeError(f"{_join(where, known.name)} is missing")
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise TypeError(f"{_join(where, unknown[0])} is unknown")
        return kind(**{k: decode(hints[k], v, _join(where, k)) for k, v in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: decode(arguments[1], v, _join(where, k)) for k, v in value.items()}
    if origin is None and type(value) is kind and not (kind is int and value < 0):
        return value
    raise TypeError(f"{where} is {value!r}, expected {getattr(kind, '__name__', kind)}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
