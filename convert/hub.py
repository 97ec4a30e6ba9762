"""A checkpoint on the Hugging Face Hub: what a revision holds, a shard's header, whole files.

Built on huggingface_hub, its cache and its log-in. Two things are added. Every file is checked against what the Hub
publishes, size and SHA-256. And a weights file that was interrupted goes on where it was, also in another process:
the library itself starts such a file from its first byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..modeling.configuration import short
from .errors import ConversionError, EnvironmentProblem
from .manifest import plain_name
from .safetensors_file import head_bytes
from .storage import Progress

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
FIRST_BYTES = 256 << 10  # of a shard; the published shards' headers have 0.1 MB each
AGAIN = "run the same command again, it goes on where it was"


@dataclass(frozen=True)
class HubFile:
    """A file at the top of a repository; `sha256` is None where the Hub publishes none (small files, kept in git)."""

    name: str
    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubRepository:
    """A repository at one commit.

    Attributes:
        revision: what was asked for: a branch, a tag or a commit hash.
        commit: the hash that it meant; everything is read at this.
        files: those at the top of the repository.
        cached: the Hub could not be reached, and `files` are those that its local cache holds.
    """

    repo: str
    revision: str
    commit: str
    files: Mapping[str, HubFile]
    cached: bool = False

    def file(self, name: str) -> HubFile:
        """One of `files`.

        Raises:
            ConversionError: there is no such file at the commit.
            EnvironmentProblem: it is not in the cache, and the Hub cannot be asked.
        """
        if name in self.files:
            return self.files[name]
        if self.cached:
            raise EnvironmentProblem(
                f"{self.repo}: {short(name)} is not in the Hub's local cache, and the Hub cannot be reached; "
                "run the same command again when it can"
            )
        raise ConversionError(
            f"{self.repo}: has no file {short(name)} at {self.revision}; is it another repository that is meant?"
        )


def look_up(repo: str, revision: str | None = None) -> HubRepository:
    """What a revision of a repository holds; from the local cache if the Hub cannot be reached.

    Args:
        repo: as in ``moonshotai/Kimi-VL-A3B-Instruct``.
        revision: a branch, a tag or a commit hash; None is the main branch.

    Raises:
        ConversionError: there is no such repository or revision, or the Hub refuses access to it.
        EnvironmentProblem: the Hub cannot be reached, and the cache does not know the revision.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        raise EnvironmentProblem(f"{repo}: the package huggingface_hub is needed to read the Hub") from None
    asked = revision or constants.DEFAULT_REVISION
    try:
        with _problems(repo, asked):
            return _ask(repo, asked, revision)
    except EnvironmentProblem:
        repository = _cached_snapshot(repo, asked)
        if repository is None:
            raise
        return repository


def _ask(repo: str, asked: str, revision: str | None) -> HubRepository:
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    files = {}
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        for sibling in info.siblings or []:
            name, lfs = sibling.rfilename, sibling.lfs
            nbytes = lfs.size if lfs else sibling.size
            if plain_name(name) and nbytes is not None:
                files[name] = HubFile(name, nbytes, lfs.sha256 if lfs else None)
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    if not files or not info.sha or not COMMIT.fullmatch(info.sha):
        raise EnvironmentProblem(
            f"{repo}: {constants.ENDPOINT} does not answer as the Hub does, with a commit and the sizes of files; "
            "check HF_ENDPOINT, and whether the network asks for a log-in"
        )
    return HubRepository(repo, asked, info.sha, files)


def cached(repository: HubRepository, name: str) -> Path | None:
    """The file in the Hub's local cache, if it is there at this commit and has its size."""
    from huggingface_hub import try_to_load_from_cache

    file = repository.file(name)
    found = try_to_load_from_cache(repository.repo, name, revision=repository.commit)
    return Path(found) if isinstance(found, str) and os.path.getsize(found) == file.nbytes else None


def read_head(repository: HubRepository, name: str) -> bytes:
    """Length field and header of a safetensors file, 8 + n bytes, without downloading the file.

    Raises:
        ConversionError: there is no such file, it is no safetensors file, or the Hub refuses access to it.
        EnvironmentProblem: the Hub cannot be reached.
    """
    file = repository.file(name)
    local = cached(repository, name)

    def first(n: int) -> bytes:
        if local is None:
            return _first_bytes(repository, name, n)
        with open(local, "rb") as f:
            return f.read(n)

    head = first(min(FIRST_BYTES, file.nbytes))
    n = head_bytes(head[:8], file.nbytes, name)
    return head[:n] if n <= len(head) else first(n)


def download(
    repository: HubRepository, name: str, directory: Path | None = None, progress: Progress | None = None
) -> Path:
    """A file on the disk, whole and as published.

    A weights file that an earlier call left unfinished goes on where it was. It comes over plain HTTP, also where the
    Hub offers Xet, because that starts an interrupted file again.

    Args:
        directory: where to put a file that is not kept; an unfinished one is ``NAME….part`` there. None is the Hub's cache. A directory is not filled from it: ask :func:`cached` first.
        progress: called with the number of bytes that came since its last call, for a weights file;
            what it raises ends the download, which the next call goes on with.

    Raises:
        ConversionError: there is no such file, or the Hub refuses access to it.
        EnvironmentProblem: the Hub cannot be reached, what came is not what it publishes, or the disk is full or fails.
    """
    file = repository.file(name)
    if directory is None:
        found = cached(repository, name)
        if found is not None:
            _remember(repository)
            return found
    elif _holds(directory / name, file):
        return directory / name
    with _problems(repository.repo, repository.revision, name):
        return _download(repository, file, directory, progress)


def _download(
    repository: HubRepository, file: HubFile, directory: Path | None, progress: Progress | None
) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(repository.repo, file.name, revision=repository.commit)
    get_hf_file_metadata(url, retry_on_errors=True)  # is tried again where a download is not
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / file.name
        _fetch(url, file, path, directory / f"{file.name}.{(file.sha256 or '')[:16]}.part", progress)
        return path
    if file.sha256 is not None:
        # The library finds the content there, and only gives it its name in the snapshot.
        blob = _cache_folder(repository.repo) / "blobs" / file.sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, file, blob, blob.with_suffix(".incomplete"), progress)
    path = Path(hf_hub_download(repository.repo, file.name, revision=repository.commit))
    if file.sha256 is None:
        check_cached(path, file)
    _remember(repository)
    return path


def _remember(repository: HubRepository) -> None:
    """Writes down in the cache which commit a branch or tag meant: a later look-up without the Hub goes by it.

    Not when it is looked up: a cache that held the branch's last commit would then hold nothing of the new one.
    """
    ref = _cache_folder(repository.repo) / "refs" / repository.revision
    if repository.revision != repository.commit and not repository.cached:
        with suppress(OSError):  # as in a cache that is shared and read-only
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repository.commit)


class _Counted:
    """A file that tells how much is written to it."""

    def __init__(self, file: BinaryIO, progress: Progress):
        self._file = file
        self._progress = progress

    def write(self, data: bytes) -> int:
        self._progress(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _fetch(url: str, file: HubFile, final: Path, part: Path, progress: Progress | None) -> None:
    """Downloads to `part`, on from where it ends, and gives it its final name when it is whole and right."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with _exclusive(part) as f:
        counted: Any = _Counted(f, progress) if progress else f
        if _holds(final, file):  # another process was faster
            part.unlink()
            return
        have = f.seek(0, os.SEEK_END)
        if file.sha256 is None or have > file.nbytes:  # then nothing vouches for what is there
            have = f.truncate(0)
        _need_room(part.parent, file, file.nbytes - have)
        while True:
            try:
                http_get(
                    url,
                    counted,
                    resume_size=have,
                    headers=build_hf_headers(),
                    expected_size=file.nbytes,
                    displayed_filename=file.name,
                )
                break
            except HTTPError as e:
                came = f.seek(0, os.SEEK_END)
                if isinstance(e, HfHubHTTPError) or came <= have:
                    raise
                have = came  # as long as something comes, go on
        f.flush()
        try:
            _check(part, file)
        except EnvironmentProblem:
            part.unlink()
            raise
        os.fsync(f.fileno())
        os.replace(part, final)


@contextmanager
def _exclusive(part: Path) -> Iterator[BinaryIO]:
    """A file opened to append to, by one process at a time."""
    while True:
        with open(part, "ab") as f:
            with suppress(OSError):  # of a file system without locks; there the SHA-256 finds two writers
                fcntl.flock(f, fcntl.LOCK_EX)
            # Whoever held it before may have given it its final name, or removed it.
            if part.exists() and os.path.samestat(os.fstat(f.fileno()), part.stat()):
                yield f
                return


def _need_room(directory: Path, file: HubFile, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise EnvironmentProblem(
            f"{directory}: has {free / 1e9:.2f} GB free, {file.name} needs {nbytes / 1e9:.2f} GB; make room and {AGAIN}"
        )


def _holds(path: Path, file: HubFile) -> bool:
    """Whether a file is there, and is certainly the published one."""
    if file.sha256 is None or not path.is_file():
        return False
    try:
        _check(path, file)
    except EnvironmentProblem:
        return False
    return True


def check_cached(path: Path, file: HubFile) -> None:
    """Reads a file, of the Hub's cache or downloaded by its library, if its SHA-256 is published.

    Raises:
        EnvironmentProblem: it is not what the Hub publishes; it was removed.
    """
    try:
        _check(path, file)
    except EnvironmentProblem:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise


def _check(path: Path, file: HubFile) -> None:
    """Raises EnvironmentProblem: it is not what the Hub publishes."""
    nbytes = path.stat().st_size
    has, wanted = f"{nbytes} bytes", f"{file.nbytes}"
    if nbytes == file.nbytes:
        if file.sha256 is None:
            return
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() == file.sha256:
            return
        has, wanted = f"SHA-256 {digest.hexdigest()}", file.sha256
    raise EnvironmentProblem(
        f"{file.name}: what is there has {has}, the Hub publishes {wanted}; it was removed, so run the same command "
        "again, and without a mirror or proxy if that ends here too"
    )


def _first_bytes(repository: HubRepository, name: str, n: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if not n:
        return b""
    got = bytearray()
    with (
        _problems(repository.repo, repository.revision, name),
        http_stream_backoff(
            "GET",
            hf_hub_url(repository.repo, name, revision=repository.commit),
            headers=build_hf_headers() | {"Range": f"bytes=0-{n - 1}", "Accept-Encoding": "identity"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
        ) as response,
    ):
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            got += chunk
            if len(got) >= n:  # a server may ignore the range and send everything
                return bytes(got[:n])
    raise EnvironmentProblem(f"{name}: the Hub sent {len(got)} of its first {n} bytes; {AGAIN}")


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _cached_snapshot(repo: str, revision: str) -> HubRepository | None:
    folder, commit = _cache_folder(repo), revision
    if not COMMIT.fullmatch(revision):
        ref = folder / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {}
    for path in sorted(snapshot.iterdir()):
        if path.is_file():
            content = path.resolve().name  # of a weights file its SHA-256
            sha256 = content if SHA256.fullmatch(content) else None
            files[path.name] = HubFile(path.name, path.stat().st_size, sha256)
    return HubRepository(repo, revision, commit, files, cached=True)


@contextmanager
def _problems(repo: str, revision: str, name: str | None = None) -> Iterator[None]:
    """What huggingface_hub raises, as one sentence that says what to do."""
    from huggingface_hub import constants, errors

    it = f"{repo}: {name}" if name else repo
    log_in = "log in with `hf auth login`"
    try:
        yield
    except (ConversionError, EnvironmentProblem):
        raise
    except errors.HFValidationError:
        raise ConversionError(
            f"{repo}: is no repository id; expected one as in moonshotai/Kimi-VL-A3B-Instruct"
        ) from None
    except errors.GatedRepoError:
        raise ConversionError(
            f"{repo}: is gated; accept its terms on {constants.ENDPOINT}/{repo}, {log_in}, and run the same command again"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConversionError(
            f"{repo}: has no revision {revision!r}; expected a branch, a tag or a commit hash of it"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise ConversionError(f"{it}: is not there at {revision}; look up what is") from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 404) or isinstance(e, errors.RepositoryNotFoundError):
            raise ConversionError(
                f"{repo}: the Hub has no such repository, or it is private; check the name, or {log_in}"
            ) from None
        if status == 403:
            raise ConversionError(
                f"{it}: the Hub refuses access ({_first_line(e)}); {log_in} with a token that may read it"
            ) from None
        raise EnvironmentProblem(
            f"{it}: the Hub answers {status} {e.response.reason_phrase}; {AGAIN}"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise EnvironmentProblem(
            f"{it}: is not in the Hub's local cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it"
        ) from None
    except errors.HTTPError as e:
        raise EnvironmentProblem(f"{it}: the Hub cannot be reached ({_first_line(e)}); {AGAIN}") from None
    except OSError as e:
        if e.errno is None:  # the library's own, about what came
            raise EnvironmentProblem(f"{it}: cannot be downloaded ({_first_line(e)}); {AGAIN}") from None
        raise EnvironmentProblem(
            f"{e.filename or it}: {e.strerror}; when that is put right, {AGAIN}"
        ) from None


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
