"""Collect the FFN outputs that a Transform Matrix is fitted on: S of target prompts, E of their English prompts.

Pairs of rendered prompts -> batches of like length -> the model's anchor activations -> shards on disk. Each shard
names its pairs (`pair_id`), so nothing is ever matched by order. Both passes are without a connection.

Shapes: N pairs, L layers, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cc_ds.infer.prompts import length_batches, pad_prompts, progress

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import RenderedPrompt

_TENSORS = ("source", "target", "pair_id", "english_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPair:
    """A target prompt and its English prompt, rendered with the model's template."""

    pair_id: int
    """Names the pair in every shard; unique in a collection."""
    lang: str
    """Language of the target prompt."""
    source: RenderedPrompt
    """The target prompt."""
    target: RenderedPrompt
    """The English prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Activations of N pairs, in ascending order of pair_id."""

    source: Tensor
    """S, (N, L, H), in the model's dtype, on the CPU."""
    target: Tensor
    """E, (N, L, H), likewise."""
    pair_id: Tensor
    """(N,) int64."""
    english_id: Tensor
    """(N,) int64, equal exactly where two pairs share one English prompt."""
    langs: list[str]
    """N target languages."""

    def select(self, pair_ids: Sequence[int]) -> Activations:
        """The pairs with these ids, in this order."""
        place = {pair_id: row for row, pair_id in enumerate(self.pair_id.tolist())}
        rows = [place[pair_id] for pair_id in pair_ids]
        tensors = {name: getattr(self, name)[rows] for name in _TENSORS}
        return Activations(**tensors, langs=[self.langs[row] for row in rows])


def collect_activations(
    model: CCModelForCausalLM,
    pairs: Sequence[PromptPair],
    folder: str | Path,
    pad_id: int = 0,
    batch_size: int = 8,
    pairs_per_shard: int = 512,
) -> Activations:
    """Read every prompt of `pairs` and return the activations at their anchors, streamed through shards in `folder`.

    The model is put into eval mode for the time. Pairs that share an English prompt stand in one shard where they
    fit, and the prompt is read once there. ValueError: no pairs, a pair id twice, or a folder that already holds
    shards (of which model, nobody could tell).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("pairs-*.safetensors")):
        raise ValueError(f"{folder} already holds activation shards; give an empty folder, or delete them")
    if not pairs:
        raise ValueError("there are no prompt pairs to collect activations of")
    if len({pair.pair_id for pair in pairs}) < len(pairs):
        raise ValueError("pair_id must be unique: two pairs have the same")
    english = {key: number for number, key in enumerate(dict.fromkeys(_key(pair.target) for pair in pairs))}
    ordered = sorted(pairs, key=lambda p: (-len(p.target.ids), english[_key(p.target)]))
    training = model.training
    model.eval()
    try:
        with progress(len(pairs), "collecting", "pair") as bar:
            for number, start in enumerate(range(0, len(ordered), pairs_per_shard)):
                shard = ordered[start : start + pairs_per_shard]
                english_ids = [english[_key(pair.target)] for pair in shard]
                tensors = _read_shard(model, shard, english_ids, pad_id, batch_size, bar.update)
                _write_shard(tensors, [pair.lang for pair in shard], folder / f"pairs-{number:05d}.safetensors")
    finally:
        model.train(training)
    return load_activations(folder)


def load_activations(folder: str | Path) -> Activations:
    """Read all shards of a folder, ordered by pair_id. ValueError: no shards, or a pair that stands in two."""
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no activation shards (pairs-*.safetensors)")
    parts: dict[str, list[Tensor]] = {name: [] for name in _TENSORS}
    langs: list[str] = []
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            for name in _TENSORS:
                parts[name].append(shard.get_tensor(name))
            langs += json.loads(shard.metadata()["lang"])
    pair_id, order = torch.sort(torch.cat(parts.pop("pair_id")))
    if len(pair_id.unique()) < len(pair_id):
        raise ValueError(f"the shards of {folder} hold a pair twice; collect into an empty folder")
    tensors = {name: torch.cat(tensors)[order] for name, tensors in parts.items()}
    return Activations(**tensors, pair_id=pair_id, langs=[langs[row] for row in order.tolist()])


@torch.inference_mode()
def anchor_activations(
    model: CCModelForCausalLM,
    prompts: Sequence[RenderedPrompt],
    pad_id: int = 0,
    batch_size: int = 8,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """FFN outputs at the anchors of `prompts`, (N, L, H), in their order, in the model's dtype, on the CPU.

    `on_batch` hears the size of every batch once it is read.
    """
    found: Tensor | None = None
    for rows in length_batches([len(prompt.ids) for prompt in prompts], batch_size):
        padded = pad_prompts([prompts[i] for i in rows], pad_id, "right", model.device)
        batch_BLH = model.anchor_activations(*padded).transpose(0, 1).cpu()
        if found is None:
            found = batch_BLH.new_empty((len(prompts), *batch_BLH.shape[1:]))
        found[rows] = batch_BLH
        if on_batch is not None:
            on_batch(len(rows))
    assert found is not None
    return found


def _key(prompt: RenderedPrompt) -> tuple:
    return tuple(prompt.ids), prompt.anchor


def _read_shard(model, pairs, english_ids, pad_id, batch_size, on_batch) -> dict[str, Tensor]:
    distinct = dict(zip(english_ids, (pair.target for pair in pairs), strict=True))
    place = {english_id: row for row, english_id in enumerate(distinct)}
    english = anchor_activations(model, list(distinct.values()), pad_id, batch_size)
    return {
        "source": anchor_activations(model, [pair.source for pair in pairs], pad_id, batch_size, on_batch),
        "target": english[[place[english_id] for english_id in english_ids]],
        "pair_id": torch.tensor([pair.pair_id for pair in pairs]),
        "english_id": torch.tensor(english_ids),
    }


def _write_shard(tensors: dict[str, Tensor], langs: list[str], path: Path) -> None:
    # Written aside and renamed: a shard that exists is whole.
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"lang": json.dumps(langs)})
    partial.replace(path)
