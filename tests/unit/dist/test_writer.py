"""Reading a checkpoint file back: what DeepSpeed keeps in one, and nothing that runs code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from cc_ds.dist.writer import CheckpointWriter


def test_what_deepspeed_keeps_is_read(tmp_path):
    state = {
        "weight": torch.ones(2, 3),
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"weight": fragment_address(numel=6, start=0)}],
        "loss_scaler": LossScaler(scale=2.0),
    }
    CheckpointWriter().save(state, str(tmp_path / "state.pt"))
    loaded = CheckpointWriter().load(str(tmp_path / "state.pt"), map_location="cpu")
    assert torch.equal(loaded["weight"], state["weight"])
    assert loaded["zero_stage"] is ZeroStageEnum.gradients and loaded["loss_scaler"].cur_scale == 2.0
    assert loaded["param_slice_mappings"] == state["param_slice_mappings"]


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_file_that_runs_code_is_refused(tmp_path):
    CheckpointWriter().save({"weight": Code(tmp_path / "touched")}, str(tmp_path / "state.pt"))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        CheckpointWriter().load(str(tmp_path / "state.pt"))
    assert not (tmp_path / "touched").exists()
