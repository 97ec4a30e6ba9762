#!/usr/bin/env python
"""Measures `convert-weights` against `cp` of the same bytes, on synthetic checkpoints of several sizes.

    python scripts/bench_convert.py --layers 2 4 8 --dir /big/disk --repeats 3 --cold --figure bench.svg

Methods take turns, so that they share whatever else the machine does. All of them bring what they wrote to the disk:
`convert-weights` and the plain conversion by fsync, `cp -r` by `sync` of its files. Times are of whole commands, their
start included. The disk holds one checkpoint and one target at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kimi_vl.convert import ConversionError, EnvironmentProblem
from kimi_vl.modeling.configuration import ConfigError, ModelConfig

sys.path.insert(0, str(Path(__file__).parent))
from bench_kit.measure import CommandFailed, Run, measure
from bench_kit.report import Case, figure, table
from make_synthetic import PUBLISHED, configuration, make
from synthetic_kit.layout import published_tensors

SCRIPTS = Path(__file__).parent
CP, CONVERT, LOAD_ALL = "cp -r", "convert-weights", "load all, save all"
WARM, COLD = "warm", "cold"
SPARE = 2.5  # times the weights: loading all holds them once, the page cache and others need memory too
ROOM = 1.05  # of source and target has to be free

Command = list[str | Path]


def commands(source: Path, target: Path) -> dict[str, Command]:
    return {
        CP: ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, target],
        CONVERT: [Path(sys.executable).with_name("convert-weights"), "--src", source, "--dst", target],
        LOAD_ALL: [sys.executable, SCRIPTS / "bench_kit/load_all.py", source, target],
    }


def bench(
    source: Path,
    target: Path,
    methods: Sequence[str],
    temperatures: Sequence[str],
    repeats: int,
    say: Callable[[str], None],
) -> dict[tuple[str, str], list[Run]]:
    """The runs by (temperature, method); `target` is not there before or after any of them."""
    runs: dict[tuple[str, str], list[Run]] = {(t, m): [] for t in temperatures for m in methods}
    for repeat in range(repeats):
        for temperature, method in runs:
            os.sync()  # nobody pays for what was written before
            prepare[temperature](source)
            try:
                run = measure(commands(source, target)[method])
            finally:
                shutil.rmtree(target, ignore_errors=True)
            runs[temperature, method].append(run)
            say(
                f"{repeat + 1}/{repeats} {temperature} {method}: {run.seconds:.1f} s, {run.anonymous / 1e6:.0f} MB"
            )
    return runs


def warm(source: Path) -> None:
    """Brings a directory's files into the page cache, as far as there is room."""
    buffer = bytearray(8 << 20)
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def cool(source: Path) -> None:
    """Has the system forget what it keeps of a directory's files."""
    for file in source.iterdir():
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


prepare = {WARM: warm, COLD: cool}


def available_memory() -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Measures one size after the other."""
    temperatures = (WARM, COLD) if args.cold else (WARM,)
    for layers in args.layers:
        raw = configuration(args.config, layers)
        nbytes = sum(tensor.nbytes for tensor in published_tensors(ModelConfig.from_dict(raw)))
        source, target = args.dir / f"layers-{layers}", args.dir / f"layers-{layers}-target"
        if target.exists():
            raise ConversionError(f"{target}: is there already; remove it or choose another --dir")
        found = source.exists()
        free, need = shutil.disk_usage(args.dir).free, nbytes * ROOM * (1 if found else 2)
        if free < need:
            raise EnvironmentProblem(
                f"{args.dir}: needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
            )
        methods = [CP, CONVERT]
        if available_memory() > SPARE * nbytes:
            methods.append(LOAD_ALL)
        else:
            args.say(f"{layers} layers: not enough memory to load all")
        try:
            if not found:
                args.say(f"{layers} layers: writing {nbytes / 1e9:.2f} GB")
                make(source, raw, threads=os.cpu_count() or 1)
            runs = bench(source, target, methods, temperatures, args.repeats, args.say)
        finally:
            if not found:
                shutil.rmtree(source, ignore_errors=True)
        for (temperature, method), of_method in runs.items():
            yield Case(layers, nbytes, temperature, method, of_method, runs[temperature, CP])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8], metavar="N", help="text layers")
    parser.add_argument(
        "--dir",
        type=Path,
        required=True,
        help="where to work; a checkpoint layers-N that is there is used and kept",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="measure with an empty page cache too")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw one, as its ending says: svg, png, pdf"
    )
    parser.add_argument("--config", type=Path, default=PUBLISHED, help="a config.json with other dimensions")
    args = parser.parse_args(argv)
    if args.repeats < 1 or min(args.layers) < 1:
        parser.error("--repeats and --layers: expected at least 1")
    args.say = lambda line: print(line, file=sys.stderr, flush=True)
    args.dir.mkdir(parents=True, exist_ok=True)
    measured = list(cases(args))
    print(table(measured))
    if args.figure:
        figure(measured, args.figure)


if __name__ == "__main__":
    try:
        main()
    except (ConversionError, ConfigError) as e:  # bad input: one sentence, no traceback
        print(f"bench_convert: {e}", file=sys.stderr)
        sys.exit(2)
    except (EnvironmentProblem, CommandFailed, OSError) as e:
        print(f"bench_convert: {e}", file=sys.stderr)
        sys.exit(3)
