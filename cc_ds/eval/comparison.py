"""Several runs beside each other: differences from the first, with the significance of each.

Runs come as the json files that tools/evaluate.py writes, or folders of them; those of one task are compared on the
rows that all of them answered (EvalRow.id). A line of the table is a language, then the high- and low-resource averages
and the average of all. Marks: * for p < 0.05, ** for p < 0.01, each line by itself (statistics.py, `compare`); with
twenty languages one mark is expected by chance. Averages count the translations of one item as one (EvalRow.item).
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cc_ds.eval.benchmarks import resource_level
from cc_ds.eval.statistics import Difference, compare


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of one task."""

    name: str
    """Label in tables."""
    task: str
    """Its name."""
    rules: dict[str, str]
    """Name of a score -> its metric."""
    scores: dict[tuple[str, str, int], dict[str, float]]
    """(language, row id, how many with this id came before) -> the row's scores by name."""
    items: dict[tuple[str, str, int], str]
    """The same keys -> the row's item."""
    seconds: float
    """Time spent generating."""
    tokens: int
    """Tokens generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run's score on one line of the table."""

    mean: float
    """Between 0 and 1."""
    difference: Difference | None
    """From the first run; None for that run itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs of one task by one score."""

    task: str
    metric: str
    runs: list[Run]
    """The first is the baseline."""
    lines: dict[str, list[Cell]]
    """Language, "high", "low" or "macro" -> a cell per run."""
    rows: dict[str, int]
    """The same keys -> rows compared."""
    left_out: int
    """Rows of the first run that another did not answer."""


def read_runs(path: str | Path, name: str | None = None) -> list[Run]:
    """The run of a json file, or all runs in a folder; `name`: the label, else the file's or folder's with the mode.

    ValueError: no run there, or a file that tools/evaluate.py did not write.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    runs = [_read_run(file, name, path.resolve().name if path.is_dir() else path.stem) for file in files]
    if not runs:
        raise ValueError(f"{path}: no .json files; name a file or folder that tools/evaluate.py wrote (--output_dir)")
    return runs


def _read_run(file: Path, name: str | None, label: str) -> Run:
    if not file.exists():
        raise ValueError(f"{file}: no such file or folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scores: dict[tuple[str, str, int], dict[str, float]] = {}
        items = {}
        for answer in content["answers"]:
            key = (answer["lang"], answer["id"])
            count = 0
            while (*key, count) in scores:
                count += 1
            scores[(*key, count)], items[(*key, count)] = answer["scores"], answer["item"]
        return Run(
            name=name or f"{label} ({content['mode']})",
            task=content["task"],
            rules=content["rules"],
            scores=scores,
            items=items,
            seconds=content["seconds"],
            tokens=content["tokens_out"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a result of tools/evaluate.py ({error!r})") from error


def compare_runs(runs: Sequence[Run], metric: str | None = None, seed: int = 0) -> Comparison:
    """Compare runs of one task with the first of them by `metric` (default: the headline).

    ValueError: fewer than two runs, another task, rules that differ, or no row in common.
    """
    first = runs[0]
    metric = metric or next(iter(first.rules))
    for run in runs:
        if run.task != first.task or run.rules.get(metric) != first.rules.get(metric) or metric not in run.rules:
            raise ValueError(
                f"{run.name} ({run.task}) and {first.name} ({first.task}) do not both score {metric!r} by one rule: "
                f"{run.rules} and {first.rules}"
            )
    common = [key for key in first.scores if all(key in run.scores for run in runs)]
    if len(runs) < 2 or not common:
        raise ValueError(f"{first.task}: a comparison needs two runs that answered the same rows")
    values = [_by_language(common, lambda key, run=run: run.scores[key][metric]) for run in runs]
    items = _by_language(common, first.items.__getitem__)
    groups = {lang: [lang] for lang in sorted(values[0])}
    for level in ("high", "low"):
        if langs := [lang for lang in values[0] if resource_level(lang) == level]:
            groups[level] = langs
    groups["macro"] = list(values[0])
    return Comparison(
        task=first.task,
        metric=metric,
        runs=list(runs),
        lines={line: _cells([_select(v, langs) for v in values], items, seed) for line, langs in groups.items()},
        rows={line: sum(len(values[0][lang]) for lang in langs) for line, langs in groups.items()},
        left_out=len(first.scores) - len(common),
    )


def _by_language(
    keys: Sequence[tuple[str, str, int]], value: Callable[[tuple[str, str, int]], Any]
) -> dict[str, list[Any]]:
    values = defaultdict(list)
    for key in keys:
        values[key[0]].append(value(key))
    return values


def _select(values: Mapping[str, list[float]], langs: Sequence[str]) -> dict[str, list[float]]:
    return {lang: values[lang] for lang in langs}


def _cells(values: Sequence[dict[str, list[float]]], items: Mapping[str, list[str]], seed: int) -> list[Cell]:
    means = [sum(sum(group) / len(group) for group in groups.values()) / len(groups) for groups in values]
    differences = [None, *(compare(values[0], other, seed, items=items) for other in values[1:])]
    return [Cell(mean=mean, difference=difference) for mean, difference in zip(means, differences)]


def format_markdown(comparison: Comparison) -> str:
    """The table in Markdown, in percent, with costs below it."""
    first, *others = comparison.runs
    heads = [first.name, *(head for run in others for head in (run.name, "difference"))]
    lines = [
        f"**{comparison.task}, {comparison.metric}** in percent; differences from {first.name} with 95 % intervals "
        "(* p < 0.05, ** p < 0.01)",
        "",
        "| | rows | " + " | ".join(heads) + " |",
        "|---|---|" + "---|" * len(heads),
    ]
    for line, cells in comparison.lines.items():
        texts = [f"{100 * cells[0].mean:.1f}"]
        for cell in cells[1:]:
            d = cell.difference
            texts += [
                f"{100 * cell.mean:.1f}",
                f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]{significance_mark(d.p)}",
            ]
        lines.append(f"| {line} | {comparison.rows[line]} | " + " | ".join(texts) + " |")
    costs = "; ".join(f"{run.name}: {run.tokens} tokens out in {run.seconds:.1f} s" for run in comparison.runs)
    lines += ["", costs]
    if comparison.left_out:
        lines.append(f"{comparison.left_out} rows of {first.name} were not answered by every run and are left out")
    return "\n".join(lines)


def significance_mark(p: float) -> str:
    """The mark behind a difference."""
    return " **" if p < 0.01 else " *" if p < 0.05 else ""


def write_csv(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """One line per task, language or average, and run; scores between 0 and 1."""
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["task", "metric", "line", "rows", "run", "mean", "difference", "low", "high", "p"])
        for comparison in comparisons:
            for line, cells in comparison.lines.items():
                for run, cell in zip(comparison.runs, cells, strict=True):
                    d: Any = cell.difference
                    rest = [d.mean, d.low, d.high, d.p] if d else [""] * 4
                    writer.writerow(
                        [comparison.task, comparison.metric, line, comparison.rows[line], run.name, cell.mean, *rest]
                    )


def plot_comparisons(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """One panel per task: a bar per language and run; a star over a difference with p < 0.05."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widest = max(len(c.lines) * len(c.runs) for c in comparisons)
    figure, panels = plt.subplots(
        len(comparisons),
        figsize=(max(6, 0.28 * widest + 2), 3.2 * len(comparisons)),
        layout="constrained",
        squeeze=False,
    )
    for axes, comparison in zip(panels[:, 0], comparisons):
        width = 0.8 / len(comparison.runs)
        for index, run in enumerate(comparison.runs):
            cells = [cells[index] for cells in comparison.lines.values()]
            places = [place + (index + 0.5) * width - 0.4 for place in range(len(cells))]
            axes.bar(places, [100 * cell.mean for cell in cells], width, label=run.name)
            for place, cell in zip(places, cells):
                if cell.difference and cell.difference.p < 0.05:
                    axes.text(place, 100 * cell.mean, "*", ha="center")
        axes.set_xticks(range(len(comparison.lines)), list(comparison.lines))
        axes.set_ylabel(f"{comparison.metric}, %")
        axes.set_ylim(0, max(1.0, 1.25 * axes.get_ylim()[1]))  # room for the legend
        axes.set_title(f"{comparison.task} (*: p < 0.05 against {comparison.runs[0].name})", fontsize="medium")
        axes.legend(fontsize="small", ncols=len(comparison.runs), loc="upper center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
