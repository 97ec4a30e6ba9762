"""Writing a bundle: graphs are traced one by one, weights are linked, and the directory appears when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..convert.errors import EnvironmentProblem
from ..convert.manifest import FileRecord, content_hash
from ..convert.planning import size_text
from ..modeling.shapes import Ports
from .bundle import MANIFEST, Bundle, GraphRecord, Port, WeightRecord
from .device import scripts
from .errors import BundleError, ExportError
from .plan import BundlePlan, GraphPlan

Progress = Callable[[str, int], object]
"""Called with a graph's name, and how many graphs were written since the last call."""


def check_target(dst: str | Path) -> bool:
    """Whether a bundle that is there would be replaced.

    Raises:
        ExportError: `dst` is something that must not be replaced.
    """
    path = Path(dst)
    if not path.exists():
        return False
    if not path.is_dir():
        raise ExportError(f"{dst}: is a file, expected a directory to write to")
    if not any(path.iterdir()):
        return False
    try:
        Bundle.load(path)
    except BundleError:
        if not (path / MANIFEST).is_file():
            raise ExportError(
                f"{dst}: is not empty and no bundle; choose a new or an empty directory, or an older bundle"
            ) from None
        raise ExportError(
            f"{dst}: holds a damaged bundle, or a newer one; remove it or choose another directory"
        ) from None
    return True


@dataclass(frozen=True)
class Written:
    """What :func:`export` did.

    Attributes:
        copied: shards that are no links.
        nbytes: what the bundle added to the disk.
        launches: by graph, how many operators start something on the device.
    """

    bundle: Bundle
    copied: tuple[str, ...]
    nbytes: int
    launches: dict[str, int]


def export(plan: BundlePlan, dst: str | Path, progress: Progress | None = None) -> Written:
    """Writes the bundle that `plan` describes as directory `dst`, which must be new, empty, or an older bundle.

    Weights are not read: shards are hard links to those of the converted directory, or copies if the plan says so and on
    another file system.

    Raises:
        ExportError: `dst` cannot be used, the network and the weights do not belong together, or a graph for a device
            breaks a rule of ``lint`` or is not legal on a product.
        EnvironmentProblem, OSError: no room, a failing disk.
    """
    target = Path(dst).resolve()
    check_target(target)
    source = plan.weights
    source.verify_files()
    if plan.copy:
        _check_room(target, sum(plan.shards.values()))
    with _appearing(target) as directory:
        graphs, traced = _write_graphs(plan, directory, progress)
        place = _copy if plan.copy else _link
        copied = tuple(name for name in plan.shards if place(source.directory / name, directory / name))
        for name in plan.copied:
            if name in plan.adjusted:
                (directory / name).write_bytes(plan.adjusted[name])
            else:
                shutil.copyfile(source.directory / name, directory / name)
        for name, script in scripts(plan.target.name).items():
            shutil.copyfile(script, directory / name)
        bundle = _manifest(plan, graphs, traced)
        (directory / MANIFEST).write_text(bundle.to_json(), encoding="utf-8")
        added = sum(
            f.stat().st_size for f in directory.iterdir() if f.name in copied or f.name not in plan.shards
        )
    return Written(bundle, copied, added, traced.launches)


@dataclass
class _Traced:
    """What is known of the graphs once they are traced."""

    mind_ir: int = 0
    launches: dict[str, int] = field(default_factory=dict)
    releases: set[str] = field(default_factory=set)


def _write_graphs(
    plan: BundlePlan, directory: Path, progress: Progress | None
) -> tuple[dict[str, GraphRecord], _Traced]:
    """Traces, checks and writes every graph."""
    from . import legality, lint, mindir, releases
    from .trace import Tracer

    target = plan.target
    tracer = Tracer(plan.config, target, plan.batch, plan.weights.dtype)
    unused = set(plan.weights.names())
    records: dict[str, GraphRecord] = {}
    traced = _Traced(releases=set(releases.CANN if target.runtime else ()))

    def write(graph: GraphPlan, model: Any, external: bool) -> None:
        lint.check(graph.name, model, graph.caches, graph.inputs, device=bool(target.runtime))
        if target.runtime:
            legality.check(graph.name, model, target.runtime, target.products)
            traced.releases &= releases.run_by(model)
        records[graph.name] = _write_graph(graph, model, external, directory)
        traced.launches[graph.name] = sum(lint.launches(model).values())

    for family, follow in plan.families():
        if progress:
            progress(family[0].name, 0)
        for graph, model in tracer.family(family):
            traced.mind_ir = model.mind_ir_version
            names = _check_parameters(plan, graph, mindir.parameters(model))
            unused -= names
            # All or none: a graph that finds only some of its data would run on arbitrary memory for the rest.
            external = all(map(plan.as_stored, names))
            mindir.point_at(model, {name: plan.weights.location(name) for name in names} if external else {})
            write(graph, model, external)
            bare = follow.get(graph.name)
            if bare:
                mindir.keep_outputs(model, len(bare.outputs))
                mindir.normalise(model)
                write(bare, model, external)
            if progress:
                progress(graph.name, 2 if bare else 1)
    if unused:
        raise ExportError(f"{min(unused)}: is in {plan.weights.directory}, but no graph uses it")
    in_order = [graph.name for graph in plan.graphs]
    traced.launches = {name: traced.launches[name] for name in in_order}
    return {name: records[name] for name in in_order}, traced


def _write_graph(graph: GraphPlan, model: Any, external: bool, directory: Path) -> GraphRecord:
    from . import mindir
    from .liveness import live
    from .nodes import read_nodes

    content = mindir.serialise(model)
    file = f"{graph.name}.mindir"
    (directory / file).write_bytes(content)
    return GraphRecord(
        file=file,
        nbytes=len(content),
        hash=content_hash(content),
        kind=graph.kind,
        patches=graph.patches,
        tokens=graph.tokens,
        context=graph.context,
        taps=graph.taps,
        inputs=_ports(graph.inputs),
        outputs=_ports(graph.outputs),
        caches=_ports(graph.caches),
        external_data=external,
        live_bytes=live(read_nodes(model)).nbytes,
    )


def _check_parameters(plan: BundlePlan, graph: GraphPlan, found: Ports) -> set[str]:
    """The weights among a graph's parameters; each one must be stored in the shape and a dtype that it can have."""
    stored = set(plan.weights.names())
    weights = set(found) - set(graph.caches)
    for name in sorted(weights):
        if name not in stored:
            raise ExportError(f"{name}: {graph.name} needs it, but {plan.weights.directory} does not have it")
        shape, dtype = plan.weights.spec(name)
        if found[name] != (shape, plan.target.parameter_dtype(dtype)):
            raise ExportError(
                f"{name}: {graph.name} takes {found[name]}, but it is stored as {dtype} {list(shape)}"
            )
    return weights


def _manifest(plan: BundlePlan, graphs: dict[str, GraphRecord], traced: _Traced) -> Bundle:
    import mindspore

    from .releases import CANN

    source = plan.weights
    return Bundle(
        version=__version__,
        mindspore=mindspore.__version__,
        mind_ir=traced.mind_ir,
        target=plan.target.name,
        dtype=plan.dtype,
        parameter_dtype=plan.target.dtype if plan.target.widens else None,
        batch=plan.batch,
        contexts=plan.contexts,
        prefill_chunk=plan.prefill_chunks[-1],
        patches=plan.patches,
        taps=plan.taps,
        graphs=graphs,
        weights={
            name: WeightRecord(*source.location(name), *source.spec(name), source.hash(name))
            for name in source.names()
        },
        shards=dict(source.manifest.shards),
        files=source.manifest.files
        | {name: _record(new) for name, new in plan.adjusted.items()}
        | {name: _record(path.read_bytes()) for name, path in scripts(plan.target.name).items()},
        attention=plan.target.attention,
        experts=plan.target.experts,
        products=plan.target.products,
        releases={release: CANN[release] for release in sorted(traced.releases)},
        cache_write=plan.target.cache_write,
        kernels=plan.target.kernels,
    )


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), content_hash(content))


def _ports(ports: Ports) -> tuple[Port, ...]:
    return tuple(Port(name, shape, dtype) for name, (shape, dtype) in ports.items())


def _link(source: Path, target: Path) -> bool:
    """A hard link, or a copy where the file system has none between the two places; True if it is a copy.

    Never a symbolic link: a bundle stays whole when the converted directory is removed.
    """
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        size, free = source.stat().st_size, shutil.disk_usage(target.parent).free
        if size > free:
            raise EnvironmentProblem(
                f"{source}: cannot be linked from {target.parent.parent}, and to copy it {size / 1e9:.2f} GB are needed "
                f"there but {free / 1e9:.2f} GB are free; choose a --dst on the file system of --src"
            ) from None
        return _copy(source, target)
    return False


def _copy(source: Path, target: Path) -> bool:
    """A copy; True, as :func:`_link` says of one."""
    shutil.copyfile(source.resolve(), target)
    return True


def _check_room(target: Path, nbytes: int) -> None:
    """Raises EnvironmentProblem: the disk that `target` will be on has not so many bytes free."""
    there = next(p for p in (target, *target.parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise EnvironmentProblem(
            f"{target}: to copy the weights {size_text(nbytes)} are needed there but {size_text(free)} are free; "
            "leave --copy out to link them, or choose another --dst"
        )


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory that takes its place as `target` at the end, and is removed if anything fails before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _replace(target, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(target: Path, new: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside / "bundle")
    try:
        new.rename(target)
    except BaseException:
        (aside / "bundle").rename(target)
        raise
    finally:
        shutil.rmtree(aside)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
