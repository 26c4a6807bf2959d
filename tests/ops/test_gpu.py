"""The CUDA kernels on a GPU: `make test-gpu`, where there is one."""

from __future__ import annotations

import pytest
import torch
from ops.samples import IDS, SAMPLES, Sample, assert_right, run

from cc_ds import ops
from cc_ds.ops import gated_fuse, gated_fuse_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, or not asked for by -m gpu"),
]


def _on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}


def _run(function, sample: Sample):
    return run(function, _on_gpu(sample.inputs()), tuple(grad.cuda() for grad in sample.incoming()))


def test_the_kernel_is_in_use():
    assert ops.status()["cuda"] == "kernel"


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
@pytest.mark.parametrize("function", [gated_fuse, gated_fuse_])
def test_right(function, sample):
    results = _run(function, sample)
    on_cpu = type(results)(
        results.fused.cpu(),
        results.choice.cpu(),
        results.logits.cpu(),
        {k: v.cpu() for k, v in results.gradients.items()},
    )
    assert_right(sample, on_cpu)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(layers=80, batch=16, hidden=8192, positions=64, dtype=torch.bfloat16),
        Sample(layers=256, batch=1024, hidden=128, positions=2, dtype=torch.bfloat16, hard=False),
    ],
)
def test_full_size_bit_equal_twice(sample):
    first, second = _run(gated_fuse_, sample), _run(gated_fuse_, sample)
    for (name, a), b in zip(first.named().items(), second.named().values()):
        assert torch.equal(a, b), name


def test_nothing_waits_for_the_device():
    sample = Sample(layers=33, hidden=1024, dtype=torch.bfloat16)
    inputs, incoming = _on_gpu(sample.inputs()), tuple(grad.cuda() for grad in sample.incoming())
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(gated_fuse_, inputs, incoming)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_launches_each_way():
    sample = Sample(layers=33, hidden=1024, dtype=torch.bfloat16)
    inputs, incoming = _on_gpu(sample.inputs()), tuple(grad.cuda() for grad in sample.incoming())
    run(gated_fuse_, inputs, incoming)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(gated_fuse_, inputs, incoming)
    kernels = [event.name for event in profile.events() if "cc_ds::cuda" in event.name]
    assert len(kernels) == 4, kernels


def test_under_graph_capture_on_another_stream():
    inputs = _on_gpu(Sample(layers=33, hidden=1024, dtype=torch.bfloat16, mask="some").inputs())
    before = inputs["ffn_output"].clone()
    with torch.no_grad():
        right = gated_fuse(**inputs)
        gated_fuse_(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused, choice, logits = gated_fuse_(**inputs)
        inputs["ffn_output"].copy_(before)
        graph.replay()
    for value, expected in zip((fused, choice, logits), right):
        assert torch.equal(value, expected)
