"""The gate fails where it must: faults put into a candidate are caught, and named where they are."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from kimi_vl.modeling.kernels import library

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ROOT = Path(__file__).parents[1]
# Of every way to get a fault in but the two that trace graphs again, and of every place.
QUICK = (
    *("expert-neighbour", "weight-1-percent", "embedding-shifted", "final-norm-missing"),
    *("late-decoding", "bilinear", "row-before-last", "config-eps"),
    "rounded-tensor-6-percent",
)


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def shop(scripts_on_path):
    from gate_kit.workshop import Workshop

    with tempfile.TemporaryDirectory() as room:
        yield Workshop(Path(room))


def all_faults():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        from gate_kit.faults import FAULTS

    return {fault.name: fault for fault in FAULTS}


FAULTS = all_faults()


def failed_at(outcome):
    bad = outcome.verdict and outcome.verdict.first_bad
    return outcome.place, bad, outcome.refused


def needs_rounding(arithmetic):
    if arithmetic == "rounded" and not (library.available() and library.can_round()):
        pytest.skip("this machine has no operators that round")


def test_without_a_fault_it_passes(shop):
    verdict = shop.clean("tiny8", cases=("quick",))
    assert verdict.passed, verdict.failures


def test_without_a_fault_a_bundle_passes_whose_operators_round_here(shop):
    needs_rounding("rounded")
    verdict = shop.clean("eps", "cpu", "mindspore", "rounded", cases=("quick",))
    assert verdict.profile.name == "bf16" and verdict.passed, verdict.failures


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_caught_where_it_is(shop, name):
    needs_rounding(FAULTS[name].arithmetic)
    outcome = shop.examine(dataclasses.replace(FAULTS[name], cases=("quick",)))
    assert outcome.right, failed_at(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", sorted({(f.model, f.target, f.through, f.arithmetic, f.batch) for f in FAULTS.values()})
)
def test_without_a_fault_every_candidate_passes(shop, key):
    needs_rounding(key[3])
    verdict = shop.clean(*key)
    assert verdict.passed, verdict.failures


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_caught_where_it_is(shop, name):
    needs_rounding(FAULTS[name].arithmetic)
    outcome = shop.examine(FAULTS[name])
    assert outcome.right, failed_at(outcome)


def test_there_are_many_of_every_kind():
    from gate_kit.fault import INTO

    assert len(FAULTS) >= 60 and {fault.into for fault in FAULTS.values()} == set(INTO)


# ---- the checkpoint made for eps ------------------------------------------------------------------------------------

# Modules of the Torch reference by the norms that a fault of `network` changes, and the wrong eps.
EPS = {
    "kv-a-eps": ("kv_a_layernorm", 1e-5),
    "rms-eps": ("input_layernorm|post_attention_layernorm|language_model.norm", 1e-6),
    "final-norm-eps": ("language_model.norm", 1e-6),
    "tower-eps": ("vision_tower.*(norm1|norm2|final_layernorm)", 1e-6),
    "projector-eps": ("mm_projector.pre_norm", 1e-6),
}


@pytest.fixture(scope="module")
def made_for_eps(scripts_on_path, tmp_path_factory):
    from gate_kit.models import MODELS

    return MODELS["eps"].source(tmp_path_factory.mktemp("eps"))


@pytest.mark.parametrize("name", EPS)
def test_on_the_checkpoint_made_for_eps_each_wrong_one_moves_the_logits_by_more_than_a_tenth(
    made_for_eps, name
):
    from golden import rel_l2

    from kimi_vl.verify.cases import Limits, SeededSource, build, select, suite
    from kimi_vl.verify.oracle import build_oracle

    oracle = build_oracle(made_for_eps)
    (plan,) = select(suite(oracle.config, Limits((128,), 32, 64)), ["images"])
    inputs = build(plan, SeededSource(oracle.config)).inputs
    right = oracle.run(inputs)["logits"]
    pattern, eps = EPS[name]
    changed = 0
    for path, module in oracle.network.named_modules():
        if re.search(rf"({pattern})$", path):
            attribute = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
            assert getattr(module, attribute) != eps
            setattr(module, attribute, eps)
            changed += 1
    assert changed and rel_l2(oracle.run(inputs)["logits"], right) > 0.1


# ---- the command ----------------------------------------------------------------------------------------------------


def prove(*arguments):
    from prove_gate import cli

    return CliRunner().invoke(cli, arguments)


def test_the_command_lists_every_fault_and_knows_no_other():
    listed = prove("--list")
    assert listed.exit_code == 0 and [line.split()[0] for line in listed.output.splitlines()] == [*FAULTS]
    unknown = prove("--only", "eps")
    assert unknown.exit_code == 2 and "there is no fault 'eps'" in unknown.output


def test_the_command_fails_on_a_fault_that_passes_or_is_named_elsewhere(monkeypatch, shop):
    from gate_kit import faults, workshop
    from gate_kit.fault import Fault

    elsewhere = dataclasses.replace(FAULTS["expert-neighbour"], place="layers.2", cases=("text",))
    none = Fault("none", "nothing", "weights", "layers.0", lambda weights: None, cases=("text",))
    right = dataclasses.replace(elsewhere, name="right", place="layers.1")
    monkeypatch.setattr(faults, "FAULTS", (elsewhere, none, right))
    monkeypatch.setattr(workshop, "Workshop", lambda room: shop)  # has the clean bundle already
    done = prove("--json")
    assert done.exit_code == 1
    assert "1 of 3 faults caught at the right place" in done.output
    assert prove("--only", "right").exit_code == 0


def test_a_row_of_the_table_is_brought_up_to_date_and_the_others_stay(tmp_path):
    from gate_kit.table import BEGIN, END, update
    from gate_kit.workshop import Outcome

    first, second, third = list(FAULTS.values())[:3]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    faults = (first, second, third)
    update(page, [Outcome(third, refused="not today"), Outcome(first, refused="old")], faults)
    update(page, [Outcome(first, refused="new")], faults)
    before, begin, head, line, *rows, end, after = page.read_text().splitlines()
    assert (before, begin, end, after) == ("before", BEGIN, END, "after")
    assert [row.split(" | ")[0] for row in rows] == [f"| {first.what}", f"| {third.what}"]
    assert "new" in rows[0] and "not today" in rows[1]


def test_the_page_has_every_fault_and_all_are_right():
    from gate_kit.table import BEGIN, END

    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [f.what for f in FAULTS.values()]
    assert all(row.split(" | ")[5] == "yes" for row in rows)
