"""`convert-weights`: a published checkpoint to our weights, and back."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..modeling.configuration import ConfigError
from .checking import check
from .converter import (
    ROOM,
    WORKERS,
    available_memory,
    carry_out,
    existing_directory,
    open_for_conversion,
    open_for_reversal,
)
from .errors import ConversionError, EnvironmentProblem
from .formats import DEFAULT_FORMAT, FORMATS
from .manifest import LossRecord
from .planning import DTYPE_NAMES, Plan, plan_conversion, plan_reversal, size_text
from .source import DEFAULT_MODEL, resolve
from .weights import Weights

GIVEN = click.core.ParameterSource.COMMANDLINE
BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 3, 130

EPILOG = """\b
Examples:
  convert-weights --src ./Kimi-VL-A3B-Instruct --dst ./ckpt
  convert-weights --src hf --model moonshotai/Kimi-VL-A3B-Thinking-2506 --dst ./ckpt
  convert-weights --src nano --dst ./ckpt --dtype fp32
  convert-weights --src ./Kimi-VL-A3B-Instruct --dry-run
  convert-weights --reverse --src ./ckpt --dst ./published
  convert-weights check ./ckpt

\b
Exit status:
  0  done
  2  wrong usage or input; nothing is left of what was written
  3  the environment: disk, memory, network, a missing package; the same command goes on where it was
"""


class Size(click.ParamType):
    """Bytes: 5000000, 500MB, 5GB, 4GiB."""

    name = "size"
    UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
        size = float(match[1]) * self.UNITS.get(match[2], 0) if match else 0
        if size < 1:
            self.fail(f"{value!r} is no size; expected as in 5GB, 500MB, 4GiB", param, ctx)
        return int(size)


@click.group(
    invoke_without_command=True,
    subcommand_metavar="[check DIR]",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.pass_context
@click.option(
    "--src",
    metavar="SRC",
    help="Published directory, Hub repo id, nano, or hf: the Hub's --model.",
)
@click.option("--dst", metavar="DIR", help="Where to write: a new or empty directory, or an unfinished one.")
@click.option(
    "--model", metavar="REPO", help=f"The repository that --src hf means.  [default: {DEFAULT_MODEL}]"
)
@click.option("--revision", metavar="REV", help="Commit, branch or tag of a Hub repository.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NAMES)),
    help="Store weights in this; the router stays fp32.  [default: as published]",
)
@click.option(
    "--max-shard-size",
    type=Size(),
    help="Split the weights into files of at most this.  [default: 5GB, of ckpt 1GB]",
)
@click.option(
    "--format",
    type=click.Choice(list(FORMATS)),
    help=f"safetensors is what export-mindir takes; ckpt is MindSpore's own.  [default: {DEFAULT_FORMAT}]",
)
@click.option(
    "--allow-overflow",
    is_flag=True,
    help="Make values too large for --dtype its largest one, instead of refusing them.",
)
@click.option(
    "--discard-source",
    is_flag=True,
    help="Keep a shard of the Hub only until it is converted; what its cache held before stays.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=WORKERS, show_default=True, help="Threads that work."
)
@click.option(
    "--resume/--no-resume",
    default=True,
    help="Go on with what an earlier run left unfinished in --dst, or start over.  [default: resume]",
)
@click.option("--reverse", is_flag=True, help="The way back: SRC is a converted directory.")
@click.option("--dry-run", is_flag=True, help="Read headers, show what would be written, and stop.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Lines of JSON on stdout (plan, progress, done), all else on stderr.",
)
def cli(
    context: click.Context,
    src: str | None,
    dst: str | None,
    model: str | None,
    revision: str | None,
    dtype: str | None,
    max_shard_size: int | None,
    format: str | None,
    allow_overflow: bool,
    discard_source: bool,
    workers: int,
    resume: bool,
    reverse: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Converts a published Kimi-VL checkpoint for MindSpore, or back.

    The converted directory holds the weights in files that are safetensors and MindIR external data at once, the
    configuration and tokenizer files, and conversion.json with a hash of every tensor. With --reverse it becomes the
    published checkpoint again, bit for bit. Needs neither MindSpore nor Torch.
    """
    if context.invoked_subcommand:
        given = [
            p.opts[0] for p in context.command.params if context.get_parameter_source(p.name or "") == GIVEN
        ]
        if given:
            raise click.UsageError(f"{given[0]} has no place before {context.invoked_subcommand}.")
        return
    if src is None:
        raise click.UsageError("Missing option '--src'.")
    if dst is None and not dry_run:
        raise click.UsageError("Missing option '--dst'.")
    if reverse:
        for option, value in (
            ("--dtype", dtype),
            ("--max-shard-size", max_shard_size),
            ("--format", format),
            ("--allow-overflow", allow_overflow),
            ("--discard-source", discard_source),
        ):
            if value:
                raise click.UsageError(
                    f"{option} has no place with --reverse: the published form is restored as it was."
                )
    from_hub = src == "hf" and not Path(src).is_dir()
    if model is not None and not from_hub:
        raise click.UsageError(f"--model has no place with --src {src}; it belongs to --src hf.")
    repo = (model or DEFAULT_MODEL) if from_hub else src
    format = format or DEFAULT_FORMAT
    limit = max_shard_size or FORMATS[format].shard_bytes
    _show(
        {
            "src": repo + (f" at {revision}" if revision else ""),
            "dst": dst or "(none: dry run)",
            "direction": "ours to published" if reverse else "published to ours",
        }
        | (
            {}
            if reverse
            else {"dtype": dtype or "as published", "format": format, "max shard size": size_text(limit)}
        ),
        as_json,
    )
    with _errors():
        source = resolve(repo, revision, only_headers=dry_run)
        weights: Weights
        if reverse:
            weights = open_for_reversal(source)
            todo = plan_reversal(weights, dst)
        else:
            weights = open_for_conversion(source)
            todo = plan_conversion(weights, dst, dtype, limit, format)
        report = _Report(todo, as_json)
        report.needs(workers)
        if not dry_run:
            with report:
                report.losses = carry_out(
                    todo,
                    weights,
                    allow_overflow=allow_overflow,
                    discard_source=discard_source,
                    workers=workers,
                    resume=resume,
                    progress=report.progress,
                    came=report.came,
                )


@cli.command("check")
@click.argument("directory", metavar="DIR")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=WORKERS, show_default=True, help="Threads that read."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr.")
def check_command(directory: str, workers: int, as_json: bool) -> None:
    """Reads a converted directory against its manifest, and names every file and tensor that is damaged.

    Exit status 0: all is as it was written; 2: something is damaged.
    """
    from tqdm import tqdm

    with _errors():
        # disable=None: no bar where nobody looks
        with tqdm(unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
            damaged = check(directory, workers, bar.update)
        for sentence in damaged:
            click.echo(f"damaged    {sentence}", err=as_json)
        if as_json:
            click.echo(json.dumps({"directory": directory, "damaged": damaged}))
        if damaged:
            raise ConversionError(f"{directory}: {len(damaged)} damaged; convert the checkpoint again")
        click.echo(f"done       {directory} is as it was written", err=as_json)


class _Report:
    """What people see (the plan, a bar, the end), or lines of JSON for machines: plan, progress, done."""

    def __init__(self, todo: Plan, as_json: bool):
        from tqdm import tqdm

        self._todo = todo
        self._as_json = as_json
        self._total = sum(tensor.nbytes for tensor in todo.tensors)
        self._done = self._downloaded = 0
        self.losses: dict[str, LossRecord] = {}
        self._start = self._told = time.monotonic()
        # disable=None: no bar where nobody looks
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, disable=None, file=sys.stderr)
        click.echo(str(todo), err=as_json)

    def needs(self, workers: int) -> None:
        """Disk and memory that the work takes, against what is there."""
        todo, memory, available = self._todo, self._todo.memory(workers), available_memory()
        disk = todo.nbytes * ROOM
        free = None if todo.target is None else shutil.disk_usage(existing_directory(Path(todo.target))).free
        self._line("disk", disk, free, "free")
        self._line("memory", memory, available, "available")
        if self._as_json:
            self._event(
                "plan", **todo.to_dict(), disk=disk, free=free, memory=memory, memory_available=available
            )

    def progress(self, nbytes: int) -> None:
        self._done += nbytes
        self._bar.update(nbytes)
        now = time.monotonic()
        if self._as_json and now - self._told >= 1:
            self._told = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate if rate else None
            self._event(
                "progress",
                done=self._done,
                total=self._total,
                rate=rate,
                seconds_left=left,
                downloaded=self._downloaded,
            )

    def came(self, nbytes: int) -> None:
        """Bytes of a download."""
        self._downloaded += nbytes
        self._bar.set_postfix_str(f"{size_text(self._downloaded)} downloaded", refresh=False)
        self.progress(0)

    def __enter__(self) -> _Report:
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._bar.close()
        if kind:
            return
        seconds = time.monotonic() - self._start
        for name, loss in self.losses.items():
            what = [f"{loss.overflowed} values became its largest one"] if loss.overflowed else []
            what += [f"{loss.underflowed} values became 0"] if loss.underflowed else []
            click.echo(f"{self._todo.dtype:<10} {name}: {', '.join(what)}", err=self._as_json)
        click.echo(f"done       {self._todo.target}, {seconds:.1f} s", err=self._as_json)
        if self._as_json:
            losses = {name: asdict(loss) for name, loss in self.losses.items()}
            self._event("done", target=self._todo.target, seconds=seconds, losses=losses)

    def _line(self, what: str, needed: float, there: float | None, word: str) -> None:
        known = "" if there is None else f", {size_text(there)} {word}"
        click.echo(f"{what:<10} {size_text(needed)} needed{known}", err=self._as_json)

    def _event(self, event: str, **fields: Any) -> None:
        click.echo(json.dumps({"event": event, **fields}))


def _show(arguments: dict[str, str], as_json: bool) -> None:
    for name, value in arguments.items():
        click.echo(f"{name:>14}: {value}", err=as_json)


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what is wrong with the input or the machine into one line and an exit status."""
    try:
        yield
    except (ConversionError, ConfigError) as e:
        _fail(str(e), BAD_INPUT)
    except (EnvironmentProblem, MemoryError) as e:
        _fail(str(e) or "out of memory", ENVIRONMENT)
    except BrokenPipeError:  # nobody reads on: click ends quietly
        raise
    except OSError as e:
        _fail(
            f"{e.filename or 'disk'}: {e.strerror or e}; run the same command again to go on where it was",
            ENVIRONMENT,
        )
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on where it was", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    click.echo(f"convert-weights: {message}", err=True)
    sys.exit(status)


def main() -> None:
    cli(prog_name="convert-weights")
