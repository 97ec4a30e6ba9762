#!/usr/bin/env python
"""Measures `export-mindir` against MindSpore's own `ms.export` of the same graphs: time, memory, disk.

    python scripts/bench_export.py --ckpt ./ckpt --dir /big/disk --repeats 3

`ms.export` runs once for each graph, since each of its MindIRs has a copy of the weights; `export-mindir` once for all of
them. All take turns, so that they share whatever else the machine does. Times are of whole commands, their start
included. The disk holds one result at a time, the largest a copy of all text weights in the graphs' dtype.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kimi_vl.convert import ConversionError
from kimi_vl.export import ExportError, plan_export
from kimi_vl.export.plan import TARGETS, open_converted

sys.path.insert(0, str(Path(__file__).parent))
from bench_kit.measure import CommandFailed, Run, measure

OURS = "export-mindir"
MS_EXPORT = Path(__file__).parent / "bench_kit/ms_export.py"


@dataclass(frozen=True)
class Result:
    """A command's run, and the bytes that it added to the disk: links to the converted files are not counted."""

    run: Run
    disk: int


def bench(
    ckpt: Path, target: Path, graphs: Sequence[str], options: Sequence[str], repeats: int
) -> dict[str, list[Result]]:
    """The results by graph, and of `export-mindir`; `target` is not there before or after any of them."""
    python = Path(sys.executable)
    commands: dict[str, list[str | Path]] = {
        OURS: [python.with_name("export-mindir"), "--src", ckpt, "--dst", target, *options],
    }
    commands |= {graph: [python, MS_EXPORT, ckpt, graph, target, *options] for graph in graphs}
    results: dict[str, list[Result]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            os.sync()  # nobody pays for what was written before
            try:
                run = measure(command)
                results[name].append(Result(run, sum(own_bytes(target))))
            finally:
                remove(target)
            print(f"{turn + 1}/{repeats} {name}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def own_bytes(directory: Path) -> Iterator[int]:
    """Of each file that is not a link to another."""
    for file in directory.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:
            yield file.stat().st_size


def remove(directory: Path) -> None:
    """Also what `ms.export` made read-only."""
    for path in directory.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def table(results: dict[str, list[Result]]) -> Iterator[str]:
    yield "| command | seconds, min / median | processor, s | anonymous, GB | new disk, GB |"
    yield "|---|---|---|---|---|"
    theirs = {name: runs for name, runs in results.items() if name != OURS}
    for name, runs in theirs.items():
        yield row(f"`ms.export` of {name}", runs)
    together = [
        Result(
            Run(
                seconds=sum(r.run.seconds for r in turn),
                cpu_seconds=sum(r.run.cpu_seconds for r in turn),
                anonymous=max(r.run.anonymous for r in turn),
                read=sum(r.run.read for r in turn),
                written=sum(r.run.written for r in turn),
            ),
            sum(r.disk for r in turn),
        )
        for turn in zip(*theirs.values())
    ]
    yield row("`ms.export`, all of these one after the other", together)
    yield row("`export-mindir`, the same graphs", results[OURS])


def row(name: str, results: Sequence[Result]) -> str:
    seconds = [r.run.seconds for r in results]
    cells = (
        name,
        f"{min(seconds):.1f} / {median(seconds):.1f}",
        f"{min(r.run.cpu_seconds for r in results):.1f}",
        f"{max(r.run.anonymous for r in results) / 1e9:.2f}",
        f"{max(r.disk for r in results) / 1e9:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="a converted directory")
    parser.add_argument("--dir", type=Path, required=True, help="where to work, on the disk of --ckpt")
    parser.add_argument("--target", choices=list(TARGETS), default="cpu")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--prefill-chunk", type=int, default=256)
    parser.add_argument("--image-patches", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    target = args.dir / "bench-export-target"
    if target.exists():
        raise ExportError(f"{target}: is there already; remove it or choose another --dir")
    plan = plan_export(
        open_converted(args.ckpt),
        seq=(args.seq,),
        target=args.target,
        prefill_chunk=args.prefill_chunk,
        image_patches=(args.image_patches,),
    )
    names = ("target", "seq", "prefill_chunk", "image_patches")
    options = [o for n in names for o in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]
    results = bench(args.ckpt, target, [g.name for g in plan.graphs], options, args.repeats)
    print(f"weights: {plan.weight_bytes / 1e9:.2f} GB in the graphs' dtype\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    try:
        main()
    except (ConversionError, ExportError) as e:  # bad input: one sentence, no traceback
        print(f"bench_export: {e}", file=sys.stderr)
        sys.exit(2)
    except (CommandFailed, OSError) as e:
        print(f"bench_export: {e}", file=sys.stderr)
        sys.exit(3)
