"""Memory of a graph's own tensors, from when each is made and last used."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bundles
import mindspore as ms
import numpy as np
import pytest
import sparse
from click.testing import CliRunner
from golden import DATA
from mindspore import nn, ops
from traced import trace

from kimi_vl.export import memory, plan_export
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.cli import cli
from kimi_vl.export.liveness import live
from kimi_vl.export.nodes import read_nodes
from kimi_vl.export.plan import open_converted
from kimi_vl.export.trace import Tracer
from kimi_vl.modeling.kernels import plain
from kimi_vl.modeling.parameters import empty_parameter

BF16 = "tiny8-bf16"
KB = 1024
X = np.zeros((16, 16), np.float32)  # 1 kB


def height(cell: nn.Cell, *arrays: np.ndarray) -> int:
    return live(read_nodes(trace(cell, *arrays))).nbytes


class Chain(nn.Cell):
    def construct(self, x):
        return ops.square(ops.square(ops.square(ops.square(x))))


class Kept(nn.Cell):
    """The first value is needed again at the end."""

    def construct(self, x):
        first = ops.square(x)
        return ops.square(ops.square(ops.square(first))) + first


class Viewed(nn.Cell):
    def construct(self, x):
        y = ops.reshape(ops.square(ops.reshape(x, (4, 64))), (256,))
        return ops.square(y.expand_dims(0))


class Parts(nn.Cell):
    """A tuple of which one element is needed longer than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.split = ops.Split(0, 2)

    def construct(self, x):
        a, b = self.split(x)
        return ops.square(ops.square(ops.square(a))) + b


class Written(nn.Cell):
    """A write into a parameter, and a read of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = empty_parameter((1024, 16), ms.float32, "cache.0.0")
        self.weight = empty_parameter((16, 16), ms.float32)
        self.update = ops.ScatterUpdate()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x, at):
        cache = self.update(self.cache, at, self.matmul(x, self.weight))
        return self.matmul(cache[:16], x)


# Each has 1 kB of input.
@pytest.mark.parametrize(
    "cell, kilobytes",
    [
        (Chain(), 1 + 2),  # an operand and a result
        (Kept(), 1 + 3),  # and the first
        (Viewed(), 1 + 2),  # views are no memory
        (Parts(), 1 + 1.5 + 0.5),  # the split: both its halves; then a, its square and b
    ],
    ids=["chain", "kept", "views", "parts"],
)
def test_a_tensor_lives_from_its_maker_to_its_last_use(cell, kilobytes):
    constants = 256  # bytes at most: shapes and axes are none
    assert kilobytes * KB - 0.5 * KB <= height(cell, X) <= kilobytes * KB + constants


def test_neither_parameters_nor_writes_into_them_are_counted():
    graph = read_nodes(trace(Written(), X, np.zeros(16, np.int32)))
    assert [graph.parameters[v].nbytes for v in graph.caches] == [64 * KB]
    assert live(graph).nbytes < 5 * KB


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "ascend"])
def test_the_first_layers_need_what_the_whole_network_needs(target, tmp_path):
    raw = json.loads((DATA / BF16 / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = raw["vision_config"]["num_hidden_layers"] = 4
    weights = open_converted(sparse.converted(tmp_path / "ckpt", raw))
    plan = plan_export(weights, seq=(256,), prefill_chunk=32, image_patches=(256,), target=target)
    short = plan.shortened().config
    assert (short.text.num_hidden_layers, short.vision.num_hidden_layers) == (3, 2)
    tracer = Tracer(plan.config, plan.target, plan.batch)
    whole = {g.name: live(read_nodes(tracer.trace(g))).nbytes for g in plan.graphs}
    assert memory.estimate(plan) == memory.of_graphs(plan, whole)
    assert memory.estimate(plan).live == max(whole.values())


def test_one_expert_is_copied_at_a_time():
    config = SimpleNamespace(num_experts_per_tok=2, n_routed_experts=16)
    shapes = {"x": (2, 8), "gate_up": (16, 8, 6), "down": (16, 3, 8), "indices": (2, 2), "weights": (2, 2)}
    arrays = [np.zeros(s, np.int32 if name == "indices" else np.float32) for name, s in shapes.items()]
    nodes = read_nodes(trace(plain.Experts(config), *arrays)).nodes
    before: dict[str, set[str]] = {}  # what has to be done first, by value
    for node in nodes:
        inputs = [v for v in node.inputs if v in before]
        before[node.output] = set(inputs).union(*(before[v] for v in inputs))
    copies = [node.output for node in nodes if node.operator == "Gather"]
    assert len(copies) == 8
    assert sorted(len(before[copy].intersection(copies)) for copy in copies) == list(range(8))


def test_every_graph_for_a_device_has_a_cache_of_its_own():
    weights = open_converted(bundles.converted(BF16))
    slot = weights.config.text.num_hidden_layers * weights.config.text.latent_dim
    sizes = {"seq": (512,), "prefill_chunk": 256, "batch": 2, "taps": True}
    graphs = 2 * (256 + 512)  # prefill and decode; those for verification are not kept
    assert plan_export(weights, target="ascend", **sizes).cache_bytes == 2 * graphs * slot * 2
    several = sizes | {"prefill_chunk": (64, 256)}
    assert plan_export(weights, target="ascend", **several).cache_bytes == 2 * (graphs + 256 + 512) * slot * 2
    assert plan_export(weights, target="lite", **sizes).cache_bytes == 2 * 512 * slot * 2
    assert plan_export(weights, target="cpu", **sizes).cache_bytes == 2 * 512 * slot * 4


def test_the_manifest_says_what_each_graph_needs():
    graphs = Bundle.load(bundles.bundle(BF16)).graphs
    config = open_converted(bundles.converted(BF16)).config.text
    logits = 64 * config.vocab_size * 4  # of the prefill graph that gives all
    assert graphs["prefill-logits-64x256"].live_bytes > logits > graphs["decode-256"].live_bytes > 0
    assert graphs["prefill-logits-64x256-taps"].live_bytes > graphs["prefill-logits-64x256"].live_bytes


def test_a_device_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    sizes = {"seq": (128,), "prefill_chunk": 64, "image_patches": (64,)}
    plan = plan_export(open_converted(bundles.converted(BF16)), target="cpu", **sizes)
    needed = memory.estimate(plan)
    monkeypatch.setattr("kimi_vl.export.cli.estimate", lambda same: needed)  # traced once
    arguments = [
        "--src",
        str(bundles.converted(BF16)),
        "--target",
        "cpu",
        "--seq",
        "128",
        "--prefill-chunk",
        "64",
        "--image-patches",
        "64",
        "--dst",
        str(tmp_path / "x"),
    ]
    fits = CliRunner().invoke(
        cli, [*arguments, "--dry-run", "--json", "--device-memory", str(needed.total / 1e9)]
    )
    assert fits.exit_code == 0 and json.loads(fits.stdout)["device"]["total"] == needed.total
    small = CliRunner().invoke(cli, [*arguments, "--device-memory", str((needed.total - 1) / 1e9)])
    assert small.exit_code == 2 and list(tmp_path.iterdir()) == []
    (line,) = [line for line in small.stderr.splitlines() if line.startswith("export-mindir: ")]
    for part in ("of weights", "of cache", f"live at once in {needed.graph}", "; reduce --"):
        assert part in line


def memory_of(**bytes_: int) -> memory.DeviceMemory:
    return memory.DeviceMemory(**{"weights": 8, "caches": 1, "live": 1, "graph": "decode-256", **bytes_})


@pytest.mark.parametrize(
    "needed, advice",
    [
        (memory_of(weights=20), "the weights alone are too large for one device"),
        (memory_of(caches=5), "reduce --seq or --batch"),
        (memory_of(live=5, graph="vision-1024"), "reduce --image-patches or --seq"),
        (memory_of(live=5, graph="prefill-256x512"), "reduce --prefill-chunk or --seq"),
    ],
    ids=["weights", "caches", "vision", "prefill"],
)
def test_the_message_names_what_to_reduce(needed, advice):
    with pytest.raises(memory.ExportError, match=f"^--device-memory: 1e-08 GB, but .*; {advice}$"):
        needed.check(1e-8)
    needed.check(needed.total / 1e9)
