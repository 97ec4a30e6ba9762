"""The benchmarks of export and bundles: what is counted, and that they run."""

from __future__ import annotations

import os
from pathlib import Path

import bundles
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SIZES = ("--seq", "128", "--prefill-chunk", "32", "--image-patches", "64")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def test_disk_is_what_is_new_and_all_of_it_is_removed(tmp_path):
    from bench_export import own_bytes, remove

    (tmp_path / "shard").write_bytes(bytes(1000))
    target = tmp_path / "target"
    (target / "variables").mkdir(parents=True)
    os.link(tmp_path / "shard", target / "shard")
    (target / "graph").write_bytes(bytes(30))
    (target / "variables/data").write_bytes(bytes(4))
    (target / "variables/data").chmod(0o400)
    assert sum(own_bytes(target)) == 34
    remove(target)
    assert not target.exists() and (tmp_path / "shard").stat().st_size == 1000


def test_exports_one_after_the_other_take_the_sum_of_time_and_disk_and_the_most_memory():
    from bench_export import OURS, Result, table
    from bench_kit.measure import Run

    def result(seconds, anonymous, disk):
        return Result(Run(seconds, seconds / 2, anonymous, 0, 0), disk)

    gb = 10**9
    results = {
        OURS: [result(5, gb // 4, gb // 100)],
        "vision-64": [result(1, gb, 2 * gb), result(3, gb, 2 * gb), result(2, gb, 2 * gb)],
        "decode-128": [result(10, 3 * gb, 4 * gb), result(10, 3 * gb, 4 * gb), result(30, 3 * gb, 4 * gb)],
    }
    rows = [line.strip("| ").split(" | ") for line in table(results)]
    assert [row[1:] for row in rows if "one after the other" in row[0]] == [
        ["11.0 / 13.0", "5.5", "3.00", "6.000"]
    ]
    assert rows[-1][1:] == ["5.0 / 5.0", "2.5", "0.25", "0.010"]


@pytest.mark.slow
def test_exports_take_turns_and_leave_nothing(tmp_path, capsys):
    from bench_export import main

    ckpt = bundles.converted("tiny8-fp32")
    main(["--ckpt", str(ckpt), "--dir", str(tmp_path), *SIZES, "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()
    weights = sum(f.stat().st_size for f in ckpt.glob("*.safetensors")) / 1e9
    disk = {row.split("|")[1].strip(): float(row.split("|")[-2]) for row in rows if "`" in row}
    assert disk["`ms.export`, all of these one after the other"] > 2 * weights
    assert disk["`export-mindir`, the same graphs"] < weights / 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_graph_of_a_bundle_is_opened_and_decoding_measured(capsys):
    from bench_bundle import main

    directory = bundles.bundle("tiny8-fp32")
    assert main(["--bundle", str(directory), "--rounds", "1", "--steps", "2", "--open", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[2].strip() for row in rows if "-" in row and row.count("|") == 7][1:] == [
        "decode-256", "prefill-64x256", "prefill-logits-64x256", "vision-64",
    ]  # fmt: skip
    assert [row.split("|")[1].strip() for row in rows[-2:]] == ["1", "4"]
