"""Converting a repository of the Hub: against a stand-in on the loopback interface."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import INDEX, TINY, content
from hub_server import HubServer

from kimi_vl import KimiVLForConditionalGeneration, nano_path
from kimi_vl.convert import ConversionError, EnvironmentProblem, convert, open_weights, plan
from kimi_vl.convert.manifest import MANIFEST, Manifest

REPO = "someone/Small-Kimi"
FILES = sorted(path.name for path in TINY.glob("*.safetensors"))
COMMAND = [sys.executable, "-c", "from kimi_vl.convert.cli import main; main()"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        server.commit(REPO, TINY, tag="v1")
        yield server


@pytest.fixture(scope="module")
def from_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("directory") / "ckpt"
    convert(TINY, path)
    return content(path)


def without_source(files):
    """Everything converted but what the manifest says of where it came from."""
    manifest = json.loads(files["conversion.json"])
    for name in ("source", "revision"):
        del manifest[name]
    for file in manifest["published_files"].values():
        del file["sha256"]
    return files | {"conversion.json": manifest}


def test_a_repository_converts_as_a_directory_does(server, from_directory, tmp_path):
    convert(REPO, tmp_path / "dst")
    assert without_source(content(tmp_path / "dst")) == without_source(from_directory)
    manifest = Manifest.load(tmp_path / "dst")
    assert (manifest.source, manifest.revision) == (REPO, server.repositories[REPO].revisions["main"])
    assert all(len(file.sha256) == 64 for file in manifest.published_files.values())


def test_the_command_with_src_hf(server, from_directory, tmp_path):
    done = subprocess.run(
        [*COMMAND, "--src", "hf", "--model", REPO, "--revision", "v1", "--dst", tmp_path / "dst"],
        env=server.env(tmp_path / "home"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"src: {REPO} at v1" in done.stdout
    assert without_source(content(tmp_path / "dst")) == without_source(from_directory)


def test_the_dry_run_reads_headers_only(server, tmp_path):
    planned = plan(REPO, tmp_path / "dst")
    assert {t.name for t in planned.tensors} == {t.name for t in plan(TINY).tensors}
    weights = sum((TINY / name).stat().st_size for name in FILES)
    assert server.count("storage") == len(FILES)
    assert all(r.range for r in server.requests if r.kind == "storage")
    assert (
        sum(server.sent[name] for name in FILES) <= weights
    )  # of files this small the first range is most of it
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "dst").exists()


def test_a_pinned_revision_is_converted_though_main_moved_on(server, from_directory, tmp_path):
    changed = Path(shutil.copytree(TINY, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"changed": True}))
    server.commit(REPO, changed)
    convert(REPO, tmp_path / "pinned", revision="v1")
    convert(REPO, tmp_path / "main")
    assert without_source(content(tmp_path / "pinned")) == without_source(from_directory)
    assert json.loads((tmp_path / "main/config.json").read_text())["changed"]
    assert not hasattr(KimiVLForConditionalGeneration.from_pretrained(REPO, revision="v1").config, "changed")
    assert KimiVLForConditionalGeneration.from_pretrained(REPO).config.changed


def test_shards_are_converted_while_others_are_downloaded(server, tmp_path):
    size = (TINY / FILES[-1]).stat().st_size
    server.bytes_per_second[FILES[-1]] = size / 1.5
    seen = []

    def progress(n):
        seen.append((n, server.sent[FILES[-1]]))

    todo = convert(REPO, tmp_path / "dst", progress=progress)
    header = min(size, 256 << 10)  # was read before, for the plan
    early = sum(n for n, sent in seen if sent < header + size * 0.9)
    assert early > 0.3 * sum(t.nbytes for t in todo.tensors)


def test_a_discarded_source_leaves_nothing_and_takes_little_room(server, from_directory, tmp_path):
    target, most = tmp_path / "dst", []

    def progress(n):
        most.append(len(list((target / "conversion.source").glob("*.safetensors"))))

    convert(REPO, target, discard_source=True, progress=progress)
    assert max(most) <= 2
    assert without_source(content(target)) == without_source(from_directory)
    assert not [p for p in tmp_path.rglob("*.safetensors") if p.parent != target]


def test_with_a_discarded_source_disk_use_stays_near_the_models_size(server, tmp_path, monkeypatch):
    """27 layers in seven shards, as published."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import make_synthetic

    raw = make_synthetic.configuration(Path(nano_path(), "config.json"), layers=27, vision_layers=1)
    make_synthetic.make(tmp_path / "src", raw, shard_bytes=2_600_000)
    assert len(list((tmp_path / "src").glob("*.safetensors"))) == 7
    server.commit("someone/deep", tmp_path / "src")
    target, used = tmp_path / "dst", []

    def progress(n):
        blocks = 0
        for path in target.rglob("*"):
            with suppress(FileNotFoundError):  # it was removed meanwhile
                blocks += path.stat().st_blocks
        used.append(blocks * 512)

    todo = convert("someone/deep", target, discard_source=True, max_shard_size=2_600_000, progress=progress)
    assert max(used) < 1.3 * todo.nbytes
    assert not list(target.rglob("conversion.source"))


def test_what_the_cache_held_before_stays(server, tmp_path):
    weights = open_weights(REPO)
    sent = server.sent.copy()
    convert(REPO, tmp_path / "dst", discard_source=True)
    assert server.sent[FILES[0]] == sent[FILES[0]]
    assert (weights.directory / FILES[0]).read_bytes() == (TINY / FILES[0]).read_bytes()


@pytest.mark.parametrize(("discard", "at"), [(False, 0.5), (True, 0.05), (True, 0.9)])
def test_a_killed_run_downloads_nothing_twice(server, from_directory, tmp_path, discard, at):
    """At a rate at which the whole takes a second."""
    size = {name: (TINY / name).stat().st_size for name in FILES}
    for name in FILES:
        server.bytes_per_second[name] = sum(size.values())
    arguments = ["--src", REPO, "--dst", tmp_path / "dst", *(["--discard-source"] if discard else [])]
    run = [*COMMAND, *arguments]
    env = server.env(tmp_path / "home")
    heads = sum(min(s, 256 << 10) for s in size.values())  # read once by each run
    with subprocess.Popen(run, env=env, stdout=subprocess.DEVNULL) as first:
        while sum(server.sent[n] for n in FILES) - heads < at * sum(size.values()):
            assert first.poll() is None
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
    server.bytes_per_second.clear()
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert without_source(content(tmp_path / "dst")) == without_source(from_directory)
    # What is on the way when the process dies is lost: one chunk of the client's, of the largest file's size here.
    assert sum(server.sent[n] for n in FILES) - 2 * heads <= sum(size.values()) + max(size.values())


def test_a_lost_connection_is_gone_on_with(server, from_directory, tmp_path):
    server.drop(FILES[1], after=100_000, times=1000)
    run = [*COMMAND, "--src", REPO, "--dst", tmp_path / "dst"]
    done = subprocess.run(run, env=server.env(tmp_path / "home"), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3)
    server.faults.clear()
    server.drop(FILES[2], after=0, times=1000)
    with pytest.raises(EnvironmentProblem, match="run the same command again, it goes on where it was"):
        convert(REPO, tmp_path / "dst")
    server.faults.clear()
    convert(REPO, tmp_path / "dst")
    assert without_source(content(tmp_path / "dst")) == without_source(from_directory)


def test_a_damaged_download_is_found_and_only_that_is_done_again(server, from_directory, tmp_path):
    server.corrupt.add(FILES[1])
    with pytest.raises(EnvironmentProblem, match="SHA-256"):
        convert(REPO, tmp_path / "dst")
    assert not (tmp_path / "dst" / MANIFEST).exists()
    server.corrupt.clear()
    sent = server.sent[FILES[0]]
    convert(REPO, tmp_path / "dst")
    assert without_source(content(tmp_path / "dst")) == without_source(from_directory)
    assert server.sent[FILES[0]] - sent <= 256 << 10  # its header


def test_a_damaged_cache_is_found(server, tmp_path):
    weights = open_weights(REPO)
    blob = (weights.directory / FILES[1]).resolve()
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.write_bytes(data)
    with pytest.raises(EnvironmentProblem, match=f"{FILES[1]}: what is there has SHA-256"):
        convert(REPO, tmp_path / "dst")
    convert(REPO, tmp_path / "dst")


def test_a_disk_too_small_for_both_is_known_before_the_work(server, tmp_path, monkeypatch):
    size = sum((TINY / name).stat().st_size for name in FILES)
    room = shutil._ntuple_diskusage(0, 0, int(size * 1.5))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(EnvironmentProblem, match="make room, or give --discard-source"):
        convert(REPO, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    convert(REPO, tmp_path / "dst", discard_source=True)


def test_another_commit_does_not_continue_an_unfinished_conversion(server, tmp_path):
    left = iter(range(30))

    def stop(n):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(REPO, tmp_path / "dst", progress=stop)
    server.commit(REPO, TINY)
    with pytest.raises(ConversionError, match="unfinished conversion of another source"):
        convert(REPO, tmp_path / "dst")
    convert(REPO, tmp_path / "dst", revision="v1")


def test_weights_of_the_hub_are_opened_whole(server):
    ours, theirs = open_weights(REPO, "v1"), open_weights(TINY)
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert ours.read(name).tobytes() == theirs.read(name).tobytes()


def test_repositories_that_are_no_checkpoint(server, tmp_path):
    server.commit("someone/empty", {"README.md": b"# nothing\n"})
    with pytest.raises(ConversionError, match="someone/empty: has no config.json"):
        convert("someone/empty", tmp_path / "dst")
    config = (TINY / "config.json").read_bytes()
    server.commit("someone/pickled", {"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(ConversionError, match="pytorch_model.bin: is a pickle"):
        convert("someone/pickled", tmp_path / "dst")
    server.commit("someone/half", {p.name: p.read_bytes() for p in TINY.iterdir() if p.name != FILES[1]})
    with pytest.raises(ConversionError, match=f"has no file '{FILES[1]}'"):
        convert("someone/half", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert INDEX in server.repositories["someone/half"].commits.popitem()[1]
