"""Who beside this project says what an operator computes, so that a rule and its test are not one misunderstanding.

A rule that is only held against a second formulation of our own, or against Torch's operator for a part of what the
operator does, has no entry: reports name it when a graph uses it. Operators of the project's own library are what that
library computes, so it bears their rules out.
"""

from __future__ import annotations

from collections.abc import Iterable

from .rules import RULES

KERNEL = "MindSpore's CPU kernel, run beside the rule"
TORCH = "Torch's operator, whose semantics mindspore.mint documents for its own"
LIBRARY = "the library itself, run beside the rule"
DOCSTRING = "values printed in MindSpore's docstring"

WITNESSES: dict[str, str] = {
    **dict.fromkeys(
        (
            *(
                "Abs",
                "Add",
                "Argmax",
                "Assign",
                "BatchMatMul",
                "BiasAdd",
                "BroadcastTo",
                "Cast",
                "Concat",
                "Cos",
            ),
            *("CumSum", "Div", "Divs", "Equal", "Erf", "Exp", "ExpandDims", "Floor", "FloorDiv", "FloorMod"),
            *(
                "Gather",
                "GatherD",
                "GeLU",
                "Greater",
                "GreaterEqual",
                "LayerNorm",
                "Less",
                "LessEqual",
                "Log",
            ),
            *("LogicalAnd", "LogicalNot", "LogicalOr", "MaskedFill", "MatMul", "Maximum", "Minimum", "Mul"),
            *("Muls", "Neg", "NotEqual", "OneHot", "Pow", "ReLU", "ReduceMax", "ReduceMean", "ReduceMin"),
            *("ReduceSum", "RemainderTensorTensor", "Reshape", "Rsqrt", "ScatterNdUpdate", "ScatterUpdate"),
            *("Select", "SiLU", "Sigmoid", "Sin", "Slice", "Softmax", "Sort", "Split", "Sqrt"),
            *("Square", "Squeeze", "Stack", "StridedSlice", "Sub", "TensorMove", "Tile", "TopK", "Transpose"),
            "Unstack",
        ),
        KERNEL,
    ),
    **dict.fromkeys(
        (
            *("AddExt", "BatchMatMulExt", "ChunkView", "ConstantPadND", "CumsumExt", "Dense", "Embedding"),
            *(
                "ExpandDimsView",
                "GeluExt",
                "IndexSelect",
                "LayerNormExt",
                "MatMulExt",
                "MeanExt",
                "OneHotExt",
            ),
            *("SortExt", "SplitWithSizeView", "SubExt", "SumExt", "Tanh"),
        ),
        TORCH,
    ),
    **dict.fromkeys(
        (
            *("AddRmsNorm", "GroupedMatmul", "GroupedMatmulV4", "InplaceIndexCopy", "MoeTokenPermute"),
            *("RmsNorm", "Swiglu", "TopkExt"),
        ),
        DOCSTRING,
    ),
    **dict.fromkeys(
        (
            *("kimi_add_layer_norm", "kimi_add_rms_norm", "kimi_embedding", "kimi_experts"),
            *("kimi_interpolate", "kimi_latent_attention", "kimi_layer_norm", "kimi_linear"),
            *("kimi_linear_gelu_erf", "kimi_linear_gelu_tanh"),
            *("kimi_rms_norm", "kimi_rotate", "kimi_router", "kimi_split", "kimi_swiglu"),
            *("kimi_vision_attention", "kimi_vision_attention_rounded"),
        ),
        LIBRARY,
    ),
    "SplitWithSize": "its view, SplitWithSizeView, whose rule it shares",
    "KVCacheScatterUpdate": "what MindSpore's device test expects of the data in CANN's example",
    "MoeInitRoutingV2": "MindSpore's docstring (with a capacity); CANN's operator test of its example's data (dropless)",
    **dict.fromkeys(("MoeTokenUnpermute", "InnerMoeTokenUnpermute"), "values in MindSpore's device test"),
}


def unwitnessed(operators: Iterable[str]) -> list[str]:
    """Those of `operators` that have a rule here and no witness beside us, sorted."""
    return sorted({o for o in operators if o in RULES} - set(WITNESSES))
