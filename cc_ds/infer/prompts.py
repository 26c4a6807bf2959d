"""Many rendered prompts through a model: batches of like length, padded, answered, and put back in order.

Prompts come rendered (token ids and anchor, from a Template); evaluation and the generate tool walk through `respond`,
the collection of activations through `length_batches` and `pad_prompts`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from cc_ds.infer.generate import ENGLISH

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import RenderedPrompt, Template


@dataclass(frozen=True, slots=True)
class Response:
    """What the model said to one prompt."""

    text: str
    """Decoded (Template.decode_response)."""
    tokens: int
    """Tokens generated, the stop token included, padding not."""


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of all prompts in batches of at most `batch_size`; longest first: memory runs out at once or never."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_prompts(
    prompts: Sequence[RenderedPrompt], pad_id: int, side: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on `side` ("left" or "right") to one length.

    Returns input_ids (B, T), attention_mask (B, T) and anchors (B,), all int64; anchors count the padding.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    anchors = torch.empty(len(prompts), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.ids) if side == "left" else 0
        input_ids[row, start : start + len(prompt.ids)] = torch.as_tensor(prompt.ids, dtype=torch.int64)
        attention_mask[row, start : start + len(prompt.ids)] = 1
        anchors[row] = start + prompt.anchor
    return input_ids.to(device), attention_mask.to(device), anchors.to(device)


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with. It is masked, so any valid id serves where the tokenizer has no padding token."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar on stderr, shown by rank 0 alone and only where someone is looking."""
    hidden = int(os.environ.get("RANK", "0")) != 0
    return tqdm(total=total, desc=what, unit=unit, disable=True if hidden else None, leave=False)


@torch.inference_mode()
def respond(
    model: CCModelForCausalLM,
    tokenizer: Any,
    template: Template,
    prompts: Sequence[RenderedPrompt],
    english: Sequence[RenderedPrompt | None] | None = None,
    connect: bool = True,
    languages: Sequence[str | None] | None = None,
    exclude: Sequence[str] = ENGLISH,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    **generation: Any,
) -> list[Response]:
    """Generate one response per prompt, in the order of the prompts.

    With `english` (one prompt or None per row) the connection takes the real English prompt where there is one, and a
    row without it is read plain. Without `english` it takes the model's transform; with connect=False nothing.
    Rows whose language, in `languages`, is one of `exclude` are read without the connection in the same batch.
    `generation` holds Hugging Face's arguments; decoding is greedy and cached unless they say otherwise, and ends at
    the template's stop tokens.
    """
    generation = {"do_sample": False, "num_beams": 1, "use_cache": True} | generation
    responses: dict[int, Response] = {}
    with progress(len(prompts), "generating", "prompt") as bar:
        for rows, connected in _groups(prompts, english, connect, batch_size):
            pad_id = pad_token_id(tokenizer)
            input_ids, mask, anchors = pad_prompts([prompts[i] for i in rows], pad_id, "left", model.device)
            inputs: dict[str, Any] = {"connect": connected}
            if connected:
                inputs["anchors"] = anchors
                if languages is not None:
                    inputs |= {"languages": [languages[i] for i in rows], "exclude": exclude}
                if english is not None:
                    padded = pad_prompts([english[i] for i in rows], pad_id, "left", model.device)
                    names = ("english_input_ids", "english_attention_mask", "english_anchors")
                    inputs |= dict(zip(names, padded, strict=True))
            output = model.generate(
                input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(template.stop_token_ids),
                pad_token_id=pad_id,
                **inputs,
                **generation,
            )
            new_ids = output[:, input_ids.shape[1] :].tolist()
            responses |= {i: _response(template, ids) for i, ids in zip(rows, new_ids, strict=True)}
            bar.update(len(rows))
    return [responses[i] for i in range(len(prompts))]


def _groups(prompts, english, connect, batch_size) -> Iterator[tuple[list[int], bool]]:
    """Batches of row indices and whether they are connected; rows that lack their English prompt go apart, plain."""
    connected = [connect and (english is None or english[i] is not None) for i in range(len(prompts))]
    for wanted in (True, False):
        rows = [i for i in range(len(prompts)) if connected[i] is wanted]
        for batch in length_batches([len(prompts[i].ids) for i in rows], batch_size):
            yield [rows[i] for i in batch], wanted


def _response(template: Template, ids: list[int]) -> Response:
    """Decode up to the first stop token; what follows it is padding."""
    stops = [place for place, token_id in enumerate(ids) if token_id in template.stop_token_ids]
    end = stops[0] if stops else len(ids)
    return Response(text=template.decode_response(ids[:end]), tokens=end + bool(stops))
