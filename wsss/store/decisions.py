"""Decisions about the images of a label store: the file that the report page saves, or a list of names.

    {"store": "labels", "decisions": {"a/dog.jpg": {"decision": "reject", "label": "3f0c1a9b52de"}}}

A decision is about one label: when the image is labeled again with another result, it no longer counts. A list (any other text
file) has one image a line, with empty lines and comments (``# ...``), and rejects all of them, whatever their labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import SpecError, UsageError, WsssError
from ..reading.documents import decode_text, parse_json, read_bytes
from ..reading.typed_json import checked
from .local import Record

Verdict = Literal["accept", "reject", "unsure"]
MAX_BYTES = 1 << 28
"""Of a file of decisions: about 100 bytes an image."""
NAMED = 3
"""Images that a message names."""
_HINT = "the report page saves this file; a list has one image a line"


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about an image.

    label: `label_version` of the label that was looked at; empty for every label.
    """

    decision: Verdict
    label: str = ""


@dataclass(frozen=True, slots=True)
class _File:
    decisions: Mapping[str, Decision]
    store: str = ""


def label_version(record: Record) -> str:
    """A name for the label of one image, 12 hexadecimal digits; another photograph, class, box or score gives another name.

    Args:
        record: the manifest line of a labeled image.
    """
    boxes = [[box.get(key) for key in ("label", "score", "xyxy", "won_px")] for box in record.get("boxes", [])]
    content = [*(record.get(key) for key in ("sha256", "classes", "void_px")), boxes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_rejected(path: str | Path, *, flag: str) -> dict[str, Decision]:
    """The rejected images of a file of decisions or of a list, by name.

    Args:
        flag: the flag or argument that the file was given with, for messages.

    Raises:
        UsageError: the file rejects no image. WsssError: it cannot be read, or is neither.
    """
    data = read_bytes(Path(path), where=f"{flag} {path}", hint=_HINT, max_bytes=MAX_BYTES)
    text = decode_text(data, f"{flag} {path}", hint=_HINT)
    if text.lstrip().startswith("{"):
        try:
            found: _File = checked(_File, parse_json(text, f"{flag} {path}", hint=_HINT), "")
        except SpecError as error:
            raise WsssError(f"{flag} {path}: {error.message}", hint=_HINT) from None
        rejected = {name: each for name, each in found.decisions.items() if each.decision == "reject"}
        if not rejected:
            counts = f"{len(found.decisions)} decisions, none of which rejects an image" if found.decisions else "no decision"
            raise UsageError(f"{flag} {path}: has {counts}", hint=f"leave out {flag}, or reject images in the report")
        return rejected
    lines = [line.strip(" \t\r") for line in text.split("\n")]
    rejected = {line.removeprefix("./"): Decision("reject") for line in lines if line and not line.startswith("#")}
    if not rejected:
        raise UsageError(f"{flag} {path}: names no image", hint=_HINT)
    return rejected


@dataclass
class Exclusion:
    """Leaves out the rejected images of a store, and counts them.

    Args:
        path: the file. flag: as of `read_rejected`.
    """

    path: str | Path
    flag: str = "--exclude"
    left_out: int = 0
    outdated: list[str] = field(default_factory=list)
    """Images that were labeled again since they were rejected; they are not left out."""

    def __post_init__(self) -> None:
        self._rejected = read_rejected(self.path, flag=self.flag)
        self._unseen = dict.fromkeys(self._rejected)

    def keeps(self, record: Record) -> bool:
        """Whether an image stays; ``record`` is its manifest line. Called once for each image."""
        self._unseen.pop(record["path"], None)
        if self.excludes(record):
            self.left_out += 1
            return False
        if record["path"] in self._rejected:
            self.outdated.append(record["path"])
        return True

    def excludes(self, record: Record) -> bool:
        """Whether an image is left out; counts nothing."""
        decision = self._rejected.get(record["path"])
        if decision is None:
            return False
        return not decision.label or "error" in record or decision.label == label_version(record)

    def filter(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that stay."""
        return (record for record in records if self.keeps(record))

    def report(self, warn: Callable[[str], None]) -> None:
        """Say what was left out and what does not fit, after all images were seen.

        Raises:
            WsssError: the store has none of the images.
        """
        where = f"{self.flag} {self.path}"
        if len(self._unseen) == len(self._rejected):
            raise WsssError(
                f"{where}: none of its images is in the store: {_counted(list(self._unseen))}",
                hint="give the file of this store's report; names are paths below the folder that was labeled",
            )
        warn(f"{where}: {self.left_out} images are left out")
        if self.outdated:
            warn(f"{where}: {_counted(self.outdated)} were labeled again since they were rejected, and stay")
        if self._unseen:
            warn(f"{where}: {_counted(list(self._unseen))} are not in the store")


def _counted(names: list[str]) -> str:
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} images ({', '.join(names[:NAMED])}{more})"


def exclusion(path: str | Path | None, flag: str = "--exclude") -> Exclusion | None:
    """The exclusion of a file; None without one."""
    return None if path is None else Exclusion(path, flag)
