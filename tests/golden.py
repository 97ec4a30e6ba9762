"""Golden cases from the Torch reference, and the one comparison that every engine is held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
CHECKPOINTS = ("tiny8-bf16", "tiny8-fp32")
CASES = [(c, p.stem) for c in CHECKPOINTS for p in sorted((DATA / f"{c}-golden").glob("*.npz"))]
IMAGE_KEYS = ("vision_out", "projector_out")


def rel_l2(got: np.ndarray, want: np.ndarray) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def load_case(checkpoint: str, name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{checkpoint}-golden" / f"{name}.npz") as z:
        return dict(z)


def inputs(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A case's arguments for the forward and for generate."""
    keys = ["input_ids", "attention_mask"]
    if len(case["pixel_values"]):
        keys += ["pixel_values", "image_grid_hws"]
    return {k: case[k] for k in keys}


def check_case(model, case: dict[str, np.ndarray], taps: bool = True, bar: float = 1e-5) -> None:
    """Logits, every hidden state and the image features within `bar` (relative L2), routing and greedy tokens identical."""
    mask = case["attention_mask"].astype(bool)
    out = model(**inputs(case), output_taps=taps)
    assert rel_l2(out.logits.asnumpy(), case["logits"]) <= bar
    if taps:
        assert rel_l2(out.taps["inputs_embeds"][mask], case["inputs_embeds"][mask]) <= bar
        for layer, (got, want) in enumerate(zip(out.taps["hidden_states"], case["hidden_states"])):
            assert rel_l2(got, want) <= bar, f"layer {layer}"
        assert np.array_equal(out.taps["router_topk_indices"], case["router_topk_indices"])
        for key in IMAGE_KEYS:
            if len(case["pixel_values"]):
                assert rel_l2(out.taps[key], case[key]) <= bar, key
    tokens = model.generate(
        **inputs(case), max_new_tokens=32, eos_token_id=None, past_key_values=None
    ).asnumpy()
    prompt = case["input_ids"].shape[1]
    assert np.array_equal(tokens[:, :prompt], case["input_ids"])
    assert np.array_equal(tokens[:, prompt:], case["greedy_tokens"])


def check_cache(model, case: dict[str, np.ndarray], bar: float = 1e-5) -> None:
    """Logits after the 32nd greedy token was fed, one token at a time, into the cache."""
    out = model(**inputs(case))
    for column in case["greedy_tokens"].T:
        out = model(input_ids=column[:, None], past_key_values=out.past_key_values)
    assert rel_l2(out.logits.asnumpy()[:, -1], case["greedy_logits_after"]) <= bar
