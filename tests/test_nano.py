"""The embedded model: its files, its figures, and the generator of its pictures and questions."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import kimi_vl
from kimi_vl.modeling.configuration import ModelConfig

SCRIPTS = Path(__file__).parents[1] / "scripts"
NANO = Path(kimi_vl.nano_path())


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def network() -> Any:
    """The embedded model in the Torch reference."""
    pytest.importorskip("torch")
    from kimi_vl.verify.oracle import build_oracle

    return build_oracle(NANO).network


def stored_tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    weight_map = json.loads((NANO / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(NANO / file, framework="np") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                assert weight_map[name] == file
                part = f.get_slice(name)
                stored[name] = tuple(part.get_shape()), part.get_dtype()
    assert stored.keys() == weight_map.keys()
    return stored


def published_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that the published checkpoint would have at these dimensions."""
    t, v = config.text, config.vision
    tower, d = "vision_tower", v.hidden_size

    def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        yield f"{name}.bias", (out,)

    def layer_norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    def mlp(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.gate_proj.weight", (width, t.hidden_size)
        yield f"{name}.up_proj.weight", (width, t.hidden_size)
        yield f"{name}.down_proj.weight", (t.hidden_size, width)

    yield f"{tower}.patch_embed.proj.weight", (d, 3, v.patch_size, v.patch_size)
    yield f"{tower}.patch_embed.proj.bias", (d,)
    yield f"{tower}.patch_embed.pos_emb.weight", (v.init_pos_emb_height, v.init_pos_emb_width, d)
    for n in range(v.num_hidden_layers):
        block = f"{tower}.encoder.blocks.{n}"
        yield from layer_norm(f"{block}.norm0", d)
        yield from layer_norm(f"{block}.norm1", d)
        yield from linear(f"{block}.wqkv", 3 * d, d)
        yield from linear(f"{block}.wo", d, d)
        yield from linear(f"{block}.mlp.fc0", v.intermediate_size, d)
        yield from linear(f"{block}.mlp.fc1", d, v.intermediate_size)
    yield from layer_norm(f"{tower}.encoder.final_layernorm", d)
    yield from layer_norm("multi_modal_projector.pre_norm", d)
    yield from linear("multi_modal_projector.linear_1", v.merged_dim, v.merged_dim)
    yield from linear("multi_modal_projector.linear_2", t.hidden_size, v.merged_dim)
    yield "language_model.model.embed_tokens.weight", (t.vocab_size, t.hidden_size)
    for n in range(t.num_hidden_layers):
        layer = f"language_model.model.layers.{n}"
        attention = f"{layer}.self_attn"
        yield f"{layer}.input_layernorm.weight", (t.hidden_size,)
        yield f"{layer}.post_attention_layernorm.weight", (t.hidden_size,)
        yield f"{attention}.q_proj.weight", (t.num_attention_heads * t.qk_head_dim, t.hidden_size)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (t.latent_dim, t.hidden_size)
        yield f"{attention}.kv_a_layernorm.weight", (t.kv_lora_rank,)
        expanded = t.num_attention_heads * (t.qk_nope_head_dim + t.v_head_dim)
        yield f"{attention}.kv_b_proj.weight", (expanded, t.kv_lora_rank)
        yield f"{attention}.o_proj.weight", (t.hidden_size, t.num_attention_heads * t.v_head_dim)
        if not t.is_moe(n):
            yield from mlp(f"{layer}.mlp", t.intermediate_size)
            continue
        yield f"{layer}.mlp.gate.weight", (t.n_routed_experts or 0, t.hidden_size)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (t.n_routed_experts or 0,)
        for e in range(t.n_routed_experts or 0):
            yield from mlp(f"{layer}.mlp.experts.{e}", t.moe_intermediate_size)
        yield from mlp(f"{layer}.mlp.shared_experts", t.shared_intermediate_size)
    yield "language_model.model.norm.weight", (t.hidden_size,)
    yield "language_model.lm_head.weight", (t.vocab_size, t.hidden_size)


def test_the_directory_is_small_enough_to_ship() -> None:
    assert sum(f.stat().st_size for f in NANO.iterdir()) <= 6_000_000


def test_the_weights_are_those_of_the_published_layout() -> None:
    config = ModelConfig.from_file(NANO)
    stored = stored_tensors()
    rope = {name for name in stored if name.endswith(".rotary_emb.inv_freq")}
    assert {stored[name] for name in rope} == {((config.text.qk_rope_head_dim // 2,), "F32")}
    assert len(rope) == config.text.num_hidden_layers
    assert {name: stored[name] for name in stored.keys() - rope} == {
        name: (shape, "BF16") for name, shape in published_tensors(config)
    }


def test_the_architecture_is_the_published_one_in_every_part() -> None:
    text = ModelConfig.from_file(NANO).text
    assert (text.first_k_dense_replace, text.n_shared_experts, text.num_experts_per_tok) == (1, 1, 2)
    assert text.n_routed_experts is not None and text.n_routed_experts >= 8
    assert (text.routed_scaling_factor, text.rope_theta) == (2.446, 800_000.0)
    assert not text.tie_word_embeddings


def test_weights_are_finite_and_the_correction_bias_is_in_use() -> None:
    torch = pytest.importorskip("torch")
    for file in NANO.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                tensor = f.get_tensor(name).float()
                assert tensor.isfinite().all(), name
                if name.endswith("e_score_correction_bias"):
                    # of the size of differences between sigmoid scores, so it changes choices
                    assert tensor.max() - tensor.min() > 0.05, name
                    assert len(torch.unique(tensor)) > 2, name


def test_special_tokens_keep_the_published_offsets() -> None:
    from nano_kit.chat import RANKS, SPECIAL_OFFSETS

    published = json.loads((Path(__file__).parent / "data" / "special_tokens.json").read_text())
    first = published["first_special_id"]
    assert {name: id_ - first for name, id_ in published["named"].items()} == SPECIAL_OFFSETS
    stored = json.loads((NANO / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token["content"]: int(id_) - RANKS for id_, token in stored.items()} == SPECIAL_OFFSETS
    assert len((NANO / "tiktoken.model").read_text().splitlines()) == RANKS


def test_the_vocabulary_is_made_again_to_the_byte(tmp_path: Path) -> None:
    from nano_kit.chat import train_vocabulary

    train_vocabulary(tmp_path / "tiktoken.model")
    assert (tmp_path / "tiktoken.model").read_bytes() == (NANO / "tiktoken.model").read_bytes()


def test_token_ids_of_questions_and_answers_are_tiktokens() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from nano_kit.chat import SPLIT_PATTERN, generator, load_vocabulary
    from nano_kit.questions import SIDES, converse
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(NANO / "tiktoken.model"))
    theirs = tiktoken.Encoding("nano", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = load_vocabulary(NANO / "tiktoken.model")
    rng = generator("texts")
    texts = set()
    for _ in range(300):
        for turn in converse(rng, (rng.choice(SIDES), rng.choice(SIDES))).turns:
            texts |= {turn.question, turn.answer}
    assert len(texts) > 300
    assert {text: list(ours(text)[0]) for text in texts} == {text: theirs.encode(text) for text in texts}


def test_conversations_depend_on_the_seed_alone() -> None:
    from nano_kit.chat import generator
    from nano_kit.questions import converse

    def drawn(*words: object) -> list[tuple]:
        rng = generator(*words)
        conversations = [converse(rng, (6, 8)) for _ in range(20)]
        return [(c.turns, [p.image.tobytes() for p in c.pictures]) for c in conversations]

    assert drawn("training", 0, 1) == drawn("training", 0, 1)
    assert drawn("training", 0, 1) != drawn("training", 0, 2)


def test_held_out_pictures_are_none_that_training_draws() -> None:
    pytest.importorskip("torch")
    from nano_kit.chat import generator
    from nano_kit.evaluation import held_out
    from nano_kit.questions import converse

    grid = (4, 4)  # the smallest, where a coincidence is likeliest
    asked = {p.image.tobytes() for c in held_out("colour", grid, 100) for p in c.pictures}
    trained = set()
    for step in range(20):
        rng = generator("training", 0, step, 0)
        trained |= {p.image.tobytes() for _ in range(16) for p in converse(rng, grid).pictures}
    assert len(asked) == 100 and len(trained) > 250
    assert not asked & trained


def test_pixels_are_padded_before_they_are_normalised() -> None:
    from nano_kit.chat import generator
    from nano_kit.pictures import draw_picture, patches

    pictures = (draw_picture(generator("padding", i), (6, 8), "shapes") for i in range(100))
    picture = next(p for p in pictures if p.image.width < 8 * 14 and p.image.height < 6 * 14)
    got = patches(picture)
    sheet = got.reshape(6, 8, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(6 * 14, 8 * 14, 3)
    shown = np.asarray(picture.image)
    height, width = shown.shape[:2]
    np.testing.assert_allclose(sheet[:height, :width], (shown / 255 - 0.5) / 0.5, atol=1e-6)
    assert (sheet[height:] == -1).all() and (sheet[:, width:] == -1).all()


def test_labels_name_what_the_answer_names() -> None:
    from nano_kit.chat import generator
    from nano_kit.pictures import COLOURS, SHAPES, draw_picture

    for i in range(50):
        picture = draw_picture(generator("labels", i), (8, 8), "shapes")
        labelled = picture.labels[picture.labels[..., 0] > 0]
        names = [(SHAPES[kind - 1], list(COLOURS)[colour - 1]) for kind, colour, _ in labelled]
        assert names == [(shape.kind, shape.colour) for shape in picture.shapes]


def test_training_is_told_to_look_at_what_the_answer_says() -> None:
    from nano_kit.chat import SPECIAL, encode_chat, generator, load_vocabulary
    from nano_kit.pictures import COLOURS
    from nano_kit.questions import ask

    encode, grid, media = load_vocabulary(NANO / "tiktoken.model"), (6, 8), SPECIAL["<|media_pad|>"]
    for i in range(50):
        conversation = ask(generator("looks", i), grid, "colour")
        ids, weights, (look,) = encode_chat(encode, conversation, telling_weight=3.0)
        (key,) = look.keys
        cell = key - ids.index(media)
        colour = conversation.pictures[0].labels[2 * (cell // 4), 2 * (cell % 4), 1]
        said = ids[look.place + 1]
        assert ids[key] == media and weights[look.place + 1] == 3.0
        assert (said,) == encode(" " + list(COLOURS)[colour - 1])[0]


def test_every_kind_that_ships_is_right_95_times_in_100() -> None:
    from nano_kit.card import read_figures
    from nano_kit.questions import KINDS

    figures = read_figures(NANO)
    assert set(figures["kinds"]) == set(KINDS)
    for kind, count in figures["kinds"].items():
        assert count["of"] >= 250, kind
        assert count["right"] >= 0.95 * count["of"], kind


def test_the_model_card_says_what_was_measured(tmp_path: Path) -> None:
    from nano_kit.card import demo_picture, read_figures, write_card

    figures = read_figures(NANO)
    write_card(tmp_path, figures, demo_picture())
    assert (tmp_path / "README.md").read_text("utf-8") == (NANO / "README.md").read_text("utf-8")
    parameters = sum(math.prod(shape) for shape, dtype in stored_tensors().values() if dtype == "BF16")
    assert figures["parameters"] == parameters


def test_the_demo_picture_is_the_held_out_one() -> None:
    from nano_kit.card import DEMO, demo_picture
    from PIL import Image

    with Image.open(NANO / DEMO) as shipped:
        assert shipped.convert("RGB").tobytes() == demo_picture().image.tobytes()


@pytest.mark.parametrize("kind", ["colour", "count_kind_zh", "number", "describe", "compare", "text"])
def test_answers_are_right_when_asked_again(network: Any, kind: str) -> None:
    from nano_kit.chat import load_vocabulary
    from nano_kit.evaluation import held_out, right_answers

    encode = load_vocabulary(NANO / "tiktoken.model")
    right = [right_answers(network, encode, held_out(kind, grid, 8)) for grid in ((4, 10), (8, 8))]
    assert np.concatenate(right).mean() >= 0.9


def test_a_media_token_is_never_the_likeliest(network: Any) -> None:
    import torch
    from nano_kit.chat import SPECIAL, VOCABULARY, generator, load_vocabulary, make_batch
    from nano_kit.network import run
    from nano_kit.questions import converse

    encode = load_vocabulary(NANO / "tiktoken.model")
    batch = make_batch(encode, [converse(generator("media", i), (6, 6)) for i in range(16)])
    nonsense = torch.randint(VOCABULARY, (16, 100), generator=torch.Generator().manual_seed(0))
    nonsense[nonsense == SPECIAL["<|media_pad|>"]] = 0
    with torch.no_grad():
        for logits in (run(network, batch)[0], network(input_ids=nonsense).logits):
            assert (logits[..., SPECIAL["<|media_pad|>"]] < logits.amax(-1) - 3).all()


def test_the_taught_head_looks_at_what_is_asked_for(network: Any) -> None:
    import copy

    from nano_kit.chat import load_vocabulary, make_batch
    from nano_kit.evaluation import held_out
    from nano_kit.lesson import LAYER, Lesson
    from nano_kit.network import run

    taught = copy.deepcopy(network)
    lesson = Lesson(taught)
    batch = make_batch(load_vocabulary(NANO / "tiktoken.model"), held_out("colour", (8, 8), 16))
    losses = {}
    for shift in (0, 1):  # 1: the wrong cell, next to the right one
        lesson.give(
            tuple(look._replace(keys=tuple(key + shift for key in look.keys)) for look in batch.looks)
        )
        run(taught, batch)
        losses[shift] = float(lesson.loss)
    assert taught.model.language_model.layers[LAYER].self_attn.lesson is lesson
    assert losses[0] < 0.5 and losses[1] > 2
