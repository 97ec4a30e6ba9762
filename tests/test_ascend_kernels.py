"""What the Ascend graphs compute, with each fused operator replaced by the formula of its documentation, in NumPy.

It holds the network around the operators against the plain one, which other tests hold against Torch. It says nothing
about the operators themselves: those have run nowhere.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import bundles
import mindspore as ms
import numpy as np
import pytest
from golden import rel_l2
from mindspore import ops

from kimi_vl.export.plan import open_converted
from kimi_vl.modeling.engine import Engine
from kimi_vl.modeling.graphs import LastLogitsGraph, TextGraph, VisionGraph
from kimi_vl.modeling.kernels import ascend, cache_writes, get_kernels
from kimi_vl.modeling.language import LanguageModel
from kimi_vl.modeling.positions import text_rope
from kimi_vl.modeling.vision import MoonViT, Projector

GARBAGE = 7.5  # what an operator leaves in rows that its documentation does not define
BATCH, CHUNK, CONTEXT = 2, 16, 48
LENGTHS = (29, 18)  # tokens of the two rows: a second chunk that is not full


def tensor(a: np.ndarray) -> ms.Tensor:
    return ms.Tensor(np.ascontiguousarray(a))


class ScatterUpdate:
    """cache[b, h, start[b] + i] = rows[b, h, i], in place."""

    def __call__(self, cache, start, rows, axis, reduce):
        assert (axis, reduce, start.dtype) == (-2, "update", ms.int64)
        held, new = cache.asnumpy().copy(), rows.asnumpy()
        for b, first in enumerate(start.asnumpy()):
            assert first + new.shape[2] <= held.shape[2]
            held[b, :, first : first + new.shape[2]] = new[b]
        cache.set_data(tensor(held))
        return cache


class FusedAttention:
    """softmax(scale q k^T) v of each head, [B, heads, T, D]; True in the mask or beyond the lengths is not seen."""

    def __init__(self, **attributes):
        self.attributes = attributes

    def __call__(self, q, keys, values, shift, mask, lengths, kv_lengths):
        (k,), (v,) = (x.asnumpy() for x in keys), (x.asnumpy() for x in values)
        q = q.asnumpy()
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 16 == 0 and shift is None
        assert self.attributes["input_layout"] == "BNSD" and self.attributes["num_heads"] == q.shape[1]
        scores = self.attributes["scale_value"] * np.einsum("bhtd,bhsd->bhts", q, k, dtype=np.float64)
        if mask is not None:
            assert mask.dtype == ms.bool_ and self.attributes["inner_precise"] == 2
            scores = np.where(mask.asnumpy(), -np.inf, scores)
        if lengths is not None:
            assert lengths.dtype == kv_lengths.dtype == ms.int64
            for b, n in enumerate(kv_lengths.asnumpy()):
                scores[b, :, :, n:] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("bhts,bhsd->bhtd", p / p.sum(-1, keepdims=True), v)
        if lengths is not None:
            for b, n in enumerate(lengths.asnumpy()):
                y[b, :, n:] = GARBAGE
        return tensor(y.astype(np.float32)), None


class InitRouting:
    """Rows sorted by expert, stably; where each (row, slot) went; how many rows each expert has."""

    def __call__(self, x, indices, active, capacity, experts, mode, flag, before):
        assert (active, capacity, mode, flag, before) == (0, 0, 0, 2, False) and indices.dtype == ms.int32
        flat, k = indices.asnumpy().reshape(-1), indices.shape[1]
        order = np.argsort(flat, kind="stable")
        places = np.empty(len(flat), np.int32)
        places[order] = np.arange(len(flat))
        counts = np.bincount(flat, minlength=experts).astype(np.int32)
        return tensor(x.asnumpy()[order // k]), tensor(places), tensor(counts), None


class Grouped:
    """y[rows of group e] = x[rows of group e] w[e]; rows beyond the last group are not written."""

    def __call__(self, x, weight, group_list, split_item, group_type, group_list_type):
        assert (split_item, group_type, group_list_type, group_list.dtype) == (3, 0, 1, ms.int64)
        (x,), (w,) = (a.asnumpy() for a in x), (a.asnumpy() for a in weight)
        y, at = np.full((len(x), w.shape[2]), GARBAGE, np.float32), 0
        for e, n in enumerate(group_list.asnumpy()):
            y[at : at + n] = x[at : at + n] @ w[e]
            at += n
        return (tensor(y),)


class Unpermute:
    """out[t] = sum over j of y[places[t k + j]] p[t, j]."""

    def __call__(self, y, places, p, padded, shape):
        assert not padded and shape is None and p.dtype == ms.float32
        p = p.asnumpy()
        return tensor((y.asnumpy()[places.asnumpy()].reshape(*p.shape, -1) * p[..., None]).sum(1))


class Swiglu:
    """silu of the first half times the second."""

    def __call__(self, x, axis):
        a, b = np.split(x.asnumpy(), 2, axis)
        return tensor(a / (1 + np.exp(-a)) * b)


class RmsNorm:
    def __init__(self, epsilon):
        self.epsilon = epsilon

    def __call__(self, x, weight):
        x = x.asnumpy()
        return tensor(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight.asnumpy()), None


class AddRmsNorm:
    """The norm of the sum, the norm's factor, the sum."""

    def __call__(self, x, y, weight, epsilon):
        total = tensor(x.asnumpy() + y.asnumpy())
        return *RmsNorm(epsilon)(total, weight), total


class SplitWithSize:
    def __call__(self, x, sizes, axis):
        assert sum(sizes) == x.shape[axis]
        return tuple(map(tensor, np.split(x.asnumpy(), np.cumsum(sizes)[:-1], axis)))


class TopkExt:
    def __call__(self, x, k, axis, largest, ordered):
        assert largest and ordered
        order = np.argsort(-x.asnumpy(), axis, kind="stable")[..., :k]
        return tensor(np.take_along_axis(x.asnumpy(), order, axis)), tensor(order)


class AddExt:
    def __call__(self, a, b, alpha):
        return tensor(a.asnumpy() + np.float32(alpha) * b.asnumpy())


class ConstantPad:
    """(before, after) of the last axis."""

    def __call__(self, x, sizes, value):
        return tensor(np.pad(x.asnumpy(), [(0, 0)] * (x.ndim - 1) + [tuple(sizes)], constant_values=value))


DOCUMENTED = SimpleNamespace(
    KVCacheScatterUpdate=ScatterUpdate,
    FusedInferAttentionScore=FusedAttention,
    MoeInitRoutingV2=InitRouting,
    GroupedMatmulV4=Grouped,
    InnerMoeTokenUnpermute=Unpermute,
    Swiglu=Swiglu,
    RmsNorm=RmsNorm,
    AddRmsNorm=AddRmsNorm,
    SplitWithSize=SplitWithSize,
    TopkExt=TopkExt,
    AddExt=AddExt,
    ConstantPadND=ConstantPad,
)


@pytest.fixture
def eager(monkeypatch):
    """Formulas for operators, called one by one."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    with contextlib.suppress(
        SystemError
    ):  # with a NumPy newer than MindSpore's own, the first eager operator fails
        ops.reshape(ms.Tensor([1.0]), (1, 1))
    for module in (ascend, cache_writes):
        monkeypatch.setattr(module, "generated", DOCUMENTED)
    yield
    ms.set_context(mode=before)


class Network:
    """Both halves of a checkpoint's network on a backend, in fp32."""

    def __init__(self, kernels) -> None:
        self.weights = open_converted(bundles.converted("tiny8-fp32"))
        self.config, self.kernels = self.weights.config, kernels
        self.tower = MoonViT(kernels, ms.float32, self.config.vision)
        self.projector = Projector(kernels, ms.float32, self.config)
        self.text = LanguageModel(kernels, ms.float32, self.config.text)

    def filled(self, cell):
        """`cell` with its weights, and zeros in its caches."""
        for name, parameter in cell.parameters_and_names():
            held = (
                self.weights.read(name)
                if name in self.weights.names()
                else np.zeros(parameter.shape, np.float32)
            )
            parameter.set_data(ms.Tensor(held))
        return cell

    def image(self, inputs) -> np.ndarray:
        graph = self.filled(VisionGraph(self.tower, self.projector, self.config, False))
        return graph(*map(ms.Tensor, inputs.values()))[0].asnumpy()

    def logits(self, ids: np.ndarray, steps: int) -> list[np.ndarray]:
        """Of each row's last prompt token and the tokens after it, and the caches at the end."""
        shared = (self.text, self.kernels, self.config, BATCH)
        prefill = self.filled(LastLogitsGraph(*shared, CHUNK, CONTEXT, ms.float32, True))
        decode = TextGraph(*shared, 1, CONTEXT, ms.float32, True)
        out, start = [], np.zeros(BATCH, np.int32)
        for chunk in range(2):
            count = np.clip(np.array(LENGTHS) - chunk * CHUNK, 0, CHUNK)
            inputs = self._inputs(ids[:, chunk * CHUNK : (chunk + 1) * CHUNK], start)
            out += [x.asnumpy() for x in prefill(*inputs, ms.Tensor((count - 1).astype(np.int32)))]
            start += count.astype(np.int32)
        for a, b in zip(decode.caches, prefill.caches):
            a.set_data(ms.Tensor(b.asnumpy()))
        for step in range(steps):
            out += [x.asnumpy() for x in decode(*self._inputs(ids[:, step : step + 1], start))]
            start += 1
        return out

    def _inputs(self, ids: np.ndarray, start: np.ndarray) -> list[ms.Tensor]:
        text = self.config.text
        tokens = ids.shape[1]
        cos, sin = text_rope(start[:, None] + np.arange(tokens), text.rope_theta, text.qk_rope_head_dim)
        embeds = np.zeros((BATCH, tokens, text.hidden_size), np.float32)
        mask = np.zeros((BATCH, tokens), np.int32)
        return [ms.Tensor(a) for a in (ids.astype(np.int32), embeds, mask, cos, sin, start.copy())]


VARIANTS = [("fused", "fused"), ("plain", "fused"), ("fused", "plain")]


@pytest.mark.skipif(
    not hasattr(ms, "DeviceCtx"),
    reason="run eagerly, MindSpore 2.7's stand-ins give other numbers; its traced graphs are interpreted elsewhere",
)
@pytest.mark.parametrize("attention, experts", VARIANTS)
def test_text_equals_the_plain_network(eager, attention, experts):
    ids = np.random.default_rng(3).integers(0, 900, (BATCH, 2 * CHUNK))
    want = Network(get_kernels("plain")).logits(ids, 3)
    got = Network(get_kernels("ascend", attention=attention, experts=experts)).logits(ids, 3)
    assert len(got) == len(want) == 5 * 3
    for a, b in zip(got, want):
        if a.dtype == np.int32:
            assert np.array_equal(a, b)
        else:
            assert rel_l2(a, b) <= 2e-6


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_a_picture_equals_the_plain_network_whatever_padded_patches_hold(eager, attention):
    network = Network(get_kernels("ascend", attention=attention))
    patches = np.random.default_rng(4).standard_normal((24, 3, 14, 14)).astype(np.float32)
    inputs = Engine(network.config, None).vision_inputs(patches, 4, 6, 64)
    want = Network(get_kernels("plain")).image(inputs)
    assert rel_l2(network.image(inputs)[:6], want[:6]) <= 2e-6
