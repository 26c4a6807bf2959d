"""From settings to the parts of a run: rows, model, engine, trainer; and the model's way out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cc_ds import export
from cc_ds.config import READ_SETTINGS, Config
from cc_ds.connection.loss import liger_loss
from cc_ds.connection.model import CCModelForCausalLM, concrete_class
from cc_ds.data.templates import Template, load_template
from cc_ds.data.tokenise import load_tokenised
from cc_ds.dist.engine import build_engine, check_tensor_parallel, engine_config, sharded_construction
from cc_ds.dist.group import Group
from cc_ds.dist.patience import main_first
from cc_ds.dist.signals import Requests
from cc_ds.dist.zero import full_state_dict
from cc_ds.infer.prompts import pad_token_id
from cc_ds.models.arch import text_config
from cc_ds.models.attention import PACKED
from cc_ds.models.lora import add_lora
from cc_ds.run_state import RunState
from cc_ds.telemetry import log
from cc_ds.trainer import Trainer, count_steps


@dataclass(frozen=True, slots=True)
class RunData:
    """Tokenised rows and what made them."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: Dataset
    validation: Dataset | None


def with_stored_connection(config: Config, group: Group) -> Config:
    """Where a tuned model is tuned further, its connection stays as it was trained, unless the user says otherwise."""
    model = config.model
    export.check_model_folder(model.model_name_or_path)
    _load_config(config)  # a model that is not there is told here
    stored = export.read_cc_config(model.model_name_or_path)
    if stored is None:
        return config
    kept = {name: getattr(stored, name) for name in READ_SETTINGS if name not in config.given}
    kept = {name: value for name, value in kept.items() if value != getattr(config.cc, name)}
    if kept and group.is_main:
        words = ", ".join(f"{name} {value}" for name, value in kept.items())
        log.info("%s was trained with %s: so it goes on", model.model_name_or_path, words)
    return replace(config, cc=replace(config.cc, **kept))


def build_data(config: Config, group: Group) -> RunData:
    """Tokenise the training and validation rows: rank 0 first, the others read its cache."""
    model, data = config.model, config.data
    export.check_model_folder(model.model_name_or_path)
    option = "tokenizer_name" if model.tokenizer_name else "model_name_or_path"
    tokenizer = export.load_part(
        AutoTokenizer, getattr(model, option), option, trust_remote_code=model.trust_remote_code
    )
    template = load_template(tokenizer, model.chat_template)

    def read(files: tuple[str, ...], split: str | tuple[str, ...], require_english: bool = False) -> Dataset:
        rows, summary = load_tokenised(
            files,
            tokenizer,
            template,
            max_length=data.max_length,
            max_english_length=data.max_english_length,
            on_long=data.on_long,
            on_bad_row=data.on_bad_row,
            column_map=data.column_map,
            split=split,
            require_english=require_english,
            cache_dir=data.data_cache_dir,
        )
        if group.is_main:
            log.info("%s", summary)
        return rows

    with main_first(group, "tokenising"):
        train = read(data.train_file, "train", require_english=config.train.method == "cc")
        # Never the train split: its loss would say nothing new.
        validation = read(data.validation_file, ("validation", "test")) if data.validation_file else None
    return RunData(tokenizer, template, train, validation)


def build_model(config: Config, group: Group) -> tuple[CCModelForCausalLM, dict[str, Any]]:
    """The model, sharded from the start under ZeRO-3, and the engine's configuration."""
    model_config, train = config.model, config.train
    if not group.is_main:
        transformers_logging.set_verbosity_error()  # rank 0 speaks
    transformers_logging.disable_progress_bar()
    hf_config = _load_config(config)
    ds_config = engine_config(train, hf_config.hidden_size)
    # Plain SFT trains no W, which would be the identity in the tuned model.
    cc_config = replace(config.cc, transform_share=0.0) if train.method == "sft" else config.cc
    if train.tensor_parallel_size > 1:
        check_tensor_parallel(concrete_class(hf_config), hf_config, ds_config)
        options = {name: getattr(model_config, name) for name in ("lora_rank", "use_liger_kernel")}
        for name, value in (options | {"transform_share": cc_config.transform_share}).items():
            if value:
                raise ValueError(f"{name} does not go with tensor_parallel_size (docs/sharding.md): use ZeRO-3 alone")
    options: dict[str, Any] = {"trust_remote_code": model_config.trust_remote_code}
    # Training batches are packed: flash attention's variable-length kernels, or ours over SDPA.
    options["attn_implementation"] = model_config.attn_implementation or PACKED
    construction = sharded_construction(ds_config)  # alive while the model is built
    model = CCModelForCausalLM.from_pretrained(
        model_config.model_name_or_path,
        cc_config=cc_config,
        torch_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        config=hf_config,
        **options,
    )
    del construction
    if model_config.use_liger_kernel:
        model.labelled_loss = liger_loss()
    if model_config.lora_rank:
        # Under ZeRO-3 rank 0 alone has drawn new weights by now; the adapters start the same everywhere.
        torch.manual_seed(train.seed)
        add_lora(model, model_config)
    if model_config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if train.method == "sft":
        model.decision_maker.requires_grad_(False)
    if model.transform is not None:  # it came with the folder, and fits other weights than training will leave
        model.set_transform(None)
        if model.trained_transform is None and group.is_main:
            log.info("the Transform Matrix of %s is left behind: fit one anew", model_config.model_name_or_path)
    if model.trained_transform is not None:  # it has started from the folder's
        model.trained_transform.requires_grad_(True)
    return model, ds_config


def _load_config(config: Config) -> PretrainedConfig:
    name, trusted = config.model.model_name_or_path, config.model.trust_remote_code
    return text_config(export.load_part(AutoConfig, name, "model_name_or_path", trust_remote_code=trusted))


def build_trainer(
    config: Config,
    group: Group,
    data: RunData,
    model: CCModelForCausalLM,
    ds_config: dict[str, Any],
    run: RunState,
    requests: Requests,
) -> Trainer:
    """The engine over the model and the trainer over the engine."""
    total_steps = count_steps(config, len(data.train), group.data_size)
    engine = build_engine(model, ds_config, config.train, total_steps, group)
    complete_generation_config(model, data)

    def describe(folder: Path) -> None:
        export.write_description(model, folder)
        data.tokenizer.save_pretrained(folder)

    pad = pad_token_id(data.tokenizer)
    return Trainer(engine, group, config, data.train, data.validation, pad, run, requests, describe)


def export_model(trainer: Trainer, data: RunData, folder: Path) -> None:
    """The tuned model in `folder`: a stock checkpoint, its tokenizer, the connection. Every rank must call it."""
    model = trainer.engine.module
    state_dict = full_state_dict(model, keep=trainer.group.is_main)
    with main_first(trainer.group, "saving the model"):
        if trainer.group.is_main:
            state_dict = export.trained_connection(state_dict, trainer.train_config.method)
            model.save_pretrained(folder, state_dict=state_dict)
            data.tokenizer.save_pretrained(folder)
            log.info("saved the model in %s", folder)
    trainer.group.barrier()  # rank 0, which may hold the store, does not leave while another still looks into it


def complete_generation_config(model: CCModelForCausalLM, data: RunData) -> None:
    """A built-in template travels with the model, and generate stops where its turn ends.

    Before the first step: transformers refuses to save some settings that it loads.
    """
    data.tokenizer.chat_template = data.template.chat_template
    settings = model.generation_config
    settings.eos_token_id = list(data.template.stop_token_ids)
    settings.pad_token_id = pad_token_id(data.tokenizer)
    if settings.temperature == 0 or settings.top_k == 1:  # greedy, in words that generate refuses or would sample by
        settings.do_sample = False
        settings.temperature = settings.top_p = settings.top_k = None
    try:
        settings.validate(strict=True)
    except ValueError:
        # A temperature or top_p beside `do_sample: false`, or beside nothing: whoever wrote them meant to sample.
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"the model's generation_config.json could not be saved again: {error}") from error
