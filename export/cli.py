"""`export-mindir`: a converted directory to a bundle of static graphs that point into its weights."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..convert.errors import ConversionError, EnvironmentProblem
from ..convert.planning import DTYPE_NAMES, size_text
from ..modeling.configuration import ConfigError
from .errors import BundleError, ExportError
from .plan import DEFAULT_CONTEXT, DEFAULT_PREFILL_CHUNK, TARGETS, open_converted, plan_export

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 3, 130

EPILOG = """\b
Examples:
  export-mindir --src ./ckpt --dst ./mindir --seq 4096
  export-mindir --src ./ckpt --dst ./mindir --seq 512 --image-patches 256,1024
  export-mindir --src ./ckpt --dst ./mindir --seq 512 --taps
  export-mindir --src ./ckpt --seq 4096 --dry-run

\b
Exit status:
  0  done
  2  wrong usage or input; nothing was written
  3  the environment: disk, memory, a missing package
"""


class Numbers(click.ParamType):
    """Whole numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers; expected as in 1024,4096", param, ctx)


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--src", required=True, metavar="DIR", help="A directory that convert-weights made.")
@click.option("--dst", metavar="DIR", help="Where to write: a new or empty directory, or an older bundle.")
@click.option(
    "--seq",
    type=int,
    multiple=True,
    metavar="N",
    help=f"Tokens of the largest context; smaller ones come in steps of 2. May be repeated.  [default: {DEFAULT_CONTEXT}]",
)
@click.option(
    "--target",
    type=click.Choice(sorted(TARGETS)),
    default="cpu",
    help="Who runs the bundle. Only the CPU so far.  [default: cpu]",
)
@click.option("--batch", type=int, default=1, help="Rows of every text graph.  [default: 1]")
@click.option(
    "--prefill-chunk",
    type=int,
    default=DEFAULT_PREFILL_CHUNK,
    help=f"Tokens that one prefill graph takes.  [default: {DEFAULT_PREFILL_CHUNK}]",
)
@click.option(
    "--image-patches",
    type=Numbers(),
    default=(),
    help="Patches of the vision graphs, as in 1024,4096.  [default: up to the processor's largest picture]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NAMES)),
    help="The model's dtype, which is what the weights are stored in, or fp32.  [default: as stored]",
)
@click.option(
    "--taps", is_flag=True, help="Also write graphs that give every layer's output, for verify-parity."
)
@click.option("--dry-run", is_flag=True, help="Read headers, show what would be written, and stop.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on stdout, all else on stderr.")
def cli(
    src: str,
    dst: str | None,
    seq: tuple[int, ...],
    target: str,
    batch: int,
    prefill_chunk: int,
    image_patches: tuple[int, ...],
    dtype: str | None,
    taps: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Exports a converted checkpoint as MindIR: vision, prefill and decode graphs with static shapes.

    The bundle holds the graphs, hard links to the weights, the configuration and tokenizer files, and bundle.json with
    a hash of everything. Weights are not read. It is loaded with kimi_vl.MindIRModel.from_bundle(DIR).
    """
    if dst is None and not dry_run:
        raise click.UsageError("Missing option '--dst'.")
    for name, value in {
        "src": src,
        "dst": dst or "(none: dry run)",
        "target": target,
        "seq": ", ".join(map(str, seq)) or f"{DEFAULT_CONTEXT}, or what the model has positions for",
        "batch": batch,
        "prefill chunk": prefill_chunk,
        "image patches": ", ".join(map(str, image_patches)) or "up to the processor's largest picture",
        "dtype": dtype or "as stored",
        "taps": "yes" if taps else "no",
    }.items():
        click.echo(f"{name:>14}: {value}", err=as_json)
    with _errors():
        todo = plan_export(open_converted(src), seq, target, batch, prefill_chunk, image_patches, dtype, taps)
        click.echo(str(todo), err=as_json)
        if not dry_run and dst is not None:
            _write(todo, dst, as_json)
        if as_json:
            click.echo(json.dumps(todo.to_dict(), indent=1))


def _write(todo: Any, dst: str, as_json: bool) -> None:
    from tqdm import tqdm

    from .writing import check_target, export

    if check_target(dst):
        click.echo(f"replace    the bundle in {dst}", err=as_json)
    start = time.monotonic()
    # disable=None: no bar where nobody looks
    with tqdm(total=len(todo.graphs), unit="graph", disable=None, file=sys.stderr) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update(1)

        written = export(todo, dst, progress)
    for name in written.copied:
        click.echo(
            f"copied     {name}: {dst} is on another file system, so it could not be linked", err=as_json
        )
    seconds = time.monotonic() - start
    click.echo(
        f"done       {dst}, {size_text(written.nbytes)} added to the disk, {seconds:.1f} s", err=as_json
    )


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what is wrong with the input or the machine into one line and an exit status."""
    try:
        yield
    except (ExportError, BundleError, ConversionError, ConfigError) as e:
        _fail(str(e), BAD_INPUT)
    except (EnvironmentProblem, MemoryError) as e:
        _fail(str(e) or "out of memory", ENVIRONMENT)
    except ModuleNotFoundError as e:
        _fail(f"the package {e.name} is missing; install kimi-vl's requirements", ENVIRONMENT)
    except OSError as e:
        _fail(f"{e.filename or 'disk'}: {e.strerror or e}", ENVIRONMENT)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    click.echo(f"export-mindir: {message}", err=True)
    sys.exit(status)


def main() -> None:
    cli(prog_name="export-mindir")
