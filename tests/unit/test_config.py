"""Settings from YAML and the command line: which wins, what types become, what mistakes are told."""

from __future__ import annotations

import dataclasses

import pytest

from cc_ds.config import CCConfig, load_config

REQUIRED = ["--model_name_or_path", "m", "--train_file", "a.jsonl", "--output_dir", "out"]


def test_the_command_line_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\ntrain_file: [a.jsonl, b.csv]\noutput_dir: out\nlearning_rate: 1e-5\nbf16: true\n"
        "column_map: {instruction: question}\nenglish_grad: false\nresume_from_checkpoint: null\n"
    )
    config = load_config(["--local_rank=1", "--config", str(path), "--learning-rate=2e-4", "--max_steps", "7"])
    assert config.train.learning_rate == 2e-4
    assert config.train.max_steps == 7 and type(config.train.max_steps) is int
    assert config.train.bf16 is True and config.train.resume_from_checkpoint is None
    assert config.data.train_file == ("a.jsonl", "b.csv")
    assert config.data.column_map == {"instruction": "question"}
    assert config.cc.english_grad is False


def test_command_line_alone():
    config = load_config([*REQUIRED, "--gradient_checkpointing", "--column_map", "prompt=q,completion=a"])
    assert config.model.gradient_checkpointing is True
    assert config.data.column_map == {"prompt": "q", "completion": "a"}
    assert config.cc == CCConfig()


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], 3), (["--warmup_ratio", "0.2"], 20), (["--warmup_steps", "7"], 7), (["--warmup_steps", "0"], 0)],
)
def test_warmup(options, steps):
    assert load_config([*REQUIRED, *options]).train.warmup(100) == steps


def test_warmup_steps_in_place_of_the_files_ratio(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("warmup_ratio: 0.1\n")
    config = load_config(["--config", str(path), *REQUIRED, "--warmup_steps", "7"])
    assert config.train.warmup(100) == 7


def test_resume_without_a_value_is_the_latest():
    config = load_config(["--resume_from_checkpoint", *REQUIRED, "--bf16"])
    assert config.train.resume_from_checkpoint == "latest" and config.train.bf16 is True


def test_what_needs_another_setting_and_has_it():
    config = load_config([*REQUIRED, "--eval_steps", "5", "--validation_file", "b.jsonl"])
    assert config.train.eval_steps == 5
    config = load_config([*REQUIRED, "--lora_rank", "0", "--lora_alpha", "8"])  # all weights, and said so
    assert config.model.lora_rank == 0


def test_nothing_can_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(REQUIRED).train.seed = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "command line: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "command line: learning_rate is 'fast', expected float"),
        (["--max_steps", "1.5"], "max_steps is '1.5', expected int"),
        (["--bf16", "maybe"], "bf16 is 'maybe', expected bool"),
        (["--method", "cc-tuning"], "method is 'cc-tuning', expected one of cc, sft"),
        (["--gate", "hart"], "gate is 'hart', expected one of hard, soft; did you mean 'hard'"),
        (["--temperature", "0"], "temperature is 0.0, expected positive"),
        (["--english_dropout", "1.5"], "english_dropout is 1.5, expected between 0 and 1"),
        (["--english_dropout", "0.7", "--transform_share", "0.5"], "transform_share is 1.2, expected at most 1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0, expected 1 or more"),
        (["--column_map", "prompt"], "column_map is 'prompt', expected"),
        (["stray"], "output_dir is"),
        (["--lora_alpha", "16"], "lora_alpha is given without lora_rank, .* give --lora_rank 16, .* or leave lora_"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules is given without lora_rank"),
        (["--eval_steps", "5"], "eval_steps is 5, .*: give --validation_file, or leave eval_steps out"),
        (["--deepspeed"], "command line: deepspeed is True, expected str"),
        (["--config"], "config is True, expected one YAML file"),
        (["--warmup_ratio", "0.1", "--warmup_steps", "5"], "warmup_ratio and warmup_steps are both given: leave one"),
        (["--warmup_steps", "-1"], "warmup_steps is -1, expected 0 or more"),
        (["--train_file", "b.jsonl"], "--train_file is given twice; several values follow one --train_file"),
        (["--train-file=b.jsonl"], "--train_file is given twice"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: can't be read"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_config([*REQUIRED, *arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "run.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("a: [\n", "run.yaml: not YAML"),
        ("- a\n", "run.yaml: expected `key: value` lines"),
        ("seed: 1\nmax_steps: 1\nseed: 2\n", r"run.yaml: .*seed is given twice\s+in .*, line 3"),
        ("column_map: {prompt: a, prompt: b}\n", "run.yaml: .*prompt is given twice"),
        ("max_steps: [1]\n", r"run.yaml: max_steps is \[1\], expected int"),
    ],
)
def test_mistakes_in_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(["--config", str(path), *REQUIRED])


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="train_file is missing: give it in the YAML file or as --train_file"):
        load_config(["--model_name_or_path", "m", "--output_dir", "out"])
