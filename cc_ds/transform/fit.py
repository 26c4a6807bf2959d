"""Fit the Transform Matrix: the linear map from a target prompt's FFN outputs to its English prompt's.

N pairs come in as two (N, L, H) tensors, S (target language) and E (English). Their rows are squeezed, block by block,
into one triangular factor that holds everything least squares needs, and an SVD of that factor gives W. The factor is
at most 2H x 2H whatever N is, so more pairs cost time, not memory. Source: "The Transform Matrix (offline)" of the
method; CC-Tuning, arXiv 2506.00875.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Rows squeezed per factorisation, in multiples of H: large enough that carrying the 2H x 2H factor along is cheap.
_BLOCK_ROWS_PER_HIDDEN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """A fitted transform and what its least squares problem looked like."""

    transform: Tensor
    """W, (H, H) for all layers or (L, H, H), one for each; applied on the right: E ~ S W."""
    rows: int
    """Rows of each least squares problem: N * L for one shared matrix, N for one per layer."""
    hidden_size: int
    """H, the rank of a problem that determines W."""
    rank: tuple[int, ...]
    """Numerical rank of S, one entry for each matrix fitted."""
    condition: tuple[float, ...]
    """Largest over smallest singular value of S that counts, one entry for each matrix fitted (inf where S is 0)."""
    relative_error: tuple[float, ...]
    """|S W - E| / |E| on the pairs fitted, Frobenius norms, one entry for each matrix. Says nothing of other pairs."""

    @property
    def rank_deficient(self) -> bool:
        """Whether the pairs leave some directions of W undetermined (they are zero in the minimum-norm solution)."""
        return min(self.rank) < self.hidden_size


def fit_transform(source: Tensor, target: Tensor, ridge: float = 0.0, per_layer: bool = False) -> Tensor:
    """Return the W that minimises  sum over l, n of |S W - E|^2  +  ridge * mean(diag(S^T S)) * |W|^2.

    `source` S and `target` E: (N, L, H), any floating dtype. W: (H, H), or (L, H, H) with `per_layer`, where every
    layer is a problem of its own; float64 if an input is, else float32. The solution is computed in float64.

    `ridge` is relative to the mean diagonal entry of S^T S (for one matrix per layer, of that layer's), so one value
    means the same for every number of pairs, model size and scale of activations. Where S has less than full rank,
    W is the solution of minimum norm and a warning gives the numbers. ValueError: shapes that differ or are empty, a
    dtype that is not floating, NaN or infinity (the first pair and layer are named), a negative ridge.
    """
    return fit_transform_result(source, target, ridge=ridge, per_layer=per_layer).transform


@torch.no_grad()
def fit_transform_result(source: Tensor, target: Tensor, ridge: float = 0.0, per_layer: bool = False) -> FitResult:
    """`fit_transform` with the rank, the condition and the error of the fit beside W."""
    _check(source, target, ridge)
    num_pairs, num_layers, hidden = source.shape
    if per_layer:
        problems = [(source[:, layer], target[:, layer]) for layer in range(num_layers)]
    else:
        problems = [(source.reshape(-1, hidden), target.reshape(-1, hidden))]
    solved = [_solve(*_compress(*problem), rows=len(problem[0]), ridge=ridge) for problem in problems]
    matrices, ranks, conditions, errors = zip(*solved, strict=True)
    dtype = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    transform = torch.stack(matrices) if per_layer else matrices[0]
    result = FitResult(
        transform=transform.to(dtype),
        rows=num_pairs * (1 if per_layer else num_layers),
        hidden_size=hidden,
        rank=ranks,
        condition=conditions,
        relative_error=errors,
    )
    if result.rank_deficient:
        logger.warning(_deficiency(result, num_pairs, num_layers, ridge, per_layer))
    return result


def _compress(source_rows: Tensor, target_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate (rows, H) S and E into at most 2H rows with the same S^T S, S^T E and E^T E, in float64.

    The triangular factor R of [S | E] = Q R has those products because Q is orthonormal, and QR of [R; further rows]
    is QR of them all. Unlike the products themselves it does not square the condition number.
    """
    hidden = source_rows.shape[1]
    block_rows = _BLOCK_ROWS_PER_HIDDEN * hidden
    factor = source_rows.new_zeros((0, 2 * hidden), dtype=torch.float64)
    for start in range(0, len(source_rows), block_rows):
        stop = start + block_rows
        block = torch.cat([source_rows[start:stop].double(), target_rows[start:stop].double()], dim=1)
        factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    return factor[:, :hidden], factor[:, hidden:]


def _solve(source: Tensor, target: Tensor, rows: int, ridge: float) -> tuple[Tensor, int, float, float]:
    """Ridge least squares by SVD: (W, rank of S, condition, relative error). Values at rounding level are dropped."""
    hidden = source.shape[1]
    left, singular, right_t = torch.linalg.svd(source, full_matrices=False)
    # The bound numpy.linalg.lstsq and LAPACK's gelsd are run with, for the matrix as it was before compression.
    cutoff = torch.finfo(torch.float64).eps * max(rows, hidden) * singular[0]
    counts = singular > cutoff
    left, singular, right_t = left[:, counts], singular[counts], right_t[counts]
    penalty = ridge * source.square().sum() / hidden
    weights = singular / (singular.square() + penalty)
    transform = right_t.T @ (weights[:, None] * (left.T @ target))
    rank = len(singular)
    condition = float(singular[0] / singular[-1]) if rank else float("inf")
    residual, size = float((source @ transform - target).norm()), float(target.norm())
    error = residual / size if size > 0 else (0.0 if residual == 0 else float("inf"))
    return transform, rank, condition, error


def _deficiency(result: FitResult, num_pairs: int, num_layers: int, ridge: float, per_layer: bool) -> str:
    where = f" (lowest of {num_layers} layers)" if per_layer else ""
    rows = f"{result.rows} rows ({num_pairs} pairs{'' if per_layer else f' x {num_layers} layers'})"
    effect = "the ridge term decides the rest" if ridge > 0 else "the minimum-norm solution leaves the rest at zero"
    return (
        f"Transform fit is rank-deficient: {rows} span {min(result.rank)} of H = {result.hidden_size} directions"
        f"{where}; {effect}. Use more pairs, and judge the fit on held-out pairs."
    )


def _check(source: Tensor, target: Tensor, ridge: float) -> None:
    if source.shape != target.shape or source.ndim != 3:
        raise ValueError(
            "source and target must be the same shape (N, L, H): "
            f"got source {tuple(source.shape)} and target {tuple(target.shape)}"
        )
    if 0 in source.shape:
        raise ValueError(f"nothing to fit: source has shape {tuple(source.shape)}; give at least one pair (N >= 1)")
    if not ridge >= 0 or ridge == float("inf"):
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge}")
    for name, tensor in (("source", source), ("target", target)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
        bad = (~torch.isfinite(tensor).all(dim=-1)).nonzero()
        if len(bad):
            pair, layer = bad[0].tolist()
            raise ValueError(
                f"{name} holds NaN or infinity at pair {pair}, layer {layer} ({len(bad)} such pair-layer vectors in "
                "all); drop these pairs, or collect the activations in bfloat16 or float32 instead of float16"
            )
