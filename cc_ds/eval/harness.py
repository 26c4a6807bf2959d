"""EleutherAI's lm-evaluation-harness with the connection: `--model cc_ds` over its own Hugging Face model, HFLM.

Importing this module registers the name (tools/run_harness.py does, and hands over to the harness's command line).
Requests walk as in HFLM, except that
    generate_until   goes through the model's own `generate`, which connects at the prompt's last token
    loglikelihood    reads the context alone, connects at its last token, and scores the continuation after it
    rolling          has no prompt, and so no connection; nor has a context that is the beginning-of-text token alone
Without a transform in the model, or with connect=False among the model's arguments, every request is HFLM's. lang=sw
names the language of all requests: a transform with a matrix per language needs it, and English is read as by HFLM.

Shapes: B requests, T positions, L layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from cc_ds import CCModelForCausalLM
from cc_ds.infer.generate import ENGLISH, is_language
from cc_ds.infer.prompts import length_batches, pad_token_id, progress

# ((context, continuation), tokens of the context, tokens of the continuation), as the harness has it.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("cc_ds")
class CCHarnessLM(HFLM):
    """HFLM with a CCModelForCausalLM; its arguments, `connect` (default True) and `lang`, of all requests.

    ValueError: a transform with a matrix per language, and not the language of one of them.
    """

    AUTO_MODEL_CLASS = CCModelForCausalLM

    def __init__(
        self, pretrained: str | CCModelForCausalLM, connect: bool = True, lang: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, backend="causal", **kwargs)
        self.connect = connect and self.model.transform is not None and not is_language(lang, ENGLISH)
        self.lang = lang
        if self.connect and self.model.transform.scope == "per_language" and lang not in self.model.transform.languages:
            raise ValueError(
                f"the transform has a matrix per language, and lang is {lang!r}: among the model's arguments give "
                f"lang=L, one of {', '.join(self.model.transform.languages)}, or connect=False"
            )

    def _languages(self, rows: int) -> list[str] | None:
        return None if self.lang is None else [self.lang] * rows

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        languages = self._languages(len(context))
        return super()._model_generate(
            context, max_length, stop, connect=self.connect, languages=languages, **generation
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rolling = bool(requests) and requests[0][0] is None
        if not self.connect or rolling:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Continuations that differ in their last token alone (A, B, C, D) share one row of a batch.
        shared = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            shared[tuple(context), tuple(continuation[:-1])].append(place)
        keys = list(shared)
        answers: dict[int, tuple[float, bool]] = {}
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else self.batch_size)
        with progress(len(requests), "loglikelihood", "request") as bar:
            for batch in length_batches([len(context) + len(rest) for context, rest in keys], int(size)):
                logits = self._connected_logits([keys[index] for index in batch])
                for index, logits_TV in zip(batch, logits):
                    for place in shared[keys[index]]:
                        answers[place] = _score(logits_TV, requests[place][2], self.softmax_dtype)
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
                bar.update(sum(len(shared[keys[index]]) for index in batch))
        return [answers[place] for place in range(len(requests))]

    @torch.no_grad()
    def _connected_logits(self, keys: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        """Per (context, continuation but for its last token): the logits that predict the continuation, (its T, V)."""
        model, device = self.model, self.device
        # What does not fit is cut from the left, as HFLM does; a token of the context always stays.
        contexts = [list(context[-(self.max_length - len(rest)) :]) for context, rest in keys]
        context_ids, context_mask = _pad(contexts, pad_token_id(self.tokenizer), device)
        ids = [context + list(rest) for context, (_, rest) in zip(contexts, keys, strict=True)]
        input_ids, mask = _pad(ids, pad_token_id(self.tokenizer), device)
        anchors = torch.tensor([len(context) - 1 for context in contexts], device=device)
        prompted = torch.tensor([context != [self.prefix_token_id] for context in contexts], device=device)
        with torch.autocast(device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
            source_LBH = model.anchor_activations(context_ids, context_mask, anchors)
            english_LBH = model.transform(source_LBH, self._languages(len(keys)))
            model.prefill_pass = model.fuse_pass(english_LBH, anchors, input_ids.shape[1], prompted)
            try:
                logits_BTV = model(input_ids, attention_mask=mask).logits
            finally:
                model.prefill_pass = None
        return [row[int(anchor) : len(own)] for row, anchor, own in zip(logits_BTV, anchors, ids, strict=True)]


def _score(logits_TV: Tensor, continuation: list[int], dtype: torch.dtype | None) -> tuple[float, bool]:
    """The continuation's log probability, and whether greedy decoding gives it."""
    wanted = torch.tensor(continuation, device=logits_TV.device)
    log_probabilities_TV = torch.log_softmax(logits_TV, dim=-1, dtype=dtype)
    chosen = log_probabilities_TV.gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits_TV.argmax(dim=-1) == wanted).all())


def _pad(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids padded on the right, and their mask."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
