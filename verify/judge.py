"""Thresholds, as data, and the verdict on a run.

A profile is a JSON file: a list of gates, each with the taps it is for (a pattern), the metric, and the limit. A
metric that is a list of events with a `margin` is counted; events whose margin is below `tie`, as a share of the
largest logit, are toss-ups of the reference's own and are noted apart. A limit may be a multiple of what rounding costs
the reference itself (`times_own`), which a run with rounded arithmetic holds, and may be for the sum over the suite.

Some things fail whatever the profile says: a NaN or an infinity, a case in which the candidate raised, a tap that the
candidate promised and did not give, a run without cases.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .device import findings as device_findings
from .metrics import NOT_A_TIE

# In network order; those of layer 0 stand for those of every layer.
TAPS = (
    *("inputs", "vision_out", "projector_out", "inputs_embeds", "router.0", "forced.0", "layers.0"),
    *("logits", "last_logits", "perplexity", "greedy", "tapped_logits", "comparable", "weights"),
)
PROFILES = Path(__file__).parent / "profiles"
SUITE = "suite"  # the case of a finding that is on all cases together
ON_DEVICE = " on the device"  # ends the case of a finding of a device's report
WEIGHTS = "weights"  # and of the one on the weights' bits, which no case ran for


class ProfileError(ValueError):
    """A profile that does not exist or cannot be understood, or a run that lacks what it asks for."""


@dataclass(frozen=True)
class Gate:
    """Attributes:
    at_most: the limit; with `times_own` a factor of the same metric between the reference's runs in the candidate's
        dtype and in fp32.
    floor: with `times_own`, what is allowed in any case.
    suite: the metric's sum over all cases is judged, not each case.
    """

    taps: str
    metric: str
    at_most: float
    tie: float = 0.0
    why: str = ""
    times_own: bool = False
    floor: float = 0.0
    suite: bool = False


@dataclass(frozen=True)
class Profile:
    """Attributes:
    arithmetic: what it is for, "lifted" (fp32) or "rounded"; empty: both.
    suite_version: of the suite whose figures the limits come from, where they come from one (an envelope's do).
    """

    name: str
    what: str
    gates: tuple[Gate, ...]
    arithmetic: str = ""
    suite_version: int | None = None

    def limit(self, tap: str, metric: str) -> float | None:
        """What is allowed, where a gate says so."""
        absolute = (g for g in self.gates if g.metric == metric and not g.times_own)
        return next((g.at_most for g in absolute if fnmatch.fnmatch(tap, g.taps)), None)


@dataclass(frozen=True)
class Finding:
    """One gate on one tap of one case."""

    case: str
    tap: str
    metric: str
    value: float | str
    limit: float
    ok: bool
    says: str = ""

    @property
    def where(self) -> str:
        return describe_tap(self.tap)


@dataclass
class Verdict:
    """On one link: `findings` in the order of cases, taps in network order; `notes` is what a reader must know beside
    them."""

    profile: Profile
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Finding]:
        return [f for f in self.findings if not f.ok]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def first_bad(self) -> Finding | None:
        """The failure that lies first in the network; of several cases, the first."""
        return min(self.failures, key=lambda f: network_order(f.tap), default=None)

    def of_case(self, name: str) -> list[Finding]:
        return [f for f in self.findings if f.case == name]


@dataclass(frozen=True)
class Judgement:
    """On a whole run: `verdicts` in the order of its links."""

    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def checks(self) -> int:
        return sum(len(verdict.findings) for verdict in self.verdicts)

    @property
    def failures(self) -> list[Finding]:
        return [f for verdict in self.verdicts for f in verdict.failures]

    @property
    def notes(self) -> list[str]:
        """Each once, in the order of links."""
        return list(dict.fromkeys(note for verdict in self.verdicts for note in verdict.notes))

    @property
    def bad_link(self) -> int | None:
        """The first link of the chain that failed."""
        return next((n for n, verdict in enumerate(self.verdicts) if not verdict.passed), None)

    @property
    def first_bad(self) -> Finding | None:
        """The first bad place of that link."""
        return None if self.bad_link is None else self.verdicts[self.bad_link].first_bad

    @property
    def profiles(self) -> dict[str, Profile]:
        return {verdict.profile.name: verdict.profile for verdict in self.verdicts}


def network_order(tap: str) -> tuple[int, int, int]:
    """Sorts taps along the way of the data; within a layer, the router comes before the layer's outputs."""
    stem, _, number = tap.partition(".")
    if f"{stem}.0" in TAPS:
        return TAPS.index("router.0"), int(number), TAPS.index(f"{stem}.0")
    # An error has no place in the network: any other failure names more.
    return (TAPS.index(stem) if stem in TAPS else len(TAPS)), 0, 0


def describe_tap(tap: str) -> str:
    """A tap in words."""
    stem, _, number = tap.partition(".")
    if stem == "layers":
        return f"decoder layer {number}"
    if stem == "router":
        return f"router of decoder layer {number}"
    if stem == "forced":
        return f"decoder layer {number} on the reference's input"
    names = {
        "inputs": "the candidate's own processor",
        "vision_out": "vision tower",
        "projector_out": "projector",
        "inputs_embeds": "input embeddings",
        "last_logits": "logits of the graphs that generate",
        "tapped_logits": "graphs with taps",
        "comparable": "comparable tokens",
        "greedy": "greedy generation",
        "error": "the candidate's call",
        "weights": "the weights",
    }
    return names.get(stem, stem)


DEFAULTS = {"lifted": "strict", "rounded": "bf16"}  # by arithmetic


def load_profile(name: str) -> Profile:
    """A profile by its name, or by the path of a JSON file of one's own.

    Raises:
        ProfileError: there is none, or it is not in the form described above.
    """
    own = Path(name)
    path = own if own.suffix == ".json" else PROFILES / f"{name}.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.json")))
        raise ProfileError(f"--profile: there is no {name!r}; give one of {known}, or a .json file") from None
    except ValueError as e:
        raise ProfileError(f"{path}: is not valid JSON ({e})") from None
    try:
        gates = tuple(Gate(**gate) for gate in raw["gates"])
        version = raw.get("suite", {}).get("version")
        profile = Profile(raw["name"], raw["what"], gates, raw.get("arithmetic", ""), version)
        if profile.arithmetic not in ("", *DEFAULTS):
            raise TypeError(f"arithmetic is {profile.arithmetic!r}, expected {' or '.join(DEFAULTS)}")
        for gate in profile.gates:
            if isinstance(gate.at_most, bool) or not isinstance(gate.at_most, int | float):
                raise TypeError(f"at_most is {gate.at_most!r}, expected a number")
            any_layer = re.sub(r"\.\d+$", ".*", gate.taps)
            if not any(fnmatch.fnmatch(tap, any_layer) for tap in TAPS):
                raise TypeError(f"no tap matches {gate.taps!r}; taps are {', '.join(TAPS)}")
            if gate.suite and not gate.times_own:
                raise TypeError(f"the gate on {gate.taps} is on the suite, so it needs times_own")
        if not profile.gates:
            raise TypeError("it has no gates")
    except (KeyError, TypeError, AttributeError) as e:
        raise ProfileError(f"{path}: is no profile ({e}); see strict.json for the form") from None
    return profile


def suited(profiles: Sequence[Profile], candidate: dict[str, Any]) -> Profile:
    """The first of the profiles that is for a candidate's arithmetic, else the default one for it."""
    arithmetic = candidate.get("arithmetic", "lifted")
    fits = (profile for profile in profiles if profile.arithmetic in ("", arithmetic))
    return next(fits, None) or load_profile(DEFAULTS[arithmetic])


def judge_run(run: dict[str, Any], profiles: Sequence[Profile] = ()) -> Judgement:
    """Holds each link of a run against the profile that suits it, see :func:`suited`.

    Raises:
        ProfileError: a gate asks for a metric that the run does not have, or a profile is for no link.
    """
    kinds = {link["candidate"].get("arithmetic", "lifted") for link in run["links"]}
    for profile in profiles:
        if profile.arithmetic not in ("", *kinds):
            raise ProfileError(
                f"--profile: {profile.name} is for {profile.arithmetic} arithmetic, but what the run executed is "
                f"{' and '.join(sorted(kinds))}"
            )
    verdicts = []
    for link in run["links"]:
        verdict = judge(link, suited(profiles, link["candidate"]))
        stored, held = run["reference"]["stored"], link["candidate"]["dtype"]
        if stored != held:
            verdict.notes.insert(
                0, f"the checkpoint's weights are {stored}, the candidate's {held}: they differ by rounding"
            )
        verdicts.append(verdict)
    return Judgement(tuple(verdicts))


def judge(link: dict[str, Any], profile: Profile) -> Verdict:
    """Holds a link, as :func:`run_suite` gives it, against a profile.

    Raises:
        ProfileError: a gate asks for a metric that the run does not have, or the limits are for another suite.
    """
    measured, ran = profile.suite_version, link["suite"]["version"]
    if measured not in (None, ran):
        raise ProfileError(
            f"profile {profile.name}: its limits were measured with version {measured} of the suite, but the run is of "
            f"version {ran}, whose inputs are others; measure them again with verify-parity envelope"
        )
    verdict = Verdict(profile)
    promised = bool(link["candidate"]["taps"])
    if not link["cases"]:
        verdict.findings.append(Finding("-", "error", "cases", 0, 1, False, "no case was run at all"))
    for case in link["cases"]:
        verdict.findings += _judge_case(case, profile, promised, verdict.notes)
    verdict.findings += _judge_suite(link["cases"], profile)
    if link.get("weights"):
        verdict.findings.append(_judge_weights(link["weights"], verdict.notes))
    if "device" in link:
        verdict.findings += _judge_device(link["device"], verdict.notes)
    missing = sorted({tap for case in link["cases"] for tap in case["missing"]}, key=network_order)
    if missing and not promised:
        kinds = {"router": "choices of experts", "layers": "hidden states of the decoder layers"}
        words = dict.fromkeys(kinds.get(tap.split(".")[0], describe_tap(tap)) for tap in missing)
        verdict.notes.append(
            f"not available in this candidate, so not judged: {', '.join(words)} "
            "(export with --taps to have them); logits and tokens were judged"
        )
    if link["candidate"].get("streamed"):
        continued = [case["name"] for case in link["cases"] if len(case["calls"]) > 1]
        verdict.notes.append(
            "layer by layer no tokens are generated, because each would take all layers, and graphs that generate do not "
            "run; cached decoding was judged by "
            + (f"prompts that are continued ({', '.join(continued)})" if continued else "no case of this run")
        )
    if unwitnessed := link["candidate"].get("unwitnessed"):
        verdict.notes.append(
            f"unwitnessed operators: {', '.join(unwitnessed)}; the rules that executed them rest on documents and on "
            "second formulations of this project alone"
        )
    for skipped in link["suite"]["skipped"]:
        verdict.notes.append(f"case {skipped['name']} did not run: {skipped['why']}")
    if unused := link["suite"].get("unused"):
        verdict.notes.append(f"graphs that no case ran, so not judged: {', '.join(unused)}")
    for layer in link["suite"]["experts"]:
        if layer["used"] < layer["of"]:
            verdict.notes.append(
                f"decoder layer {layer['layer']}: {layer['used']} of {layer['of']} experts were used by any case; "
                "the others were not verified"
            )
    return verdict


def _judge_weights(weights: dict[str, Any], notes: list[str]) -> Finding:
    """One finding on all of them."""
    wrong = [f"{e['name']} ({e['values']} values, first at {e['at']})" for e in weights["different"]]
    wrong += [f"{name} is missing" for name in weights["missing"]]
    wrong += [f"{name} belongs to nothing of the checkpoint" for name in weights["unknown"]]
    count = weights["different_parameters"] + len(weights["missing"]) + len(weights["unknown"])
    if weights["rounded_to"]:
        notes.append(f"weights were held against the checkpoint's rounded to {weights['rounded_to']}")
    first = wrong[0] if wrong else ""
    says = f"weights: {count} of {weights['parameters']} parameters are not bit for bit the checkpoint's: {first}"
    if count > 1:
        says += f" and {count - 1} more"
    return Finding(WEIGHTS, "weights", "different_parameters", count, 0, count == 0, says if wrong else "")


def _judge_device(device: dict[str, Any], notes: list[str]) -> Iterator[Finding]:
    """A device's own figures, with the limits of its pack; of its rungs those without which they say nothing."""
    rungs = {rung["name"]: rung for rung in device["rungs"]}
    for name in device["required"]:
        if rungs.get(name, {}).get("status") != "passed":
            says = f"rung {name} of the device's report did not pass: {rungs.get(name, {}).get('says', 'it did not run')}"
            yield Finding("ladder" + ON_DEVICE, "error", "raised", says, 0, False, says)
    for rung in device["rungs"]:
        if rung["status"] == "failed" and rung["name"] not in device["required"]:
            notes.append(f"device, rung {rung['name']} failed: {rung['says']}")
    for case in device["cases"]:
        for tap in case["missing"]:
            says = "the device's report does not have it at every place that the pack asks for"
            yield Finding(case["name"] + ON_DEVICE, tap, "missing", 1, 0, False, says)
    for f in device_findings(device):
        says = "NaN or infinity" if f["metric"] == "nonfinite" else ""
        yield Finding(f["case"] + ON_DEVICE, f["tap"], f["metric"], f["value"], f["limit"], f["ok"], says)


def _judge_case(
    case: dict[str, Any], profile: Profile, promised: bool, notes: list[str]
) -> Iterator[Finding]:
    name = case["name"]
    if case["error"]:
        yield Finding(name, "error", "raised", case["error"], 0, False, case["error"])
    elif promised:
        for tap in case["missing"]:
            yield Finding(
                name, tap, "missing", 1, 0, False, "the candidate offers taps, but did not give this one"
            )
    for tap, metrics in case["taps"].items():
        if count := metrics.get("nonfinite"):
            first = f", first at {metrics['nonfinite_at']}" if "nonfinite_at" in metrics else ""
            says = f"NaN or infinity at {count} places{first}"
            yield Finding(name, tap, "nonfinite", count, 0, False, says)
            continue
        if ties := metrics.get("ties"):
            notes.append(f"case {name}, {describe_tap(tap)}: {ties} choices of experts differ in a tie")
        for gate in profile.gates:
            if not gate.suite and fnmatch.fnmatch(tap, gate.taps):
                yield _judge_gate(name, tap, metrics, gate, notes, case)


def _judge_suite(cases: list[dict[str, Any]], profile: Profile) -> Iterator[Finding]:
    """The gates for sums over all cases; a case without the tap, or without places to compare, adds nothing."""
    for gate in profile.gates:
        if not gate.suite:
            continue
        taps = dict.fromkeys(tap for case in cases for tap in case["taps"] if fnmatch.fnmatch(tap, gate.taps))
        for tap in taps:
            found = [(case, case["taps"][tap]) for case in cases if tap in case["taps"]]
            pairs = [(_metric(m, tap, gate), _own(case, tap, gate)) for case, m in found]
            pairs = [pair for pair in pairs if None not in pair]
            value, own = (sum(column) for column in zip(*pairs)) if pairs else (0.0, 0.0)
            yield _against_own(SUITE, tap, gate, value, own)


def _metric(metrics: dict[str, Any], tap: str, gate: Gate) -> Any:
    if gate.metric not in metrics:
        raise ProfileError(f"gate on {gate.taps}: the run has no metric {gate.metric!r} for {tap}")
    return metrics[gate.metric]


def _own(case: dict[str, Any], tap: str, gate: Gate) -> float | None:
    """The same metric of what rounding costs the reference, None where no place was left to measure it at.

    Raises:
        ProfileError: the run did not measure it.
    """
    measured = case.get("calibration", {}).get(tap, {})
    if gate.metric not in measured:
        raise ProfileError(
            f"gate on {gate.taps}: {gate.metric} is judged by the reference's own rounding, which the run does not hold for "
            f"{tap} in case {case['name']}; run with --arithmetic rounded"
        )
    return measured[gate.metric]


def _against_own(case: str, tap: str, gate: Gate, value: float, own: float) -> Finding:
    """Of a gate with `times_own`: the value is how many times the reference's own it is."""
    ok = value <= max(gate.at_most * own, gate.floor)
    times = value / own if own else math.inf if value else 0.0
    says = f"times what rounding costs the reference itself: {value:.2g} against {own:.2g}"
    return Finding(case, tap, gate.metric, min(times, NOT_A_TIE), gate.at_most, ok, says)


def _judge_gate(
    name: str, tap: str, metrics: dict[str, Any], gate: Gate, notes: list[str], case: dict[str, Any]
) -> Finding:
    value = _metric(metrics, tap, gate)
    if value is None:  # nothing left to compare; "comparable" judges that
        return Finding(name, tap, gate.metric, "no places", gate.at_most, True)
    if gate.times_own:
        own = _own(case, tap, gate)
        if own is None:
            return Finding(name, tap, gate.metric, "no places", gate.at_most, True)
        return _against_own(name, tap, gate, value, own)
    says = gate.why
    if isinstance(value, list):
        scale = metrics.get("scale", metrics.get("ref_max", 0.0))
        wrong = [event for event in value if event["margin"] >= gate.tie * scale]
        if len(wrong) < len(value):
            notes.append(
                f"case {name}, {describe_tap(tap)}: {len(value) - len(wrong)} tokens differ in a tie"
            )
        if wrong and "step" in wrong[0]:
            first = min(wrong, key=lambda event: event["step"])
            says = f"row {first['row']} at step {first['step']}, {_how_far(first)}"
        value = len(wrong)
    return Finding(name, tap, gate.metric, value, gate.at_most, value <= gate.at_most, says)


def _how_far(divergence: dict[str, Any]) -> str:
    if divergence["candidate"] is None:
        return "where the candidate stopped"
    if divergence["margin"] >= NOT_A_TIE:
        return "with a token that is not even the reference's second best"
    return f"where the reference's margin is {divergence['margin']:.2g}"
