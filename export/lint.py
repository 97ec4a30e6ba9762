"""What a graph for Ascend must keep to, checked in the graph itself: the front end that traces it is not a device.

It accepts graphs that no kernel takes, or that a device would run wrongly or with a second copy of weights or cache.
Every rule looks at the MindIR that is about to be written, whoever made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import ExportError
from .mindir import REFERENCE, plain
from .proto import pb

# Nodes that start nothing on the device: structure, order, and other views of the same memory.
FREE = ("Constant", "Depend", "ExpandDims", "Load", "MakeTuple", "Reshape", "TupleGetItem", "UpdateState")
# What may start something, and the kernel behind it in MindSpore 2.10's Ascend library (the pairing is read from their
# names). None: there is no aclnn kernel of that name; it runs as a single-operator model, or as one not known by name.
KERNELS = {
    "Add": "aclnnAdd",
    "AddExt": "aclnnAdd",
    "BatchMatMul": "aclnnBatchMatMul",
    "BroadcastTo": "aclnnExpand",
    "Cast": "aclnnCast",
    "Concat": "aclnnCat",
    "ConstantPadND": "aclnnConstantPadNd",
    "Div": "aclnnDiv",
    "Equal": "aclnnEqTensor",
    "Erf": "aclnnErf",
    "FusedInferAttentionScore": "aclnnFusedInferAttentionScoreV2",
    "Gather": "aclnnIndexSelect",
    "GatherD": "aclnnGather",
    "GeLU": "aclnnGelu",
    "Greater": "aclnnGtTensor",
    "GreaterEqual": "aclnnGeTensor",
    "GroupedMatmulV4": "aclnnGroupedMatmulV4",
    "InnerMoeTokenUnpermute": "aclnnMoeTokenUnpermute",
    "KVCacheScatterUpdate": "aclnnInplaceScatterUpdate",
    "LayerNorm": "aclnnLayerNorm",
    "MatMul": "aclnnMatmul",
    "MoeInitRoutingV2": "aclnnMoeInitRoutingV2",
    "Mul": "aclnnMul",
    "Muls": "aclnnMuls",
    "Neg": "aclnnNeg",
    "ReduceSum": "aclnnReduceSum",
    "RmsNorm": "aclnnRmsNorm",
    "Select": "aclnnSWhere",
    "SiLU": "aclnnSilu",
    "Sigmoid": "aclnnSigmoid",
    "Softmax": "aclnnSoftmax",
    "Split": "aclnnSplitTensor",
    "SplitWithSize": "aclnnSplitWithSize",
    "Stack": "aclnnStack",
    "StridedSlice": None,  # plain variants only
    "Sub": "aclnnSub",
    "Swiglu": "aclnnSwiGlu",
    "TopkExt": "aclnnTopk",
    "Transpose": "aclnnPermute",
    "Unstack": None,  # plain variants only
}
WRITE = "KVCacheScatterUpdate"
# Operators that change how a weight lies or what it is stored in.
COPIES_OF_WEIGHTS = ("Transpose", "Cast", "TensorMove")
# What stands for a parameter itself.
SAME = ("Load", "Depend", "Reshape", "ExpandDims")
LARGEST_CONSTANT = 1 << 20  # bytes
HEAD_DIM_STEP, LARGEST_HEAD_DIM = 16, 512  # of FusedInferAttentionScore
LENGTHS = 8  # place of GroupedMatmulV4's group_list among its operands
MASK = 4  # place of FusedInferAttentionScore's mask


@dataclass(frozen=True)
class Lint:
    """A graph with its nodes by what they give.

    Attributes:
        name: of the graph, for messages.
        caches: names of its cache parameters; all other parameters are weights.
    """

    name: str
    model: Any
    caches: Collection[str]

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    @cached_property
    def makers(self) -> dict[str, Any]:
        return {output: node for node in self.nodes for output in node.output}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Value -> plain name."""
        return {p.name: plain(p.name) for p in self.model.graph.parameter}

    def parameter(self, value: str) -> str | None:
        """The parameter that a value is, in any shape; None for what is computed."""
        while value not in self.parameters:
            node = self.makers.get(value)
            if node is None or operator(node) not in SAME:
                return None
            value = node.input[0]
        return self.parameters[value]

    def tensors(self, value: str) -> list[Any]:
        """Dims and data type of a value: one TensorProto, or one per element of a tuple."""
        if value in self.makers:
            return [
                t
                for a in self.makers[value].attribute
                if a.name == "shape"
                for t in (*a.tensors, *(t for v in a.values for t in v.tensors))
            ]
        inputs = [t for i in self.model.graph.input if i.name == value for t in i.tensor]
        return inputs or [p for p in self.model.graph.parameter if p.name == value]


def operator(node: Any) -> str:
    """The operator of a node."""
    return str(node.op_type).removeprefix(REFERENCE).partition(":")[0]


def launches(model: Any) -> Counter[str]:
    """How many nodes of each operator start something on the device."""
    return Counter(o for o in map(operator, model.graph.node) if o not in FREE)


def check(name: str, model: Any, caches: Collection[str]) -> None:
    """Hold a graph against every rule.

    Raises:
        ExportError: it breaks one; the message names the graph and the node.
    """
    lint = Lint(name, model, caches)
    for rule in RULES:
        for node, what in rule(lint):
            raise ExportError(f"{name}: node {node}: {what}")


Broken = Iterator[tuple[str, str]]
"""A node, and what is wrong with it."""


def copied_caches(lint: Lint) -> Broken:
    """Each cache is written, by one operator that takes it as it is; nothing else takes it."""
    written: Counter[str] = Counter()
    for node in lint.nodes:
        for place, value in enumerate(node.input):
            cache = lint.parameters.get(value)
            if cache is None or cache not in lint.caches:
                continue
            if operator(node) == WRITE and place == 0:
                written[cache] += 1
            elif operator(node) == "TensorMove":
                yield named(node), f"copies {cache}, which {WRITE} must write where it is"
            else:
                yield named(node), f"reads {cache} without waiting for its write; read what {WRITE} gives"
    for cache in lint.caches:
        if written[cache] != 1:
            yield cache, f"is written {written[cache]} times, expected once by {WRITE}"


def changed_weights(lint: Lint) -> Broken:
    """No weight is transposed, cast or copied: it would be held twice, or changed at every call."""
    for node in lint.nodes:
        if operator(node) in COPIES_OF_WEIGHTS:
            weight = lint.parameter(node.input[0])
            if weight is not None and weight not in lint.caches:
                yield (
                    named(node),
                    f"changes the weight {weight}; the conversion stores it as the graph needs it",
                )


def large_constants(lint: Lint) -> Broken:
    """No constant holds more than `LARGEST_CONSTANT` bytes."""
    for node in lint.nodes:
        if operator(node) == "Constant" and node.ByteSize() > LARGEST_CONSTANT:
            yield (
                named(node),
                f"is a constant of {node.ByteSize()} bytes, expected at most {LARGEST_CONSTANT}",
            )


def double_precision(lint: Lint) -> Broken:
    """Nothing is float64, which no kernel here takes."""
    for parameter in lint.model.graph.parameter:
        if parameter.data_type == pb.TensorProto.DOUBLE:
            yield plain(parameter.name), "is float64"
    for node in lint.nodes:
        held = [t for a in node.attribute if a.name == "value" for t in a.tensors]
        if any(t.data_type == pb.TensorProto.DOUBLE for t in held + lint.tensors(node.output[0])):
            yield named(node), "gives float64"


def unknown_operators(lint: Lint) -> Broken:
    """Every operator has a kernel for kernel-by-kernel execution."""
    for node in lint.nodes:
        if operator(node) not in FREE and operator(node) not in KERNELS:
            yield named(node), f"{operator(node)} is not among the operators for Ascend"


def fused_attention(lint: Lint) -> Broken:
    """FusedInferAttentionScore: half precision, one head dim for queries, keys and values, masks in bool."""
    for node in lint.nodes:
        if operator(node) != "FusedInferAttentionScore":
            continue
        operands = [t for value in node.input[:3] for t in lint.tensors(value)]
        dims = {t.dims[-1] for t in operands}
        if len(dims) != 1:
            yield named(node), f"has head dims {sorted(dims)}, expected one for queries, keys and values"
        elif (dim := min(dims)) % HEAD_DIM_STEP or dim > LARGEST_HEAD_DIM:
            yield (
                named(node),
                f"has a head dim of {dim}, expected a multiple of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM}",
            )
        if any(t.data_type not in (pb.TensorProto.BFLOAT16, pb.TensorProto.FLOAT16) for t in operands):
            yield named(node), "takes neither bf16 nor fp16"
        if any(t.data_type != pb.TensorProto.BOOL for t in lint.tensors(node.input[MASK])):
            yield named(node), "has a mask that is not bool"


def group_lists(lint: Lint) -> Broken:
    """GroupedMatmulV4 reads its groups' sizes as int64, though the front end lets others pass."""
    for node in lint.nodes:
        if operator(node) != "GroupedMatmulV4":
            continue
        if [t.data_type for t in lint.tensors(node.input[LENGTHS])] != [pb.TensorProto.INT64]:
            yield named(node), "has a group_list that is not int64"


def named(node: Any) -> str:
    """A node in a message: its number in the graph and its operator."""
    return f"{plain(node.output[0])} ({operator(node)})"


RULES: tuple[Callable[[Lint], Broken], ...] = (
    copied_caches,
    changed_weights,
    large_constants,
    double_precision,
    unknown_operators,
    fused_attention,
    group_lists,
)
