"""Packed batches: rows one after another in a single sequence, no padding, positions and anchors known on the host.

    rows -> Packed(English prompts), Packed(target rows), labels, who is connected to whom

One English prompt often stands beside several target rows, one per language: it is read once.

Shapes: B target rows of T tokens in all, K of them connected, to U different English prompts of T_en tokens in all;
N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """The same in pinned memory, from which a GPU copies while the host goes on."""
        return _map(self, Tensor.pin_memory)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch of target rows."""

    target: Packed
    """The B rows, prompt and response."""
    label_positions: Tensor
    """(N,) int64: positions whose next token is a label."""
    labels: Tensor
    """(N,) int64: those tokens."""
    most_labels: int
    """N of the rank that has most of them in its micro-batch of this number."""
    connected_rows: Tensor
    """(K,) int64: the target rows that have an English prompt."""
    connected: Tensor
    """(K,) bool: False for a stand-in, which a batch without any English prompt carries so that every rank runs both
    passes."""
    own: Tensor
    """(K,) bool: whose English prompt is none, but the row's own prompt (`CCConfig.transform_share`)."""
    english_of: Tensor | slice
    """Which English prompt each connected row has: (K,) int64, or a slice where they are simply in order."""
    english: Packed | None
    """The U English prompts; None for plain SFT, and where they are read together with other batches' (`share`)."""
    langs: tuple[str, ...]
    """Each target row's language."""
    sources: tuple[str, ...]
    """Each target row's file and row."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same on a device."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same in pinned memory, from which a GPU copies while the host goes on."""
        return _map(self, Tensor.pin_memory)


def pack(rows: Sequence[dict[str, Any]], pad_token_id: int, connect: bool = True, most_labels: int = 0) -> PackedBatch:
    """Tokenised rows (see `tokenise_row`) as one packed batch.

    Args:
        connect: False leaves English out (plain SFT).
        most_labels: labels of the rank that has most; under ZeRO-3 every rank must name the same.
    """
    target = _segments([row["input_ids"] for row in rows], [row["anchor"] for row in rows])
    labels = torch.tensor([label for row in rows for label in row["labels"]], dtype=torch.int64)
    # Position t predicts token t + 1. A row's first token is never a label, so no segment predicts into the next.
    starts = torch.tensor(target.lengths).cumsum(0)[:-1]
    labels[starts] = IGNORED
    labels[0] = IGNORED
    label_positions = torch.nonzero(labels[1:] != IGNORED).squeeze(1)
    with_english = [index for index, row in enumerate(rows) if row["english_input_ids"]] if connect else []
    english, connected, english_of = None, torch.ones(len(with_english), dtype=torch.bool), slice(0, 0)
    if connect:
        prompts = [(tuple(rows[index]["english_input_ids"]), rows[index]["english_anchor"]) for index in with_english]
        if not prompts:
            with_english, connected, prompts = [0], torch.zeros(1, dtype=torch.bool), [((pad_token_id,), 0)]
        english, english_of = _distinct(prompts)
    return PackedBatch(
        target=target,
        label_positions=label_positions,
        labels=labels[1:][label_positions],
        most_labels=max(most_labels, len(label_positions)),
        connected_rows=torch.tensor(with_english, dtype=torch.int64),
        connected=connected,
        own=torch.tensor([bool(rows[index].get("own_prompt")) for index in with_english], dtype=torch.bool),
        english_of=english_of,
        english=english,
        langs=tuple(row["lang"] for row in rows),
        sources=tuple(row["source"] for row in rows),
    )


def share(batches: Sequence[PackedBatch]) -> tuple[Packed, list[PackedBatch]]:
    """The English prompts of several batches, for one pass over them all, and the batches without their own."""
    prompts, counts = [], []
    for batch in batches:
        own = batch.english
        ids = own.input_ids[0].split(own.lengths)
        starts = torch.tensor([0, *own.lengths]).cumsum(0)[:-1]
        each = [(tuple(i.tolist()), anchor) for i, anchor in zip(ids, (own.anchors - starts).tolist(), strict=True)]
        order = torch.arange(len(each))[batch.english_of].tolist()
        prompts += [each[index] for index in order]
        counts.append(len(order))
    english, english_of = _distinct(prompts)
    order = torch.arange(len(english.lengths))[english_of].split(counts)
    return english, [
        replace(batch, english=None, english_of=_as_slice(part)) for batch, part in zip(batches, order, strict=True)
    ]


def _distinct(prompts: Sequence[tuple[tuple[int, ...], int]]) -> tuple[Packed, Tensor | slice]:
    """(token ids, anchor) of K prompts -> the U different ones, packed, and which of them each is."""
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    order = torch.tensor([number[prompt] for prompt in prompts])
    return _segments([ids for ids, _ in number], [anchor for _, anchor in number]), _as_slice(order)


def _as_slice(order: Tensor) -> Tensor | slice:
    """A slice where indices run in order: what it selects is a view, not a copy."""
    first = int(order[0])
    in_order = torch.equal(order, torch.arange(first, first + len(order)))
    return slice(first, first + len(order)) if in_order else order


def _segments(sequences: Sequence[Sequence[int]], anchors: Sequence[int]) -> Packed:
    lengths = tuple(map(len, sequences))
    starts = [0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]
    return Packed(
        input_ids=torch.tensor([[token for sequence in sequences for token in sequence]], dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        anchors=torch.tensor([start + anchor for start, anchor in zip(starts, anchors)], dtype=torch.int64),
        lengths=lengths,
    )


def _map(item, change: Callable[[Tensor], Tensor]):
    """The same dataclass with every tensor in it changed."""
    values = {each.name: getattr(item, each.name) for each in fields(item)}
    changed = {
        name: change(value) if isinstance(value, Tensor) else _map(value, change)
        for name, value in values.items()
        if isinstance(value, (Tensor, Packed))
    }
    return replace(item, **changed)
