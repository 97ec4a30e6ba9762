"""Where the named points are in a graph of any target.

A point is found by what all targets share: which node takes a parameter of a certain name, and what lies between two
such nodes. A point that a fused operator hides is not found, and whoever compares says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..modeling.configuration import ModelConfig
from .mindir.graph import Graph, Node
from .mindir.paths import VIEWS, Paths
from .points import Stage

# Operators that add and norm: which of their results are the sum and its norm.
SUM_AND_NORM = {"AddRmsNorm": (2, 0), "kimi_add_layer_norm": (0, 1), "kimi_add_rms_norm": (0, 1)}
# Operators that are a linear and its activation.
ACTIVATED = ("kimi_linear_gelu_erf", "kimi_linear_gelu_tanh")


@dataclass(frozen=True)
class Place:
    """Where a point is in a graph.

    Attributes:
        values: names of values; several where each row of a batch, or a block of queries, has its own.
        form: how they are laid out, see `watching.arranged`.
        expected: what the reference calls them, where that is not the point's name.
        reads: parameters, after the stage's prefix, that a fused operator takes beside the point's own.
    """

    values: tuple[str, ...]
    form: str = "tokens"
    expected: str = ""
    reads: tuple[str, ...] = ()


def find(graph: Graph, config: ModelConfig, stage: Stage, tokens: int) -> dict[str, Place]:
    """Where the points of a stage are in a graph, those that it shows; and `input`, what the stage is given.

    Args:
        tokens: per row of the graph, 1 for a decode graph.
    """
    finder = _Finder(Paths(graph), config, stage, tokens)
    found: dict[str, Place | None] = getattr(finder, stage.kind)()
    return {name: place for name, place in found.items() if place is not None and place.values}


class _Finder:
    """Each method finds the points of one kind of stage."""

    def __init__(self, paths: Paths, config: ModelConfig, stage: Stage, tokens: int) -> None:
        self.paths, self.config, self.stage, self.tokens = paths, config, stage, tokens

    # What takes a parameter ------------------------------------------------------------------------------------------

    def takers(self, parameter: str) -> list[Node]:
        inner = self.paths.parameters.get(self.stage.prefix + parameter)
        return self.paths.takers(inner) if inner else []

    def taker(self, parameter: str) -> Node | None:
        return next(iter(self.takers(parameter)), None)

    def given(self, node: Node | None) -> str | None:
        """What a node gives; of several results the first."""
        if node is None:
            return None
        return self.paths.part(node.output, 0) if isinstance(node.declared, tuple) else node.output

    def linear(self, name: str) -> str | None:
        """A linear's result, with its bias where it has one."""
        node = self.taker(f"{name}.bias") or self.taker(f"{name}.weight")
        return None if node and node.operator in ACTIVATED else self.given(node)

    def activated(self, name: str, following: str) -> Place | None:
        """A linear's activation, which the following linear takes."""
        value, node = self.fed(following), self.taker(f"{name}.weight")
        reads = (f"{name}.weight", f"{name}.bias") if node and node.operator in ACTIVATED else ()
        return Place((value,), reads=reads) if value else None

    def fed(self, name: str) -> str | None:
        """What a linear takes."""
        node = self.taker(f"{name}.weight")
        return node.inputs[0] if node else None

    def summed(self, value: str | None, past: Node | None = None) -> tuple[str | None, Node | None]:
        """The sum that a value goes into, and the node that makes it."""
        for node in self.paths.takers(value) if value else ():
            if node is not past and node.operator == "Add":
                return node.output, node
            if node is not past and node.operator in SUM_AND_NORM:
                return self._part_of_norm(node, 0), node
        return None, None

    def normed(self, weight: str) -> str | None:
        """What a norm gives."""
        node = self.taker(weight)
        return self._part_of_norm(node, 1) if node and node.operator in SUM_AND_NORM else self.given(node)

    def _part_of_norm(self, node: Node, which: int) -> str | None:
        """The sum (0) or its norm (1) of an operator that gives both."""
        return self.paths.part(node.output, SUM_AND_NORM[node.operator][which])

    def other(self, node: Node | None, value: str | None) -> str | None:
        """The other operand of a sum."""
        if node is None or value is None:
            return None
        own = self.paths.source(value)
        return next((v for v in node.inputs[:2] if self.paths.source(v) != own), None)

    # Stages ----------------------------------------------------------------------------------------------------------

    def vision(self) -> dict[str, Place | None]:
        patches = self.linear("proj")
        output, node = self.summed(patches)
        return {
            "patch_embed": _one(patches),
            "pos_emb": _one(self.other(node, patches)),
            "output": _one(output),
        }

    def block(self) -> dict[str, Place | None]:
        qkv = self.linear("wqkv")
        attended, _ = self.summed(self.linear("wo"))
        output, _ = self.summed(self.linear("mlp.fc1"))
        q, k = self._rotated(qkv, self.fed("wo"))
        return {
            "input": _one(self._normed("norm0.weight")),
            "norm0": _one(self.normed("norm0.weight")),
            "wqkv": _one(qkv),
            "q_rope": _one(q),
            "k_rope": _one(k),
            "attention": _one(self.fed("wo")),
            "wo": _one(self.linear("wo")),
            "attention_sum": _one(attended),
            "norm1": _one(self.normed("norm1.weight")),
            "fc0": _one(self.linear("mlp.fc0")),
            "gelu": self.activated("mlp.fc0", "mlp.fc1"),
            "fc1": _one(self.linear("mlp.fc1")),
            "output": _one(output),
        }

    def _rotated(self, qkv: str | None, attention: str | None) -> Sequence[str | None]:
        """Where halves of a head come together again: the queries, then the keys."""
        if qkv is None or attention is None:
            return None, None
        half = self.config.vision.head_dim // 2
        between = self.paths.before(attention, [qkv])
        found = [
            node.output for node in self.paths.nodes if node.output in between and self._joins(node, half)
        ]
        return found if len(found) == 2 else (None, None)

    def _joins(self, node: Node, width: int) -> bool:
        """Whether it puts two parts of this width together."""
        widths = [self.paths.shape(v)[-1:] for v in self.paths.operands(node)[:2]]
        return node.operator == "Concat" and widths == [(width,), (width,)]

    def projector(self) -> dict[str, Place | None]:
        norm = self.taker("vision_tower.encoder.final_layernorm.weight")
        name = "multi_modal_projector."
        return {
            "input": _one(norm.inputs[0] if norm else None),
            "final_layernorm": _one(self.given(norm)),
            "pre_norm": _one(self.linear(f"{name}pre_norm")),
            "linear_1": _one(self.linear(f"{name}linear_1")),
            "gelu": self.activated(f"{name}linear_1", f"{name}linear_2"),
            "linear_2": _one(self.linear(f"{name}linear_2")),
        }

    def embedding(self) -> dict[str, Place | None]:
        embedded = self.given(self.taker("language_model.model.embed_tokens.weight"))
        chosen = [n for n in self.paths.takers(embedded) if n.operator == "Select"] if embedded else []
        return {
            "embed_tokens": _one(embedded),
            "inputs_embeds": _one(chosen[0].output if chosen else embedded),
        }

    def head(self) -> dict[str, Place | None]:
        return {
            "input": _one(self._normed("language_model.model.norm.weight")),
            "final_norm": _one(self.normed("language_model.model.norm.weight")),
            "lm_head": _one(self.linear("language_model.lm_head")),
        }

    def _normed(self, weight: str) -> str | None:
        """What a norm is taken of."""
        node = self.taker(weight)
        if node is None or node.operator in ("LayerNorm", "RmsNorm", "kimi_rms_norm"):
            return node.inputs[0] if node else None
        if node.operator in SUM_AND_NORM:
            return self._part_of_norm(node, 0)
        scaled = self.paths.makers[self.paths.source(node.inputs[0])]  # x * rsqrt(...), of plain operators
        return scaled.inputs[0]

    def layer(self) -> dict[str, Place | None]:
        attention = self.fed("self_attn.o_proj")
        attended, node = self.summed(self.linear("self_attn.o_proj"))
        output, last = self.summed(attended, past=node)
        places = {
            "input": _one(self._normed("input_layernorm.weight")),
            "input_norm": _one(self.normed("input_layernorm.weight")),
            "q_proj": _one(self.linear("self_attn.q_proj")),
            "kv_a_proj": _one(self.linear("self_attn.kv_a_proj_with_mqa")),
            "kv_a_norm": _one(self.normed("self_attn.kv_a_layernorm.weight")),
            **self._attention(attention),
            "o_proj": _one(self.linear("self_attn.o_proj")),
            "attention_sum": _one(attended),
            "post_norm": _one(self.normed("post_attention_layernorm.weight")),
        }
        mixed = self.other(last, attended)
        if self.config.text.is_moe(self.stage.number):
            places |= self._moe(mixed)
        else:
            places |= {
                "gate_up": _one(self.linear("mlp.gate_up_proj")),
                "swiglu": _one(self.fed("mlp.down_proj")),
                "down": _one(self.linear("mlp.down_proj")),
            }
        return places | {"output": _one(output)}

    def _attention(self, attention: str | None) -> dict[str, Place | None]:
        paths = self.paths
        queries, latent = self.linear("self_attn.q_proj"), self.linear("self_attn.kv_a_proj_with_mqa")
        norm = self.normed("self_attn.kv_a_layernorm.weight")
        if attention is None or queries is None or latent is None or norm is None:
            return {}
        between = paths.before(attention, [queries, latent])
        places: dict[str, Place | None] = {}
        rows = [n for n in paths.takers(norm) if n.operator == "Concat"]
        places["k_rope"] = _one(paths.operands(rows[0])[1] if rows else None)
        caches = [p for p in paths.graph.parameters if p.startswith(f"cache.{self.stage.number}.")]
        writes = [node.output for name in caches for node in paths.written(name)]
        places["cache"] = Place(tuple(writes), "slots")
        fused = self.taker("self_attn.k_b_proj.weight")
        if fused and fused.operator == "kimi_latent_attention":
            places["q_rope"] = _one(self._whole(fused.inputs[1]))
            reads = "self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"
            return places | {"attention": Place((attention,), reads=reads)}
        joined = self._query_parts(paths.after(queries) & between)
        plain = [(self._scale(a), self._scale(b)) for a, b in joined]
        scaled = all(a and b for a, b in plain) and bool(plain)
        if joined:
            places["q_rope"] = _one(self._whole(joined[0][1]))
        if scaled:
            places["q_scaled"] = _many([a for a, _ in plain])
            places["q_rope_scaled"] = _many([b for _, b in plain])
        k_b = [node.output for node in self.takers("self_attn.k_b_proj.weight")]
        v_b = [node.output for node in self.takers("self_attn.v_b_proj.weight")]
        softmaxes = [n for n in paths.nodes if n.operator == "Softmax" and n.output in between]
        if self.tokens > 1:
            places["k_b_proj"] = Place(tuple(k_b), "slots", "keys")
            places["v_b_proj"] = Place(tuple(v_b), "slots", "values")
            places["attention"] = _one(attention)
        else:
            places["k_b_proj"] = Place(tuple(k_b), "heads", "absorbed_scaled" if scaled else "absorbed")
            sums = [n.output for s in softmaxes for n in paths.takers(s.output)]
            places["latents"] = Place(tuple(sums), "latents")
            places["v_b_proj"] = _one(attention, "attention")
        scores = tuple(n.inputs[0] for n in softmaxes)
        places["mask"] = Place(scores, "added_mask")
        places["scores"] = Place(scores, "scores")
        places["softmax"] = Place(tuple(n.output for n in softmaxes), "probabilities")
        for node in paths.nodes:
            if node.operator == "FusedInferAttentionScore" and node.output in between:
                places["mask"] = Place((node.inputs[4],), "mask")
        return places

    def _query_parts(self, among: set[str]) -> list[tuple[str, str]]:
        """Queries without and with rope, where they are put together: once, or once for each row of the batch."""
        text = self.config.text
        first = (text.qk_nope_head_dim, text.kv_lora_rank)
        found = []
        for node in self.paths.nodes:
            parts = self.paths.operands(node)[:2]
            if node.operator == "Concat" and node.output in among and among.issuperset(parts):
                a, b = (self.paths.shape(v)[-1] for v in parts) if len(parts) == 2 else (0, 0)
                if a in first and b == text.qk_rope_head_dim:
                    found.append((parts[0], parts[1]))
        return found

    def _scale(self, value: str) -> str | None:
        """The product with a number that a part of the queries comes from, past the product with a parameter."""
        for _ in range(2):
            value = self.paths.source(value)
            node = self.paths.makers.get(value)
            if node is None:
                return None
            if node.operator in ("Mul", "Muls") and self.paths.is_number(node.inputs[1]):
                return value
            if node.operator != "BatchMatMul":
                return None
            value = node.inputs[0]
        return None

    def _whole(self, value: str) -> str:
        """The rotated queries of all rows of the batch, before they are scaled."""
        text = self.config.text
        width = text.num_attention_heads * text.qk_rope_head_dim
        while node := self.paths.makers.get(value):
            before = node.inputs[0]
            scales = node.operator in ("Mul", "Muls") and self.paths.is_number(node.inputs[1])
            cuts = node.operator == "StridedSlice" and prod(self.paths.shape(before)[1:]) == width
            if not (node.operator in VIEWS or scales or cuts):
                break
            value = before
        return value

    def _moe(self, mixed: str | None) -> dict[str, Place | None]:
        shared = self.linear("mlp.shared_experts.down_proj")
        total, node = self.summed(shared)
        experts = self.other(node, shared) if shared else mixed
        return self._router() | {
            "experts": _one(experts),
            "shared_gate_up": _one(self.linear("mlp.shared_experts.gate_up_proj")),
            "shared_swiglu": _one(self.fed("mlp.shared_experts.down_proj")),
            "shared_down": _one(shared),
            "moe": _one(total),
        }

    def _router(self) -> dict[str, Place | None]:
        paths = self.paths
        node = self.taker("mlp.gate.e_score_correction_bias")
        if node and node.operator == "kimi_router":
            reads = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
            parts = {
                "router_choice": paths.part(node.output, 0),
                "router_weights": paths.part(node.output, 1),
            }
            return {name: Place((value,), reads=reads) for name, value in parts.items() if value}
        scores = self.given(node)
        top = next(iter(paths.takers(scores)), None) if scores else None
        chosen = paths.part(top.output, 1) if top else None
        return {
            "router_logits": _one(self.linear("mlp.gate")),
            "router_scores": _one(scores),
            "router_choice": _one(chosen),
            "router_weights": _one(self._shares(chosen)),
        }

    def _shares(self, chosen: str | None) -> str | None:
        """What the chosen scores are in the end: divided by their sum, and times the factor."""
        if chosen is None:
            return None
        gathers = [n for n in self.paths.takers(chosen) if n.operator == "GatherD"]
        value = gathers[0].output if gathers else None
        shape = self.paths.shape(value) if value else ()
        while value:
            further = [
                n.output
                for n in self.paths.users.get(value, ())
                if n.operator in ("Cast", "Div", "RealDiv", "Mul", "Muls")
                and self.paths.shape(n.output) == shape
            ]
            if not further:
                return value
            value = further[-1]
        return None


def _one(value: str | None, expected: str = "") -> Place | None:
    return Place((value,), "tokens", expected) if value else None


def _many(values: Sequence[str | None]) -> Place:
    return Place(tuple(v for v in values if v))
