"""The demo's report: a table on the terminal, report.md with figures, results.json."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from cc_ds.demo.atlas import Atlas

Results = list[dict[str, Any]]


def write_report(root: Path, atlas: Atlas, results: Results, floor: dict[str, float], seconds: float) -> Path:
    """Write report.md, its figures and results.json into `root`, print the table, and return the report's path.

    Args:
        results: per seed, {"seed", "fit", "scores": {arm: EvalResult}, "runs": {method: folder}}.
        floor: the score of always giving the most frequent training answer, by language.
        seconds: the demo's wall time so far.
    """
    arms = list(results[0]["scores"])
    table = _table(results, arms, floor)
    print("\n" + table)
    figures = root / "figures"
    figures.mkdir(exist_ok=True)
    _plot_scores(results, arms, floor, figures / "scores.png")
    _plot_losses(results, figures / "losses.png")
    _plot_gate(results, figures / "gate.png")
    _plot_fit(results, figures / "transform.png")
    rows, questions, languages = len(atlas.train), len(atlas.test), len(_languages(results))
    averaged = "one seed" if len(results) == 1 else f"mean ± standard deviation over {len(results)} seeds"
    text = f"""# Demo report

The Atlas: {rows:,} training rows; {questions} test questions in {languages} languages, about facts that training states
in English only. Both methods start from the same model and see the same rows, steps and seeds. Scores are exact match
in percent ({averaged}).
Took {seconds / 60:.1f} minutes on {platform.machine()}, {platform.system()}.

{table}

{_verdict(results)}

- *floor*: always the most frequent training answer.
- *CC-Tuning*: the tuned model reads the target prompt alone; English activations come from the fitted matrix. In
  training, half of the rows lose their English prompt at random (`english_dropout: 0.5`): this model, tuned for many
  epochs, otherwise comes to need the real one.
- *no connection*: the same weights, connection left out.
- *real English*: connected to the real English prompt, which a user does not have: the upper bound.

![scores by language](figures/scores.png)

## Training
![losses](figures/losses.png)

Which layer's English activation the gate chose, by language, over the whole run (seed {results[0]["seed"]}):

![gate](figures/gate.png)

## The Transform Matrix
Fitted on {results[0]["fit"]["fit"]["pairs"]} pairs of prompts about training facts, judged on pairs it did not see:

![fit](figures/transform.png)

## What is where
- `cc-seed*-with-transform/`: the tuned model with its matrix (`cc_connection.safetensors`), a stock checkpoint besides.
- `sft-seed*/`: the rival. `base/`: where both began. `atlas/`: the rows. `results.json`: every figure.
- Curves: `tensorboard --logdir {root}`
"""
    (root / "report.md").write_text(text, encoding="utf-8")
    (root / "results.json").write_text(json.dumps(_as_json(results, floor), indent=1) + "\n", encoding="utf-8")
    return root / "report.md"


def _as_json(results: Results, floor: dict[str, float]) -> dict[str, Any]:
    def scores(result) -> dict[str, Any]:
        return {key: value for key, value in asdict(result).items() if key != "answers"}

    return {
        "floor": floor,
        "seeds": [
            {"seed": r["seed"], "fit": r["fit"], "scores": {arm: scores(s) for arm, s in r["scores"].items()}}
            for r in results
        ],
    }


def _languages(results: Results) -> list[str]:
    return list(next(iter(results[0]["scores"].values())).languages)


def _values(results: Results, arm: str, language: str | None) -> list[float]:
    """Exact match in percent, one value per seed; language None: the mean over languages."""
    scores = [result["scores"][arm] for result in results]
    scores = [s.macro if language is None else s.languages[language] for s in scores]
    return [100 * score.metrics["exact_match"].mean for score in scores]


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _table(results: Results, arms: list[str], floor: dict[str, float]) -> str:
    """A markdown table, aligned so that it reads on a terminal too."""
    head = ["language", "floor", *arms]
    rows = [
        [language, f"{100 * floor[language]:.1f}", *(_cell(_values(results, arm, language)) for arm in arms)]
        for language in _languages(results)
    ]
    mean_floor = statistics.mean(100 * floor[language] for language in _languages(results))
    rows.append(["mean", f"{mean_floor:.1f}", *(_cell(_values(results, arm, None)) for arm in arms)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _verdict(results: Results) -> str:
    """Which of the two won, by how much, and whether the difference is larger than its spread."""
    differences = [
        ours - rival
        for ours, rival in zip(_values(results, "CC-Tuning", None), _values(results, "SFT", None), strict=True)
    ]
    mean = statistics.mean(differences)
    winner = "CC-Tuning is ahead of SFT" if mean > 0 else "SFT is ahead of CC-Tuning" if mean < 0 else "Both are equal"
    if len(differences) == 1:
        hint = "One seed shows no spread: `make demo SEEDS=3` does."
        return f"**{winner} by {abs(mean):.1f} points with this seed.** {hint}"
    spread = statistics.stdev(differences)
    clear = "more" if abs(mean) > 2 * spread / len(differences) ** 0.5 else "less"
    return (
        f"**{winner} by {abs(mean):.1f} points** (standard deviation of the paired difference {spread:.1f}, "
        f"{len(differences)} seeds): {clear} than two standard errors."
    )


def _plot_scores(results: Results, arms: list[str], floor: dict[str, float], path: Path) -> None:
    languages = _languages(results)
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(arms)
    places = np.arange(len(languages))
    for index, arm in enumerate(arms):
        values = [_values(results, arm, language) for language in languages]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.bar(places + index * width, [statistics.mean(v) for v in values], width, yerr=spread, label=arm)
    for place, language in zip(places, languages):
        level = 100 * floor[language]
        axes.hlines(level, place - width / 2, place + 0.8 - width / 2, colors="black", linestyles="dotted")
    axes.set_xticks(places + 0.4 - width / 2, languages)
    axes.set_ylabel("exact match, %")
    axes.set_title("Facts that training states in English only (dotted: most frequent answer)")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize="small", ncols=2, loc="upper center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _plot_losses(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for colour, method in zip(("tab:blue", "tab:orange"), ("sft", "cc")):
        for index, result in enumerate(results):
            lines = _metrics(result["runs"][method])
            curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            label = {"sft": "SFT", "cc": "CC-Tuning"}[method] if index == 0 else None
            axes.plot(*zip(*curve), color=colour, label=label, alpha=0.8)
            ends = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
            axes.scatter(*zip(*ends), color=colour, marker="x")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.set_title("Training loss (x: validation, facts that were held out)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_gate(results: Results, path: Path) -> None:
    totals: dict[str, np.ndarray] = {}
    for line in _metrics(results[0]["runs"]["cc"]):
        for language, counts in line.get("chosen_layers", {}).items():
            totals[language] = totals.get(language, 0) + np.array(counts)
    languages = sorted(totals)
    shares = np.stack([totals[language] / totals[language].sum() for language in languages])
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    image = axes.imshow(shares, aspect="auto", vmin=0, cmap="viridis")
    axes.set_yticks(range(len(languages)), languages)
    axes.set_xticks(range(shares.shape[1]))
    axes.set_xlabel("layer")
    figure.colorbar(image, label="share of rows")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_fit(results: Results, path: Path) -> None:
    report = results[0]["fit"]["held_out"]["all"]
    metrics = ("relative_error", "cosine", "retrieval")
    figure, columns = plt.subplots(1, len(metrics), figsize=(10, 3), layout="constrained")
    for axes, metric in zip(columns, metrics):
        for name, label in (("transform", "W"), ("identity", "identity"), ("mean", "mean English vector")):
            axes.plot(report[name][metric]["layers"], marker="o", markersize=3, label=label)
        axes.set_title(metric.replace("_", " "))
        axes.set_xlabel("layer")
    columns[0].set_yscale("log")
    columns[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
