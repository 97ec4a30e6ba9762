"""The judgement: clean runs pass, and every gate can fail, at the right place."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from golden import DATA
from parity import INPUTS, OracleCandidate, link, whole

from kimi_vl.verify.judge import (
    PROFILES,
    Finding,
    ProfileError,
    Verdict,
    judge,
    judge_run,
    load_profile,
    network_order,
)
from kimi_vl.verify.metrics import ROUTING_TIE
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.runs import RunError, load_run, save_run

STRICT = load_profile("strict")
FAST = ("text", "steps")


@pytest.fixture(scope="module")
def oracle():
    return build_oracle(DATA / "tiny8-bf16")


@pytest.fixture(scope="module")
def clean(oracle):
    return link(oracle, OracleCandidate(oracle))


@pytest.fixture(scope="module")
def every_tap(clean):
    """The same with the taps that only a run layer by layer has, and those of a candidate with a processor."""
    made = copy.deepcopy(clean)
    for case in made["cases"]:
        layers = {tap: m for tap, m in case["taps"].items() if tap.startswith("layers.")}
        case["taps"] |= {tap.replace("layers", "forced"): dict(m) for tap, m in layers.items()}
        case["taps"]["inputs"] = dict(INPUTS)
    return made


def spoilt(oracle, spoil=lambda *_: None, spoil_greedy=lambda tokens: None, names=FAST):
    return judge(link(oracle, OracleCandidate(oracle, spoil, spoil_greedy), names), STRICT)


def test_the_reference_against_itself_passes(clean):
    verdict = judge(clean, STRICT)
    assert verdict.passed and verdict.first_bad is None and verdict.notes == []
    assert {f.case for f in verdict.findings} == {c["name"] for c in clean["cases"]}
    assert len(clean["cases"]) == 18
    assert [layer["used"] for layer in clean["suite"]["experts"]] == [8, 8]


def test_every_gate_judges_something(every_tap):
    findings = judge(every_tap, STRICT).findings
    for gate in STRICT.gates:
        stem = gate.taps.removesuffix(".*")
        assert any(f.metric == gate.metric and f.tap.split(".")[0] == stem for f in findings), gate


# ---- each gate can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", STRICT.gates, ids=lambda g: f"{g.taps}-{g.metric}")
def test_a_value_beyond_the_limit_fails_and_one_at_it_does_not(every_tap, gate):
    tap = gate.taps.replace("*", "1")
    changed = copy.deepcopy(every_tap)
    case = next(c for c in changed["cases"] if c["name"] == "image")
    metrics = case["taps"][tap]
    if isinstance(metrics[gate.metric], list):
        event = {"row": 0, "step": 3, "at": [0, 3], "candidate": 1}
        scale = metrics.get("scale", metrics.get("ref_max"))
        metrics[gate.metric] = [event | {"margin": gate.tie * scale * 0.99}]
        assert judge(changed, STRICT).passed
        metrics[gate.metric] = [event | {"margin": gate.tie * scale * 1.01}]
    else:
        metrics[gate.metric] = gate.at_most
        assert judge(changed, STRICT).passed
        metrics[gate.metric] = gate.at_most * 1.01 + (1 if gate.at_most == 0 else 0)
    verdict = judge(changed, STRICT)
    assert [(f.case, f.tap, f.metric) for f in verdict.failures] == [("image", tap, gate.metric)]


def on(key, change):
    def spoil(taps, inputs, calls):
        if key in taps:
            change(taps[key])

    return spoil


def scale_layer(n):
    return lambda h: np.multiply(h[n], np.float32(1.0001), out=h[n])


@pytest.mark.parametrize(
    ("key", "change", "first"),
    [
        ("vision_out", lambda a: np.multiply(a, np.float32(1.0001), out=a), "vision_out"),
        ("projector_out", lambda a: np.multiply(a, np.float32(1.0001), out=a), "projector_out"),
        ("inputs_embeds", lambda a: np.multiply(a, np.float32(1.0001), out=a), "inputs_embeds"),
        ("hidden_states", scale_layer(0), "layers.0"),
        ("hidden_states", scale_layer(2), "layers.2"),
        ("router_topk_indices", lambda a: a[1, :, -1:].__setitem__(..., [0, 1]), "router.2"),
        ("logits", lambda a: np.multiply(a, np.float32(1.0001), out=a), "logits"),
        ("tapped_logits_differ", lambda a: a.fill(1e-7), "tapped_logits"),
    ],
)
def test_a_spoilt_tap_is_the_first_bad(oracle, key, change, first):
    verdict = spoilt(oracle, on(key, change), names=("image",))
    assert verdict.first_bad.tap == first
    assert {f.tap for f in verdict.failures} == {first}


def test_one_other_greedy_token_fails(oracle):
    verdict = spoilt(oracle, spoil_greedy=lambda t: t[:1, 5:].fill(7))
    assert {f.tap for f in verdict.failures} == {"greedy"}
    assert (
        verdict.first_bad.says == "row 0 at step 5, with a token that is not even the reference's second best"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["projector_out", "hidden_states", "logits"])
def test_nonfinite_fails_whatever_the_profile_says(oracle, key, bad, tmp_path):
    lax = tmp_path / "lax.json"
    gates = [{"taps": "comparable", "metric": "excluded_share", "at_most": 1}]
    lax.write_text(json.dumps({"name": "lax", "what": "nothing is judged", "gates": gates}))

    def spoil(taps, inputs, calls):
        if key in taps:
            taps[key][..., -1, 3] = bad

    made = link(oracle, OracleCandidate(oracle, spoil), ("image",))
    verdict = judge(made, load_profile(str(lax)))
    tap = {"hidden_states": "layers.0"}.get(key, key)
    assert verdict.first_bad.tap == tap and verdict.first_bad.metric == "nonfinite"
    assert "NaN or infinity" in verdict.first_bad.says
    json.dumps(made, allow_nan=False)


def test_a_nonfinite_difference_of_the_graphs_with_taps_fails(oracle):
    made = link(
        oracle, OracleCandidate(oracle, on("tapped_logits_differ", lambda a: a.fill(np.nan))), ("text",)
    )
    (bad,) = judge(made, STRICT).failures
    assert (bad.tap, bad.says) == ("tapped_logits", "NaN or infinity at 1 places")
    json.dumps(made, allow_nan=False)


def test_a_candidate_that_raises_fails_the_case(oracle):
    def spoil(taps, inputs, calls):
        if len(calls) > 1:
            raise RuntimeError("the graph is dead\nlong story")

    verdict = spoilt(oracle, spoil)
    assert [f.case for f in verdict.failures] == ["steps"]
    assert verdict.first_bad.says == "RuntimeError: the graph is dead"


@pytest.mark.parametrize(
    "key", ["logits", "hidden_states", "router_topk_indices", "inputs_embeds", "vision_out"]
)
def test_a_promised_tap_that_is_missing_fails(oracle, key):
    verdict = spoilt(oracle, lambda taps, *_: taps.pop(key, None), names=("image",))
    assert not verdict.passed
    assert verdict.first_bad.metric == ("raised" if key == "logits" else "missing")


def test_a_wrong_shape_fails(oracle):
    def spoil(taps, inputs, calls):
        taps["hidden_states"] = taps["hidden_states"][:, :, :-1]

    verdict = spoilt(oracle, spoil, names=("text",))
    assert "shape" in verdict.first_bad.says


def test_no_case_at_all_is_no_proof(clean):
    assert not judge(clean | {"cases": []}, STRICT).passed


# ---- faults in the network are found where they are -----------------------------------------------------------------


def text_layer(n):
    return f"model.language_model.layers.{n}."


def swap(state, a, b):
    state[a][:], state[b][:] = state[b].clone(), state[a].clone()


def swap_experts(state):
    for name in ("gate_up_proj", "down_proj"):
        w = state[text_layer(2) + "mlp.experts." + name]
        w[[0, 1]] = w[[1, 0]]


def interleave_one_head(state):
    """One head's rope rows as if they had never been paired: evens first, then odds."""
    w = state[text_layer(0) + "self_attn.q_proj.weight"][24 + 16 : 48]
    w[:] = torch.cat([w[0::2], w[1::2]])


FAULTS = {
    "position table transposed": (
        lambda s: s["model.vision_tower.patch_embed.pos_emb.position_embeddings"].copy_(
            s["model.vision_tower.patch_embed.pos_emb.position_embeddings"].transpose(0, 1).clone()
        ),
        "vision_out",
    ),
    "one bias of the tower": (
        lambda s: s["model.vision_tower.layers.1.mlp.fc2.bias"][5].add_(0.1),
        "vision_out",
    ),
    "projector norm": (lambda s: s["model.mm_projector.pre_norm.weight"].mul_(1.01), "projector_out"),
    "one embedding row": (
        lambda s: s["model.language_model.embed_tokens.weight"][:20].mul_(1.01),
        "inputs_embeds",
    ),
    "gate and up swapped": (
        lambda s: swap(s, text_layer(0) + "mlp.gate_proj.weight", text_layer(0) + "mlp.up_proj.weight"),
        "layers.0",
    ),
    "one head's rope not paired": (interleave_one_head, "layers.0"),
    "two experts swapped": (swap_experts, "layers.2"),
    "correction bias missing": (
        lambda s: s[text_layer(1) + "mlp.gate.e_score_correction_bias"].zero_(),
        "router.1",
    ),
    "final norm": (lambda s: s["model.language_model.norm.weight"].mul_(1.001), "logits"),
    "one row of lm_head": (lambda s: s["lm_head.weight"][:40].mul_(1.01), "logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_weights_is_found_where_it_is(oracle, fault):
    change, first = FAULTS[fault]
    broken = build_oracle(DATA / "tiny8-bf16")
    with torch.no_grad():
        change(broken.network.state_dict())
    names = ("steps", "experts")
    verdict = judge(link(oracle, OracleCandidate(broken), names), STRICT)
    assert verdict.first_bad.tap == first, [f.tap for f in verdict.failures]


def test_a_scaling_factor_of_another_model(oracle):
    broken = build_oracle(DATA / "tiny8-bf16")
    for layer in broken.network.model.language_model.layers[1:]:
        layer.mlp.gate.routed_scaling_factor = 2.5
    assert judge(link(oracle, OracleCandidate(broken), ("text",)), STRICT).first_bad.tap == "layers.1"


def test_padding_that_is_attended_to_fails_batches_only(oracle):
    class Careless(OracleCandidate):
        def run(self, inputs, calls):
            return super().run(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}, calls)

    made = link(oracle, Careless(oracle), ("text", "image", "batch", "batch-steps"))
    assert {f.case for f in judge(made, STRICT).failures} == {"batch", "batch-steps"}


def test_a_cache_that_is_off_by_one_fails_though_the_prefill_is_right(oracle):
    """Continued calls see their positions one too small."""

    def spoil(taps, inputs, calls):
        if len(calls) > 1:
            early = oracle.run(
                {k: v[:, 1:] if k != "pixel_values" and v.ndim == 2 else v for k, v in inputs.items()}
            )
            taps["logits"][:, calls[0] :] = early["logits"][:, calls[0] - 1 :]

    verdict = spoilt(oracle, spoil, names=("text", "pieces", "bucket"))
    assert {f.case for f in verdict.failures} == {"pieces", "bucket"}
    assert verdict.first_bad.tap == "logits"


# ---- ties -----------------------------------------------------------------------------------------------------------


def test_what_follows_from_a_routing_tie_is_noted_not_judged(oracle):
    """The reference's own choice at layer 1, token 20 is made a tie; the candidate chooses otherwise."""

    class Tied(type(oracle)):
        def run(self, inputs):
            taps = super().run(inputs)
            taps["router_gap"][0, 0, 20] = ROUTING_TIE / 2
            return taps

    def spoil(taps, inputs, calls):
        taps["router_topk_indices"][0, 0, 20] = [-3, -2]
        taps["hidden_states"][1:, 0, 20:] += 1
        taps["logits"][0, 20:] += 1

    made = link(Tied(oracle.network, oracle.config), OracleCandidate(oracle, spoil), ("text",))
    verdict = judge(made, STRICT)
    assert verdict.passed
    assert verdict.notes[0] == "case text, router of decoder layer 1: 1 choices of experts differ in a tie"
    assert made["cases"][0]["taps"]["comparable"]["excluded"] == 4

    def worse(taps, inputs, calls):
        spoil(taps, inputs, calls)
        taps["hidden_states"][1, 0, 19] += 1

    made = link(Tied(oracle.network, oracle.config), OracleCandidate(oracle, worse), ("text",))
    assert judge(made, STRICT).first_bad.tap == "layers.1"


@pytest.mark.parametrize(
    ("tap", "key", "place"), [("layers.2", "hidden_states", (2, 0, 22, 5)), ("logits", "logits", (0, 22, 5))]
)
def test_a_nonfinite_value_behind_a_routing_tie_fails(oracle, tap, key, place):
    class Tied(type(oracle)):
        def run(self, inputs):
            taps = super().run(inputs)
            taps["router_gap"][0, 0, 20] = 0
            return taps

    def spoil(taps, inputs, calls):
        taps["router_topk_indices"][0, 0, 20] = [-3, -2]
        taps[key][place] = np.inf

    made = link(Tied(oracle.network, oracle.config), OracleCandidate(oracle, spoil), ("text",))
    (bad,) = judge(made, STRICT).failures
    assert (bad.tap, bad.says) == (tap, "NaN or infinity at 1 places, first at [0, 22, 5]")


def test_too_much_behind_a_tie_is_no_proof(oracle):
    class Tied(type(oracle)):
        def run(self, inputs):
            taps = super().run(inputs)
            taps["router_gap"][0, 0, 3] = 0
            return taps

    def spoil(taps, inputs, calls):
        taps["router_topk_indices"][0, 0, 3] = [-3, -2]

    made = link(Tied(oracle.network, oracle.config), OracleCandidate(oracle, spoil), ("text",))
    assert [f.tap for f in judge(made, STRICT).failures] == ["comparable"]


# ---- what could not be judged is said -------------------------------------------------------------------------------


def test_a_bundle_without_taps_is_judged_by_logits_and_tokens(oracle):
    verdict = judge(link(oracle, OracleCandidate(oracle, taps=False), FAST), STRICT)
    assert verdict.passed
    assert verdict.notes == [
        "not available in this candidate, so not judged: vision tower, input embeddings, hidden states of "
        "the decoder layers, choices of experts (export with --taps to have them); logits and tokens were judged"
    ]
    spoil = on("logits", lambda a: np.multiply(a, np.float32(1.0001), out=a))
    broken = judge(link(oracle, OracleCandidate(oracle, spoil, taps=False), FAST), STRICT)
    assert broken.first_bad.tap == "logits"


def test_other_weights_are_noted(clean):
    changed = whole(copy.deepcopy(clean))
    changed["links"][0]["candidate"]["dtype"] = "float16"
    assert judge_run(changed).notes == [
        "the checkpoint's weights are float32, the candidate's float16: they differ by rounding"
    ]


def test_cases_that_did_not_run_and_unused_experts_are_noted(clean):
    changed = copy.deepcopy(clean)
    changed["suite"]["skipped"] = [{"name": "tall", "what": "", "why": "needs 40 patches"}]
    changed["suite"]["experts"][1]["used"] = 7
    assert judge(changed, STRICT).notes == [
        "case tall did not run: needs 40 patches",
        "decoder layer 2: 7 of 8 experts were used by any case; the others were not verified",
    ]


# ---- order, profiles, files -----------------------------------------------------------------------------------------


def test_the_first_bad_is_first_in_the_network_not_in_the_list():
    def bad(case, tap):
        return Finding(case, tap, "rel_l2", 1.0, 0.0, False)

    order = ["inputs", "vision_out", "projector_out", "inputs_embeds", "layers.0", "router.1", "layers.1"]
    order += ["router.2", "layers.10", "logits", "last_logits", "perplexity", "greedy", "tapped_logits"]
    order += ["comparable", "error"]
    assert sorted(reversed(order), key=network_order) == order
    verdict = Verdict(
        "x", [bad("a", "logits"), bad("a", "layers.10"), bad("b", "layers.9"), bad("c", "layers.9")]
    )
    assert (verdict.first_bad.case, verdict.first_bad.tap) == ("b", "layers.9")


def test_every_shipped_profile_can_be_loaded():
    names = [path.stem for path in PROFILES.glob("*.json")]
    assert "strict" in names
    assert [load_profile(name).name for name in names] == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ('{"name": "x", "what": "", "gates": []}', "it has no gates"),
        ('{"name": "x", "gates": []}', "'what'"),
        (
            '{"name": "x", "what": "", "gates": [{"taps": "logits", "metric": "kl", "at_most": "1"}]}',
            "at_most is '1'",
        ),
        (
            '{"name": "x", "what": "", "gates": [{"taps": "layer.*", "metric": "kl", "at_most": 1}]}',
            "no tap matches",
        ),
        ('{"name": "x", "what": "", "gates": [{"taps": "logits", "metric": "kl", "most": 1}]}', "most"),
    ],
)
def test_a_profile_that_cannot_be_understood_is_refused(tmp_path, content, says):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ProfileError, match=says):
        load_profile(str(tmp_path / "p.json"))


def test_an_unknown_profile_is_refused():
    with pytest.raises(ProfileError, match="there is no 'strikt'; give one of bf16, strict"):
        load_profile("strikt")


def test_a_gate_on_a_metric_that_the_run_has_not_is_refused(clean, tmp_path):
    gates = [{"taps": "logits", "metric": "perplexity", "at_most": 1}]
    (tmp_path / "p.json").write_text(json.dumps({"name": "p", "what": "", "gates": gates}))
    with pytest.raises(ProfileError, match="no metric 'perplexity' for logits"):
        judge(clean, load_profile(str(tmp_path / "p.json")))


def test_what_no_shipped_profile_asks_for_can_be_judged_by_ones_own(oracle, clean, tmp_path):
    """Of the final norm wrong by a tenth, on the logits; and of the text's perplexity."""
    metrics = {
        "logits": ("cosine_distance", "reverse_kl", "topk_changed_share"),
        "perplexity": ("log_ratio",),
    }
    gates = [{"taps": tap, "metric": m, "at_most": 1e-4} for tap, ms in metrics.items() for m in ms]
    (tmp_path / "p.json").write_text(json.dumps({"name": "p", "what": "", "gates": gates}))
    own = load_profile(str(tmp_path / "p.json"))
    assert judge(clean, own).passed
    broken = build_oracle(DATA / "tiny8-bf16")
    with torch.no_grad():
        broken.network.state_dict()["model.language_model.norm.weight"][::2] *= 1.1
    verdict = judge(link(oracle, OracleCandidate(broken), ("perplexity",)), own)
    assert [(f.tap, f.metric) for f in verdict.failures] == [(t, m) for t, ms in metrics.items() for m in ms]


def test_a_saved_run_is_judged_as_the_run(clean, tmp_path):
    save_run(whole(clean), tmp_path / "run.json")
    again = load_run(tmp_path / "run.json")
    assert judge_run(again) == judge_run(whole(clean)) and judge_run(again).verdicts == (
        judge(clean, STRICT),
    )
    assert again["links"][0]["cases"] == clean["cases"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t[:-200], "not valid JSON"),
        (lambda t: t.replace('"rel_l2": 0.0', '"rel_l2": 0.1', 1), "does not have the digest"),
        (lambda t: t.replace('"kimi_vl-parity-run"', '"other"'), "is no run of verify-parity"),
        (lambda t: t.replace('"version": 2', '"version": 99', 1), "has version 99"),
        (lambda t: "[]", "is no run"),
    ],
)
def test_a_damaged_run_is_refused(clean, tmp_path, damage, says):
    save_run(whole(clean), tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    assert damage(text) != text
    (tmp_path / "run.json").write_text(damage(text))
    with pytest.raises(RunError, match=says):
        load_run(tmp_path / "run.json")


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        load_run(tmp_path / "run.json")


def test_runs_repeat_apart_from_the_header(oracle, clean):
    again = link(oracle, OracleCandidate(oracle))
    assert {k: v for k, v in again.items() if k != "header"} == {
        k: v for k, v in clean.items() if k != "header"
    }
