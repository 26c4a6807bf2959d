"""Capturing rows against indexing and stacking: values, gradients, recomputation, and what is not copied."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cc_ds.ops import capture_row, capture_rows_ref, collect_rows

B, T, H, LAYERS = 2, 5, 6, 3
POSITIONS = torch.tensor([7, 0, 4])  # of B T = 10; two in one row of the batch


def _network(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=draw, dtype=dtype).requires_grad_()
    weights = [torch.randn(H, H, generator=draw, dtype=dtype).requires_grad_() for _ in range(LAYERS)]
    weigh = torch.randn(LAYERS, len(POSITIONS), H, generator=draw, dtype=dtype)
    return hidden, weights, weigh


def _reference(hidden, weights):
    outputs = []
    for weight in weights:
        outputs.append(torch.tanh(hidden) @ weight)
        hidden = hidden + outputs[-1]
    return hidden, capture_rows_ref(outputs, POSITIONS)


def _captured(hidden, weights, checkpointing=False):
    buffer = torch.full((LAYERS, len(POSITIONS), H), float("nan"), dtype=hidden.dtype)
    rows = {}

    def layer(index, hidden):
        output = torch.tanh(hidden) @ weights[index]
        if index not in rows:  # not at recomputation
            output, rows[index] = capture_row(output, POSITIONS, buffer, index)
        return hidden + output

    for index in range(LAYERS):
        hidden = checkpoint(layer, index, hidden, use_reentrant=False) if checkpointing else layer(index, hidden)
    english = collect_rows(buffer, [rows[index] for index in range(LAYERS)])
    assert english.data_ptr() == buffer.data_ptr()
    return hidden, english


@pytest.mark.parametrize("through", ["english", "both"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients(checkpointing, through):
    hidden, weights, weigh = _network()
    results = []
    for run in (_reference, lambda *args: _captured(*args, checkpointing)):
        last, english = run(hidden, weights)
        # squared, so that english is needed in the backward, when the layers run again
        loss = (english.square() * weigh).sum() + (last.square().sum() if through == "both" else 0)
        results.append([english.detach(), *torch.autograd.grad(loss, [hidden, *weights])])
    for value, right in zip(results[1], results[0]):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)


def test_all_positions():
    """The last layer's block may have run at the anchors alone."""
    rows = torch.randn(1, 3, H, requires_grad=True)
    buffer = torch.zeros(1, 3, H)
    _, row = capture_row(rows, None, buffer, 0)
    english = collect_rows(buffer, [row])
    assert torch.equal(english[0], rows[0])
    gradient = torch.randn(1, 3, H)
    assert torch.equal(torch.autograd.grad(english, rows, gradient)[0][0], gradient[0])


def test_without_gradients():
    hidden, weights, _ = _network()
    with torch.no_grad():
        _, english = _captured(hidden, weights)
        assert torch.equal(english, _reference(hidden, weights)[1])
    assert not english.requires_grad


def test_a_layer_is_missing():
    buffer = torch.zeros(2, 3, H)
    _, row = capture_row(torch.zeros(B, T, H), POSITIONS, buffer, 0)
    with pytest.raises(ValueError, match="1 rows were captured for a buffer of 2 layers"):
        collect_rows(buffer, [row])


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket.__name__, tuple(output.shape) if torch.is_tensor(output) else None))
        return output


def test_what_moves():
    """No stack; backward no copy of the buffer's gradient, and one copy of (B, T, H) per layer."""
    outputs = [torch.randn(B, T, H, requires_grad=True) for _ in range(LAYERS)]
    buffer = torch.empty(LAYERS, 3, H)
    with _Count() as forward:
        hidden, rows = torch.zeros(B, T, H), []
        for index, output in enumerate(outputs):
            output, row = capture_row(output, POSITIONS, buffer, index)
            hidden, rows = hidden + output, [*rows, row]
        english = collect_rows(buffer, rows)
    names = [name for name, _ in forward.calls]
    assert names.count("index_select") == LAYERS and not {"stack", "cat", "clone", "copy_"} & set(names)

    loss = (english * torch.randn_like(english)).sum() + hidden[:, 0].sum()
    with _Count() as backward:
        torch.autograd.grad(loss, outputs)
    made = [(name, shape) for name, shape in backward.calls if name in ("clone", "zeros", "new_zeros", "copy_", "add")]
    assert made.count(("clone", (B, T, H))) == LAYERS
    assert not [shape for _, shape in made if shape == (LAYERS, 3, H)]
