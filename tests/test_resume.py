"""Work that is cut short, by whatever and wherever, is gone on with; the result is that of an undisturbed run."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import BF16, TINY, configuration, content, tensors, write_checkpoint

from kimi_vl.convert import ConversionError, convert, open_weights, revert
from kimi_vl.convert.journal import JOURNAL

KILLER = Path(__file__).with_name("killer.py")
LIMIT = 300_000  # bytes of a shard: three of them


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    convert(TINY, path / "ckpt", max_shard_size=LIMIT)
    return path / "ckpt"


def run(reverse, whole, target, **options):
    if reverse:
        revert(whole, target, **options)
    else:
        convert(TINY, target, max_shard_size=LIMIT, **options)


def expected(reverse, whole):
    return content(TINY if reverse else whole)


class Stop(Exception):
    pass


def stop_after(calls, error=Stop):
    """A progress callback that fails at its nth call."""
    left = iter(range(calls))

    def progress(n):
        if next(left, None) is None:
            raise error

    return progress


def units(target):
    """What the journal of an unfinished directory says is done."""
    lines = (target / JOURNAL).read_text().splitlines()
    return [json.loads(line)["unit"] for line in lines[1:]]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("reverse", [False, True], ids=["convert", "revert"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_interrupted_work_is_gone_on_with(whole, tmp_path, error, reverse, workers):
    target = tmp_path / "dst"
    with pytest.raises(error):
        run(reverse, whole, target, workers=workers, progress=stop_after(50, error))
    before = units(target)
    assert before
    if not reverse:
        with pytest.raises(ConversionError, match="was not finished; run its conversion again"):
            open_weights(target)
    with pytest.raises(error):
        run(reverse, whole, target, workers=workers, progress=stop_after(len(before) + 45, error))
    assert len(units(target)) > len(before)
    assert units(target)[: len(before)] == before
    run(reverse, whole, target, workers=workers)
    assert content(target) == expected(reverse, whole)


def test_what_is_done_is_not_done_again(whole, tmp_path, monkeypatch):
    target = tmp_path / "dst"
    with pytest.raises(Stop):
        run(False, whole, target, progress=stop_after(100))
    done = len(units(target))
    written, pwrite = [], os.pwrite

    def counted(fd, data, offset):
        written.append(len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    run(False, whole, tmp_path / "undisturbed")
    undisturbed = sum(written)
    written.clear()
    run(False, whole, target)
    assert done > 20
    assert sum(written) < undisturbed * 0.8
    assert content(target) == content(whole)


@pytest.mark.parametrize(
    ("reverse", "points"),
    [(False, 25), (True, 10), pytest.param(False, 250, marks=pytest.mark.slow)],
    ids=["convert", "revert", "convert, many"],
)
def test_killed_at_any_moment_the_next_run_ends_with_the_same_bytes(whole, tmp_path, reverse, points):
    source = whole if reverse else TINY
    done = subprocess.run(
        [sys.executable, KILLER, source, tmp_path / "dst", str(int(reverse)), str(LIMIT), "7", str(points)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == points
    assert sum(-9 in kills for _, kills in runs) >= points * 0.8
    assert {status for _, kills in runs for status in kills} <= {0, -9, 1}
    for directory, _ in runs:
        assert content(Path(directory)) == expected(reverse, whole), directory


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "preadv"])
@pytest.mark.parametrize("reverse", [False, True], ids=["convert", "revert"])
def test_a_disk_that_fails_loses_nothing(whole, tmp_path, monkeypatch, reverse, call):
    """Full or broken at every third moment, each time a little later."""
    target, real = tmp_path / "dst", getattr(os, call)
    failures = 0
    for moment in range(1, 400, 3):
        left = iter(range(moment))

        def failing(*arguments, left=left):
            if next(left, None) is None:
                raise OSError(5 if call == "preadv" else 28, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, call, failing)
        try:
            run(reverse, whole, target)
            break
        except OSError as e:
            failures += 1
            assert e.filename or e.strerror
        finally:
            monkeypatch.setattr(os, call, real)
        if not target.exists():  # a header could not be read
            continue
        # The last sync comes when all is done.
        assert (target / JOURNAL).exists() or content(target) == expected(reverse, whole)
        if not (target / JOURNAL).exists():
            break
    else:
        run(reverse, whole, target)
    assert failures
    assert content(target) == expected(reverse, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for less than half of a converted checkpoint."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: that needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_gone_on_with_where_there_is_room(whole, small_disk, monkeypatch):
    plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)  # it fills up later, from elsewhere
    with pytest.raises(OSError, match="No space left on device"):
        run(False, whole, small_disk / "dst")
    assert units(small_disk / "dst")
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run(False, whole, small_disk / "dst")
    assert content(small_disk / "dst") == content(whole)


# --- what a journal is believed ----------------------------------------------------------------------------------


@pytest.fixture
def unfinished(whole, tmp_path):
    target = tmp_path / "dst"
    with pytest.raises(Stop):
        run(False, whole, target, progress=stop_after(60))
    return target


def test_a_journal_is_believed_only_as_far_as_the_files_confirm_it(whole, unfinished):
    for path in unfinished.glob("*.safetensors*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3 :: 5000] = bytes(len(data[len(data) // 3 :: 5000]))
        path.write_bytes(data)
    run(False, whole, unfinished)
    assert content(unfinished) == content(whole)


DAMAGE = {
    "torn in its last line": lambda text: text[:-20],
    "torn in its first line": lambda text: text[:30],
    "empty": lambda text: b"",
    "noise": lambda text: bytes(range(256)),
    "a line of another kind in the middle": lambda text: text.replace(b'{"unit"', b'{"unix"', 3),
    "the same unit with another hash": lambda text: text.replace(b'"written":{"', b'"written":{"x', 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_journal_costs_time_only(whole, unfinished, damage):
    (unfinished / JOURNAL).write_bytes(damage((unfinished / JOURNAL).read_bytes()))
    run(False, whole, unfinished)
    assert content(unfinished) == content(whole)


@pytest.mark.parametrize("lost", ["one", "all"])
def test_files_that_are_gone_are_written_again(whole, unfinished, lost):
    parts = sorted(unfinished.glob("*.safetensors*"))
    for path in parts if lost == "all" else parts[:1]:
        path.unlink()
    run(False, whole, unfinished)
    assert content(unfinished) == content(whole)


def test_other_options_do_not_continue_it_but_may_start_over(unfinished):
    before = content(unfinished)
    with pytest.raises(
        ConversionError, match="with other options; give the same ones to go on, or --no-resume"
    ):
        convert(TINY, unfinished, dtype="fp32", max_shard_size=LIMIT)
    assert content(unfinished) == before
    convert(TINY, unfinished, dtype="fp32", resume=False)
    assert open_weights(unfinished).dtype == "float32"
    assert not list(unfinished.glob("*.part"))


def test_a_source_that_changed_meanwhile_does_not_continue_it(whole, tmp_path):
    source = Path(shutil.copytree(TINY, tmp_path / "tiny"))
    with pytest.raises(Stop):
        convert(source, tmp_path / "dst", progress=stop_after(60))
    os.utime(source / "model-00002-of-00003.safetensors")
    with pytest.raises(ConversionError, match="unfinished conversion of another source"):
        convert(source, tmp_path / "dst")


def test_only_what_a_journal_names_is_touched(whole, unfinished):
    (unfinished / "mine.txt").write_bytes(b"precious")
    for resume in (True, False):
        with pytest.raises(ConversionError, match=r"is not empty, it holds mine.txt"):
            run(False, whole, unfinished, resume=resume)
    assert (unfinished / "mine.txt").read_bytes() == b"precious"


def test_a_journal_that_leads_out_of_the_directory_is_none(whole, tmp_path):
    target = tmp_path / "dst"
    target.mkdir()
    (tmp_path / "outside").write_bytes(b"precious")
    (target / JOURNAL).write_text(json.dumps({"identity": "x", "files": ["../outside"]}) + "\n")
    run(False, whole, target, resume=False)
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert content(target) == content(whole)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors.part", JOURNAL])
def test_a_link_in_the_target_is_not_followed(whole, unfinished, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name.removesuffix(".part")).unlink(missing_ok=True)
    (unfinished / name).symlink_to(precious)
    with pytest.raises((ConversionError, OSError)):
        run(False, whole, unfinished)
    assert precious.read_bytes() == b"precious"


def test_two_runs_never_write_the_same_directory(whole, unfinished):
    before = content(unfinished)
    with open(unfinished / JOURNAL, "rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another run is writing there"):
            run(False, whole, unfinished)
    assert content(unfinished) == before
    run(False, whole, unfinished)


def test_a_fault_of_the_input_leaves_nothing(whole, tmp_path):
    raw = configuration()
    t = tensors(raw)
    t["language_model.lm_head.weight"][7, 1] = float("nan")
    source = write_checkpoint(tmp_path / "src", raw, t, shards=2)
    (tmp_path / "empty").mkdir()
    for target in ("new", "empty"):
        with pytest.raises(
            ConversionError, match=r"lm_head.weight: holds 1 values that are no numbers \(NaN\)"
        ):
            convert(source, tmp_path / target, max_shard_size=1000)
    assert not (tmp_path / "new").exists()
    assert content(tmp_path / "empty") == {}


@pytest.mark.parametrize("dtype", [BF16, "float16", "float32"], ids=str)
@pytest.mark.parametrize("negative", [False, True])
def test_a_nan_of_any_kind_is_found(tmp_path, dtype, negative):
    raw = configuration()
    t = tensors(raw, dtype)
    t["language_model.model.layers.1.mlp.experts.3.up_proj.weight"][-1, -1] = (
        -float("nan") if negative else float("nan")
    )
    t["language_model.model.norm.weight"][:2] = float("inf"), -float("inf")  # these are values
    source = write_checkpoint(tmp_path / "src", raw, t)
    with pytest.raises(ConversionError, match=r"experts.3.up_proj.weight: holds 1 values"):
        convert(source, tmp_path / "dst")
