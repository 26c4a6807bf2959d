"""Fit the Transform Matrix: the linear map from a target prompt's FFN outputs to its English prompt's.

Rows of S (target language) and E (English) are read once, block by block, into sufficient statistics of size H x H
(statistics.py), from which W is solved (solve.py): more pairs cost time, not memory. One matrix for all layers is one
problem; one per layer or per language, as many, solved one after the other. Source: "The Transform Matrix (offline)" of
the method; CC-Tuning, arXiv 2506.00875.

Shapes: N pairs, L layers, H hidden size, M problems.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cc_ds.connection.transform import Transform
from cc_ds.transform.solve import RidgePath, low_rank, ridge_path, solve
from cc_ds.transform.statistics import Statistics

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[Tensor, Tensor, bool]]
"""S and E, each (n, H), and whether these rows choose the ridge (True) or are fitted while it is chosen (False)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One least squares problem; its rows may be read twice."""

    name: str
    """all, a layer's number or a language."""
    rows: Callable[[], Rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """A fitted transform and what its least squares problems looked like; one entry in each tuple for each matrix."""

    transform: Transform
    """Applied on the right: E ~ S W."""
    problems: tuple[str, ...]
    """all; layers' numbers; or languages."""
    rows: tuple[int, ...]
    """Rows of each problem."""
    hidden_size: int
    """H, the rank of a problem that determines W."""
    rank: tuple[int, ...]
    """Numerical rank of S."""
    condition: tuple[float, ...]
    """Largest over smallest singular value of S that counts (inf where S is 0); an estimate."""
    relative_error: tuple[float, ...]
    """|S W - E| / |E| on the pairs fitted, Frobenius norms. Says nothing of other pairs."""
    ridge: tuple[float, ...]
    """Relative to the mean diagonal entry of S^T S."""
    paths: tuple[RidgePath, ...]
    """How the ridge was chosen; empty where it was given."""

    @property
    def rank_deficient(self) -> bool:
        """Whether the pairs leave some directions of W undetermined (they are zero in the minimum-norm solution)."""
        return min(self.rank) < self.hidden_size


def fit_transform(source: Tensor, target: Tensor, ridge: float | str = 0.0, per_layer: bool = False) -> Tensor:
    """Return the W that minimises  sum over l, n of |S W - E|^2  +  ridge * mean(diag(S^T S)) * |W|^2.

    `source` S and `target` E: (N, L, H), any floating dtype. W: (H, H), or (L, H, H) with `per_layer`, where every
    layer is a problem of its own; float64 if an input is, else float32. The solution is computed in float64.

    `ridge` is relative to the mean diagonal entry of S^T S (for one matrix per layer, of that layer's), so one value
    means the same for every number of pairs, model size and scale of activations; "auto" takes the one that does best
    on every fifth pair while the others are fitted, and then fits all. Where S has less than full rank, W is the
    solution of minimum norm and a warning gives the numbers. ValueError: shapes that differ or are empty, a dtype that
    is not floating, NaN or infinity (the first pair and layer are named), a ridge that is neither "auto" nor a number
    of at least 0.
    """
    scope = "per_layer" if per_layer else "shared"
    return fit_transform_result(source, target, ridge=ridge, scope=scope).transform.matrix


def fit_transform_result(
    source: Tensor,
    target: Tensor,
    ridge: float | str = 0.0,
    scope: str = "shared",
    langs: Sequence[str] | None = None,
    rank: int | None = None,
) -> FitResult:
    """`fit_transform` with what the problems looked like beside W.

    `scope`: shared, per_layer, or per_language with each pair's language in `langs`. `rank`: W as two factors of that
    rank. The tensors stay where they are: give them on the GPU to fit there. W comes on the CPU.
    """
    check_activations(source, target)
    _, num_layers, hidden = source.shape
    choosing = torch.arange(len(source)) % 5 == 4 if ridge == "auto" else torch.zeros(len(source), dtype=torch.bool)

    def rows(pairs: Tensor, layers: slice) -> Callable[[], Rows]:
        def read() -> Rows:
            for flag in (False, True):
                chosen = (pairs & (choosing == flag)).nonzero().flatten().to(source.device)
                if len(chosen):
                    which = slice(None) if len(chosen) == len(source) else chosen  # all of them: no copy is made
                    part = (tensor[which, layers].reshape(-1, hidden) for tensor in (source, target))
                    yield (*part, flag)

        return read

    everyone = torch.ones(len(source), dtype=torch.bool)
    if scope == "per_layer":
        problems = [Problem(name=str(k), rows=rows(everyone, slice(k, k + 1))) for k in range(num_layers)]
    elif scope == "per_language":
        if langs is None or len(langs) != len(source):
            raise ValueError(f"one matrix per language needs {len(source)} languages, one for each pair")
        problems = [
            Problem(name=lang, rows=rows(torch.tensor([other == lang for other in langs]), slice(None)))
            for lang in sorted(set(langs))
        ]
    else:
        problems = [Problem(name="all", rows=rows(everyone, slice(None)))]
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    return fit_problems(problems, hidden, scope, ridge=ridge, rank=rank, dtype=dtype, device=source.device)


@torch.no_grad()
def fit_problems(
    problems: Sequence[Problem],
    hidden_size: int,
    scope: str,
    *,
    ridge: float | str = "auto",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    group=None,
) -> FitResult:
    """Fit every problem, one in memory at a time: 4 H x H float64 matrices and the working space of the solver.

    What stays is W, in `dtype`, on the CPU.

    `dtype`: of the rows, and of W. `group`: ranks (dist.group.Group) that each read rows of their own; every rank gets
    the result. ValueError: a ridge or rank out of range.
    """
    if ridge != "auto" and not (isinstance(ridge, (int, float)) and 0 <= ridge < float("inf")):
        raise ValueError(f'ridge must be "auto" or a finite number >= 0, got {ridge}')
    if rank is not None and not 1 <= rank <= hidden_size:
        raise ValueError(f"the rank of W must be between 1 and {hidden_size}, the hidden size, got {rank}")
    shapes = [(hidden_size, hidden_size)] if rank is None else [(hidden_size, rank), (rank, hidden_size)]
    whole = [torch.empty(len(problems), *shape, dtype=dtype) for shape in shapes]
    paths, numbers = [], []
    for number, problem in enumerate(problems):
        path, found = _fit(problem, [parts[number] for parts in whole], ridge, dtype, device, group)
        paths += [path] if path is not None else []
        numbers.append(found)
    if scope == "shared":
        whole = [parts[0] for parts in whole]
    names = tuple(problem.name for problem in problems)
    result = FitResult(
        transform=Transform(whole, scope, names if scope == "per_language" else ()),
        problems=names,
        hidden_size=hidden_size,
        paths=tuple(paths),
        **{name: tuple(found[name] for found in numbers) for name in numbers[0]},
    )
    if result.rank_deficient:
        logger.warning(_deficiency(result))
    return result


def _fit(
    problem: Problem,
    factors: Sequence[Tensor],
    ridge: float | str,
    dtype: torch.dtype,
    device: torch.device | str,
    group,
) -> tuple[RidgePath | None, dict[str, float]]:
    """Fill `factors` with W, or with two factors of it; how the ridge was chosen, and entries of a FitResult."""
    hidden_size, rank = factors[0].shape
    # Float32 products first; where they are not exact enough, the rows are read again.
    for products in (dtype,) if dtype == torch.float64 else (torch.float32, torch.float64):
        train, choosing = (Statistics(hidden_size, products, device) for _ in range(2))
        for source, target, chooses in problem.rows():
            (choosing if chooses else train).add(source, target)
        train.complete(group)
        choosing.complete(group)
        path = ridge_path(train, choosing) if ridge == "auto" and train.rows and choosing.rows else None
        train.merge(choosing)
        solution = solve(train, ridge if ridge != "auto" else path.best if path else 0.0)
        if solution.trusted:
            break
    if ridge == "auto" and path is None:
        logger.warning("%s: too few English prompts to choose a ridge on some of them; fitted without", problem.name)
    found = (solution.matrix,) if len(factors) == 1 else low_rank(train, solution.matrix, rank)
    for factor, values in zip(factors, found, strict=True):
        factor.copy_(values)
    names = ("rank", "condition", "relative_error", "ridge")
    return path, {"rows": train.rows} | {name: getattr(solution, name) for name in names}


def _deficiency(result: FitResult) -> str:
    worst = min(range(len(result.rank)), key=lambda k: result.rank[k])
    kind = {"per_layer": "layer ", "per_language": "language "}.get(result.transform.scope, "")
    where = f" ({kind}{result.problems[worst]}, the lowest of {len(result.rank)})" if kind else ""
    ridge = result.ridge[worst]
    effect = "the ridge term decides the rest" if ridge > 0 else "the minimum-norm solution leaves the rest at zero"
    return (
        f"Transform fit is rank-deficient: {result.rows[worst]} rows span {result.rank[worst]} of "
        f"H = {result.hidden_size} directions{where}; {effect}. Use more pairs, and judge the fit on held-out pairs."
    )


def check_activations(source: Tensor, target: Tensor, pair_ids: Sequence[int] | None = None) -> None:
    """ValueError: activations (N, L, H) that no fit can use; `pair_ids` name the pairs in the message."""
    if source.shape != target.shape or source.ndim != 3:
        raise ValueError(
            "source and target must be the same shape (N, L, H): "
            f"got source {tuple(source.shape)} and target {tuple(target.shape)}"
        )
    if 0 in source.shape:
        raise ValueError(f"nothing to fit: source has shape {tuple(source.shape)}; give at least one pair (N >= 1)")
    for name, tensor in (("source", source), ("target", target)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if torch.isfinite(tensor.sum()):  # a sum has what its terms have; only where it overflows is there more to see
            continue
        bad = (~torch.isfinite(tensor).all(dim=-1)).nonzero()
        if len(bad):
            pair, layer = bad[0].tolist()
            raise ValueError(
                f"{name} holds NaN or infinity at pair {pair_ids[pair] if pair_ids else pair}, layer {layer} "
                f"({len(bad)} such pair-layer vectors in all); drop these pairs, or collect the activations in "
                "bfloat16 or float32 instead of float16"
            )
