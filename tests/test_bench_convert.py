"""The benchmark of the conversion: what it measures, what it leaves behind, what it prints."""

import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import content
from safetensors.numpy import load_file

import kimi_vl

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = Path(kimi_vl.nano_path(), "config.json")
MB = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def python(code):
    return [sys.executable, "-c", code]


def test_anonymous_memory_is_that_of_all_processes_and_of_no_file(tmp_path):
    from bench_kit.measure import measure

    hold = "import time; held = b'x' * 60_000_000; time.sleep(0.5)"
    child = (
        f"import subprocess, sys; own = b'x' * 40_000_000; subprocess.run([sys.executable, '-c', {hold!r}])"
    )
    assert 100 * MB < measure(python(child)).anonymous < 130 * MB
    (tmp_path / "file").write_bytes(bytes(100 * MB))
    mapped = (
        "import mmap, time; f = open({!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        "sum(m[::4096]); time.sleep(0.3)"
    )
    assert measure(python(mapped.format(str(tmp_path / "file")))).anonymous < 30 * MB


def test_time_is_that_of_the_whole_command():
    from bench_kit.measure import measure

    run = measure(["sleep", "0.4"])
    assert 0.4 <= run.seconds < 2
    assert run.cpu_seconds < 0.2
    assert measure(python("while __import__('time').process_time() < 0.5: pass")).cpu_seconds >= 0.5


def test_a_command_that_fails_is_no_measurement():
    from bench_kit.measure import CommandFailed, measure

    with pytest.raises(CommandFailed, match="ended with 3: no such weights"):
        measure(["sh", "-c", "echo no such weights >&2; exit 3"])


@pytest.fixture(scope="module")
def source(scripts_on_path, tmp_path_factory):
    from make_synthetic import configuration, make

    directory = tmp_path_factory.mktemp("bench") / "layers-2"
    make(directory, configuration(SMALL, 2))
    return directory


def test_the_plain_conversion_renames_and_changes_nothing_else(source, tmp_path):
    from bench_kit.load_all import load_all_save_all

    load_all_save_all(source, tmp_path / "out")
    (file,) = source.glob("*.safetensors")
    before, after = load_file(file), load_file(tmp_path / "out/model.safetensors")
    assert len(after) == len(before)
    for name, tensor in before.items():
        assert np.array_equal(tensor, after[name.removeprefix("language_model.")])
    assert "model.norm.weight" in after


def test_methods_take_turns_and_leave_nothing(source, tmp_path):
    from bench_convert import COLD, CONVERT, CP, LOAD_ALL, WARM, bench

    said = []
    before = content(source)
    runs = bench(source, tmp_path / "target", [CP, CONVERT, LOAD_ALL], [WARM, COLD], 2, said.append)
    assert {key: len(of) for key, of in runs.items()} == {
        (t, m): 2 for t in (WARM, COLD) for m in (CP, CONVERT, LOAD_ALL)
    }
    turns = [f"{t} {m}" for t in (WARM, COLD) for m in (CP, CONVERT, LOAD_ALL)]
    assert [line.split(":")[0].split(" ", 1)[1] for line in said] == turns * 2
    assert not any(tmp_path.iterdir())
    assert content(source) == before


def test_a_failed_method_leaves_nothing(source, tmp_path, monkeypatch):
    import bench_convert

    broken = {bench_convert.CP: ["sh", "-c", 'mkdir "$1"; exit 1', "sh", tmp_path / "target"]}
    monkeypatch.setattr(bench_convert, "commands", lambda source, target: broken)
    with pytest.raises(bench_convert.CommandFailed):
        bench_convert.bench(source, tmp_path / "target", [bench_convert.CP], [bench_convert.WARM], 1, print)
    assert not any(tmp_path.iterdir())


def test_the_table_and_the_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bench_convert import main

    main(
        ["--layers", "1", "2", "--config", str(SMALL), "--repeats", "1", "--cold"]
        + ["--dir", str(tmp_path / "work"), "--figure", str(tmp_path / "bench.svg")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2 * 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1 | 0.00 | warm | cp -r |") and "| 1.00 / 1.00 |" in lines[2]
    assert (tmp_path / "bench.svg").read_text().lstrip().startswith("<?xml")
    assert not any((tmp_path / "work").iterdir())


def test_least_times_and_medians_are_compared_apart():
    from bench_kit.measure import Run
    from bench_kit.report import Case, table

    def runs(*seconds):
        return [Run(s, s / 2, int(s * MB), 0, 10**9) for s in seconds]

    case = Case(4, 6 * 10**9, "warm", "convert-weights", runs(3, 9, 6), runs(2, 3, 7))
    assert case.seconds == (3, 6)
    assert case.ratios == (1.5, 2.0)
    assert case.anonymous == 9 * MB
    assert table([case]).splitlines()[-1] == (
        "| 4 | 6.00 | warm | convert-weights | 3.0 / 6.0 | 1.50 / 2.00 | 1.5 | 9 | 0.00 | 1.00 |"
    )


def test_checkpoints_that_are_there_are_used_and_kept(source, capsys):
    from bench_convert import main

    main(["--layers", "2", "--config", str(SMALL), "--repeats", "1", "--dir", str(source.parent)])
    assert "writing" not in capsys.readouterr().err
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_what_is_in_the_way_or_lacks_room_is_said_before(tmp_path, monkeypatch):
    import bench_convert

    from kimi_vl.convert import ConversionError, EnvironmentProblem

    arguments = ["--layers", "2", "--dir", str(tmp_path)]
    (tmp_path / "layers-2-target").mkdir()
    with pytest.raises(ConversionError, match="layers-2-target: is there already"):
        bench_convert.main(arguments)
    (tmp_path / "layers-2-target").rmdir()
    monkeypatch.setattr(
        bench_convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 * 10**9})
    )
    with pytest.raises(EnvironmentProblem, match=r"needs 7\.5 GB, but 5\.0 GB are free"):
        bench_convert.main(arguments)
    assert not any(tmp_path.iterdir())


def test_a_source_without_room_in_memory_is_not_loaded_whole(tmp_path, monkeypatch, capsys):
    import bench_convert

    monkeypatch.setattr(bench_convert, "available_memory", lambda: 1 * MB)
    bench_convert.main(
        ["--layers", "1", "--config", str(SMALL), "--repeats", "1", "--dir", str(tmp_path / "d")]
    )
    printed = capsys.readouterr()
    assert "load all" not in printed.out
    assert "1 layers: not enough memory to load all" in printed.err


def test_available_memory_is_in_bytes():
    from bench_convert import available_memory

    assert 100 * MB < available_memory() < 10**14
