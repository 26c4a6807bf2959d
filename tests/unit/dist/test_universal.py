"""What is mended in the optimiser's state after DeepSpeed has loaded a universal checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from cc_ds.dist.universal import load_universal


def test_each_parameter_gets_a_step_of_its_own_where_it_lies(tmp_path):
    step = torch.tensor(7.0)
    on_gpu, offloaded = torch.ones(3, device="meta"), torch.ones(2)  # meta stands for a GPU
    state = {on_gpu: {}, offloaded: {}}

    def load_checkpoint(folder, tag):
        for each in state.values():
            each["step"] = step
        return folder, {}

    engine = SimpleNamespace(
        optimizer=SimpleNamespace(state=state), _config=SimpleNamespace(), load_checkpoint=load_checkpoint
    )
    assert load_universal(engine, tmp_path)
    assert state[on_gpu]["step"].device.type == "meta"
    assert state[offloaded]["step"].device.type == "cpu" and state[offloaded]["step"] is not step
    assert float(state[offloaded]["step"]) == 7.0
