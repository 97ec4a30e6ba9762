"""What SRC means: a published or converted directory, ``nano``, a Hub repo id.

Whatever it is, :func:`open_weights` gives named arrays in our names and layouts. A published checkpoint is converted
while it is read, one tensor at a time; a converted one is mapped into memory as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import hub
from .converted import ConvertedWeights
from .errors import ConversionError
from .journal import JOURNAL
from .manifest import MANIFEST
from .published import INDEX, PublishedWeights, beside_the_weights
from .weights import Source, Weights

__all__ = ["Source", "Weights", "fetch", "open_source", "open_weights", "resolve"]

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
    return fetch(resolve(src, revision))


def fetch(source: Source) -> Weights:
    """As :func:`open_weights`, for a SRC that was found already: its directory then holds all its files."""
    weights = open_source(source)
    if isinstance(weights, PublishedWeights):
        weights.fetch()
    return weights


def open_source(source: Source) -> Weights:
    """As :func:`fetch`, but files of the Hub may be elsewhere still."""
    directory = source.directory
    if (directory / MANIFEST).is_file():
        return ConvertedWeights(source)
    if (directory / JOURNAL).is_file():
        raise ConversionError(f"{directory}: was not finished; run its conversion again")
    return PublishedWeights(source)


def resolve(src: str | Path, revision: str | None = None, only_headers: bool = False) -> Source:
    """Where SRC is; a directory wins over other meanings of its name.

    Of a Hub repository all small files are downloaded, or with `only_headers` just those that a plan is made from.

    Raises:
        ConversionError: there is no such thing.
        EnvironmentProblem: the Hub cannot be reached, and the local cache does not have it.
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
        return _from_hub(str(src), revision, only_headers)
    raise ConversionError(
        f"{src}: there is no such directory; expected a published or converted checkpoint, "
        "'nano', or a Hub repository as in " + DEFAULT_MODEL
    )


def _from_hub(repo: str, revision: str | None, only_headers: bool) -> Source:
    repository = hub.look_up(repo, revision)
    wanted = (
        {"config.json", INDEX} if only_headers else {INDEX, *filter(beside_the_weights, repository.files)}
    )
    if "config.json" not in repository.files:
        raise ConversionError(
            f"{repo}: has no config.json at {repository.revision}; expected a Kimi-VL checkpoint"
        )
    paths = [hub.download(repository, name) for name in sorted(wanted & set(repository.files))]
    return Source(paths[0].parent, repo, repository.commit, repository)
