"""What each operator takes, on which product, and which document says so.

A device runs a graph kernel by kernel (KBK: ``jit_level`` O0 or O1) or as a whole (GE: the graph engine, behind
MindSpore Lite). The two have different kernels, so a row has both:

* the aclnn kernel behind the operator in MindSpore's Ascend library, and the products that its document lists. A `-`:
  there is no kernel of that name, so it runs as a single-operator model, for the products of the graph engine.
* the type of the graph engine that MindSpore has an adapter for, and the products that the operator's own document
  lists. A `-`: there is no adapter, so the operator cannot be in such a graph.

Operands are letters, one for each input of the node: those of one letter have one dtype, of those that the row names.
`.` is a constant, `.3` are three, `.?` is one that older versions do not have, `X?` is a tensor or None, `X+` one tensor
or several. After `->` come the results.

What has no row is refused, and so is a product or dtype that a row does not name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .calls import Call, Rule, bytes_of, dimensions, dtype, setting, size

KBK, GE = "kbk", "ge"


@dataclass(frozen=True)
class Product:
    """Of Atlas; `lacks` are dtypes that no kernel has there, by every document that names it."""

    title: str
    lacks: tuple[str, ...] = ()


PRODUCTS = {
    "a2": Product("Atlas A2"),
    "a3": Product("Atlas A3"),
    "310p": Product("Atlas inference products (310P)", lacks=("bfloat16",)),
}

DTYPES = {
    "half": ("bfloat16", "float16"),
    "float": ("bfloat16", "float16", "float32"),
    "int": ("int32", "int64"),
    "number": ("bfloat16", "float16", "float32", "int32", "int64"),
    "any": ("bfloat16", "float16", "float32", "int32", "int64", "bool"),
}

# Documents: the key and the folder. The kernel's is docs/<kernel>.md there, the graph engine's README.md, unless a file
# is named. N, M: hicann/ops-nn, hicann/ops-math. T, T2: ops-transformer. W: MindSpore's docstring. See docs/ascend-operators.md.
TABLE = """
operator                 | KBK kernel                       | on         | GE type                 | on         | operands           | dtypes                 | source
Add                      | aclnnAdd                         | a2 a3      | Add                     | a2 a3 310p | X X -> X           | X number               | M math/add
AddExt                   | aclnnAdd                         | a2 a3      | -                       |            | X X . -> X         | X number               | M math/add
AddRmsNorm               | aclnnAddRmsNorm                  | a2 a3 310p | AddRmsNorm              | a2 a3 310p | X X X . -> X R X   | X float; R float32     | N norm/add_rms_norm
BatchMatMul              | aclnnBatchMatMul                 | a2 a3 310p | BatchMatMulV2           | a2 a3 310p | X X . . -> X       | X float                | N matmul/batch_mat_mul_v3
BroadcastTo              | aclnnExpand                      | a2 a3 310p | BroadcastTo             | a2 a3 310p | X . -> X           | X any                  | M math/expand, conversion/broadcast_to
Cast                     | aclnnCast                        | a2 a3 310p | Cast                    | a2 a3 310p | X . -> Y           | X any; Y any           | M math/cast
Concat                   | aclnnCat                         | a2 a3 310p | ConcatD                 | a2 a3 310p | X+ . -> X          | X any                  | M conversion/concat_d
ConstantPadND            | aclnnConstantPadNd               | a2 a3 310p | -                       |            | X . . -> X         | X any                  | M conversion/pad_v3
CumSum                   | -                                |            | Cumsum                  | a2 a3 310p | X . . . -> X       | X float16 float32 int32| M math/cumsum
CumsumExt                | aclnnCumsum                      | a2 a3 310p | -                       |            | X . . -> X         | X number               | M math/cumsum
Div                      | aclnnDiv                         | a2 a3      | Div                     | a2 a3      | X X -> X           | X float                | M math/div
Equal                    | aclnnEqTensor                    | a2 a3      | Equal                   | a2 a3 310p | X X -> B           | X any; B bool          | M math/equal
Erf                      | aclnnErf                         | a2 a3      | Erf                     | a2 a3      | X -> X             | X float16 float32      | M math/erf
FloorDiv                 | aclnnFloorDivide                 | a2 a3 310p | FloorDiv                | a2 a3 310p | X X -> X           | X number               | M math/floor_div
FusedInferAttentionScore | aclnnFusedInferAttentionScoreV2  | a2 a3      | FusedInferAttentionScore| a2 a3      | X X X . M? L? L? .30 -> X R | X half; M bool int8 uint8; L int64; R float32 | T attention/fused_infer_attention_score
Gather                   | aclnnIndexSelect                 | a2 a3 310p | GatherV2                | a2 a3 310p | X I . . -> X       | X any; I int           | N index/gather_v2, docs/aclnnGatherV2.md
GatherD                  | aclnnGather                      | a2 a3      | GatherElements          | a2 a3      | X . I -> X         | X any; I int           | N index/gather_elements_v2
GeLU                     | aclnnGelu                        | a2 a3 310p | Gelu                    | a2 a3 310p | X -> X             | X float                | N activation/gelu
Greater                  | aclnnGtTensor                    | a2 a3 310p | Greater                 | a2 a3 310p | X X -> B           | X any; B bool          | M math/greater
GreaterEqual             | aclnnGeTensor                    | a2 a3 310p | GreaterEqual            | a2 a3 310p | X X -> B           | X any; B bool          | M math/greater_equal
GroupedMatmul            | aclnnGroupedMatmulV3             | a2         | GroupedMatmul           | a2 a3      | X X .5 L .4 -> X | X float; L int64 | T2 gmm/grouped_matmul
GroupedMatmulV4          | aclnnGroupedMatmulV4             | a2 a3      | -                       |            | X X .6 L .7 .? -> X | X float; L int64 | T2 gmm/grouped_matmul
InnerMoeTokenUnpermute   | aclnnMoeTokenUnpermute           | a2 a3 310p | -                       |            | X I P . . -> X     | X float; P float; I int32 | T2 moe/moe_token_unpermute
InplaceIndexCopy         | aclnnInplaceIndexCopy            | a2 a3      | -                       |            | X . I X -> X       | X number; I int        | N index/scatter_update
KVCacheScatterUpdate     | aclnnInplaceScatterUpdate        | a2 a3      | Scatter                 | a2 a3      | X I X . . -> X     | X float; I int         | N index/scatter, docs/aclnnInplaceScatterUpdate.md
LayerNorm                | aclnnLayerNorm                   | a2 a3      | LayerNorm               | a2 a3 310p | X X X . . . -> X R R | X float; R float32   | N norm/layer_norm_v4
LessEqual                | aclnnLeTensor                    | a2 a3      | LessEqual               | a2 a3      | X X -> B           | X any; B bool          | M math/less_equal
MatMul                   | aclnnMatmul                      | a2 a3 310p | MatMulV2                | a2 a3 310p | X X . . -> X       | X float                | N matmul/mat_mul_v3
MoeInitRoutingV2         | aclnnMoeInitRoutingV2            | a2 a3 310p | -                       |            | X I . . . . . . -> X I I I | X float; I int32 | T2 moe/moe_init_routing_v2
Mul                      | aclnnMul                         | a2 a3 310p | Mul                     | a2 a3 310p | X X -> X           | X number               | M math/mul
Muls                     | aclnnMuls                        | a2 a3 310p | -                       |            | X . -> X           | X float                | M math/muls
Neg                      | aclnnNeg                         | a2 a3      | Neg                     | a2 a3 310p | X -> X             | X number               | M math/neg
Pad                      | -                                |            | Pad                     | a2 a3      | X -> X             | X float                | W ops.Pad, which names Ascend and no product
RealDiv                  | -                                |            | RealDiv                 | a2 a3 310p | X X -> X           | X float                | M math/real_div
ReduceSum                | aclnnReduceSum                   | a2 a3 310p | ReduceSum               | a2 a3 310p | X . . . -> X       | X number               | M math/reduce_sum
RmsNorm                  | aclnnRmsNorm                     | a2 a3 310p | RmsNorm                 | a2 a3 310p | X X . -> X R       | X float; R float32     | N norm/rms_norm
ScatterNdUpdate          | -                                |            | ScatterNdUpdate         | a2 a3      | X I X -> X         | X float; I int         | N index/scatter_nd_update
Select                   | aclnnSWhere                      | a2 a3 310p | Select                  | a2 a3 310p | B X X -> X         | B bool; X any          | M math/select
ScatterUpdate            | -                                |            | ScatterUpdate           | a2 a3      | X I X -> X         | X float; I int         | W ops.ScatterUpdate, which names Ascend and no product
SiLU                     | aclnnSilu                        | a2 a3 310p | Swish                   | a2 a3      | X -> X             | X float                | N activation/swish
Sigmoid                  | aclnnSigmoid                     | a2 a3 310p | Sigmoid                 | a2 a3 310p | X -> X             | X float                | N activation/sigmoid
Softmax                  | aclnnSoftmax                     | a2 a3 310p | SoftmaxV2               | a2 a3 310p | X . -> X           | X float                | N activation/softmax_v2
Sort                     | -                                |            | Sort                    | a2 a3 310p | X -> X J           | X float16 float32; J int32 | M math/sort
SortExt                  | aclnnSort                        | a2 a3 310p | -                       |            | X . . . -> X J     | X number; J int64      | M math/sort
Split                    | aclnnSplitTensor                 | a2 a3 310p | SplitD                  | a2 a3 310p | X . . -> X+        | X any                  | M conversion/split_v, conversion/split
SplitWithSize            | aclnnSplitWithSize               | a2 a3      | -                       |            | X . . -> X+        | X any                  | M conversion/split_v
Stack                    | aclnnStack                       | a2 a3 310p | Pack                    | a2 a3 310p | X+ -> X            | X any                  | M conversion/pack
StridedSlice             | -                                |            | StridedSlice            | a2 a3 310p | X . . . . . . . . -> X | X any              | M conversion/strided_slice
Sub                      | aclnnSub                         | a2 a3      | Sub                     | a2 a3 310p | X X -> X           | X number               | M math/sub
Swiglu                   | aclnnSwiGlu                      | a2 a3 310p | -                       |            | X . -> X           | X float                | N activation/swi_glu
TopK                     | -                                |            | TopKV2                  | a2 a3 310p | X . -> X J         | X float16 float32; J int32 | M math/topk
TopkExt                  | aclnnTopk                        | a2 a3 310p | -                       |            | X . . . . -> X J   | X number; J int64      | M math/topk
Transpose                | aclnnPermute                     | a2 a3      | Transpose               | a2 a3 310p | X . -> X           | X any                  | M conversion/transpose
Unstack                  | -                                |            | Unpack                  | a2 a3 310p | X -> X+            | X any                  | M conversion/unpack
"""


@dataclass(frozen=True)
class Row:
    """An operator: see the module. `kernels` and `products` by runtime, KBK and GE."""

    operator: str
    kernels: dict[str, str | None]
    products: dict[str, tuple[str, ...]]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    dtypes: dict[str, tuple[str, ...]]
    source: str


def _rows() -> Iterator[Row]:
    _, *lines = TABLE.strip().splitlines()
    for line in lines:
        operator, kernel, kbk, ge, adapted, operands, dtypes, source = (c.strip() for c in line.split("|"))
        takes, gives = operands.split("->")
        named = dict(part.split(maxsplit=1) for part in dtypes.split(";"))
        yield Row(
            operator=operator,
            kernels={KBK: None if kernel == "-" else kernel, GE: None if ge == "-" else ge},
            products={
                KBK: tuple((adapted if kernel == "-" else kbk).split()),
                GE: tuple(adapted.split()),
            },
            operands=tuple(_tokens(takes)),
            results=tuple(gives.split()),
            dtypes={k: tuple(d for n in v.split() for d in DTYPES.get(n, (n,))) for k, v in named.items()},
            source=source,
        )


def _tokens(operands: str) -> Iterator[str]:
    for token in operands.split():
        yield from ["."] * int(token[1:]) if token[1:].isdigit() else [token]


ROWS = {row.operator: row for row in _rows()}


def _one_head_dim(call: Call) -> str | None:
    dims = sorted({t.shape[-1] for place in range(3) for t in call.tensors(place)})
    return f"has head dims {dims}, expected one for queries, keys and values" if len(dims) > 1 else None


def _mask_fits(call: Call) -> str | None:
    """FusedInferAttentionScore in BNSD: a mask of every query and key, a length for each row or one for all."""
    (batch, _, queries, _), keys = call.dims(0), call.dims(1)[2]
    for mask in call.tensors(4):
        heads = mask.shape[:-2]
        if mask.shape[-2:] != (queries, keys) or heads not in ((), (batch,), (1,), (batch, 1), (1, 1)):
            return f"has the mask {list(mask.shape)} for {queries} queries and {keys} keys of {batch} rows"
    for place in (5, 6):
        for lengths in call.tensors(place):
            if lengths.shape not in ((1,), (batch,)):
                return (
                    f"has lengths {list(lengths.shape)}, expected one for all or one for each of {batch} rows"
                )
    return None


def _one_kept_dim(call: Call) -> str | None:
    """GatherD: no dimension but the gathered one is longer in the index than in the tensor."""
    x, index, axis = call.dims(0), call.dims(2), call.operands[1] % len(call.dims(0))
    if len(x) != len(index) or any(i > n for d, (i, n) in enumerate(zip(index, x)) if d != axis):
        return f"gathers {list(index)} of {list(x)} on dimension {axis}, expected no other dimension to be larger"
    return None


def _top_within(call: Call) -> str | None:
    k, n = call.operands[1], call.dims(0)[-1]
    return f"takes the {k} largest of {n}, expected at most {n}" if not 0 <= k <= n else None


def _rows_fit(call: Call) -> str | None:
    """KVCacheScatterUpdate: but for the batch and the written axis, rows have the cache's shape."""
    cache, rows, axis = call.dims(0), call.dims(2), call.operands[3] % len(call.dims(0))
    other = [d for d in range(1, len(cache)) if d != axis]
    if (
        axis == 0
        or rows[0] > cache[0]
        or rows[0] != call.dims(1)[0]
        or any(rows[d] != cache[d] for d in other)
    ):
        return f"writes {list(rows)} at {list(call.dims(1))} starts into {list(cache)} on dimension {axis}"
    return None


@dataclass(frozen=True)
class Limit:
    """A rule of an operator beyond its row; it holds on these products, by default on all."""

    rule: Rule
    products: tuple[str, ...] = tuple(PRODUCTS)


ON_310P = ("310p",)
LARGEST_RANK = 8  # of tensors, in every document
LIMITS: dict[str, tuple[Limit, ...]] = {
    "AddRmsNorm": (Limit(bytes_of(2, -1, least=32), ON_310P),),
    # fp32 products are made in fp16 there.
    "BatchMatMul": (
        Limit(dimensions(0, 3, 3)),
        Limit(dimensions(1, 3, 3)),
        Limit(dtype(0, "float16"), ON_310P),
    ),
    "FusedInferAttentionScore": (
        Limit(_one_head_dim),
        Limit(size(0, -1, most=512, step=16)),
        Limit(dimensions(0, 4, 4)),
        Limit(size(0, 0, most=65536)),
        Limit(size(0, 1, most=256)),
        Limit(size(0, 2, most=20 << 20)),
        Limit(size(1, 2, most=20 << 20)),
        Limit(setting(28, "input_layout", 1)),  # BNSD, in which all dimensions here are counted
        Limit(_mask_fits),
        Limit(setting(30, "sparse_mode", 0, 1)),
        Limit(setting(31, "inner_precise", 0, 1, 2, 3)),
    ),
    "Gather": (Limit(dimensions(1, 0, 1)),),
    "GatherD": (Limit(_one_kept_dim),),
    "GroupedMatmul": (
        Limit(size(0, -1, most=65535)),
        Limit(size(1, -1, most=65535)),
        Limit(dimensions(0, 2, 2)),
        Limit(dimensions(1, 3, 3)),
        Limit(size(7, 0, least=2, most=1024)),
        Limit(setting(8, "split_item", 2, 3)),
        Limit(setting(9, "group_type", 0)),
    ),
    "GroupedMatmulV4": (
        Limit(size(0, -1, most=65535)),
        Limit(size(1, -1, most=65535)),
        Limit(dimensions(0, 2, 2)),
        Limit(dimensions(1, 3, 3)),
        Limit(size(8, 0, most=1024)),
        Limit(setting(12, "split_item", 2, 3)),
        Limit(setting(13, "group_type", 0)),
        Limit(setting(14, "group_list_type", 0, 1)),
        Limit(setting(15, "act_type", 0)),
    ),
    "InnerMoeTokenUnpermute": (
        Limit(size(2, 1, most=512)),
        Limit(setting(3, "padded_mode", False)),
        Limit(size(0, -1, most=10239, step=128), ON_310P),
    ),
    "KVCacheScatterUpdate": (Limit(dimensions(0, 2, 8)), Limit(dimensions(1, 1, 1)), Limit(_rows_fit)),
    "MatMul": (
        Limit(dimensions(0, 1, 6)),
        Limit(dimensions(1, 1, 6)),
        Limit(dtype(0, "float16"), ON_310P),
    ),
    "MoeInitRoutingV2": (
        Limit(dimensions(0, 2, 2)),
        Limit(dimensions(1, 2, 2)),
        Limit(setting(5, "drop_pad_mode", 0, 1)),
        Limit(setting(5, "drop_pad_mode", 0), ON_310P),
        Limit(setting(6, "expert_tokens_count_or_cumsum_flag", 0, 1, 2)),
    ),
    "RmsNorm": (Limit(bytes_of(1, -1, least=32), ON_310P),),
    "Stack": (Limit(dimensions(0, 1, 7)),),
    "Swiglu": (Limit(size(0, -1, least=2, step=2)), Limit(bytes_of(0, -1, step=64), ON_310P)),
    "TopK": (Limit(_top_within),),
    "TopkExt": (Limit(_top_within), Limit(setting(4, "sorted", True))),
}

# The option that leaves an operator out, where it is not on a product or not within its limits.
INSTEAD = {
    "FusedInferAttentionScore": "--attention plain",
    "GroupedMatmul": "--experts plain",
    "GroupedMatmulV4": "--experts plain",
    "InnerMoeTokenUnpermute": "--experts plain",
    "MoeInitRoutingV2": "--experts plain",
}
