"""What was answered so far, on disk: a run that is killed goes on where it was.

One folder holds one jsonl per rank, so that no two processes write to one file. A line is one answered row under one
digest of settings; lines of other settings (another model, mode, length) stay and are not read. Lines are appended, and
only the last one can be torn: it is cut off when the file is opened to go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cc_ds.dist.group import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said to one row, and what it cost."""

    text: str
    """Decoded (Template.decode_response); empty where it said nothing."""
    tokens_in: int
    """Tokens of the prompt, and of the English prompt where it was read."""
    tokens_out: int
    """Tokens generated, the stop token included."""
    seconds: float
    """The batch's time divided by its rows."""


class Journal:
    """Answers by row id (EvalRow.id), read once and appended to."""

    def __init__(self, folder: str | Path, model: str) -> None:
        """`model` identifies the weights (`model_fingerprint`)."""
        self.folder = Path(folder)
        self.model = model

    def open(self, settings: Mapping[str, Any], group: Group) -> dict[str, Answer]:
        """What any rank of any start answered under `settings`; from now on `add` writes under them.

        Collective: no rank writes before every rank has read. ValueError: a line in the middle of a file is broken.
        """
        content = json.dumps([self.model, settings], sort_keys=True, ensure_ascii=False)
        self.run = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            found |= self._read(file)
        group.barrier()
        self.file = self.folder / f"rank-{group.rank:05d}.jsonl"
        _cut_torn_line(self.file)
        return found

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append, and wait until it is on disk."""
        lines = [
            json.dumps({"id": key, "run": self.run} | asdict(answer), ensure_ascii=False)
            for key, answer in answers.items()
        ]
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write("".join(line + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, file: Path) -> dict[str, Answer]:
        whole, _, _ = file.read_bytes().rpartition(b"\n")
        answers = {}
        # Not splitlines: answers may hold what Unicode calls a line break.
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line)
                key, run = record.pop("id"), record.pop("run")
                if run == self.run:
                    answers[key] = Answer(**record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not an answered row ({error}). Remove the line, or the file to ask again."
                ) from error
        return answers


def model_fingerprint(path: str | Path) -> str:
    """Digest of a model folder's files by name, size and time of change; of the name, for a model on the hub."""
    folder = Path(path)
    parts = [str(path)]
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
        parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cut_torn_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
