"""Keep only the vocabulary rows that given texts use: a smaller model that is the same on those texts.

    token ids of the texts -> the pieces and merges that make them -> tokenizer with new ids, model with fewer rows

A vocabulary is most of a small multilingual model, and the optimiser walks through all of it at every step. Pruning is
exact on the texts it was made for: they tokenise into the same pieces, and a kept token's logit is what it was. Another
text still tokenises (every byte and every character of a kept piece stays), into more and smaller pieces.

Why the merges may go: BPE applies the lowest-ranked merge until none applies. Within the span of a piece that it ends
with, it made the merges that it makes on that piece alone, for none ever crossed the span's ends. So the merges that
fire on a text are those that fire on its pieces, each by itself, and a merge that never fires changes nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def prune_tokenizer(whole: dict[str, Any], used: Collection[int], always: Collection[str]) -> dict[str, Any]:
    """The content of a tokenizer.json with a BPE model, cut down to what `used` token ids need; ids are new.

    Args:
        used: ids that the texts tokenise to.
        always: tokens to keep whether used or not (beginning and end of a text, of a turn ...).

    Returns:
        The new content. Tokens keep their order, so `kept_ids` of both gives the old id of each new one.

    Raises:
        ValueError: another model than BPE.
    """
    model = whole["model"]
    if model["type"] != "BPE":
        raise ValueError(f"only BPE tokenizers can be pruned, this one is {model['type']}")
    vocab, merges = model["vocab"], [_pair(merge) for merge in model["merges"]]
    used_added = [t for t in whole["added_tokens"] if t["id"] in used or t["content"] in always]
    added = {token["content"] for token in used_added}
    pieces, fired = _closure([p for p, i in vocab.items() if i in used and p not in added], merges, vocab)
    pieces |= {piece for piece in vocab if _BYTE.fullmatch(piece)} if model.get("byte_fallback") else _alphabet(vocab)
    pieces |= added | set(always) | {model.get("unk_token")}
    kept = sorted({i for piece, i in vocab.items() if piece in pieces} | {token["id"] for token in used_added})
    new_id = {old: new for new, old in enumerate(kept)}

    pruned = copy.deepcopy({key: value for key, value in whole.items() if key != "model"})
    pruned["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")} | {
        "vocab": {piece: new_id[i] for piece, i in vocab.items() if i in new_id},
        "merges": [list(merge) for merge in merges if merge in fired],
    }
    pruned["added_tokens"] = [token | {"id": new_id[token["id"]]} for token in used_added]
    specials = (pruned.get("post_processor") or {}).get("special_tokens", {})
    for token in specials.values():
        token["ids"] = [new_id[i] for i in token["ids"]]
    return pruned


def kept_ids(whole: dict[str, Any], pruned: dict[str, Any]) -> list[int]:
    """The old id of every new id, in the order of the new ones."""
    old, new = _ids(whole), _ids(pruned)
    return [old[piece] for piece in sorted(new, key=new.get)]


@torch.no_grad()
def prune_model(model: PreTrainedModel, kept: list[int]) -> None:
    """Leave only the rows `kept` (old ids) of the embedding and of the LM head, tied or not, in place."""
    rows = torch.tensor(kept)
    for module in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        module.weight = torch.nn.Parameter(_rows(module.weight, rows))
        for name in ("num_embeddings", "out_features"):
            if hasattr(module, name):
                setattr(module, name, len(kept))
    model.config.vocab_size = len(kept)
    model.tie_weights()  # where the embedding is the head, both are one tensor again
    new_id = {old: new for new, old in enumerate(kept)}
    for config in (model.config, model.generation_config):
        for name in [name for name in vars(config) if name.endswith("_token_id")]:
            old = getattr(config, name)
            if isinstance(old, list):
                setattr(config, name, [new_id[i] for i in old if i in new_id])
            elif old is not None:
                setattr(config, name, new_id.get(old))


def read_tokenizer(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's tokenizer.json."""
    return json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))


def _closure(
    pieces: list[str], merges: list[tuple[str, str]], vocab: Collection[str]
) -> tuple[set[str], set[tuple[str, str]]]:
    """Every piece that arises while BPE makes `pieces`, and every merge that fires."""
    rank = {merge: number for number, merge in enumerate(merges)}
    arisen, fired = set(pieces), set()
    for piece in pieces:
        if _BYTE.fullmatch(piece):
            continue
        parts = list(piece)
        while True:
            arisen.update(part for part in parts if part in vocab)
            ranks = [rank.get(pair, len(merges)) for pair in itertools.pairwise(parts)]
            if not ranks or min(ranks) == len(merges):
                break
            place = ranks.index(min(ranks))
            fired.add((parts[place], parts[place + 1]))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return arisen, fired


def _alphabet(vocab: Collection[str]) -> set[str]:
    """The single characters of a byte-level vocabulary, which stand for bytes."""
    return {piece for piece in vocab if len(piece) == 1}


def _ids(content: dict[str, Any]) -> dict[str, int]:
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _rows(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.index_select(0, rows).clone()
