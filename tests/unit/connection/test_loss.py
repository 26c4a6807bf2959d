"""The loss over labelled positions: in chunks as in one, and by Liger's kernel as by ours."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from cc_ds.connection import loss as loss_module
from cc_ds.connection.loss import labelled_loss, liger_loss

LIGER = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


def _gradients(loss, cap, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype)
    hidden_NH = torch.randn(23, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (23,))
    value = loss(head, hidden_NH, labels, cap) / 7
    value.backward()
    return [value.detach(), head.weight.grad, hidden_NH.grad]


def _literal(head, hidden_NH, labels, cap):
    logits = hidden_NH @ head.weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("chunk", [2**28, 50 * 4, 1])
def test_against_all_logits_at_once(cap, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", chunk)
    # logits are float32 whatever the model is
    torch.testing.assert_close(
        _gradients(labelled_loss, cap), _gradients(_literal, cap), atol=2e-6, rtol=1e-5, check_dtype=False
    )


def test_no_more_logits_alive_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", 50 * 4)
    sizes = []

    class Head(nn.Linear):
        def forward(self, hidden):
            sizes.append(hidden.shape[0])
            return super().forward(hidden)

    labelled_loss(Head(16, 50, bias=False), torch.randn(10, 16, requires_grad=True), torch.zeros(10).long()).backward()
    assert sizes == [4, 3, 3, 3, 3, 4]


@pytest.mark.parametrize("labels", [0, 1, 3, 9])
def test_as_many_chunks_as_the_fullest_rank_takes(labels, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", 50 * 4)
    head, hidden_NH = nn.Linear(16, 50, bias=False), torch.randn(labels, 16, requires_grad=True)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    loss = labelled_loss(head, hidden_NH, torch.zeros(labels).long(), most_labels=9)
    expected = functional.cross_entropy(hidden_NH @ head.weight.T, torch.zeros(labels).long(), reduction="sum")
    assert len(calls) == 3 and torch.allclose(loss, expected)
    loss.backward()
    assert len(calls) == 6


@pytest.mark.skipif(LIGER, reason="liger-kernel is installed")
def test_liger_not_installed():
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        liger_loss()


@pytest.mark.skipif(not LIGER, reason="needs pip install liger-kernel triton")
def test_liger_equals_ours():
    """In a process of its own: Triton reads TRITON_INTERPRET, which runs kernels on the CPU, when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=300)


if __name__ == "__main__":
    # Without a cap: Triton's interpreter (3.9) can't run Liger's capped kernel.
    ours, liger = _gradients(labelled_loss, None, torch.float32), _gradients(liger_loss(), None, torch.float32)
    torch.testing.assert_close(liger, ours, atol=1e-5, rtol=1e-4)
