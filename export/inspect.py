"""`inspect-mindir`: what a bundle's graphs, or any MindIR file, consist of and cost. MindSpore is not imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ..convert.errors import EnvironmentProblem
from ..convert.planning import size_text
from .bundle import MANIFEST, Bundle
from .errors import BundleError, ExportError

BAD_INPUT, ENVIRONMENT = 2, 3

EPILOG = """\b
Examples:
  inspect-mindir ./mindir
  inspect-mindir ./mindir --graph decode-4096 --json
  inspect-mindir ./mindir/decode-4096.mindir
  inspect-mindir ./mindir --graph decode-4096 --svg layer.svg --layer 1

\b
FLOPs are those of the matrix products (linears, attention, experts by the rows they are given), two per
multiplication and addition, from the shapes of the graph's own nodes.
"""


def graph_files(path: Path, chosen: str | None) -> dict[str, Path]:
    """The MindIR files of a bundle by the names of its graphs, or the one that `path` is.

    Raises:
        ExportError: it is neither, or has no graph called `chosen`.
        BundleError: the manifest is damaged.
    """
    if path.is_file():
        return {path.stem: path}
    if not (path / MANIFEST).is_file():
        raise ExportError(f"{path}: is neither a bundle nor a MindIR file; export-mindir makes bundles")
    files = {name: path / graph.file for name, graph in Bundle.load(path).graphs.items()}
    if chosen is None:
        return files
    if chosen not in files:
        raise ExportError(f"--graph: {path} has no {chosen}; choose one of {', '.join(files)}")
    return {chosen: files[chosen]}


def _bundle_lines(path: Path) -> Iterator[tuple[str, str]]:
    bundle = Bundle.load(path)
    weights = sum(w.nbytes for w in bundle.weights.values())
    yield (
        "bundle",
        f"for {bundle.target}, {bundle.dtype}, batch {bundle.batch}, by MindSpore {bundle.mindspore}",
    )
    chunks = ", ".join(map(str, (*bundle.smaller_chunks, bundle.prefill_chunk)))
    yield "contexts", ", ".join(map(str, bundle.contexts)) + f"; prefill in chunks of {chunks}"
    yield "patches", ", ".join(map(str, bundle.patches))
    yield "weights", f"{size_text(weights)} as stored, in {len(bundle.shards)} files"


@click.command(
    epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR|FILE.mindir")
@click.option("--graph", metavar="NAME", help="Only this graph of a bundle.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw a layer of the graph: operators, shapes between them, parameters.",
)
@click.option("--layer", type=click.IntRange(min=0), default=0, show_default=True, help="The layer to draw.")
def cli(path: Path, graph: str | None, as_json: bool, svg: Path | None, layer: int) -> None:
    """Shows what the graphs of a bundle consist of and cost, from the MindIR files themselves.

    For each graph: inputs and outputs, the bytes of weights and caches, the most memory that its own tensors take at
    once and where, FLOPs of a call, operators, and how many start something on a device, layer by layer.
    """
    try:
        from .summary import Summary

        files = graph_files(path, graph)
        if svg:
            _draw(files, svg, layer)
            return
        summaries = {name: Summary.of_file(file) for name, file in files.items()}
        if as_json:
            click.echo(json.dumps({name: s.to_dict() for name, s in summaries.items()}, indent=1))
            return
        if path.is_dir():
            _echo(_bundle_lines(path))
        for name, summary in summaries.items():
            click.echo(f"\n{name}  {size_text(files[name].stat().st_size)}")
            _echo(summary.lines())
    except (ExportError, BundleError) as e:
        _fail(str(e), BAD_INPUT)
    except EnvironmentProblem as e:
        _fail(str(e), ENVIRONMENT)
    except BrokenPipeError:  # nobody reads on: click ends quietly
        raise
    except OSError as e:
        _fail(f"{e.filename or 'disk'}: {e.strerror or e}", ENVIRONMENT)


def _draw(files: dict[str, Path], svg: Path, layer: int) -> None:
    from .drawing import draw
    from .mindir import read
    from .nodes import read_nodes

    if len(files) > 1:
        raise ExportError(f"--svg: draws one graph; choose with --graph: {', '.join(files)}")
    ((name, file),) = files.items()
    svg.write_text(draw(read_nodes(read(file)), layer, name), encoding="utf-8")
    click.echo(f"drawn      layer {layer} of {name} in {svg}")


def _echo(lines: Iterator[tuple[str, str]]) -> None:
    for label, text in lines:
        click.echo(f"{label:<10} {text}")


def _fail(message: str, status: int) -> None:
    click.echo(f"inspect-mindir: {message}", err=True)
    sys.exit(status)


def main() -> None:
    cli(prog_name="inspect-mindir")


if __name__ == "__main__":
    main()
