"""Packed batches: rows one after another in a single sequence, no padding, positions and anchors known on the host.

    rows -> Packed(English prompts), Packed(target rows), labels, who is connected to whom

Shapes: B target rows of T tokens in all, K English prompts of T_en tokens in all, N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cc_ds.data.encode import IGNORED


@dataclass(frozen=True, slots=True)
class Packed:
    """Segments in one sequence."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64, from 0 in each segment."""
    anchors: Tensor
    """(segments,) int64: each segment's anchor, counted in the whole sequence."""
    lengths: tuple[int, ...]
    """Tokens of each segment, on the host."""

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return _to(self, device)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch of target rows."""

    target: Packed
    """The B rows, prompt and response."""
    label_positions: Tensor
    """(N,) int64: positions whose next token is a label."""
    labels: Tensor
    """(N,) int64: those tokens."""
    connected_rows: Tensor
    """(K,) int64: which target row each English prompt belongs to."""
    connected: Tensor
    """(K,) bool: False for a stand-in, which a batch without any English prompt carries so that every rank runs both
    passes."""
    english: Packed | None
    """The K English prompts; None for plain SFT."""
    langs: tuple[str, ...]
    """Each target row's language."""
    sources: tuple[str, ...]
    """Each target row's file and row."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same on a device."""
        return _to(self, device)


def pack(rows: Sequence[dict[str, Any]], pad_token_id: int, connect: bool = True) -> PackedBatch:
    """Tokenised rows (see `tokenise_row`) as one packed batch; `connect=False` leaves English out (plain SFT)."""
    target = _segments([row["input_ids"] for row in rows], [row["anchor"] for row in rows])
    labels = torch.tensor([label for row in rows for label in row["labels"]], dtype=torch.int64)
    # Position t predicts token t + 1. A row's first token is never a label, so no segment predicts into the next.
    starts = torch.tensor(target.lengths).cumsum(0)[:-1]
    labels[starts] = IGNORED
    labels[0] = IGNORED
    label_positions = torch.nonzero(labels[1:] != IGNORED).squeeze(1)
    with_english = [index for index, row in enumerate(rows) if row["english_input_ids"]] if connect else []
    english, connected = None, torch.ones(len(with_english), dtype=torch.bool)
    if connect:
        if with_english:
            prompts = [rows[index]["english_input_ids"] for index in with_english]
            english = _segments(prompts, [rows[index]["english_anchor"] for index in with_english])
        else:
            with_english, connected = [0], torch.zeros(1, dtype=torch.bool)
            english = _segments([[pad_token_id]], [0])
    return PackedBatch(
        target=target,
        label_positions=label_positions,
        labels=labels[1:][label_positions],
        connected_rows=torch.tensor(with_english, dtype=torch.int64),
        connected=connected,
        english=english,
        langs=tuple(row["lang"] for row in rows),
        sources=tuple(row["source"] for row in rows),
    )


def join(parts: Sequence[Packed]) -> Packed:
    """Several packed sequences as one."""
    offsets = torch.tensor([0, *(part.input_ids.shape[1] for part in parts)]).cumsum(0)
    return Packed(
        input_ids=torch.cat([part.input_ids for part in parts], dim=1),
        position_ids=torch.cat([part.position_ids for part in parts], dim=1),
        anchors=torch.cat([part.anchors + int(offset) for part, offset in zip(parts, offsets)]),
        lengths=tuple(length for part in parts for length in part.lengths),
    )


def _segments(sequences: Sequence[Sequence[int]], anchors: Sequence[int]) -> Packed:
    lengths = tuple(map(len, sequences))
    starts = [0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]
    return Packed(
        input_ids=torch.tensor([[token for sequence in sequences for token in sequence]], dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        anchors=torch.tensor([start + anchor for start, anchor in zip(starts, anchors)], dtype=torch.int64),
        lengths=lengths,
    )


def _to(item, device: torch.device):
    values = {each.name: getattr(item, each.name) for each in fields(item)}
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
        for name, value in values.items()
        if isinstance(value, (Tensor, Packed))
    }
    return replace(item, **moved)
