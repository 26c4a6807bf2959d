"""What the gate is said to choose is what it chooses, and the tool draws it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, VOCAB, cc_model

from cc_ds import CCModelForCausalLM
from cc_ds.analysis.inference import gate_choices, principal_components, shares
from cc_ds.analysis.training import gate_history
from cc_ds.connection.transform import Transform
from cc_ds.data.templates import RenderedPrompt
from cc_ds.demo.tiny import save_tiny, tiny_llama, train_tokenizer


def prompts(count: int, seed: int) -> list[RenderedPrompt]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=draw).tolist()
    rows = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [RenderedPrompt(ids, len(ids) - 1) for ids in rows]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_choices_are_the_forwards_own(family):
    """Against one forward per row with the real English prompt; and S W with W per language."""
    model, ours, english = cc_model(family), prompts(7, 0), prompts(7, 1)
    seen = gate_choices(model, ours, english, batch_size=3)
    assert seen.mapped is None and seen.english.shape == (7, LAYERS, HIDDEN)
    for row in range(7):
        out = model(torch.tensor([ours[row].ids]), english_input_ids=torch.tensor([english[row].ids]))
        torch.testing.assert_close(seen.choice[row], out.choice[0].float())
    matrices = torch.randn(2, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))
    model.set_transform(Transform([matrices], "per_language", ("sw", "yo")))
    langs = ["sw", "yo", "yo", "sw", "sw", "yo", "sw"]
    mapped = gate_choices(model, ours, english, langs, batch_size=2)
    torch.testing.assert_close(mapped.source, seen.source)
    for row, lang in enumerate(langs):
        expected = seen.source[row] @ matrices[("sw", "yo").index(lang)]
        torch.testing.assert_close(mapped.mapped[row], expected, rtol=1e-3, atol=1e-4)
    assert model.prefill_pass is None and not torch.equal(mapped.choice, seen.choice)
    model.set_transform(None)
    with pytest.raises(ValueError, match="needs a model with a Transform Matrix"):
        gate_choices(model, ours)


def test_shares_are_means_by_label():
    choice = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    names, share = shares(choice, ["yo", "sw", "yo"])
    assert names == ["sw", "yo"] and share.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_principal_components_of_a_known_cloud():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 2, generator=draw) * torch.tensor([5.0, 1.0])
    axes = torch.linalg.qr(torch.randn(6, 2, generator=draw)).Q
    cloud = scores @ axes.T + 3
    (first, second), explained = principal_components([cloud[:80], cloud[80:]])
    points = torch.cat([first, second])
    assert sum(explained) == pytest.approx(1, abs=1e-6) and explained[0] > 0.9
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(cloud, cloud), rtol=1e-3, atol=1e-2)
    again, _ = principal_components([cloud])
    torch.testing.assert_close(again[0], points)


def test_history_takes_the_last_word_on_a_step(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0, "gate_entropy": 1.0, "chosen_layers": {"sw": [3, 1]}},
        {"step": 2, "loss": 2.0},
        {"step": 2, "gate_entropy": 0.5, "chosen_layers": {"yo": [0, 2]}},
        {"step": 1, "gate_entropy": 0.9, "chosen_layers": {"sw": [4, 0]}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    history = gate_history(tmp_path)
    assert history.steps == [1, 2] and history.entropy == [0.9, 0.5]
    assert history.counts["sw"].tolist() == [[4, 0], [0, 0]] and history.counts["yo"].tolist() == [[0, 0], [0, 2]]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="plain SFT"):
        gate_history(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        gate_history(tmp_path / "nowhere")


def test_the_tool_draws_everything(tmp_path, capsys, caplog):
    path = Path(__file__).parents[3] / "tools" / "inspect_gate.py"
    spec = importlib.util.spec_from_file_location("inspect_gate_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = [{"prompt": f"namba {n}", "prompt_en": f"number {n}", "lang": "sw" if n % 2 else "yo"} for n in range(8)]
    data, run, model = tmp_path / "numbers.jsonl", tmp_path / "metrics.jsonl", tmp_path / "model"
    bad = {"prompt": " ", "prompt_en": "number"}
    english = {"prompt": "number", "lang": "en-GB"}  # read plain at inference; it has no English prompt either
    data.write_text("".join(json.dumps(row) + "\n" for row in [english, *rows, bad]), encoding="utf-8")
    run.write_text('{"step": 1, "gate_entropy": 1.0, "chosen_layers": {"sw": [3, 1]}}\n', encoding="utf-8")
    tokenizer = train_tokenizer([row[key] for row in rows for key in ("prompt", "prompt_en")] * 3, model, 300)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    save_tiny(tiny_llama(len(tokenizer), 0, **sizes), tokenizer, model)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="stores no Decision Maker"):
        tool.main(["--model", str(model), "--data", str(data), "--output", str(out), "--device", "cpu"])
    CCModelForCausalLM.from_pretrained(model).save_pretrained(model)
    tool.main(["--run", str(run), "--model", str(model), "--data", str(data), "--output", str(out), "--device", "cpu"])
    assert "numbers.jsonl:10: the prompt is empty" in caplog.text
    numbers = json.loads((out / "gate.json").read_text(encoding="utf-8"))
    assert numbers["inference"]["rows"] == 8 and set(numbers["inference"]["language"]) == {"sw", "yo"}
    assert sum(numbers["inference"]["task"]["numbers"]) == pytest.approx(1)
    drawn = {path.name for path in out.glob("*.png")}
    assert {"gate_over_training.png", "gate_entropy.png", "gate_by_language.png", "gate_by_task.png"} < drawn
    assert any(name.startswith("activations_layer") for name in drawn)
    one_each = Transform([torch.eye(16).repeat(2, 1, 1)], "per_language", ("sw", "yo"))
    connected = CCModelForCausalLM.from_pretrained(model)
    connected.set_transform(one_each)
    connected.save_pretrained(tmp_path / "connected")
    tokenizer.save_pretrained(tmp_path / "connected")
    arguments = ["--data", str(data), "--output", str(out), "--device", "cpu"]
    tool.main(["--model", str(tmp_path / "connected"), *arguments])
    with pytest.raises(ValueError, match="only for sw, yo"):
        tool.main(["--model", str(tmp_path / "connected"), *arguments, "--exclude"])
    with pytest.raises(ValueError, match=r"numbers.jsonl: every row is in a language of --exclude \(en, sw, yo\)"):
        tool.main(["--model", str(model), *arguments, "--exclude", "en", "sw", "yo"])
    with pytest.raises(ValueError, match="--layer is 9"):
        tool.main(["--model", str(model), "--data", str(data), "--output", str(out), "--device", "cpu", "--layer", "9"])
