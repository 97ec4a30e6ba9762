"""Several candidates held against one reference: the chain from the published model to what ships, in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..modeling.configuration import ModelConfig
from . import candidates
from .candidates import CandidateError, Found, inspect
from .cases import SUITE_VERSION, Plan, Source, select, suite
from .own_inputs import OwnInputs, OwnSource
from .prompts import source_for
from .remote import RemoteOracle
from .runner import run_suite
from .runs import assembled, environment, file_hashes
from .spool import KeptReference, Spool


@dataclass
class ChainLink:
    """A candidate as it is to be run; `path` is what it is called, `device` what a device's report of it says."""

    path: str
    found: Found
    plans: list[Plan]
    device: dict[str, Any] | None = None


def find_links(
    given: Sequence[tuple[str, Path]],
    through: str | None,
    arithmetic: str,
    names: Sequence[str],
    own: Sequence[Plan] = (),
) -> list[ChainLink]:
    """The candidates in the order of the chain: the network, reloaded bundles, interpreted ones, rounded ones.

    The network takes the sizes of the first bundle, so that all run the same inputs. With rounded arithmetic a bundle is
    run in fp32 too: some faults do not show in low precision. `own` cases stand beside the suite's.

    Raises:
        CandidateError, BundleError, ConfigError: a directory is no candidate, or cannot be run so.
        CaseError: there is no case of a name.
    """
    found: list[tuple[str, Found]] = []
    refused: CandidateError | None = None
    for called, path in given:
        try:
            first = inspect(path, through)
        except CandidateError:
            if through is None or len(given) == 1 or not path.is_dir():
                raise
            first = inspect(path)  # of several, the option is for the bundles
        found.append((called, first))
        if arithmetic == "rounded":
            try:
                found.append((called, inspect(path, through, arithmetic)))
            except CandidateError as e:
                refused = e
    if refused and not any(f.rounded for _, f in found):
        raise refused
    sizes = next((f.limits for _, f in found if f.kind == "bundle"), None)
    links = []
    for called, f in sorted(found, key=lambda pair: _order(pair[1])):
        sized = replace(f, limits=sizes) if sizes and f.kind != "bundle" else f
        links.append(ChainLink(called, sized, select([*suite(f.config, sized.limits), *own], names)))
    return links


def _order(found: Found) -> tuple[int, str, bool]:
    return (("network", "bundle", "interpreter").index(found.stage), found.target, bool(found.rounded))


def run_chain(
    reference: Path,
    links: Sequence[ChainLink],
    seed: int,
    report: Path,
    say: Callable[[str], None],
    own: OwnInputs | None = None,
    python: str | None = None,
) -> tuple[dict[str, Any], Spool]:
    """Runs every link, and compares weights; the run lacks only what the reference is called.

    Cases that an unfinished run of the same in `report` has done are not done again. Remove the spool when the run is
    saved.

    Args:
        own: a user's own cases, if the links' plans hold such.
        python: runs the checkpoint's own code as the reference; None: the reference is transformers'.

    Raises:
        EnvironmentProblem: the checkpoint's code does not run.
        ValueError: the reference or a candidate cannot be loaded; the message says why.
        ImportError: Torch or transformers is missing.
    """
    import torch

    from .oracle import OtherKernels, build_oracle
    from .weights import compare

    started = time.time()
    config = ModelConfig.from_file(reference)
    source = source_of(reference, config, own)
    say("hashing what is compared")
    files = {path: file_hashes(path) for path in {reference, *(link.found.path for link in links)}}
    if python:
        files[reference] |= file_hashes(reference, (".py",))
    versions = environment()
    key = {
        "suite": SUITE_VERSION,
        "seed": seed,
        "versions": versions,
        "reference": files[reference],
        "inputs_dir": own.files if own else {},
        "python": python,
        "links": [
            [_name(n, link), files[link.found.path], [repr(p) for p in link.plans]]
            for n, link in enumerate(links)
        ],
    }
    spool = Spool(report, key, keep_taps=len(links) > 1)
    if spool.found:
        say(f"going on with an unfinished run of the same: {spool.found} cases are done")
    say("loading the Torch reference")
    remote = RemoteOracle(reference, python) if python else None
    oracle = None if remote else build_oracle(reference)
    kept = KeptReference(remote or oracle, spool, "fp32")
    other = KeptReference(OtherKernels(oracle), spool, "other") if oracle else None
    rounded: dict[str, KeptReference] = {}
    total = sum(not plan.impossible for link in links for plan in link.plans)
    count = iter(range(1, total + 1))
    made, compared = [], {}
    for n, link in enumerate(links):
        found = link.found
        dtype = found.rounded
        if dtype and dtype not in rounded:
            rounded[dtype] = KeptReference(build_oracle(reference, getattr(torch, dtype)), spool, dtype)
        say(f"loading the candidate {link.path} ({found.kind}{found.how})")
        candidate = candidates.open_candidate(found)
        result = run_suite(
            kept,
            candidate,
            link.plans,
            source,
            seed,
            lambda text: say(f"[{next(count)}/{total}] {text}"),
            rounded.get(dtype),
            other,
            (spool, _name(n, link)),
        )
        del candidate
        gc.collect()  # a model is gone before the next one comes
        if found.path not in compared and found.kind != "published directory":
            say("comparing weights")
            compared[found.path] = compare(reference, found.path, config)
        result["candidate"] |= {"path": link.path, "files": files[found.path]}
        if found.path in compared:
            result["weights"] = compared[found.path]
        if own:
            result["suite"]["inputs_dir"] = own.files
        if link.device:
            result["device"] = link.device
        made.append(result)
    if remote:
        remote.close()
    run = assembled(started, versions, files[reference], made)
    if remote:
        run["reference"] |= remote.describe()
    return run, spool


def source_of(reference: Path, config: ModelConfig, own: OwnInputs | None) -> Source:
    """Where cases of this reference come from."""
    source = source_for(reference, config)
    return OwnSource(source, own, reference) if own else source


def _name(n: int, link: ChainLink) -> str:
    return f"{n} {link.found.stage} {link.found.arithmetic}"
