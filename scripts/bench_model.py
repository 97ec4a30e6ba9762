#!/usr/bin/env python
"""Our engine against Torch on the same weights: decoding, prefill, pictures, answers, memory.

    python scripts/bench_model.py --dir /big/disk --json samples.json --plot ratios.svg
    python scripts/bench_model.py --dir /big/disk --cases decode-512 prefill-256 --reference bf16

Where --dir holds no `published` checkpoint, one of random weights at the published widths is made there (5.2 GB), and then
converted: random, but with a load of experts as uneven as a trained router's. The reference is transformers' own class,
with whichever of its kernels are fastest in a case. Both sides live in one process, on the same number of processors, and
take turns, each turn with other tokens; a case in which Torch is unsteady is measured again. Errors are against Torch in
fp32, if --reference has it. With llama-cpp-python and gguf installed, llama.cpp is a reference too, for one row of text.
Memory is of each side alone, in a process of its own, after each case ran once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kimi_vl.convert import ConversionError, EnvironmentProblem, convert
from kimi_vl.convert.manifest import MANIFEST
from kimi_vl.modeling.configuration import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
import make_synthetic
from bench_kit import engine_report
from bench_kit.cases import DEFAULT, Case
from bench_kit.fresh import Fresh, ProcessFailed
from bench_kit.sessions import LLAMA, OURS, Alone, Machine, Measured, RoutingFound, Setting, alone, compare

REFERENCES = ("fp32", "bf16", LLAMA)  # in this order: errors of all are against the first


def checkpoints(directory: Path, dtype: str, layers: int, vision_layers: int) -> tuple[Path, Path]:
    """The published and the converted checkpoint in `directory`, made where they are not there."""
    published, converted = directory / "published", directory / f"converted-{dtype}"
    if not published.exists():
        say(f"making {published}: {layers} layers, {vision_layers} vision blocks")
        raw = make_synthetic.configuration(make_synthetic.PUBLISHED, layers, vision_layers)
        make_synthetic.make(published, raw)
    if not (converted / MANIFEST).exists():
        say(f"making {converted}")
        convert(published, converted, dtype=dtype)
    return published, converted


@dataclass
class Results:
    """What is known so far: an error later on does not take it away."""

    rows: list[Measured] = field(default_factory=list)
    machine: Machine | None = None
    routing: RoutingFound | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)


def measure(setting: Setting, references: Sequence[str], results: Results) -> None:
    """Each reference in a process of its own: two of them would not fit into memory."""
    exact: dict[str, np.ndarray] = {}
    for dtype in references:
        for found in Fresh(compare, setting, dtype, exact):
            if isinstance(found, Machine):
                results.machine = found if results.machine is None else results.machine.joined(found)
            elif isinstance(found, RoutingFound):
                results.routing = found
            elif isinstance(found, Measured):
                results.rows.append(found)
                ratios = " / ".join(f"{ratio:.2f}" for ratio in engine_report.ratios(found))
                say(f"{found.name}, {found.reference}: {ratios}")
            elif dtype == "fp32":
                exact |= [found]


def measure_memory(setting: Setting, references: Sequence[str], results: Results) -> None:
    """Peaks of each side alone."""
    for side in (OURS, *references):
        variants = {str(row.case): row.variant for row in results.rows if row.reference.endswith(side)}
        process = Fresh(alone, setting, side, variants)
        for result in process:
            assert isinstance(result, Alone)
            results.memory.append(asdict(result) | process.peaks)
            say(f"memory of {result.name}: {process.peaks['RssAnon'] / 1e9:.2f} GB")


def memory_table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| alone | loaded in, s | anonymous memory, GB | with pages of files, GB |", "|---|---|---|---|"]
    for side in found:
        cells = (
            side["name"],
            f"{side['seconds']:.1f}",
            f"{side['RssAnon'] / 1e9:.2f}",
            f"{side['VmHWM'] / 1e9:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def routing_line(routing: RoutingFound) -> str:
    if not routing.skew:
        return "routing: no layer has experts"
    equal = (
        ""
        if routing.agreement is None
        else f"; {routing.agreement:.2%} of the choices are the same on both sides"
    )
    return f"routing: the busiest expert has {', '.join(f'{s:.1f}' for s in routing.skew)} times the mean load{equal}"


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    available = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoints are, or are made")
    parser.add_argument("--layers", type=int, default=4, help="of a checkpoint that is made")
    parser.add_argument("--vision-layers", type=int, default=4, help="of a checkpoint that is made")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of our weights")
    parser.add_argument("--kernels", help="backend of our operators; default: what the package takes here")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of our prefill graph")
    parser.add_argument("--bundle", type=Path, help="our side is this bundle instead, of the same checkpoint")
    parser.add_argument(
        "--reference",
        nargs="+",
        choices=REFERENCES,
        default=["fp32", "bf16"],
        help="Torch's dtypes, and llama.cpp",
    )
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), metavar="CASE", help=f"of {', '.join(DEFAULT)}; "
                        "other numbers are cases too")  # fmt: skip
    parser.add_argument("--threads", type=int, default=available)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--budget", type=float, default=60, help="seconds for a case's rounds; 5 are always made"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--json", type=Path, help="all samples")
    parser.add_argument("--plot", type=Path, help="the ratios as SVG or PNG")
    args = parser.parse_args(argv)
    if not 1 <= args.threads <= available:
        raise ValueError(
            f"--threads: {args.threads}, expected 1 to {available}, the processors that are free to use"
        )
    cases = tuple(dict.fromkeys(map(Case.parse, args.cases)))
    references = [dtype for dtype in REFERENCES if dtype in args.reference]
    published, converted = checkpoints(args.dir, args.dtype, args.layers, args.vision_layers)
    setting = Setting(
        published, args.bundle or converted, args.bundle is not None, args.kernels, args.prefill_chunk,
        args.threads, args.rounds, args.budget, cases,
    )  # fmt: skip
    results = Results()
    try:
        measure(setting, references, results)
        if not args.no_memory:
            measure_memory(setting, references, results)
    finally:
        if results.rows and results.machine:
            title = f"{processor()}, threads: {args.threads}"
            print("\n".join(told(title, results, results.machine)))
            if args.json:
                args.json.write_text(samples(title, results), encoding="utf-8")
            if args.plot:
                engine_report.figure(results.rows, title, args.plot)
    return 0


def told(title: str, results: Results, machine: Machine) -> Iterator[str]:
    yield title
    yield ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield f"ours: {machine.ours}"
    if results.routing:
        yield routing_line(results.routing)
    yield ""
    yield from engine_report.table(results.rows)
    if results.memory:
        yield "\n" + memory_table(results.memory)


def samples(title: str, results: Results) -> str:
    return json.dumps({"title": title} | asdict(results), indent=1) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, ConversionError, ValueError) as e:  # bad input: one sentence, no traceback
        print(f"bench_model: {e}", file=sys.stderr)
        sys.exit(2)
    except ProcessFailed as e:
        print(f"bench_model: {e}", file=sys.stderr)
        sys.exit(1)
    except (EnvironmentProblem, OSError) as e:
        print(f"bench_model: {e}", file=sys.stderr)
        sys.exit(3)
