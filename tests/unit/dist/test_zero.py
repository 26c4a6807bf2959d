"""How large a parameter is of which only a part is here."""

from __future__ import annotations

import torch
from torch import nn

from cc_ds.dist.zero import is_split, whole_numel


def test_whole_numel():
    plain, partitioned, split = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    partitioned.ds_numel = 48  # ZeRO-3
    split.tensor_model_parallel, split.ds_numel = True, 24  # AutoTP, and ZeRO-3 over its slice
    split.ds_autotp_universal_checkpoint_meta = {"logical_shape": (8, 6)}
    assert [whole_numel(parameter) for parameter in (plain, partitioned, split)] == [6, 48, 48]
    assert [is_split(parameter) for parameter in (plain, partitioned, split)] == [False, False, True]
