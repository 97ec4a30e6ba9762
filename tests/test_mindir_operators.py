"""Rules of the interpreter against MindSpore's own CPU kernels: the same cell, run by MindSpore, and traced and interpreted."""

from __future__ import annotations

from importlib.metadata import version

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from traced import Apply, interpret, trace

from kimi_vl.verify.mindir import read_graph
from kimi_vl.verify.mindir.rules import RULES
from kimi_vl.verify.mindir.witnesses import KERNEL, WITNESSES

pytestmark = pytest.mark.usefixtures("one_torch_thread")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6, 8)).astype(np.float32)
Y = RNG.standard_normal((4, 6, 8)).astype(np.float32)
M = RNG.standard_normal((4, 6)).astype(np.float32)
N = RNG.standard_normal((6, 4)).astype(np.float32)
B = RNG.standard_normal((6,)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
TIES = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, 4, 5, 4, 1]], np.float32)
IDS = np.array([3, 0, 2, 2], np.int32)
EACH = RNG.integers(0, 6, (4, 3)).astype(np.int32)
WHOLE = np.array([[7, -7, 2], [-2, 0, 9]], np.int32)
TRUE = X > 0


class Slices(nn.Cell):
    def construct(self, x):
        return x[1], x[:, 2], x[..., 1::2], x[:, None, 1:3], x[-1, -3:-1], x[1:3, :, 0]


class Comparisons(nn.Cell):
    def construct(self, x, y):
        return x > y, x >= y, x < y, x <= y, x == y, x != y


class Arithmetic(nn.Cell):
    def construct(self, x, y):
        return x + y, x - y, x * y, x / y, x // y, x % y, -x, ops.maximum(x, y), ops.minimum(x, y)


class Numbers(nn.Cell):
    def construct(self, x):
        return x + 1, 2.5 * x, 1 - x, x / 3.0, x**2


class Functions(nn.Cell):
    def construct(self, x):
        return (
            ops.exp(x), ops.sigmoid(x), ops.erf(x), ops.square(x), ops.abs(x), ops.sin(x), ops.cos(x),
            ops.silu(x), ops.gelu(x, "none"), ops.GeLU()(x), ops.softmax(x, 1), ops.relu(x), ops.floor(x),
        )  # fmt: skip


class Roots(nn.Cell):
    def construct(self, x):
        return ops.sqrt(x), ops.rsqrt(x), ops.log(x)


class Booleans(nn.Cell):
    def construct(self, x, y):
        return ops.logical_and(x, y), ops.logical_or(x, y), ops.logical_not(x)


class Casts(nn.Cell):
    def construct(self, x):
        return ops.cast(x, ms.int32), ops.cast(x, ms.int64), ops.cast(x, ms.bool_), ops.cast(x, ms.float16)


class Layout(nn.Cell):
    def construct(self, x):
        return (
            ops.reshape(x, (8, -1)), ops.transpose(x, (2, 0, 1)), ops.expand_dims(x, -1),
            ops.broadcast_to(x, (2, 4, 6, 8)), ops.tile(x, (1, 2, 3)), ops.slice(x, (1, 0, 2), (2, -1, 3)),
            ops.squeeze(x[:1], 0),
        )  # fmt: skip


class Parts(nn.Cell):
    def construct(self, x, y):
        return (
            ops.concat((x, y), 1), ops.stack((x, y), 1), ops.unstack(x, 1)[2], ops.split(x, 3, 1)[1],
            ops.split(x, (1, 5), 1)[1], ops.chunk(x, 2, 2)[1],
        )  # fmt: skip


class Reductions(nn.Cell):
    def construct(self, x):
        return (
            ops.ReduceSum(True)(x, 1), ops.ReduceSum()(x, (0, 2)), ops.ReduceSum()(x), ops.ReduceMean(True)(x, -1),
            ops.ReduceMax()(x, 1), ops.ReduceMin(True)(x, 0), ops.cumsum(x, 1), ops.argmax(x, 2),
        )  # fmt: skip


class Norms(nn.Cell):
    def construct(self, x, gamma, beta):
        return ops.LayerNorm(-1, -1, 1e-5)(x, gamma, beta)[0]


class GatherElements(nn.Cell):
    def construct(self, x, indices):
        return ops.gather_elements(x, 1, indices)


class Written(nn.Cell):
    """Before, between and after two writes; the last value of the parameter itself."""

    def __init__(self, write):
        super().__init__()
        self.cache = ms.Parameter(ms.Tensor(np.arange(24, dtype=np.float32).reshape(6, 4)), name="cache")
        self.write = write

    def construct(self, indices, rows):
        before = self.cache * 1.0
        given = self.write(self.cache, indices, rows) * 2.0
        between = self.cache + 1.0
        self.write(self.cache, indices, rows + 1.0)
        return before, given, between, self.cache * 1.0


class Ordered(nn.Cell):
    """A write after a Depend, and one into what another write gave."""

    def __init__(self):
        super().__init__()
        self.cache = ms.Parameter(ms.Tensor(np.arange(24, dtype=np.float32).reshape(6, 4)), name="cache")
        self.write = ops.ScatterUpdate()

    def construct(self, indices, rows):
        first = self.write(ops.depend(self.cache, rows * 2.0), indices, rows)
        second = self.write(first, indices - 1, rows + 1.0)
        return second + self.cache


class Assigned(nn.Cell):
    def __init__(self):
        super().__init__()
        self.total = ms.Parameter(ms.Tensor(np.ones((2, 4), np.float32)), name="total")

    def construct(self, x):
        before = self.total * 1.0
        ops.assign(self.total, x + 2.0)
        return before, self.total * 3.0


ROWS = RNG.standard_normal((2, 4)).astype(np.float32)
CASES = {
    "slices": (Slices(), X),
    "comparisons": (Comparisons(), np.round(X), np.round(Y)),
    "arithmetic": (Arithmetic(), X, Y),
    "numbers": (Numbers(), X),
    "functions": (Functions(), X),
    "roots": (Roots(), POSITIVE),
    "booleans": (Booleans(), TRUE, Y > 0),
    "casts": (Casts(), 3 * X),
    "layout": (Layout(), X),
    "parts": (Parts(), X, Y),
    "reductions": (Reductions(), X),
    "norms": (Norms(), X, X[0, 0], Y[0, 0]),
    "integers": (Apply(ops.floor_div), WHOLE, np.full_like(WHOLE, 2)),
    "remainders": (Apply(ops.floor_mod), WHOLE, np.full_like(WHOLE, 4)),
    "select": (Apply(ops.select), TRUE, X, Y),
    "masked fill": (Apply(ops.masked_fill, -1e30), X, TRUE),
    "matmul": (Apply(ops.MatMul()), M, N),
    "matmul, transposed": (Apply(ops.MatMul(transpose_a=True, transpose_b=True)), M, N),
    "batch matmul": (Apply(ops.BatchMatMul(transpose_b=True)), X, Y),
    "batch matmul, transposed": (Apply(ops.BatchMatMul(transpose_a=True)), X, Y),
    "bias": (Apply(ops.BiasAdd()), M, B),
    "gather": (Apply(ops.gather, 0), X, IDS),
    "gather, axis 1": (Apply(ops.gather, 1), X, EACH),
    "gather elements": (GatherElements(), M, EACH),
    "one-hot": (Apply(ops.OneHot(), 5, ms.Tensor(2.0, ms.float32), ms.Tensor(-1.0, ms.float32)), EACH),
    "top-k with ties": (Apply(ops.TopK(), 3), TIES),
    "sort": (Apply(ops.Sort()), X),
    "sort, descending": (Apply(ops.Sort(axis=1, descending=True)), X),
    "scatter update": (Written(ops.ScatterUpdate()), np.array([5, 1], np.int32), ROWS),
    "scatter nd update": (Written(ops.ScatterNdUpdate()), np.array([[5], [1]], np.int32), ROWS),
    "ordered writes": (Ordered(), np.array([5, 1], np.int32), ROWS),
    "assign": (Assigned(), ROWS),
}


@pytest.mark.parametrize("name", CASES)
def test_what_an_operator_gives_is_what_its_cpu_kernel_gives(name):
    cell, *arrays = CASES[name]
    parameters = {p.name: p.asnumpy() for p in cell.get_parameters()}
    got = interpret(cell, *arrays, parameters=parameters, arithmetic="rounded")
    want = cell.compile_and_run(*map(ms.Tensor, arrays))
    want = [t.asnumpy() for t in (want if isinstance(want, tuple) else (want,))]
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=2e-6)  # MindSpore's own exp is off by 3e-6


@pytest.mark.skipif(version("mindspore").startswith("2.7."), reason="MindSpore 2.7 has other operators")
def test_the_table_of_witnesses_names_what_was_run_beside_a_kernel():
    run = set().union(*(read_graph(trace(cell, *arrays)).operators for cell, *arrays in CASES.values()))
    assert {o for o, witness in WITNESSES.items() if witness == KERNEL} == run & set(RULES)
