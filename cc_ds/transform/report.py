"""How good a Transform Matrix is, on pairs it was not fitted on.

Held-out activations (N, L, H) go through W and through two maps that know nothing (the identity, and the mean English
vector of the fitting pairs); each is scored by language and by layer; W has to beat both, and a warning says where it
does not. Legend of shapes: N pairs, L layers, H hidden size, M distinct English prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cc_ds.connection.transform import Transform

METRICS = ("relative_error", "cosine", "retrieval")
BASELINES = ("identity", "mean")


@torch.no_grad()
def transform_report(
    source: Tensor,
    target: Tensor,
    transform: Transform | Tensor,
    langs: Sequence[str],
    english_ids: Tensor,
    mean_target: Tensor,
) -> dict:
    """Score `transform`, a Transform or W itself, (H, H) or (L, H, H), on held-out pairs.

    `source`, `target`: (N, L, H). `langs`: N target languages. `english_ids`: (N,) integers, equal exactly where two
    pairs have the same English prompt. `mean_target`: (L, H), the mean English vector of the pairs fitted.

    Three scores, each per layer:
      relative_error  |P - E| / |E|, Frobenius norms over the pairs of a language (0 is perfect, lower is better);
      cosine          mean cosine of P and E (1 is perfect);
      retrieval       share of pairs whose P is nearer, by cosine, to its own English vector than to that of every
                      other English prompt among the held-out pairs (chance is 1 / candidates; a tie counts as a miss).
    P is S W, S itself ("identity"), or the mean English vector ("mean"). The figure for a language is the mean over
    layers, so that a layer with large activations does not drown the others. Returns a dict ready for json:
    {pairs, candidates, all, languages: {lang: {pairs, transform | identity | mean: {metric: {mean, layers}}}},
    warnings}.
    """
    transform = Transform.of(transform) if isinstance(transform, Tensor) else transform
    source, target, mean_target = (t.float() for t in (source, target, mean_target))
    if not len(source) == len(target) == len(langs) == len(english_ids) or not len(source):
        raise ValueError(
            "a report needs at least one held-out pair, and as many languages and English ids as pairs: got "
            f"{len(source)} source, {len(target)} target, {len(langs)} languages, {len(english_ids)} English ids"
        )
    predictions = {
        "transform": transform(source.transpose(0, 1), langs).transpose(0, 1),
        "identity": source,
        "mean": mean_target.expand_as(target),
    }
    candidates, own = _distinct_english(target, english_ids)
    scores = {name: _score_pairs(predicted, target, candidates, own) for name, predicted in predictions.items()}

    groups = {lang: [i for i, other in enumerate(langs) if other == lang] for lang in sorted(set(langs))}
    report = {
        "pairs": len(source),
        "candidates": candidates.shape[1],
        "all": _summarise(scores, list(range(len(source)))),
        "languages": {lang: _summarise(scores, rows) for lang, rows in groups.items()},
    }
    return report | {"warnings": _warnings(report)}


def _distinct_english(target: Tensor, english_ids: Tensor) -> tuple[Tensor, Tensor]:
    """English vectors without repetition, (L, M, H), and the place of each pair's own among them, (N,)."""
    distinct, own = torch.unique(english_ids, return_inverse=True)
    first = torch.full((len(distinct),), len(own), dtype=torch.int64, device=own.device)
    first.scatter_reduce_(0, own, torch.arange(len(own), device=own.device), reduce="amin")
    return target[first].transpose(0, 1), own


def _score_pairs(predicted: Tensor, target: Tensor, candidates: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Per pair and layer, each (N, L): squared error, squared size of E, cosine, and whether retrieval hits."""
    hits = []
    for layer in range(target.shape[1]):
        similarity = _unit(predicted[:, layer]) @ _unit(candidates[layer]).T
        right = similarity.gather(1, own[:, None]).squeeze(1)
        rivals = similarity.scatter(1, own[:, None], -math.inf).max(dim=1).values
        hits.append(right > rivals)
    return {
        "squared_error": (predicted - target).square().sum(-1),
        "squared_size": target.square().sum(-1),
        "cosine": (_unit(predicted) * _unit(target)).sum(-1),
        "hit": torch.stack(hits, dim=1).float(),
    }


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-30)


def _summarise(scores: dict[str, dict[str, Tensor]], rows: list[int]) -> dict:
    summary: dict = {"pairs": len(rows)}
    for name, score in scores.items():
        sums = {key: values[rows].double().sum(0) for key, values in score.items()}
        layers = {
            "relative_error": (sums["squared_error"] / sums["squared_size"].clamp_min(1e-300)).sqrt(),
            "cosine": sums["cosine"] / len(rows),
            "retrieval": sums["hit"] / len(rows),
        }
        summary[name] = {key: {"mean": float(v.mean()), "layers": v.tolist()} for key, v in layers.items()}
    return summary


def _warnings(report: dict) -> list[str]:
    """Where W is no better than a baseline: every language (mean over layers) and every layer (all languages)."""
    places = [(f"language {lang}", summary, None) for lang, summary in report["languages"].items()]
    places += [
        (f"layer {layer}", report["all"], layer) for layer in range(len(report["all"]["transform"]["cosine"]["layers"]))
    ]
    warnings = []
    for place, summary, layer in places:
        for metric in METRICS:
            ours, best, name = _against_baselines(summary, metric, layer)
            if _no_better(metric, ours, best):
                label = {"identity": "the identity", "mean": "the mean English vector"}[name]
                warnings.append(f"{place}: {metric} {ours:.3f} is no better than {best:.3f} of {label}")
    return warnings


def _against_baselines(summary: dict, metric: str, layer: int | None) -> tuple[float, float, str]:
    def value(name: str) -> float:
        entry = summary[name][metric]
        return entry["mean"] if layer is None else entry["layers"][layer]

    choose = min if metric == "relative_error" else max
    name = choose(BASELINES, key=value)
    return value("transform"), value(name), name


def _no_better(metric: str, ours: float, best: float) -> bool:
    if metric == "relative_error":
        return not ours < best
    # A baseline that finds every English prompt leaves nothing to beat.
    return not (ours > best or (metric == "retrieval" and ours == best == 1.0))


def format_report(report: dict) -> str:
    """The report as text: a table by language (mean over layers), one by layer (all languages), and the warnings."""
    chance = 1 / report["candidates"]
    head = f"Held-out fit: {report['pairs']} pairs, {report['candidates']} distinct English prompts"
    lines = [f"{head} (retrieval by chance {chance:.3f})"]
    by_language = {**report["languages"], "all": report["all"]}
    rows = [[lang, str(summary["pairs"]), *_cells(summary, layer=None)] for lang, summary in by_language.items()]
    lines += ["", *_table(["language", "pairs"], rows)]
    layers = range(len(report["all"]["transform"]["cosine"]["layers"]))
    lines += ["", *_table(["layer", ""], [[str(n), "", *_cells(report["all"], layer=n)] for n in layers])]
    lines += ["", *(f"warning: {text}" for text in report["warnings"])] if report["warnings"] else []
    return "\n".join(lines)


def _cells(summary: dict, layer: int | None) -> list[str]:
    entries = [summary[name][metric] for metric in METRICS for name in ("transform", *BASELINES)]
    return [f"{entry['mean'] if layer is None else entry['layers'][layer]:.3f}" for entry in entries]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    top = ["", ""] + [text for metric in METRICS for text in (metric.replace("_", " "), "", "")]
    names = head + ["W", "identity", "mean"] * len(METRICS)
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(len(names))]
    # A metric's name stands over the first of its three columns and may run on over the other two.
    heading = "  ".join(t.ljust(w) for t, w in zip(top[:2], widths[:2], strict=True))
    for start in range(2, len(names), 3):
        heading += "  " + top[start].ljust(sum(widths[start : start + 3]) + 4)
    body = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [names, *rows]
    ]
    return [line.rstrip() for line in [heading, *body]]
