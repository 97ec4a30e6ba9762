"""``bench_model.py``: what its cases are, how sides take turns, what its figures mean, and that it runs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import DATA

from kimi_vl.modeling.configuration import ModelConfig

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture
def config():
    """The published one with 4 layers."""
    whole = ModelConfig.from_file(DATA / "published")
    return replace(whole, text=replace(whole.text, num_hidden_layers=4))


def case(name):
    from bench_kit.cases import Case

    return Case.parse(name)


@pytest.mark.parametrize("name", ["decode-512", "prefill-256x4", "vision-1024", "head-1", "answer-256"])
def test_a_case_is_called_what_it_was_parsed_from(name):
    assert str(case(name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode", "'decode' is no case; expected something like decode-512"),
        ("decode-0", "is no case"),
        ("vision-4x2", "only decode and prefill take batches"),
        ("vision-6", "a multiple of 4 patches"),
    ],
)
def test_what_is_no_case_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        case(name)


def test_a_decode_case_feeds_one_token_that_sees_as_many_as_its_name_says(config):
    decode, prefill = case("decode-512x4"), case("prefill-64")
    assert decode.latents(config, 0).shape == (4, 511, 576) and decode.tokens(config, 0).shape == (4, 1)
    assert prefill.tokens(config, 0).shape == (1, 64) and prefill.latents(config, 0).shape == (1, 0, 576)


def test_each_turn_has_tokens_of_its_own_that_both_sides_get(config):
    decode = case("decode-512")
    ids = [int(decode.tokens(config, turn)[0, 0]) for turn in range(20)]
    assert len(set(ids)) > 15
    assert ids == [int(case("decode-512").tokens(config, turn)[0, 0]) for turn in range(20)]


@pytest.mark.parametrize(
    ("patches", "grid"), [(1024, (32, 32)), (4096, (64, 64)), (64, (8, 8)), (12, (2, 6)), (4, (2, 2))]
)
def test_a_picture_is_as_square_as_can_be(patches, grid):
    assert case(f"vision-{patches}").grid() == grid


def test_decoding_that_chose_all_experts_reads_every_weight_once(config):
    from bench_kit.costs import bytes_read
    from synthetic_kit.layout import published_tensors

    text = [t for t in published_tensors(config) if t.name.startswith("language_model.")]
    left_out = ("norm.weight", "inv_freq", "embed_tokens.weight", "e_score_correction_bias")
    weights = sum(math.prod(t.shape) for t in text if not t.name.endswith(left_out))
    router = 3 * 64 * 2048
    cache = 4 * 512 * 576
    assert bytes_read(config, case("decode-512"), 64, 2, 4) == 2 * (weights + router) + 4 * cache
    assert bytes_read(config, case("head-1"), 0, 2, 4) == 2 * 163840 * 2048


def test_a_token_of_prefill_multiplies_with_every_weight_of_its_experts(config):
    from bench_kit.costs import bytes_read, operations

    router = 3 * 64 * 2048
    weights = bytes_read(config, case("decode-1"), 6, 1, 0) - 3 * router  # the router counts 4 bytes a weight
    attention = 4 * 16 * (192 + 128)
    assert operations(config, case("prefill-1")) == 2 * (weights + attention)
    assert operations(config, case("prefill-8x4")) == 4 * operations(config, case("prefill-8"))


def test_a_picture_multiplies_with_every_weight_of_the_tower(config):
    from bench_kit.costs import operations
    from synthetic_kit.layout import published_tensors

    tensors = [t for t in published_tensors(config) if len(t.shape) > 1 and "pos_emb" not in t.name]
    tower = sum(math.prod(t.shape) for t in tensors if t.name.startswith("vision_tower."))
    projector = sum(math.prod(t.shape) for t in tensors if t.name.startswith("multi_modal_projector."))
    n = 64
    attention = 27 * 2 * n * n * 1152
    assert operations(config, case("vision-64")) == 2 * (n * tower + n // 4 * projector + attention)


class TestTurns:
    """With sides that say how long they took."""

    @staticmethod
    def take(seconds, monkeypatch, rounds=5, budget=60.0):
        from bench_kit import turns

        monkeypatch.setattr(turns, "PAUSE", 0)
        order, left = [], iter(seconds)

        def ours(turn):
            order.append("ours")
            return {"": 1.0}

        def theirs(turn):
            order.append("theirs")
            return {"": next(left)}

        return turns.take_turns({"ours": ours, "theirs": theirs}, "theirs", rounds, budget), order

    def test_sides_alternate(self, monkeypatch):
        found, order = self.take([2.0] * 5, monkeypatch)
        assert order == ["ours", "theirs"] * 5
        assert found.times == {"ours": {"": [1.0] * 5}, "theirs": {"": [2.0] * 5}} and found.attempts == 1

    def test_an_unsteady_reference_is_measured_again_and_the_first_steady_attempt_taken(self, monkeypatch):
        found, _ = self.take([1, 2, 2, 2, 2] + [1, 1, 1, 1, 3] + [9] * 5, monkeypatch)
        assert found.attempts == 2 and found.times["theirs"][""] == [1, 1, 1, 1, 3]

    def test_after_three_attempts_the_steadiest_is_taken(self, monkeypatch):
        found, _ = self.take([1, 5, 5, 5, 5] + [1, 2, 2, 2, 2] + [1, 3, 3, 3, 3], monkeypatch)
        assert found.attempts == 3 and found.times["theirs"][""] == [1, 2, 2, 2, 2]

    def test_without_time_left_the_least_number_of_rounds_is_made(self, monkeypatch):
        found, _ = self.take([1.0] * 99, monkeypatch, rounds=50, budget=0)
        assert len(found.times["theirs"][""]) == 5


def measured(name, ours, theirs, **more):
    from bench_kit.sessions import Measured

    given = {
        "errors": {"ours": 1e-3, "Torch fp32": 0.0},
        "work": 8e9,
        "ours_work": 4e9,
        "bandwidth": [9e9, 20e9],
    } | more
    return Measured(case(name), "", "Torch fp32", "sdpa, eager", {}, 1.0, ours, theirs, 1, 0.0, **given)


def cells(rows):
    from bench_kit.engine_report import table

    head, _, *lines = (line.strip("| ").split(" | ") for line in table(rows))
    return [dict(zip(head, line)) for line in lines]


def test_a_row_gives_times_ratios_rates_and_the_distance_to_the_limit():
    (row,) = cells([measured("decode-512", [0.4, 0.5, 0.6], [0.8, 1.0, 2.0])])
    assert row["ours, ms: min / median"] == "400.0 / 500.0"
    assert row["reference, ms: min / median"] == "800.0 / 1000.0, unsteady after 1"
    assert (row["ratio of min"], row["ratio of median"]) == ("0.50", "0.50")
    assert (row["ours"], row["reference"]) == ("10 GB/s", "10 GB/s")
    assert row["memory reads"] == "20 GB/s"
    assert row["ours over the limit"] == "2.00"  # 4 GB at 20 GB/s are 200 ms
    assert row["the limit over the reference"] == "0.25"
    assert (row["NMSE ours"], row["NMSE reference"]) == ("1.0e-03", "0.0e+00")


def test_decoding_is_also_told_without_what_the_head_takes():
    rows = [
        measured("decode-512", [0.4, 0.5], [0.8, 0.8]),
        measured("head-1", [0.1, 0.1], [0.4, 0.4], work=2e9, ours_work=1e9),
    ]
    less = cells(rows)[-1]
    assert less["case"] == "decode-512, without the head"
    assert (less["ratio of min"], less["ours"], less["reference"]) == ("0.75", "10 GB/s", "15 GB/s")


def test_the_command_measures_a_small_checkpoint_and_errors_are_small(tmp_path, capfd):
    from bench_model import main

    shutil.copytree(DATA / "tiny8-bf16", tmp_path / "published")
    status = main(
        [
            *("--dir", str(tmp_path), "--reference", "fp32", "--kernels", "plain", "--threads", "1"),
            *("--cases", "decode-40x2", "prefill-8", "--rounds", "5", "--budget", "1", "--no-memory"),
            *("--json", str(tmp_path / "samples.json"), "--plot", str(tmp_path / "ratios.svg")),
        ]
    )
    assert status == 0
    printed = capfd.readouterr().out
    assert "| decode-40x2 | Torch fp32 |" in printed and "| prefill-8 | Torch fp32 |" in printed
    found = json.loads((tmp_path / "samples.json").read_text())
    assert found["routing"]["agreement"] == 1
    for row in found["rows"]:
        assert len(row["ours"]) == len(row["theirs"]) == 5 and min(row["ours"] + row["theirs"]) > 0
        assert 0 < row["errors"]["ours"] < 1e-9, "the sides hold other weights, caches or tokens"
    assert (tmp_path / "ratios.svg").read_text().count("decode-40x2") == 1
    decoding, prefill = found["rows"]
    assert len(decoding["bandwidth"]) == 5 and min(decoding["bandwidth"]) > 1e8 and not prefill["bandwidth"]


def test_what_was_measured_is_told_though_a_later_reference_failed(tmp_path, monkeypatch, capsys):
    import bench_model
    from bench_kit.sessions import Machine

    from kimi_vl.convert import EnvironmentProblem

    def fails_in_the_second(function, setting, dtype, exact):
        if dtype == "bf16":
            raise EnvironmentProblem("memory was short")
        yield from (Machine({}, "ours"), measured("decode-512", [0.4], [0.8]))

    monkeypatch.setattr(bench_model, "Fresh", fails_in_the_second)
    monkeypatch.setattr(bench_model, "checkpoints", lambda *_: (tmp_path, tmp_path))
    with pytest.raises(EnvironmentProblem, match="memory was short"):
        bench_model.main(["--dir", str(tmp_path), "--json", str(tmp_path / "samples.json")])
    assert "| decode-512 | Torch fp32 |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "samples.json").read_text())["rows"]) == 1


def test_a_reference_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from bench_kit.sessions import LLAMA, Setting

    from kimi_vl.convert import EnvironmentProblem

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "bench_kit.llama_side", raising=False)
    setting = Setting(tmp_path, tmp_path, False, None, 256, 1, 5, 1.0, ())
    with pytest.raises(EnvironmentProblem, match=r"there is no llama_cpp; install llama-cpp-python and gguf"):
        setting.reference(LLAMA)


def test_an_error_in_a_measuring_process_comes_back_as_one_sentence(tmp_path):
    from bench_kit.fresh import Fresh
    from bench_kit.sessions import Setting, alone

    from kimi_vl.modeling.configuration import ConfigError

    setting = Setting(tmp_path, tmp_path, False, None, 256, 1, 5, 1.0, ())
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(ValueError, match="there is no config.json"):
        list(Fresh(alone, setting, "fp32", {}))
