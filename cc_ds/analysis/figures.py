"""Figures of the gate: heat maps of the layers it picks, and the activations in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from cc_ds.analysis.training import GateHistory

_MARKERS = "os^vD*PX<>"


def plot_history(history: GateHistory, path: Path) -> Path:
    """Layer against step, one panel for all languages and one for each: the share of rows that chose the layer."""
    panels = {"all": sum(history.counts.values()), **history.counts}
    columns = min(4, len(panels))
    figure, axes = _grid(len(panels), columns, (3.2, 2.4))
    for axis, (lang, counts) in zip(axes, panels.items()):
        share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        edge = (history.steps[0], history.steps[-1] + 1e-3, -0.5, counts.shape[1] - 0.5)
        image = axis.imshow(
            share.T.numpy(), aspect="auto", origin="lower", extent=edge, vmin=0, vmax=1, cmap="viridis",
            interpolation="nearest",
        )  # fmt: skip
        axis.set(title=lang, xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share of rows")
    return _save(figure, path)


def plot_entropy(history: GateHistory, path: Path) -> Path:
    """The gate's mean entropy over training."""
    figure, (axis,) = _grid(1, 1, (4.5, 3))
    axis.plot(history.steps, history.entropy)
    axis.set(xlabel="step", ylabel="entropy of the gate (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def plot_shares(names: Sequence[str], share: Tensor, what: str, path: Path) -> Path:
    """Languages, or tasks, against layers."""
    figure, (axis,) = _grid(1, 1, (1.5 + 0.25 * share.shape[1], 1.2 + 0.28 * len(names)))
    image = axis.imshow(share.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="layer", ylabel=what)
    figure.colorbar(image, ax=axis, label="share of rows")
    return _save(figure, path)


def plot_plane(
    coordinates: dict[str, Tensor], languages: Sequence[str], explained: Sequence[float], layer: int, path: Path
) -> Path:
    """Vectors in the plane of two principal components: a colour for each kind (S, S W, E), a marker per language."""
    figure, (axis,) = _grid(1, 1, (5.5, 4.5))
    names = sorted(set(languages))
    for number, (kind, points) in enumerate(coordinates.items()):
        for place, name in enumerate(names):
            rows = [i for i, language in enumerate(languages) if language == name]
            axis.scatter(
                *points[rows].T.numpy(), s=14, alpha=0.7, color=f"C{number}", marker=_MARKERS[place % len(_MARKERS)],
                linewidths=0, label=kind if place == 0 else None,
            )  # fmt: skip
    for place, name in enumerate(names[: len(_MARKERS)]):
        axis.scatter([], [], color="0.4", marker=_MARKERS[place], label=name)
    first, second = (f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(explained))
    axis.set(xlabel=first, ylabel=second, title=f"layer {layer}")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _grid(count: int, columns: int, size: tuple[float, float]):
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=300)
    return path
