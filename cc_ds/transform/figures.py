"""Figures of a fit: its scores by layer and by language beside those of maps that know nothing, and its spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cc_ds.transform.report import BASELINES, METRICS

_LABELS = {"transform": "W", "identity": "identity", "mean": "mean English vector"}
_STYLES = {"transform": "-", "identity": ":", "mean": "--"}


def plot_report(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write fit_by_layer.png, fit_by_language.png (where pairs were held out), singular_values.png and, where a ridge
    was chosen, ridge.png. `result` is what `run.fit_model` returns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_spectra(result["fit"], folder / "singular_values.png")]
    if result["fit"]["ridge_paths"]:
        written.append(_ridge(result["fit"], folder / "ridge.png"))
    if result["held_out"]:
        written.append(_by_layer(result["held_out"], folder / "fit_by_layer.png"))
        written.append(_by_language(result["held_out"], folder / "fit_by_language.png"))
    return written


def _by_layer(report: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes(len(METRICS), width=4)
    for axis, metric in zip(axes, METRICS):
        for name in ("transform", *BASELINES):
            axis.plot(report["all"][name][metric]["layers"], _STYLES[name], label=_LABELS[name])
        axis.set(xlabel="layer", title=metric.replace("_", " "))
    return _finish(figure, axes[0], path)


def _by_language(report: dict[str, Any], path: Path) -> Path:
    languages = list(report["languages"])
    figure, axes = _axes(len(METRICS), width=max(4, 0.45 * len(languages)))
    for axis, metric in zip(axes, METRICS):
        for number, name in enumerate(("transform", *BASELINES)):
            values = [report["languages"][lang][name][metric]["mean"] for lang in languages]
            places = [place + 0.27 * (number - 1) for place in range(len(languages))]
            axis.bar(places, values, width=0.27, label=_LABELS[name])
        axis.set_xticks(range(len(languages)), languages, rotation=90 if len(languages) > 8 else 0)
        axis.set(title=metric.replace("_", " "))
    return _finish(figure, axes[0], path)


def _spectra(fit: dict[str, Any], path: Path) -> Path:
    figure, (axis,) = _axes(1, width=5)
    for name, values in zip(fit["problems"], fit["singular_values"], strict=True):
        axis.semilogy([max(value, 1e-12) for value in values], linewidth=1, label=name)
    axis.set(xlabel="index", title="singular values of W")
    return _finish(figure, axis if 1 < len(fit["problems"]) <= 12 else None, path)


def _ridge(fit: dict[str, Any], path: Path) -> Path:
    figure, (axis,) = _axes(1, width=5)
    for name, entry in zip(fit["problems"], fit["ridge_paths"]):
        # No ridge at all stands at the left edge of a logarithmic axis.
        axis.semilogx([max(ridge, 1e-9) for ridge in entry["ridges"]], entry["errors"], linewidth=1, label=name)
    lowest = min(min(entry["errors"]) for entry in fit["ridge_paths"])
    axis.set(xlabel="ridge (left edge: none)", title="relative error on pairs that choose", ylim=(0.9 * lowest, 1.5))
    return _finish(figure, axis if 1 < len(fit["problems"]) <= 12 else None, path)


def _axes(count: int, width: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 3.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _finish(figure, legend_on, path: Path) -> Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    if legend_on is not None:
        legend_on.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=200)
    return path
