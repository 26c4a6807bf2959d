"""The report's scores against plain loops, and its warnings on transforms that are known to be good or useless."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cc_ds.transform.report import format_report, transform_report

N, LAYERS, HIDDEN = 12, 2, 8
LANGS = ["sw", "yo", "tr"] * 4
ENGLISH_IDS = torch.tensor([7, 7, 7, 3, 3, 3, 9, 9, 9, 1, 1, 1])


def activations(noise: float, seed: int = 0):
    """Three languages share each English prompt: S = E R + noise with R a rotation, so E = S R^T."""
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(4, LAYERS, HIDDEN, generator=generator)
    target = distinct[torch.unique(ENGLISH_IDS, return_inverse=True)[1]]
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    source = target @ rotation + noise * torch.randn(N, LAYERS, HIDDEN, generator=generator)
    return source, target, rotation.T.contiguous()


def report_of(source, target, transform):
    return transform_report(source, target, transform, LANGS, ENGLISH_IDS, mean_target=target.mean(0))


def by_loops(predicted, target, lang, layer):
    rows = [i for i in range(N) if LANGS[i] == lang]
    error = size = cosine = hits = 0.0
    for i in rows:
        p, e = predicted[i, layer], target[i, layer]
        error += float(((p - e) ** 2).sum())
        size += float((e**2).sum())
        cosine += float(p @ e / p.norm() / e.norm())
        near = max(range(N), key=lambda j: float(p @ target[j, layer] / target[j, layer].norm()))
        hits += ENGLISH_IDS[near] == ENGLISH_IDS[i]
    return math.sqrt(error / size), cosine / len(rows), float(hits) / len(rows)


def test_scores_equal_plain_loops():
    source, target, transform = activations(noise=0.5)
    report = report_of(source, target, transform)
    predictions = {
        "transform": source @ transform,
        "identity": source,
        "mean": target.mean(0).expand_as(target),
    }
    assert report["pairs"] == 12 and report["candidates"] == 4
    for name, predicted in predictions.items():
        for lang in set(LANGS):
            for layer in range(LAYERS):
                entry = report["languages"][lang][name]
                found = [entry[metric]["layers"][layer] for metric in ("relative_error", "cosine", "retrieval")]
                assert found == pytest.approx(by_loops(predicted, target, lang, layer), abs=1e-5)
                assert report["languages"][lang]["pairs"] == 4
            layers = report["languages"][lang][name]["cosine"]["layers"]
            assert report["languages"][lang][name]["cosine"]["mean"] == pytest.approx(sum(layers) / LAYERS)


def test_a_right_transform_is_perfect_and_silent():
    source, target, transform = activations(noise=0.0)
    report = report_of(source, target, transform)
    summary = report["all"]["transform"]
    assert summary["relative_error"]["mean"] < 1e-5
    assert summary["cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    assert summary["retrieval"]["mean"] == 1
    assert report["warnings"] == []


def test_every_layer_gets_its_own_matrix():
    source, target, transform = activations(noise=0.0)
    per_layer = torch.stack([transform, torch.zeros_like(transform)])
    summary = report_of(source, target, per_layer)["all"]["transform"]
    assert summary["relative_error"]["layers"] == pytest.approx([0, 1], abs=1e-5)
    # All similarities are zero: a tie, which must not count as a hit.
    assert summary["retrieval"]["layers"] == [1, 0]


def test_the_identity_is_no_better_than_itself():
    source, target, _ = activations(noise=0.0)
    report = report_of(source, target, torch.eye(HIDDEN))
    text = "\n".join(report["warnings"])
    for place in ("language sw", "language tr", "language yo", "layer 0", "layer 1"):
        assert f"{place}: relative_error" in text and f"{place}: cosine" in text
    assert "warning: language sw" in format_report(report)


def test_a_mean_is_found_out():
    """W that gives the mean English vector for every pair: error as good as the mean's, so a warning."""
    _, target, _ = activations(noise=0.0)
    source = torch.zeros_like(target)
    source[..., 0] = 1
    transform = torch.zeros(LAYERS, HIDDEN, HIDDEN)
    transform[:, 0] = target.mean(0)
    warnings = report_of(source, target, transform)["warnings"]
    assert any("language sw: relative_error" in w and "the mean English vector" in w for w in warnings)


def test_an_identity_that_finds_everything_is_no_reason_to_warn():
    _, target, _ = activations(noise=0.0)
    report = report_of(2 * target, target, 0.5 * torch.eye(HIDDEN))
    assert not any("retrieval" in warning for warning in report["warnings"])


def test_report_is_json_and_text():
    report = report_of(*activations(noise=0.5))
    assert json.loads(json.dumps(report)) == report
    text = format_report(report)
    assert "12 pairs, 4 distinct English prompts (retrieval by chance 0.250)" in text
    figure = report["languages"]["sw"]["transform"]["relative_error"]["mean"]
    assert any(line.startswith("sw") and f"{figure:.3f}" in line for line in text.splitlines())


def test_nothing_held_out_is_an_error():
    source, target, transform = activations(noise=0.0)
    with pytest.raises(ValueError, match="at least one held-out pair"):
        transform_report(source[:0], target[:0], transform, [], ENGLISH_IDS[:0], mean_target=target.mean(0))
    with pytest.raises(ValueError, match="3 languages"):
        transform_report(source, target, transform, LANGS[:3], ENGLISH_IDS, mean_target=target.mean(0))
