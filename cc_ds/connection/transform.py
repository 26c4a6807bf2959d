"""What stands in for the English pass once a model is tuned: E~ = S W.

A `Transform` holds the matrices that tools/fit_transform.py fits: one for all layers, one per layer, or one per
language; each whole, (H, H), or as two factors of rank R, applied one after the other. It describes itself in a
safetensors file (tensors and metadata), so a reader need not guess what a shape means.

Shapes: B rows, L layers, H hidden size, M matrices, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SCOPES = ("shared", "per_layer", "per_language")
_REFIT = "fit it on this model with tools/fit_transform.py"


class Transform(nn.Module):
    """The Transform Matrix, applied on the right. Buffers, so it moves with its model; nothing in it is trained."""

    def __init__(self, factors: Sequence[Tensor], scope: str = "shared", languages: Sequence[str] = ()) -> None:
        """Hold `factors`: one tensor W, or two whose product is W.

        Args:
            factors: (H, H) for scope shared, (L, H, H) per_layer, (M, H, H) per_language; or (..., H, R) and
                (..., R, H). Float32 or float64; narrower ones are widened.
            scope: shared, per_layer or per_language.
            languages: the M languages of scope per_language, in order.

        Raises:
            ValueError: an unknown scope, shapes that do not go together, NaN or Inf.
        """
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"the transform's scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
        for factor in factors:
            bad = int((~torch.isfinite(factor)).sum())
            if bad:
                raise ValueError(
                    f"the transform has {bad} values that are NaN or Inf; fit it again with tools/fit_transform.py "
                    f"and look at the activations it was fitted on"
                )
        shapes = [tuple(factor.shape) for factor in factors]
        whole = len(shapes) == 1 or (len(shapes) == 2 and shapes[0][:-2] == shapes[1][:-2])
        inner = len(shapes) == 1 or shapes[0][-1:] == shapes[-1][-2:-1]
        if not whole or not inner or any(len(shape) != (2 if scope == "shared" else 3) for shape in shapes):
            raise ValueError(f"the transform has shape {_text(shapes)}, which is no {scope} matrix; {_REFIT}")
        if (scope == "per_language") != bool(languages) or len(set(languages)) < len(languages):
            raise ValueError("a per_language transform, and no other, names its languages, each once")
        if languages and len(languages) != shapes[0][0]:
            raise ValueError(f"the transform has {shapes[0][0]} matrices for {len(languages)} languages; {_REFIT}")
        self.scope, self.languages, self.num_factors = scope, tuple(languages), len(factors)
        for number, factor in enumerate(factors):
            dtype = torch.promote_types(factor.dtype, torch.float32)
            self.register_buffer(f"factor{number}", factor.detach().to(dtype), persistent=False)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """W, or the two factors of it."""
        return tuple(getattr(self, f"factor{number}") for number in range(self.num_factors))

    @property
    def matrix(self) -> Tensor:
        """W whole: (H, H), (L, H, H) or (M, H, H)."""
        factors = self.factors
        return factors[0] if len(factors) == 1 else factors[0] @ factors[1]

    @property
    def rank(self) -> int | None:
        """R, or None where W is kept whole."""
        return self.factors[0].shape[-1] if self.num_factors == 2 else None

    def forward(self, source_LBH: Tensor, languages: Sequence[str | None] | None = None) -> Tensor:
        """S W, in S's dtype, computed in W's.

        Args:
            source_LBH: S, (L, B, H).
            languages: B, each row's language. Read by scope per_language alone, where None leaves a row at zero.

        Raises:
            ValueError: scope per_language without languages, or with one it has no matrix for.
        """
        wide_LBH = source_LBH.to(self.factors[0].dtype)
        if self.scope != "per_language":
            return self._times(wide_LBH, slice(None)).to(source_LBH.dtype)
        wanted = self.check_languages(languages, source_LBH.shape[1])
        result_LBH = torch.zeros_like(wide_LBH)
        for number, language in enumerate(self.languages):
            rows = [row for row, name in enumerate(wanted) if name == language]
            if rows:
                result_LBH[:, rows] = self._times(wide_LBH[:, rows], number)
        return result_LBH.to(source_LBH.dtype)

    def _times(self, values: Tensor, which: slice | int) -> Tensor:
        for factor in self.factors:
            values = values @ factor[which]
        return values

    def check_languages(self, languages: Sequence[str | None] | None, rows: int) -> Sequence[str | None]:
        """The languages of a batch. ValueError: not one for each row, or one without a matrix."""
        known = f"one of {', '.join(self.languages)}"
        if languages is None or len(languages) != rows:
            given = "none" if languages is None else str(len(languages))
            raise ValueError(f"this transform has a matrix per language: name {rows} languages ({known}), not {given}")
        for language in languages:
            if language is not None and language not in self.languages:
                unnamed = " (the row names none)" if language == "und" else ""
                raise ValueError(
                    f"the transform has no matrix for language {language!r}{unnamed}, only for "
                    f"{', '.join(self.languages)}; fit one, or read the row without the connection (None)"
                )
        return languages

    def check_fits(self, num_layers: int, hidden_size: int) -> None:
        """ValueError: not of a model of this size."""
        shapes = [tuple(factor.shape) for factor in self.factors]
        leading = {"shared": (), "per_layer": (num_layers,), "per_language": (len(self.languages),)}[self.scope]
        sides = (shapes[0][-2], shapes[-1][-1])
        if sides != (hidden_size, hidden_size) or shapes[0][:-2] != leading:
            square = (hidden_size, hidden_size)
            raise ValueError(
                f"the transform has shape {_text(shapes)}, this model needs {square} or, one per layer, "
                f"{(num_layers, *square)}; {_REFIT}"
            )

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for a safetensors file: `transform`, or `transform.left` and `transform.right`."""
        names = ("transform",) if self.num_factors == 1 else ("transform.left", "transform.right")
        tensors = {name: factor.cpu().contiguous() for name, factor in zip(names, self.factors, strict=True)}
        return tensors, {"transform_scope": self.scope, "transform_languages": json.dumps(self.languages)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Transform | None:
        """What `to_file` gave, or None where the file has none. Without metadata the shape tells the scope."""
        sides = [name for name in ("transform.left", "transform.right") if name in tensors]
        if "transform" not in tensors and not sides:
            return None
        if len(sides) == 1 or ("transform" in tensors and sides):
            raise ValueError(
                f"the transform is either whole or two factors, not {', '.join(sorted(tensors))}; {_REFIT}"
            )
        factors = [tensors[name] for name in sides or ["transform"]]
        if "transform_scope" not in metadata:
            return cls.of(factors[0]) if len(factors) == 1 else cls(factors)
        return cls(factors, metadata["transform_scope"], json.loads(metadata.get("transform_languages", "[]")))

    @classmethod
    def of(cls, matrix: Tensor) -> Transform:
        """A plain tensor: (H, H) for all layers, or (L, H, H), one for each."""
        return cls([matrix], "per_layer" if matrix.ndim == 3 else "shared")


class TrainedTransform(nn.Linear):
    """W as a weight that is trained with the model (CCConfig.transform_share); weight (H, H), which is W transposed.

    An nn.Linear whose forward is all that uses its weight: ZeRO-3 gathers it for that.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, bias=False)
        self.start_from(None)

    @torch.no_grad()
    def start_from(self, matrix_HH: Tensor | None) -> None:
        """Hold W; None: the identity."""
        if matrix_HH is None:
            nn.init.eye_(self.weight)
        else:
            self.weight.copy_(matrix_HH.T)

    def forward(self, activations_LKH: Tensor, own: Tensor) -> Tensor:
        """S W for the rows that `own` (K,) marks, the others as they are; (L, K, H)."""
        return torch.where(own[:, None], super().forward(activations_LKH), activations_LKH)


def _text(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))
