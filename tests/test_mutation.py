"""Faults made by machine, and runs without one: what proves that verification sees the first and is silent on the second."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from golden import DATA
from test_ascend_interpreted import bundle

from kimi_vl.export.mindir import serialise
from kimi_vl.export.nodes import read_nodes
from kimi_vl.export.proto import pb

TINY = DATA / "tiny8-bf16"
SCRIPTS = Path(__file__).parents[1] / "scripts"
TARGETS = ("ascend", "cpu", "plain")  # the last for the CPU, without the library's operators
# Kinds of change that no operator of these graphs has: slices; casts and permutations.
WITHOUT = {"ascend": {"bounds"}, "cpu": {"bounds", "dtype", "uncast", "permutation"}, "plain": set()}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@functools.cache
def graphs(target):
    from mutation_kit.sampling import Graphs

    if target == "ascend":
        return Graphs(bundle("ascend"))
    return Graphs(bundles.bundle("tiny8-bf16", operators=target == "cpu"))


@functools.cache
def gate():
    from mutation_kit.proving import Gate

    return Gate.of(bundle("ascend"), TINY)


@functools.cache
def mutants(target):
    return tuple(graphs(target).mutants(60, seed=3, least=2))


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_seed_gives_the_same_faults_all_different_and_none_a_graph_as_it_is(target):
    made = mutants(target)
    assert list(made) == list(graphs(target).mutants(60, seed=3, least=2))
    assert list(made) != list(graphs(target).mutants(60, seed=4, least=2))
    as_they_are = {serialise(view.model) for view in graphs(target).views.values()}
    contents = {m.content for m in made}
    assert len(contents) == len(made) and not contents & as_they_are


@pytest.mark.parametrize("target", TARGETS)
def test_every_operator_and_kind_of_change_has_its_share(target):
    from mutation_kit.kinds import KINDS

    quotas = graphs(target).quotas(500)
    # A Depend that holds a tuple back has no other value of that type beside it.
    assert set(quotas) - {m.operator for m in mutants(target)} <= {"Depend"}
    assert min(quotas.values()) == 4 and quotas["Reshape"] > 4
    kinds = {kind: list(graphs(target).mutants(1, 1, [kind], least=1)) for kind in KINDS}
    assert all(m.kind == kind for kind, made in kinds.items() for m in made)
    without = {kind for kind, made in kinds.items() if not made}
    assert without <= WITHOUT[target]


@pytest.mark.parametrize("target", TARGETS)
def test_a_fault_is_one_node_and_what_it_needs(target):
    for mutant in mutants(target):
        before = graphs(target).views[mutant.graph].model
        after = pb.ModelProto.FromString(mutant.content)
        old = {n.SerializeToString(deterministic=True) for n in before.graph.node}
        new = [n for n in after.graph.node if n.SerializeToString(deterministic=True) not in old]
        assert 0 <= len(after.graph.node) - len(before.graph.node) <= 2
        if mutant.kind not in ("bypass", "uncast"):  # of these, whoever took the result is changed
            assert sum(n.op_type != "Constant" and "fault" not in n.name for n in new) == 1, str(mutant)


def test_what_changes_nothing_by_construction_is_not_made():
    from mutation_kit.kinds import bypass, edge, swap

    view = graphs("plain").views["decode-128"]
    for node in view.counting:
        assert node.operator != "UpdateState"
        if node.operator in ("Add", "Mul", "Equal"):
            assert not list(swap(view, node, None))
        if node.operator in ("Load", "Depend"):
            assert not list(bypass(view, node, None))
            assert [place for place, _ in view.operands(node)] == [0]
    rng = np.random.default_rng(0)
    square = next(n for n in view.counting if n.operator == "Mul" and n.inputs[0] == n.inputs[1])
    assert not list(swap(view, square, rng)) and len(list(edge(view, square, rng))) == 2


def test_an_operator_of_the_library_becomes_another_one_of_it():
    from mutation_kit.kinds import operator
    from mutation_kit.sampling import copied

    view = graphs("cpu").views["vision-64"]
    node = next(n for n in view.counting if n.operator == "kimi_linear_gelu_erf")
    _, (what, edit) = operator(view, node, None)
    model = copied(view.model)
    edit(model)
    assert what == "is kimi_linear_gelu_tanh, not kimi_linear_gelu_erf"
    assert read_nodes(model).makers[node.output].operator == "kimi_linear_gelu_tanh"


def test_a_dozen_faults_are_all_seen():
    from mutation_kit.equivalents import why_equivalent

    chosen = [m for m in mutants("ascend") if not why_equivalent(m)][3::6][:12]
    outcomes = [gate().outcome(m) for m in chosen]
    assert len({m.operator for m in chosen}) == 12
    assert all(o.stage for o in outcomes), [str(o.mutant) for o in outcomes if not o.stage]
    assert {"tap", "logits"} <= {o.stage for o in outcomes}


def test_a_fault_in_a_graph_that_generation_alone_runs_is_seen_by_its_logits():
    from mutation_kit.kinds import parameter
    from mutation_kit.sampling import Mutant, copied

    view = graphs("ascend").views["prefill-64x128"]
    node = next(n for n in view.counting if n.inputs[0].endswith("layers.1.input_layernorm.weight"))
    what, edit = next(parameter(view, node, np.random.default_rng(0)))
    model = copied(view.model)
    edit(model)
    mutant = Mutant("ascend", "prefill-64x128", "Load", "parameter", node.output, what, serialise(model))
    outcome = gate().outcome(mutant)
    assert (outcome.stage, outcome.says.split()[0]) == ("logits", "last_logits"), what


def test_without_a_case_that_runs_its_graph_a_fault_is_not_seen_and_said_so(tmp_path):
    from mutation_kit.table import share_caught, tables, unseen

    blind = replace(gate(), plans=())
    numeric = next(m for m in mutants("ascend") if gate().outcome(m).stage in ("tap", "logits"))
    outcomes = [blind.outcome(numeric), gate().outcome(numeric)]
    assert unseen(outcomes) == outcomes[:1] and share_caught(outcomes) == 0.5
    text = "\n".join(tables(outcomes))
    assert "**changes what is computed, and nothing saw it** (1):" in text and str(numeric) in text


def test_a_fault_that_is_said_to_change_nothing_and_is_seen_contradicts_it(monkeypatch):
    from mutation_kit import equivalents
    from mutation_kit.proving import Outcome
    from mutation_kit.table import contradictions, share_caught

    mutant = mutants("ascend")[0]
    said = equivalents.Equivalent(mutant.operator, mutant.kind, ".*", "so they say")
    monkeypatch.setattr(equivalents, "EQUIVALENTS", (said,))
    assert share_caught([Outcome(mutant, "")]) == 0 or not contradictions([Outcome(mutant, "")])
    assert contradictions([Outcome(mutant, "tap")]) and not contradictions([Outcome(mutant, "lint")])


def test_a_section_is_written_again_in_its_place(tmp_path):
    from mutation_kit.table import write_section

    path = tmp_path / "faults.md"
    path.write_text("# Faults\n")
    write_section(path, "a", ["first"])
    write_section(path, "b", ["other"])
    write_section(path, "a", ["second"])
    text = path.read_text()
    assert text.startswith("# Faults\n\n<!-- a: begin -->\nsecond\n<!-- a: end -->") and "first" not in text
    assert "<!-- b: begin -->\nother\n<!-- b: end -->" in text


def test_clean_candidates_give_no_alarm_and_a_wrong_one_does(monkeypatch):
    import clean_runs

    monkeypatch.setattr(clean_runs, "export_for", lambda *_: {"ascend": bundle("ascend")})
    names, cases = ("ascend", "ascend-rounded"), ("images", "pieces")
    figures = clean_runs.clean_runs([1, 2], {"tiny8": TINY}, names, cases)
    assert {p: (f.runs, f.alarms) for p, f in figures.items()} == {"strict": (2, []), "bf16": (2, [])}
    assert 0 < figures["strict"].worst["logits", "rel_l2"][0] < 1
    right = clean_runs.open_candidate

    def wrong(found):
        candidate = right(found)
        array, head = candidate.model.weights.array, "language_model.lm_head.weight"
        candidate.model.weights.array = lambda name: np.flip(array(name), 0) if name == head else array(name)
        return candidate

    monkeypatch.setattr(clean_runs, "open_candidate", wrong)
    alarms = clean_runs.clean_runs([1], {"tiny8": TINY}, names[:1], cases)["strict"].alarms
    assert {f.tap for *_, f in alarms} >= {"logits", "last_logits"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_300_faults_at_least_99_percent_are_seen(tmp_path, monkeypatch):
    import mutate_mindir

    file = tmp_path / "faults.json"
    assert mutate_mindir.main(["--src", str(TINY), "--count", "300", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())) >= 300
