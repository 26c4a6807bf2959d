"""Collect the FFN outputs that a Transform Matrix is fitted on: S of target prompts, E of their English prompts.

Pairs of rendered prompts -> a plan of shards -> each shard's prompts in batches of like length -> the model's anchor
activations -> the shard on disk (shards.py). A collection that was stopped goes on with the shards that are missing and
ends as if it had not been. Shards are dealt over ranks; a model that is partitioned over them (ZeRO-3) takes all ranks
to every forward, so ranks that have run out of prompts read a stand-in. Both passes are without a connection.

Shapes: N pairs, L layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cc_ds.dist.group import Group
from cc_ds.dist.zero import gathered, is_partitioned
from cc_ds.export import CONNECTION_TENSORS
from cc_ds.infer.prompts import length_batches, pad_prompts, progress
from cc_ds.transform.shards import holds, shard_path, write_shard

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import RenderedPrompt

_PLAN_FILE = "plan.safetensors"
# Read of each weight to tell models apart; training moves nearly all of them.
_VALUES_PER_WEIGHT = 4096


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


def collect_activations(
    model: CCModelForCausalLM,
    pairs: Sequence[PromptPair],
    folder: str | Path,
    pad_id: int = 0,
    batch_size: int = 8,
    pairs_per_shard: int = 256,
    group: Group | None = None,
) -> int:
    """Read every prompt of `pairs` and write the activations at their anchors as shards into `folder`.

    The model is put into eval mode for the time. Pairs that share an English prompt stand in one shard where they
    fit, and the prompt is read once there. Every rank of `group` must call it, with the same pairs and a folder that
    all of them see.

    Returns:
        Shards written now, by all ranks; those that stood there already are kept and not read again.

    Raises:
        ValueError: no pairs, a pair id twice, or a folder that holds shards of other pairs or of another model.
    """
    folder, group = Path(folder), group or Group.alone()
    if not pairs:
        raise ValueError("there are no prompt pairs to collect activations of")
    if len({pair.pair_id for pair in pairs}) < len(pairs):
        raise ValueError("pair_id must be unique: two pairs have the same")
    english = {key: number for number, key in enumerate(dict.fromkeys(_key(pair.target) for pair in pairs))}
    ordered = sorted(pairs, key=lambda p: (-len(p.target.ids), english[_key(p.target)]))
    shards = [ordered[start : start + pairs_per_shard] for start in range(0, len(ordered), pairs_per_shard)]
    training = model.training
    model.eval()
    try:
        probe = anchor_activations(model, [ordered[0].target], pad_id)
        digests = {"pairs": _pairs_digest(ordered, pairs_per_shard), "weights": _weights_digest(model)}
        pending = group.main_only(lambda: _pending(folder, shards, digests, probe))
        mine = [shards[number] for number in pending[group.rank :: group.world_size]]
        forwards = sum(_forwards(shard, batch_size) for shard in mine)
        idle = max(group.gather(forwards)) - forwards if is_partitioned(model) else 0
        with progress(sum(map(len, mine)), "collecting", "pair") as bar:
            for number, shard in zip(pending[group.rank :: group.world_size], mine, strict=True):
                english_ids = [english[_key(pair.target)] for pair in shard]
                tensors = _read_shard(model, shard, english_ids, pad_id, batch_size, bar.update)
                write_shard(tensors, [pair.lang for pair in shard], shard_path(folder, number))
            for _ in range(idle):
                anchor_activations(model, [ordered[0].target], pad_id)
    finally:
        model.train(training)
    group.barrier()
    return len(pending)


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


def _pending(folder: Path, shards: Sequence[Sequence[PromptPair]], digests: dict[str, str], probe: Tensor) -> list[int]:
    """Numbers of the shards that are still to be written, once the folder is known to be of this collection."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / _PLAN_FILE
    if plan.exists():
        _check_plan(plan, digests, probe)
    elif any(folder.glob("pairs-*.safetensors")):
        raise ValueError(f"{folder} already holds activation shards, but no {_PLAN_FILE}; give an empty folder")
    else:
        partial = plan.with_suffix(".partial")
        save_file({"probe": probe.contiguous()}, partial, metadata=digests)
        partial.replace(plan)
    return [
        number
        for number, shard in enumerate(shards)
        if not holds(shard_path(folder, number), [pair.pair_id for pair in shard])
    ]


def _check_plan(plan: Path, digests: dict[str, str], probe: Tensor) -> None:
    try:
        with safe_open(plan, framework="pt") as file:
            metadata, before = file.metadata() or {}, file.get_tensor("probe")
    except SafetensorError as error:
        raise ValueError(f"{plan}: damaged ({error}); empty the folder and collect again") from error
    if metadata.get("pairs") != digests["pairs"]:
        raise ValueError(f"{plan.parent} already holds activations of other prompts; give another folder, or empty it")
    # Beside the weights, a prompt's activations, read again: a change of the config changes them. Tolerance: batches
    # and kernels of other machines.
    tolerance = 1e-3 if probe.dtype in (torch.float32, torch.float64) else 5e-2
    distance = (before.double() - probe.double()).norm() if before.shape == probe.shape else float("inf")
    if metadata.get("weights") != digests["weights"] or distance > tolerance * probe.double().norm():
        raise ValueError(f"{plan.parent} already holds activations of another model; give another folder, or empty it")


def _pairs_digest(pairs: Sequence[PromptPair], pairs_per_shard: int) -> str:
    plan = [(pair.pair_id, pair.lang, *_key(pair.source), *_key(pair.target)) for pair in pairs]
    return hashlib.sha256(json.dumps([pairs_per_shard, plan]).encode()).hexdigest()


def _weights_digest(model: CCModelForCausalLM) -> str:
    """Of evenly spaced values of every weight that the activations depend on; every rank must call it.

    The same wherever the model's folder stands, and however the weights are partitioned.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in CONNECTION_TENSORS:
            continue
        with gathered([parameter]):
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _VALUES_PER_WEIGHT)].double().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _key(prompt: RenderedPrompt) -> tuple:
    return tuple(prompt.ids), prompt.anchor


def _forwards(shard: Sequence[PromptPair], batch_size: int) -> int:
    english = len({_key(pair.target) for pair in shard})
    return -(-english // batch_size) + -(-len(shard) // batch_size)


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
