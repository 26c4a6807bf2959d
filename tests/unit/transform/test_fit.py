"""fit_transform against numpy's least squares, an explicit normal equation, and matrices of the authors' code."""

from __future__ import annotations

import logging
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from cc_ds.transform import fit, fit_transform, fit_transform_result, run, statistics

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "matrix"


def pairs(n: int, layers: int, hidden: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, layers, hidden, generator=generator, dtype=torch.float64)
    truth = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(n, layers, hidden, generator=generator, dtype=torch.float64)
    return source.to(dtype), (source @ truth + noise).to(dtype)


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("rank", [None, 3])
def test_one_problems_matrices_are_in_memory_at_a_time(rank, monkeypatch):
    solve, solved, alive = fit.solve, [], []

    def counting(*args):
        alive.append(sum(matrix() is not None for matrix in solved))
        solution = solve(*args)
        solved.append(weakref.ref(solution.matrix))
        return solution

    monkeypatch.setattr(fit, "solve", counting)
    result = fit_transform_result(*pairs(20, 5, 8), scope="per_layer", rank=rank)
    assert alive == [0] * 5
    with Sizes() as sizes:
        spectra = run._numbers(result)["singular_values"]
    assert sizes.largest == 64
    expected = torch.linalg.svdvals(result.transform.matrix)
    torch.testing.assert_close(torch.tensor(spectra, dtype=torch.float64), expected, atol=1e-6, rtol=0)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden matrices (../shared/golden/matrix) are not here")
@pytest.mark.parametrize("name", ["over", "under"])
def test_equals_the_authors_matrix(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    ours = fit_transform(golden["source"].double(), golden["target"].double())
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, golden["X_float64"], rtol=0, atol=1e-10)
    single = fit_transform(golden["source"], golden["target"])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, golden["X_float64"].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [3, 40, 200], ids=["under", "over", "several_blocks"])
def test_equals_numpy_lstsq(n):
    source, target = pairs(n, 2, 12)
    expected, *_ = np.linalg.lstsq(source.reshape(-1, 12).numpy(), target.reshape(-1, 12).numpy(), rcond=None)
    np.testing.assert_allclose(fit_transform(source, target).numpy(), expected, atol=1e-11)


def test_block_size_does_not_change_the_solution(monkeypatch):
    source, target = pairs(50, 3, 8)
    whole = fit_transform(source, target)
    monkeypatch.setattr(statistics, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(statistics, "_PANEL", 3)
    torch.testing.assert_close(fit_transform(source, target), whole, rtol=0, atol=1e-12)


def test_minimum_norm_when_columns_repeat(caplog):
    """Plenty of rows but only 5 directions: the solution is numpy's pseudo-inverse, and the log says 5 of 8."""
    source, target = pairs(60, 2, 8)
    source = source @ torch.randn(8, 5, dtype=torch.float64) @ torch.randn(5, 8, dtype=torch.float64)
    expected = np.linalg.pinv(source.reshape(-1, 8).numpy(), rcond=1e-10) @ target.reshape(-1, 8).numpy()
    with caplog.at_level(logging.WARNING):
        result = fit_transform_result(source, target)
    np.testing.assert_allclose(result.transform.matrix.numpy(), expected, atol=1e-9)
    assert result.rank == (5,) and result.rank_deficient and result.rows == (120,)
    assert len(caplog.records) == 1
    assert "120 rows span 5 of H = 8" in caplog.text


def test_full_rank_is_silent(caplog):
    with caplog.at_level(logging.WARNING):
        result = fit_transform_result(*pairs(60, 2, 8))
    assert not caplog.records and result.rank == (8,)


@pytest.mark.parametrize("n", [2, 60], ids=["under", "over"])
def test_ridge_is_the_normal_equation_and_keeps_its_meaning_at_any_size(n):
    source, target = pairs(n, 2, 8)
    rows, wanted = source.reshape(-1, 8), target.reshape(-1, 8)
    gram = rows.T @ rows
    penalty = 0.3 * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    ours = fit_transform(source, target, ridge=0.3)
    torch.testing.assert_close(ours, torch.linalg.solve(gram + penalty, rows.T @ wanted))
    many, scaled = (t.repeat(5, 1, 1) for t in (source, target)), (1000 * source, 1000 * target)
    torch.testing.assert_close(fit_transform(*many, ridge=0.3), ours)
    torch.testing.assert_close(fit_transform(*scaled, ridge=0.3), ours)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_per_layer_fits_every_layer_alone(ridge):
    source, target = pairs(40, 3, 8)
    each = fit_transform(source, target, ridge=ridge, per_layer=True)
    assert each.shape == (3, 8, 8)
    for layer in range(3):
        alone = fit_transform(source[:, [layer]], target[:, [layer]], ridge=ridge)
        torch.testing.assert_close(each[layer], alone)


def test_badly_conditioned_columns_keep_their_accuracy():
    """Activations differ by orders of magnitude between channels; normal equations in S^T S would lose W here."""
    source, _ = pairs(80, 1, 6)
    source = source * torch.logspace(0, -9, 6, dtype=torch.float64)
    truth = torch.randn(6, 6, dtype=torch.float64)
    result = fit_transform_result(source, source @ truth)
    torch.testing.assert_close(result.transform.matrix, truth, rtol=1e-4, atol=1e-4)
    assert result.condition[0] > 1e7 and result.relative_error[0] < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_lose_nothing_that_counts(dtype):
    source, target = pairs(60, 2, 8, dtype=dtype)
    ours = fit_transform(source, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, fit_transform(source.double(), target.double()).float(), rtol=1e-5, atol=1e-5)


def residual(source, target, matrix) -> float:
    return float((source.double().flatten(0, 1) @ matrix.double() - target.double().flatten(0, 1)).norm())


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e6])
def test_float32_data_of_any_condition_have_the_residual_of_numpy(condition):
    """Products are taken in float32 first, and again in float64 where S is badly conditioned (in rotated columns, so
    that no scaling of columns could help)."""
    source, target = pairs(400, 2, 24)
    mixed = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    source = (source * torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64) @ mixed).float()
    target = target.float()
    result = fit_transform_result(source, target)
    rows = [tensor.flatten(0, 1).double().numpy() for tensor in (source, target)]
    best, *_ = np.linalg.lstsq(*rows, rcond=None)
    assert result.rank == (24,)
    assert result.condition[0] == pytest.approx(np.linalg.cond(rows[0]), rel=0.1)
    # W is rounded to float32 at the end; where S is badly conditioned that costs more than the fit does.
    ours = fit_transform_result(source.double(), target.double()) if condition >= 1e5 else result
    expected = residual(source, target, torch.from_numpy(best))
    assert residual(source, target, ours.transform.matrix) <= expected * (1 + 1e-6)


def test_float64_products_are_what_bad_condition_needs(monkeypatch):
    source, target = pairs(400, 2, 24)
    mixed = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    source = (source * torch.logspace(0, -5, 24, dtype=torch.float64) @ mixed).float()
    made = []

    class Watched(statistics.Statistics):
        def __init__(self, hidden_size, products, device):
            made.append(products)
            super().__init__(hidden_size, products, device)

    monkeypatch.setattr(fit, "Statistics", Watched)
    fit_transform(source, target.float())
    assert made == [torch.float32] * 2 + [torch.float64] * 2


def test_ten_pairs_are_said_to_be_too_few(caplog):
    """The authors' example: 10 pairs x L layers of H directions."""
    source, target = pairs(10, 2, 32, dtype=torch.float32)
    result = fit_transform_result(source, target)
    assert result.rank == (20,) and "20 rows span 20 of H = 32" in caplog.text
    best, *_ = np.linalg.lstsq(source.flatten(0, 1).numpy(), target.flatten(0, 1).numpy(), rcond=None)
    np.testing.assert_allclose(result.transform.matrix.numpy(), best, atol=1e-4)


def noisy(n: int, hidden: int = 24):
    generator = torch.Generator().manual_seed(4)
    source = torch.randn(n, 1, hidden, generator=generator, dtype=torch.float64)
    truth = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return source, source @ truth + 8 * torch.randn(n, 1, hidden, generator=generator, dtype=torch.float64)


def test_auto_ridge_is_the_best_of_the_path_on_every_fifth_pair():
    source, target = noisy(60)
    choosing = torch.arange(60) % 5 == 4
    result = fit_transform_result(source, target, ridge="auto")
    errors = []
    for ridge in result.paths[0].ridges:
        alone = fit_transform(source[~choosing], target[~choosing], ridge=ridge)
        errors.append(residual(source[choosing], target[choosing], alone) / float(target[choosing].norm()))
    assert list(result.paths[0].errors) == pytest.approx(errors, rel=1e-6)
    assert result.ridge == (result.paths[0].ridges[errors.index(min(errors))],) and result.ridge[0] > 0.01
    torch.testing.assert_close(result.transform.matrix, fit_transform(source, target, ridge=result.ridge[0]))


def test_auto_ridge_takes_none_where_none_is_needed():
    source, _ = pairs(200, 1, 8)
    truth = torch.randn(8, 8, dtype=torch.float64)
    assert fit_transform_result(source, source @ truth, ridge="auto").ridge[0] <= 1e-7


def test_one_pair_cannot_choose(caplog):
    result = fit_transform_result(*pairs(1, 4, 3), ridge="auto")
    assert result.ridge == (0.0,) and "too few English prompts to choose a ridge" in caplog.text


def test_low_rank_is_the_best_of_its_rank():
    """Reduced-rank regression, by the singular value decomposition of the fitted values; and not W's own truncation."""
    source, target = noisy(200)
    result = fit_transform_result(source, target, rank=3)
    left, right = result.transform.factors
    assert left.shape == (24, 3) and right.shape == (3, 24)
    whole = fit_transform(source, target)
    rows = source.flatten(0, 1)
    _, _, directions = torch.linalg.svd(rows @ whole, full_matrices=False)
    expected = whole @ directions[:3].T @ directions[:3]
    torch.testing.assert_close(result.transform.matrix, expected)
    u, s, v = torch.linalg.svd(whole)
    assert residual(source, target, expected) < residual(source, target, u[:, :3] * s[:3] @ v[:3])


def test_per_language_fits_every_language_alone():
    source, target = pairs(60, 2, 8)
    langs = ["yo", "sw", "sw"] * 20
    result = fit_transform_result(source, target, scope="per_language", langs=langs)
    assert result.transform.languages == ("sw", "yo") and result.rows == (80, 40)
    for number, lang in enumerate(("sw", "yo")):
        rows = [i for i, other in enumerate(langs) if other == lang]
        torch.testing.assert_close(result.transform.matrix[number], fit_transform(source[rows], target[rows]))
    with pytest.raises(ValueError, match="needs 60 languages"):
        fit_transform_result(source, target, scope="per_language")


def test_training_tensors_give_a_plain_matrix():
    source, target = pairs(20, 2, 4)
    assert not fit_transform(source.requires_grad_(), target).requires_grad


def test_zero_source_gives_zero():
    _, target = pairs(5, 2, 4)
    result = fit_transform_result(torch.zeros_like(target), target)
    assert torch.equal(result.transform.matrix, torch.zeros(4, 4, dtype=torch.float64))
    assert result.rank == (0,) and result.relative_error[0] == pytest.approx(1.0)


def test_errors_name_the_trouble():
    source, target = pairs(5, 3, 4)
    with pytest.raises(ValueError, match=r"source \(5, 3, 4\) and target \(4, 3, 4\)"):
        fit_transform(source, target[:4])
    with pytest.raises(ValueError, match=r"\(15, 4\)"):
        fit_transform(source.reshape(-1, 4), target.reshape(-1, 4))
    with pytest.raises(ValueError, match="at least one pair"):
        fit_transform(source[:0], target[:0])
    with pytest.raises(ValueError, match="floating"):
        fit_transform(source.long(), target)
    for ridge in (-1.0, float("nan"), float("inf"), "best"):
        with pytest.raises(ValueError, match="ridge"):
            fit_transform(source, target, ridge=ridge)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = target.clone()
        broken[3, 1, 2] = value
        with pytest.raises(ValueError, match=r"target holds NaN or infinity at pair 3, layer 1 \(1 such"):
            fit_transform(source, broken)
