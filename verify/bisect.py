"""The first operator of a candidate that is wrong: each stage is fed with the candidate's own input and compared point by
point with the Torch reference, which is given the same input.

So a stage is judged by what itself adds, and what is wrong before it has no part in it. A point is bad if it is farther from
the reference in float64 than `TIMES` what the reference in fp32 is, and than `FLOOR`; points of a stage follow the data, so
the first bad one is where the wrong values come from.

Graphs run in the interpreter: what is judged is the graph, its weights, the configuration and the host's code, and not the
kernels that a device or MindSpore has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from .cases import Case
from .expected import Expected, Values
from .interpreted import InterpretedModel
from .metrics import ROUTING_TIE
from .oracle import Oracle
from .places import Place
from .points import Point, Stage, stages
from .watching import HIDDEN, Held, Seen, Watching

FLOOR, TIMES = 1e-6, 8.0
ROUTED = ("router_choice", "router_weights", "experts", "moe", "output")  # what a tie of the router decides
MEMORY = 1 << 30  # bytes of values that are kept at once, about


@dataclass(frozen=True)
class Compared:
    """A point in one graph call. `distance` is relative L2 over the valid places, of a mask or a choice the share of wrong ones;
    None where the graph does not show the point. `row` and `token` are where it is farthest, of a picture its number and the
    patch."""

    point: str
    what: str
    distance: float | None
    limit: float
    row: int = 0
    token: int = 0

    @property
    def bad(self) -> bool:
        return self.distance is not None and not self.distance <= self.limit


@dataclass(frozen=True)
class BadPoint:
    """The first bad point.

    Attributes:
        layer: its stage, `where` in words: `vision`, `blocks.N`, `projector`, `embedding`, `layers.N` or `head`.
        point: its name, see `points`; `what` says it in words.
        call: of the case, from 1 on; `graph` is what ran, of that `kind`.
        row, token: where it is farthest; of a picture, its number and the patch.
        reads: parameters of the operator.
        nodes: what gives the point, as the graph calls it.
        table: all points of the stage in that graph call.
    """

    layer: str
    where: str
    point: str
    what: str
    case: str
    call: int
    graph: str
    kind: str
    row: int
    token: int
    distance: float
    limit: float
    reads: tuple[str, ...]
    nodes: tuple[str, ...]
    table: tuple[Compared, ...] = field(repr=False, default=())

    def __str__(self) -> str:
        place = "patch" if self.kind == "vision" else "token"
        row = "picture" if self.kind == "vision" else "row"
        return (
            f"first bad: {self.where}, {self.what} ({self.point}), case {self.case}, call {self.call} ({self.kind}), "
            f"{self.distance:.1e}, allowed {self.limit:.1e}, farthest at {row} {self.row}, {place} {self.token}"
        )


@dataclass(frozen=True)
class Outcome:
    """Of one case. `hidden`: by kind of graph, the points that no stage shows; `judged`: stage -> the largest share of its
    limit that a point takes."""

    case: str
    bad: BadPoint | None
    hidden: dict[str, tuple[str, ...]]
    judged: dict[str, float]


def first_bad(oracle: Oracle, candidate: InterpretedModel | str | Path, case: Case) -> BadPoint | None:
    """The first operator that is wrong, or None.

    Args:
        oracle: the reference in fp32.
        candidate: a bundle of any target, or one that was loaded with :meth:`InterpretedModel.from_bundle` (arithmetic
            "lifted"), whose weights and graphs may have been changed since.

    Names are those of :mod:`points`. A decoder layer has `input_norm`, `q_proj`, `kv_a_proj`, `kv_a_norm`, `q_rope`,
    `k_rope`, `cache`, `q_scaled`, `q_rope_scaled`, `k_b_proj`, `mask`, `scores`, `softmax`, `latents`, `v_b_proj`,
    `attention`, `o_proj`, `attention_sum`, `post_norm`; then `gate_up`, `swiglu`, `down`, or `router_logits`,
    `router_scores`, `router_choice`, `router_weights`, `experts`, `shared_gate_up`, `shared_swiglu`, `shared_down`, `moe`; and
    `output`.

    Raises:
        BundleError: the directory is no bundle, or is damaged.
        InterpreterError: a graph cannot be run.
    """
    return examine(oracle, candidate, case).bad


def examine(
    oracle: Oracle,
    candidate: InterpretedModel | str | Path,
    case: Case,
) -> Outcome:
    """As :func:`first_bad`, with what else was seen."""
    model = candidate
    if not isinstance(model, InterpretedModel):
        model = InterpretedModel.from_bundle(model, verify=True)
    expected = Expected(oracle, case.inputs)
    config = oracle.config
    judged: dict[str, float] = {}
    hidden: dict[str, set[str]] = {}
    left = stages(config, "pixel_values" in case.inputs)
    while left:
        now, left = _together(left, config, case)
        watching = Watching(model, case, now)
        calls = watching.run()
        for stage in now:
            tables = _with_common_limits(list(_judge(expected, watching, calls, stage)))
            judged[stage.name] = 0.0
            optional = {point.name for point in stage.points if point.optional}
            for seen, table in tables:
                for point in table:
                    if point.distance is None and point.point not in optional:
                        hidden.setdefault(seen.kind, set()).add(point.point)
                    elif point.distance is not None:
                        share = point.distance / point.limit if point.limit else float(point.distance > 0)
                        judged[stage.name] = max(judged[stage.name], share)
                bad = next((point for point in table if point.bad), None)
                if bad:
                    return Outcome(case.name, _bad(case, stage, seen, bad, table), _sorted(hidden), judged)
    return Outcome(case.name, None, _sorted(hidden), judged)


def _with_common_limits(tables: list[tuple[Seen, list[Compared]]]) -> list[tuple[Seen, list[Compared]]]:
    """Each point with its largest limit of all calls: what rounding costs a single token differs from one to the next."""
    limits: dict[str, float] = {}
    for _, table in tables:
        for point in table:
            limits[point.point] = max(limits.get(point.point, 0.0), point.limit)
    return [(seen, [replace(point, limit=limits[point.point]) for point in table]) for seen, table in tables]


def _sorted(hidden: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(sorted(names)) for kind, names in sorted(hidden.items())}


def _together(left: list[Stage], config: ModelConfig, case: Case) -> tuple[list[Stage], list[Stage]]:
    """The next stages whose values fit into memory together, and those after them."""
    text, rows, columns = config.text, *case.inputs["input_ids"].shape
    per_token = 12 * text.hidden_size + 3 * text.intermediate_size + 3 * text.latent_dim
    per_token += text.num_attention_heads * 4 * (text.qk_head_dim + text.v_head_dim + columns)
    size = 4 * rows * columns * per_token * max(1, len(case.calls) // 8)
    fit = max(1, MEMORY // size)
    return left[:fit], left[fit:]


def _bad(case: Case, stage: Stage, seen: Seen, bad: Compared, table: list[Compared]) -> BadPoint:
    point = next(p for p in stage.points if p.name == bad.point)
    place = seen.places[stage.name][point.name]
    assert bad.distance is not None
    return BadPoint(
        layer=stage.name,
        where=stage.what,
        point=point.name,
        what=point.what,
        case=case.name,
        call=seen.call + 1,
        graph=seen.graph,
        kind=seen.kind,
        row=bad.row,
        token=bad.token,
        distance=bad.distance,
        limit=bad.limit,
        reads=tuple(stage.parameters(point) + [stage.prefix + name for name in place.reads]),
        nodes=place.values,
        table=tuple(table),
    )


# One stage -----------------------------------------------------------------------------------------------------------


def _judge(
    expected: Expected, watching: Watching, calls: list[Seen], stage: Stage
) -> Iterator[tuple[Seen, list[Compared]]]:
    """Each graph call that has the stage, with its points."""
    if stage.of_pictures:
        runs = [seen for seen in calls if seen.kind == "vision"]
        orders = [expected.merge_order(i) for i in range(len(runs))]
        given = []
        if stage.kind != "vision":
            for seen, order in zip(runs, orders):
                x = seen.values[stage.name]["input"][: len(order)]
                given.append(x[np.argsort(order)])  # as the reference has them, row by row
        for seen, order, (rounded, exact) in zip(runs, orders, expected.of(stage, given)):
            yield seen, [_picture(stage, point, seen, order, rounded, exact) for point in stage.points]
        return
    runs = [seen for seen in calls if seen.kind != "vision"]
    mask = expected.mask
    if stage.kind == "embedding":
        given = [] if watching.features is None else [watching.features]
    else:
        given = [_gathered(stage, runs, mask, watching.config.text.hidden_size)]
    ((rounded, exact),) = expected.of(stage, given)
    columns = [np.flatnonzero(row) for row in mask]
    for seen in runs:
        yield (
            seen,
            [
                _text(stage, point, seen, columns, rounded, exact, watching.config.text.num_experts_per_tok)
                for point in stage.points
            ],
        )


def _gathered(stage: Stage, runs: list[Seen], mask: np.ndarray, width: int) -> np.ndarray:
    """The stage's input for all columns [B, C, width], of all graph calls."""
    given = np.zeros((*mask.shape, width), np.float32)
    for seen in runs:
        x = seen.values[stage.name]["input"]
        for held in seen.rows:
            column = np.flatnonzero(mask[held.row])[held.start : held.start + held.count]
            given[held.row, column] = x[held.place, : held.count]
    return given


Rows = list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]
"""Row, its first token, and [n, ...] of the candidate, of the reference in float64 and of the reference in fp32."""


def _picture(
    stage: Stage, point: Point, seen: Seen, order: np.ndarray, rounded: Values, exact: Values
) -> Compared:
    if point.name not in seen.values[stage.name]:
        return Compared(point.name, point.what, None, 0.0)
    value = seen.values[stage.name][point.name]
    want, fp32 = exact[point.name].numpy(), rounded[point.name].numpy()
    if len(want) == len(order):
        want, fp32 = want[order], fp32[order]
    compared = _distance(point, [(seen.picture, 0, value[: len(want)], want, fp32)])
    if len(want) == len(order):
        compared = replace(compared, token=int(order[compared.token]))
    return compared


def _text(
    stage: Stage,
    point: Point,
    seen: Seen,
    columns: list[np.ndarray],
    rounded: Values,
    exact: Values,
    k: int,
) -> Compared:
    values, place = seen.values[stage.name], seen.places[stage.name].get(point.name)
    if place is None or point.name not in values:
        return Compared(point.name, point.what, None, 0.0)
    if place.form in ("mask", "added_mask"):
        return _mask(point, place, seen, values[point.name])
    if point.name == "router_choice":
        return _choice(point, seen, values[point.name], columns, exact, k)
    name = place.expected or point.name
    rows: Rows = []
    for held in seen.rows:
        value = values[point.name][held.place]
        if name == "router_weights":
            order = values["router_choice"][held.place].argsort(-1)
            value = np.take_along_axis(value, order, -1)
        rows.append(_rows(place.form, held, columns[held.row], value, exact[name], rounded[name]))
        if point.name in ROUTED and "router_choice" in values and "router_choice" in exact:
            rows[-1] = _settled(rows[-1], held, columns[held.row], values, rounded, exact)
    return _distance(point, rows)


def _rows(form: str, held: Held, column: np.ndarray, value: np.ndarray, exact: Any, rounded: Any) -> Any:
    """One row of the case."""
    new = column[held.start : held.start + held.count]
    known = column[: held.start + held.count]
    want, fp32 = exact[held.row].numpy(), rounded[held.row].numpy()
    if form == "slots":
        return held.row, 0, value[: len(known)], want[known], fp32[known]
    if form in ("scores", "probabilities"):
        value = value[:, : held.count].swapaxes(0, 1)  # (n, heads, S)
        want, fp32 = (a[:, new][:, :, known].swapaxes(0, 1) for a in (want, fp32))
        if form == "scores":
            visible = _visible(held, len(known))[:, None]
            return (
                held.row,
                held.start,
                *(np.where(visible, a[..., : len(known)], 0) for a in (value, want, fp32)),
            )
        more = ((0, 0), (0, 0), (0, value.shape[-1] - len(known)))
        return held.row, held.start, value, np.pad(want, more), np.pad(fp32, more)
    return held.row, held.start, value[: held.count], want[new], fp32[new]


def _visible(held: Held, slots: int) -> np.ndarray:
    """Which slots each token sees [n, S]: up to its own."""
    return np.arange(slots) <= held.start + np.arange(held.count)[:, None]


def _settled(
    rows: Any, held: Held, column: np.ndarray, values: dict[str, np.ndarray], rounded: Values, exact: Values
) -> Any:
    """Without tokens whose experts are others, be it of the candidate or of the reference with other rounding."""
    new = column[held.start : held.start + held.count]
    own = np.sort(values["router_choice"][held.place][: held.count], -1)
    want, fp32 = (v["router_choice"][held.row].numpy()[new] for v in (exact, rounded))
    keep = ((own == want) & (fp32 == want)).all(-1)[:, None]
    row, start, *arrays = rows
    return row, start, *(np.where(keep, a, 0) for a in arrays)


def _mask(point: Point, place: Place, seen: Seen, value: np.ndarray) -> Compared:
    """The share of slots that are seen and should not be, or the reverse."""
    wrong = places = 0
    row = token = 0
    for held in seen.rows:
        hidden = value[held.place] < HIDDEN if place.form == "added_mask" else value[held.place][None] != 0
        hidden = hidden[:, : held.count]
        bad = (hidden == _visible(held, hidden.shape[-1])).any(0)  # (n, S)
        if bad.any() and not wrong:
            row, token = held.row, held.start + int(np.flatnonzero(bad.any(-1))[0])
        wrong, places = wrong + int(bad.sum()), places + bad.size
    return Compared(point.name, point.what, wrong / places if places else 0.0, 0.0, row, token)


def _choice(
    point: Point, seen: Seen, value: np.ndarray, columns: list[np.ndarray], exact: Values, k: int
) -> Compared:
    """The share of tokens with other experts, ties left out."""
    wrong = places = 0
    row = token = 0
    for held in seen.rows:
        new = columns[held.row][held.start : held.start + held.count]
        own = np.sort(value[held.place][: held.count], -1)
        want, scores = (exact[name][held.row].numpy()[new] for name in ("router_choice", "router_scores"))
        ranked = np.sort(scores, -1)[:, ::-1]
        gap = ranked[:, k - 1] - ranked[:, k] if ranked.shape[-1] > k else np.full(len(own), np.inf)
        bad = (own != want).any(-1) & (gap >= ROUTING_TIE)
        if bad.any() and not wrong:
            row, token = held.row, held.start + int(np.flatnonzero(bad)[0])
        wrong, places = wrong + int(bad.sum()), places + len(bad)
    return Compared(point.name, point.what, wrong / places if places else 0.0, 0.0, row, token)


def _distance(point: Point, rows: Rows) -> Compared:
    """Relative L2 over all rows."""
    error = noise = norm = 0.0
    worst, row, token = -1.0, 0, 0
    for number, start, value, exact, rounded in rows:
        if value.shape != exact.shape:
            raise ValueError(f"{point.name}: has shape {value.shape}, the reference {exact.shape}")
        wide, want = value.astype(np.float64), exact.astype(np.float64)
        off = ((wide - want) ** 2).reshape(len(wide), -1).sum(-1)
        off = np.where(np.isfinite(off), off, np.inf)
        error += float(off.sum())
        noise += float(((rounded.astype(np.float64) - want) ** 2).sum())
        norm += float((want**2).sum())
        if len(off) and off.max() > worst:
            worst, row, token = float(off.max()), number, start + int(off.argmax())
    scale = norm**0.5 or 1.0
    limit = max(FLOOR, TIMES * noise**0.5 / scale)
    return Compared(point.name, point.what, error**0.5 / scale, limit, row, token)
