"""`verify-parity`: hold a converted directory or a bundle against the Torch reference, and say where it first differs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .bisect_cli import bisect
from .envelope_cli import envelope

OK, PARITY_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

INSTALL = "what verification needs is installed by: pip install 'kimi-vl[verify]'"

EPILOG = """\b
Examples:
  verify-parity --reference nano --candidate ./ckpt --report ./report
  verify-parity --reference ./Kimi-VL-A3B-Instruct --candidate ./ckpt --candidate ./mindir-cpu --candidate ./mindir --report ./report
  verify-parity --reference nano --candidate ./ckpt --report ./report --cases text --cases steps
  verify-parity --reference nano --candidate ./mindir --report ./report --through interpreter
  verify-parity --reference nano --candidate ./mindir --report ./report --arithmetic rounded
  verify-parity --reference nano --candidate ./ckpt --report ./report --inputs ./questions --cases inputs
  verify-parity --reference ./Kimi-VL-A3B-Instruct --candidate ./ckpt --report ./report --reference-code remote --reference-python old/bin/python
  verify-parity --reference ./Kimi-VL-A3B-Instruct --candidate ./ckpt --report ./report --stream
  verify-parity judge ./report/run.json --profile my-thresholds.json
  verify-parity record --reference ./Kimi-VL-A3B-Instruct --candidate ./mindir --out pack.npz
  verify-parity --reference ./Kimi-VL-A3B-Instruct --candidate ./mindir --report ./report --pack pack.npz --device-report report.json
  verify-parity envelope --candidate ./mindir
  verify-parity bisect --reference nano --candidate ./mindir

\b
Exit status:
  0  every check holds
  1  a check failed; the message names the first bad place of the network
  2  wrong usage or input
  3  the environment: a missing package, disk, memory
"""


class MissingPackage(RuntimeError):
    """A package of the extra `verify` is not there."""


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--reference", metavar="SRC", help="Published directory, Hub repo id, or nano.")
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="DIR",
    help="Converted directory or MindIR bundle; repeated, each is a stage of the chain.",
)
@click.option(
    "--report", metavar="DIR", help="Where run.json, verdict.json, junit.xml, report.md and report.html go."
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    help="Thresholds: a name, or a .json file (repeatable: each stage takes the first that is for its arithmetic).  "
    "[default: strict; bf16 with rounded arithmetic]",
)
@click.option(
    "--cases",
    multiple=True,
    metavar="NAME",
    help="Only this case (repeatable), quick: three of them, or inputs: those of --inputs.  [default: the suite]",
)
@click.option(
    "--inputs",
    metavar="DIR",
    help="Your own prompts as further cases: NAME.txt, asked after the pictures NAME.png or NAME-1.png, NAME-2.png "
    "(.jpg, .webp), or a conversation NAME.json.",
)
@click.option(
    "--through",
    type=click.Choice(["mindspore", "interpreter"]),
    help="What runs a bundle's graphs.  [default: interpreter for another target than the CPU, else mindspore]",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["lifted", "rounded"]),
    default="lifted",
    show_default=True,
    help="In fp32; or also rounded: every operator's result as an interpreted graph declares it, or, where MindSpore runs "
    "the C++ operators on a CPU, the input of products with bf16 weights.",
)
@click.option(
    "--reference-code",
    type=click.Choice(["transformers", "remote"]),
    default="transformers",
    show_default=True,
    help="Whose network the reference is; remote executes the code that the checkpoint brings.",
)
@click.option(
    "--reference-python",
    metavar="PYTHON",
    help="Of --reference-code remote: the Python of an environment with an older transformers.  [default: this one]",
)
@click.option(
    "--stream", is_flag=True, help="Layer by layer, in the memory of one; of a converted directory."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the inputs.  [default: fixed]")
@click.option(
    "--device-report", metavar="FILE", help="What run_on_device.py of this bundle wrote; needs --pack."
)
@click.option("--pack", metavar="FILE", help="The golden pack that the device had.")
@click.option("--json", "as_json", is_flag=True, help="The verdict as JSON on stdout, all else on stderr.")
@click.option("--dry-run", is_flag=True, help="Show what would run, and stop.")
@click.pass_context
def cli(
    context: click.Context,
    reference: str | None,
    candidates: tuple[str, ...],
    report: str | None,
    profiles: tuple[str, ...],
    cases: tuple[str, ...],
    inputs: str | None,
    through: str | None,
    arithmetic: str,
    reference_code: str,
    reference_python: str | None,
    stream: bool,
    seed: int | None,
    device_report: str | None,
    pack: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Proves that a candidate computes what the published checkpoint does.

    Runs one suite of prompts and pictures through transformers' Torch implementation and through the candidate, or each
    of several, compares every layer, the choices of experts, the logits and the generated tokens, and judges the
    distances by a profile of thresholds. Beside that, the weights are compared bit by bit.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    if context.invoked_subcommand is not None:
        return
    for option, value in (("--reference", reference), ("--candidate", candidates), ("--report", report)):
        if not value and not (option == "--report" and dry_run):
            raise click.UsageError(f"Missing option '{option}'.", context)
    if (device_report is None) != (pack is None):
        raise click.UsageError(
            "--device-report and --pack: give both; the pack is the one that the device had", context
        )
    if reference_python is not None and reference_code != "remote":
        raise click.UsageError("--reference-python has no place without --reference-code remote.", context)
    python = (reference_python or sys.executable) if reference_code == "remote" else None
    assert reference is not None
    device = (Path(device_report), Path(pack)) if device_report and pack else None
    with errors():
        _verify(
            reference,
            candidates,
            report,
            profiles,
            cases,
            inputs,
            through,
            arithmetic,
            python,
            stream,
            seed,
            device,
            as_json,
            dry_run,
        )


cli.add_command(bisect)
cli.add_command(envelope)


@cli.command()
@click.argument("run", type=click.Path(dir_okay=False))
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    help="Thresholds: a name, or a .json file (repeatable).  [default: strict; bf16 for rounded arithmetic]",
)
@click.option("--report", metavar="DIR", help="Also write the report of this judgement here.")
@click.option("--json", "as_json", is_flag=True, help="The verdict as JSON on stdout.")
def judge(run: str, profiles: tuple[str, ...], report: str | None, as_json: bool) -> None:
    """Judges a saved RUN again, without running anything."""
    with errors():
        from .judge import load_profile
        from .runs import load_run

        if report:
            require_packages("jinja2", "matplotlib")
        _conclude(load_run(Path(run)), [load_profile(name) for name in profiles], report, as_json)


@cli.command()
@click.option("--reference", required=True, metavar="SRC", help="Published directory, Hub repo id, or nano.")
@click.option("--candidate", required=True, metavar="BUNDLE", help="Bundle that will run on the device.")
@click.option("--out", required=True, metavar="PACK", help="The golden pack, a .npz file of at most 5 MB.")
@click.option(
    "--cases", multiple=True, metavar="NAME", help="Only this case (repeatable).  [default: six of them]"
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the inputs.  [default: fixed]")
def record(reference: str, candidate: str, out: str, cases: tuple[str, ...], seed: int | None) -> None:
    """Writes a golden PACK: by it a device without Torch is judged.

    It holds the graph calls of a few cases and what the Torch reference answers, for this bundle alone. On the device,
    run_on_device.py of the bundle takes it. The bundle is interpreted first: one that is wrong itself gets no pack.
    """
    with errors():
        _record(reference, candidate, Path(out), cases, seed)


def _record(source: str, candidate: str, out: Path, names: tuple[str, ...], seed: int | None) -> None:
    from ..convert.source import fetch, resolve
    from .candidates import inspect, require_same_model
    from .cases import DEFAULT_SEED, select, suite
    from .prompts import source_for

    require_packages("torch", "transformers")
    from .golden import CASES, GoldenError
    from .golden import record as record_pack
    from .oracle import build_oracle

    with about("--reference"):
        reference = resolve(source)
        fetch(reference)
    found = inspect(candidate, "interpreter")
    config = require_same_model(reference.directory, found)
    plans = select(suite(config, found.limits), names or CASES)
    for plan in plans:
        if plan.impossible:
            say(f"without case {plan.name}: {plan.impossible}")
    plans = [plan for plan in plans if not plan.impossible]
    if not plans:
        raise ValueError("--cases: the bundle can run none of them; export a larger context")
    say("loading the Torch reference")
    oracle = build_oracle(reference.directory)
    inputs = source_for(reference.directory, config)
    seed = DEFAULT_SEED if seed is None else seed
    try:
        pack = record_pack(oracle, reference.directory, found.path, plans, inputs, seed, out, say)
    except GoldenError as e:
        _fail(PARITY_FAILED, str(e))
    if not pack.index["taps"]:
        say(
            "the bundle has no graphs with taps: the pack judges pictures, logits and tokens, and no single layer"
        )
    click.echo(
        f"{out}: {len(pack.cases)} cases, {out.stat().st_size / 1e6:.2f} MB, digest {pack.digest[:12]}"
    )


def _verify(
    source: str,
    candidates: tuple[str, ...],
    report: str | None,
    profiles: tuple[str, ...],
    names: tuple[str, ...],
    inputs: str | None,
    through: str | None,
    arithmetic: str,
    python: str | None,
    stream: bool,
    seed: int | None,
    device: tuple[Path, Path] | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    from ..convert.source import fetch, resolve
    from .candidates import require_same_model
    from .cases import DEFAULT_SEED
    from .chain import ChainLink, find_links
    from .device import accept
    from .judge import load_profile, suited
    from .own_inputs import read_inputs
    from .prompts import has_processor
    from .remote import code_of
    from .stream import run_stream, streamed

    thresholds = [load_profile(name) for name in profiles]
    with about("--reference"):
        reference = resolve(source)
    directory = reference.directory
    code = code_of(directory) if python else None
    if code and arithmetic == "rounded":
        raise ValueError("--reference-code: remote runs in fp32 alone, so leave out --arithmetic rounded")
    given = []
    for candidate in candidates:
        with about("--candidate"):
            other = resolve(candidate)
        given.append((_called(candidate, other), other.directory))
    own = read_inputs(Path(inputs), directory) if inputs is not None else None
    links: list[ChainLink] = find_links(given, through, arithmetic, names, own.plans if own else ())
    if stream:
        if code:
            raise ValueError("--stream: runs transformers' layers, so leave out --reference-code remote")
        links = [streamed(links, thresholds, names, own.plans if own else ())]
    for link in links:
        require_same_model(directory, link.found)
    if device:
        bundles = [link for link in links if link.found.kind == "bundle"] or links
        bundles[-1].device = accept(*device, bundles[-1].found.path, directory)
    seed = DEFAULT_SEED if seed is None else seed
    shown = _called(source, reference)
    real = has_processor(directory)
    fitting = [suited(thresholds, {"arithmetic": link.found.arithmetic}) for link in links]
    arguments: dict[str, Any] = {
        "reference": f"{shown} (revision {reference.revision})" if reference.revision else shown,
        "candidate": "; ".join(f"{link.path} ({link.found.kind}{link.found.how})" for link in links),
        "report": report or "(none: dry run)",
        "profile": ", ".join(dict.fromkeys(profile.name for profile in fitting)),
        "cases": ", ".join(dict.fromkeys(plan.name for link in links for plan in link.plans)),
        "inputs": ("real prompts and drawn pictures" if real else "seeded token ids and patches")
        + (f", and {len(own.plans)} of {inputs}" if own else ""),
        "reference code": f"{code}, executed by {python}" if code else "transformers' own",
        "seed": seed,
        "context": links[0].found.limits.context,
        "prefill chunk": ", ".join(map(str, links[0].found.limits.chunks)),
    }
    if dry_run:
        _show_plan(arguments, links[0].plans, as_json)
        return
    require_packages("torch", "transformers", "jinja2", "matplotlib")
    for name, value in arguments.items():
        click.echo(f"{name:>14}: {value}", err=as_json)
    assert report is not None
    Path(report).mkdir(
        parents=True, exist_ok=True
    )  # a report that cannot be written is known before the work
    with about("--reference"):
        stored = fetch(reference).dtype  # of a repository, this downloads what is not there yet
    if code:
        say(f"warning: --reference-code remote executes {code} and what it imports from {shown}")
    try:
        from .chain import run_chain
    except ImportError as e:
        raise MissingPackage(f"the Torch reference cannot be imported ({e})") from None
    if stream:
        run, state = run_stream(directory, links[0], seed, Path(report), say, own)
        finished = state.remove
    else:
        run, spool = run_chain(directory, links, seed, Path(report), say, own, python)
        finished = spool.remove
    run["reference"] |= {"path": shown, "revision": reference.revision, "stored": stored}
    _conclude(run, thresholds, report, as_json, finished)


@contextmanager
def about(option: str) -> Iterator[None]:
    """What is wrong with a SRC is told with the option that named it."""
    from ..convert.errors import ConversionError

    try:
        yield
    except ConversionError as e:
        raise ConversionError(f"{option} {e}") from None


def _called(value: str, source: Any) -> str:
    """What to call a SRC: as it was given if that is its directory, else its name, not where that happens to lie."""
    return value if Path(value).is_dir() else source.name


def _conclude(
    run: dict[str, Any],
    profiles: list[Any],
    report: str | None,
    as_json: bool,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Judges and reports; `written` is called when the report is there."""
    from .judge import judge_run
    from .report import terminal_table, verdict_json, write_report

    judgement = judge_run(run, profiles)
    click.echo(err=as_json)
    click.echo(terminal_table(run, judgement), err=as_json)
    if report:
        page = write_report(Path(report), run, judgement)
        written()
        click.echo(f"report: {page}", err=as_json)
    if as_json:
        click.echo(verdict_json(run, judgement))
    sys.exit(OK if judgement.passed else PARITY_FAILED)


def _show_plan(arguments: dict[str, Any], plans: list[Any], as_json: bool) -> None:
    if as_json:
        listed = [{"name": p.name, "what": p.what, "cannot_run": p.impossible or None} for p in plans]
        click.echo(json.dumps(arguments | {"cases": listed}, indent=1))
        return
    for name, value in arguments.items():
        click.echo(f"{name:>14}: {value}")
    click.echo("\nwould run:")
    for plan in plans:
        click.echo(
            f"  {plan.name:<12}{plan.what}" + (f" (cannot: {plan.impossible})" if plan.impossible else "")
        )


def say(text: str) -> None:
    click.echo(text, err=True)


def require_packages(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"{name} is not installed")


@contextmanager
def errors() -> Iterator[None]:
    """Turns what can go wrong into one line and an exit status."""
    from ..convert.errors import EnvironmentProblem

    try:
        yield
    except MissingPackage as e:
        _fail(ENVIRONMENT, f"{e}; {INSTALL}")
    except ModuleNotFoundError as e:
        _fail(ENVIRONMENT, f"the package {e.name} is missing; {INSTALL}")
    except EnvironmentProblem as e:
        _fail(ENVIRONMENT, str(e))
    except ValueError as e:
        _fail(BAD_INPUT, str(e))
    except KeyboardInterrupt:  # click would end with 1, which here means that parity failed
        _fail(INTERRUPTED, "interrupted; the same command goes on where it was")
    except MemoryError:
        _fail(ENVIRONMENT, "not enough memory for the reference and the candidate; close other programs")
    except BrokenPipeError:  # nobody reads on: click ends quietly
        raise
    except OSError as e:
        _fail(ENVIRONMENT, f"{e.filename or 'file'}: {e.strerror or e}")


def _fail(status: int, message: str) -> None:
    click.echo(f"verify-parity: {message}", err=True)
    sys.exit(status)


def main() -> None:
    """Entry point of the command `verify-parity`."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
    cli(prog_name="verify-parity")
