"""One evaluation as a table and a figure."""

from __future__ import annotations

from pathlib import Path

from cc_ds.eval.benchmarks import resource_level
from cc_ds.eval.run import EvalResult, Score


def format_table(result: EvalResult) -> str:
    """The result as text: one line per language, then high- and low-resource averages, the macro average, the cost."""
    lines = [f"{'language':<10}{'rows':>6}" + "".join(f"{name:>14}{'95 %':>17}" for name in result.rules) + "   empty"]
    for name, score in {**result.languages, **result.groups, "macro": result.macro}.items():
        lines.append(_line(name, score))
    rate = result.tokens_out / result.seconds if result.seconds > 0 else float("nan")
    lines.append(
        f"mode {result.mode}: {result.tokens_in} tokens in, {result.tokens_out} tokens out in {result.seconds:.1f} s "
        f"({rate:.1f} tokens/s)"
    )
    return "\n".join(lines)


def _line(name: str, score: Score) -> str:
    cells = (f"{m.mean:>14.3f}{f'[{m.low:.3f}, {m.high:.3f}]':>17}" for m in score.metrics.values())
    return f"{name:<10}{score.rows:>6}" + "".join(cells) + f"{score.empty:>8}"


def plot_languages(result: EvalResult, path: str | Path, title: str = "") -> None:
    """A bar of the headline score per language with its interval, low-resource ones hatched, averages at the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    headline = next(iter(result.rules))
    bars = {**result.languages, **result.groups, "macro": result.macro}
    figure, axes = plt.subplots(figsize=(max(5, 0.6 * len(bars)), 3.4), layout="constrained")
    for place, (name, score) in enumerate(bars.items()):
        average = name not in result.languages
        metric = score.metrics[headline]
        # A percentile interval need not hold the mean.
        spread = [[max(0.0, 100 * (metric.mean - metric.low))], [max(0.0, 100 * (metric.high - metric.mean))]]
        low = name == "low" or (not average and resource_level(name) == "low")
        axes.bar(
            place,
            100 * metric.mean,
            yerr=spread,
            capsize=3,
            color="tab:gray" if average else "tab:blue",
            hatch="//" if low else None,
            edgecolor="white",
        )
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel(f"{headline}, %")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_title(title or f"{result.task}, {result.mode} (hatched: low-resource)", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)
