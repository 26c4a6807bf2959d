"""Settings: YAML and command line in, frozen dataclasses out.

One flat space of names: each key of a YAML file, and each `--key value` of the command line (which wins), is a field of
exactly one of the dataclasses below. Names are Hugging Face's where Hugging Face has one. An unknown key is an error
that names the nearest known one. Nothing is changed after `load_config` returns.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class CCConfig:
    """The connection (METHOD, Training). Stored with the model as cc_config.json."""

    fuse_layer: int = 0
    """The target layer whose FFN output receives the English activation."""
    fuse_norm: Literal["none", "match"] = "none"
    """none: English activations as they are; match: each scaled to the norm of the FFN output it may join, so that
    layers differ in direction alone. Ours, not the paper's: in Gemma 3 the former are 25 times the latter."""
    gate: Literal["hard", "soft"] = "hard"
    """hard: one layer is chosen, straight-through gradient; soft: the softmax's mixture."""
    temperature: float = 1.0
    """tau of the gate's softmax."""
    english_grad: bool = True
    """Whether the gradient reaches the English pass."""
    english_dropout: float = 0.0
    """Chance that a training row's English prompt is left out, so that the row passes as plain SFT. Ours, not the
    paper's: a model that always has the real English prompt in training may come to need it."""
    transform_share: float = 0.0
    """Chance that a training row is connected as at inference: by S W, read from its own prompt, not by the English
    one's E. W (H, H) is then trained with the model and saved as its Transform Matrix. Ours, not the paper's."""
    anchor: Literal["last_prompt_token"] = "last_prompt_token"
    """Which prompt token the activations are taken at and fused into."""

    def __post_init__(self) -> None:
        _require(self.fuse_layer >= 0, "fuse_layer", self.fuse_layer, "0 or more")
        _require(self.temperature > 0, "temperature", self.temperature, "positive")
        for name in ("english_dropout", "transform_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        both = self.english_dropout + self.transform_share
        _require(both <= 1, "english_dropout + transform_share", both, "at most 1")


READ_SETTINGS = ("fuse_layer", "fuse_norm", "gate", "temperature")
"""Settings of the connection that say what the model computes, in training and at inference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is trained."""

    model_name_or_path: str
    """A model folder or a name on the hub; its tokenizer too, unless tokenizer_name says otherwise."""
    tokenizer_name: str | None = None
    """A tokenizer other than the model's."""
    chat_template: str | None = None
    """A built-in template (llama3, chatml, mistral, gemma, plain); None: the tokenizer's own."""
    attn_implementation: Literal["flash_attention_2", "flash_attention_3"] | None = None
    """Attention over packed batches by these libraries, on CUDA; None: by torch's, everywhere."""
    use_liger_kernel: bool = False
    """Take the loss by Liger's fused kernel, on CUDA (pip install liger-kernel)."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward."""
    lora_rank: int = 0
    """Train low-rank updates of this rank and the Decision Maker, not the weights themselves; 0: the weights."""
    lora_alpha: float = 16.0
    """The updates are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before the updates."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get one (q_proj v_proj, for example); all-linear: all but the LM head."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Only if you trust its author."""

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or more")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "positive")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What it is trained on."""

    train_file: tuple[str, ...]
    """Files (json, jsonl, csv, parquet, arrow), save_to_disk folders, or names of data sets (name, name:config,
    name:config:split, name::split). Of a data set with splits, train."""
    validation_file: tuple[str, ...] = ()
    """The same, for the evaluation loss. Of a data set with splits, validation, else test."""
    column_map: dict[str, str] = field(default_factory=dict)
    """Our column name -> the file's."""
    max_length: int = 1024
    """Target tokens per row: prompt and response."""
    max_english_length: int = 1024
    """English prompt tokens per row."""
    on_long: Literal["truncate", "skip", "error"] = "truncate"
    """What to do with a row that is longer."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """What to do with rows that can't be used. Either way all are counted, by reason, and the first 20 named."""
    data_cache_dir: str = "~/.cache/cc_ds/data"
    """Where tokenised rows are kept."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 8, "max_length", self.max_length, "8 or more")
        _require(self.max_english_length >= 8, "max_english_length", self.max_english_length, "8 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How it is trained."""

    output_dir: str
    """Logs, checkpoints and the final model."""
    method: Literal["cc", "sft"] = "cc"
    """CC-Tuning, or plain supervised fine-tuning on the same rows."""
    deepspeed: str | None = None
    """A DeepSpeed configuration (ds_configs/); "auto" values are filled in from here. None: ZeRO 0."""
    offload_dir: str | None = None
    """A folder on an NVMe disk of the node itself, where the DeepSpeed configuration offloads to NVMe."""
    tensor_parallel_size: int = 1
    """Neighbouring ranks that hold one copy of the model between them (DeepSpeed's AutoTP), with any ZeRO stage. They
    count as one rank where rows are counted."""
    per_device_train_batch_size: int = 8
    """Rows per micro-batch and rank, on average: rows are dealt to ranks and micro-batches by what they cost."""
    per_device_eval_batch_size: int = 8
    """The same, for the evaluation loss."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    max_tokens_per_micro_batch: int = 0
    """Target tokens that a micro-batch may have; a step then has as few micro-batches as that takes, whatever
    gradient_accumulation_steps says beyond the rows of a step. 0: no limit."""
    num_train_epochs: float = 1.0
    """Epochs; max_steps wins when given."""
    max_steps: int = -1
    """Optimiser steps; -1: as many as the epochs take."""
    learning_rate: float = 1e-5
    """The peak."""
    connection_learning_rate: float | None = None
    """The peak for the Decision Maker and for W of transform_share, which are new weights beside pretrained ones; None:
    learning_rate, as in the paper."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up."""
    warmup_ratio: float | None = None
    """Share of the steps over which the learning rate rises from 0; None: 0.03, unless warmup_steps is given."""
    warmup_steps: int | None = None
    """The same in steps; one of the two is enough."""
    weight_decay: float = 0.0
    """AdamW's; not on norms and biases."""
    adam_beta1: float = 0.9
    """AdamW's."""
    adam_beta2: float = 0.999
    """AdamW's."""
    adam_epsilon: float = 1e-8
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not at all."""
    bf16: bool = False
    """bfloat16 weights and activations with float32 master weights; else float32."""
    seed: int = 42
    """Of data order, noise, dropout and new weights. The same seed gives the same run."""
    logging_steps: int = 10
    """Steps between log lines."""
    eval_steps: int = 0
    """Steps between evaluations; 0: only at the end."""
    save_steps: int = 0
    """Steps between checkpoints; 0: none."""
    save_total_limit: int = 2
    """Newest checkpoints kept."""
    save_keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0: none."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or "latest" (or no value): the newest whole one in output_dir. Another number of ranks may
    have written it (cc_ds/resume.py)."""
    verify_checkpoint: Literal["digests", "sizes"] = "digests"
    """Before a resume: read every file and compare its SHA-256, each rank its share; or compare sizes alone."""
    stop_after_steps: int = 0
    """End the process, after a checkpoint, when this step is reached; 0: run to the end. The schedule is unchanged."""
    step_timeout: float = 1800.0
    """Seconds without a step (or evaluation, or checkpoint) after which the run ends with code 124; 0: never."""
    max_skipped_steps: int = 5
    """Steps in a row whose loss or gradient is NaN or Inf, each skipped, after which the run ends; 0: never."""
    loss_spike: float = 2.0
    """A step's loss this far (in nats) above the median of the last 50 is a spike; 0: none is."""
    on_loss_spike: Literal["warn", "stop"] = "warn"
    """What to do at one."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*at_least_one, "logging_steps", "save_total_limit", "tensor_parallel_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("learning_rate", "num_train_epochs"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        rate = self.connection_learning_rate
        _require(rate is None or rate > 0, "connection_learning_rate", rate, "positive")
        zero_or_more = (
            "max_tokens_per_micro_batch",
            "eval_steps",
            "save_steps",
            "save_keep_every",
            "stop_after_steps",
            "max_grad_norm",
        )
        guards = ("weight_decay", "step_timeout", "max_skipped_steps", "loss_spike")
        for name in (*zero_or_more, *guards):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        ratio, steps = self.warmup_ratio, self.warmup_steps
        _require(ratio is None or 0 <= ratio <= 1, "warmup_ratio", ratio, "between 0 and 1")
        _require(steps is None or steps >= 0, "warmup_steps", steps, "0 or more")
        if ratio is not None and steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are both given: leave one out")

    def rows_per_step(self, ranks: int) -> int:
        """Rows of an optimiser step, over all micro-batches and data-parallel ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks

    def warmup(self, total_steps: int) -> int:
        """Steps over which the learning rate rises from 0."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((0.03 if self.warmup_ratio is None else self.warmup_ratio) * total_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    cc: CCConfig
    train: TrainConfig
    given: frozenset[str] = frozenset()
    """Keys that the user gave; the others have their defaults."""

    def __post_init__(self) -> None:
        if self.train.eval_steps and not self.data.validation_file:
            raise ValueError(
                f"eval_steps is {self.train.eval_steps}, but there is nothing to evaluate: give --validation_file, or "
                "leave eval_steps out"
            )


_PARTS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "cc": CCConfig, "train": TrainConfig}


def load_config(argv: list[str]) -> Config:
    """`--config x.yaml --key value ...` -> Config. `--local_rank=N`, which DeepSpeed's launcher adds, is dropped.

    Raises:
        ValueError: an unknown key, a value of the wrong type, a missing required key, one that would do nothing, a file
            that can't be read. The message names the key and where it stood.
    """
    overrides = parse_command_line(argv)
    overrides.pop("local_rank", None)
    values: dict[str, tuple[Any, str]] = {}
    path = overrides.pop("config", None)
    if path is not None:
        _require(isinstance(path, str), "config", path, "one YAML file")
        values |= {key: (value, path) for key, value in read_yaml(path).items()}
    if not _ONE_OF.isdisjoint(overrides):  # the command line wins over the file in this as well
        values = {key: value for key, value in values.items() if key not in _ONE_OF}
    values |= {key: (value, "command line") for key, value in overrides.items()}
    known = {item.name for part in _PARTS.values() for item in dataclasses.fields(part)}
    for key, (_, source) in values.items():
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
        if key.startswith("lora_") and "lora_rank" not in values:
            raise ValueError(
                f"{source}: {key} is given without lora_rank, which would train all weights: give --lora_rank 16, for "
                f"example, or leave {key} out"
            )
    return Config(**{name: _build(part, values) for name, part in _PARTS.items()}, given=frozenset(values))


_ONE_OF = {"warmup_ratio", "warmup_steps"}
"""Two ways to say one thing."""
_BARE = {"resume_from_checkpoint": "latest"}
"""What an option says without a value, where that is not true."""


def parse_command_line(argv: list[str]) -> dict[str, str | list[str] | bool]:
    """`--key value`, `--key=value`, `--key v1 v2`, or a bare `--flag` for true; dashes and underscores are alike."""
    result: dict[str, str | list[str] | bool] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise ValueError(f"command line: {word!r} is not an option; options look like --learning_rate 1e-5")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key in result:
            raise ValueError(f"command line: --{key} is given twice; several values follow one --{key}")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        result[key] = values[0] if len(values) == 1 else values or _BARE.get(key, True)
    return result


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file of flat keys.

    Raises:
        ValueError: it can't be read, is not YAML, is not a mapping, or gives a key twice.
    """
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); give --config an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected `key: value` lines")
    return loaded


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key twice in a mapping; PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's. Raises yaml.YAMLError: a key that is given twice, with its line."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def from_dict(cls: type, values: dict[str, Any], source: str) -> Any:
    """A config dataclass from a mapping; strict.

    Raises:
        ValueError: an unknown key or a value of the wrong type, naming `source`.
    """
    known = {item.name for item in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
    return _build(cls, {key: (value, source) for key, value in values.items()})


def _build(cls: type, values: dict[str, tuple[Any, str]]) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for item in dataclasses.fields(cls):
        if item.name in values:
            value, source = values[item.name]
            arguments[item.name] = _convert(value, hints[item.name], item.name, source)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{item.name} is missing: give it in the YAML file or as --{item.name}")
    return cls(**arguments)


def _convert(value: Any, hint: Any, name: str, source: str) -> Any:
    """A YAML or command-line value as the field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{source}: {name} is {value!r}, expected {_describe(hint)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)), name, source)
    if origin is Literal:
        if value not in arguments:
            close = _nearest(str(value), arguments)
            raise ValueError(f"{source}: {name} is {value!r}, expected {_describe(hint)}{close}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, arguments[0], name, source) for item in items)
    if origin is dict:
        if isinstance(value, str):
            value = dict(pair.split("=", 1) if "=" in pair else (pair, None) for pair in value.split(","))
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise wrong
        return value
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.lower() in ("true", "1", "yes")
        if isinstance(value, bool):
            return value
        raise wrong
    if hint is str:
        if isinstance(value, str):
            return value
        raise wrong
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = float(value)  # YAML reads 1e-5 as a string
        if hint is int and number != int(number):
            raise wrong
        return int(value) if hint is int and isinstance(value, str) else hint(number)
    except (ValueError, OverflowError):
        raise wrong from None


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, [str(item) for item in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
