"""One layer of a graph as a picture: a box per operator, shapes on the lines between them, parameters in the boxes.

Views and tuples are lines, not boxes. Boxes stand in rows, each below what it takes (the longest way from the layer's
inputs); lines over several rows have a place in each; a row's order and places follow from its neighbours' middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from .errors import ExportError
from .mindir import plain
from .nodes import AFTER, BEFORE, STRUCTURE, Node, Nodes, Tensor, flat

# Fill colours by what operators do.
COLOURS = {
    "products": "#bfdbfe",
    "attention": "#ddd6fe",
    "norms, activations": "#bbf7d0",
    "cache": "#fecaca",
    "experts, routing": "#fed7aa",
    "other layers": "#ffffff",
    "arithmetic, moves": "#e5e7eb",
}
KINDS = {
    "products": (
        "MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "Dense", "GroupedMatmul", "GroupedMatmulV4",
        "kimi_linear", "kimi_linear_gelu_erf", "kimi_linear_gelu_tanh",
    ),
    "attention": (
        "FlashAttentionScore", "FusedInferAttentionScore", "PromptFlashAttention", "kimi_latent_attention",
        "kimi_vision_attention", "kimi_vision_attention_rounded",
    ),
    "norms, activations": (
        "GeLU", "LayerNorm", "AddRmsNorm", "RmsNorm", "SiLU", "Sigmoid", "Softmax", "Swiglu",
        "kimi_add_layer_norm", "kimi_add_rms_norm", "kimi_layer_norm", "kimi_rms_norm", "kimi_swiglu",
    ),
    "cache": ("KVCacheScatterUpdate", "ScatterUpdate"),
    "experts, routing": (
        "InnerMoeTokenUnpermute", "MoeInitRoutingV2", "TopK", "TopkExt", "kimi_experts", "kimi_router",
    ),
}  # fmt: skip
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CHARACTER, LINE, ROW, GAP = 6.2, 14, 46, 26  # pixels of a letter, a line of text, between rows, between boxes
SWEEPS = 24


@dataclass
class Box:
    """An operator, something outside the layer, or (without text) the place of a line in a row that it crosses."""

    text: list[str]
    colour: str = ""
    rank: int = 0
    x: float = 0.0  # of its middle
    takes: list[tuple[Box, str]] = field(default_factory=list)  # and the shape on the line
    crossed: float = 0.0  # height of the row, for a line that crosses it

    @property
    def width(self) -> float:
        return max((len(t) for t in self.text), default=0) * CHARACTER + (16 if self.text else 4)

    @property
    def height(self) -> float:
        return LINE * len(self.text) + 8 if self.text else self.crossed


def draw(graph: Nodes, layer: int, title: str) -> str:
    """The SVG of a layer.

    Raises:
        ExportError: the graph has no such layer.
    """
    boxes = _boxes(graph, layer)
    rows = _rows(boxes)
    _order(rows)
    return "\n".join(_svg(rows, f"{title}, layer {layer}"))


def _boxes(graph: Nodes, layer: int) -> list[Box]:
    """Of the layer's operators, what they take from outside, and where its results go."""
    inside = {n.output: n for n in graph.nodes if graph.places[n.output] == layer and not n.free}
    if not inside:
        layers = sorted({p for p in graph.places.values() if BEFORE < p < AFTER})
        has = f"layers {layers[0]} to {layers[-1]}" if layers else "no numbered layers"
        raise ExportError(f"--layer: {layer}, but the graph has {has}")
    boxes: dict[str, Box] = {}
    for value, node in inside.items():
        weights = []
        box = boxes[value] = Box([], _colour(node.operator))
        for taken in node.inputs:
            for source, tensor in _sources(graph, taken):
                if source in graph.parameters:
                    weights.append(f"▪ {_local(plain(source), layer)}  {_shape(tensor)}")
                    continue
                if source not in boxes:
                    boxes[source] = Box([_outside(graph, source)], COLOURS["other layers"])
                box.takes.append((boxes[source], _shape(tensor)))
        box.text = [node.operator, *weights]
    leaving = [
        (source, tensor)
        for node in graph.nodes
        if node.output not in inside and not node.free
        for taken in node.inputs
        for source, tensor in _sources(graph, taken)
        if source in inside
    ]
    for source, tensor in dict(leaving).items():
        boxes[f"after {source}"] = Box(
            ["to the next layers"], COLOURS["other layers"], takes=[(boxes[source], _shape(tensor))]
        )
    return list(boxes.values())


def _sources(graph: Nodes, value: str) -> Iterator[tuple[str, Tensor]]:
    """What a value is made of, through views and tuples: parameters, inputs and operators' results, as they are taken."""
    kind = graph.kind(value)
    while (node := graph.makers.get(value)) and node.free:
        if node.operator in ("MakeTuple", "MakeList"):
            for part in node.inputs:
                yield from _sources(graph, part)
            return
        if node.operator in STRUCTURE and node.operator not in ("TupleGetItem", "ListGetItem"):
            return
        value = node.inputs[0]
    if value in graph.constants:
        return
    tensors = list(flat(kind))
    if tensors:
        yield value, tensors[0]


def _colour(operator: str) -> str:
    kinds = (kind for kind, operators in KINDS.items() if operator in operators)
    return COLOURS[next(kinds, "arithmetic, moves")]


def _outside(graph: Nodes, source: str) -> str:
    node: Node | None = graph.makers.get(source)
    if node is None:
        return f"input {plain(source) or source}"
    place = graph.places[source]
    return (
        f"{node.operator} of layer {place}"
        if BEFORE < place < AFTER
        else f"{node.operator} before the layers"
    )


def _local(parameter: str, layer: int) -> str:
    """A parameter's name within its layer."""
    return parameter.partition(f".{layer}.")[2] if f"s.{layer}." in parameter else parameter


def _shape(tensor: Tensor) -> str:
    return f"{SHORT.get(tensor.dtype, tensor.dtype)} {'×'.join(map(str, tensor.shape))}"


# Layout ---------------------------------------------------------------------------------------------------------------


def _rows(boxes: list[Box]) -> list[list[Box]]:
    """The boxes by rank, with places for the lines that cross a row."""
    ordered: list[Box] = []

    def visit(box: Box) -> None:
        if any(box is seen for seen in ordered):
            return
        for taken, _ in box.takes:
            visit(taken)
        box.rank = max((taken.rank + 1 for taken, _ in box.takes), default=0)
        ordered.append(box)

    for box in boxes:
        visit(box)
    for source in (b for b in ordered if not b.takes):  # just above the first that takes it
        source.rank = min(b.rank for b in ordered for taken, _ in b.takes if taken is source) - 1
    lowest = min(box.rank for box in ordered)
    rows: list[list[Box]] = [[] for _ in range(max(box.rank for box in ordered) - lowest + 1)]
    for box in ordered:
        box.rank -= lowest
        rows[box.rank].append(box)
    for box in ordered:
        for i, (taken, shape) in enumerate(box.takes):
            for rank in range(taken.rank + 1, box.rank):
                taken = Box([], rank=rank, takes=[(taken, "")])
                rows[rank].append(taken)
            box.takes[i] = (taken, shape)
    return rows


def _order(rows: list[list[Box]]) -> None:
    """Order and place the boxes of each row, downwards by what they take and upwards by what takes them."""
    above = {id(box): [taken for taken, _ in box.takes] for row in rows for box in row}
    below: dict[int, list[Box]] = {id(box): [] for row in rows for box in row}
    for row in rows:
        for box in row:
            for taken in above[id(box)]:
                below[id(taken)].append(box)
    for row in rows:
        _place(row, [float(i) for i in range(len(row))])
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            near = above if down else below
            wished = [_middle([n.x for n in near[id(box)]], box.x) for box in row]
            if sweep < SWEEPS - 8:  # then the order stands, and only places move
                pairs = sorted(zip(wished, row), key=lambda pair: pair[0])
                row[:], wished = [b for _, b in pairs], [w for w, _ in pairs]
            _place(row, wished)


def _middle(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _place(row: list[Box], wished: list[float]) -> None:
    """As near to where they wish to be as their widths allow, in their order."""
    edge = -1e9
    for box, x in zip(row, wished):
        box.x = max(x, edge + box.width / 2)
        edge = box.x + box.width / 2 + GAP
    shift = sum(box.x - x for box, x in zip(row, wished)) / len(row)
    for box in row:
        box.x -= shift


# SVG ------------------------------------------------------------------------------------------------------------------


def _svg(rows: list[list[Box]], title: str) -> Iterator[str]:
    left = min(box.x - box.width / 2 for row in rows for box in row) - 20
    right = max(box.x + box.width / 2 for row in rows for box in row) + 100  # a shape may stand at the right
    tops, y = [], 70.0
    for row in rows:
        tops.append(y)
        height = max(box.height for box in row)
        for box in row:
            box.crossed = height
        y += height + ROW
    width = max(right - left, 760)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} 0 {width:.0f} {y:.0f}" width="{width:.0f}" '
        f'height="{y:.0f}" font-family="sans-serif" font-size="11">'
    )
    yield f'<rect x="{left:.0f}" width="{width:.0f}" height="{y:.0f}" fill="white"/>'
    yield f'<text x="{left + 12:.0f}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>'
    at = left + 12
    for kind, colour in COLOURS.items():
        yield f'<rect x="{at:.0f}" y="36" width="12" height="12" fill="{colour}" stroke="#6b7280"/>'
        yield f'<text x="{at + 16:.0f}" y="46">{escape(kind)}</text>'
        at += 30 + len(kind) * CHARACTER
    for row in rows:
        for box in row:
            yield from _lines(box, tops)
    for row, top in zip(rows, tops):
        for box in row:
            yield from _rectangle(box, top)
    yield "</svg>"


def _lines(box: Box, tops: list[float]) -> Iterator[str]:
    """From what a box takes to its upper edge, each to a place of its own, with the shape there."""
    for i, (taken, shape) in enumerate(sorted(box.takes, key=lambda t: t[0].x)):
        x = box.x + box.width * ((i + 1) / (len(box.takes) + 1) - 0.5)
        y = tops[box.rank]
        from_y = tops[taken.rank] + taken.height
        bend = (y - from_y) / 2
        yield (
            f'<path d="M{taken.x:.1f} {tops[taken.rank]:.1f} V{from_y:.1f} C{taken.x:.1f} {from_y + bend:.1f} {x:.1f} {y - bend:.1f} {x:.1f} {y:.1f}" '
            'fill="none" stroke="#9ca3af"/>'
        )
        if shape:
            many = len(box.takes) > 1
            at, anchor = (x - 3, "end") if many and i == 0 else (x + 3, "start")
            rise = 4 + 11 * (len(box.takes) - 1 - i if i else 0)
            yield (
                f'<text x="{at:.1f}" y="{y - rise:.1f}" text-anchor="{anchor}" font-size="9" '
                f'fill="#374151">{escape(shape)}</text>'
            )


def _rectangle(box: Box, top: float) -> Iterator[str]:
    if not box.text:  # the line goes on
        return
    x = box.x - box.width / 2
    dashed = ' stroke-dasharray="4 3"' if box.colour == COLOURS["other layers"] else ""
    yield (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="4" fill="{box.colour}" '
        f'stroke="#6b7280"{dashed}/>'
    )
    for i, text in enumerate(box.text):
        style = 'fill="#b91c1c"' if i else 'font-weight="bold"'
        yield (
            f'<text x="{box.x:.1f}" y="{top + LINE * (i + 1) - 1:.1f}" text-anchor="middle" {style}>{escape(text)}</text>'
        )
