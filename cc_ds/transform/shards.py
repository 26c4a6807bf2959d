"""Activations of prompt pairs on disk: safetensors shards that name their pairs, so nothing is matched by order.

pairs-00000.safetensors    source (n, L, H), target (n, L, H), pair_id (n,), english_id (n,); metadata: lang
A shard appears whole or not at all.

Shapes: N pairs in all, n in a shard, L layers, H hidden size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cc_ds.transform.fit import Problem, Rows, check_activations

_TENSORS = ("source", "target", "pair_id", "english_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Activations of N pairs."""

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


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` stands."""
    return folder / f"pairs-{number:05d}.safetensors"


def shard_paths(folder: str | Path) -> list[Path]:
    """All shards of a folder. ValueError: there are none."""
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no activation shards (pairs-*.safetensors)")
    return paths


def write_shard(tensors: dict[str, Tensor], langs: Sequence[str], path: Path) -> None:
    """Write aside, flush to the disk, rename."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"lang": json.dumps(list(langs))})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def holds(path: Path, pair_ids: Sequence[int]) -> bool:
    """Whether a shard is there, readable, and of exactly these pairs."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            return shard.get_tensor("pair_id").tolist() == list(pair_ids)
    except SafetensorError:
        return False


def load_activations(folder: str | Path, pair_ids: Sequence[int] | None = None) -> Activations:
    """The pairs with these ids, in this order; or all, ordered by pair_id.

    ValueError: no shards, a pair that stands in two, or one that stands in none.
    """
    wanted = None if pair_ids is None else set(pair_ids)
    parts: dict[str, list[Tensor]] = {name: [] for name in _TENSORS}
    langs: list[str] = []
    for path in shard_paths(folder):
        with safe_open(path, framework="pt") as shard:
            ids = shard.get_tensor("pair_id")
            rows = [row for row, pair_id in enumerate(ids.tolist()) if wanted is None or pair_id in wanted]
            if rows:
                for name in _TENSORS:
                    parts[name].append(shard.get_tensor(name)[rows])
                names = json.loads(shard.metadata()["lang"])
                langs += [names[row] for row in rows]
    found = torch.cat(parts["pair_id"]).tolist() if parts["pair_id"] else []
    place = {pair_id: row for row, pair_id in enumerate(found)}
    if len(place) < len(found):
        raise ValueError(f"the shards of {folder} hold a pair twice; collect into an empty folder")
    order = sorted(place) if pair_ids is None else list(pair_ids)
    missing = [pair_id for pair_id in order if pair_id not in place]
    if missing:
        raise ValueError(f"the shards of {folder} lack {len(missing)} pairs, pair {missing[0]} among them")
    rows = [place[pair_id] for pair_id in order]
    tensors = {name: torch.cat(tensors)[rows] for name, tensors in parts.items()}
    return Activations(**tensors, langs=[langs[row] for row in rows])


def shard_problems(
    folder: str | Path, scope: str, fitted: Collection[int], choosing: Collection[int], group=None
) -> list[Problem]:
    """The least squares problems of a folder of shards, for `fit.fit_problems`.

    Args:
        scope: shared, per_layer or per_language.
        fitted, choosing: pair ids to fit on while the ridge is chosen, and to choose it on.
        group: ranks; each reads every world_size-th shard.
    """
    paths = shard_paths(folder)
    with safe_open(paths[0], framework="pt") as shard:
        layers = shard.get_slice("source").get_shape()[1]
    mine = paths if group is None else paths[group.rank :: group.world_size]

    def rows(layer: int | None = None, lang: str | None = None) -> Callable[[], Rows]:
        def read() -> Rows:
            for path in mine:
                for ids, chooses in ((fitted, False), (choosing, True)):
                    yield from ((s, e, chooses) for s, e in _rows_of(path, ids, layer, lang))

        return read

    if scope == "per_layer":
        return [Problem(name=str(layer), rows=rows(layer=layer)) for layer in range(layers)]
    if scope == "per_language":
        return [Problem(name=lang, rows=rows(lang=lang)) for lang in _languages(paths, {*fitted, *choosing})]
    return [Problem(name="all", rows=rows())]


def mean_target(folder: str | Path, pair_ids: Collection[int]) -> Tensor:
    """(L, H) float64: the mean English vector of these pairs, by layer."""
    total, count = None, 0
    for path in shard_paths(folder):
        with safe_open(path, framework="pt") as shard:
            chosen = [row for row, pair_id in enumerate(shard.get_tensor("pair_id").tolist()) if pair_id in pair_ids]
            if chosen:
                part = shard.get_tensor("target")[chosen].double().sum(dim=0)
                total = part if total is None else total + part
                count += len(chosen)
    assert total is not None
    return total / count


def _rows_of(
    path: Path, pair_ids: Collection[int], layer: int | None, lang: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    with safe_open(path, framework="pt") as shard:
        ids, langs = shard.get_tensor("pair_id").tolist(), json.loads(shard.metadata()["lang"])
        chosen = [
            row for row, pair_id in enumerate(ids) if pair_id in pair_ids and (lang is None or langs[row] == lang)
        ]
        if not chosen:
            return
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        pair = tuple(shard.get_slice(name)[:, layers][chosen] for name in ("source", "target"))
        check_activations(*pair, pair_ids=[ids[row] for row in chosen])
        yield tuple(tensor.flatten(0, 1) for tensor in pair)


def _languages(paths: Sequence[Path], pair_ids: Collection[int]) -> list[str]:
    found = set()
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            langs = json.loads(shard.metadata()["lang"])
            found |= {
                lang for lang, i in zip(langs, shard.get_tensor("pair_id").tolist(), strict=True) if i in pair_ids
            }
    return sorted(found)
