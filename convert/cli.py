"""`convert-weights`: a published checkpoint to our weights, and back."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..modeling.configuration import ConfigError
from .converter import carry_out, open_for_conversion, open_for_reversal
from .errors import ConversionError, EnvironmentProblem
from .planning import DEFAULT_SHARD_BYTES, DTYPE_NAMES, Plan, plan_conversion, plan_reversal, size_text
from .source import DEFAULT_MODEL, resolve
from .weights import Weights

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 3, 130

EPILOG = """\b
Examples:
  convert-weights --src ./Kimi-VL-A3B-Instruct --dst ./ckpt
  convert-weights --src hf --model moonshotai/Kimi-VL-A3B-Thinking-2506 --dst ./ckpt
  convert-weights --src nano --dst ./ckpt --dtype fp32
  convert-weights --src ./Kimi-VL-A3B-Instruct --dry-run
  convert-weights --reverse --src ./ckpt --dst ./published

\b
Exit status:
  0  done
  2  wrong usage or input; nothing was written
  3  the environment: disk, network, a missing package
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


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--src",
    required=True,
    metavar="SRC",
    help="Published directory, Hub repo id, nano, or hf: the Hub's --model.",
)
@click.option("--dst", metavar="DIR", help="Where to write: a new or an empty directory.")
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
    help=f"Split the weights into files of at most this.  [default: {DEFAULT_SHARD_BYTES // 10**9}GB]",
)
@click.option("--reverse", is_flag=True, help="The way back: SRC is a converted directory.")
@click.option("--dry-run", is_flag=True, help="Read headers, show what would be written, and stop.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on stdout, all else on stderr.")
def cli(
    src: str,
    dst: str | None,
    model: str | None,
    revision: str | None,
    dtype: str | None,
    max_shard_size: int | None,
    reverse: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Converts a published Kimi-VL checkpoint for MindSpore, or back.

    The converted directory holds the weights in files that are safetensors and MindIR external data at once, the
    configuration and tokenizer files, and conversion.json with a hash of every tensor. With --reverse it becomes the
    published checkpoint again, bit for bit. Needs neither MindSpore nor Torch.
    """
    if dst is None and not dry_run:
        raise click.UsageError("Missing option '--dst'.")
    if reverse:
        for option, value in (("--dtype", dtype), ("--max-shard-size", max_shard_size)):
            if value is not None:
                raise click.UsageError(
                    f"{option} has no place with --reverse: the published form is restored as it was."
                )
    from_hub = src == "hf" and not Path(src).is_dir()
    if model is not None and not from_hub:
        raise click.UsageError(f"--model has no place with --src {src}; it belongs to --src hf.")
    repo = (model or DEFAULT_MODEL) if from_hub else src
    limit = max_shard_size or DEFAULT_SHARD_BYTES
    _show(
        {
            "src": repo + (f" at {revision}" if revision else ""),
            "dst": dst or "(none: dry run)",
            "direction": "ours to published" if reverse else "published to ours",
        }
        | ({} if reverse else {"dtype": dtype or "as published", "max shard size": size_text(limit)}),
        as_json,
    )
    with _errors():
        source = resolve(repo, revision, download=not dry_run)
        weights: Weights
        if reverse:
            weights = open_for_reversal(source)
            todo = plan_reversal(weights, dst)
        else:
            weights = open_for_conversion(source)
            todo = plan_conversion(weights, dst, dtype, limit)
        click.echo(str(todo), err=as_json)
        if not dry_run:
            _carry_out(todo, weights, as_json)
        elif dst is not None:
            there = next(p for p in (Path(dst), *Path(dst).absolute().parents) if p.is_dir())
            click.echo(f"free       {size_text(shutil.disk_usage(there).free)}", err=as_json)
        if as_json:
            click.echo(json.dumps(todo.to_dict(), indent=1))


def _carry_out(todo: Plan, weights: Weights, as_json: bool) -> None:
    from tqdm import tqdm

    start = time.monotonic()
    total = sum(tensor.nbytes for tensor in todo.tensors)
    # disable=None: no bar where nobody looks
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        carry_out(todo, weights, bar.update)
    click.echo(f"done       {todo.target}, {time.monotonic() - start:.1f} s", err=as_json)


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
    except OSError as e:
        _fail(f"{e.filename or 'disk'}: {e.strerror or e}", ENVIRONMENT)
    except KeyboardInterrupt:
        _fail("interrupted; what was written is removed again", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    click.echo(f"convert-weights: {message}", err=True)
    sys.exit(status)


def main() -> None:
    cli(prog_name="convert-weights")
