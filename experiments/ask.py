"""Ask a tuned model questions with options, in every mode of the connection at the price of one.

    prompts, padded -> one read without a connection (S, keys and values) -> for each mode, the anchor again, fused

The connection touches the anchor alone, the last prompt token. So all modes share the read of the prompt, and each adds
one token. The answer is the option whose first token is likeliest; options have different first tokens.

Modes. E stands for the real English activations, S for the prompt's own, W for the fitted matrix:
    none          no connection
    matrix        S W, the Decision Maker chooses the layer: how it is deployed in other languages than English
    per-layer     S W_l, a matrix for each layer
    rows          S W, W fitted on prompts of the training rows
    trained       S W, of the W that was trained with the model, where one was (transform_share)
    identity      S, as if W were the identity
    random        S W of a layer drawn for each row, instead of the Decision Maker's
    mean          the mean of S W over the layers, instead of one of them
    english       E itself (rows in English: no connection)
All but none and english connect rows in English too, which a deployed model reads without the connection: as `none`.

Shapes: B rows, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cc_ds import CCModelForCausalLM
from cc_ds.data.templates import RenderedPrompt, Template
from cc_ds.infer.prompts import length_batches, pad_prompts
from cc_ds.transform.collect import anchor_activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and what may be answered."""

    item: int
    """Number of the question, the same in every language."""
    lang: str
    prompt: str
    prompt_en: str
    options: tuple[str, ...]
    answer: str
    """One of the options."""


@torch.inference_mode()
def ask(
    model: CCModelForCausalLM,
    template: Template,
    questions: Sequence[Question],
    transforms: Mapping[str, Tensor],
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, list[str]]:
    """The option that the model gives to each question, by mode.

    Args:
        transforms: mode -> W, (H, H) or (L, H, H), "matrix" among them; empty for a model without a connection, which
            is asked in the mode "none" alone.
        seed: of the layers drawn in the mode "random".
    """
    model.eval()
    prompts = [_render(template, question.prompt) for question in questions]
    first_tokens = {options: _first_tokens(template, options) for options in {q.options for q in questions}}
    english_NLH = None
    if transforms:
        english_NLH = read_anchors(model, [_render(template, q.prompt_en) for q in questions], batch_size)
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.num_hidden_layers
    drawn = torch.randint(layers, (len(questions),), generator=generator)
    answers: dict[str, dict[int, str]] = {}
    for numbers in length_batches([len(prompt.ids) for prompt in prompts], batch_size):
        rows = [questions[number] for number in numbers]
        read = _Read(model, [prompts[number] for number in numbers])
        for mode, activations_LBH, connected in _activations(
            read.source_LBH,
            rows,
            transforms,
            None if english_NLH is None else english_NLH[numbers].transpose(0, 1),
            drawn[numbers],
        ):
            logits_BV = read.again(activations_LBH, connected)
            for number, row, logits_V in zip(numbers, rows, logits_BV, strict=True):
                best = logits_V[first_tokens[row.options]].argmax()
                answers.setdefault(mode, {})[number] = row.options[int(best)]
    return {mode: [given[number] for number in range(len(questions))] for mode, given in answers.items()}


class _Read:
    """A batch of prompts, read once up to the anchor."""

    def __init__(self, model: CCModelForCausalLM, prompts: Sequence[RenderedPrompt]) -> None:
        self.model = model
        self.input_ids, self.mask, anchors = pad_prompts(prompts, 0, "left", model.device)
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        self.cache = DynamicCache()  # without the config: sliding layers keep every position too
        self.source_LBH = model.anchor_activations(
            self.input_ids,
            self.mask,
            anchors,
            past_key_values=self.cache,
            use_cache=True,
            position_ids=self.positions,
        )

    def again(self, activations_LBH: Tensor | None, connected: Tensor | None) -> Tensor:
        """(B, V) logits after the anchor, read again with these activations fused; None: without a connection."""
        self.cache.crop(-1)
        if activations_LBH is not None:
            first = torch.zeros(activations_LBH.shape[1], dtype=torch.int64)
            self.model.prefill_pass = self.model.fuse_pass(activations_LBH, first, 1, connected)
        output = self.model(
            self.input_ids[:, -1:],
            self.mask,
            position_ids=self.positions[:, -1:],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]


def _activations(
    source_LBH: Tensor, rows: Sequence[Question], transforms: Mapping[str, Tensor], english_LBH, drawn: Tensor
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """(mode, what stands for E, which rows are connected)."""
    yield "none", None, None
    if not transforms:
        return
    layers, batch, _ = source_LBH.shape
    by_matrix_LBH = source_LBH @ transforms["matrix"]
    for name, matrix in transforms.items():
        yield name, source_LBH @ matrix, None
    yield "identity", source_LBH, None
    # Where all layers hold the same vector, that vector is fused, whatever the Decision Maker chooses.
    chosen_BH = by_matrix_LBH[drawn, torch.arange(batch)]
    yield "random", chosen_BH.expand(layers, -1, -1).contiguous(), None
    yield "mean", by_matrix_LBH.mean(dim=0, keepdim=True).expand(layers, -1, -1).contiguous(), None
    yield "english", english_LBH, torch.tensor([row.lang != "en" for row in rows])


def read_anchors(model, prompts: Sequence[RenderedPrompt], batch_size: int) -> Tensor:
    """(N, L, H) of every prompt, each different one read once: several languages share an English prompt."""
    keys = [tuple(prompt.ids) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    order = {key: number for number, key in enumerate(distinct)}
    read = anchor_activations(model, list(distinct.values()), batch_size=batch_size)
    return read[[order[key] for key in keys]]


def _first_tokens(template: Template, options: Sequence[str]) -> list[int]:
    first = [template.encode_response(option)[0] for option in options]
    if len(set(first)) < len(first):
        raise ValueError(f"the options {', '.join(options)} do not all begin with different tokens")
    return first


def _render(template: Template, text: str) -> RenderedPrompt:
    return template.render_prompt([{"role": "user", "content": text}])


def correct(questions: Sequence[Question], answers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{mode: {language: "0110..."}}: whether each answer is right, in the order of the items."""
    result: dict[str, dict[str, str]] = {}
    for mode, given in answers.items():
        marks: dict[str, dict[int, str]] = {}
        for question, answer in zip(questions, given, strict=True):
            marks.setdefault(question.lang, {})[question.item] = str(int(answer == question.answer))
        result[mode] = {lang: "".join(m[item] for item in sorted(m)) for lang, m in marks.items()}
    return result
