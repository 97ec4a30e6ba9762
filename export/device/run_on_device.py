#!/usr/bin/env python3
"""Climbs a ladder on the device: from the environment over single operators to greedy tokens, and writes a report.

Lies in a bundle and needs Python 3.10, numpy and MindSpore, no Torch. Every rung runs in a process of its own, so a crash,
a hang or a graph that a failed kernel killed stops no other.

    python run_on_device.py --pack pack.npz --report report.json --device Ascend

Exit status: 0 every rung holds, 1 one failed, 2 wrong input, 3 the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DONE, FAILED, BAD_INPUT, ENVIRONMENT = 0, 1, 2, 3
TIMEOUT = 1800  # seconds that one item may take: 33 GB are loaded, or the largest graph compiled, in it
POLL = 0.05

try:
    import device_report
    from device_machine import Context, Skipped
    from device_pack import file_hash
    from device_rungs import BY_NAME, RUNGS
except ModuleNotFoundError as e:
    print(f"run_on_device: the package {e.name} is missing; it needs numpy and MindSpore", file=sys.stderr)
    sys.exit(ENVIRONMENT)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default=str(HERE), metavar="DIR", help="Default: where this file lies.")
    parser.add_argument("--pack", metavar="FILE", help="From verify-parity record, for this bundle.")
    parser.add_argument(
        "--report",
        default="report.json",
        metavar="FILE",
        help="Beside it a .md is written. Default: %(default)s",
    )
    parser.add_argument("--device", default="Ascend", choices=("Ascend", "CPU"), help="Default: %(default)s")
    parser.add_argument("--rungs", default="", metavar="A,B", help=f"Only these: {', '.join(BY_NAME)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="Only items whose name has this in it.")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="S", help="Of one item. Default: %(default)s"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--from-item", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--journal", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- one rung, in a process of its own ------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Runs a rung's items and writes a line before and after each."""
    with open(options.journal, "a", encoding="utf-8") as journal:

        def tell(**entry: Any) -> None:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()

        try:
            context = Context(Path(options.bundle), options.pack, options.device)
            items = BY_NAME[options.worker].items(context)
        except Skipped as e:
            tell(skipped=str(e))
            return
        except Exception as e:
            tell(end=0, item="-", ok=False, says=sentence(e), seconds=0.0)
            return
        for i, (name, run) in enumerate(items):
            if i < options.from_item or options.only not in name:
                continue
            tell(begin=i, item=name)
            started = time.perf_counter()
            try:
                found = run()
            except Skipped as e:
                found = {"ok": True, "says": f"skipped: {e}"}
            except Exception as e:
                context.forget()
                found = {"ok": False, "says": sentence(e)}
            if "observed" in found:
                found["observed"] = _encoded(found["observed"])
            tell(end=i, item=name, seconds=round(time.perf_counter() - started, 3), **found)
        tell(done=True)


def _encoded(value: Any) -> Any:
    return (
        {k: _encoded(v) for k, v in value.items()} if isinstance(value, dict) else device_report.encode(value)
    )


def sentence(error: BaseException) -> str:
    """The first line of an error that says something; MindSpore frames its own with rules and headings."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("---", "- ", "node:"))]
    return f"{type(error).__name__}: {said[0][:300] if said else 'no text'}"


# ---- the ladder -----------------------------------------------------------------------------------------------------


def climb(name: str, options: argparse.Namespace, room: Path) -> dict:
    """Runs a rung, from item to item past whatever ends its process."""
    started = time.perf_counter()
    items: list[dict] = []
    skipped, at = None, 0
    while True:
        journal = room / f"{name}-{at}.jsonl"
        journal.touch()
        died = _watch(name, options, journal, at)
        begun = None
        for entry in map(json.loads, journal.read_text(encoding="utf-8").splitlines()):
            if "skipped" in entry:
                skipped = entry["skipped"]
            elif "begin" in entry:
                begun = entry
            elif "end" in entry:
                at = entry.pop("end") + 1
                begun = None
                items.append(entry)
        if died is None:
            break
        if begun is None:
            items.append({"item": "-", "ok": False, "says": died, "seconds": 0.0})
            break
        items.append({"item": begun["item"], "ok": False, "says": died, "seconds": 0.0})
        at = begun["begin"] + 1
    wrong = [item for item in items if not item["ok"]]
    status = device_report.SKIPPED if skipped else device_report.status_of(items)
    says = skipped or (
        wrong[0]["item"] + ": " + wrong[0]["says"] if wrong else items[-1]["says"] if items else "no items"
    )
    seconds = round(time.perf_counter() - started, 1)
    return {
        "name": name,
        "what": BY_NAME[name].what,
        "status": status,
        "says": says,
        "seconds": seconds,
        "items": items,
    }


def _watch(name: str, options: argparse.Namespace, journal: Path, at: int) -> str | None:
    """Waits for a worker; what ended it before its time, or None."""
    command = [sys.executable, __file__, "--worker", name, "--journal", str(journal), "--from-item", str(at)]
    for option in ("bundle", "pack", "device", "only"):
        if value := getattr(options, option):
            command += [f"--{option}", value]
    with tempfile.TemporaryFile() as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        size, since = 0, time.monotonic()
        try:
            while worker.poll() is None:
                time.sleep(POLL)
                if journal.stat().st_size != size:
                    size, since = journal.stat().st_size, time.monotonic()
                if time.monotonic() - since > options.timeout:
                    return f"no answer within {options.timeout:g} s; the process was ended"
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if worker.returncode == 0:
            return None
        output.seek(0)
        last = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {-worker.returncode}" if worker.returncode < 0 else f"status {worker.returncode}"
        return f"the process ended with {how}; its last line: {last[-1].strip()[:200] if last else 'none'}"


def main() -> int:
    options = arguments()
    options.bundle = str(Path(options.bundle).resolve())
    options.pack = options.pack and str(Path(options.pack).resolve())
    os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
    if options.worker:
        work(options)
        return DONE
    wanted = [name for name in options.rungs.split(",") if name] or list(BY_NAME)
    if unknown := [name for name in wanted if name not in BY_NAME]:
        return _refused(f"--rungs: there is no rung {unknown[0]!r}; choose from {', '.join(BY_NAME)}")
    manifest = Path(options.bundle) / "bundle.json"
    try:
        bundle = json.loads(manifest.read_text(encoding="utf-8"))
        kept = {
            "manifest": file_hash(manifest),
            "target": bundle["target"],
            "dtype": bundle["dtype"],
            "version": bundle["version"],
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        return _refused(f"{manifest}: is no manifest of a bundle ({type(e).__name__}: {e}); give --bundle")
    if bundle.get("kernels") == "cpu":
        return _refused(
            f"{options.bundle}: its graphs call the C++ operators of kimi_vl, which are not in the bundle and on no device; "
            "export it with --target ascend, or with KIMI_VL_KERNELS=off for a trial on a CPU"
        )
    if options.pack and not Path(options.pack).is_file():
        return _refused(f"--pack: {options.pack} is no file; verify-parity record writes one")
    report: dict[str, Any] = {
        "bundle": kept,
        "pack": None,
        "device": {"target": options.device, "name": None, "mindspore": None},
        "rungs": [],
    }
    with tempfile.TemporaryDirectory(prefix="run_on_device.") as room:
        for rung in RUNGS:
            if rung.name in wanted:
                found = climb(rung.name, options, Path(room))
                report["rungs"].append(found)
                print(device_report.line(found), flush=True)
    for rung in report["rungs"]:
        for item in rung["items"]:
            if item["ok"] and rung["name"] == "pack":
                report["pack"] = item["answer"]
            if rung["name"] == "device" and "answer" in item:
                report["device"] = item["answer"]
    report["questions"] = device_report.answers(report["rungs"])
    device_report.write_report(Path(options.report), report)
    failed = [rung["name"] for rung in report["rungs"] if rung["status"] == device_report.FAILED]
    print(
        f"{'FAILED: ' + ', '.join(failed) if failed else 'every rung that ran holds'}; report: {options.report}"
    )
    return FAILED if failed else DONE


def _refused(message: str) -> int:
    print(f"run_on_device: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
