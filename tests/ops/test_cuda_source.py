"""The CUDA source, run on the CPU through cuda_shim, as torch operators: the same samples, the same demands."""

from __future__ import annotations

import pytest
import torch
from ops.cuda_shim import build
from ops.samples import IDS, SAMPLES, Sample, assert_right, run

from cc_ds.ops.library import define

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason=build.NO_COMPILER)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The in-place form on the kernels of kernels.cu, with the signature of gated_fuse."""
    in_place = define("cc_ds_shim")
    torch.ops.load_library(str(build.operators(tmp_path_factory.mktemp("shim"))))

    def function(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask):
        return in_place.apply(ffn_output, english, embedding, weight, noise, anchors, mask, temperature, hard)[:3]

    return function


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_right_and_written(shim, sample):
    torch.use_deterministic_algorithms(True)  # what torch allocates is filled with NaN
    try:
        results = run(shim, sample.inputs(), sample.incoming())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_right(sample, results)


@pytest.mark.slow
def test_many_layers_and_examples(shim):
    sample = Sample(batch=1024, layers=256, hidden=9, positions=2, dtype=torch.bfloat16)
    assert_right(sample, run(shim, sample.inputs(), sample.incoming()))


def test_bit_equal_twice(shim):
    """Blocks and threads run in another order the second time."""
    sample = Sample(batch=2, layers=9, hidden=520, dtype=torch.bfloat16, mask="none")
    first, second = (run(shim, sample.inputs(), sample.incoming()) for _ in range(2))
    for (name, a), b in zip(first.named().items(), second.named().values()):
        assert torch.equal(a, b), name


def test_nan_is_not_hidden(shim):
    inputs = Sample().inputs()
    inputs["noise"][1, 2] = float("nan")
    fused, choice, _ = shim(**inputs)
    assert fused[1, inputs["anchors"][1]].isnan().all() and choice[1].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_opcheck(shim):
    order = ("ffn_output", "english", "embedding", "weight", "noise", "anchors", "mask", "temperature", "hard")
    inputs = tuple(Sample(hidden=8).inputs()[name] for name in order)
    torch.library.opcheck(torch.ops.cc_ds_shim.gated_fuse_.default, inputs)
    with_gradients = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(torch.ops.cc_ds_shim.gated_fuse.default, tuple(with_gradients))
