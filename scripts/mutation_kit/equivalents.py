"""Changes after which a graph computes the same, and why. A mutant of such a kind that is caught proves the reason wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .sampling import Mutant


@dataclass(frozen=True)
class Equivalent:
    """Patterns, each for the whole of a mutant's operator, kind and what it changes; and why that changes nothing.

    `only` looks at what it changes too.
    """

    operator: str
    kind: str
    what: str
    why: str
    graph: str = ".*"
    only: Callable[[str], bool] = lambda what: True

    def covers(self, mutant: Mutant) -> bool:
        pairs = (
            (self.operator, mutant.operator),
            (self.kind, mutant.kind),
            (self.what, mutant.what),
            (self.graph, mutant.graph),
        )
        return all(re.fullmatch(pattern, text) for pattern, text in pairs) and self.only(mutant.what)


NEXT_TO_NOTHING = (
    "1e-20 (or that by the scaling factor) beside a sum of sigmoids: in fp32 the sum stays the same to the bit where it "
    "is more than 1e-12"
)


def _of_no_picture(what: str) -> bool:
    """Whether patch number i is compared as i + 1, and i + 1 is no multiple of 4."""
    found = re.search(r"element (\d+) is one more", what)
    return found is not None and (int(found[1]) + 1) % 4 != 0


EQUIVALENTS: tuple[Equivalent, ...] = (
    Equivalent(
        "Add(Ext)?",
        "tensor",
        r"operand [01], (1e-20|4.08831e-21), is (doubled|negated|0): .*",
        NEXT_TO_NOTHING,
    ),
    Equivalent(".*", "earlier|bypass", r".*\bAdd\(1e-20\) .*", NEXT_TO_NOTHING),
    Equivalent("Add", "operator", r"is (Sub|Maximum), not Add\(1e-20\)", NEXT_TO_NOTHING),
    Equivalent(
        *("Cast", "uncast", r"is left out, int(32|64) .* taken for int(32|64) .*"),
        "the same integers; who takes them documents int32 and int64 alike",
    ),
    Equivalent(
        *("ConstantPadND", "number", r"operand 2, 0, is .*"),
        "heads are padded for the kernel: what stands there in queries meets zeros in keys, the other way round too, and "
        "that of values is cut off again",
    ),
    Equivalent(
        *("GreaterEqual", "element", r"operand 0, .*"),
        "shows in a picture of just so many patches, and their number is a multiple of 4",
        graph="vision-.*",
        only=_of_no_picture,
    ),
    Equivalent(
        *("StridedSlice", "bounds", ".*, and selects the same"),
        "a bound past the end is the end, and one under a bit of its mask is not looked at",
    ),
    Equivalent("Concat", "axis", ".*, the only part", "of one part there is nothing to join, along any axis"),
    Equivalent(
        *("MoeInitRoutingV2", "attribute", r"operand 7 is True"),
        "the other direction of the permutation, and of one token with two experts each permutation is its own inverse",
        graph="decode-.*",
    ),
    Equivalent(
        *("Stack", "attribute", r"attribute (N|num) is .*"),
        "the number of parts, which the operator has from its operand: the front end writes it down after the fact",
    ),
)


def why_equivalent(mutant: Mutant) -> str:
    """Empty: it is not known to be."""
    return next((e.why for e in EQUIVALENTS if e.covers(mutant)), "")
