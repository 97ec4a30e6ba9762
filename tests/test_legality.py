"""What single operators take on a product: rows and limits against real graphs, broken ones, and odd configurations."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundles
import mindspore as ms
import pytest
from golden import DATA

from kimi_vl.export import ExportError, legality, lint, plan_export
from kimi_vl.export.operators import GE, KBK, LIMITS, PRODUCTS, ROWS
from kimi_vl.export.plan import open_converted
from kimi_vl.export.proto import pb
from kimi_vl.export.trace import Tracer
from kimi_vl.modeling.configuration import ModelConfig

SIZES: dict[str, Any] = {"seq": (128,), "prefill_chunk": 32, "image_patches": (64,), "target": "ascend"}
PREFILL, DECODE, VISION = "prefill-32x128", "decode-128", "vision-64"


@functools.cache
def traced(graph: str, attention: str = "fused", experts: str = "fused") -> bytes:
    """A graph of a small checkpoint; a proto cannot be hashed, and tests change it."""
    weights = open_converted(bundles.converted("tiny8-bf16"))
    plan = plan_export(weights, **SIZES, attention=attention, experts=experts)
    (planned,) = (g for g in plan.graphs if g.name == graph)
    return Tracer(plan.config, plan.target, 1).trace(planned).SerializeToString()


def model(graph: str, **variants: str) -> pb.ModelProto:
    return pb.ModelProto.FromString(traced(graph, **variants))


def refused(
    graph: str, changed: pb.ModelProto, message: str, runtime: str = KBK, product: str = "a2"
) -> None:
    with pytest.raises(ExportError, match=f"^{graph}: node .* on {product}: .*{message}"):
        legality.check(graph, changed, runtime, (product,))


# The table -----------------------------------------------------------------------------------------------------------


def test_every_row_has_a_source_and_a_product():
    for row in ROWS.values():
        assert re.match(r"(N|M|T|T2) [a-z_0-9]+/[a-z_0-9]+|W ops\.", row.source), row
        assert any(row.products.values()) and {p for ps in row.products.values() for p in ps} <= set(PRODUCTS)
        assert all(bool(row.kernels[runtime]) <= bool(row.products[runtime]) for runtime in (KBK, GE))
    assert set(LIMITS) <= set(ROWS)


def test_mindspores_ascend_library_has_every_kernel_and_adapter_of_the_table():
    """In its own binaries, which a CPU's wheel has too: a kernel by its name, an adapter by the name of its type."""
    libraries = Path(ms.__file__).parent / "lib/plugin"
    kernels, adapters = set(), set()
    for library in libraries.rglob("libmindspore*ascend*.so*"):
        held = library.read_bytes()
        kernels.update(
            m[0].decode()
            for m in re.finditer(rb"aclnn\w+", held)
            if not re.match(rb"\w", held[m.start() - 1 :])
        )
        for name in re.finditer(
            rb"OpAdapterINS2_(\d+)cz", held
        ):  # its length with the "cz", which is its namespace
            adapters.add(held[name.end() : name.end() + int(name[1]) - 2].decode(errors="replace"))
    if ms.__version__ == "2.7.0":
        kernels.add("aclnnInplaceIndexCopy")  # which came with 2.7.1
    assert {row.kernels[KBK] for row in ROWS.values()} - {None} <= kernels
    assert {row.kernels[GE] for row in ROWS.values()} - {None} <= adapters


def test_what_has_no_row_is_refused(monkeypatch):
    monkeypatch.delitem(ROWS, "Softmax")
    refused(DECODE, model(DECODE), "Softmax is not in the table of operators")


def test_a_product_or_a_runtime_that_a_row_does_not_name_is_refused():
    refused(
        DECODE, model(DECODE), "GroupedMatmulV4 is listed for a2, a3 only kernel by kernel", product="310p"
    )
    refused(DECODE, model(DECODE), "MoeInitRoutingV2 is listed for no product in a graph engine", runtime=GE)


def test_a_refusal_says_what_to_choose_and_what_no_choice_mends():
    message = (
        r"\(T attention/fused_infer_attention_score\); export with --attention plain --experts plain and convert the "
        "checkpoint with --dtype fp16; but no option mends what is wrong with Add,.*MatMul"
    )
    refused(PREFILL, model(PREFILL), message, product="310p")
    message = "Atlas inference products .* have no bfloat16 .*; convert the checkpoint with --dtype fp16; but no option"
    plain = model(DECODE, attention="plain", experts="plain")
    refused(DECODE, plain, message, product="310p")


def test_plain_variants_are_legal_too():
    for graph in (PREFILL, DECODE, VISION):
        legality.check(graph, model(graph, attention="plain", experts="plain"), KBK, ("a2", "a3"))


# Broken graphs -------------------------------------------------------------------------------------------------------


def node(changed: pb.ModelProto, operator: str) -> Any:
    return next(n for n in changed.graph.node if lint.operator(n) == operator)


def tensors(changed: pb.ModelProto, operator: str, place: int) -> list[Any]:
    """Of an operand, or with -1 of the result: to be changed."""
    found = node(changed, operator)
    value = found.output[0] if place == -1 else found.input[place]
    return lint.Lint("", changed, (), {}).tensors(value)


def dims(operator: str, place: int, axis: int, n: int):
    def change(changed):
        for t in tensors(changed, operator, place):
            t.dims[axis] = n

    return change


def more_dims(operator: str, place: int, n: int):
    def change(changed):
        for t in tensors(changed, operator, place):
            t.dims[:] = [*[1] * (n - len(t.dims)), *t.dims]

    return change


def retype(operator: str, place: int, dtype: int):
    def change(changed):
        for t in tensors(changed, operator, place):
            t.data_type = dtype

    return change


def instead(operator: str, place: int, dtype: int):
    """A parameter of another dtype in place of an operand, so that what gave it stays as it is."""

    def change(changed):
        (t,) = tensors(changed, operator, place)
        changed.graph.parameter.add(name="graph:other", data_type=dtype, dims=t.dims)
        node(changed, operator).input[place] = "graph:other"

    return change


def set_to(operator: str, place: int, value: int):
    """A constant of its own in place of an operand."""

    def change(changed):
        made = changed.graph.node.add(op_type="Constant", output=["graph:changed"])
        attribute = made.attribute.add(name="value", type=pb.AttributeProto.INT64)
        attribute.ints.append(value)
        node(changed, operator).input[place] = made.output[0]

    return change


def foreign(changed):
    node(changed, "RmsNorm").op_type = "REF::PagedAttention:0"


def add_operand(changed):
    found = node(changed, "Swiglu")
    found.input.append(found.input[0])


def constant_for_tensor(changed):
    found = node(changed, "Swiglu")
    found.input[:] = [found.input[1], found.input[0]]


FUSED, GROUPED = "FusedInferAttentionScore", "GroupedMatmulV4"
UNSORT, SORT, WRITE = "InnerMoeTokenUnpermute", "MoeInitRoutingV2", "KVCacheScatterUpdate"
F = pb.TensorProto


def together(*changes):
    def change(changed):
        for one in changes:
            one(changed)

    return change


FAULTS = {
    "an operator without a row": (foreign, "PagedAttention is not in the table"),
    "an operand more": (add_operand, "has 3 operands, expected 2"),
    "a constant for a tensor": (constant_for_tensor, "operand 0 is 0 tensors, expected one"),
    "nine dimensions": (more_dims("Swiglu", 0, 9), "has 9 dimensions, expected at most 8"),
    "float64": (retype("MatMul", 0, F.DOUBLE), r"operand 0 is float64 .*, expected bfloat16 or float16 or float32"),
    "two dtypes": (retype("MatMul", 0, F.FLOAT), "operand 1 is bfloat16 .*, but another of the same dtype is float32"),
    "a result of another dtype": (retype("Swiglu", -1, F.FLOAT), "result 0 is float32 .*, but another"),
    "fused attention in fp32": (instead(FUSED, 0, F.FLOAT), "operand 0 is float32 .*, expected bfloat16 or float16"),
    "a mask that is not bool": (instead(FUSED, 4, F.FLOAT16), "operand 4 is float16 .*, expected bool or int8"),
    "a mask that does not fit": (dims(FUSED, 4, -1, 127), r"has the mask \[1, 1, 32, 127\] for 32 queries and 128 keys"),
    "a head dim that is no multiple": (
        together(*(dims(FUSED, i, -1, 24) for i in range(3))),
        "operand 0 is .* 24.*, expected its dimension -1 to be a multiple of 16 and at most 512",
    ),
    "a head dim above 512": (together(*(dims(FUSED, i, -1, 576) for i in range(3))), "576.* a multiple of 16 and at most 512"),
    "unequal head dims": (dims(FUSED, 2, -1, 16), r"has head dims \[16, 32\], expected one"),
    "257 heads": (dims(FUSED, 0, 1, 257), "expected its dimension 1 to be at most 256"),
    "another layout": (set_to(FUSED, 28, 0), "has input_layout 0, expected 1"),
    "a compressed mask": (set_to(FUSED, 30, 3), "has sparse_mode 3, expected 0 or 1"),
    "a precision that is not there": (set_to(FUSED, 31, 4), "has inner_precise 4, expected 0 or 1 or 2 or 3"),
    "group sizes in int32": (retype(GROUPED, 8, F.INT32), "operand 8 is int32 .*, expected int64"),
    "1025 experts": (dims(GROUPED, 8, 0, 1025), "expected its dimension 0 to be at most 1024"),
    "a grouped product too wide": (dims(GROUPED, 1, -1, 65536), "expected its dimension -1 to be at most 65535"),
    "a grouped product of one matrix": (more_dims(GROUPED, 1, 4), "operand 1 has 4 dimensions, expected 3"),
    "groups of columns": (set_to(GROUPED, 13, 2), "has group_type 2, expected 0"),
    "an activation in the product": (set_to(GROUPED, 15, 1), "has act_type 1, expected 0"),
    "513 experts a token": (dims(UNSORT, 2, 1, 513), "expected its dimension 1 to be at most 512"),
    "experts in int64": (retype(SORT, 1, F.INT64), "operand 1 is int64 .*, expected int32"),
    "a flag that is not there": (set_to(SORT, 6, 3), "has expert_tokens_count_or_cumsum_flag 3, expected 0 or 1 or 2"),
    "rows of another width": (dims(WRITE, 2, -1, 3), r"writes \[1, 1, 32, 3\] at \[1\] starts into"),
    "a write along the batch": (set_to(WRITE, 3, 0), "on dimension 0"),
    "a start in float": (retype(WRITE, 1, F.FLOAT), "operand 1 is float32 .*, expected int32 or int64"),
    "more of the largest than there are": (set_to("TopkExt", 1, 999), "takes the 999 largest of"),
    "a sort that leaves its order open": (set_to("TopkExt", 4, 0), "has sorted 0, expected True"),
    "an index longer than its tensor": (dims("GatherD", 2, 0, 33), r"gathers \[33, .* on dimension 1, expected no other"),
    "places in two dimensions": (more_dims("Gather", 1, 2), "operand 1 has 2 dimensions, expected 0 to 1"),
    "a batched product of one matrix": (more_dims("BatchMatMul", 0, 4), "operand 0 has 4 dimensions, expected 3"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_beyond_its_rows_or_limits_is_refused(fault):
    change, message = FAULTS[fault]
    changed = model(PREFILL)
    change(changed)
    refused(PREFILL, changed, message)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        (UNSORT, dims(UNSORT, 0, -1, 192), "expected its dimension -1 to be a multiple of 128 and at most 10239"),
        ("Swiglu", dims("Swiglu", 0, -1, 72), "to be a multiple of 64 bytes, not 144"),
        ("RmsNorm", dims("RmsNorm", 1, -1, 8), "to be at least 32 bytes, not 16"),
        (SORT, set_to(SORT, 5, 1), "has drop_pad_mode 1, expected 0"),
        ("MatMul", lambda changed: None, "operand 0 is float32, expected float16"),
    ],
)  # fmt: skip
def test_310p_has_limits_of_its_own(operator, change, message):
    """In fp16, and of this operator alone: most others are not listed for it."""
    changed = model(PREFILL)
    for t in (*changed.graph.parameter, *(i.tensor[0] for i in changed.graph.input)):
        t.data_type = F.FLOAT16 if t.data_type == F.BFLOAT16 else t.data_type
    for made in changed.graph.node:
        for t in lint.Lint("", changed, (), {}).tensors(made.output[0]):
            t.data_type = F.FLOAT16 if t.data_type == F.BFLOAT16 else t.data_type
    change(changed)
    found = [
        fault.what
        for call, name in legality.calls(changed)
        if call.operator == operator
        for fault in legality.faults(call, name, KBK, ("310p",))
    ]
    assert any(message in what for what in found), found


# Odd configurations --------------------------------------------------------------------------------------------------


SMALL_TEXT = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64,
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 200,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32,
}  # fmt: skip


def odd_plan(text: dict[str, int], vision: dict[str, int], **variants: str) -> Any:
    """Of a checkpoint that nothing but its configuration is read of."""
    raw = json.loads((DATA / "published/config.json").read_text())
    raw["text_config"] |= SMALL_TEXT | text
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    raw["vision_config"] |= small | vision
    raw["media_placeholder_token_id"] = 7
    weights: Any = SimpleNamespace(
        config=ModelConfig.from_dict(raw),
        dtype="bfloat16",
        directory=DATA / "published",
        manifest=SimpleNamespace(files={}),
    )
    sizes: dict[str, Any] = {"seq": (32,), "prefill_chunk": 8, "image_patches": (16,)}
    return plan_export(weights, **sizes, target="ascend", **variants)


def check(plan: Any, graph: str) -> None:
    (planned,) = (g for g in plan.graphs if g.name == graph)
    found = Tracer(plan.config, plan.target, 1).trace(planned)
    legality.check(graph, found, plan.target.runtime, plan.target.products)


ODD = {
    "a head dim of 520": ({"qk_nope_head_dim": 512}, {}, "prefill-8x32", "--attention plain"),
    "values of 513": ({"v_head_dim": 513}, {}, "prefill-8x32", "--attention plain"),
    "a vision head of 516": ({}, {"hidden_size": 1032}, "vision-16", "--attention plain"),
    "experts of 2 x 32768": ({"moe_intermediate_size": 32768}, {}, "decode-32", "--experts plain"),
    "1025 experts": ({"n_routed_experts": 1025}, {}, "decode-32", "--experts plain"),
    "513 experts a token": ({"n_routed_experts": 600, "num_experts_per_tok": 513}, {}, "decode-32", "--experts plain"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_padding_cannot_mend_is_refused_and_the_plain_variant_is_not(case):
    text, vision, graph, option = ODD[case]
    with pytest.raises(
        ExportError, match=rf"^{graph}: node .*expected its dimension .*; export with {option}$"
    ):
        check(odd_plan(text, vision), graph)
    if case != "513 experts a token":  # 513 products in a row are too many for a test
        variants = {option.split()[0].removeprefix("--"): "plain"}
        check(odd_plan(text, vision, **variants), graph)


@pytest.mark.parametrize(
    ("text", "vision", "graph"),
    [
        ({"qk_nope_head_dim": 13, "v_head_dim": 5}, {}, "prefill-8x32"),
        ({"qk_nope_head_dim": 500, "v_head_dim": 511}, {}, "prefill-8x32"),
        ({}, {"hidden_size": 72}, "vision-16"),
        ({"n_routed_experts": 1024}, {}, "decode-32"),
        ({"n_shared_experts": 0, "num_experts_per_tok": 1}, {}, "prefill-8x32"),
    ],
)  # fmt: skip
def test_odd_dimensions_that_padding_mends_are_legal(text, vision, graph):
    check(odd_plan(text, vision), graph)
