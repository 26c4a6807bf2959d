"""What is compared: how each arm is trained, and which tables there are. configs/MODEL.yaml has what all arms share.

All arms start from the same model and take the same steps, and a step holds the same target rows for the same seed. In
sft-english and cc-norm-english each of them has its English twin beside it as a row of its own, answer and all: it is
the English prompt that CC-Tuning reads anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cc_ds.config import read_yaml

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class Asked:
    """What of the questions a model is asked."""

    without: tuple[str, ...] = ()
    """Languages that are left away."""
    every: int = 1
    """One item in so many, the same items in every language."""
    pairs: int = 500
    """NTREX pairs that are read for its matrices; of the training rows, twice as many."""


MODELS = {"gemma": Asked(), "smollm2": Asked(without=("bn", "te"), every=2, pairs=250)}
"""SmolLM2 spells most scripts letter by letter: all questions are 324,000 tokens to it (117,000 to Gemma), and those it
is asked 121,000; 1500 pairs would be as many again three times."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train."""

    method: str
    """cc or sft."""
    twins: bool = False
    """Whether a step holds, beside its rows, the English twin of each."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of cc_ds/train.py."""


NORM = {"fuse_norm": "match"}
FASTER = {"connection_learning_rate": "1.0e-3"}
"""At the model's 2e-5, 40 steps move the Decision Maker by a hundredth of its start, and W by a thousandth."""
ARMS = {
    "sft": Arm("sft"),
    "sft-english": Arm("sft", twins=True),
    "cc": Arm("cc"),
    "cc-nograd": Arm("cc", options={"english_grad": "false"}),
    "cc-norm": Arm("cc", options=NORM),
    "cc-norm-english": Arm("cc", twins=True, options=NORM),
    "cc-norm-dropout": Arm("cc", options=NORM | {"english_dropout": "0.5"}),
    "cc-faster": Arm("cc", options=FASTER),
    "cc-norm-faster": Arm("cc", options=NORM | FASTER),
    "cc-norm-own": Arm("cc", options=NORM | FASTER | {"transform_share": "0.5"}),
    "cc-norm-soft": Arm("cc", options=NORM | FASTER | {"gate": "soft"}),
    "cc-norm-layer6": Arm("cc", options=NORM | FASTER | {"fuse_layer": "6"}),
}
TABLES = {
    "main": ("sft", "sft-english", "cc", "cc-nograd"),
    "best": ("sft", "sft-english", "cc-norm", "cc-norm-english"),
    "improve": ("sft", "sft-english", "cc", *(name for name in ARMS if name.startswith("cc-") and name != "cc-nograd")),
}
"""Name -> arms; the first is what the others are compared with."""


TWINS = "train-with-twins.jsonl"
"""In the run's folder, where an arm has twins (run.py writes it)."""


def settings(model: str) -> dict[str, Any]:
    """The shared settings of a model's arms."""
    return read_yaml(str(CONFIGS / f"{model}.yaml"))


def train_options(name: str, model: str, seed: int, data: Path, start: Path, run: Path) -> list[str]:
    """The command line of cc_ds/train.py for an arm and a seed.

    Args:
        data: what prepare_data.py wrote.
        start: what prepare_model.py wrote.
        run: the run's folder.
    """
    arm = ARMS[name]
    options = {
        "config": CONFIGS / f"{model}.yaml",
        "model_name_or_path": start,
        "train_file": run / TWINS if arm.twins else data / "train.jsonl",
        "output_dir": run,
        "method": arm.method,
        "per_device_train_batch_size": settings(model)["per_device_train_batch_size"] * (1 + arm.twins),
        "seed": seed,
        "resume_from_checkpoint": "latest",
    } | arm.options
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)]
