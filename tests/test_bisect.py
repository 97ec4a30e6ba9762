"""The first wrong operator is named: faults in single weights, numbers and nodes of a graph, and in the host's code."""

from __future__ import annotations

import functools
from dataclasses import replace

import bundles
import numpy as np
import pytest
import torch
from golden import DATA
from test_ascend_interpreted import BF16
from test_ascend_interpreted import bundle as device_bundle

from kimi_vl.modeling.positions import text_rope
from kimi_vl.verify.bisect import examine, first_bad
from kimi_vl.verify.bisect_cli import _shown
from kimi_vl.verify.candidates import inspect
from kimi_vl.verify.cases import SeededSource, build, select, suite
from kimi_vl.verify.interpreted import InterpretedModel
from kimi_vl.verify.mindir.paths import Paths
from kimi_vl.verify.mindir.values import Value
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.places import find
from kimi_vl.verify.points import stages

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LAYER, BLOCK = "language_model.model.layers.{}.", "vision_tower.encoder.blocks.{}."
TARGETS = ("cpu", "ascend")


@functools.cache
def oracle():
    return build_oracle(DATA / BF16)


def bundle(target):
    """For the CPU with the library's operators, or "plain" without them."""
    return (
        bundles.bundle(BF16, operators=target == "cpu")
        if target in ("cpu", "plain")
        else device_bundle(target)
    )


@functools.cache
def case(name, target="cpu", seed=1):
    limits = inspect(bundle(target), "interpreter").limits
    (plan,) = select(suite(oracle().config, limits), [name])
    return build(plan, SeededSource(oracle().config), seed)


def model(target):
    return InterpretedModel.from_bundle(bundle(target))


def with_weight(made, name, change):
    """The model, with one weight changed."""
    array = made.weights.array
    assert name in made.weights

    def changed(wanted):
        weight = array(wanted)
        return change(weight.astype(np.float32)).astype(weight.dtype) if wanted == name else weight

    made.weights.array = changed
    return made


def with_graphs(made, change):
    """The model, with `change(graph, nodes)` giving each graph's other nodes."""
    graph_of, seen = made.engine.graphs._graph, []

    def changed(*asked):
        graph = graph_of(*asked)
        if graph.name not in seen:
            seen.append(graph.name)
            nodes = tuple(change(graph.graph, graph.graph.main.nodes))
            graph.graph = replace(graph.graph, main=replace(graph.graph.main, nodes=nodes))
            graph._interpreter.graph = graph.graph
        return graph

    made.engine.graphs._graph = changed
    return made


def operand(graph, nodes, of, index, value):
    """The nodes, with another constant as operand `index` of the node that gives `of`."""
    graph.constants["another"] = value
    for node in nodes:
        if node.output == of:
            inputs = tuple("another" if i == index else v for i, v in enumerate(node.inputs))
            node = replace(node, inputs=inputs)
        yield node


def louder(weight):
    return weight * 1.01


BIAS = "e_score_correction_bias"  # a hundredth more of it chooses the same experts

WEIGHTS = [
    ("language_model.model.embed_tokens.weight", "embedding", "embed_tokens"),
    (LAYER.format(0) + "input_layernorm.weight", "layers.0", "input_norm"),
    (LAYER.format(1) + "self_attn.q_proj.weight", "layers.1", "q_proj"),
    (LAYER.format(2) + "self_attn.kv_a_proj_with_mqa.weight", "layers.2", "kv_a_proj"),
    (LAYER.format(1) + "self_attn.kv_a_layernorm.weight", "layers.1", "kv_a_norm"),
    (LAYER.format(0) + "self_attn.k_b_proj.weight", "layers.0", "k_b_proj"),
    (LAYER.format(1) + "self_attn.v_b_proj.weight", "layers.1", "v_b_proj"),
    (LAYER.format(2) + "self_attn.o_proj.weight", "layers.2", "o_proj"),
    (LAYER.format(1) + "post_attention_layernorm.weight", "layers.1", "post_norm"),
    (LAYER.format(0) + "mlp.gate_up_proj.weight", "layers.0", "gate_up"),
    (LAYER.format(0) + "mlp.down_proj.weight", "layers.0", "down"),
    (LAYER.format(1) + "mlp.gate.weight", "layers.1", "router_logits"),
    (LAYER.format(2) + "mlp.gate.e_score_correction_bias", "layers.2", "router_scores"),
    (LAYER.format(2) + "mlp.experts.gate_up_proj", "layers.2", "experts"),
    (LAYER.format(1) + "mlp.experts.down_proj", "layers.1", "experts"),
    (LAYER.format(1) + "mlp.shared_experts.gate_up_proj.weight", "layers.1", "shared_gate_up"),
    (LAYER.format(2) + "mlp.shared_experts.down_proj.weight", "layers.2", "shared_down"),
    ("language_model.model.norm.weight", "head", "final_norm"),
    ("language_model.lm_head.weight", "head", "lm_head"),
    ("vision_tower.patch_embed.proj.bias", "vision", "patch_embed"),
    ("vision_tower.patch_embed.pos_emb.weight", "vision", "pos_emb"),
    (BLOCK.format(1) + "norm0.bias", "blocks.1", "norm0"),
    (BLOCK.format(0) + "wqkv.weight", "blocks.0", "wqkv"),
    (BLOCK.format(1) + "wo.weight", "blocks.1", "wo"),
    (BLOCK.format(0) + "norm1.weight", "blocks.0", "norm1"),
    (BLOCK.format(1) + "mlp.fc0.weight", "blocks.1", "fc0"),
    (BLOCK.format(0) + "mlp.fc1.bias", "blocks.0", "fc1"),
    ("vision_tower.encoder.final_layernorm.weight", "projector", "final_layernorm"),
    ("multi_modal_projector.pre_norm.bias", "projector", "pre_norm"),
    ("multi_modal_projector.linear_1.weight", "projector", "linear_1"),
    ("multi_modal_projector.linear_2.weight", "projector", "linear_2"),
]


# What an operator of the CPU's library hides is found where its result shows.
SHOWN = {
    "k_b_proj": "attention",
    "v_b_proj": "attention",
    "fc0": "gelu",
    "linear_1": "gelu",
    "router_logits": "router_weights",
    "router_scores": "router_choice",
}


def check_wrong_weight(target, name, layer, point):
    made = with_weight(model(target), name, np.negative if name.endswith(BIAS) else louder)
    bad = first_bad(oracle(), made, case("image"))
    assert (bad.layer, bad.point, bad.call) == (layer, point, 1)
    assert name in bad.reads and bad.nodes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "layer", "point"), WEIGHTS, ids=[name for name, _, _ in WEIGHTS])
def test_a_wrong_weight_is_the_operator_that_takes_it(name, layer, point, target):
    check_wrong_weight(target, name, layer, SHOWN.get(point, point) if target == "cpu" else point)


PARTS = ("k_b_proj", "gate_up", "wqkv")
MORE_PARTS = [
    pytest.param(*row, marks=pytest.mark.slow) for row in WEIGHTS if row[2] in ("router_scores", "final_norm")
]


@pytest.mark.parametrize(("name", "layer", "point"), [row for row in WEIGHTS if row[2] in PARTS] + MORE_PARTS)
def test_so_it_is_in_plain_graphs_for_the_cpu(name, layer, point):
    check_wrong_weight("plain", name, layer, point)


@pytest.mark.parametrize("target", [*TARGETS, "plain", "lite"])
@pytest.mark.parametrize("name", ["image", "batch-steps", "chunks"])
def test_of_a_right_candidate_nothing_is_bad(name, target):
    outcome = examine(oracle(), bundle(target), case(name))
    assert outcome.bad is None
    assert len(outcome.judged) == 9 and 0 < max(outcome.judged.values()) < 1


def norm_eps(graph, nodes, stage, point, value):
    place = find(graph, oracle().config, stage, 1).get(point)
    fused = Paths(graph).makers[place.values[0]].inputs[0] if place else ""
    return operand(graph, nodes, fused, 2, value)


def stage(name):
    return next(s for s in stages(oracle().config, True) if s.name == name)


@pytest.mark.parametrize(("layer", "point"), [("layers.1", "kv_a_norm"), ("layers.0", "input_norm")])
def test_another_eps_is_the_norm(layer, point):
    """1.5e-5 in the place of 1e-5 or 1e-6, in the proto."""
    made = with_graphs(model("ascend"), lambda g, nodes: norm_eps(g, nodes, stage(layer), point, 1.5e-5))
    bad = first_bad(oracle(), made, case("text"))
    assert (bad.layer, bad.point) == (layer, point)


def numbered(operator, value, number=0):
    """The `number`th node of an operator has `value` as its second operand."""

    def change(graph, nodes):
        found = [n.output for n in nodes if n.operator == operator and Paths(graph).is_number(n.inputs[1])]
        return operand(graph, nodes, found[number], 1, value) if found else nodes

    return change


def test_another_factor_is_the_weights_of_the_experts():
    """2.5 for 2.446, the last product with a number in a layer."""
    made = with_graphs(model("plain"), numbered("Muls", 2.5, -1))
    bad = first_bad(oracle(), made, case("text"))
    assert (bad.layer, bad.point) == ("layers.2", "router_weights")


def test_so_it_is_where_the_router_is_one_operator():
    def change(graph, nodes):
        options = Value(torch.tensor([1.0, 2.5]), torch.float32)
        routers = [node.output for node in nodes if node.operator == "kimi_router"]
        return operand(graph, nodes, routers[1], 3, options) if routers else nodes

    bad = first_bad(oracle(), with_graphs(model("cpu"), change), case("text"))
    assert (bad.layer, bad.point) == ("layers.2", "router_weights")
    assert bad.reads == tuple(LAYER.format(2) + f"mlp.gate.{name}" for name in ("weight", BIAS))


def test_another_scale_is_the_queries_or_the_attention():
    made = with_graphs(model("plain"), numbered("Muls", 0.2, 0))
    bad = first_bad(oracle(), made, case("text"))
    assert (bad.layer, bad.point, bad.kind) == ("layers.0", "q_scaled", "prefill-logits")


def test_a_fault_of_decoding_alone_is_found_in_its_call():
    """The scale of decoding, which on a device is added with the mask."""

    def change(graph, nodes):
        found = [n.output for n in nodes if n.operator == "AddExt" and "Softmax" in users(graph, n)]
        return operand(graph, nodes, found[1], 2, 0.2) if found else nodes

    def users(graph, node):
        return [n.operator for n in Paths(graph).users.get(node.output, ())]

    bad = first_bad(oracle(), with_graphs(model("ascend"), change), case("steps"))
    assert (bad.layer, bad.point, bad.kind, bad.call) == ("layers.1", "scores", "decode", 2)
    assert bad.token == case("steps").inputs["input_ids"].shape[1] - 16


@pytest.mark.parametrize("target", TARGETS)
def test_a_position_too_small_while_decoding_is_rope(target):
    made = model(target)
    run = made.engine.graphs.text

    def off(tokens, context, rows, inputs, all_logits, taps):
        if tokens == 1:
            p = rows[0].length - 1
            cos, sin = text_rope(np.array([[p]]), oracle().config.text.rope_theta, 8)
            inputs |= {"cos": cos, "sin": sin}
        return run(tokens, context, rows, inputs, all_logits, taps)

    made.engine.graphs.text = off
    bad = first_bad(oracle(), made, case("steps"))
    assert (bad.layer, bad.point, bad.kind, bad.call) == ("layers.0", "q_rope", "decode", 2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_slot_too_early_is_the_cache(target):
    """Of a decode step, whose token then overwrites the one before."""
    made = model(target)
    run = made.engine.graphs.text

    def off(tokens, context, rows, inputs, all_logits, taps):
        if tokens == 1:
            inputs |= {"start": inputs["start"] - 1}
        return run(tokens, context, rows, inputs, all_logits, taps)

    made.engine.graphs.text = off
    bad = first_bad(oracle(), made, case("steps"))
    assert (bad.layer, bad.point, bad.kind, bad.call) == ("layers.0", "cache", "decode", 2)


def test_the_bad_layer_is_shown_point_by_point():
    name = LAYER.format(1) + "self_attn.o_proj.weight"
    text = _shown([examine(oracle(), with_weight(model("ascend"), name, louder), case("image"))])
    assert (
        "first bad: decoder layer 1, the output projection (o_proj), case image, call 1 (prefill-logits)"
        in text
    )
    assert f"reads: {name}" in text and "nodes: graph:" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert rows["o_proj"].endswith("bad, the first") and rows["attention_sum"].endswith("bad")
    assert "bad" not in rows["attention"] and "scores" not in rows


@pytest.mark.parametrize(
    ("target", "hidden"),
    [
        ("ascend", "scores, softmax"),
        ("cpu", "k_b_proj, mask, router_logits, router_scores, scores, softmax, v_b_proj"),
    ],
)
def test_what_a_fused_operator_hides_is_told(target, hidden):
    text = _shown([examine(oracle(), bundle(target), case("text"))])
    assert "nothing bad in text" in text
    assert f"not visible in prefill-logits graphs, inside fused operators: {hidden}\n" in f"{text}\n"
