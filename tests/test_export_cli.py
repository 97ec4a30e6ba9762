"""``export-mindir`` and what its bundles are made of, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bundles
import pytest
from click.testing import CliRunner
from golden import DATA

from kimi_vl.export import bundle, writing
from kimi_vl.export.cli import cli
from kimi_vl.modeling.configuration import ModelConfig

FP32 = "tiny8-fp32"
ARGUMENTS = (
    "--seq",
    "256",
    "--prefill-chunk",
    "64,32",
    "--image-patches",
    "64",
    "--batch",
    "2",
    "--target",
    "cpu",
)


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A bundle that the command wrote in a process of its own, elsewhere and with other hashes of strings."""
    room = tmp_path_factory.mktemp("cli")
    (room / "ckpt").symlink_to(bundles.converted(FP32))
    code = "from kimi_vl.export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *ARGUMENTS, "--json"],
        cwd=room,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    return room / "mindir", done


def test_the_command_writes_a_bundle_from_ckpt_to_mindir(written):
    directory, done = written
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert set(shown["graphs"]) == set(bundle.Bundle.load(directory).graphs)
    assert [p.name for p in directory.parent.iterdir() if p.name.startswith(".")] == []
    assert "done       ./mindir" in done.stderr and "Traceback" not in done.stderr
    assert directory.stat().st_mode & 0o777 == 0o777 & ~writing._umask()


def test_two_processes_write_the_same_bytes(written):
    ours, theirs = bundles.bundle(FP32), written[0]
    names = sorted(p.name for p in ours.iterdir())
    assert names == sorted(p.name for p in theirs.iterdir()) and "decode-256.mindir" in names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_dry_run_shows_graphs_files_and_memory(tmp_path):
    dst = tmp_path / "mindir"
    status, out, err = run("--src", bundles.converted(FP32), *ARGUMENTS, "--dst", dst, "--dry-run")
    assert status == 0 and err == "" and not dst.exists()
    for text in (
        "prefill chunk: 64, 32\n",
        "prefill-32x256",
        "prefill-64x256",
        "input_ids[2, 64]",
        "logits[2, 1, 1000]",
        "model-00001-of-00001.safetensors",
        "config.json",
        "of weights (mapped as they are stored)",
        "live at once in ",
        "the largest vision graph takes 64 patches (16 tokens)",
    ):
        assert text in out


def test_a_dry_run_gives_json(untraced):
    with bundles.plain_graphs():
        status, out, err = run("--src", bundles.converted("tiny8-bf16"), *ARGUMENTS, "--dry-run", "--json")
    shown = json.loads(out)
    assert status == 0 and "(widened from bfloat16)" in err
    config = ModelConfig.from_file(DATA / "tiny8-bf16").text
    assert shown["cache_bytes"] == 2 * config.num_hidden_layers * 256 * config.latent_dim * 4
    assert shown["graphs"]["decode-256"]["caches"]["cache.0.1"]["shape"] == [256, config.latent_dim]


def test_the_default_context_is_4096_or_what_the_model_has(untraced):
    positions = ModelConfig.from_file(DATA / FP32).text.max_position_embeddings
    _, out, _ = run("--src", bundles.converted(FP32), "--target", "cpu", "--dry-run", "--json")
    assert json.loads(out)["contexts"][-1] == min(4096, positions)


def test_the_default_target_is_ascend_and_takes_no_fp32(untraced):
    status, out, _ = run("--src", bundles.converted("tiny8-bf16"), "--seq", "256", "--dry-run")
    assert status == 0 and "target: ascend" in out and "computing in bfloat16" in out
    status, _, err = run("--src", bundles.converted(FP32), "--seq", "256", "--dry-run")
    assert status == 2 and "holds float32, but target ascend computes in bf16 or fp16" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--src", DATA / FP32), "is not a converted directory; run `convert-weights --src "),
        (("--src", "nano"), "run `convert-weights --src nano --dst ./ckpt` first"),
        (
            ("--src", "moonshotai/Kimi-VL-A3B-Instruct"),
            "run `convert-weights --src moonshotai/Kimi-VL-A3B-Instruct",
        ),
        (("--src", "/nowhere"), "there is no such directory"),
        (("--src", __file__), "is a file, expected a converted directory"),
        (("--src", "BUNDLE"), "is a bundle already"),
        (("--src", "CKPT", "--seq", "9999999"), "--seq: 9999999, expected 2 to"),
        (("--src", "CKPT", "--dst", __file__), "is a file, expected a directory to write to"),
        (("--src", "CKPT", "--dst", "CKPT"), "is not empty and no bundle"),
        (("--src", "CKPT", "--image-patches", "64;128"), "is no list of numbers"),
        (
            ("--src", "CKPT", "--prefill-chunk", "1024", "--seq", "256"),
            "holds 256 tokens; reduce it or raise --seq",
        ),
        (("--src", "CKPT", "--prefill-chunk", "64,all"), "'64,all' is no list of numbers"),
        (("--src", "CKPT", "--dtype", "bf16"), "holds float32; convert the checkpoint with --dtype bf16"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"BUNDLE": bundles.bundle, "CKPT": bundles.converted}
    status, _, err = run(*(places[a](FP32) if a in places else a for a in arguments), "--target", "cpu")
    assert status == 2 and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_status_3(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "mindir"))

    monkeypatch.setattr("kimi_vl.export.cli.export", full)
    status, _, err = run("--src", bundles.converted(FP32), *ARGUMENTS, "--dst", tmp_path / "mindir")
    assert status == 3 and err.endswith(f"export-mindir: {tmp_path / 'mindir'}: No space left on device\n")
