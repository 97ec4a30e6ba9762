"""Bundles for a device, executed node by node from the shipped bf16 graphs and weights, against Torch."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import parity
import pytest
from click.testing import CliRunner
from golden import DATA, check_cache, check_case, inputs, load_case, rel_l2
from mindspore.ops import auto_generate as generated

from kimi_vl.export import export, plan_export
from kimi_vl.export.plan import TARGETS, open_converted
from kimi_vl.verify.candidates import inspect, open_candidate
from kimi_vl.verify.cases import SeededSource, select, suite
from kimi_vl.verify.cli import cli
from kimi_vl.verify.interpreted import InterpretedModel
from kimi_vl.verify.judge import judge, load_profile
from kimi_vl.verify.runner import run_suite

BF16 = "tiny8-bf16"
CASES = ("text", "image", "images2", "bigimage", "long", "batch")
DEVICES = tuple(name for name, target in TARGETS.items() if target.runtime)
SMALL = {"seq": (256,), "taps": False}
INDEX_COPY = pytest.param(
    "ascend",
    "index-copy",
    marks=pytest.mark.skipif(not hasattr(generated, "InplaceIndexCopy"), reason="not in this MindSpore"),
)
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def bundle(target: str, **changed: Any) -> Path:
    """The golden checkpoint's, its sizes or the variants of the kernels changed."""
    path = Path(_room().name) / "-".join([target, *map(str, changed.values())])
    weights = open_converted(bundles.converted(BF16))
    export(plan_export(weights, **bundles.SIZES[BF16] | {"target": target} | changed), path)
    return path


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_apart_from_rounding_it_computes_what_torch_does(target, case):
    """Logits, every layer and the pictures within 1e-5, routing and 32 cached greedy tokens identical."""
    check_case(InterpretedModel.from_bundle(bundle(target)), load_case(BF16, case))


@pytest.mark.parametrize(
    ("target", "variants"),
    [
        ("ascend", {"attention": "plain"}),
        ("ascend", {"experts": "plain"}),
        ("ascend", {"cache_write": "scatter-update"}),
        ("lite", {"attention": "plain", "experts": "plain", "cache_write": "scatter-nd"}),
    ],
)
def test_so_does_each_variant(target, variants):
    model = InterpretedModel.from_bundle(bundle(target, **SMALL, **variants))
    check_case(model, load_case(BF16, "image"), taps=False)


@pytest.mark.parametrize(
    ("target", "cache_write"),
    [("ascend", "scatter"), INDEX_COPY, ("lite", "scatter-update")],
)
def test_so_does_a_batch_whose_rows_share_a_cache_parameter(target, cache_write):
    model = InterpretedModel.from_bundle(bundle(target, **SMALL, cache_write=cache_write, batch=2))
    check_case(model, load_case(BF16, "batch"), taps=False)


def test_its_cache_is_right_after_32_steps():
    check_cache(InterpretedModel.from_bundle(bundle("ascend")), load_case(BF16, "text"))


@pytest.mark.parametrize("case", ["text", "image"])
def test_rounded_to_bf16_at_every_operator_it_is_as_far_from_fp32_as_torchs_bf16(case):
    """Up to a factor of 4, which two right bf16 runs differ by where a choice of experts flips."""
    golden = load_case(BF16, case)
    model = InterpretedModel.from_bundle(bundle("ascend"), arithmetic="rounded")
    distance = rel_l2(model(**inputs(golden)).logits.asnumpy(), golden["logits"])
    assert 0 < distance**2 <= 4 * float(golden["bf16_nmse"])


def test_verify_parity_judges_it_rounded_by_what_rounding_costs_torch(tmp_path):
    arguments = ["--reference", DATA / BF16, "--candidate", bundle("ascend"), "--report", tmp_path]
    arguments += ["--arithmetic", "rounded", "--cases", "image", "--cases", "pieces"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout and "results rounded to bfloat16" in result.stdout
    assert "unwitnessed operators: FusedInferAttentionScore;" in result.stdout
    fp32, rounded = json.loads((tmp_path / "run.json").read_text())["links"]
    assert (fp32["candidate"]["arithmetic"], rounded["candidate"]["arithmetic"]) == ("lifted", "rounded")
    assert rounded["cases"][0]["calibration"]["logits"]["kl"] > 0 and "calibration" not in fp32["cases"][0]
    again = CliRunner().invoke(cli, ["judge", str(tmp_path / "run.json")])
    assert again.exit_code == 0 and "checks of profile strict and bf16 hold" in again.stdout


class Spoilt:
    """Graphs of which those that generation alone runs are slightly wrong, in what they give or in what they cache; or
    those for one token, which do not take a picture's features."""

    def __init__(self, graphs, what):
        self._graphs, self._what = graphs, what

    def __getattr__(self, name):
        return getattr(self._graphs, name)

    def text(self, tokens, context, rows, inputs, all_logits, taps):
        if tokens == 1 and self._what == "features":
            inputs["embeds_mask"] = np.zeros_like(inputs["embeds_mask"])
        out = self._graphs.text(tokens, context, rows, inputs, all_logits, taps)
        if not all_logits and self._what == "logits":
            out[0] = out[0] * np.float32(1 + 1e-4)
        elif not all_logits and self._what == "cache":
            rows[0].buffers[1][3] *= np.float32(1 + 1e-2)
        return out


@pytest.mark.parametrize("what", ["nothing", "logits", "cache", "features"])
def test_a_fault_of_the_graphs_that_generate_is_seen_in_their_logits_though_no_token_changes(what):
    found = inspect(bundle("ascend"))
    candidate = open_candidate(found)
    candidate.model.engine.graphs = Spoilt(candidate.model.engine.graphs, what)
    oracle = parity.oracle()
    plan = replace(select(suite(oracle.config, found.limits), ("pieces",))[0], new_tokens=2)
    made = run_suite(oracle, candidate, [plan], SeededSource(oracle.config), seed=1)
    verdict = judge(made, load_profile("strict"))
    assert {f.tap for f in verdict.failures} == (set() if what == "nothing" else {"last_logits"})
    unused = [
        "vision-64", "vision-64-taps", "prefill-64x256", "decode-256", "decode-256-taps",
    ]  # fmt: skip
    assert set(made["suite"]["unused"]) == set(unused)
    assert f"graphs that no case ran, so not judged: {', '.join(made['suite']['unused'])}" in verdict.notes


def test_a_wrong_weight_is_seen():
    model = InterpretedModel.from_bundle(bundle("ascend"))
    array, changed = model.weights.array, "language_model.model.layers.1.mlp.experts.down_proj"
    assert changed in model.weights
    model.weights.array = lambda name: np.flip(array(name), 0) if name == changed else array(name)
    golden = load_case(BF16, "text")
    assert rel_l2(model(**inputs(golden)).logits.asnumpy(), golden["logits"]) > 1e-2
