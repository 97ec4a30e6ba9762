"""The command convert-weights: what it prints, what it imports, how it ends; and where SRC may be."""

import gzip
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DATA, INDEX, TINY, configuration, content, tensors, write_checkpoint
from click.testing import CliRunner

import kimi_vl
from kimi_vl.convert import open_weights
from kimi_vl.convert.cli import cli

HEAVY = ("torch", "mindspore", "transformers", "huggingface_hub")


def run(*arguments):
    """The command within this process."""
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def measured(*arguments, env=None):
    """The command in its own process: (status, stdout, stderr, CPU seconds, peak MB, heavy modules it imported)."""
    script = (
        "import sys\n"
        "from kimi_vl.convert.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "    peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]\n"
        "    print('MEASURED', peak, *heavy, file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    ) as process:
        assert process.stdout
        assert process.stderr
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    err, last = err.rsplit("MEASURED ", 1)
    peak, *heavy = last.split()
    return process.returncode, out, err, usage.ru_utime + usage.ru_stime, int(peak) / 1000, heavy


@pytest.mark.parametrize("arguments", [("--help",), ("--src", TINY, "--dry-run")], ids=["help", "dry run"])
def test_answers_at_once_and_without_heavy_imports(arguments):
    runs = [measured(*arguments) for _ in range(2)]
    assert all(status == 0 for status, *_ in runs)
    assert all(heavy == [] for *_, heavy in runs)
    assert min(cpu for *_, cpu, _, _ in runs) < 1.0


def test_the_dry_run_of_the_full_size_reads_headers_only(tmp_path):
    """All 5679 tensors in files that hold nothing but headers (and holes for 33 GB)."""
    listed = json.loads(gzip.decompress((DATA / "published/tensors.json.gz").read_bytes()))
    shutil.copy(DATA / "published/config.json", tmp_path)
    names, weight_map = list(listed), {}
    for i in range(7):
        file, header, at = f"model-{i + 1:05}-of-00007.safetensors", {}, 0
        for name in names[i::7]:
            dtype, *shape = listed[name]
            size = math.prod(shape) * (2 if dtype == "BF16" else 4)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        text = json.dumps(header).encode()
        with open(tmp_path / file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + at)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    status, out, err, cpu, peak, _ = measured("--src", tmp_path, "--dry-run")
    assert (status, err) == (0, "")
    assert "5679 published -> 712 ours, mostly bfloat16" in out
    assert "dropped    27" in out
    assert "in all     32.82 GB" in out
    assert cpu < 5
    assert peak < 300


def test_there_and_back(tmp_path):
    ckpt, back = tmp_path / "ckpt", tmp_path / "back"
    result = run("--src", TINY, "--dst", ckpt)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].split() == ["src:", str(TINY)]
    assert result.output.count("123 published -> 76 ours") == 1
    assert result.output.splitlines()[-1].startswith(f"done       {ckpt}, ")
    result = run("--reverse", "--src", ckpt, "--dst", back)
    assert result.exit_code == 0, result.output
    assert content(back) == content(TINY)


def test_the_dry_run_writes_nothing_and_tells_all(tmp_path):
    dst = tmp_path / "ckpt"
    result = run("--src", TINY, "--dst", dst, "--dry-run", "--dtype", "fp32", "--max-shard-size", "0.5MB")
    assert result.exit_code == 0, result.output
    assert not dst.exists()
    assert "max shard size: 500.00 kB" in result.output
    assert "mostly float32" in result.output
    assert "write      model-00004-of-00004.safetensors" in result.output
    assert "copy       config.json, generation_config.json" in result.output
    assert " free\n" in result.output
    assert " available\n" in result.output


@pytest.mark.parametrize("dry_run", [True, False])
def test_json_stands_alone_on_stdout(tmp_path, dry_run):
    result = run("--src", TINY, "--dst", tmp_path / "x", "--json", *(["--dry-run"] if dry_run else []))
    told, *events = map(json.loads, result.stdout.splitlines())
    assert told["event"] == "plan"
    assert [e["event"] for e in events] == ([] if dry_run else ["done"])
    assert told["nbytes"] == sum(file["nbytes"] for file in told["files"])
    assert len(told["tensors"]) == 76
    assert str(TINY) in result.stderr
    assert (tmp_path / "x").exists() is not dry_run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--src'"),
        (["--src", TINY], "Missing option '--dst'"),
        (["--src", TINY, "--dst", "x", "--dtype", "int8"], "'int8' is not one of"),
        (["--src", TINY, "--dst", "x", "--max-shard-size", "big"], "'big' is no size; expected as in 5GB"),
        (["--src", TINY, "--dst", "x", "--max-shard-size", "5TX"], "'5TX' is no size"),
        (["--src", TINY, "--dst", "x", "--max-shard-size", "0"], "'0' is no size"),
        (["--src", "x", "--dst", "y", "--reverse", "--dtype", "bf16"], "--dtype has no place with --reverse"),
        (
            ["--src", "x", "--dst", "y", "--reverse", "--max-shard-size", "1GB"],
            "--max-shard-size has no place",
        ),
        (["--src", TINY, "--dst", "x", "--model", "a/b"], "it belongs to --src hf"),
        (["--src", TINY, "--dst", "x", "--revision", "main"], "is no Hub repository"),
        (["--src", "/no/such", "--dst", "x"], "convert-weights: /no/such: there is no such directory"),
        (["--src", DATA, "--dst", "x"], "there is no config.json"),
        (["--src", TINY, "--reverse", "--dst", "x"], "has no conversion.json"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_sentence(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert not os.listdir()
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message in last


def test_a_lack_of_room_ends_with_3(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10))
    result = run("--src", TINY, "--dst", tmp_path / "x")
    assert result.exit_code == 3
    assert "are free there" in result.stderr.splitlines()[-1]


def test_a_failing_disk_ends_with_3(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    result = run("--src", TINY, "--dst", tmp_path / "x")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].endswith(
        "No space left on device; run the same command again to go on where it was"
    )


def test_the_progress_bar_is_quiet_where_nobody_looks(tmp_path):
    status, _, err, *_ = measured("--src", TINY, "--dst", tmp_path / "x")
    assert (status, err) == (0, "")


# --- where SRC may be -------------------------------------------------------------------------------------------


def test_nano_is_the_embedded_model_unless_a_directory_has_its_name(monkeypatch, tmp_path):
    embedded = write_checkpoint(tmp_path / "package" / "nano", configuration(), tensors(configuration()))
    monkeypatch.setattr(kimi_vl, "nano_path", lambda: str(embedded))
    monkeypatch.chdir(tmp_path)
    assert open_weights("nano").directory == embedded
    shutil.copytree(TINY, "nano")
    assert open_weights("nano").directory == Path("nano")


@pytest.fixture
def cache(tmp_path):
    """A Hub cache that holds one small repository, as the Hub's client lays it out."""
    repo, commit = tmp_path / "hub/models--someone--Small-Kimi", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copytree(TINY, blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_the_hub_cache_is_a_source(cache, tmp_path):
    status, out, err, *_ = measured(
        *("--src", "hf", "--model", "someone/Small-Kimi", "--dst", tmp_path / "x"), env=cache
    )
    assert status == 0, err
    assert "src: someone/Small-Kimi" in out
    manifest = json.loads((tmp_path / "x/conversion.json").read_text())
    assert manifest["source"] == "someone/Small-Kimi"
    assert manifest["revision"] == "0123456789abcdef0123456789abcdef01234567"


def test_check_finds_nothing_or_names_it(tmp_path):
    ckpt = tmp_path / "ckpt"
    run("--src", TINY, "--dst", ckpt)
    result = run("check", ckpt)
    assert (result.exit_code, result.output) == (0, f"done       {ckpt} is as it was written\n")
    shard = ckpt / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run("check", ckpt, "--json")
    assert result.exit_code == 2
    assert [s.split(": ")[0] for s in json.loads(result.stdout)["damaged"]] == [str(shard)]
    assert result.stderr.splitlines()[-1].endswith("1 damaged; convert the checkpoint again")
    assert run("check", TINY).exit_code == 2
    result = run("--src", TINY, "check", ckpt)
    assert (result.exit_code, "--src has no place before check" in result.stderr) == (2, True)


def test_what_a_narrower_dtype_loses_is_told(tmp_path):
    raw = configuration()
    t = tensors(raw, np.float32)
    head, norm = "language_model.lm_head.weight", "language_model.model.norm.weight"
    t = {name: np.where(abs(a) < 1e-3, np.float32(1), a) for name, a in t.items()}
    t[head][0, :3] = 1e5, 1e-9, 2e-9
    t[norm][0] = 1e-12
    source = write_checkpoint(tmp_path / "src", raw, t)
    result = run("--src", source, "--dst", tmp_path / "x", "--dtype", "fp16")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("or make them its largest value with --allow-overflow")
    result = run("--src", source, "--dst", tmp_path / "x", "--dtype", "fp16", "--allow-overflow")
    assert result.exit_code == 0, result.output
    assert [
        line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if line.startswith("float16 ")
    ] == [
        f"{norm}: 1 values became 0",
        f"{head}: 1 values became its largest one, 2 values became 0",
    ]
