"""ZeRO-3's all-gathers and reduce-scatters in a step: DeepSpeed's coordinator (0.19) replayed on sizes alone.

The coordinator records the order of modules in one forward and its backward. While the next ones follow it, it gathers
ahead, and keeps what will be used again within `stage3_max_reuse_distance` elements; when they do not, it forgets the
order, gathers each module when it is reached and frees it when it is left, norms and biases included, until it has
recorded an order again. With gradient accumulation CC-Tuning breaks the order in each step: the English pass is a
forward alone, and its backward comes after the last micro-batch's.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py and parameter_offload.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from cc_ds.plan.size import Leaf, ModelSize

Visit = tuple[Leaf, bool]  # a module, and whether it is freed when it is left
Block = tuple[list[Leaf], bool]  # modules, and whether they are a decoder layer


@dataclass(frozen=True, slots=True)
class Traffic:
    """Elements that one step moves over all its passes, and the most that are gathered at a time."""

    gathered: int
    gathered_late: int
    """Of these, gathered when the module was reached, not ahead: computation waits for them."""
    reduced: int
    """Elements of gradients, reduced and scattered."""
    peak: int
    """Most elements gathered at a time, persistent parameters included."""


def step_traffic(
    size: ModelSize, method: str, accumulation: int, zero: dict[str, Any], checkpointing: bool = False
) -> Traffic:
    """The traffic of a step in the steady state.

    Args:
        method: sft, cc or cc-nograd.
        zero: the zero_optimization section of a DeepSpeed configuration, without "auto".
    """
    coordinator = Coordinator(size, zero)
    target, english = _forward(size, connected=method != "sft"), _forward(size, english=True)
    target_forward, english_forward = _visits(target), _visits(english)
    target_backward = _backward(target, checkpointing)
    english_backward = _backward(english, checkpointing) if method == "cc" else []
    reduced = 0
    for _ in range(4):  # the first steps record
        coordinator.start_counting()
        reduced = 0
        if method != "sft" and accumulation > 1:
            coordinator.run(english_forward, new_pass=True)
        for _ in range(accumulation):
            within = english_forward if method != "sft" and accumulation == 1 else []
            coordinator.run([*within, *target_forward], new_pass=True)
            coordinator.run([*target_backward, *(english_backward if within else [])])
            coordinator.end_backward()
            reduced += _trained(target_forward)
        if english_backward and accumulation > 1:
            coordinator.run(english_backward)
            coordinator.end_backward()
            reduced += _trained(english_forward)
        coordinator.gather_persistent()
    return Traffic(coordinator.gathered, coordinator.late, reduced, coordinator.peak)


class Coordinator:
    """Which parameters are whole, what comes next, what is freed."""

    def __init__(self, size: ModelSize, zero: dict[str, Any]) -> None:
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        self.numel = size.unique()
        self.persistent = {key for key, numel in self.numel.items() if numel <= threshold}
        self.prefetch_bucket = zero.get("stage3_prefetch_bucket_size", 50_000_000)
        self.max_reuse_distance = zero.get("stage3_max_reuse_distance", 1_000_000_000)
        self.max_live = zero.get("stage3_max_live_parameters", 1_000_000_000)
        self.mode, self.order, self.queue = "invalid", [], deque()
        self.whole: set[int] = set()
        self.ahead: set[int] = set()  # gathered and not yet used
        self.fetched_for: dict[int, int] = {}
        self.kept: dict[tuple[int, int], set[int]] = {}
        self.unreleased: set[int] = set()
        self.place = self.live = 0
        self.start_counting()

    def start_counting(self) -> None:
        """Forget the counts of the step before."""
        self.gathered = self.late = self.peak = 0

    def run(self, visits: list[Visit], new_pass: bool = False) -> None:
        """Modules in order; `new_pass` where the engine's forward begins."""
        if new_pass:
            self._begin_pass()
        for leaf, freed in visits:
            if self.mode == "complete" and (self.place >= len(self.order) or self.order[self.place] is not leaf):
                self._forget()
            if self.mode == "record":
                self.order.append(leaf)
            self._fetch(leaf)
            if freed:
                self._release(leaf)
            else:
                self.unreleased |= {weight.key for weight in leaf.weights}

    def end_backward(self) -> None:
        """What no hook freed, the embedding among it, is freed after the backward."""
        self._free(self.unreleased - self.persistent)
        self.unreleased = set()

    def gather_persistent(self) -> None:
        """After the optimiser's step, all of them in one call."""
        self.whole |= self.persistent
        self.gathered += sum(self.numel[key] for key in self.persistent)

    def _begin_pass(self) -> None:
        self._free(self.ahead)
        self.mode = {"invalid": "record", "record": "complete", "complete": "complete"}[self.mode]
        params = [(weight.key, place) for place, leaf in enumerate(self.order) for weight in leaf.weights]
        self.queue = deque(params if self.mode == "complete" else [])
        self.fetched_for, self.place, self.live = {}, 0, 0

    def _forget(self) -> None:
        self.mode, self.order = "invalid", []
        self._free(self.ahead)
        self.fetched_for, self.queue = {}, deque()

    def _fetch(self, leaf: Leaf) -> None:
        keys = {weight.key for weight in leaf.weights}
        self._gather(keys - self.whole, late=True)
        self.ahead -= keys
        if self.mode == "complete":
            new = {key for key in keys if self.fetched_for.get(key, -1) < self.place}
            for _ in range(len(new)):
                key, place = self.queue.popleft()
                self.fetched_for[key] = place
            self._gather_ahead()
        self.place += 1

    def _gather_ahead(self) -> None:
        limit = min(self.max_live - self.live, self.prefetch_bucket)
        wanted, numel = set(), 0
        while self.queue and numel < limit:
            key, place = self.queue.popleft()
            if key not in self.whole and key not in wanted:
                wanted.add(key)
                numel += self.numel[key]
            self.fetched_for[key] = max(self.fetched_for.get(key, -1), place)
        self._gather(wanted, late=False)
        self.ahead |= wanted

    def _gather(self, keys: set[int], late: bool) -> None:
        numel = sum(self.numel[key] for key in keys)
        self.gathered += numel
        self.late += numel if late else 0
        self.live += numel
        self.whole |= keys
        self.peak = max(self.peak, sum(self.numel[key] for key in self.whole))

    def _release(self, leaf: Leaf) -> None:
        keys = {weight.key for weight in leaf.weights}
        if self.mode == "complete":
            # DeepSpeed decides once for a module and place, and remembers it even when the order has changed.
            where = (id(leaf), self.place)
            if where not in self.kept:
                self.kept[where] = self._keep(keys)
            keys = keys - self.kept[where]
        self._free(keys)

    def _keep(self, keys: set[int]) -> set[int]:
        kept = {key for key in keys if key in self.persistent or self.fetched_for.get(key, -1) > self.place}
        distance = 0
        for leaf in self.order[self.place :]:
            if distance >= self.max_reuse_distance:
                break
            kept |= {weight.key for weight in leaf.weights}
            distance += sum(weight.numel for weight in leaf.weights)
        return kept

    def _free(self, keys: set[int]) -> None:
        self.live -= sum(self.numel[key] for key in keys & self.whole)
        self.whole -= keys
        self.ahead -= keys


def _forward(size: ModelSize, connected: bool = False, english: bool = False) -> list[Block]:
    layers = [list(layer) for layer in size.layers]
    if connected:
        layers[size.fuse_layer].append(size.decision_maker)
    ends = [] if english else [([size.head], False)]
    return [([size.embedding], False), *((layer, True) for layer in layers), (list(size.norm), False), *ends]


def _visits(forward: list[Block]) -> list[Visit]:
    return [(leaf, True) for block, _ in forward for leaf in block]


def _backward(forward: list[Block], checkpointing: bool) -> list[Visit]:
    """The modules of a forward backwards; with checkpointing each layer's forward runs again first.

    It ends before a layer's last matrix, which is gathered and stays. The hook that would free the embedding hangs on
    its input's gradient, which token ids do not have.
    """
    visits: list[Visit] = []
    for block, is_layer in reversed(forward):
        if checkpointing and is_layer:
            last = max(index for index, leaf in enumerate(block) if any(weight.matrix for weight in leaf.weights))
            visits += [(leaf, index < last) for index, leaf in enumerate(block[: last + 1])]
        visits += [(leaf, leaf.name != "embedding") for leaf in reversed(block)]
    return visits


def _trained(visits: list[Visit]) -> int:
    """Elements of the gradients that a backward over these modules leaves."""
    return sum({w.key: w.numel for leaf, _ in visits for w in leaf.weights if w.trainable}.values())
