"""The demo, stage by stage: a world of facts, a tiny English-centric model, SFT and CC-Tuning from the same start.

atlas -> tokenizer, tiny Llama -> warm-up -> SFT and CC-Tuning, per seed -> Transform Matrix -> scores -> report
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from cc_ds import CCModelForCausalLM
from cc_ds import train as training
from cc_ds.data.pairs import read_rows
from cc_ds.data.templates import load_template
from cc_ds.demo.atlas import Atlas, build_atlas, majority_baseline, write_atlas
from cc_ds.demo.report import write_report
from cc_ds.demo.tiny import save_tiny, tiny_llama, train_tokenizer
from cc_ds.dist.group import choose_accelerator, stop_group
from cc_ds.eval.run import evaluate, write_json
from cc_ds.eval.tasks import load_task
from cc_ds.transform.run import FitOptions, fit_model, save_fitted

# What is scored: name -> (method, mode of evaluation, what it is).
ARMS = {
    "SFT": ("sft", "plain", "plain supervised fine-tuning"),
    "CC-Tuning": ("cc", "transform", "CC-Tuning, target prompt alone, fitted matrix"),
    "CC-Tuning, no connection": ("cc", "plain", "the same model without its connection"),
    "CC-Tuning, real English": ("cc", "english", "the same model with the real English prompt: the upper bound"),
}
ATLAS_SEED = 0


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """The demo's folder."""

    root: Path

    @property
    def atlas(self) -> Path:
        """train.jsonl, dev.jsonl, test.jsonl, warmup.jsonl, pairs.jsonl."""
        return self.root / "atlas"

    @property
    def start(self) -> Path:
        """The tiny model before anything is learnt."""
        return self.root / "start"

    @property
    def base(self) -> Path:
        """The tiny English-centric model that both methods start from."""
        return self.root / "base"

    def tuned(self, method: str, seed: int) -> Path:
        """A tuned model."""
        return self.root / f"{method}-seed{seed}"

    def connected(self, seed: int) -> Path:
        """The CC-tuned model with its Transform Matrix."""
        return self.root / f"cc-seed{seed}-with-transform"


def run_demo(root: str | Path, seeds: int, config: str, warmup_config: str) -> Path:
    """Run every stage into `root`, which is emptied first; the path of the report.

    Args:
        seeds: both methods are tuned this many times, with seeds 1, 2, ...
        config, warmup_config: YAML files of the tuning runs and of the warm-up.
    """
    if seeds < 1:
        raise ValueError(f"SEEDS must be 1 or more, not {seeds}")
    started = time.perf_counter()
    # Two threads make so small a model a third faster on an idle machine, and seven times slower with one core taken.
    torch.set_num_threads(1)
    choose_accelerator()
    paths = DemoPaths(Path(root))
    _make_empty(paths.root)
    logging.getLogger("cc_ds").setLevel(logging.INFO)
    stages = Stages(total=3 + 3 * seeds + 1)

    with stages.next("Atlas: facts about countries from CLDR, asked in ten languages; the test asks, in each language, "
                     "about facts that training states in English only"):  # fmt: skip
        atlas = build_atlas(ATLAS_SEED)
        write_atlas(atlas, paths.atlas)
        stages.say(f"{len(atlas.train)} training rows, {len(atlas.test)} test questions in {paths.atlas}")
    with stages.next("Model: a SentencePiece tokenizer and a small Llama, made on the spot"):
        make_start(atlas, paths)
    with stages.next("Warm-up: English-heavy rows of the same world make the model English-centric"):
        training.main(["--config", warmup_config, "--model_name_or_path", str(paths.start), "--train_file",
                       str(paths.atlas / "warmup.jsonl"), "--output_dir", str(paths.base)])  # fmt: skip

    results: list[dict[str, Any]] = []
    for seed in range(1, seeds + 1):
        results.append(run_seed(seed, paths, config, stages))

    with stages.next("Report: the table, figures, and what they say"):
        report = write_report(
            paths.root, atlas, results, majority_baseline(atlas), seconds=time.perf_counter() - started
        )
    stop_group()
    return report


def _make_empty(root: Path) -> None:
    """An empty folder; what an earlier demo left is removed, what anything else left is not."""
    marker = root / ".cc_ds_demo"
    if root.exists() and any(root.iterdir()):
        if not marker.exists():
            raise ValueError(f"{root} is not empty and no earlier demo made it: choose another --output")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    marker.touch()


def run_seed(seed: int, paths: DemoPaths, config: str, stages: Stages) -> dict[str, Any]:
    """Both methods from the same start with one seed, the matrix, and every arm's scores."""
    why = {"sft": "plain SFT on the training rows: the rival", "cc": "CC-Tuning on the same rows, steps and seed"}
    for method in ("sft", "cc"):
        with stages.next(f"Seed {seed}: {why[method]}"):
            training.main(["--config", config, "--model_name_or_path", str(paths.base), "--train_file",
                           str(paths.atlas / "train.jsonl"), "--validation_file", str(paths.atlas / "dev.jsonl"),
                           "--output_dir", str(paths.tuned(method, seed)), "--method", method, "--seed",
                           str(seed)])  # fmt: skip
    with stages.next(
        f"Seed {seed}: the Transform Matrix, so that the tuned model needs no English prompt; then scores"
    ):
        models = {method: load(paths.tuned(method, seed)) for method in ("sft", "cc")}
        rows, _ = read_rows([paths.atlas / "pairs.jsonl"], require_response=False)
        fit = fit_model(*models["cc"], rows, FitOptions(seed=seed, batch_size=64, held_out=0.15))
        save_fitted(*models["cc"][:2], fit, paths.connected(seed))
        scores = {}
        questions = load_task("atlas", paths.atlas / "test.jsonl")
        for arm, (method, mode, _) in ARMS.items():
            scores[arm] = evaluate(*models[method], questions, mode=mode, batch_size=64, max_new_tokens=24)
            name = "-".join(("scores", method, mode)) + ".json"
            write_json(scores[arm], paths.tuned(method, seed) / name)
            stages.say(f"{arm:<26} {scores[arm].macro.metrics['exact_match'].mean:6.1%} exact match")
    return {"seed": seed, "fit": fit, "scores": scores, "runs": {m: paths.tuned(m, seed) for m in ("sft", "cc")}}


def make_start(atlas: Atlas, paths: DemoPaths) -> None:
    """The tokenizer, trained on training text alone, and the random model."""
    texts = (str(row[column]) for row in (*atlas.warmup, *atlas.train) for column in ("instruction", "output"))
    tokenizer = train_tokenizer(texts, paths.start)
    save_tiny(tiny_llama(len(tokenizer), seed=ATLAS_SEED), tokenizer, paths.start)


def load(folder: Path) -> tuple[CCModelForCausalLM, Any, Any]:
    """A tuned model, its tokenizer and its template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return CCModelForCausalLM.from_pretrained(folder), tokenizer, load_template(tokenizer)


class Stages:
    """Says, before each stage, what happens and why, and after it how long it took."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0

    @contextmanager
    def next(self, what: str) -> Iterator[None]:
        """The next stage."""
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {what}", flush=True)
        start = time.perf_counter()
        yield
        self.say(f"done in {time.perf_counter() - start:.0f} s")

    def say(self, text: str) -> None:
        """A line within a stage."""
        print(f"      {text}", flush=True)
