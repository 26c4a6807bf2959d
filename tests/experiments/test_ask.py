"""Every mode's answer equals a literal one: one row at a time, no padding, no cache, one vector added by a hook."""

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, VOCAB, cc_model

from cc_ds.data.templates import RenderedPrompt
from cc_ds.models.arch import ffn_of, layers_of
from experiments.ask import Question, ask, correct

OPTIONS = ("20", "31", "42", "53", "64")


class Template:
    """Texts are token ids."""

    def render_prompt(self, messages):
        ids = [int(word) for word in messages[-1]["content"].split()]
        return RenderedPrompt(ids, len(ids) - 1)

    def encode_response(self, text):
        return [int(text), 7]


def questions(count: int) -> list[Question]:
    draw = torch.Generator().manual_seed(1)

    def text() -> str:
        length = int(torch.randint(2, 10, (1,), generator=draw))
        return " ".join(map(str, torch.randint(3, VOCAB, (length,), generator=draw).tolist()))

    return [
        Question(
            item=n, lang="en" if n % 4 == 3 else "sw", prompt=text(), prompt_en=text(), options=OPTIONS, answer="42"
        )
        for n in range(count)
    ]


class Literal:
    """A model read one prompt at a time."""

    def __init__(self, model) -> None:
        self.model, self.layers = model, layers_of(model, model.family)

    @torch.no_grad()
    def read(self, text: str):
        """(L, H) FFN outputs at the last token, (H,) what enters layer 0 there."""
        found, entering, handles = {}, [], []
        handles.append(
            self.layers[0].register_forward_pre_hook(
                lambda m, a, k: entering.append((a[0] if a else k["hidden_states"])[0, -1]), with_kwargs=True
            )
        )
        for number, layer in enumerate(self.layers):
            handles.append(
                ffn_of(layer, self.model.family).register_forward_hook(
                    lambda m, a, out, number=number: found.update({number: out[0, -1].clone()})
                )
            )
        self.model(torch.tensor([[int(word) for word in text.split()]]))
        for handle in handles:
            handle.remove()
        return torch.stack([found[n] for n in range(LAYERS)]), entering[0]

    @torch.no_grad()
    def answer(self, text: str, added_H: torch.Tensor) -> str:
        def add(module, args, output):
            output = output.clone()
            output[0, -1] += added_H
            return output

        handle = ffn_of(self.layers[0], self.model.family).register_forward_hook(add)
        logits = self.model(torch.tensor([[int(word) for word in text.split()]])).logits[0, -1]
        handle.remove()
        return max(OPTIONS, key=lambda option: float(logits[int(option)]))

    def choose(self, activations_LH: torch.Tensor, embedding_H: torch.Tensor) -> torch.Tensor:
        decision_L = self.model.decision_maker.weight @ (activations_LH.mean(dim=0) + embedding_H)
        return activations_LH[int(decision_L.argmax())]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_modes_equal_the_literal_ones(family):
    model = cc_model(family, seed=3)
    draw = torch.Generator().manual_seed(2)
    scale = 4.0  # an activation large enough to change answers
    matrix = scale * torch.randn(HIDDEN, HIDDEN, generator=draw)
    per_layer = scale * torch.randn(LAYERS, HIDDEN, HIDDEN, generator=draw)
    rows = questions(12)
    transforms = {"matrix": matrix, "per-layer": per_layer, "trained": -matrix}
    found = ask(model, Template(), rows, transforms, batch_size=5, seed=9)
    literal = Literal(model)
    drawn = torch.randint(LAYERS, (len(rows),), generator=torch.Generator().manual_seed(9))
    expected: dict[str, list[str]] = {}
    for row, layer in zip(rows, drawn.tolist(), strict=True):
        source_LH, embedding_H = literal.read(row.prompt)
        english_LH, _ = literal.read(row.prompt_en)
        by_matrix_LH = source_LH @ matrix
        added = {
            "none": torch.zeros(HIDDEN),
            "matrix": literal.choose(by_matrix_LH, embedding_H),
            "per-layer": literal.choose(torch.einsum("lh,lhk->lk", source_LH, per_layer), embedding_H),
            "trained": literal.choose(-by_matrix_LH, embedding_H),
            "identity": literal.choose(source_LH, embedding_H),
            "random": by_matrix_LH[layer],
            "mean": by_matrix_LH.mean(dim=0),
            "english": torch.zeros(HIDDEN) if row.lang == "en" else literal.choose(english_LH, embedding_H),
        }
        for mode, vector in added.items():
            expected.setdefault(mode, []).append(literal.answer(row.prompt, vector))
    assert found == expected
    assert len({tuple(given) for given in found.values()}) > 3, "the modes must differ for this to say anything"


def test_a_model_without_connection_is_asked_once():
    rows = questions(3)
    assert list(ask(cc_model(), Template(), rows, {})) == ["none"]


def test_options_that_begin_alike_are_refused():
    row = Question(item=0, lang="sw", prompt="3 4", prompt_en="3 4", options=("20", "20"), answer="20")
    with pytest.raises(ValueError, match="different tokens"):
        ask(cc_model(), Template(), [row], {})


def test_marks_are_in_the_order_of_the_items():
    rows = [
        Question(item=n, lang=lang, prompt="3", prompt_en="3", options=OPTIONS, answer=answer)
        for lang, n, answer in (("sw", 1, "20"), ("sw", 0, "31"), ("de", 0, "42"))
    ]
    assert correct(rows, {"none": ["20", "20", "42"]}) == {"none": {"sw": "01", "de": "1"}}
