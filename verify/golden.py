"""Records a golden pack: the graph calls of a few cases of the suite, and what the Torch reference answers to each.

The engine that feeds a bundle feeds a recorder here, so a pack holds exactly the calls that the product makes: which
graph, its inputs, which sequence each row extends. Pictures reach the text graphs as the reference's own features, and so
every graph is judged alone. A bundle that does not compute what the reference does, apart from rounding, gets no pack: it
is interpreted first, with arithmetic in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import __version__
from ..export.bundle import MANIFEST, Bundle, GraphRecord
from ..export.device import device_play
from ..export.device.device_pack import Pack, file_hash, write_pack
from ..export.load import BundleGraphs, rows_together
from ..export.plan import CPU_OPERATORS
from ..export.weights import SharedWeights, check_files
from ..modeling.cache import LatentCache
from ..modeling.configuration import ModelConfig
from ..modeling.engine import Engine, Row
from ..modeling.forward import KimiVLForward
from ..modeling.kernels import library
from .cases import SUITE_VERSION, Case, Plan, Source, build
from .golden_answers import PackArrays, columns, expected_answers
from .golden_limits import exact_limits, rounding_limits
from .interpreted import InterpretedGraph
from .mindir import Noise
from .mindir.interpreter import Arithmetic
from .oracle import Oracle
from .runs import file_hashes

CASES = ("text", "image", "chunks", "bucket", "batch", "steps")
LOW = ("bfloat16", "float16")
NOISY = 2  # runs with noise, beside the one that is only rounded


class GoldenError(ValueError):
    """The bundle itself does not compute what the reference does; the message says where."""


def record(
    oracle: Oracle,
    reference: Path,
    directory: Path,
    plans: Sequence[Plan],
    source: Source,
    seed: int,
    path: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> Pack:
    """Writes the pack of these cases for the bundle in `directory`.

    Raises:
        GoldenError: the bundle, interpreted, is not within the strict limits of the reference, or cannot be played.
        BundleError, PackError: the bundle is damaged; the pack is too large.
    """
    bundle = Bundle.load(directory)
    if bundle.kernels == CPU_OPERATORS:
        raise GoldenError(
            f"{directory}: its graphs call the library of CPU operators, which what plays a pack does not have; export with "
            f"{library.SWITCH}=off"
        )
    check_files(directory, bundle, verify=True)
    weights = SharedWeights(directory, bundle, verify=True)
    arrays = PackArrays()
    index = _index(oracle.config, reference, directory, bundle)
    index["suite"] = {"version": SUITE_VERSION, "seed": seed, "inputs": source.kind}
    low = next(iter(bundle.graphs.values())).outputs[0].dtype in LOW
    for plan in plans:
        progress(f"{plan.name}: the reference")
        case = _recorded(oracle, directory, bundle, build(plan, source, seed), arrays, index, low)
        index["cases"].append(case)
        pack = Pack(index | {"digest": ""}, arrays.members)
        progress(f"{plan.name}: the bundle, arithmetic in fp32")
        lifted = _interpreted(pack, case, directory, bundle, weights, "lifted")
        case["ties"], case["limits"] = exact_limits(pack, case)
        _require_exact(case, device_play.figures(pack, case, *lifted))
        if low:
            progress(f"{plan.name}: the bundle, rounded at every operator, and with noise after it")
            runs = [
                _interpreted(pack, case, directory, bundle, weights, "rounded", noise)
                for noise in (None, *map(Noise, range(NOISY)))
            ]
            rounded, *noisy = (device_play.figures(pack, case, *run) for run in runs)
            case["ties"], case["limits"] = rounding_limits(rounded, noisy, case["limits"])
    return write_pack(path, index, arrays.members)


def _index(config: ModelConfig, reference: Path, directory: Path, bundle: Bundle) -> dict[str, Any]:
    text, vision = config.text, config.vision
    rng = np.random.default_rng(0)
    names = sorted([*bundle.shards, *bundle.files, *(g.file for g in bundle.graphs.values())])
    block = vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
    return {
        "made_by": __version__,
        "bundle": {
            "manifest": file_hash(directory / MANIFEST),
            "files": {name: file_hash(directory / name) for name in names},
        },
        "reference": {
            "class": "transformers Kimi_K25ForConditionalGeneration, fp32",
            "files": {name: found["sha256"] for name, found in file_hashes(reference).items()},
        },
        "target": bundle.target,
        "taps": bundle.taps,
        "contexts": list(bundle.contexts),
        "layers": text.num_hidden_layers,
        "width": text.latent_dim,
        "columns": columns(text.hidden_size, rng),
        "vision_columns": columns(vision.hidden_size * block, rng),
        "logit_columns": columns(text.vocab_size, rng),
        "cases": [],
    }


# ---- the calls ------------------------------------------------------------------------------------------------------


class _Recorder(KimiVLForward):
    """Runs an engine whose graphs only write down what they are asked.

    Attributes:
        calls: see ``device_play``.
        features: of all pictures of the case [M, H], which the vision graphs seem to give.
    """

    def __init__(self, config: ModelConfig, directory: Path, bundle: Bundle, arrays: PackArrays) -> None:
        def load(directory: Path, name: str, bundle: Bundle, weights: SharedWeights) -> _Written:
            return _Written(name, bundle.graphs[name], self)

        self.bundle = bundle
        self.arrays = arrays
        self.calls: list[dict[str, Any]] = []
        self.features = np.zeros((0, 0), np.float32)
        self.offsets: list[int] = []
        self._image = 0
        self._rows: dict[int, int] = {}
        self._lengths: list[int] = []
        self._ends: list[int] = []
        # no weights: nothing runs; rows are held as by the target's own loader
        self.engine = Engine(
            config, BundleGraphs(directory, bundle, cast(Any, None), load, rows_together(bundle))
        )

    def start(self, features: np.ndarray | None, offsets: list[int]) -> LatentCache:
        """Begins another list of calls, on an empty cache; `offsets` are the numbers of each sequence's first token."""
        self.calls, self.offsets, self._image = [], offsets, 0
        if features is not None:
            self.features = features
        self._cache = self.engine.new_cache(len(offsets))
        self._lengths = [0] * len(offsets)
        return self._cache

    def extend(self, cache: LatentCache, rows: Sequence[Row], all_logits: bool) -> None:
        self._rows = {id(row): b for b, row in enumerate(cache.rows)}
        self._lengths = cache.lengths.tolist()
        self._ends = [n + len(row.ids) for n, row in zip(self._lengths, rows)]
        self._cache = cache
        self.engine.extend(cache, rows, all_logits=all_logits)
        self._settle()

    def _settle(self) -> None:
        """Writes down what the last call added to each row: the engine says so by the rows' lengths, after the call."""
        before, self._lengths = self._lengths, self._cache.lengths.tolist()
        call = self.calls[-1] if self.calls else {}
        if "rows" not in call or "count" in call:
            return
        call |= {"count": [], "tokens": [], "gives": []}
        for i, b in enumerate(call["rows"]):
            new = 0 if b is None else self._lengths[b] - before[b]
            call["count"].append(new)
            if new:
                first = self.offsets[b] + before[b]
                call["tokens"] += [[first + t, i, t] for t in range(new)]
                call["gives"] += [[b, i]] if self._lengths[b] == self._ends[b] else []

    def write(
        self, name: str, record: GraphRecord, inputs: dict[str, np.ndarray], rows: Sequence[Any]
    ) -> np.ndarray:
        self._settle()
        call: dict[str, Any] = {
            "graph": name,
            "taps_graph": self._with_taps(name, record),
            "kind": record.kind,
            "inputs": {port: self.arrays.add_unless_zero(array) for port, array in inputs.items()},
        }
        self.calls.append(call)
        shape = record.outputs[0].shape
        if not rows:
            patches, block = int(inputs["valid"][0]), (record.patches or 0) // shape[0]
            count = patches // block
            call["image"] = [self._image, count]
            out = np.zeros(shape, np.float32)
            out[:count] = self.features[self._image : self._image + count]
            self._image += count
            return out
        call["rows"] = [self._rows.get(id(row)) for row in rows]
        return np.broadcast_to(np.float32(0), shape)

    def _with_taps(self, name: str, record: GraphRecord) -> str | None:
        same = ("kind", "patches", "tokens", "context")
        for other, found in self.bundle.graphs.items():
            if found.taps and all(getattr(found, k) == getattr(record, k) for k in same):
                return other
        return None


class _Written:
    """A graph of a bundle that writes its calls down."""

    def __init__(self, name: str, record: GraphRecord, recorder: _Recorder) -> None:
        self.name, self.record, self.recorder = name, record, recorder

    def run(self, inputs: dict[str, np.ndarray], rows: Sequence[Any] = ()) -> list[np.ndarray]:
        return [self.recorder.write(self.name, self.record, inputs, rows)]


def _recorded(
    oracle: Oracle,
    directory: Path,
    bundle: Bundle,
    case: Case,
    arrays: PackArrays,
    index: dict[str, Any],
    low: bool,
) -> dict[str, Any]:
    """A case of the pack, without limits."""
    taps = oracle.run(case.inputs)
    mask = case.inputs["attention_mask"].astype(bool)
    offsets = np.cumsum([0, *mask.sum(1)[:-1]]).tolist()
    recorder = _Recorder(oracle.config, directory, bundle, arrays)
    cache = recorder.start(taps.get("projector_out"), offsets)
    at = 0
    for n in case.calls:
        prompt = _prompt(recorder, case, at, n, cache)
        recorder.extend(cache, prompt, all_logits=True)
        at += n
    calls = recorder.calls
    expected, sampled, places = expected_answers(taps, mask, calls, arrays, index, bundle.taps, low)
    return {
        "name": case.name,
        "what": case.what,
        "rows": len(mask),
        "tokens": int(mask.sum()),
        "calls": calls,
        "sampled": sampled,
        "places": places,
        "expected": expected,
        "greedy": _greedy(oracle, recorder, case, taps.get("projector_out"), offsets),
        "ties": {"router": 0.0, "logits": 0.0},
        "limits": {},
    }


def _prompt(recorder: _Recorder, case: Case, at: int, n: int, cache: LatentCache | None) -> list[Row]:
    pictures: dict[str, Any] = {
        k: case.inputs[k] for k in ("pixel_values", "image_grid_hws") if at == 0 and k in case.inputs
    }
    ids, mask = case.inputs["input_ids"][:, at : at + n], case.inputs["attention_mask"][:, : at + n]
    return recorder.prepare(ids, mask, cache=cache, **pictures).rows


def _greedy(
    oracle: Oracle, recorder: _Recorder, case: Case, features: np.ndarray | None, offsets: list[int]
) -> dict[str, Any] | None:
    """The calls of `generate`, each new token to be fed back by whoever plays them."""
    if not case.new_tokens:
        return None
    found = oracle.greedy(case.inputs, case.new_tokens)
    cache = recorder.start(features, offsets)
    rows = _prompt(recorder, case, 0, case.inputs["input_ids"].shape[1], cache)
    recorder.calls.clear()  # the pictures are judged with the forward calls
    recorder.extend(cache, rows, all_logits=False)
    for call in recorder.calls:
        call["feeds"] = []
    for _ in range(case.new_tokens - 1):
        before = len(recorder.calls)
        placeholder = np.zeros(1, np.int64)  # the token that the call before gave
        recorder.extend(cache, [Row(placeholder)] * len(offsets), all_logits=False)
        for call in recorder.calls[before:]:
            call["feeds"] = [[b, i] for i, b in enumerate(call["rows"]) if call["count"][i]]
    for call in recorder.calls:
        del call["tokens"], call["taps_graph"]
    arrays = recorder.arrays
    return {
        "calls": recorder.calls,
        "tokens": arrays.add(found.tokens.astype(np.int32)),
        "seconds": arrays.add(found.seconds.astype(np.int32)),
        "margins": arrays.add(found.margins.astype(np.float32)),
    }


# ---- the bundle itself ----------------------------------------------------------------------------------------------

Observed = tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray | None]
"""Without taps, with taps, greedy tokens."""


def _interpreted(
    pack: Pack,
    case: dict[str, Any],
    directory: Path,
    bundle: Bundle,
    weights: SharedWeights,
    arithmetic: Arithmetic,
    noise: Noise | None = None,
) -> Observed:
    """What the bundle's graphs give when they are interpreted."""
    graphs: dict[str, InterpretedGraph] = {}

    def run(name: str, inputs: dict[str, np.ndarray], rows: list[Any]) -> list[np.ndarray]:
        if name not in graphs:
            graphs[name] = InterpretedGraph(directory, name, bundle, weights, arithmetic, noise)
        return graphs[name].run(inputs, rows)

    return observe(pack, case, run, lambda name: ports(bundle, name))


def observe(pack: Pack, case: dict[str, Any], run: Any, ports: Any) -> Observed:
    """A case played whole: without taps, with taps where the bundle has them, and its greedy tokens."""
    plain = device_play.play(pack, case, run, ports)
    tapped = device_play.play(pack, case, run, ports, taps=True) if pack.index["taps"] else {}
    tokens = device_play.play_greedy(pack, case, run, ports) if case["greedy"] else None
    return plain, tapped, tokens


def ports(bundle: Bundle, name: str) -> list[dict[str, Any]]:
    """A graph's inputs, as ``device_play`` takes them."""
    return [{"name": p.name, "shape": p.shape, "dtype": p.dtype} for p in bundle.graphs[name].inputs]


def _require_exact(case: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    for finding in device_play.judge(case, found):
        if not finding["ok"]:
            raise GoldenError(
                f"case {case['name']}, {finding['tap']}: {finding['metric']} of the interpreted bundle is "
                f"{finding['value']:.2g}, expected at most {finding['limit']:.2g} with arithmetic in fp32; no pack is made "
                "of a bundle that is wrong itself, see verify-parity --candidate"
            )
