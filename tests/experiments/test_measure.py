"""The matrices that a run is asked with, and what is said of their fit."""

import json

import pytest
import torch

from cc_ds.data.templates import RenderedPrompt
from experiments.measure import Pairs, fit_matrices, read_pairs, read_questions
from tests.tiny_models import HIDDEN, LAYERS, cc_model


class Template:
    """A prompt's characters are its tokens."""

    def render_prompt(self, messages):
        ids = [3 + ord(letter) % 20 for letter in messages[0]["content"]]
        return RenderedPrompt(ids, len(ids) - 1)


def linear_pairs(matrix, seed: int, count: int = 400) -> Pairs:
    """E is S times a matrix, exactly."""
    source = torch.randn(count, LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Pairs(source, source @ matrix, known=count * 9 // 10)


def test_each_matrix_is_fitted_on_its_own_pairs_and_judged_on_those_held_out():
    two = [torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    general, rows = (linear_pairs(matrix, seed) for seed, matrix in enumerate(two))
    matrices, errors = fit_matrices(general, rows)
    assert list(matrices) == ["matrix", "per-layer", "rows"]
    torch.testing.assert_close(matrices["matrix"], two[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(matrices["rows"], two[1], atol=1e-4, rtol=0)
    assert matrices["per-layer"].shape == (LAYERS, HIDDEN, HIDDEN)
    assert errors["matrix"] < 1e-5 and errors["rows: rows"] < 1e-5 < 0.5 < errors["rows: matrix"]
    held_out = (rows.source[rows.known :], rows.target[rows.known :])
    expected = (held_out[0] @ two[0] - held_out[1]).norm() / held_out[1].norm()
    assert errors["rows: matrix"] == pytest.approx(float(expected), rel=1e-4)
    assert errors["identity"] == pytest.approx(
        float((general.source[360:] - general.target[360:]).norm() / general.target[360:].norm()), rel=1e-5
    )
    assert errors["mean English"] == pytest.approx(1, abs=0.05)  # random vectors: their mean knows nothing


def test_pairs_are_read_once_and_each_stands_beside_its_english(tmp_path):
    texts = ["one", "two two", "three", "four and more", "five"]
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as stream:
        for lang in ("sw", "yo"):
            for text in texts:
                row = {"instruction": f"{lang} {text}", "instruction_en": text, "lang": lang}
                stream.write(json.dumps(row) + "\n")
    model = cc_model().eval()
    seen = []
    counting = model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    pairs = read_pairs(model, Template(), path, 10, 4, seed=1)
    counting.remove()
    assert sum(seen) == 10 + 5  # an English prompt of two languages is read once
    assert pairs.source.shape == pairs.target.shape == (10, LAYERS, HIDDEN) and pairs.known == 8

    def read(text: str) -> torch.Tensor:
        return model.anchor_activations(torch.tensor([Template().render_prompt([{"content": text}]).ids]))[:, 0]

    for text in texts:
        sides = set()
        for lang in ("sw", "yo"):
            source = read(f"{lang} {text}")
            (place,) = [n for n, found in enumerate(pairs.source) if torch.allclose(found, source, atol=1e-5)]
            torch.testing.assert_close(pairs.target[place], read(text), atol=1e-5, rtol=0)
            sides.add(place < pairs.known)
        assert len(sides) == 1  # all rows of an English prompt are held out, or none


def test_the_same_items_are_asked_in_every_language_that_is_asked(tmp_path):
    path = tmp_path / "task.jsonl"
    rest = {"prompt": "p", "prompt_en": "p", "options": ["a", "b"], "answer": "a"}
    with open(path, "w") as stream:
        for lang in ("sw", "te", "en"):
            for item in range(5):
                stream.write(json.dumps({"item": item, "lang": lang, **rest}) + "\n")
    found = read_questions(path, ["te"], every=2)
    assert [(q.lang, q.item) for q in found] == [(lang, item) for lang in ("sw", "en") for item in (0, 2, 4)]
    assert found[0].options == ("a", "b") and len(read_questions(path)) == 15
