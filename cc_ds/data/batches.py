"""Which rows a step has, in an order that survives a change of machine; and padded tensors of them.

`BatchStream` is one endless sequence of rows, a fresh permutation per epoch, cut into the batches of one optimiser step
each. Its whole state is the number of rows dealt so far, so a run resumes in the middle of an epoch on any number of
ranks. Which rank reads which rows of a step is dealing.py's matter. `CCCollator` pads rows into tensors.

    B rows, T target length, T_en English length
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cc_ds.data.encode import IGNORED


class CCCollator:
    """Pad tokenised rows (see `tokenise_row`) on the right into the tensors of one micro-batch.

    Called with a list of B rows, it returns a dict of int64 tensors
        input_ids, attention_mask, labels             (B, T)       labels -100 on prompt and padding
        anchors                                       (B,)
        english_input_ids, english_attention_mask     (B, T_en)
        english_anchors                               (B,)
    and the lists `langs` and `sources`. T and T_en are the longest row rounded up to a multiple of
    `pad_to_multiple_of`. A row without English has an all-zero English mask and anchor 0; a batch without any has
    T_en = pad_to_multiple_of, since every rank must run both passes in every step. With `connect=False` (plain SFT)
    the english_* keys are left out.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, connect: bool = True) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}.")
        if pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token: set it (its eos_token will do).")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.connect = connect

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        input_ids = [row["input_ids"] for row in rows]
        batch: dict[str, Any] = {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in input_ids], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORED),
            "anchors": torch.tensor([row["anchor"] for row in rows]),
        }
        if self.connect:
            english = [row["english_input_ids"] for row in rows]
            batch |= {
                "english_input_ids": self._pad(english, self.pad_token_id),
                "english_attention_mask": self._pad([[1] * len(ids) for ids in english], 0),
                "english_anchors": torch.tensor([row["english_anchor"] for row in rows]),
            }
        return batch | {"langs": [row["lang"] for row in rows], "sources": [row["source"] for row in rows]}

    def _pad(self, lists: list[list[int]], value: int) -> torch.Tensor:
        blocks = -(-max(1, *map(len, lists)) // self.pad_to_multiple_of)
        padded = torch.full((len(lists), blocks * self.pad_to_multiple_of), value, dtype=torch.int64)
        for index, ids in enumerate(lists):
            padded[index, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return padded


class BatchStream:
    """An endless, deterministic stream of steps, the same on every rank; `next()` gives a list of `batch_size` rows.

    Epoch e orders the rows by a permutation drawn from a generator of its own, seeded by (seed, e); the epochs stand
    one after another. A step holds the `batch_size` rows from `position` on, over all ranks and micro-batches, and may
    reach over the end of an epoch. Resumed with another batch size the stream goes on at the same row, so none is seen
    twice and none left out.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int = 0, position: int = 0) -> None:
        if len(dataset) == 0:
            raise ValueError("the data set is empty: there is nothing to train on.")
        if batch_size < 1 or position < 0:
            raise ValueError(f"impossible stream: {batch_size=}, {position=}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._permutation: list[int] = []

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        positions = self.next_positions()
        self.position += self.batch_size
        return [self.dataset[self.index_at(position)] for position in positions]

    def next_positions(self) -> range:
        """Positions in the stream of the rows of the next step."""
        return range(self.position, self.position + self.batch_size)

    def index_at(self, position: int) -> int:
        """The index in the data set of the row at a position of the stream."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, _permutation(len(self.dataset), self.seed, epoch)
        return self._permutation[offset]

    @property
    def epoch(self) -> float:
        """Epochs dealt so far."""
        return self.position / len(self.dataset)

    def state_dict(self) -> dict[str, int]:
        """The same on every rank."""
        return {"position": self.position, "seed": self.seed, "rows": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises ValueError for other data or another seed: rows would repeat or be
        lost."""
        for name, ours in (("seed", self.seed), ("rows", len(self.dataset))):
            if state[name] != ours:
                raise ValueError(
                    f"cannot resume the data: the checkpoint has {name} {state[name]}, this run has {ours}, so rows "
                    f"would be repeated or left out. Restore the former {'seed' if name == 'seed' else 'data'}."
                )
        self.position = state["position"]


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    mixed = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
    return torch.randperm(rows, generator=generator).tolist()
