"""Noise and draws: the right distribution, and functions of (seed, position) alone."""

from __future__ import annotations

import math

import torch

from cc_ds.connection.decision import gumbel_noise, gumbel_noise_at, uniform_at


def test_gumbel_moments():
    noise = gumbel_noise(2000, 100, generator=torch.Generator().manual_seed(0))
    # Gumbel(0, 1): mean the Euler-Mascheroni constant, variance pi^2 / 6; 200,000 draws
    assert abs(noise.mean().item() - 0.57722) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03


def test_the_gumbel_max_trick():
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = gumbel_noise(100_000, 3, generator=torch.Generator().manual_seed(1))
    shares = torch.bincount((logits + noise).argmax(dim=1), minlength=3) / 100_000
    torch.testing.assert_close(shares, torch.softmax(logits, dim=0), atol=0.01, rtol=0)


def test_noise_depends_on_seed_and_position_alone():
    whole = gumbel_noise_at(range(10), 4, seed=3)
    torch.manual_seed(99)
    assert torch.equal(gumbel_noise_at([7, 2], 4, seed=3), whole[[7, 2]])
    assert not torch.equal(gumbel_noise_at(range(10), 4, seed=4), whole)
    assert len(whole.unique()) == 40


def test_uniform_draws():
    draws = torch.tensor(uniform_at(range(4000), seed=3))
    assert 0 <= draws.min() and draws.max() < 1 and abs(draws.mean().item() - 0.5) < 0.02
    assert abs(uniform_at([17], seed=3)[0] - draws[17].item()) < 1e-6
