"""The noise envelope: what noise does, that it repeats, and that its limits let through what is right and nothing else."""

from __future__ import annotations

import copy
import json
import shutil

import bundles
import ml_dtypes
import numpy as np
import parity
import pytest
import torch
from click.testing import CliRunner
from golden import DATA
from mindspore import nn, ops
from test_ascend_interpreted import BF16, bundle
from traced import interpreter, run

from kimi_vl.export.bundle import Bundle
from kimi_vl.verify import envelope as E
from kimi_vl.verify.candidates import ModelCandidate, inspect
from kimi_vl.verify.cases import SUITE_VERSION, SeededSource, select, suite
from kimi_vl.verify.cli import cli
from kimi_vl.verify.interpreted import InterpretedModel
from kimi_vl.verify.judge import ProfileError, judge, load_profile
from kimi_vl.verify.mindir import Interpreter, InterpreterError, Noise
from kimi_vl.verify.mindir.values import Value
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.runner import run_suite
from kimi_vl.verify.runs import save_run

pytestmark = pytest.mark.usefixtures("one_torch_thread")
NAMES = ("image", "steps")


def measured(seeds=4):
    found = inspect(bundle("ascend"), arithmetic="rounded")
    plans = select(suite(found.config, found.limits), NAMES)
    return E.measure(bundle("ascend"), plans, SeededSource(found.config), seeds, inputs_seed=1)


@pytest.fixture(scope="module")
def envelope(one_torch_thread):
    return measured()


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_noise_is_1_or_2_units_in_the_last_place_up_or_down(dtype, bits):
    x = torch.cat([torch.randn(4000), torch.zeros(9), torch.tensor([np.inf, -np.inf, np.nan])]).to(dtype)
    moved = Noise(5)(Value(x, dtype)).data
    units = moved.view(bits).long() - x.view(bits).long()
    assert set(units[:4000].tolist()) == {-2, -1, 1, 2} and (units[4000:] == 0).all()
    assert (moved[:4000].sign() == x[:4000].sign()).all()


class Two(nn.Cell):
    """One operator that moves numbers and one that computes."""

    def construct(self, x):
        return ops.reshape(x, (8, 8)), x * x


def test_operators_that_only_move_numbers_have_no_noise():
    x = np.random.default_rng(0).standard_normal(64).astype(ml_dtypes.bfloat16)
    graph = interpreter(Two(), x).graph
    moved, squared = run(Interpreter(graph, {}, "rounded", Noise(1)), x)
    _, clean = run(Interpreter(graph, {}, "rounded"), x)
    assert moved.tobytes() == x.tobytes() and (squared != clean).all()
    with pytest.raises(InterpreterError, match="noise: .* has to be 'rounded'"):
        Interpreter(graph, {}, "lifted", Noise(1))


# The envelope --------------------------------------------------------------------------------------------------------


def test_the_same_seeds_give_the_same_envelope(envelope):
    assert measured() == envelope
    seeds = envelope["figures"]["image"]["logits"]["kl"]
    assert len(set(seeds)) == 4 and min(seeds) > 0


def test_limits_are_the_largest_of_all_seeds_and_cases_with_the_margin(envelope):
    gates = {(g.taps, g.metric): g.at_most for g in E.limits(envelope).gates}
    both = [v for name in NAMES for v in envelope["figures"][name]["layers.2"]["rel_l2"]]
    assert gates["layers.2", "rel_l2"] == 2 * max(both)
    places = {c["name"]: c["places"] for c in envelope["suite"]["cases"]}
    flips = [2 * max(envelope["figures"][n]["router.1"]["flipped_share"]) + 1 / places[n] for n in NAMES]
    assert gates["router.1", "flipped_share"] == max(flips)
    assert set(gates) >= {("logits", "kl"), ("logits", "top1_changed_share"), ("layers.0", "nmse_settled")}


def judged(envelope, spoil=None):
    """A run of noise that the envelope has not seen, against Torch in fp32, judged by the envelope."""
    found = inspect(bundle("ascend"), arithmetic="rounded")
    model = InterpretedModel.from_bundle(bundle("ascend"), arithmetic="rounded", noise=Noise(1000))
    if spoil:
        array = model.weights.array
        model.weights.array = lambda name: spoil(name, array(name))
    plans = select(suite(found.config, found.limits), NAMES)
    source = SeededSource(found.config)
    made = run_suite(build_oracle(DATA / BF16), ModelCandidate(model, found), plans, source, seed=1)
    made["reference"] = {"stored": "bfloat16"}
    return judge(made, E.limits(envelope))


def test_another_draw_of_noise_is_within_the_limits(envelope):
    verdict = judged(envelope)
    assert verdict.passed, [(f.case, f.tap, f.metric, f.value, f.limit) for f in verdict.failures]


def test_a_wrong_weight_is_not(envelope):
    changed = "language_model.model.layers.2.mlp.experts.down_proj"
    verdict = judged(envelope, lambda name, array: np.flip(array, 0) if name == changed else array)
    assert verdict.first_bad.tap == "layers.2"


# Files ---------------------------------------------------------------------------------------------------------------


def test_an_envelope_of_another_version_of_the_suite_judges_no_run(envelope, tmp_path):
    """Its limits are for other inputs; a run.json judged again says so too."""
    envelope = envelope | {"suite": envelope["suite"] | {"version": SUITE_VERSION - 1}}
    with pytest.raises(ProfileError) as raised:
        judged(envelope)
    assert str(raised.value) == (
        f"profile envelope: its limits were measured with version {SUITE_VERSION - 1} of the suite, but the run is of "
        f"version {SUITE_VERSION}, whose inputs are others; measure them again with verify-parity envelope"
    )
    E.save(envelope, tmp_path / E.NAME)
    run = copy.deepcopy(parity.good())
    run["links"][0]["candidate"]["arithmetic"] = "rounded"
    save_run(run, tmp_path / "run.json")
    result = CliRunner().invoke(
        cli, ["judge", str(tmp_path / "run.json"), "--profile", str(tmp_path / E.NAME)]
    )
    assert result.exit_code == 2 and "of the suite, but the run is of version" in result.stderr


def test_the_command_publishes_it_in_the_bundle(tmp_path):
    mine = shutil.copytree(bundle("ascend"), tmp_path / "mindir")
    arguments = ["envelope", "--candidate", str(mine), "--seeds", "2", "--cases", "text"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "| logits | kl |" in result.stdout
    saved = E.load(mine / E.NAME, Bundle.load(mine))
    assert saved["noise"]["seeds"] == 2 and saved["dtype"] == "bfloat16"
    assert list(saved["figures"]) == ["text"]
    InterpretedModel.from_bundle(mine, verify=True)  # and stays whole


def test_a_bundle_in_fp32_has_none(tmp_path):
    result = CliRunner().invoke(cli, ["envelope", "--candidate", str(bundles.bundle("tiny8-bf16"))])
    assert result.exit_code == 2 and "its graphs compute in float32" in result.stderr


def test_an_envelope_that_is_damaged_or_of_another_bundle_is_refused(envelope, tmp_path):
    path = tmp_path / E.NAME
    with pytest.raises(E.EnvelopeError, match="cannot be read"):
        E.load(path)
    E.save(envelope, path)
    assert E.limits(E.load(path)) == E.limits(envelope) == load_profile(str(path))
    with pytest.raises(E.EnvelopeError, match="is of another bundle"):
        E.load(path, Bundle.load(bundle("ascend", attention="plain")))
    whole = json.loads(path.read_text())
    whole["figures"]["image"]["logits"]["kl"][0] *= 2
    for change, says in ((whole, "digest"), (whole | {"version": 9}, "version 9"), ({}, "is no envelope")):
        path.write_text(json.dumps(change))
        with pytest.raises(E.EnvelopeError, match=says):
            E.load(path)
