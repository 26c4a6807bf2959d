"""Ridge least squares from its sufficient statistics.

    statistics -> ridge (given, or the best of a path on held-out rows) -> W -> optionally W of low rank

The usual road is one Cholesky factorisation of S^T S, its columns scaled to one size (activations differ by orders of
magnitude between channels, and that part of the condition costs nothing then). Where S has less than full rank an
eigendecomposition gives the solution of minimum norm instead.

Shapes: H hidden size, K candidates of the ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cc_ds.transform.statistics import Statistics

# Ridge candidates, relative to the mean diagonal entry of S^T S; 0 stands beside them.
RIDGES = (0.0, *(10.0**exponent for exponent in torch.arange(-8, 2.01, 0.5).tolist()))
# Float32 products may raise the residual by this share of it before they are taken in float64.
_RESIDUAL_SHARE = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """W of one problem."""

    matrix: Tensor
    """W, (H, H) float64."""
    rank: int
    """Numerical rank of S."""
    condition: float
    """Largest over smallest singular value of S that counts (inf where S is 0); an estimate, up to a few percent."""
    relative_error: float
    """|S W - E| / |E| on the rows fitted, Frobenius norms."""
    ridge: float
    """Relative to the mean diagonal entry of S^T S."""
    trusted: bool
    """Whether the products behind the statistics were exact enough; if not, take them in float64."""


def solve(statistics: Statistics, ridge: float) -> Solution:
    """The W of least |S W - E|^2 + ridge * mean(diag(S^T S)) * |W|^2; of minimum norm where that leaves a choice."""
    gram, hidden = statistics.gram, len(statistics.gram)
    diagonal = gram.diagonal()
    penalty = ridge * float(diagonal.mean())
    scale = (diagonal + penalty).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    # S that misses directions for want of rows: the factorisation could succeed by rounding alone.
    factor = _cholesky(gram, penalty, scale) if statistics.rows >= hidden or ridge > 0 else None
    scaled_condition = _condition(factor) if factor is not None else float("inf")
    if scaled_condition * hidden * torch.finfo(torch.float64).eps < 0.1:
        matrix = _solve_factored(factor, statistics.cross * scale[:, None]).mul_(scale[:, None])
        # The factorisation says that S has full rank only where no ridge props it up.
        rank, condition = _rank(statistics) if ridge > 0 else (hidden, _condition_of_source(gram, factor, scale))
    else:
        matrix, rank, condition = _minimum_norm(statistics, penalty)
        scaled_condition = float("inf")
    error = _relative_error(statistics, matrix, penalty)
    trusted = statistics.products == torch.float64
    if not trusted and rank == hidden and scaled_condition < float("inf"):
        trusted = _excess(statistics, factor, matrix / scale[:, None], error) <= _RESIDUAL_SHARE
    return Solution(
        matrix=matrix,
        rank=rank,
        condition=condition,
        relative_error=error,
        ridge=ridge,
        trusted=trusted,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RidgePath:
    """How well each ridge does on rows it was not fitted on."""

    ridges: tuple[float, ...]
    """K candidates, relative to the mean diagonal entry of S^T S."""
    errors: tuple[float, ...]
    """K relative errors |S W - E| / |E| on the held-out rows."""

    @property
    def best(self) -> float:
        """The ridge of least error, the largest of equals."""
        return max(zip(self.errors, self.ridges), key=lambda pair: (-pair[0], pair[1]))[1]


def ridge_path(train: Statistics, held_out: Statistics) -> RidgePath:
    """Fit `train` at every candidate and judge on `held_out`, from one eigendecomposition of S^T S.

    With S^T S = V diag(d) V^T, W(r) = V diag(1 / (d + r)) V^T S^T E; so is its error on other rows a form in the
    K vectors 1 / (d + r), whose matrices are computed once.
    """
    values, vectors = torch.linalg.eigh(train.gram)
    counts = values > _cutoff(values)
    seen_by = vectors.T @ train.cross  # V^T S^T E
    outer = seen_by @ seen_by.T
    outer *= vectors.T @ held_out.gram @ vectors
    overlap = ((vectors.T @ held_out.cross) * seen_by).sum(dim=1)
    mean = float(train.gram.diagonal().mean())
    errors = []
    for ridge in RIDGES:
        weights = torch.where(counts, 1 / (values.clamp_min(0) + ridge * mean), 0)
        squared = weights @ outer @ weights - 2 * weights @ overlap + held_out.energy
        errors.append(float((squared.clamp_min(0) / held_out.energy).sqrt()))
    return RidgePath(ridges=RIDGES, errors=tuple(errors))


def low_rank(statistics: Statistics, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best W of rank R for the rows: (H, R) and (R, H), whose product it is.

    Reduced-rank regression: W is projected on the leading right singular vectors of S W.
    """
    _, vectors = torch.linalg.eigh(matrix.T @ statistics.gram @ matrix)
    leading = vectors[:, -rank:].flip(1)
    return matrix @ leading, leading.T.contiguous()


def singular_values(gram: Tensor) -> Tensor:
    """(H,) singular values of a matrix A, largest first, from A^T A."""
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def _cholesky(gram: Tensor, penalty: float, scale: Tensor) -> Tensor | None:
    scaled = gram * scale
    scaled *= scale[:, None]
    scaled.diagonal().add_(penalty * scale.square())
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return None if bool(failed) else factor


def _solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """X of L L^T X = B. torch.cholesky_solve copies the factor, which for one column takes ten times as long."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _minimum_norm(statistics: Statistics, penalty: float) -> tuple[Tensor, int, float]:
    values, vectors = torch.linalg.eigh(statistics.gram)
    counts = values > _cutoff(values)
    weights = torch.where(counts, 1 / (values + penalty), 0)
    matrix = vectors @ (weights[:, None] * (vectors.T @ statistics.cross))
    return matrix, int(counts.sum()), _spread(values[counts])


def _rank(statistics: Statistics) -> tuple[int, float]:
    values = torch.linalg.eigvalsh(statistics.gram)
    counting = values[values > _cutoff(values)]
    return len(counting), _spread(counting)


def _cutoff(values: Tensor) -> float:
    # Rounding level of S^T S; and strictly positive, so that a zero matrix has rank 0.
    return max(float(values[-1]), 0.0) * len(values) * torch.finfo(torch.float64).eps


def _spread(values: Tensor) -> float:
    return float((values[-1] / values[0]).sqrt()) if len(values) else float("inf")


def _condition(factor: Tensor, steps: int = 8) -> float:
    """Condition of A = L L^T by power and inverse iteration, from below; products with vectors only."""
    return _largest(lambda v: factor @ (factor.T @ v), factor, steps) * _largest(
        lambda v: _solve_factored(factor, v), factor, steps
    )


def _condition_of_source(gram: Tensor, factor: Tensor, scale: Tensor, steps: int = 30) -> float:
    inverse = _largest(lambda v: _solve_factored(factor, v * scale[:, None]) * scale[:, None], factor, steps)
    return (_largest(lambda v: gram @ v, factor, steps) * inverse) ** 0.5


def _excess(statistics: Statistics, factor: Tensor, scaled_matrix: Tensor, error: float) -> float:
    """The share by which rounding in the products raises the residual |S W - E|, as expected of random rounding.

    In columns of length 1, entries of S^T S and S^T E are off by at most about eps (of |E_j| in the latter), so S^T E -
    S^T S W, (H, H), by D with |D_ij|^2 ~ eps^2 (|W_j|^2 + |E_j|^2), and S W by L^-1 D, where S^T S = L L^T. At the
    minimum a change enters the residual squared: half of eps^2 trace((S^T S)^-1) (|W|^2 + |E|^2) / residual^2.
    """
    energy = float(statistics.energy)
    if error == 0 or energy == 0:
        return float("inf")
    signs = torch.randint(0, 2, (len(factor), 16), generator=torch.Generator().manual_seed(0)).to(factor) * 2 - 1
    trace = float((signs * _solve_factored(factor, signs)).sum()) / signs.shape[1]  # Hutchinson's estimate
    eps = torch.finfo(statistics.products).eps / 2
    return 0.5 * eps**2 * trace * (float(scaled_matrix.square().sum()) + energy) / (error**2 * energy)


def _largest(product, like: Tensor, steps: int) -> float:
    vector = torch.linspace(1, 2, len(like), dtype=like.dtype, device=like.device).cos()[:, None]
    size = vector.new_zeros(())
    for _ in range(steps):
        vector = product(vector / vector.norm())
        size = vector.norm()
    return float(size)


def _relative_error(statistics: Statistics, matrix: Tensor, penalty: float) -> float:
    energy = float(statistics.energy)
    # S^T S W is S^T E less the penalty's share of W, so the product of S^T S and W need not be taken.
    squared = statistics.energy - (matrix * statistics.cross).sum()
    if penalty:
        squared -= penalty * matrix.square().sum()
    if energy == 0:
        return 0.0 if float(squared) == 0 else float("inf")
    # Below the rounding of the sums nothing is known of the error but that it is small.
    return float((squared.clamp_min(0) / energy).sqrt())
