"""The demo from end to end, a few steps a stage: every stage runs, and the folder holds what the README says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from cc_ds import CCModelForCausalLM
from cc_ds.demo.run import run_demo

REPOSITORY = Path(__file__).resolve().parents[2]


def _short(name: str, folder: Path, **changes) -> str:
    settings = yaml.safe_load((REPOSITORY / "configs" / name).read_text(encoding="utf-8"))
    settings |= {"max_steps": 3, "logging_steps": 1, "data_cache_dir": str(folder / "cache"), "disable_tqdm": True}
    path = folder / name
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    report = run_demo(folder / "out", 2, _short("demo.yaml", folder), _short("demo_warmup.yaml", folder))
    assert report == folder / "out" / "report.md"
    return folder / "out"


def test_report(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    languages = results["seeds"][0]["scores"]["SFT"]["languages"]
    assert len(languages) >= 8
    assert all(f"| {language} " in text for language in languages)
    assert "±" in text and ("is ahead of" in text or "Both are equal" in text)
    for name in ("scores", "losses", "gate", "transform"):
        assert f"figures/{name}.png" in text
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [seed["seed"] for seed in results["seeds"]] == [1, 2]


def test_the_tuned_model_and_its_matrix(folder):
    model = CCModelForCausalLM.from_pretrained(folder / "cc-seed1-with-transform")
    hidden = model.config.hidden_size
    assert model.transform.matrix.shape == (hidden, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(folder / "cc-seed1-with-transform")


def test_a_folder_of_someone_else_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no earlier demo made it"):
        run_demo(tmp_path, 1, "demo.yaml", "warmup.yaml")
    assert (tmp_path / "thesis.txt").exists()
