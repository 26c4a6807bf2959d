"""The table of an experiment: scores by arm and mode, and differences from the first arm.

Rows of a task are the same item in every language, so languages are not independent: an item's score is its mean over
the languages of a group and over the seeds, and intervals redraw items (cc_ds/eval/statistics.py). They know nothing of
other seeds: beside them stand the spread over seeds, the p of the paired t-test over seeds, and how many seeds agree on
the sign. A difference is marked where both tests find it.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

from cc_ds.eval.comparison import significance_mark
from cc_ds.eval.run import write_json
from cc_ds.eval.statistics import compare
from experiments.arms import ARMS, MODELS, settings
from experiments.prepare_data import TARGETS

Results = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Group:
    """Languages of a task that are averaged."""

    name: str
    task: str
    langs: tuple[str, ...]


def groups_of(results: Results) -> list[Group]:
    """The columns of the table."""
    tasks = {task: tuple(found["correct"]["none"]) for task, found in results[0]["tasks"].items()}
    left_out = tuple(lang for lang in tasks["sib200"] if lang not in (*TARGETS, "en"))
    groups = [
        Group("trained", "sib200", TARGETS),
        Group("sw, yo", "sib200", ("sw", "yo")),
        Group("left out", "sib200", left_out),
        Group("en", "sib200", ("en",)),
    ]
    for task in ("xnli", "xstorycloze"):
        groups.append(Group(task, task, tuple(lang for lang in tasks[task] if lang != "en")))
    return groups


def items(result: dict[str, Any], mode: str, group: Group) -> np.ndarray:
    """(items,) an item's share of right answers over the languages of the group."""
    marks = result["tasks"][group.task]["correct"][mode]
    return np.mean([[int(mark) for mark in marks[lang]] for lang in group.langs], axis=0)


def write_report(folder: Path, table: str, model: str, results: Results, choice: dict[str, Any]) -> Path:
    """Write TABLE-MODEL.json, all figures, and TABLE-MODEL.md, the table; the path of the latter.

    Args:
        choice: which rows were asked, and of how long a training: run.py's `choice_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.machine(), "system": platform.system()}
    arms = {arm: asdict(ARMS[arm]) for arm in dict.fromkeys(r["arm"] for r in results)}
    every_figure = {"choice": choice, "settings": settings(model), "arms": arms, "machine": machine}
    write_json(every_figure | {"runs": list(results)}, folder / f"{table}-{model}.json")
    hours = sum((r["train_cpu_seconds"] or 0) + r["measure_cpu_seconds"] for r in results) / 3600
    seeds = sorted({r["seed"] for r in results})
    text = "\n\n".join(
        [
            f"# {table}, {model}: seeds {', '.join(map(str, seeds))}; {hours:.2f} CPU hours",
            f"SIB-200 {choice['split']}; {choice['benchmark_rows']} rows a language of XNLI and XStoryCloze"
            + (f"; of all these, one item in {MODELS[model].every}" if MODELS[model].every > 1 else "")
            + ("." if choice["max_steps"] is None else f"; a trial of {choice['max_steps']} steps."),
            "Accuracy in percent, mean ± standard deviation over seeds.",
            _scores(results),
            *(text for baseline in ("sft", "sft-english") for text in _against(results, baseline)),
            "How often the commonest answer is given, in percent of all languages' questions: near 100 the score says "
            "nothing.",
            _commonest(results),
            "By language (SIB-200).",
            _languages(results),
            "The gate at the end of training (last log line): its entropy and the norm of what is fused over that of "
            "the FFN output it joins, means over seeds; and, seed by seed, each language's most chosen layer (from 0) "
            "with its share in percent.",
            _gates(results),
            "The matrices: |S W - E| / |E| on pairs held out, mean over seeds: of NTREX, or where it says rows, of the "
            "training rows.",
            _fits(results),
            "Cost: CPU seconds a run, mean over seeds.",
            _costs(results),
        ]
    )
    path = folder / f"{table}-{model}.md"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _variants(results: Results) -> list[tuple[str, str]]:
    """(arm, mode) in the order of the table."""
    return list(dict.fromkeys((r["arm"], mode) for r in results for mode in r["tasks"]["sib200"]["correct"]))


def _name(arm: str, mode: str) -> str:
    return arm if arm.startswith("sft") else f"{arm}, {mode}"


def _of(results: Results, arm: str, mode: str = "none") -> dict[int, dict[str, Any]]:
    """The runs of an arm that were asked in a mode, by seed."""
    return {r["seed"]: r for r in results if r["arm"] == arm and mode in r["tasks"]["sib200"]["correct"]}


def _fewer(runs: dict[int, Any], results: Results) -> str:
    """Which seeds, where these are not all: means over different seeds are not to be compared."""
    all_seeds = {r["seed"] for r in results}
    return "" if runs.keys() == all_seeds else f" (seed {', '.join(map(str, sorted(runs)))})"


def _scores(results: Results) -> str:
    groups = groups_of(results)
    lines = []
    for arm, mode in _variants(results):
        runs = _of(results, arm, mode)
        name = _name(arm, mode) + _fewer(runs, results)
        lines.append([name, *(_cell([100 * items(r, mode, group).mean() for r in runs.values()]) for group in groups)])
    return _markdown(["", *(group.name for group in groups)], lines)


def _against(results: Results, baseline: str) -> list[str]:
    """The differences from an arm, if it was run, under a line that says what they are."""
    if not _of(results, baseline):
        return []
    return [
        f"Difference from {baseline} in points, on the seeds of both, ± standard deviation over seeds; [95 % interval "
        "over items]; p of the paired t-test over seeds; (seeds with a higher score). * p < 0.05 over items and over "
        "seeds, ** p < 0.01.",
        _differences(results, baseline),
    ]


def _differences(results: Results, baseline: str) -> str:
    groups = groups_of(results)
    before = _of(results, baseline)
    lines = []
    for arm, mode in _variants(results):
        if arm == baseline:
            continue
        runs = _of(results, arm, mode)
        seeds = sorted(runs.keys() & before.keys())
        if seeds:
            cells = [
                _difference([(items(before[s], "none", g), items(runs[s], mode, g)) for s in seeds]) for g in groups
            ]
            lines.append([_name(arm, mode), *cells])
    return _markdown(["", *(group.name for group in groups)], lines)


def _difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """`pairs`: per seed, the baseline's item scores and the other's."""
    before, after = (np.mean(scores, axis=0) for scores in zip(*pairs))
    found = compare({"items": before.tolist()}, {"items": after.tolist()})
    gains = [100 * (other.mean() - base.mean()) for base, other in pairs]
    interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    higher = f"({sum(gain > 0 for gain in gains)}/{len(pairs)})"
    if len(gains) == 1:
        return f"{100 * found.mean:+.1f} {interval} {higher}"
    spread = statistics.stdev(gains)
    if spread < 1e-9:  # no test: seeds that differ by the same are too few answers, not a certainty
        return f"{100 * found.mean:+.1f} ± {spread:.1f} {interval} p - {higher}"
    p = float(ttest_1samp(gains, 0).pvalue)
    mark = significance_mark(max(p, found.p))
    return f"{100 * found.mean:+.1f} ± {spread:.1f} {interval} p {p:.3f}{mark} {higher}"


def _commonest(results: Results) -> str:
    tasks = list(results[0]["tasks"])
    lines = []
    for arm, mode in _variants(results):
        runs = _of(results, arm, mode)
        given = {task: [r["tasks"][task]["given"][mode].values() for r in runs.values()] for task in tasks}
        shares = {task: [100 * max(counts) / sum(counts) for counts in each] for task, each in given.items()}
        lines.append([_name(arm, mode) + _fewer(runs, results), *(_cell(shares[task]) for task in tasks)])
    return _markdown(["", *tasks], lines)


def _languages(results: Results) -> str:
    langs = list(results[0]["tasks"]["sib200"]["correct"]["none"])
    variants = [v for v in _variants(results) if v[1] in ("none", "matrix", "rows", "english")]
    lines = []
    for lang in langs:
        group = Group(lang, "sib200", (lang,))
        cells = [
            _cell([100 * items(r, mode, group).mean() for r in _of(results, arm, mode).values()])
            for arm, mode in variants
        ]
        lines.append([f"{lang}{'' if lang in TARGETS else ' (left out)' if lang != 'en' else ''}", *cells])
    return _markdown(["", *(_name(*variant) for variant in variants)], lines)


def _gates(results: Results) -> str:
    langs = sorted(TARGETS)
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        ends = [r["training"]["lines"][-1] for r in _of(results, arm, "matrix").values()]
        if not ends:
            continue
        figures = [f"{statistics.mean(end[key] for end in ends):.2f}" for key in ("gate_entropy", "fusion_ratio")]
        lines.append(
            [arm, *figures, *(", ".join(_favourite(end["chosen_layers"].get(lang)) for end in ends) for lang in langs)]
        )
    return _markdown(["", "entropy", "ratio", *langs], lines)


def _favourite(counts: Sequence[float] | None) -> str:
    """The layer that was chosen most and its share; - where the language was not in the rows."""
    return f"{int(np.argmax(counts))} ({100 * max(counts) / sum(counts):.0f})" if counts else "-"


def _fits(results: Results) -> str:
    fits = {
        arm: [r for r in results if r["arm"] == arm and r["fit"]] for arm in dict.fromkeys(r["arm"] for r in results)
    }
    names = list(dict.fromkeys(name for r in results for name in r["fit"] or ()))
    lines = []
    for arm, runs in fits.items():
        having = [{r["seed"]: r["fit"][name] for r in runs if name in r["fit"]} for name in names]
        cells = [f"{statistics.mean(e.values()):.3f}{_fewer(e, results)}" if e else "" for e in having]
        if runs:
            lines.append([arm, *cells])
    return _markdown(["", *names], lines)


def _costs(results: Results) -> str:
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        cells = []
        for key in ("train_cpu_seconds", "measure_cpu_seconds"):
            known = {r["seed"]: r[key] for r in results if r["arm"] == arm and r[key] is not None}
            cells.append(f"{statistics.mean(known.values()):.0f}{_fewer(known, results)}" if known else "?")
        lines.append([arm, *cells])
    return _markdown(["", "training", "matrices and questions"], lines)


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
