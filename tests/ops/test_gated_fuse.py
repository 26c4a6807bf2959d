"""The fused gate on the CPU: its kernel, and plain PyTorch, against the literal reference in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from ops.samples import IDS, SAMPLES, Sample, assert_right, run

from cc_ds import ops
from cc_ds.ops import gated_fuse, gated_fuse_, gated_fuse_ref
from cc_ds.ops.library import define

# The same operators without any kernel.
_PlainInPlace = define("cc_ds_plain")
NEEDS_KERNEL = pytest.mark.skipif(
    ops.status()["cpu"] != "kernel", reason=f"the CPU kernel is not in use: {ops.status()['cpu']}"
)


def _plain(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask):
    return _PlainInPlace.apply(ffn_output, english, embedding, weight, noise, anchors, mask, temperature, hard)[:3]


def _positional(inputs: dict) -> tuple:
    order = ("ffn_output", "english", "embedding", "weight", "noise", "anchors", "mask", "temperature", "hard")
    return tuple(inputs[name] for name in order)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
@pytest.mark.parametrize("function", [gated_fuse, gated_fuse_, _plain], ids=["functional", "in_place", "plain"])
def test_right(function, sample):
    assert_right(sample, run(function, sample.inputs(), sample.incoming()))


@NEEDS_KERNEL
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_equal_whatever_the_threads(threads):
    sample = Sample(batch=19, layers=17, hidden=2060, dtype=torch.bfloat16)
    first = run(gated_fuse, sample.inputs(), sample.incoming())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = run(gated_fuse, sample.inputs(), sample.incoming())
    finally:
        torch.set_num_threads(before)
    for (name, a), b in zip(first.named().items(), again.named().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("hard", [True, False])
def test_many_layers_and_examples(hard):
    sample = Sample(batch=1024, layers=256, hidden=9, positions=2, dtype=torch.bfloat16, hard=hard)
    assert_right(sample, run(gated_fuse_, sample.inputs(), sample.incoming()))


@pytest.fixture
def poisoned_memory():
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_every_output_is_written(poisoned_memory, sample):
    assert torch.empty(8).isnan().all()
    results = run(gated_fuse, sample.inputs(), sample.incoming())
    assert not [name for name, value in results.named().items() if value.isnan().any()]


@pytest.mark.parametrize("mask", ["none", "some"])
def test_gradcheck_of_the_soft_gate(mask):
    sample = Sample(dtype=torch.float64, hard=False, hidden=5, layers=3, positions=2, temperature=0.7, mask=mask)
    inputs = sample.inputs()
    names = ("ffn_output", "english", "embedding", "weight")

    def differentiable(*tensors):
        fused, _, logits = gated_fuse(**{**inputs, **dict(zip(names, tensors))})
        return fused, logits

    assert torch.autograd.gradcheck(differentiable, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("mask", ["none", "some"])
def test_opcheck(hard, mask):
    sample = Sample(hard=hard, mask=mask, hidden=10)
    inputs = _positional(sample.inputs())
    with_gradients = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(torch.ops.cc_ds.gated_fuse.default, tuple(with_gradients))
    inputs = _positional(sample.inputs())
    torch.library.opcheck(torch.ops.cc_ds.gated_fuse_.default, inputs)
    _, english, _, weight, noise, anchors, mask, temperature, _ = inputs
    choice, logits, decision = torch.ops.cc_ds.gated_fuse_(*_positional(sample.inputs()))
    for need_english, incoming in ((True, sample.incoming()), (False, (None, sample.incoming()[1]))):
        torch.library.opcheck(
            torch.ops.cc_ds.gated_fuse_backward.default,
            (
                *incoming,
                english,
                weight,
                decision,
                logits,
                noise,
                choice,
                anchors,
                mask,
                temperature,
                hard,
                need_english,
            ),
        )


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")],
        ),
    ],
)
@pytest.mark.parametrize("function", [gated_fuse, gated_fuse_])
@pytest.mark.parametrize("hard", [True, False])
def test_compiled_whole(function, hard, backend):
    sample = Sample(hard=hard, mask="some")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.compiler.reset()
    assert_right(sample, run(compiled, sample.inputs(), sample.incoming()))


@pytest.mark.parametrize("function", [gated_fuse, gated_fuse_, gated_fuse_ref])
def test_nan_is_not_hidden(function):
    inputs = Sample().inputs()
    inputs["noise"][1, 2] = float("nan")
    fused, choice, _ = function(**inputs)
    row = fused[torch.arange(3), inputs["anchors"]]
    assert row[1].isnan().all() and not row[[0, 2]].isnan().any()
    assert choice[1].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_only_what_is_asked_for():
    """A gradient through one output alone, to one input alone."""
    sample = Sample()
    inputs = sample.inputs()
    fused_gradient, logits_gradient = sample.incoming()
    for through, gradient in ((0, fused_gradient), (2, logits_gradient)):
        for name in ("ffn_output", "english", "embedding", "weight"):
            found = []
            for function in (gated_fuse, gated_fuse_ref):
                leaf = inputs[name].clone().requires_grad_()
                output = function(**{**inputs, name: leaf})[through]
                found += (
                    torch.autograd.grad(output, leaf, gradient, allow_unused=True) if output.requires_grad else [None]
                )
            assert (found[0] is None) == (found[1] is None) or not found[1].any(), (through, name)
            if found[0] is not None:
                torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# ---- in place ----


def test_in_place_changes_the_anchor_rows_alone_and_copies_nothing():
    inputs = Sample().inputs()
    before, memory = inputs["ffn_output"].clone(), inputs["ffn_output"].data_ptr()
    fused, _, _ = gated_fuse_(**inputs)
    assert fused.data_ptr() == memory
    rows = torch.zeros(3, 5, dtype=torch.bool)
    rows[torch.arange(3), inputs["anchors"]] = True
    assert torch.equal(fused[~rows], before[~rows]) and (fused[rows] != before[rows]).all()


def test_gradient_of_the_ffn_output_is_handed_through_uncopied():
    seen = []
    sample = Sample()
    inputs = sample.inputs()
    leaf = inputs["ffn_output"].requires_grad_()
    ffn_output = leaf * 1.0
    ffn_output.register_hook(lambda grad: seen.append(grad.data_ptr()))
    fused, _, _ = gated_fuse_(**{**inputs, "ffn_output": ffn_output})
    gradient = torch.randn_like(fused)
    fused.backward(gradient)
    assert seen == [gradient.data_ptr()]
    assert torch.equal(leaf.grad, gradient)


def test_an_ffn_output_that_autograd_still_needs_is_not_changed_silently():
    inputs = Sample().inputs()
    leaf = inputs["ffn_output"].requires_grad_()
    needed = leaf.exp()  # its backward reads its output
    fused, _, _ = gated_fuse_(**{**inputs, "ffn_output": needed})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused.sum().backward()


@pytest.mark.parametrize("kind", ["leaf", "view", "identity"])
def test_what_may_not_be_changed_is_copied(kind):
    sample = Sample()
    inputs = sample.inputs()
    leaf = inputs["ffn_output"].clone().requires_grad_()
    base = leaf * 1.0
    given = {"leaf": leaf, "view": base.view(3, 5, 64), "identity": _Identity.apply(base)}[kind]
    fused, _, _ = gated_fuse_(**{**inputs, "ffn_output": given})
    assert torch.equal(given.detach(), leaf.detach()) or kind == "identity"
    fused_gradient, _ = sample.incoming()
    assert torch.equal(torch.autograd.grad(fused, leaf, fused_gradient)[0], fused_gradient)
    torch.testing.assert_close(fused, gated_fuse(**inputs)[0])


class _Identity(torch.autograd.Function):
    """As DeepSpeed wraps what a module returns."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"english": torch.zeros(4, 2, 64)}, r"english|embedding"),
        ({"noise": torch.zeros(4, 3)}, r"noise has shape \(4, 3\), expected \(3, 4\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"anchors": torch.zeros(3)}, "anchors must be integers"),
        ({"weight": torch.zeros(4, 64, dtype=torch.int64)}, "weight must be floating point"),
        (
            {"english": torch.zeros(0, 3, 64), "weight": torch.zeros(0, 64), "noise": torch.zeros(3, 0)},
            "nothing to choose",
        ),
    ],
)
@pytest.mark.parametrize("function", [gated_fuse, gated_fuse_])
def test_refused(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**{**Sample().inputs(), **change})


@NEEDS_KERNEL
@pytest.mark.parametrize("anchor", [-1, 5])
def test_an_anchor_outside_the_sequence(anchor):
    inputs = Sample().inputs()
    inputs["anchors"][1] = anchor
    with pytest.raises(RuntimeError, match=rf"anchors\[1\] is {anchor}, outside \[0, 5\)"):
        gated_fuse(**inputs)


def test_several_dtypes_at_once():
    """As under torch.autocast: a bfloat16 FFN output and a float32 Decision Maker."""
    inputs = Sample(dtype=torch.bfloat16).inputs()
    inputs["weight"] = inputs["weight"].float() * 1.001
    for function in (gated_fuse, gated_fuse_):
        for value, right in zip(function(**inputs), gated_fuse_ref(**inputs)):
            assert value.dtype == right.dtype and torch.equal(value, right)
