"""CCModelForCausalLM: a stock Hugging Face causal LM with the connection attached.

The class of a loaded model derives from the stock class (LlamaForCausalLM, ...) and adds one module, the Decision
Maker, and hooks (capture.py). Every key of the base model therefore stays as it was, and whatever works on a stock
model (generate, DeepSpeed, activation checkpointing) works on this one. No modelling code is copied.

One forward in training: English prompt -> E (L, B, H) -> target sequence with E fused -> logits, loss.

Shapes: B examples, T target positions, T_en English positions, L layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, Cache, GenerationConfig, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import resolve_revision

from cc_ds import export
from cc_ds.config import CCConfig
from cc_ds.connection.capture import FusePass, Hooks, Pass, ReadPass, flat_positions
from cc_ds.connection.decision import DecisionMaker, gumbel_noise
from cc_ds.connection.loss import labelled_loss
from cc_ds.connection.transform import TrainedTransform, Transform
from cc_ds.data.packing import Packed, PackedBatch
from cc_ds.infer.generate import ENGLISH, connected_rows, fill_cache, generate_connected
from cc_ds.models.arch import NOT_TEXT_KEYS, TEXT_KEYS, decoder_of, family_of, text_config
from cc_ds.models.lora import merged

# The Decision Maker's name in the authors' checkpoints.
_AUTHORS_KEYS = {r"^model\.source_select\.": "decision_maker."}
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")


@dataclass
class CCOutput(CausalLMOutputWithPast):
    """A causal LM's output and what the connection did. The last four are None for a plain pass."""

    english_activations: Tensor | None = None
    """E, (L, B, H): English FFN outputs at the English anchor, in the model's dtype."""
    decision_logits: Tensor | None = None
    """(B, L), float32 or wider, before the noise."""
    choice: Tensor | None = None
    """(B, L): the gate's values; all zero for a row without English."""
    fusion_ratio: Tensor | None = None
    """(B,): norm of the fused activation over the norm of the FFN output it is added to."""


class CCModelForCausalLM:
    """What the connection adds to a stock causal LM. Make one with `from_pretrained` or `from_config`."""

    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"decision_maker\.", r"trained_transform\."]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = NOT_TEXT_KEYS

    def __init__(self, config: PretrainedConfig, cc_config: CCConfig | None = None) -> None:
        super().__init__(config)
        self.cc_config = cc_config or CCConfig()
        self.family = family_of(config.model_type)
        layers = config.num_hidden_layers
        if self.cc_config.fuse_layer >= layers:
            raise ValueError(f"fuse_layer is {self.cc_config.fuse_layer}, but the model has layers 0 to {layers - 1}")
        self.decision_maker = DecisionMaker(config.hidden_size, layers, self.cc_config)
        self._init_weights(self.decision_maker)
        self.gate_was_stored = False  # whether the weights came with a Decision Maker; else it is drawn
        self.trained_transform = TrainedTransform(config.hidden_size) if self.cc_config.transform_share else None
        self.transform: Transform | None = None
        self.hooks = Hooks(self, self.family)
        self.one_generation = Lock()
        self.prefill_pass: FusePass | None = None
        self.prefill_cache: Cache | None = None
        self.labelled_loss = labelled_loss

    # ---- making one ----

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        cc_config: CCConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs,
    ) -> CCModelForCausalLM:
        """Load a stock checkpoint, a folder that `save_pretrained` wrote, or a folder of the authors' code.

        Of a multimodal checkpoint (Gemma 3 from 4B on, Mistral 3) the text model is loaded, and nothing else.

        Args:
            path_or_id: a folder, or a name on the Hugging Face hub.
            cc_config: the connection's settings; None: those stored with the model, else the defaults.
            torch_dtype: of the weights; None: as stored.
            kwargs: for the stock model's `from_pretrained`.

        Returns:
            The model in evaluation mode. A Decision Maker that is not stored with it is initialised as Hugging Face
            initialises a Linear.

        Raises:
            ValueError: an unknown family, no weights, or not all, or a connection file that does not fit the model.
        """
        export.check_model_folder(path_or_id)
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        # One commit for all files; what the hub is known not to have of it is not asked for again.
        hub["revision"] = resolve_revision(path_or_id, **hub)
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
            path_or_id, trust_remote_code=kwargs.get("trust_remote_code", False), **hub
        )
        config = text_config(config)
        stored = export.read_connection(path_or_id, **hub)
        if torch_dtype is not None:
            kwargs["dtype"] = torch_dtype
        kwargs["key_mapping"] = {**_AUTHORS_KEYS, **TEXT_KEYS, **kwargs.get("key_mapping", {})}
        model = super(CCModelForCausalLM, concrete_class(config)).from_pretrained(
            path_or_id, config=config, cc_config=cc_config or stored.cc_config, **(kwargs | hub)
        )
        # What renamed keys when it was read would rename them back when the model is saved.
        model._weight_conversions = [entry for entry in model._weight_conversions if not _renames_text(entry)]
        export.apply_connection(model, stored)
        return model

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # Where transformers knows which weights a checkpoint had; the authors' have the Decision Maker among them.
        self.gate_was_stored = "decision_maker.weight" not in loading_info.missing_keys
        super()._adjust_missing_and_unexpected_keys(loading_info)
        ours = ("decision_maker.", "trained_transform.")
        if missing := sorted(name for name in loading_info.missing_keys if not name.startswith(ours)):
            raise ValueError(
                f"{self.name_or_path}: {len(missing)} weights of a {self.config.model_type} model are not in its files "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), and would be random: it is damaged, "
                "or of a kind whose text model can't be taken out of it"
            )

    @classmethod
    def from_config(cls, config: PretrainedConfig, cc_config: CCConfig | None = None) -> CCModelForCausalLM:
        """A randomly initialised model of the config's family."""
        return concrete_class(config)(config, cc_config=cc_config)

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs
    ) -> None:
        """Write a stock checkpoint, LoRA merged, and beside it cc_connection.safetensors and cc_config.json.

        `AutoModelForCausalLM.from_pretrained(folder)` loads it without a warning as the base model alone.
        """
        state_dict = dict(merged(self.state_dict() if state_dict is None else state_dict, self))
        ours = {name: state_dict.pop(name, None) for name in export.CONNECTION_TENSORS}
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        if kwargs.get("is_main_process", True):
            export.write_connection(save_directory, self.cc_config, *ours.values(), self.transform)

    def set_transform(self, transform: Tensor | Transform | None) -> None:
        """Give the model its Transform Matrix; None removes it.

        Args:
            transform: W, (H, H) or (L, H, H), float32 or float64; or a Transform, which may hold one matrix per
                language, or factors of low rank.

        Raises:
            ValueError: a wrong shape, NaN or Inf.
        """
        if isinstance(transform, Tensor):
            transform = Transform.of(transform)
        if transform is not None:
            transform.check_fits(self.config.num_hidden_layers, self.config.hidden_size)
            transform = transform.to(self.device)
        self.transform = transform

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs
    ) -> None:
        # Where every public way to switch checkpointing on ends in transformers.
        if enable:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True cuts the gradient through the English activations; "
                    "leave it out or set it to False"
                )
            gradient_checkpointing_func = functools.partial(
                gradient_checkpointing_func, use_reentrant=False, context_fn=self.hooks.checkpoint_contexts
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    # ---- the two passes ----

    def anchor_activations(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        **decoder_kwargs,
    ) -> Tensor:
        """Read prompts alone and keep each layer's FFN output at the anchor (METHOD, Training, step 2).

        Args:
            input_ids, attention_mask: (B, T).
            anchors: (B,) int64; None: the last token that is not padding.
            decoder_kwargs: for the decoder, past_key_values and position_ids among them.

        Returns:
            (L, B, H) in the model's dtype. No connection acts and no LM head runs.
        """
        if anchors is None:
            anchors = default_anchors(input_ids, attention_mask, None)
        decoder_kwargs.setdefault("use_cache", False)
        read = ReadPass(flat_positions(anchors, input_ids.shape[1]), self.config.num_hidden_layers - 1)
        with self.hooks.during(read):
            decoder_of(self, self.family)(input_ids=input_ids, attention_mask=attention_mask, **decoder_kwargs)
        return read.activations()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        anchors: Tensor | None = None,
        english_input_ids: Tensor | None = None,
        english_attention_mask: Tensor | None = None,
        english_anchors: Tensor | None = None,
        gate_noise: Tensor | None = None,
        packed: PackedBatch | None = None,
        packed_english: Packed | None = None,
        english_activations: Tensor | None = None,
        **kwargs,
    ) -> CCOutput:
        """One forward: the English pass when there is an English prompt, then the target pass.

        Args:
            input_ids, attention_mask, labels: (B, T); labels -100 where no loss is taken.
            anchors: (B,) int64; None: the position before the first label that counts, or the last token that is not
                padding.
            english_input_ids, english_attention_mask: (B, T_en), prompts only. A row whose mask is all zero has no
                English prompt and passes as plain SFT.
            english_anchors: (B,) int64; None: the last English token.
            gate_noise: (B, L); None: Gumbel(0, 1) in training mode, zeros in evaluation mode.
            packed: a packed batch in place of the tensors above; what training runs (see `packed_forward`).
            packed_english: packed English prompts alone: E and nothing else, for several micro-batches at once.
            english_activations: (L, U, H), E of the prompts that `packed.english_of` counts, read before.
            kwargs: for the stock forward; `num_items_in_batch` makes the loss a sum divided by it.

        Raises:
            ValueError: anchors or noise of a wrong shape.
        """
        if packed_english is not None:
            return CCOutput(english_activations=self._read_packed(packed_english))
        if packed is not None:
            return self._packed_forward(packed, english_activations, gate_noise, **kwargs)
        # generate's pass acts in its first forward, the prefill, and in no later one
        current, self.prefill_pass = self.prefill_pass, None
        if english_input_ids is not None:
            current = self._read_english(
                input_ids, attention_mask, labels, anchors, english_input_ids, english_attention_mask, english_anchors,
                gate_noise,
            )  # fmt: skip
        if use_cache is None and (labels is not None or self.training):
            use_cache = False  # a cache that nobody reads would keep every key and value alive through the backward
        with self.hooks.during(current):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        return _with_connection(output, current)

    def _packed_forward(
        self, packed: PackedBatch, english_LUH: Tensor | None, noise: Tensor | None, num_items_in_batch: Tensor
    ) -> CCOutput:
        """The loss of a packed batch: its labels' cross-entropy, summed and divided by `num_items_in_batch`.

        Logits exist at labelled positions only, in chunks. `noise` is (K, L) or None, which is zeros.
        """
        current = None
        if packed.english is not None:
            english_LUH = self._read_packed(packed.english)
        if english_LUH is not None:
            anchors = packed.target.anchors[packed.connected_rows]
            english_LKH = english_LUH[:, packed.english_of]
            if self.trained_transform is not None:
                # Here and not in the English pass, so that the first backward of a step reaches W: DeepSpeed's ZeRO-3
                # adds what a later one brings to what the step before left in the gradient's buffer.
                english_LKH = self.trained_transform(english_LKH, packed.own)
            current = self._fuse_pass(english_LKH, anchors, packed.connected, noise)
        with self.hooks.during(current):
            hidden_1TH = self._decode(packed.target)
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        hidden_NH = hidden_1TH[0, packed.label_positions]
        loss = self.labelled_loss(self.get_output_embeddings(), hidden_NH, packed.labels, cap, packed.most_labels)
        loss = loss / num_items_in_batch
        return _with_connection({"loss": loss}, current)

    def _read_packed(self, english: Packed) -> Tensor:
        """(L, K, H): the English pass over packed prompts."""
        read = ReadPass(english.anchors, self.config.num_hidden_layers - 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cc_config.english_grad), self.hooks.during(read):
            self._decode(english)
        return read.activations()

    def _decode(self, packed: Packed) -> Tensor:
        """(1, T, H): the decoder's last hidden state over packed segments, none of which sees another."""
        lengths = torch.tensor([0, *packed.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = lengths.to(packed.input_ids.device, non_blocking=True)
        return decoder_of(self, self.family)(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            segment_lengths=packed.lengths,  # for our attention; the other four for flash attention's
            cu_seq_lens_q=lengths,
            cu_seq_lens_k=lengths,
            max_length_q=max(packed.lengths),
            max_length_k=max(packed.lengths),
        ).last_hidden_state

    def _read_english(
        self, input_ids, attention_mask, labels, anchors, english_input_ids, english_attention_mask, english_anchors,
        noise,
    ) -> FusePass:  # fmt: skip
        """The English pass and everything the target pass needs from it."""
        batch = input_ids.shape[0]
        mask = None
        if english_attention_mask is not None:
            mask = english_attention_mask.any(dim=1)
            # A row without English still runs: it reads one padding token, as softmax over no key at all is NaN.
            english_attention_mask = english_attention_mask.clone()
            english_attention_mask[:, 0] |= (~mask).to(english_attention_mask.dtype)
        grad = nullcontext() if self.cc_config.english_grad else torch.no_grad()
        with grad:
            english_LBH = self.anchor_activations(english_input_ids, english_attention_mask, english_anchors)
        return self.fuse_pass(
            english_LBH,
            default_anchors(input_ids, attention_mask, labels) if anchors is None else anchors,
            input_ids.shape[1],
            mask,
            gumbel_noise(batch, english_LBH.shape[0], english_LBH.device) if noise is None and self.training else noise,
        )

    def fuse_pass(
        self, english_LBH: Tensor, anchors: Tensor, length: int, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> FusePass:
        """A pass that fuses `english_LBH` (L, B, H) at `anchors` (B,) of rows of `length`; `noise` (B, L) or none."""
        batch = english_LBH.shape[1]
        if anchors.shape != (batch,):
            raise ValueError(f"anchors must have shape ({batch},), one per row, not {tuple(anchors.shape)}")
        return self._fuse_pass(english_LBH, flat_positions(anchors, length), mask, noise)

    def _fuse_pass(self, english_LKH: Tensor, positions: Tensor, mask: Tensor | None, noise: Tensor | None) -> FusePass:
        layers, rows, _ = english_LKH.shape
        if noise is None:
            noise = english_LKH.new_zeros(rows, layers, dtype=torch.float32)
        if noise.shape != (rows, layers):
            raise ValueError(f"gate_noise must have shape ({rows}, {layers}), not {tuple(noise.shape)}")
        settings = self.cc_config
        match = settings.fuse_norm == "match"
        return FusePass(self.decision_maker, english_LKH, positions, noise, settings.fuse_layer, mask, match)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        english_input_ids: Tensor | None = None,
        english_attention_mask: Tensor | None = None,
        english_anchors: Tensor | None = None,
        connect: bool | Tensor = True,
        languages: Sequence[str | None] | None = None,
        exclude: Sequence[str] = ENGLISH,
        **kwargs,
    ):
        """Hugging Face's `generate`, connected when there is something to connect to.

        With English prompts, the connection takes their activations (the upper bound); else with a transform it takes
        S W, read from the target prompt in one prefill; else, or with `connect=False`, generation is plain.

        Args:
            inputs, attention_mask: (B, T), padded on the left; `inputs` may be called input_ids, as in Hugging Face's,
                and the mask may stand in the place of `generation_config`.
            anchors: (B,) int64; None: the last prompt token.
            connect: whether to connect, or (B,) bool, which rows.
            languages: B names, each row's language or None; a transform with a matrix per language needs them.
            exclude: rows of these languages are read without the connection; by default, English.
            kwargs: Hugging Face's generation arguments.

        Threads that share a model take turns: what acts in a prefill is kept in the model.
        """
        if isinstance(generation_config, Tensor):  # generate(prompts, mask), as forward takes them
            if attention_mask is not None:
                raise ValueError("attention_mask is given twice: by place, after the prompts, and by name")
            generation_config, attention_mask = None, generation_config
        kwargs["generation_config"] = generation_config
        if (input_ids := kwargs.pop("input_ids", None)) is not None:
            if inputs is not None:
                raise ValueError("inputs and input_ids are two names for the prompts: give one of them")
            inputs = input_ids
        prompts = kwargs.get("inputs_embeds") if inputs is None else inputs
        able = self.transform is not None or english_input_ids is not None
        # Another model's assistant, which only drafts: it is asked over and over, with a cache of its own.
        drafts = generation_config is not None and generation_config.is_assistant
        with self.one_generation:
            if not able or drafts or prompts is None:
                return super().generate(inputs, attention_mask=attention_mask, **kwargs)
            connected = connected_rows(prompts.shape[0], connect, languages, exclude)
            if not connected.any():
                return super().generate(inputs, attention_mask=attention_mask, **kwargs)
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError("the connection reads token ids: give inputs without inputs_embeds, or connect=False")
            english = (english_input_ids, english_attention_mask, english_anchors)
            return generate_connected(
                self, super().generate, inputs, attention_mask, anchors, english, connected, languages, **kwargs
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        # Where transformers has just made the cache that a generation asked for (static, quantized ...).
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.prefill_cache is not None:
            fill_cache(model_kwargs["past_key_values"], self.prefill_cache)
            self.prefill_cache = None


class Lock:
    """A reentrant lock that copies and pickles, as its owner does: the copy has a free one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return Lock, ()


@functools.cache
def _subclass(stock_class: type) -> type:
    # The stock class's own name: save_pretrained writes it into config.json as the architecture.
    return type(stock_class.__name__, (CCModelForCausalLM, stock_class), {"__module__": __name__})


def concrete_class(config: PretrainedConfig) -> type:
    """The stock class of a config with the connection in front."""
    family_of(config.model_type)
    return _subclass(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _renames_text(conversion: Any) -> bool:
    return not TEXT_KEYS.keys().isdisjoint(conversion.source_patterns)


def default_anchors(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """(B,) int64: the position before the first label that counts, or the last token that is not padding."""
    batch, length = input_ids.shape
    if attention_mask is None:
        last = torch.full((batch,), length - 1, dtype=torch.long, device=input_ids.device)
    else:
        positions = torch.arange(length, device=input_ids.device)
        last = (positions * (attention_mask != 0)).argmax(dim=1)
    if labels is None:
        return last
    counts = labels != -100
    return torch.where(counts.any(dim=1), (counts.int().argmax(dim=1) - 1).clamp_min(0), last)


def _with_connection(output: Mapping, current: Pass | None) -> CCOutput:
    fields = {name: output.get(name) for name in ("loss", "logits", "past_key_values", "hidden_states", "attentions")}
    if isinstance(current, FusePass):
        fields |= {
            "english_activations": current.english_LKH,
            "decision_logits": current.decision_logits,
            "choice": current.choice,
            "fusion_ratio": current.fusion_ratio,
        }
    return CCOutput(**fields)
