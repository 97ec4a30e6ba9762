"""The network at dimensions unlike the published ones, against the Torch reference built for each."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import configuration, tensors, write_checkpoint
from golden import rel_l2

from kimi_vl import KimiVLForConditionalGeneration

pytest.importorskip("torch")

VARIANTS = {
    "odd": ({}, {}),
    "one-head": ({"num_attention_heads": 1, "num_experts_per_tok": 1}, {"num_attention_heads": 1}),
    "dense-first-two": ({"first_k_dense_replace": 2, "n_routed_experts": 11, "num_experts_per_tok": 3}, {}),
    "no-dense": ({"first_k_dense_replace": 0, "norm_topk_prob": False, "qk_rope_head_dim": 2}, {}),
    "wide-values": ({"v_head_dim": 17, "qk_nope_head_dim": 3, "kv_lora_rank": 9}, {"hidden_size": 12}),
}


def balanced(config: dict, seed: int = 3) -> dict[str, np.ndarray]:
    """Random weights under which activations keep their size, and a correction bias that matters."""
    made = tensors(config, np.float32, seed)
    for name, a in made.items():
        if name.endswith("inv_freq"):
            continue
        if "norm" in name and name.endswith("weight"):
            a[:] = 1 + 0.1 * a
        elif a.ndim == 1:
            a *= 0.05
        elif "embed_tokens" not in name and "pos_emb" not in name:
            a *= (a.size / a.shape[0]) ** -0.5
    return made


def prompt(config: dict) -> dict[str, np.ndarray]:
    """A left-padded row with two pictures of unequal size, one larger than the position table."""
    rng = np.random.default_rng(5)
    media = config["media_placeholder_token_id"]
    grids = np.array([[4, 6], [8, 8]])
    row = [0, 0]
    for h, w in grids.tolist():
        row += [*rng.integers(0, media, 5).tolist(), *[media] * (h * w // 4)]
    row += rng.integers(0, media, 4).tolist()
    patches = rng.standard_normal((int(grids.prod(1).sum()), 3, 14, 14)).astype(np.float32)
    mask = np.array([[0, 0] + [1] * (len(row) - 2)])
    return {
        "input_ids": np.array([row]), "attention_mask": mask, "pixel_values": patches, "image_grid_hws": grids,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["odd", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "odd")]
)
def test_equals_torch(name, tmp_path):
    from kimi_vl.verify.oracle import build_oracle

    text, vision = VARIANTS[name]
    config = configuration({"max_position_embeddings": 128, "routed_scaling_factor": 1.7, **text}, vision)
    src = write_checkpoint(tmp_path / "src", config, balanced(config))
    oracle = build_oracle(src)
    given = prompt(config)
    want = oracle.run(given)
    model = KimiVLForConditionalGeneration.from_pretrained(
        src, mindspore_dtype="float32", prefill_chunk=16, max_image_patches=64
    )
    out = model(**given, output_taps=True)
    keep = given["attention_mask"] == 1
    assert rel_l2(out.logits.asnumpy()[keep], want["logits"][keep]) <= 1e-5
    for got, wanted in zip(out.taps["hidden_states"], want["hidden_states"]):
        assert rel_l2(got, wanted) <= 1e-5
    assert np.array_equal(out.taps["router_topk_indices"], want["router_topk_indices"])
    assert rel_l2(out.taps["projector_out"], want["projector_out"]) <= 1e-5
    greedy = oracle.greedy(given, 12).tokens
    ids = model.generate(**given, max_new_tokens=12, eos_token_id=None).asnumpy()
    assert np.array_equal(ids[:, -12:], greedy)
