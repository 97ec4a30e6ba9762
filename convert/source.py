"""What SRC means: a published or converted directory, ``nano``, a Hub repo id.

Whatever it is, :func:`open_weights` gives named arrays in our names and layouts. A published checkpoint is converted
while it is read, one tensor at a time; a converted one is mapped into memory as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from .converted import ConvertedWeights
from .errors import ConversionError, EnvironmentProblem
from .journal import JOURNAL
from .manifest import MANIFEST
from .published import INDEX, OTHER_NAMES, OTHER_SUFFIXES, PublishedWeights
from .weights import Source, Weights

__all__ = ["Source", "Weights", "open_source", "open_weights", "resolve"]

DEFAULT_MODEL = "moonshotai/Kimi-VL-A3B-Instruct"


def open_weights(src: str | Path, revision: str | None = None) -> Weights:
    """The weights of SRC, checked against its configuration; only headers are read yet.

    Args:
        src: a directory, ``nano``, or a Hub repo id (downloaded unless it is in the local cache).
        revision: a commit, branch or tag of the repository.

    Raises:
        ConversionError: SRC is no checkpoint, or its files and its configuration contradict each other.
        ConfigError: its ``config.json`` is missing, or not Kimi-VL's.
        EnvironmentProblem: it cannot be downloaded.
    """
    return open_source(resolve(src, revision))


def open_source(source: Source) -> Weights:
    """As :func:`open_weights`, for a SRC that was found already."""
    directory = source.directory
    if (directory / MANIFEST).is_file():
        return ConvertedWeights(source)
    if (directory / JOURNAL).is_file():
        raise ConversionError(f"{directory}: was not finished; run its conversion again")
    return PublishedWeights(source)


def resolve(src: str | Path, revision: str | None = None, download: bool = True) -> Source:
    """Where SRC is; a directory wins over other meanings of its name.

    Args:
        download: whether what is not in the Hub's local cache is fetched.

    Raises:
        ConversionError: there is no such thing.
        EnvironmentProblem: it cannot be downloaded, or `download` is false and it is not in the cache.
    """
    path = Path(src)
    on_hub = isinstance(src, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", src) and not path.exists()
    if revision is not None and not on_hub:
        raise ConversionError(f"{src}: is no Hub repository, so there is no revision {revision!r} of it")
    if path.is_dir():
        return Source(path, path.resolve().name)
    if path.exists():
        raise ConversionError(f"{src}: is a file, expected the directory of a checkpoint")
    if str(src) == "nano":
        from .. import nano_path

        return Source(Path(nano_path()), "nano")
    if on_hub:
        return _hub(str(src), revision, download)
    raise ConversionError(
        f"{src}: there is no such directory; expected a published or converted checkpoint, "
        "'nano', or a Hub repository as in " + DEFAULT_MODEL
    )


def _hub(repo: str, revision: str | None, download: bool) -> Source:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError:
        raise EnvironmentProblem(
            f"{repo}: is no directory, and to take it from the Hub the package huggingface_hub is needed"
        ) from None
    wanted = ["*.safetensors", INDEX, *(f"*{s}" for s in OTHER_SUFFIXES), *(f"{n}*" for n in OTHER_NAMES)]
    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, local_files_only=not download
        )
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as e:
        raise ConversionError(
            f"{repo}: is neither a directory nor a repository of the Hub at revision {revision or 'main'} "
            f"({_first_line(e)})"
        ) from None
    except Exception as e:  # of the client's HTTP library, which differs between versions
        if download:
            why = f"cannot be downloaded from the Hub ({_first_line(e)})"
        else:
            why = "is not in the Hub's local cache; run without --dry-run to download it"
        raise EnvironmentProblem(f"{repo}: there is no such directory, and it {why}") from None
    directory = Path(path)  # …/snapshots/COMMIT
    return Source(directory, repo, directory.name)


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
