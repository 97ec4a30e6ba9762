"""A repository of the Hub: what a revision means, headers without the files, downloads that survive anything."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import raw_file
from hub_server import TOKEN, HubServer
from safetensors.numpy import save

from kimi_vl.convert import ConversionError, EnvironmentProblem, hub
from kimi_vl.convert.safetensors_file import MAX_HEADER_BYTES

REPO = "someone/Small-Kimi"
WEIGHTS = "model.safetensors"
SMALL = {"config.json": b'{"model_type": "kimi_vl"}', "README.md": b"# small\n"}
CHUNK = 1 << 16  # what the client writes to the disk at once, below


def weights(seed=0, nbytes=4 << 20):
    """A safetensors file; its tensors have random content."""
    rng = np.random.default_rng(seed)
    return save({f"layers.{i}.weight": rng.integers(0, 255, nbytes // 4, np.uint8) for i in range(4)})


CONTENT = weights()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The stand-in with one repository, for this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        server.commit(REPO, {WEIGHTS: CONTENT, **SMALL}, tag="v1")
        yield server


@pytest.fixture
def offline(monkeypatch):
    """Called, it forbids to ask the Hub."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def leftovers(path):
    """Files of unfinished downloads."""
    return [p.name for p in path.rglob("*") if p.name.endswith((".part", ".incomplete"))]


def test_importing_it_does_not_import_the_library():
    script = "import sys, kimi_vl.convert.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# Looking up


def test_a_revision_means_a_commit(server):
    first = server.repositories[REPO].revisions["main"]
    second = server.commit(REPO, SMALL)
    other = server.commit(REPO, {**SMALL, "LICENSE": b"MIT"}, branch="a/branch")
    assert hub.look_up(REPO).commit == second
    assert hub.look_up(REPO, "main").commit == second
    assert hub.look_up(REPO, "v1").commit == first
    assert hub.look_up(REPO, first).commit == first
    assert hub.look_up(REPO, "a/branch").commit == other


def test_looking_up_is_one_request_and_gives_sizes_and_hashes(server):
    repository = hub.look_up(REPO)
    assert [r.kind for r in server.requests] == ["info"]
    assert repository.repo == REPO and repository.revision == "main" and not repository.cached
    assert repository.files == {
        WEIGHTS: hub.HubFile(WEIGHTS, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
        **{name: hub.HubFile(name, len(content), None) for name, content in SMALL.items()},
    }


def test_files_outside_the_repository_are_not_seen(server):
    server.commit(REPO, {"../evil.safetensors": b"x" * 9, "sub/model.safetensors": b"x" * 9, **SMALL})
    assert set(hub.look_up(REPO).files) == set(SMALL)


def test_a_file_that_is_not_there(server):
    repository = hub.look_up(REPO)
    for call in (hub.cached, hub.read_head, hub.download):
        with pytest.raises(ConversionError, match="has no file 'tokenizer.json' at main"):
            call(repository, "tokenizer.json")


# Headers


def test_reading_a_header_is_one_small_request(server):
    repository = hub.look_up(REPO)
    assert len(CONTENT) > 10 * hub.FIRST_BYTES
    head = hub.read_head(repository, WEIGHTS)
    n = int.from_bytes(CONTENT[:8], "little")
    assert head == CONTENT[: 8 + n]
    assert server.sent[WEIGHTS] == hub.FIRST_BYTES
    assert [r.range for r in server.requests if r.kind == "storage"] == [f"bytes=0-{hub.FIRST_BYTES - 1}"]


def test_reading_a_large_header_is_two_requests(server, tmp_path):
    raw_file(tmp_path / WEIGHTS, b"{}" + b" " * (3 * hub.FIRST_BYTES), b"x" * (1 << 20))
    content = (tmp_path / WEIGHTS).read_bytes()
    server.commit(REPO, {WEIGHTS: content})
    size = 8 + 2 + 3 * hub.FIRST_BYTES
    assert hub.read_head(hub.look_up(REPO), WEIGHTS) == content[:size]
    assert server.sent[WEIGHTS] == hub.FIRST_BYTES + size


def test_a_server_without_ranges_is_not_read_to_the_end(server):
    server.ignores_ranges = True
    server.bytes_per_second[WEIGHTS] = len(CONTENT) / 4  # seconds
    start = time.monotonic()
    head = hub.read_head(hub.look_up(REPO), WEIGHTS)
    assert head == CONTENT[: len(head)]
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "has 0 bytes, too few"),
        (b"12345", "has 5 bytes, too few"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"x" * 100, "at most 4194304 are accepted"),
        ((1000).to_bytes(8, "little") + b"x" * 100, "is truncated"),
    ],
    ids=["empty", "short", "huge header", "truncated"],
)
def test_what_is_no_safetensors_file(server, content, says):
    server.commit(REPO, {WEIGHTS: content})
    with pytest.raises(ConversionError, match=says):
        hub.read_head(hub.look_up(REPO), WEIGHTS)


# Downloads


def test_into_the_cache_and_from_there_without_a_request(server, tmp_path):
    repository = hub.look_up(REPO)
    assert hub.cached(repository, WEIGHTS) is None
    for name, content in {WEIGHTS: CONTENT, **SMALL}.items():
        path = hub.download(repository, name)
        assert path.read_bytes() == content
        assert path == hub.cached(repository, name)
        assert path.parent.name == repository.commit
    assert server.sent[WEIGHTS] == len(CONTENT)
    asked = len(server.requests)
    assert hub.download(repository, WEIGHTS) == hub.cached(repository, WEIGHTS)
    assert hub.read_head(repository, WEIGHTS) == CONTENT[: int.from_bytes(CONTENT[:8], "little") + 8]
    assert len(server.requests) == asked
    assert leftovers(tmp_path) == []


def test_huggingface_hub_finds_what_was_downloaded(server, offline):
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    repository = hub.look_up(REPO)
    paths = {str(hub.download(repository, name)) for name in repository.files}
    (scanned,) = scan_cache_dir().repos
    (revision,) = scanned.revisions
    assert revision.commit_hash == repository.commit and revision.refs == {"main"}
    assert {str(file.file_path) for file in revision.files} == paths
    offline()
    assert hf_hub_download(REPO, WEIGHTS) in paths
    assert snapshot_download(REPO).endswith(repository.commit)


def test_into_a_directory_which_then_holds_nothing_else(server, tmp_path):
    repository = hub.look_up(REPO)
    for name, content in {WEIGHTS: CONTENT, **SMALL}.items():
        assert hub.download(repository, name, tmp_path / "here") == tmp_path / "here" / name
        assert (tmp_path / "here" / name).read_bytes() == content
    assert {path.name for path in (tmp_path / "here").iterdir()} == {WEIGHTS, *SMALL}
    assert hub.cached(repository, WEIGHTS) is None
    hub.download(repository, WEIGHTS, tmp_path / "here")
    assert server.sent[WEIGHTS] == len(CONTENT)


def test_a_file_of_another_commit_in_the_directory_is_replaced(server, tmp_path):
    old = hub.look_up(REPO)
    hub.download(old, WEIGHTS, tmp_path)
    server.commit(REPO, {WEIGHTS: weights(seed=1), "config.json": b'{"model_type": "other!!"}'})
    new = hub.look_up(REPO)
    assert new.files[WEIGHTS].nbytes == old.files[WEIGHTS].nbytes
    assert hub.download(new, WEIGHTS, tmp_path).read_bytes() == weights(seed=1)
    hub.download(old, "config.json", tmp_path)
    assert hub.download(new, "config.json", tmp_path).read_bytes() == b'{"model_type": "other!!"}'


@pytest.mark.parametrize("into", ["cache", "directory"])
def test_a_commit_is_read_though_main_moved_on(server, tmp_path, into):
    repository = hub.look_up(REPO)
    server.commit(REPO, {WEIGHTS: weights(seed=1), "config.json": b"{}"})
    directory = tmp_path / "here" if into == "directory" else None
    assert hub.download(repository, WEIGHTS, directory).read_bytes() == CONTENT
    assert hub.download(repository, "config.json", directory).read_bytes() == SMALL["config.json"]
    assert hub.look_up(REPO).commit != repository.commit


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("into", ["cache", "directory"])
def test_a_dropped_connection_costs_little(server, tmp_path, into, reset):
    server.drop(WEIGHTS, after=len(CONTENT) // 4, times=3, reset=reset)
    directory = tmp_path / "here" if into == "directory" else None
    path = hub.download(hub.look_up(REPO), WEIGHTS, directory)
    assert path.read_bytes() == CONTENT
    assert server.count("storage") == 4
    assert server.sent[WEIGHTS] < len(CONTENT) + 3 * 16 * CHUNK  # what was under way when it broke
    assert leftovers(tmp_path) == []


def test_a_server_that_ignores_ranges_starts_the_file_again(server, tmp_path):
    server.drop(WEIGHTS, after=len(CONTENT) // 2)
    server.ignores_ranges = True
    assert hub.download(hub.look_up(REPO), WEIGHTS, tmp_path).read_bytes() == CONTENT
    assert server.sent[WEIGHTS] == len(CONTENT) // 2 + len(CONTENT)


def test_when_nothing_comes_any_more(server, tmp_path):
    repository = hub.look_up(REPO)
    server.drop(WEIGHTS, after=len(CONTENT) // 2)
    server.drop(WEIGHTS, after=0, times=100)
    with pytest.raises(EnvironmentProblem) as e:
        hub.download(repository, WEIGHTS, tmp_path / "here")
    assert str(e.value).startswith(f"{REPO}: {WEIGHTS}: the Hub cannot be reached (")
    assert str(e.value).endswith("run the same command again, it goes on where it was")
    assert not (tmp_path / "here" / WEIGHTS).exists()
    server.faults.clear()
    assert hub.download(repository, WEIGHTS, tmp_path / "here").read_bytes() == CONTENT
    assert server.sent[WEIGHTS] < len(CONTENT) + 16 * CHUNK
    assert leftovers(tmp_path) == []


def test_a_stalled_connection_is_given_up(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.bytes_per_second[WEIGHTS] = 0.2
    with pytest.raises(
        EnvironmentProblem, match=r"the Hub cannot be reached \(.*timed out\); run the same command"
    ):
        hub.download(hub.look_up(REPO), WEIGHTS, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


PROCESS = f"""
import sys
from pathlib import Path
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
from kimi_vl.convert import hub
print(hub.download(hub.look_up("{REPO}"), "{WEIGHTS}", *map(Path, sys.argv[1:])))
"""


def process(server, home, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *map(str, arguments)],
        env=server.env(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("into", ["cache", "directory"])
def test_a_killed_process_costs_little(server, tmp_path, into):
    arguments = [tmp_path / "here"] if into == "directory" else []
    server.bytes_per_second[WEIGHTS] = len(CONTENT) / 1.0  # seconds
    with process(server, tmp_path / "home", *arguments) as first:
        while server.sent[WEIGHTS] < len(CONTENT) * 0.6:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert leftovers(tmp_path) and not list(tmp_path.rglob(WEIGHTS))
    server.bytes_per_second.clear()
    with process(server, tmp_path / "home", *arguments) as second:
        path = second.communicate()[0].strip()
    assert Path(path).read_bytes() == CONTENT
    assert server.sent[WEIGHTS] < len(CONTENT) * 1.25
    assert server.requests[-1].range != "bytes=0-" and leftovers(tmp_path) == []


def test_two_processes_download_a_file_once(server, tmp_path):
    server.bytes_per_second[WEIGHTS] = len(CONTENT) / 1.0
    both = [process(server, tmp_path / "home") for _ in range(2)]
    paths = [p.communicate()[0].strip() for p in both]
    assert paths[0] == paths[1] and Path(paths[0]).read_bytes() == CONTENT
    assert server.sent[WEIGHTS] == len(CONTENT)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("into", ["cache", "directory"])
def test_other_content_than_published_is_not_kept(server, tmp_path, into):
    repository = hub.look_up(REPO)
    directory = tmp_path / "here" if into == "directory" else None
    server.corrupt.add(WEIGHTS)
    with pytest.raises(EnvironmentProblem) as e:
        hub.download(repository, WEIGHTS, directory)
    sha256 = repository.files[WEIGHTS].sha256
    assert sha256 in str(e.value) and "what is there has SHA-256" in str(e.value)
    assert not any(p.is_file() and p.stat().st_size > 1000 for p in tmp_path.rglob("*"))
    server.corrupt.clear()
    assert hub.download(repository, WEIGHTS, directory).read_bytes() == CONTENT


def test_a_damaged_rest_of_an_earlier_call_is_found(server, tmp_path):
    repository = hub.look_up(REPO)
    server.drop(WEIGHTS, after=len(CONTENT) // 2)
    server.drop(WEIGHTS, after=0, times=100)
    with pytest.raises(EnvironmentProblem):
        hub.download(repository, WEIGHTS, tmp_path)
    (part,) = tmp_path.glob("*.part")
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    server.faults.clear()
    with pytest.raises(EnvironmentProblem, match="what is there has SHA-256"):
        hub.download(repository, WEIGHTS, tmp_path)
    assert hub.download(repository, WEIGHTS, tmp_path).read_bytes() == CONTENT


def test_no_room(server, tmp_path, monkeypatch):
    repository = hub.look_up(REPO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        EnvironmentProblem, match=r"has 0\.00 GB free, model\.safetensors needs 0\.00 GB; make room"
    ):
        hub.download(repository, WEIGHTS, tmp_path)
    assert server.sent[WEIGHTS] == 0


def test_a_full_disk(server, tmp_path):
    repository = hub.look_up(REPO)
    (tmp_path / "here").mkdir()
    sha256 = repository.files[WEIGHTS].sha256
    (tmp_path / "here" / f"{WEIGHTS}.{sha256[:16]}.part").symlink_to("/dev/full")
    with pytest.raises(
        EnvironmentProblem, match=r"No space left on device; when that is put right, run the same"
    ):
        hub.download(repository, WEIGHTS, tmp_path / "here")


def test_a_directory_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"file.*: Not a directory; when that is put right"):
        hub.download(hub.look_up(REPO), WEIGHTS, tmp_path / "file" / "here")


# Without the Hub


@pytest.mark.parametrize("how", ["forbidden", "not answering", "answering 503"])
def test_what_is_cached_needs_no_hub(server, offline, how):
    online = hub.look_up(REPO)
    for name in online.files:
        hub.download(online, name)
    if how == "forbidden":
        offline()
    elif how == "not answering":
        server.stop()
    else:
        server.fail("info", 503, times=100)
    for revision in (None, "main", online.commit):
        repository = hub.look_up(REPO, revision)
        assert repository.cached
        assert (repository.commit, repository.files) == (online.commit, online.files)
        assert hub.download(repository, WEIGHTS).read_bytes() == CONTENT
        assert hub.read_head(repository, WEIGHTS) == CONTENT[: int.from_bytes(CONTENT[:8], "little") + 8]
    with pytest.raises(EnvironmentProblem):
        hub.look_up(REPO, "v1")


def test_looking_up_alone_does_not_outdate_the_cache(server, offline):
    online = hub.look_up(REPO)
    for name in online.files:
        hub.download(online, name)
    server.commit(REPO, SMALL)
    assert hub.look_up(REPO).commit != online.commit
    offline()
    assert hub.look_up(REPO).commit == online.commit


def test_a_file_that_is_not_cached(server, offline):
    hub.download(hub.look_up(REPO), "config.json")
    offline()
    repository = hub.look_up(REPO)
    with pytest.raises(EnvironmentProblem, match="'model.safetensors' is not in the Hub's local cache"):
        hub.download(repository, WEIGHTS)


def test_nothing_cached(server, offline):
    repository = hub.look_up(REPO)
    offline()
    with pytest.raises(
        EnvironmentProblem, match="is not in the Hub's local cache, and HF_HUB_OFFLINE forbids"
    ):
        hub.look_up(REPO)
    with pytest.raises(EnvironmentProblem, match="model.safetensors: is not in the Hub's local cache"):
        hub.download(repository, WEIGHTS)
    with pytest.raises(EnvironmentProblem, match="model.safetensors: is not in the Hub's local cache"):
        hub.read_head(repository, WEIGHTS)


def test_a_cached_file_of_another_size_is_downloaded_again(server):
    repository = hub.look_up(REPO)
    path = hub.download(repository, WEIGHTS)
    path.resolve().write_bytes(b"cut off")
    assert hub.cached(repository, WEIGHTS) is None
    assert hub.download(repository, WEIGHTS).read_bytes() == CONTENT


# What the Hub refuses, and how it fails


def test_no_such_repository_and_a_private_one_look_the_same(server, tmp_path):
    server.commit("someone/Private", SMALL)
    server.repositories["someone/Private"].access = "private"
    for repo in ("someone/Other", "someone/Private"):
        with pytest.raises(ConversionError) as e:
            hub.look_up(repo)
        assert str(e.value) == (
            f"{repo}: the Hub has no such repository, or it is private; check the name, or log in with `hf auth login`"
        )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert set(hub.look_up("someone/Private").files) == set(SMALL)
    with pytest.raises(ConversionError, match="has no such repository"):
        hub.look_up("someone/Other")


@pytest.mark.parametrize("token", [None, "hf_ofSomebodyElse"])
def test_a_gated_repository(server, tmp_path, token, monkeypatch):
    server.repositories[REPO].access = "gated"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    repository = hub.look_up(REPO)
    for call in (hub.read_head, hub.download):
        with pytest.raises(ConversionError) as e:
            call(repository, WEIGHTS)
        assert str(e.value) == (
            f"{REPO}: is gated; accept its terms on {server.url}/{REPO}, log in with `hf auth login`, "
            "and run the same command again"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.download(repository, WEIGHTS).read_bytes() == CONTENT
    assert hub.read_head(repository, WEIGHTS)


def test_the_token_stays_with_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repository = hub.look_up(REPO)
    hub.read_head(repository, WEIGHTS)
    hub.download(repository, WEIGHTS, tmp_path)
    assert {r.token for r in server.requests if r.kind != "storage"} == {TOKEN}
    assert {r.token for r in server.requests if r.kind == "storage"} == {None}


def test_no_such_revision(server):
    with pytest.raises(ConversionError) as e:
        hub.look_up(REPO, "v2")
    assert str(e.value) == f"{REPO}: has no revision 'v2'; expected a branch, a tag or a commit hash of it"


@pytest.mark.parametrize("repo", ["a/b/c", "a..b/c", "-/x"])
def test_what_is_no_repository_id(server, repo):
    with pytest.raises(ConversionError, match="is no repository id"):
        hub.look_up(repo)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("kind", ["info", "resolve", "storage"])
def test_a_hub_that_fails(server, kind, status, tmp_path):
    repository = hub.look_up(REPO)
    server.fail(kind, status, times=100)
    calls = {
        "info": [lambda: hub.look_up(REPO)],
        "resolve": [
            lambda: hub.read_head(repository, WEIGHTS),
            lambda: hub.download(repository, "config.json"),
        ],
        "storage": [
            lambda: hub.read_head(repository, WEIGHTS),
            lambda: hub.download(repository, WEIGHTS, tmp_path),
        ],
    }
    for call in calls[kind]:
        with pytest.raises(EnvironmentProblem) as e:
            call()
        assert f"the Hub answers {status} " in str(e.value)
        assert str(e.value).endswith("; run the same command again, it goes on where it was")
        assert "\n" not in str(e.value)


def test_a_hub_that_fails_once(server):
    repository = hub.look_up(REPO)
    server.fail("resolve", 503)
    assert hub.read_head(repository, WEIGHTS)
    server.fail("resolve", 503)
    assert hub.download(repository, WEIGHTS).read_bytes() == CONTENT


def test_a_refusal_of_storage(server, tmp_path):
    repository = hub.look_up(REPO)
    server.fail("storage", 403)
    with pytest.raises(
        ConversionError, match="the Hub refuses access .*; log in with `hf auth login` with a token"
    ):
        hub.download(repository, WEIGHTS, tmp_path)


def test_no_connection(server):
    server.stop()
    with pytest.raises(
        EnvironmentProblem, match=r"the Hub cannot be reached \(.*refused\); run the same command again"
    ):
        hub.look_up(REPO)


def test_something_that_is_no_hub(server, monkeypatch):
    server.commit(REPO, {})
    with pytest.raises(EnvironmentProblem, match="does not answer as the Hub does"):
        hub.look_up(REPO)


@pytest.mark.parametrize("into", ["cache", "directory"])
def test_plain_http_is_used_where_xet_is_offered(server, tmp_path, into):
    server.xet = True
    directory = tmp_path / "here" if into == "directory" else None
    assert hub.download(hub.look_up(REPO), WEIGHTS, directory).read_bytes() == CONTENT
    assert server.sent[WEIGHTS] == len(CONTENT)
