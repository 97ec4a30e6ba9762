"""How a published checkpoint's tensors lie in transformers' ``Kimi_K25ForConditionalGeneration``.

:func:`table` says which published tensor is which part of which tensor of the reference; :func:`load_published` reads
it one way, :func:`to_published` the other.

The checkpoint is read with safetensors' own reader and nothing of ``convert``: a mistake there must not be able to
cancel itself out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..modeling.configuration import ModelConfig


class OracleError(ValueError):
    """A directory, configuration or input that the reference cannot take; the message says which and why."""


class Piece(NamedTuple):
    """`part` of `parts` equal parts (along the rows) of a published tensor is a view of an oracle tensor.

    `row_dims` leading dimensions of the view are one dimension, the rows, in the published tensor.
    """

    published: str
    oracle: str
    part: int = 0
    parts: int = 1
    view: Callable[[Tensor], Tensor] = lambda t: t
    row_dims: int = 1

    def published_shape(self, view: Tensor) -> tuple[int, ...]:
        return (self.parts * math.prod(view.shape[: self.row_dims]), *view.shape[self.row_dims :])


def _interleaved(heads: int) -> Callable[[Tensor], Tensor]:
    """Published q and k rows hold a head's rotation pairs side by side; the oracle holds first halves, then second."""
    return lambda t: t.unflatten(0, (heads, 2, -1)).transpose(1, 2)  # (heads, head_dim / 2, 2, ...)


def _half(expert: int, half: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[expert].chunk(2)[half]


def _expert(expert: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[expert]


def table(config: ModelConfig) -> Iterator[Piece]:
    """Every piece of the checkpoint, in network order."""
    both = (".weight", ".bias")
    vision, oracle_vision = "vision_tower.", "model.vision_tower."
    for s in both:
        yield Piece(vision + "patch_embed.proj" + s, oracle_vision + "patch_embed.proj" + s)
    yield Piece(
        vision + "patch_embed.pos_emb.weight", oracle_vision + "patch_embed.pos_emb.position_embeddings"
    )
    for n in range(config.vision.num_hidden_layers):
        block, layer = f"{vision}encoder.blocks.{n}.", f"{oracle_vision}layers.{n}."
        pairs = _interleaved(config.vision.num_attention_heads)
        for s in both:
            yield Piece(block + "norm0" + s, layer + "norm1" + s)
            yield Piece(block + "wqkv" + s, layer + "attn.q_proj" + s, 0, 3, pairs, row_dims=3)
            yield Piece(block + "wqkv" + s, layer + "attn.k_proj" + s, 1, 3, pairs, row_dims=3)
            yield Piece(block + "wqkv" + s, layer + "attn.v_proj" + s, 2, 3)
            yield Piece(block + "wo" + s, layer + "attn.proj" + s)
            yield Piece(block + "norm1" + s, layer + "norm2" + s)
            yield Piece(block + "mlp.fc0" + s, layer + "mlp.fc1" + s)
            yield Piece(block + "mlp.fc1" + s, layer + "mlp.fc2" + s)
    for s in both:
        yield Piece(vision + "encoder.final_layernorm" + s, oracle_vision + "final_layernorm" + s)
    for ours, theirs in (("pre_norm", "pre_norm"), ("linear_1", "in_proj"), ("linear_2", "out_proj")):
        for s in both:
            yield Piece(f"multi_modal_projector.{ours}{s}", f"model.mm_projector.{theirs}{s}")

    def same(name: str) -> Piece:
        return Piece("language_model.model." + name, "model.language_model." + name)

    yield same("embed_tokens.weight")
    for n in range(config.text.num_hidden_layers):
        layer = f"layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield same(f"{layer}{name}.weight")
        for name in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
            yield same(f"{layer}self_attn.{name}.weight")
        mlps = ["mlp"]
        if config.text.is_moe(n):
            mlps = ["mlp.shared_experts"] if config.text.n_shared_experts else []
            yield same(f"{layer}mlp.gate.weight")
            yield same(f"{layer}mlp.gate.e_score_correction_bias")
            stack = f"model.language_model.{layer}mlp.experts."
            for e in range(config.text.n_routed_experts):
                expert = f"language_model.model.{layer}mlp.experts.{e}."
                yield Piece(expert + "gate_proj.weight", stack + "gate_up_proj", view=_half(e, 0))
                yield Piece(expert + "up_proj.weight", stack + "gate_up_proj", view=_half(e, 1))
                yield Piece(expert + "down_proj.weight", stack + "down_proj", view=_expert(e))
        for mlp in mlps:
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield same(f"{layer}{mlp}.{name}.weight")
    yield same("norm.weight")
    yield Piece("language_model.lm_head.weight", "lm_head.weight")


def to_published(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The oracle's parameters under published names and in published layouts, in network order.

    dtypes stay as they are; every tensor is contiguous and owns its memory, so it can be saved at once. The published
    ``rotary_emb.inv_freq`` tensors hold nothing that the configuration does not, and are left out.

    Raises:
        OracleError: a parameter is missing, or one is there that the table does not know.
    """
    parts: dict[str, list[Tensor]] = {}
    pieces = list(table(config))
    _require_same_names("state dict", _filled(state_dict), {p.oracle for p in pieces})
    for p in pieces:
        view = p.view(state_dict[p.oracle].detach())
        parts.setdefault(p.published, []).append(view.flatten(0, p.row_dims - 1) if p.row_dims > 1 else view)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _filled(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Names of what holds numbers: without shared experts, transformers has theirs with a width of 0."""
    return {name for name, tensor in state_dict.items() if tensor.numel()}


def _require_same_names(what: str, has: set[str], wanted: set[str]) -> None:
    for names, verb in ((wanted - has, "lacks"), (has - wanted, "holds")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise OracleError(
                f"{what}: {verb} {min(names)}{more}, which does not fit config.json; "
                "do the weights and the configuration belong together?"
            )


def load_published(network: torch.nn.Module, directory: str | Path, config: ModelConfig) -> None:
    """Fills the network's parameters in place from the safetensors files of `directory`, all of them and no others.

    Raises:
        OracleError: as :func:`build_oracle`.
    """
    PublishedTensors(network, directory, config).fill(network.state_dict())


class PublishedTensors:
    """The safetensors files of `directory`, which hold what the network's parameters are filled from, and no more.

    Raises:
        OracleError: as :func:`build_oracle`.
    """

    def __init__(self, network: torch.nn.Module, directory: str | Path, config: ModelConfig):
        self._files = tensor_files(Path(directory))
        self._pieces = list(table(config))
        state = network.state_dict()
        _require_same_names("Torch reference", _filled(state), {p.oracle for p in self._pieces})
        found = {
            name for name in self._files if not name.endswith(".rotary_emb.inv_freq")
        }  # recomputed, never read
        _require_same_names(str(directory), found, {p.published for p in self._pieces})

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Writes into the oracle's tensors `state`, which may be some of all, what the files hold for them."""
        by_file: dict[Path, list[Piece]] = {}
        for p in self._pieces:
            if p.oracle in state:
                by_file.setdefault(self._files[p.published], []).append(p)
        for path, of_file in by_file.items():
            with _opened(path) as f:
                for p in of_file:
                    view, value = p.view(state[p.oracle]), f.get_tensor(p.published)
                    wanted = p.published_shape(view)
                    if tuple(value.shape) != wanted:
                        raise OracleError(
                            f"{path}: {p.published} has shape {tuple(value.shape)}, expected {wanted} from config.json"
                        )
                    view.copy_(value.chunk(p.parts)[p.part].reshape(view.shape))

    def rows(self, published: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a published matrix in `dtype`: `[..., D]` for `ids` `[...]`. Only these are read."""
        unique, where = ids.unique(return_inverse=True)
        path = self._files[published]
        with _opened(path) as f:
            matrix = f.get_slice(published)
            found = [matrix[i : i + 1] for i in unique.tolist()]
        return torch.cat(found).to(dtype)[where]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped. Raises OracleError: it cannot be read."""
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (OSError, SafetensorError) as e:
        raise OracleError(f"{path}: cannot be read as safetensors ({e})") from None


def tensor_files(directory: Path) -> dict[str, Path]:
    """Published tensor name -> the file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = {k: directory / v for k, v in json.loads(index.read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OracleError(f"{index}: is not a safetensors index (no weight_map)") from None
        paths = sorted(set(listed.values()))
    else:
        listed, paths = None, sorted(directory.glob("*.safetensors"))
        if not paths:
            raise OracleError(f"{directory}: holds no *.safetensors file; expected a published checkpoint")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as f:
                files.update({name: path for name in f.keys()})  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise OracleError(f"{path}: is missing, though {index.name} names it") from None
        except (OSError, SafetensorError) as e:
            raise OracleError(f"{path}: cannot be read as safetensors ({e})") from None
    if listed is not None:
        _require_same_names(str(directory), set(files), set(listed))
    return files
