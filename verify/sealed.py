"""JSON files that carry their format, their version and a digest of their content, so that a change is seen."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a file is, and the words for it in messages: `expected` is such a file, `again` how to get another one."""

    format: str
    version: int
    name: str
    expected: str
    again: str
    error: type[ValueError]
    if_missing: str = ""

    def save(self, content: dict[str, Any], path: Path) -> None:
        """Writes `content` with its seal; the file appears whole or not at all."""
        content = {"format": self.format, "version": self.version} | content
        content["sha256"] = _digest(content)
        temporary = path.with_suffix(".json.part")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def load(self, path: Path) -> dict[str, Any]:
        """What was saved, without the digest.

        Raises:
            error: the file is missing, is none of this kind, is damaged, or comes from another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise self.error(f"{path}: cannot be read ({e.strerror}){self.if_missing}") from None
        except ValueError as e:
            raise self.error(f"{path}: is damaged or no {self.name}: not valid JSON ({e})") from None
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise self.error(f"{path}: is no {self.name} of verify-parity; expected {self.expected}")
        if content.get("version") != self.version:
            raise self.error(
                f"{path}: has version {content.get('version')!r}, this program reads {self.version}; {self.again}"
            )
        if content.pop("sha256", None) != _digest(content):
            raise self.error(f"{path}: is damaged: its content does not have the digest it was saved with")
        return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
