"""The interpreter's rules of operators that only a device runs: traced as bundles are, against a second witness.

Each test says which: an example of MindSpore's docstring, whose printed values are in the test, what a published test of
the operator expects, or a second formulation that shares nothing with the rule.
"""

from __future__ import annotations

from importlib.metadata import version

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
import torch
from mindspore import mint, nn, ops
from mindspore.ops import auto_generate as G
from torch.nn import functional as F
from traced import Apply, interpret, interpreter, run, trace

from kimi_vl.modeling.parameters import empty_parameter
from kimi_vl.verify.mindir import Interpreter, InterpreterError, read_graph
from kimi_vl.verify.mindir.rules import RULES
from kimi_vl.verify.mindir.witnesses import TORCH, WITNESSES, unwitnessed

pytestmark = pytest.mark.usefixtures("one_torch_thread")
BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(1)
ALL = 2147483647


def normal(*shape, dtype=BF16) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32) if array.dtype in (BF16, np.float16) else array)


def close(got: np.ndarray, want, bar: float = 2e-6) -> None:
    """Within rounding of fp32."""
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=bar, atol=bar)


# Docstring examples --------------------------------------------------------------------------------------------------

ONE_TWO_THREE = np.array([[1, 2, 3], [1, 2, 3]], np.float32)
ONES = np.ones(3, np.float32)


def test_rms_norm_docstring():
    y, rstd = interpret(Apply(ops.rms_norm, 1e-6), ONE_TWO_THREE, ONES)
    close(y, [[0.46290997, 0.92581993, 1.3887299]] * 2, 1e-7)
    close(rstd, [[0.46290997]] * 2, 1e-7)


def test_add_rms_norm_docstring():
    half = ONE_TWO_THREE / 2
    y, rstd, added = interpret(Apply(ops.add_rms_norm, 1e-6), half, half, ONES)
    close(y, [[0.46290997, 0.92581993, 1.3887299]] * 2, 1e-7)
    close(rstd, [[0.46290997]] * 2, 1e-7)
    close(added, ONE_TWO_THREE)


def test_layer_norm_docstring():
    y, _, _ = interpret(Apply(ops.LayerNorm()), ONE_TWO_THREE, ONES, ONES)
    close(y, [[-0.2247448, 1.0, 2.2247448]] * 2, 1e-6)


class LayerNormExt(nn.Cell):
    def construct(self, x, weight, bias):
        return G.LayerNormExt()(x, (3,), weight, bias, 1e-7)


def test_layer_norm_ext_docstring():
    y, mean, rstd = interpret(LayerNormExt(), ONE_TWO_THREE, ONES, 0 * ONES)
    close(y, [[-1.2247448, 0.0, 1.2247448]] * 2, 1e-6)
    close(mean, [[2.0], [2.0]])
    close(rstd, [[1.2247447]] * 2, 1e-6)


def test_swiglu_docstring():
    x = np.array([[-0.12, 0.123, 31.122], [2.1223, 4.1212121217, 0.3123]], np.float32)
    (y,) = interpret(Apply(G.swiglu, 0), x)
    close(y, [[-0.11970687, 0.2690224, 9.7194]], 1e-6)


def test_gelu_docstring():
    close(
        interpret(Apply(ops.GeLU()), np.array([1.0, 2.0, 3.0], np.float32))[0],
        [0.841192, 1.9545976, 2.9963627],
        1e-6,
    )


@pytest.mark.parametrize(
    ("largest", "values", "indices"),
    [
        (True, [[0.9673, 0.5368], [0.6525, 0.4685], [0.9675, 0.8230]], [[3, 0], [1, 2], [2, 3]]),
        (False, [[0.2447, 0.4302], [0.1868, 0.4388], [0.3563, 0.5152]], [[1, 2], [3, 0], [0, 1]]),
    ],
)
def test_topk_ext_docstring(largest, values, indices):
    x = np.array(
        [
            [0.5368, 0.2447, 0.4302, 0.9673],
            [0.4388, 0.6525, 0.4685, 0.1868],
            [0.3563, 0.5152, 0.9675, 0.8230],
        ],
        np.float32,
    )
    got = interpret(Apply(G.topk_ext, 2, 1, largest, True), x)
    close(got[0], values, 1e-7)
    assert got[1].dtype == np.int64 and got[1].tolist() == indices


def test_pad_docstring():
    x = np.array([[-0.1, 0.3, 3.6], [0.4, 0.5, -3.2]], np.float32)
    want = np.zeros((5, 6), np.float32)
    want[1:3, 2:5] = x
    close(interpret(Apply(ops.Pad(((1, 2), (2, 1)))), x)[0], want)


def test_sort_docstring():
    x = np.array([[8, 2, 1], [5, 9, 3], [4, 6, 7]], np.float16)
    values, indices = interpret(Apply(ops.Sort()), x)
    close(values, [[1, 2, 8], [3, 5, 9], [4, 6, 7]])
    assert indices.dtype == np.int32 and indices.tolist() == [[2, 1, 0], [2, 0, 1], [0, 1, 2]]


def test_topk_docstring():
    values, indices = interpret(Apply(ops.TopK(), 3), np.array([1, 2, 3, 4, 5], np.float16))
    assert values.tolist() == [5, 4, 3] and indices.dtype == np.int32 and indices.tolist() == [4, 3, 2]


GROUPED_X = np.array([[0], [1], [2], [2], [1], [1]], np.float16) * np.ones(4, np.float16)
GROUPED_W = np.arange(32, dtype=np.float16).reshape(4, 4, 2)
GROUPED_Y = [[0, 0], [44, 48], [88, 96], [152, 160], [108, 112], [108, 112]]


class Grouped(nn.Cell):
    def __init__(self, split_item=3, group_type=0):
        super().__init__()
        self.product = G.GroupedMatmul(split_item, group_type)

    def construct(self, x, weight, groups):
        return self.product([x], [weight], None, None, None, None, None, groups)[0]


class GroupedV2(nn.Cell):
    def construct(self, x, weight):
        return G.GroupedMatmulV2()([x], [weight], None, None, None, None, None, (1, 3, 4, 6), 3, 0)[0]


class GroupedV4(nn.Cell):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def construct(self, x, weight, groups):
        return G.grouped_matmul_v4(
            [x], [weight], group_list=groups, split_item=3, group_type=0, group_list_type=self.kind
        )[0]


class Pairs(nn.Cell):
    def construct(self, x, y, v, w):
        return G.grouped_matmul_v4([x, y], [v, w], split_item=0, group_type=-1)


def test_grouped_matmul_docstring():
    close(interpret(Grouped(), GROUPED_X, GROUPED_W, np.array([1, 3, 4, 6]))[0], GROUPED_Y)


def test_grouped_matmul_v4_docstring():
    close(interpret(GroupedV4(1), GROUPED_X, GROUPED_W, np.array([1, 2, 1, 2]))[0], GROUPED_Y)


def test_grouped_matmul_v4_of_mindspore_2_7_0_has_no_output_dtype():
    groups = np.array([1, 2, 1, 2])
    model = trace(GroupedV4(1), GROUPED_X, GROUPED_W, groups)
    (product,) = (n for n in model.graph.node if "GroupedMatmulV4" in n.op_type)
    del product.input[16:]
    close(run(Interpreter(read_graph(model), {}), GROUPED_X, GROUPED_W, groups)[0], GROUPED_Y)


def test_grouped_matmul_v2_and_v4_by_ends_as_the_docstring_of_the_others():
    close(interpret(GroupedV2(), GROUPED_X, GROUPED_W)[0], GROUPED_Y)
    close(interpret(GroupedV4(0), GROUPED_X, GROUPED_W, np.array([1, 3, 4, 6]))[0], GROUPED_Y)


def test_moe_token_permute_docstring():
    tokens = np.array([[1], [7], [2], [1], [2], [3]], BF16) * np.ones(3, BF16)
    permuted, rows = interpret(Apply(ops.moe_token_permute), tokens, np.array([5, 0, 3, 1, 2, 4], np.int32))
    close(permuted, np.array([[7], [1], [2], [2], [3], [1]]) * np.ones(3))
    assert rows.tolist() == [5, 0, 3, 1, 2, 4]


class Routing(nn.Cell):
    """MoeInitRoutingV2 with these numbers."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers
        self.route = G.MoeInitRoutingV2()

    def construct(self, x, experts):
        return self.route(x, experts, *self.numbers)


def test_moe_init_routing_docstring():
    x = np.array([[0.1, 0.2, 0.3], [0.2, 0.7, 0.8], [0.3, 0.3, 0.5]], np.float16)
    experts = np.array([[0, 1, 1], [2, 1, 1], [0, 0, 0]], np.int32)
    expanded, rows, *_ = interpret(Routing(3, 2, 3, 1, 0, False), x, experts)
    close(expanded, [[x[0], x[2]], [x[0], x[0]], [x[1], 0 * x[1]]])
    assert rows.tolist() == [0, 2, 3, 4, -1, -1, 1, -1, -1]


class IndexCopy(nn.Cell):
    def __init__(self, shape=(6, 4), dtype=ms.bfloat16):
        super().__init__()
        self.cache = empty_parameter(shape, dtype, "cache")

    def construct(self, indices, rows):
        return G.InplaceIndexCopy()(self.cache, 0, indices, rows)


has_index_copy = pytest.mark.skipif(
    not hasattr(G, "InplaceIndexCopy"), reason="this MindSpore has no InplaceIndexCopy"
)


@has_index_copy
def test_index_copy_docstring():
    cache, rows = np.ones((5, 3), np.float32), np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    cell = IndexCopy((5, 3), ms.float32)
    (got,) = interpret(cell, np.array([4, 0, 2]), rows, parameters={"cache": cache})
    close(got, [[4, 5, 6], [1, 1, 1], [7, 8, 9], [1, 1, 1], [1, 2, 3]])


# Published operator tests --------------------------------------------------------------------------------------------


def test_moe_token_unpermute_as_mindspores_device_test_expects():
    """tests/st/ops, test_moe_token_unpermute."""
    permuted = np.array([[1], [0], [0], [3], [2], [1], [2], [3]], BF16) * np.ones(3, BF16)
    probs = np.full((4, 2), 0.5, BF16)
    (got,) = interpret(
        Apply(ops.moe_token_unpermute), permuted, np.array([0, 6, 7, 5, 3, 1, 2, 4], np.int32), probs
    )
    close(got, np.array([[1.5], [2.0], [1.5], [1.0]]) * np.ones(3))


@pytest.mark.parametrize(("flag", "numbers"), [(1, [2, 4, 6]), (2, [2, 2, 2])])
def test_dropless_routing_as_canns_operator_test_has_it(flag, numbers):
    """The data of the example in aclnnMoeInitRoutingV2's document; the numbers that moe_init_routing_v2/tests/st gives."""
    x = np.array([[0.1], [0.2], [0.3]], np.float32) * np.ones(4, np.float32)
    experts = np.array([[1, 2], [0, 1], [0, 2]], np.int32)
    expanded, rows, counts, _ = interpret(Routing(0, 0, 3, 0, flag, False), x, experts)
    close(expanded, x[[1, 2, 0, 1, 0, 2]])
    assert rows.tolist() == [2, 4, 0, 3, 1, 5] and counts.tolist() == numbers


def test_a_cache_write_as_mindspores_device_test_expects():
    """The data of the example of aclnnInplaceScatterUpdate, what test_kv_cache_scatter_update in tests/st/ops makes of it."""
    cache = np.repeat(np.array([1, 2], np.float32), 8).reshape(1, 1, 2, 8)
    rows = np.full((1, 1, 1, 8), 3, np.float32)
    cell = CacheWrite(-2, (1, 1, 2, 8), ms.float32)
    made = interpreter(cell, np.array([1]), rows, parameters={"cache": cache})
    run(made, np.array([1]), rows)
    np.testing.assert_array_equal(made.parameters.read("cache")[0, 0], [[1] * 8, [3] * 8])


# Second formulations: experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "cumulative"), [(1, True), (2, False)])
def test_dropless_routing_lists_each_experts_tokens_in_their_order(flag, cumulative):
    x, experts = normal(7, 4), RNG.integers(0, 5, (7, 3)).astype(np.int32)
    experts[experts == 3] = 0  # one expert has no token
    expanded, rows, numbers, _ = interpret(Routing(0, 0, 5, 0, flag, False), x, experts)
    listed = [(t, j) for e in range(5) for t in range(7) for j in range(3) if experts[t, j] == e]
    close(expanded, x[[t for t, _ in listed]].astype(np.float32))
    assert [listed[r] for r in rows] == [(t, j) for t in range(7) for j in range(3)]
    counts = [int((experts == e).sum()) for e in range(5)]
    assert numbers.tolist() == (np.cumsum(counts).tolist() if cumulative else counts)


def test_what_was_permuted_comes_back():
    tokens, indices = normal(6, 4), RNG.integers(0, 4, (6, 2)).astype(np.int32)
    permuted, rows = interpret(Apply(ops.moe_token_permute), tokens, indices)
    probs = np.array([[0.75, 0.25]] * 6, BF16)
    (back,) = interpret(Apply(ops.moe_token_unpermute), permuted.astype(BF16), rows, probs)
    close(back, tokens.astype(np.float32))
    (each,) = interpret(Apply(ops.moe_token_unpermute), permuted.astype(BF16), rows)
    close(each, np.repeat(tokens, 2, 0).astype(np.float32))


class Mixture(nn.Cell):
    """The experts of a layer as a device would run them."""

    def construct(self, x, experts, probs, gate_up, down):
        rows, places, counts, _ = G.MoeInitRoutingV2()(x, experts, 0, 0, 4, 0, 2, False)
        counts = ops.cast(counts, ms.int64)
        h = G.grouped_matmul_v4(
            [rows], [gate_up], group_list=counts, split_item=3, group_type=0, group_list_type=1
        )[0]
        y = G.grouped_matmul_v4(
            [G.swiglu(h, -1)], [down], group_list=counts, split_item=3, group_type=0, group_list_type=1
        )[0]
        return ops.moe_token_unpermute(y, places, probs)


def test_an_expert_layer_is_the_sum_of_its_experts_token_by_token():
    x, gate_up, down = normal(5, 16), normal(4, 16, 16), normal(4, 8, 16)
    experts = np.array([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0]], np.int32)  # nobody chose expert 1
    probs = RNG.random((5, 2)).astype(BF16)
    (got,) = interpret(Mixture(), x, experts, probs, gate_up, down)
    want = torch.zeros(5, 16)
    for t in range(5):
        for j, e in enumerate(experts[t]):
            gate, up = (tensor(x)[t] @ tensor(gate_up)[e]).chunk(2)
            want[t] += tensor(probs)[t, j] * ((gate * torch.sigmoid(gate) * up) @ tensor(down)[e])
    close(got, want, 1e-5)


def test_rows_beyond_the_last_group_are_nan():
    (y,) = interpret(GroupedV4(1), GROUPED_X, GROUPED_W, np.array([1, 0, 3, 0]))
    assert np.isfinite(y[:4]).all() and np.isnan(y[4:]).all()


def test_a_grouped_product_of_lists_is_a_product_of_each_pair():
    x, y, v, w = normal(3, 4), normal(5, 6), normal(4, 2), normal(6, 7)
    got = interpret(Pairs(), x, y, v, w)
    close(got[0], tensor(x) @ tensor(v), 1e-5)
    close(got[1], tensor(y) @ tensor(w), 1e-5)


# Second formulations: attention --------------------------------------------------------------------------------------

LAYOUTS = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(0, 2, 1, 3),
    "BSH": lambda x: x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1),
    "SBH": lambda x: x.transpose(2, 0, 1, 3).reshape(x.shape[2], x.shape[0], -1),
}


def packed(layout: str, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(LAYOUTS[layout](x))


def sdpa(q, k, v, keep=None, scale=0.3):
    """Torch's own attention, which knows heads that share keys, and a mask of what is kept."""
    keep = None if keep is None else torch.from_numpy(keep.copy())
    return F.scaled_dot_product_attention(
        tensor(q), tensor(k), tensor(v), attn_mask=keep, scale=scale, enable_gqa=True
    ).numpy()


class Infer(nn.Cell):
    def __init__(self, layout, heads=4, kv_heads=2, inner_precise=0, sparse_mode=0, window=ALL):
        super().__init__()
        self.attention = G.FusedInferAttentionScore(
            heads, 0.3, window, window, layout, kv_heads, sparse_mode, inner_precise
        )

    def construct(self, q, k, v, mask=None, lengths=None, kv_lengths=None):
        return self.attention(q, (k,), (v,), None, mask, lengths, kv_lengths)[0]


class InferLengths(Infer):
    def construct(self, q, k, v, lengths, kv_lengths):
        return self.attention(q, (k,), (v,), None, None, lengths, kv_lengths)[0]


class MaskedLengths(Infer):
    def construct(self, q, k, v, mask, lengths, kv_lengths):
        return self.attention(q, (k,), (v,), None, mask, lengths, kv_lengths)[0]


class Padded(Infer):
    """Left padding; the mask is left out in sparse_mode 0 unless it is `masked`."""

    def __init__(self, layout, sparse_mode=0, masked=False):
        super().__init__(layout, sparse_mode=sparse_mode)
        self.masked = masked or sparse_mode > 0

    def construct(self, q, k, v, mask, lengths, kv_lengths, query_padding, kv_padding):
        mask = mask if self.masked else None
        return self.attention(
            q, (k,), (v,), None, mask, lengths, kv_lengths,
            None, None, None, None, None, None, None, None, query_padding, kv_padding,
        )[0]  # fmt: skip


class PaddedAlone(Infer):
    def construct(self, q, k, v, padding):
        return self.attention(
            q, (k,), (v,), None, None, None, None,
            None, None, None, None, None, None, None, None, padding, padding,
        )[0]  # fmt: skip


class Prompt(nn.Cell):
    def __init__(self, layout, heads=4, kv_heads=2):
        super().__init__()
        self.attention = G.PromptFlashAttention(heads, 0.3, ALL, ALL, layout, kv_heads, 0, 1)

    def construct(self, q, k, v, mask=None):
        return self.attention(q, k, v, mask, None, None, None, None, None, None, None, None)


class Single(nn.Cell):
    def __init__(self, layout, heads=4, kv_heads=2):
        super().__init__()
        self.attention = G.IncreFlashAttention(heads, layout, 0.3, kv_heads)

    def construct(self, q, k, v, mask, lengths):
        return self.attention(q, (k,), (v,), mask, lengths)


class Score(nn.Cell):
    def __init__(self, layout, heads=4):
        super().__init__()
        self.attention = G.FlashAttentionScore(heads, 1.0, 0.3, ALL, ALL, 0, layout, 0)

    def construct(self, q, k, v, mask):
        return self.attention(q, k, v, None, None, None, mask, None, None, None)


Q, K, V = normal(2, 4, 6, 16), normal(2, 2, 10, 16), normal(2, 2, 10, 16)
KEEP = RNG.random((2, 1, 6, 10)) < 0.6
KEEP[..., 0] = True


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("mask", ["bool", "uint8"])
def test_fused_infer_attention_is_torchs(layout, mask):
    q, k, v = (packed(layout, x) for x in (Q, K, V))
    (got,) = interpret(Infer(layout), q, k, v, (~KEEP).astype(mask))
    close(got, packed(layout, sdpa(Q, K, V, KEEP)), 1e-5)


def test_its_output_may_be_of_another_layout():
    (got,) = interpret(Infer("BNSD_BSND"), Q, K, V, ~KEEP)
    close(got, packed("BSND", sdpa(Q, K, V, KEEP)), 1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (1, 6, 10), (2, 6, 10), (1, 1, 6, 10)])
def test_its_mask_may_be_shared(shape):
    keep = np.ascontiguousarray(np.broadcast_to(KEEP[:, 0] if shape[0] == 2 else KEEP[1, 0], shape))
    (got,) = interpret(Infer("BNSD"), Q, K, V, ~keep)
    close(
        got, sdpa(Q, K, V, np.broadcast_to(keep if len(shape) != 3 else keep[:, None], (2, 1, 6, 10))), 1e-5
    )


def test_lengths_are_what_is_read_and_what_is_written():
    k, v = K.copy(), V.copy()
    k[0, :, 7:], v[0, :, 7:] = np.nan, np.nan  # past the length: never read
    (got,) = interpret(InferLengths("BNSD"), Q, k, v, np.array([4, 6]), np.array([7, 10]))
    close(got[0, :, :4], sdpa(Q[:1, :, :4], K[:1, :, :7], V[:1, :, :7])[0], 1e-5)
    close(got[1], sdpa(Q[1:], K[1:], V[1:])[0], 1e-5)
    assert np.isnan(got[0, :, 4:]).all()


@pytest.mark.parametrize(("inner_precise", "row"), [(0, np.nan), (2, 0.0)])
def test_a_row_whose_keys_are_all_masked_is_nan_or_corrected(inner_precise, row):
    keep = KEEP.copy()
    keep[1, 0, 2] = False
    (got,) = interpret(Infer("BNSD", inner_precise=inner_precise), Q, K, V, ~keep)
    np.testing.assert_array_equal(got[1, :, 2], np.full((4, 16), row, np.float32))
    kept = np.delete(np.arange(6), 2)
    close(got[1][:, kept], sdpa(Q, K, V, KEEP)[1][:, kept], 1e-5)


@pytest.mark.parametrize("shape", [(2, 10), (2, 1, 10), (2, 1, 1, 10)])
def test_one_query_reads_as_many_keys_as_there_are(shape):
    q = normal(2, 4, 1, 16)
    keep = KEEP[:, :, :1]
    (got,) = interpret(Infer("BNSD"), q, K, V, ~keep.reshape(shape))
    close(got, sdpa(q, K, V, keep), 1e-5)
    lengths = np.array([5, 9])
    short = np.arange(10)[None, None, None] < lengths[:, None, None, None]
    (got,) = interpret(InferLengths("BNSD"), q, K, V, lengths * 0, lengths)  # the query's length is ignored
    close(got, sdpa(q, K, V, short), 1e-5)


TRIANGLE = np.triu(np.ones((2048, 2048), bool), 1)


def visible(mode, before, after, queries, keys):
    """Keys [S1, S2] that each query sees, place by place, for rows that hold something at `queries` and `keys`."""
    keep = np.zeros((6, 10), bool)
    for i, place in enumerate(queries):
        own = i if mode == 2 else i + len(keys) - len(queries)
        for j, key in enumerate(keys):
            keep[place, key] = own - before <= j <= own + after if mode == 4 else j <= own
    return keep


@pytest.mark.parametrize("mode", [2, 3, 4])
@pytest.mark.parametrize(("before", "after"), [(ALL, 0), (2, 1), (0, 3)])
def test_a_sparse_mode_hides_by_position(mode, before, after):
    cell = Infer("BNSD", sparse_mode=mode)
    cell.attention = G.FusedInferAttentionScore(4, 0.3, before, after, "BNSD", 2, mode, 0)
    (got,) = interpret(cell, Q, K, V, TRIANGLE)
    keep = np.stack([visible(mode, before, after, range(6), range(10))] * 2)[:, None]
    close(got, sdpa(Q, K, V, keep), 1e-5)


def test_a_causal_triangle_hangs_at_the_end_of_the_actual_lengths():
    lengths, kv_lengths = np.array([4, 6]), np.array([7, 10])
    (got,) = interpret(MaskedLengths("BNSD", sparse_mode=3), Q, K, V, TRIANGLE, lengths, kv_lengths)
    keep = np.stack([visible(3, 0, 0, range(n), range(m)) for n, m in zip(lengths, kv_lengths)])[:, None]
    close(got[0, :, :4], sdpa(Q, K, V, keep)[0, :, :4], 1e-5)
    close(got[1], sdpa(Q, K, V, keep)[1], 1e-5)
    assert np.isnan(got[0, :, 4:]).all()


def test_more_queries_than_keys_leave_the_first_queries_0_in_a_causal_triangle():
    (got,) = interpret(MaskedLengths("BNSD", sparse_mode=3), Q, K, V, TRIANGLE, np.array([6]), np.array([4]))
    assert (got[:, :, :2] == 0).all()
    keep = visible(3, 0, 0, range(6), range(4))[None, None]
    close(got[:, :, 2:], sdpa(Q, K, V, keep)[:, :, 2:], 1e-5)


@pytest.mark.parametrize(("query_padding", "kv_padding"), [(0, 0), (1, 2), (-3, 0)])
@pytest.mark.parametrize("mode", [0, 2, 3])
def test_left_padded_rows_end_before_the_padding(query_padding, kv_padding, mode):
    lengths, kv_lengths = np.array([4, 5]), np.array([7, 8])
    ends = 6 - max(0, query_padding), 10 - kv_padding
    places = [(range(ends[0] - n, ends[0]), range(ends[1] - m, ends[1])) for n, m in zip(lengths, kv_lengths)]
    k, v = K.copy(), V.copy()
    for row, (_, keys) in enumerate(places):  # what is not read may be anything
        unread = np.setdiff1d(np.arange(10), keys)
        k[row][:, unread], v[row][:, unread] = np.nan, np.nan
    arrays = (Q, k, v, TRIANGLE, lengths, kv_lengths, np.array([query_padding]), np.array([kv_padding]))
    (got,) = interpret(Padded("BNSD", sparse_mode=mode), *arrays)
    for row, (queries, keys) in enumerate(places):
        keep = np.zeros((6, 10), bool)
        keep[np.ix_(queries, keys)] = True
        keep &= visible(mode, 0, 0, queries, keys) if mode else True
        want = sdpa(Q[row : row + 1], K[row : row + 1], V[row : row + 1], keep[None, None])[0]
        close(got[row][:, queries], want[:, queries], 1e-5)
        assert np.isnan(np.delete(got[row], queries, 1)).all()


def test_a_whole_mask_is_taken_by_places_in_memory_also_of_left_padded_rows():
    keep = KEEP.copy()
    keep[:, :, :, 9] = True
    arrays = (Q, K, V, ~keep, np.array([4]), np.array([7]), np.array([0]), np.array([0]))
    (got,) = interpret(Padded("BNSD", masked=True), *arrays)
    close(got[:, :, 2:], sdpa(Q[:, :, 2:], K[:, :, 3:], V[:, :, 3:], keep[:, :, 2:, 3:]), 1e-5)


def test_padding_without_lengths_is_none():
    arrays = (Q, K, V, np.array([2]))
    (got,) = interpret(PaddedAlone("BNSD"), *arrays)
    close(got, sdpa(Q, K, V), 1e-5)


@pytest.mark.parametrize("layout", ["BNSD", "BSH"])
def test_prompt_attention_is_torchs(layout):
    (got,) = interpret(Prompt(layout), *(packed(layout, x) for x in (Q, K, V)), ~KEEP)
    close(got, packed(layout, sdpa(Q, K, V, KEEP)), 1e-5)


@pytest.mark.parametrize("layout", ["BNSD", "BSH"])
def test_attention_of_one_query_is_torchs(layout):
    q, lengths = normal(2, 4, 1, 16), np.array([10, 7])
    keep = KEEP[:, :, :1] & (np.arange(10) < lengths[:, None, None, None])
    arrays = [packed(layout, x) for x in (q, K, V)]
    (got,) = interpret(Single(layout), *arrays, ~KEEP[:, 0, :1].reshape(2, 1, 10), lengths)
    close(got, packed(layout, sdpa(q, K, V, keep)), 1e-5)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_flash_attention_score_is_torchs(layout):
    top, total, _, got = interpret(Score(layout), *(packed(layout, x) for x in (Q, K, V)), ~KEEP)
    close(got, packed(layout, sdpa(Q, K, V, KEEP)), 1e-5)
    score = 0.3 * np.einsum("bhid,bhjd->bhij", Q.astype(np.float64), np.repeat(K, 2, 1).astype(np.float64))
    score = np.where(KEEP, score, -np.inf)
    close(top, np.repeat(score.max(-1, keepdims=True), 8, -1), 1e-5)
    close(np.log(total) + top, np.repeat(np.log(np.exp(score).sum(-1, keepdims=True)), 8, -1), 1e-5)


def test_flash_attention_score_takes_values_shorter_than_keys():
    v = normal(2, 2, 10, 8)
    got = interpret(Score("BNSD"), Q, K, v, ~KEEP)[3]
    close(got, sdpa(Q, K, v, KEEP), 1e-5)


# Second formulations: the rest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0, 1])
def test_rotary_embedding_is_a_complex_product(mode):
    x, angle = normal(1, 3, 5, 8, dtype=np.float32), RNG.random((1, 1, 5, 4))
    pair = (lambda a: np.concatenate((a, a), -1)) if mode == 0 else (lambda a: np.repeat(a, 2, -1))
    cos, sin = (pair(f(angle)).astype(np.float32) for f in (np.cos, np.sin))
    (got,) = interpret(Apply(G.rotary_position_embedding, mode), x, cos, sin)
    real, imaginary = (x[..., :4], x[..., 4:]) if mode == 0 else (x[..., ::2], x[..., 1::2])
    z = (real + 1j * imaginary) * np.exp(1j * angle)
    want = (
        np.concatenate((z.real, z.imag), -1) if mode == 0 else np.stack((z.real, z.imag), -1).reshape(x.shape)
    )
    close(got, want, 1e-6)


class CacheWrite(nn.Cell):
    def __init__(self, axis, shape=(2, 1, 8, 4), dtype=ms.bfloat16):
        super().__init__()
        self.cache = empty_parameter(shape, dtype, "cache")
        self.axis = axis

    def construct(self, start, rows):
        written = G.kv_cache_scatter_update(self.cache, start, rows, self.axis, "update")
        return written * written, self.cache + self.cache


@pytest.mark.parametrize(("axis", "shape"), [(-2, (2, 1, 3, 4)), (-1, (2, 1, 8, 2))])
def test_cache_rows_are_written_from_each_rows_start_and_stay(axis, shape):
    cache, rows, start = normal(2, 1, 8, 4), normal(*shape), np.array([1, 2])
    made = interpreter(CacheWrite(axis), start, rows, parameters={"cache": cache})
    want = cache.astype(np.float32)
    for b in range(2):
        for k in range(shape[axis]):
            if axis == -2:
                want[b, :, start[b] + k] = rows[b, :, k]
            else:
                want[b, :, :, start[b] + k] = rows[b, :, :, k]
    squared, doubled = run(made, start, rows)
    close(squared, want**2)
    close(doubled, 2 * want)
    np.testing.assert_array_equal(made.parameters.read("cache"), want)
    again = run(made, np.array([0, 0]), 0 * rows)[1]
    assert (again.take(range(shape[axis]), axis) == 0).all()
    assert not np.array_equal(again, 0 * again)  # what the first call wrote further on is still there


@has_index_copy
def test_index_copy_puts_rows_where_the_indices_say():
    cache, rows = normal(6, 4), normal(2, 4)
    (got,) = interpret(IndexCopy(), np.array([4, 1]), rows, parameters={"cache": cache})
    want = cache.astype(np.float32)
    want[4], want[1] = rows[0], rows[1]
    close(got, want)


class Pads(nn.Cell):
    def construct(self, x):
        pad = G.ConstantPadND()
        return pad(x, (0, 8), 0.0), pad(x, (1, 2, 3, 0), -1.0)


def test_padding_begins_with_the_last_axis():
    x = normal(2, 3, 4)
    last, both = interpret(Pads(), x)
    close(last, np.pad(tensor(x), ((0, 0), (0, 0), (0, 8))))
    close(both, np.pad(tensor(x), ((0, 0), (3, 0), (1, 2)), constant_values=-1))


class Sizes(nn.Cell):
    def construct(self, x):
        return G.SplitWithSize()(x, (1, 3), -1) + G.SplitTensor()(x, 2, 1)


def test_parts_by_size():
    x = normal(2, 3, 4)
    want = (*np.split(tensor(x), [1], 2), *np.split(tensor(x), [2], 1))
    for got, part in zip(interpret(Sizes(), x), want, strict=True):
        close(got, part)


class Mint(nn.Cell):
    def construct(self, x, w, b, ids):
        return (
            mint.matmul(x, w.T), mint.bmm(mint.unsqueeze(x, 0), mint.unsqueeze(w.T, 0)),
            mint.nn.functional.linear(x, w, b), mint.sum(x, dim=-1, keepdim=True), mint.mean(x, 0),
            mint.nn.functional.gelu(x, approximate="tanh"), mint.nn.functional.silu(x), mint.index_select(x, 0, ids),
            mint.split(x, (1, 7), 1)[1], mint.chunk(x, 2, -1)[0], mint.nn.functional.embedding(ids, x),
            mint.nn.functional.one_hot(ids, 5), mint.cumsum(ids, 0), mint.sort(x, dim=1, descending=True)[0],
            mint.nn.functional.layer_norm(x, (8,), b, b, 1e-5), mint.nn.functional.pad(x, (1, 2), value=3.0), mint.add(x, x, alpha=2), mint.sub(x, x, alpha=3),
            ops.tanh(x),
        )  # fmt: skip


MINT = normal(4, 8), normal(8, 8), normal(8), np.array([3, 0, 3])


# Under the same names of `mint`, MindSpore 2.7 has other operators.
newer = pytest.mark.skipif(
    version("mindspore").startswith("2.7."), reason="MindSpore 2.7 has other operators"
)


@newer
def test_operators_of_mint_are_torchs():
    x, w, b, ids = MINT
    got = interpret(Mint(), x, w, b, ids)
    x, w, b, ids = map(tensor, (x, w, b, ids))
    want = (
        x @ w.T, (x @ w.T)[None], F.linear(x, w, b), x.sum(-1, keepdim=True), x.mean(0), F.gelu(x, approximate="tanh"),
        F.silu(x), x[ids], x[:, 1:], x[:, :4], x[ids], F.one_hot(ids, 5), ids.cumsum(0),
        x.sort(dim=1, descending=True)[0], F.layer_norm(x, (8,), b, b, 1e-5), F.pad(x, (1, 2), value=3.0), 3 * x, -2 * x,
        torch.tanh(x),
    )  # fmt: skip
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-5)


@newer
def test_the_table_of_witnesses_names_what_was_held_against_torch():
    named = {o for o, witness in WITNESSES.items() if witness == TORCH}
    assert named <= read_graph(trace(Mint(), *MINT)).operators
    assert set(WITNESSES) <= set(RULES)


def test_what_has_no_witness_beside_us_is_named():
    used = ["TupleGetItem", "FusedInferAttentionScore", "MatMul", "GroupedMatmulV2", "MatMul"]
    assert unwitnessed(used) == ["FusedInferAttentionScore", "GroupedMatmulV2"]


# Rounding ------------------------------------------------------------------------------------------------------------


class TwoSteps(nn.Cell):
    def construct(self, x, y):
        return (x + y) * y


def test_lifted_arithmetic_rounds_nothing_and_rounded_arithmetic_every_result():
    x, y = normal(64), normal(64)
    exact = (x.astype(np.float32) + y.astype(np.float32)) * y.astype(np.float32)
    (lifted,) = interpret(TwoSteps(), x, y)
    assert lifted.dtype == np.float32 and np.array_equal(lifted, exact)
    (rounded,) = interpret(TwoSteps(), x, y, arithmetic="rounded")
    added = (x.astype(np.float32) + y.astype(np.float32)).astype(BF16)
    assert rounded.dtype == BF16
    assert np.array_equal(rounded, (added.astype(np.float32) * y.astype(np.float32)).astype(BF16))


def test_norms_keep_a_gamma_of_fp32():
    x, gamma = normal(5, 8), 1 + normal(8, dtype=np.float32) / 100
    (got, _) = interpret(Apply(ops.rms_norm, 1e-5), x, gamma)
    close(got, F.rms_norm(tensor(x), (8,), torch.from_numpy(gamma), 1e-5), 1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------

WIDE = tuple(normal(1, 1, 4, 576) for _ in range(3))
REFUSED = {
    "a head dim past the limit": (Infer("BNSD", 1, 1), WIDE, "head dim 576, expected at most 512"),
    "a head dim that is not aligned": (
        Infer("BNSD", 1, 1), tuple(normal(1, 1, 4, 72) for _ in range(3)), "head dim 72, expected a multiple of 16",
    ),
    "values shorter than keys": (
        Infer("BNSD", 1, 1), (normal(1, 1, 4, 32), normal(1, 1, 4, 32), normal(1, 1, 4, 16)), "of v, expected one",
    ),
    "fp32 in a fused attention": (
        Infer("BNSD", 1, 1), tuple(normal(1, 1, 4, 32, dtype=np.float32) for _ in range(3)), "takes float32, expected bfloat16",
    ),
    "a window beside a mask": (Infer("BNSD", window=3), (Q, K, V, ~KEEP), "a window of 3 and 3 tokens beside its mask"),
    "a triangle that is none": (Infer("BNSD", sparse_mode=3), (Q, K, V, ~TRIANGLE), "not 1 above its diagonal"),
    "a sparse_mode without its triangle": (Infer("BNSD", sparse_mode=2), (Q, K, V, ~KEEP), r"mask \[2, 1, 6, 10\], expected \[2048, 2048\]"),
    "a sparse_mode that is not documented": (Infer("BNSD", sparse_mode=5), (Q, K, V, ~KEEP), "sparse_mode 5, expected 0 to 4"),
    "more padding than places": (
        Padded("BNSD"), (Q, K, V, TRIANGLE, np.array([6]), np.array([7]), np.array([1]), np.array([0])), "1 padded places",
    ),
    "group_list in int32": (GroupedV4(1), (GROUPED_X, GROUPED_W, np.array([1, 2, 1, 2], np.int32)), "group_list that is not int64"),
    "more rows in the groups than there are": (GroupedV4(1), (GROUPED_X, GROUPED_W, np.array([1, 2, 1, 3])), "group 4 to 7 of 6 rows"),
    "a list that falls": (GroupedV4(0), (GROUPED_X, GROUPED_W, np.array([3, 1, 4, 6])), "group 3 to 1"),
    "an index past the end": (Apply(ops.gather, 0), (normal(4, 3), np.array([4], np.int32)), "indices from 4 to 4, expected 0 to 3"),
    "an expert that does not exist": (
        Routing(0, 0, 5, 0, 2, False), (normal(2, 3), np.array([[0], [5]], np.int32)), "experts outside 0 to 4",
    ),
    "rows put back twice": (
        Apply(ops.moe_token_unpermute), (normal(2, 3), np.array([1, 1], np.int32)), "not a permutation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_outside_the_documented_semantics_are_refused(case):
    cell, arrays, message = REFUSED[case]
    with pytest.raises(InterpreterError, match=message):
        interpret(cell, *arrays)


def test_a_cache_write_past_the_end_is_refused():
    made = interpreter(CacheWrite(-2), np.array([0, 6]), normal(2, 1, 3, 4))
    with pytest.raises(InterpreterError, match="writes slots 6 to 9 of 8"):
        run(made, np.array([0, 6]), normal(2, 1, 3, 4))
