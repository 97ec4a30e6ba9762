"""`export-mindir`: a converted checkpoint to a bundle of static MindIR graphs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..convert.errors import ConversionError, EnvironmentProblem
from ..convert.planning import DTYPE_NAMES, size_text
from ..modeling.buckets import OPERATORS_PREFILL_CHUNKS, PREFILL_CHUNKS
from ..modeling.configuration import ConfigError
from .errors import ExportError
from .memory import DeviceMemory, estimate, of_graphs
from .operators import PRODUCTS
from .plan import (
    CACHE_WRITES,
    DECODE,
    DEFAULT_CONTEXT,
    DEFAULT_TARGET,
    TARGETS,
    VARIANTS,
    BundlePlan,
    open_converted,
    plan_export,
)
from .writing import check_target, export

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 3, 130

EPILOG = """\b
Examples:
  export-mindir --seq 4096                          (for Ascend, bf16)
  export-mindir --src ./ckpt --seq 512 --target cpu --dst ./mindir
  export-mindir --seq 4096 --seq 32768 --prefill-chunk 512 --dry-run
  export-mindir --seq 4096 --prefill-chunk 64,256,1024
  export-mindir --seq 2048 --image-patches 1024,4096 --batch 4
  export-mindir --seq 4096 --dst /media/disk/mindir --copy
  export-mindir --seq 4096 --target lite --cache-write scatter-nd
  export-mindir --seq 512 --taps --target cpu       (for verify-parity, layer by layer)

\b
Exit status:
  0  done
  2  wrong usage or input; nothing was written
  3  the environment: disk, a missing package
"""


class Sizes(click.ParamType):
    """Positive numbers with commas between them."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(n) for n in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; expected as in 1024,4096", param, ctx)


class Products(click.ParamType):
    """Keys of `PRODUCTS` with commas between them."""

    name = "products"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        named = tuple(name.strip().lower() for name in value.split(","))
        for name in named:
            if name not in PRODUCTS:
                self.fail(f"{name!r} is no product; choose of {', '.join(PRODUCTS)}", param, ctx)
        return named


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--src", default="./ckpt", show_default=True, metavar="DIR", help="What convert-weights wrote.")
@click.option(
    "--dst", default="./mindir", show_default=True, metavar="DIR", help="New, empty, or an older bundle."
)
@click.option(
    "--seq",
    type=int,
    multiple=True,
    metavar="N",
    help=f"Tokens of the largest context; repeatable. Smaller ones are added in steps of 2.  "
    f"[default: {DEFAULT_CONTEXT}, or what the model has]",
)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default=DEFAULT_TARGET,
    show_default=True,
    help="Who runs it. cpu: the C++ operators where they are built, which the machine that runs it needs too; with "
    "KIMI_VL_KERNELS=off MindSpore's own in fp32, for any machine. ascend: fused operators in the weights' bf16 or fp16, "
    "for Atlas A2 and A3. lite: the same for MindSpore Lite, of operators that the graph engine takes. Neither has run on a "
    "device yet.",
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Rows of a text graph.")
@click.option(
    "--prefill-chunk",
    type=Sizes(),
    metavar="N,N,…",
    help="Tokens of a prompt that run at once. With several sizes a short prompt takes a small graph, a long one large ones; "
    "each size is a graph per context more.  "
    f"[default: {', '.join(map(str, OPERATORS_PREFILL_CHUNKS))} for cpu with the C++ operators, "
    f"else {', '.join(map(str, PREFILL_CHUNKS))}; as far as the context holds them]",
)
@click.option(
    "--image-patches",
    type=Sizes(),
    default=(),
    metavar="N,N,…",
    help="Patches of the vision graphs.  [default: up to the processor's largest picture, as far as the "
    "context holds it and a question]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NAMES)),
    help="What the model's weights are rounded to.  [default: as they are stored]",
)
@click.option(
    "--attention",
    type=click.Choice(VARIANTS),
    help="For a device: fused operators for prefill and vision attention, or plain ones, to find out which is wrong.  "
    "[default: fused]",
)
@click.option(
    "--experts", type=click.Choice(VARIANTS), help="For a device: the same for the experts.  [default: fused]"
)
@click.option(
    "--cache-write",
    type=click.Choice(CACHE_WRITES),
    help="For a device: which operator writes into the cache, for one that lacks the default's.  "
    f"[default: {CACHE_WRITES[0]}]",
)
@click.option(
    "--product",
    type=Products(),
    multiple=True,
    metavar="P,P,…",
    help="For ascend: products of Atlas on which every operator of every graph must be documented, of a2, a3 and 310p.  "
    "[default: a2,a3]",
)
@click.option(
    "--taps", is_flag=True, help="Also graphs that give every layer's output and the experts chosen."
)
@click.option(
    "--copy",
    is_flag=True,
    help="Copy the weights, so that the bundle shares no disk with the converted directory.  [default: hard links]",
)
@click.option(
    "--device-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Refuse what a device of so many GB cannot hold.",
)
@click.option("--dry-run", is_flag=True, help="Show graphs, shapes, files and memory, and stop.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on stdout, all else on stderr.")
def cli(
    src: str,
    dst: str,
    seq: tuple[int, ...],
    target: str,
    batch: int,
    prefill_chunk: tuple[int, ...] | None,
    image_patches: tuple[int, ...],
    dtype: str | None,
    attention: str | None,
    experts: str | None,
    product: tuple[tuple[str, ...], ...],
    cache_write: str | None,
    taps: bool,
    copy: bool,
    device_memory: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Exports a converted Kimi-VL checkpoint as a bundle of MindIR graphs.

    The bundle has a graph per number of picture patches, per context for prefill and for decode, and what is needed to
    run them: weights (hard links to the converted files, so they take no room), configuration, tokenizer and processor
    files, and bundle.json with shapes and hashes. kimi_vl.export.MindIRModel runs it. Weights are not read: a model of
    any size is exported in little memory.
    """
    arguments = {
        "src": src,
        "dst": dst + (" (dry run)" if dry_run else ""),
        "seq": ", ".join(map(str, seq)) or "default",
        "target": target,
        "batch": str(batch),
        "prefill chunk": ", ".join(map(str, prefill_chunk or ())) or "default",
        "image patches": ", ".join(map(str, image_patches)) or "default",
        "dtype": dtype or "as stored",
        "attention": attention or "default",
        "experts": experts or "default",
        "products": ", ".join(p for ps in product for p in ps) or "default",
        "cache write": cache_write or "default",
        "taps": "yes" if taps else "no",
        "copy": "yes" if copy else "no",
        "device memory": f"{device_memory:g} GB" if device_memory else "any",
    }
    for name, value in arguments.items():
        click.echo(f"{name:>14}: {value}", err=as_json)
    with _errors():
        weights = open_converted(src)
        plan = plan_export(
            weights,
            seq,
            target,
            batch,
            prefill_chunk,
            image_patches,
            dtype,
            taps,
            attention,
            experts,
            copy,
            products=tuple(p for ps in product for p in ps),
            cache_write=cache_write,
        )
        replaced = check_target(dst)
        click.echo(str(plan), err=as_json)
        if replaced:
            click.echo(f"replace    the bundle in {dst}", err=as_json)
        if dry_run or device_memory:
            memory = _estimate(plan, as_json)
            if device_memory:
                memory.check(device_memory)
        if dry_run:
            click.echo(f"device     {memory}", err=as_json)
            there = next(p for p in (Path(dst), *Path(dst).absolute().parents) if p.is_dir())
            click.echo(f"free       {size_text(shutil.disk_usage(there).free)}", err=as_json)
        else:
            memory = _export(plan, dst, as_json)
        if as_json:
            click.echo(json.dumps({**plan.to_dict(), "device": memory.to_dict()}, indent=1))


def _prepare_mindspore(use: str) -> None:
    os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
    try:
        import mindspore
    except ImportError as e:
        raise EnvironmentProblem(f"MindSpore cannot be imported ({e}); install it to {use}") from None
    if mindspore.get_context("device_target") != "CPU":
        mindspore.set_device("CPU")


def _estimate(plan: BundlePlan, as_json: bool) -> DeviceMemory:
    names = ", ".join(g.name for g in plan.shortened().graphs)
    click.echo(f"tracing    the first layers of {names}, to find the memory that they need", err=as_json)
    _prepare_mindspore("know the memory")
    return estimate(plan)


def _export(plan: BundlePlan, dst: str, as_json: bool) -> DeviceMemory:
    from tqdm import tqdm

    _prepare_mindspore("export")
    start = time.monotonic()
    # disable=None: no bar where nobody looks
    with tqdm(total=len(plan.graphs), unit="graph", disable=None, file=sys.stderr) as bar:

        def progress(name: str, written: int) -> None:
            bar.set_description(name)
            bar.update(written)

        written = export(plan, dst, progress)
    for name in () if plan.copy else written.copied:
        click.echo(
            f"copied     {name}: {dst} is on another file system than {plan.weights.directory}", err=as_json
        )
    if plan.target.runtime:
        decode = {n: count for n, count in written.launches.items() if n.startswith(DECODE)}
        click.echo(
            "launches   " + ", ".join(f"{name} {count}" for name, count in decode.items()), err=as_json
        )
    memory = of_graphs(plan, {name: graph.live_bytes for name, graph in written.bundle.graphs.items()})
    click.echo(f"device     {memory}", err=as_json)
    click.echo(
        f"done       {dst}, {size_text(written.nbytes)} of new disk, {time.monotonic() - start:.1f} s",
        err=as_json,
    )
    return memory


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what is wrong with the input or the machine into one line and an exit status."""
    try:
        yield
    except (ExportError, ConversionError, ConfigError) as e:
        _fail(str(e), BAD_INPUT)
    except (EnvironmentProblem, MemoryError) as e:
        _fail(str(e) or "out of memory", ENVIRONMENT)
    except BrokenPipeError:  # nobody reads on: click ends quietly
        raise
    except OSError as e:
        _fail(f"{e.filename or 'disk'}: {e.strerror or e}", ENVIRONMENT)
    except KeyboardInterrupt:
        _fail("interrupted; what was written is removed again", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    click.echo(f"export-mindir: {message}", err=True)
    sys.exit(status)


def main() -> None:
    cli(prog_name="export-mindir")
