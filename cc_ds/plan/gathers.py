"""ZeRO-3's all-gathers and reduce-scatters in a step: DeepSpeed's coordinators (0.19) replayed on sizes alone.

A coordinator records the order of modules in a pass. From then on it gathers ahead, and keeps what the pass will use
again within `stage3_max_reuse_distance` elements. A step of CC-Tuning has three kinds of passes, each with a
coordinator of its own (cc_ds/dist/zero.py, GatherOrders): English forward, target forward and backward, English
backward. They share which parameters are whole.

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
    parameters = Parameters(size, zero)
    usual, english_first, english_last = (Coordinator(parameters, zero) for _ in range(3))
    target, english = _forward(size, connected=method != "sft"), _forward(size, english=True)
    target_forward, english_forward = _visits(target), _visits(english)
    target_backward = _backward(target, checkpointing)
    english_backward = _backward(english, checkpointing) if method == "cc" else []
    for _ in range(3):  # the first steps record
        parameters.start_counting()
        reduced = 0
        if method != "sft":
            english_first.run(english_forward)
        for _ in range(accumulation):
            usual.run([*target_forward, *target_backward])
            parameters.end_backward()
            reduced += _trained(target_forward)
        if english_backward:
            english_last.run(english_backward)
            parameters.end_backward()
            reduced += _trained(english_backward)
        parameters.gather_persistent()
    return Traffic(parameters.gathered, parameters.late, reduced, parameters.peak)


class Parameters:
    """Which parameters are whole on a rank, and what was moved to make them so."""

    def __init__(self, size: ModelSize, zero: dict[str, Any]) -> None:
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        self.numel = size.unique()
        self.persistent = {key for key, numel in self.numel.items() if numel <= threshold}
        self.whole: set[int] = set()
        self.live = 0  # elements of these
        self.ahead: set[int] = set()  # gathered and not yet used
        self.unreleased: set[int] = set()
        self.start_counting()

    def start_counting(self) -> None:
        """Forget the counts of the step before."""
        self.gathered = self.late = self.peak = 0

    def gather(self, keys: set[int], late: bool) -> int:
        """Make them whole; elements that this moves."""
        numel = sum(self.numel[key] for key in keys - self.whole)
        self.gathered += numel
        self.late += numel if late else 0
        self.whole |= keys
        self.live += numel
        self.peak = max(self.peak, self.live)
        return numel

    def free(self, keys: set[int]) -> int:
        """Keep no more than this rank's part of them; elements freed."""
        numel = sum(self.numel[key] for key in keys & self.whole)
        self.whole -= keys
        self.ahead -= keys
        self.live -= numel
        return numel

    def end_backward(self) -> None:
        """What no hook freed, the embedding among it, is freed after the backward."""
        self.free(self.unreleased - self.persistent)
        self.unreleased = set()

    def gather_persistent(self) -> None:
        """After the optimiser's step, all of them in one call, those that are whole too."""
        self.free(self.persistent)
        self.gather(self.persistent, late=False)


class Coordinator:
    """One kind of pass: what comes next in it, what is kept for it."""

    def __init__(self, parameters: Parameters, zero: dict[str, Any]) -> None:
        self.parameters = parameters
        self.prefetch_bucket = zero.get("stage3_prefetch_bucket_size", 50_000_000)
        self.max_reuse_distance = zero.get("stage3_max_reuse_distance", 1_000_000_000)
        self.max_live = zero.get("stage3_max_live_parameters", 1_000_000_000)
        self.order: list[Leaf] = []
        self.known = False  # the order is, from the second pass on
        self.kept: dict[int, set[int]] = {}

    def run(self, visits: list[Visit]) -> None:
        """A pass over modules, always the same."""
        self.parameters.free(set(self.parameters.ahead))
        params = [(weight.key, place) for place, leaf in enumerate(self.order) for weight in leaf.weights]
        self.queue = deque(params)
        self.fetched_for: dict[int, int] = {}
        self.place = self.live = 0
        for leaf, freed in visits:
            self._fetch(leaf)
            if freed:
                self._release(leaf)
            else:
                self.parameters.unreleased |= {weight.key for weight in leaf.weights}
        self.order, self.known = [leaf for leaf, _ in visits], True

    def _fetch(self, leaf: Leaf) -> None:
        keys = {weight.key for weight in leaf.weights}
        self.live += self.parameters.gather(keys, late=True)
        self.parameters.ahead -= keys
        if self.known:
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
            if key not in self.parameters.whole and key not in wanted:
                wanted.add(key)
                numel += self.parameters.numel[key]
            self.fetched_for[key] = max(self.fetched_for.get(key, -1), place)
        self.live += self.parameters.gather(wanted, late=False)
        self.parameters.ahead |= wanted

    def _release(self, leaf: Leaf) -> None:
        keys = {weight.key for weight in leaf.weights}
        if self.known:
            if self.place not in self.kept:  # DeepSpeed decides once for a module and place
                self.kept[self.place] = self._keep(keys)
            keys = keys - self.kept[self.place]
        self.live -= self.parameters.free(keys)

    def _keep(self, keys: set[int]) -> set[int]:
        kept = {key for key in keys if key in self.parameters.persistent or self.fetched_for.get(key, -1) > self.place}
        distance = 0
        for leaf in self.order[self.place :]:
            if distance >= self.max_reuse_distance:
                break
            kept |= {weight.key for weight in leaf.weights}
            distance += sum(weight.numel for weight in leaf.weights)
        return kept


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
