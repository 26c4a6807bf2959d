"""What a step reads: its rows dealt to the ranks, packed, with the gate's noise; prepared while the one before it runs.

    positions of the stream -> rows of this rank, by cost (data/dealing.py) -> packed micro-batches -> the device

Everything random is a function of (seed, position in the stream), so it is the same on any number of ranks, in any
number of micro-batches, and after a resume.

Shapes: K connected rows of a micro-batch, L layers.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from datasets import Dataset
from torch import Tensor

from cc_ds.config import Config
from cc_ds.connection.decision import gumbel_noise_at, uniform_at
from cc_ds.data.batches import BatchStream
from cc_ds.data.dealing import RowCost, RowLengths, deal
from cc_ds.data.packing import Packed, PackedBatch, pack, share
from cc_ds.dist.group import Group


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's part of an optimiser step."""

    micro_batches: list[tuple[PackedBatch, Tensor | None]]
    """Batches, and the gate's noise (K, L) for each; None for plain SFT."""
    english: Packed | None
    """The English prompts of all micro-batches; None for plain SFT."""
    labels: int
    """Target tokens that the loss counts."""
    english_tokens: int
    """English tokens to read."""

    @property
    def sources(self) -> list[str]:
        """File and row of every row."""
        return [source for batch, _ in self.micro_batches for source in batch.sources]


class Reads(IntEnum):
    """What a row's connection is read from."""

    NOTHING = 0
    ENGLISH = 1
    OWN = 2
    """Its own prompt, through the Transform Matrix."""


class StepFeed:
    """An endless iterator over steps. One thread makes the next step while this one trains."""

    def __init__(
        self, rows: Dataset, group: Group, config: Config, pad_token_id: int, num_layers: int, row_cost: RowCost
    ) -> None:
        """Raises ValueError for rows longer than `max_tokens_per_micro_batch`."""
        train = config.train
        self.group, self.train, self.pad_token_id, self.num_layers = group, train, pad_token_id, num_layers
        self.row_cost, self.cc_config = row_cost, config.cc
        self.stream = BatchStream(rows, train.rows_per_step(group.data_size), seed=train.seed)
        self.lengths = RowLengths.of(rows)
        longest, limit = int(self.lengths.target.max()), train.max_tokens_per_micro_batch
        if limit and longest > limit:
            raise ValueError(
                f"max_tokens_per_micro_batch is {limit}, but a row has {longest} tokens; raise it or lower max_length"
            )
        self._ahead: Future[Step] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")

    def __next__(self) -> Step:
        """The next step, on the device; its rows count as dealt."""
        step = (self._ahead or self._prepare()).result()
        self.stream.position += self.stream.batch_size
        self._ahead = self._prepare()
        device = self.group.device
        micro_batches = [
            (batch.to(device), noise if noise is None else noise.to(device, non_blocking=True))
            for batch, noise in step.micro_batches
        ]
        english = None if step.english is None else step.english.to(device)
        return Step(micro_batches, english, step.labels, step.english_tokens)

    def state_dict(self) -> dict[str, int]:
        """The same on every rank: which rows were dealt."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken."""
        self.stream.load_state_dict(state)
        self._ahead = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self) -> Future[Step]:
        return self._thread.submit(self._make, self.stream.next_positions())

    def _make(self, positions: range) -> Step:
        """This rank's part of the step that holds the rows at `positions`, on the host."""
        connect, seed = self.train.method == "cc", self.train.seed
        reads = self._reads(positions) if connect else [Reads.NOTHING] * len(positions)
        batches = []
        for chosen, most_labels in self._deal(positions, reads):
            rows = [self._row(positions[number], reads[number]) for number in chosen]
            batch = pack(rows, self.pad_token_id, connect, most_labels)
            noise = None
            if connect:
                connected = [positions[chosen[row]] for row in batch.connected_rows.tolist()]
                noise = gumbel_noise_at(connected, self.num_layers, seed)
            batches.append((batch, noise))
        english, english_tokens = None, 0
        if connect:
            english, shared = share([batch for batch, _ in batches])
            batches = [(batch, noise) for batch, (_, noise) in zip(shared, batches, strict=True)]
            english_tokens = sum(english.lengths)
        if self.group.device.type == "cuda":
            batches = [(batch.pin_memory(), noise if noise is None else noise.pin_memory()) for batch, noise in batches]
            english = None if english is None else english.pin_memory()
        return Step(batches, english, sum(len(batch.labels) for batch, _ in batches), english_tokens)

    def _reads(self, positions: range) -> list[Reads]:
        """What each row is connected to: a row without English to nothing, the others as they are drawn."""
        dropped, own = self.cc_config.english_dropout, self.cc_config.transform_share
        draws = uniform_at(positions, self.train.seed) if dropped or own else [1.0] * len(positions)
        return [
            Reads.NOTHING
            if draw < dropped or not self.lengths.english[self.stream.index_at(position)]
            else Reads.OWN
            if draw < dropped + own
            else Reads.ENGLISH
            for position, draw in zip(positions, draws, strict=True)
        ]

    def _deal(self, positions: range, reads: list[Reads]) -> list[tuple[list[int], int]]:
        """This rank's micro-batches, as indices into `positions`, and how many labels the fullest rank's has."""
        indices = [self.stream.index_at(position) for position in positions]
        target = self.lengths.target[indices].tolist()
        lengths = zip(target, self.lengths.english[indices].tolist(), strict=True)
        english = [(0, english, own)[which] for which, (own, english) in zip(reads, lengths, strict=True)]
        costs = [self.row_cost(*tokens) for tokens in zip(target, english, strict=True)]
        train = self.train
        dealt = deal(
            costs, target, self.group.data_size, train.gradient_accumulation_steps, train.max_tokens_per_micro_batch
        )
        labels = self.lengths.labels[indices]
        most = [max(int(labels[batch].sum()) for batch in at_once) for at_once in zip(*dealt, strict=True)]
        return list(zip(dealt[self.group.data_rank], most, strict=True))

    def _row(self, position: int, reads: Reads) -> dict[str, Any]:
        row = self.stream.dataset[self.stream.index_at(position)]
        if reads is Reads.ENGLISH:
            return row
        if reads is Reads.NOTHING:
            return row | {"english_input_ids": []}
        prompt = row["input_ids"][: row["anchor"] + 1]
        return row | {"english_input_ids": prompt, "english_anchor": row["anchor"], "own_prompt": True}
