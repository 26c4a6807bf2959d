"""A model that no GPU holds whole, for reading only: partitioned over the ranks from the start, by ZeRO-3."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from cc_ds.dist.engine import sharded_construction

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM


def load_partitioned(path: str | Path, deepspeed_config: str | Path) -> CCModelForCausalLM:
    """The model of a folder in eval mode and in its stored dtype, partitioned over the ranks of the process group.

    Args:
        deepspeed_config: a DeepSpeed file of stage 3; its `zero_optimization` section is what counts here.

    Raises:
        ValueError: a file that can't be read or is not of stage 3.
    """
    import deepspeed

    from cc_ds import CCModelForCausalLM

    dtype = AutoConfig.from_pretrained(path).dtype or torch.float32
    config = _config(deepspeed_config, dtype)
    construction = sharded_construction(config)  # alive while the model is built
    model = CCModelForCausalLM.from_pretrained(path, torch_dtype=dtype)
    del construction
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.module.eval()


def _config(path: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    try:
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a DeepSpeed configuration that can be read ({error})") from error
    if zero.get("stage") != 3:
        raise ValueError(f"{path}: zero_optimization.stage is {zero.get('stage')}; a partitioned model needs stage 3")
    # Sizes of training's buckets, and where its optimiser lives, mean nothing here.
    zero = {key: value for key, value in zero.items() if value != "auto" and key != "offload_optimizer"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }
