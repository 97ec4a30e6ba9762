"""Verification layer by layer: the parts are the whole, a wrong layer is named, an interrupted run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import parity
import pytest
from click.testing import CliRunner
from golden import DATA

from kimi_vl import nano_path
from kimi_vl.convert import convert
from kimi_vl.convert.source import open_weights
from kimi_vl.modeling.parts import NetworkInParts
from kimi_vl.verify.candidates import inspect, open_candidate
from kimi_vl.verify.cases import Limits, SeededSource, build, select, suite
from kimi_vl.verify.chain import ChainLink, source_of
from kimi_vl.verify.cli import cli
from kimi_vl.verify.judge import judge, load_profile
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.parts_oracle import OracleInParts
from kimi_vl.verify.runner import case_record, compared
from kimi_vl.verify.stream import Stream, streamed
from kimi_vl.verify.stream_state import StreamState, StreamStateError

TINY = DATA / "tiny8-bf16"
SOURCES = {"tiny8-bf16": TINY, "nano": Path(nano_path())}
LIMITS = Limits(contexts=(128,), chunk=64, patches=128)
SEED = 7
STRICT = load_profile("strict")


def converted(directory: Path, name: str = "tiny8-bf16") -> Path:
    convert(SOURCES[name], directory / name)
    return directory / name


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("ckpt"))


compiled: dict[str, NetworkInParts] = {}


def streaming(ckpt: Path, report: Path, names=("steps",), said=None, seed: int = SEED) -> Stream:
    """A run layer by layer of `ckpt`, which was converted from the source of its name.

    Graphs are compiled once for all of one name.
    """
    found = replace(inspect(ckpt), limits=LIMITS)
    link = streamed([ChainLink("ckpt", found, [])], [STRICT], names)
    say = (lambda text: None) if said is None else said.append
    source = source_of(SOURCES[ckpt.name], found.config, None)
    stream = Stream(SOURCES[ckpt.name], link, source, seed, report, say)
    stream._parts = compiled.setdefault(ckpt.name, stream._parts)
    stream._parts._weights = open_weights(ckpt)
    return stream


@pytest.fixture(scope="module")
def good(ckpt, tmp_path_factory):
    """What an uninterrupted run of the case steps gives; not to be changed."""
    return streaming(ckpt, tmp_path_factory.mktemp("good")).run()


@pytest.mark.parametrize("name", SOURCES)
def test_the_reference_in_parts_is_the_whole_one_bit_for_bit(name):
    whole, parts = build_oracle(SOURCES[name]), OracleInParts(SOURCES[name])
    plan = select(suite(whole.config, LIMITS), ["batch"])[0]
    inputs = build(plan, SeededSource(whole.config), SEED).inputs
    wanted = whole.run(inputs)
    with parts.vision() as embed:
        got = embed(inputs)
    assert set(got) == {"vision_out", "projector_out", "inputs_embeds"}
    assert all(np.array_equal(got[tap], wanted[tap]) for tap in got)
    state, moe_layers = got["inputs_embeds"], iter(range(len(whole.config.text.moe_layers)))
    for n in range(whole.config.text.num_hidden_layers):
        with parts.layer(n) as layer:
            state, taps = layer(inputs, state)
        assert np.array_equal(taps.pop("hidden_states")[0], wanted["hidden_states"][n]), n
        assert bool(taps) == whole.config.text.is_moe(n)
        if taps:
            m = next(moe_layers)
            assert all(np.array_equal(of_layer[0], wanted[tap][m]) for tap, of_layer in taps.items()), n
    with parts.head() as head:
        assert np.array_equal(head(inputs, state), wanted["logits"])


def test_the_reference_in_parts_holds_no_weights_between_them():
    parameters = dict(OracleInParts(TINY)._oracle.network.named_parameters())
    real = {name for name, p in parameters.items() if p.device.type != "meta"}
    assert len(parameters) > 40 and all("norm" in name or "position_embeddings" in name for name in real)


def test_what_ran_a_part_holds_no_weights_when_it_is_left():
    parts = OracleInParts(TINY)
    for part in (parts.vision(), parts.layer(1), parts.head()):
        with part as run:
            tensors = [cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, dict)]
            assert all(tensors)
        assert tensors == [{}]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("tiny8-bf16", "pieces"),
        pytest.param("tiny8-bf16", "batch-steps", marks=pytest.mark.slow),
        pytest.param("nano", "pieces", marks=pytest.mark.slow),
    ],
)
def test_the_figures_are_those_of_the_whole_network_to_the_last_digit(name, case, tmp_path):
    """So the parts of the network give what the whole network gives, bit for bit, in all calls of a case."""
    ckpt = converted(tmp_path, name)
    link = streaming(ckpt, tmp_path, [case]).run()
    assert judge(link, STRICT).passed
    found = replace(inspect(ckpt), limits=LIMITS)
    (plan,) = select(suite(found.config, LIMITS), [case])
    built = build(plan, source_of(SOURCES[name], found.config, None), SEED)
    whole = open_candidate(found).once(built.inputs, built.calls)
    figures, missing = compared(built, build_oracle(SOURCES[name]).run(built.inputs), whole, found.config)
    assert missing == ["last_logits"]  # of the graphs that generate
    (record,) = link["cases"]
    taps = record["taps"]
    assert {tap: taps.get(tap) for tap in figures} == figures
    assert taps.keys() - figures.keys() == {f"forced.{n}" for n in range(found.config.text.num_hidden_layers)}
    assert record == case_record(built) | {"taps": taps, "new_tokens": 0}


def test_only_the_wrong_layer_is_wrong_on_the_references_input(tmp_path, good):
    assert judge(good, STRICT).passed
    ckpt = converted(tmp_path)
    weights = open_weights(ckpt)
    file, offset, nbytes = weights.location("language_model.model.layers.1.self_attn.o_proj.weight")
    with open(ckpt / file, "r+b") as f:
        f.seek(offset)
        halves = np.frombuffer(f.read(nbytes), np.uint16) ^ 0x8000  # bf16, the other sign
        f.seek(offset)
        f.write(halves.tobytes())
    verdict = judge(streaming(ckpt, tmp_path).run(), STRICT)
    failed = {f.tap for f in verdict.failures}
    assert {tap for tap in failed if tap.startswith("forced")} == {"forced.1"}
    assert {"layers.1", "layers.2", "logits"} <= failed and "layers.0" not in failed
    assert verdict.first_bad.where in (
        "router of decoder layer 1",
        "decoder layer 1 on the reference's input",
    )


def test_an_interrupted_run_goes_on_where_it_was(ckpt, tmp_path, monkeypatch, good):
    """To the same figures; layers that were finished are not run again."""
    layers = []
    run_layer = Stream._layer

    def interrupted(self, n):
        if n == 2 and 2 not in layers:
            layers.append(n)
            raise KeyboardInterrupt
        layers.append(n)
        run_layer(self, n)

    monkeypatch.setattr(Stream, "_layer", interrupted)
    said = []
    with pytest.raises(KeyboardInterrupt):
        streaming(ckpt, tmp_path).run()
    run = streaming(ckpt, tmp_path, said=said).run()
    assert layers == [0, 1, 2, 2]
    assert "going on after decoder layer 1, which an earlier run finished" in said
    assert run | {"header": None} == good | {"header": None}
    assert set(run["header"]["seconds"]["steps"]) == {"reference", "candidate"}


def test_a_finished_run_whose_report_was_not_written_runs_nothing_again(ckpt, tmp_path, monkeypatch, good):
    state = streaming(ckpt, tmp_path)
    state.run()
    monkeypatch.setattr(Stream, "_step", lambda self, step: pytest.fail("it ran again"))
    again = streaming(ckpt, tmp_path)
    assert again.run() | {"header": None} == good | {"header": None}
    again.state.remove()
    assert not list(tmp_path.iterdir())


def test_the_state_of_another_run_is_refused(ckpt, tmp_path):
    stream = streaming(ckpt, tmp_path)
    stream._save(0)
    with pytest.raises(StreamStateError, match=r"an unfinished run with other cases; repeat that run's"):
        streaming(ckpt, tmp_path, seed=SEED + 1).run()
    (ckpt / "config.json").touch()
    with pytest.raises(StreamStateError, match=r"with other files of the candidate"):
        streaming(ckpt, tmp_path).run()


def arrays(n: int) -> dict[str, np.ndarray]:
    return {"a": np.full((2, 3), n, np.float32), "b": np.array([True, False])}


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    state, said = StreamState(tmp_path, {"seed": 1}), []
    assert state.load(said.append) is None
    for n in (1, 2):
        state.save(n, {"steps": n, "figure": 0.1 + 0.2}, arrays(n))
    record, found = state.load(said.append)
    assert record == {"steps": 2, "figure": 0.1 + 0.2} and not said
    assert all(np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in arrays(2).items())
    assert {p.name for p in state.path.iterdir()} == {"state.json", "after-2.safetensors"}


def test_a_kill_while_a_state_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    """At any file that is put in its place, and before each of them."""
    state = StreamState(tmp_path, {})
    state.save(1, {"steps": 1}, arrays(1))
    for name in ("kimi_vl.verify.stream_state.save_file", "kimi_vl.verify.stream_state.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_: (_ for _ in ()).throw(OSError("no")))
            with pytest.raises(OSError, match="no"):
                state.save(2, {"steps": 2}, arrays(2))
    monkeypatch.setattr("kimi_vl.verify.stream_state._FILE", None)
    with pytest.raises(AttributeError):
        state.save(2, {"steps": 2}, arrays(2))
    monkeypatch.undo()
    record, found = state.load(pytest.fail)
    assert record == {"steps": 1} and np.array_equal(found["a"], arrays(1)["a"])


@pytest.mark.parametrize("file", ["state.json", "after-1.safetensors"])
def test_a_damaged_state_is_told_and_begun_again(tmp_path, file):
    state, said = StreamState(tmp_path, {}), []
    state.save(1, {"steps": 1}, arrays(1))
    content = bytearray((state.path / file).read_bytes())
    content[-4] ^= 1
    (state.path / file).write_bytes(content)
    assert state.load(said.append) is None
    assert file in said[0] and "damaged" in said[0] and said[0].endswith("; the run begins again")


def test_a_candidate_that_raises_is_its_cases_error_and_the_others_go_on(ckpt, tmp_path, monkeypatch):
    stream = streaming(ckpt, tmp_path, ["text", "steps"])
    layer = stream._parts.layer

    def raising(x, mask, calls):
        if len(calls) == 1:
            raise RuntimeError("a kernel failed\nsomewhere")
        return layer(x, mask, calls)

    monkeypatch.setattr(stream._parts, "layer", raising)
    text, steps = stream.run()["cases"]
    assert text["error"] == "RuntimeError: a kernel failed" and "logits" not in text["taps"]
    assert steps["error"] is None and "logits" in steps["taps"]


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), prog_name="verify-parity")


def test_the_command_writes_a_report_and_leaves_no_state(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_vl.verify.candidates.CONTEXT", LIMITS.context)
    parts = streaming(ckpt, tmp_path)._parts  # of the same sizes, with compiled graphs
    monkeypatch.setattr("kimi_vl.modeling.parts.NetworkInParts", lambda *sizes: parts)
    arguments = ("--reference", TINY, "--candidate", ckpt, "--report", tmp_path, "--stream")
    result = invoke(*arguments, "--cases", "pieces")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == parity.REPORT
    assert "MindSpore graphs, layer by layer: MindSpore" in result.stdout
    assert "MindSpore graphs: did not run" not in result.stdout
    assert "no tokens are generated" in result.stdout and "(pieces)" in result.stdout
    run = parity.valid(tmp_path / "run.json")
    (link,) = run["links"]
    taps = list(link["cases"][0]["taps"])
    assert taps[:5] == ["inputs_embeds", "forced.0", "layers.0", "router.1", "forced.1"]
    assert taps[-2:] == ["logits", "comparable"] and link["candidate"]["prefill_chunk"] == LIMITS.chunk
    assert link["weights"]["different_parameters"] == 0 and link["candidate"]["path"] == str(ckpt)
    assert list(run["header"]["seconds"][0]["pieces"]) == ["reference", "candidate"]
    assert len(link["candidate"]["files"]) > 2 and run["reference"]["files"]


def test_what_cannot_run_layer_by_layer_is_refused(ckpt):
    dry = ("--reference", TINY, "--stream", "--dry-run", "--candidate")
    for candidate, advice in ((bundles.bundle("tiny8-bf16"), "exported from"), (TINY, "convert-weights")):
        refused = invoke(*dry, candidate)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.output
        assert "--stream:" in refused.stderr and advice in refused.stderr
    refused = invoke(*dry, ckpt, "--profile", "bf16")
    assert refused.exit_code == 2 and "which --stream does not measure" in refused.stderr
    refused = invoke(*dry, ckpt, "--candidate", ckpt)
    assert refused.exit_code == 2 and "there are 2 candidates, but one at a time" in refused.stderr
    assert "long-greedy (cannot: layer by layer no tokens are generated)" in " ".join(
        invoke(*dry, ckpt, "--cases", "long-greedy").stdout.split()
    ).replace("512 greedy tokens over every cache border on the way ", "")


def test_an_interrupted_command_keeps_its_state(ckpt, tmp_path, monkeypatch):
    def interrupted(self, step):
        if step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "_step", interrupted)
    arguments = ("--reference", TINY, "--candidate", ckpt, "--report", tmp_path, "--stream")
    result = invoke(*arguments, "--cases", "text")
    assert result.exit_code == 130 and "the same command goes on where it was" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".stream"]
