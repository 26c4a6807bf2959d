"""Connected generation against the two-prefill method, written out in plain steps."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference.two_pass import connected_logits, ffn_outputs
from tiny_models import HIDDEN, LAYERS, VOCAB, cc_model, stock_twin
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from cc_ds.connection.transform import Transform
from cc_ds.models.arch import FAMILIES, layers_of

PROMPTS = [5, 9, 12, 2]
NEW_TOKENS = 6


def _transform(per_layer: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    shape = (LAYERS, HIDDEN, HIDDEN) if per_layer else (HIDDEN, HIDDEN)
    return torch.randn(shape, dtype=torch.float64, generator=draw) / HIDDEN**0.5


def _prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=draw) for length in PROMPTS]


def _left_padded(prompts) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    rows = [torch.cat([torch.zeros(length - len(prompt), dtype=torch.long), prompt]) for prompt in prompts]
    masks = [torch.arange(length) >= length - len(prompt) for prompt in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def _two_prefills(model, prompt, anchor, english=None) -> list[int]:
    """Greedy tokens for one prompt: read it whole, read it whole again connected, then decode without any cache."""
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES[model.config.model_type])
    anchors, ids = torch.tensor([anchor]), prompt[None]
    if english is None:
        source = ffn_outputs(twin, layers, ids, torch.ones_like(ids), anchors)
        english = (source.double() @ model.transform.matrix).to(model.dtype)
    weight, noise = model.decision_maker.weight.detach(), torch.zeros(1, LAYERS, dtype=model.dtype)
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        # The connection acts at the anchor alone, so reading everything again connected is decoding with a cache.
        logits, _, _ = connected_logits(twin, layers, weight, english, ids, torch.ones_like(ids), anchors, noise)
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens


def _generate(model, data, **kwargs):
    result = model.generate(
        **data, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
    )
    return result[:, data["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_two_prefills_of_each_prompt(family):
    # Gemma 2's eager attention makes NaN of a padding row in float64 (see tiny_models)
    model = cc_model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    model.set_transform(_transform())
    prompts = _prompts()
    tokens = _generate(model, _left_padded(prompts))
    expected = [_two_prefills(model, prompt, len(prompt) - 1) for prompt in prompts]
    assert tokens.tolist() == expected
    plain = _generate(model, _left_padded(prompts), connect=False)
    assert not torch.equal(tokens, plain), "the connection must matter for this test to mean something"


def test_anchors_before_the_last_token_and_one_matrix_per_layer():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform(per_layer=True))
    prompts = _prompts()[:3]
    data = _left_padded(prompts)
    back = torch.tensor([0, 3, 5])
    tokens = _generate(model, data, anchors=data["input_ids"].shape[1] - 1 - back)
    expected = [_two_prefills(model, p, len(p) - 1 - b) for p, b in zip(prompts, back.tolist(), strict=True)]
    assert tokens.tolist() == expected


def test_logits_equal_two_prefills_to_float64_precision():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    prompt = _prompts()[2]
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES["llama"])
    anchors, ids = torch.tensor([len(prompt) - 1]), prompt[None]
    english = ffn_outputs(twin, layers, ids, torch.ones_like(ids), anchors) @ model.transform.matrix
    logits, _, _ = connected_logits(
        twin, layers, model.decision_maker.weight.detach(), english, ids, torch.ones_like(ids), anchors,
        torch.zeros(1, LAYERS, dtype=torch.float64),
    )  # fmt: skip
    result = model.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(result.logits[0][0].double(), logits[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("connect", [True, False])
def test_prompts_are_named_as_in_hugging_faces_generate(connect):
    model = cc_model()
    model.set_transform(_transform())
    ids, config = _prompts()[1][None], GenerationConfig(max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    expected = model.generate(input_ids=ids, generation_config=config, connect=connect)
    assert torch.equal(model.generate(inputs=ids, generation_config=config, connect=connect), expected)
    assert torch.equal(model.generate(ids, config, connect=connect), expected)
    padded, mask = torch.cat([ids * 0, ids], dim=1), torch.cat([ids * 0, ids * 0 + 1], dim=1)
    found = model.generate(padded, mask, connect=connect, **config.to_diff_dict())
    assert torch.equal(found[:, ids.shape[1] :], expected), "the mask by place"
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        model.generate(padded, mask, attention_mask=mask, connect=connect)
    with pytest.raises(ValueError, match="two names for the prompts"):
        model.generate(ids, config, input_ids=ids, connect=connect)


@pytest.mark.parametrize("ids", [{}, {"inputs": _prompts()[1][None]}])
def test_embeddings_are_refused_where_a_connection_would_act(ids):
    model = cc_model()
    embeds = model.get_input_embeddings()(_prompts()[1][None])
    plain = model.generate(**ids, inputs_embeds=embeds, max_new_tokens=4)
    model.set_transform(_transform())
    with pytest.raises(ValueError, match="reads token ids"):
        model.generate(**ids, inputs_embeds=embeds, max_new_tokens=4)
    assert torch.equal(model.generate(**ids, inputs_embeds=embeds, max_new_tokens=4, connect=False), plain)


def test_without_a_mask_padding_is_what_has_the_padding_token():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    data, english = _left_padded(_prompts()), _left_padded(_prompts()[::-1])
    english = {f"english_{name}": value for name, value in english.items()}
    right = {"english_input_ids": torch.nn.functional.pad(_prompts()[3][None], (0, 3)).repeat(4, 1)}
    for more in ({}, english):
        unmasked = {name: value for name, value in (data | more).items() if "mask" not in name}
        assert torch.equal(_generate(model, unmasked), _generate(model, data | more))
    unpadded = {"english_input_ids": _prompts()[3][None].repeat(4, 1)}
    assert torch.equal(_generate(model, data | right), _generate(model, data | unpadded))
    with pytest.raises(ValueError, match="padded on the left"):
        _generate(model, {"input_ids": data["input_ids"].flip(1)})
    with pytest.raises(ValueError, match="none of them padding"):
        _generate(model, {"input_ids": data["input_ids"]}, anchors=torch.zeros(4, dtype=torch.long))
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0  # then it is a token like others
    settings = {"max_new_tokens": 1, "do_sample": False}
    whole = model.generate(data["input_ids"], attention_mask=torch.ones_like(data["input_ids"]), **settings)
    assert torch.equal(model.generate(data["input_ids"], **settings), whole)


def test_real_english_prompts_as_the_upper_bound():
    model = cc_model(dtype=torch.float64)
    prompts, english = _prompts()[:2], _prompts()[2:]
    padded = _left_padded(english)
    tokens = _generate(
        model,
        _left_padded(prompts),
        english_input_ids=padded["input_ids"],
        english_attention_mask=padded["attention_mask"],
    )
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES["llama"])
    for row, (prompt, twin_prompt) in enumerate(zip(prompts, english, strict=True)):
        ids = twin_prompt[None]
        activations = ffn_outputs(twin, layers, ids, torch.ones_like(ids), torch.tensor([len(twin_prompt) - 1]))
        assert tokens[row].tolist() == _two_prefills(model, prompt, len(prompt) - 1, english=activations)


def test_without_a_transform_it_is_the_stock_generate():
    model = cc_model()
    data = _left_padded(_prompts())
    assert torch.equal(_generate(model, data), _generate(stock_twin(model), data))


class _TwoPrefills:
    """A stock model whose whole prefill is connected: a hook adds the chosen activation after layer 0 in the first
    forward of `generate`, over all prompt positions, no cache kept from any earlier read."""

    def __init__(self, model, prompts, connected=None) -> None:
        self.twin, self.model = stock_twin(model), model
        layers = layers_of(self.twin, FAMILIES[model.config.model_type])
        self.added = []
        for number, prompt in enumerate(prompts):
            ids, anchors = prompt[None], torch.tensor([len(prompt) - 1])
            english = ffn_outputs(self.twin, layers, ids, torch.ones_like(ids), anchors) @ model.transform.matrix
            embedded = self.twin.get_input_embeddings()(prompt[-1])
            choice = int((model.decision_maker.weight @ (english[:, 0].mean(0) + embedded)).argmax())
            on = connected is None or connected[number]
            self.added.append(english[choice, 0] if on else torch.zeros_like(embedded))
        layers[0].register_forward_hook(self._hook)

    def generate(self, **kwargs):
        self.first = True
        with torch.no_grad():
            return self.twin.generate(**kwargs)

    def _hook(self, module, args, output):
        if not self.first:
            return None
        self.first, output = False, output.clone()
        repeats = output.shape[0] // len(self.added)
        output[:, -1] += torch.stack(self.added).repeat_interleave(repeats, dim=0)
        return output


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_way_to_decode_equals_two_prefills(family, way):
    model = cc_model(family, dtype=torch.float64)
    model.set_transform(_transform())
    prompts = _prompts()[:3]
    arguments = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False} | WAYS[way]
    torch.manual_seed(7)
    ours = model.generate(**_left_padded(prompts), **arguments)
    reference = _TwoPrefills(model, prompts)
    torch.manual_seed(7)
    assert torch.equal(ours, reference.generate(**_left_padded(prompts), **arguments))
    assert not torch.equal(ours, model.generate(**_left_padded(prompts), connect=False, **arguments))


@pytest.mark.parametrize("own", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_what_a_given_config_leaves_open_is_the_models(own):
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    data, settings = _left_padded(_prompts()[:3]), {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**data, **settings, **own)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    model.generation_config.eos_token_id = None
    assert torch.equal(model.generate(**data, generation_config=GenerationConfig(**settings)), expected)


def test_a_cache_that_the_models_config_switches_off_is_refused_or_switched_on():
    model = cc_model()
    model.set_transform(_transform())
    data = _left_padded(_prompts())
    expected = _generate(model, data)
    model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="pass use_cache=True"):
        model.generate(**data, generation_config=GenerationConfig(max_new_tokens=3))
    assert torch.equal(_generate(model, data, use_cache=True), expected)


def _assisted(model) -> dict[str, dict]:
    with_transform = cc_model(seed=1, dtype=torch.float64)
    with_transform.set_transform(_transform())
    return {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "another model": {"assistant_model": cc_model(seed=1, dtype=torch.float64)},
        "the same weights": {"assistant_model": stock_twin(model)},
        "one with a transform": {"assistant_model": with_transform},
    }


@pytest.mark.parametrize("way", _assisted(cc_model()))
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_decoding_is_greedy_decoding(family, way):
    model = cc_model(family, dtype=torch.float64)
    model.set_transform(_transform())
    settings = _assisted(model)[way]
    english = {"english_input_ids": _prompts()[0][None]}
    for prompt in _prompts()[1:3]:
        data = {"input_ids": torch.cat([prompt, prompt])[None]}  # twice, so that there is something to look up
        for more in ({}, {"anchors": torch.tensor([0])}, {"anchors": torch.tensor([4])}, english, {"connect": False}):
            assert torch.equal(_generate(model, data, **more, **settings), _generate(model, data, **more)), more


def test_what_reads_the_prompt_in_its_own_way_is_refused():
    model = cc_model()
    model.set_transform(_transform())
    data = {"input_ids": _prompts()[0][None]}
    for bad, message in (
        ({"cache_implementation": "paged"}, "leave paged out"),
        ({"assistant_early_exit": 1}, "leave assistant_early_exit out"),
        ({"assistant_model": model}, "name another assistant_model"),
    ):
        with pytest.raises(ValueError, match=message):
            _generate(model, data, **bad)
    assert torch.equal(
        _generate(model, data, connect=False, assistant_model=model), _generate(model, data, connect=False)
    )


def test_rows_in_excluded_languages_are_the_stock_models_in_the_same_batch():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    data, languages = _left_padded(_prompts()), ["sw", "en-GB", None, "yo"]
    plain, connected = _generate(model, data, connect=False), _generate(model, data)
    for options, on in (
        ({"languages": languages}, [True, False, True, True]),
        ({"languages": languages, "exclude": ("yo", "sw")}, [False, True, True, False]),
        ({"connect": torch.tensor([True, True, False, False])}, [True, True, False, False]),
        ({"connect": False, "languages": languages}, [False] * 4),
    ):
        found = _generate(model, data, **options)
        expected = torch.where(torch.tensor(on)[:, None], connected, plain)
        assert torch.equal(found, expected), options
    for bad, message in (({"use_cache": False}, "pass use_cache=True"), ({"prefill_chunk_size": 4}, "leave")):
        with pytest.raises(ValueError, match=message):
            _generate(model, data, **bad)
    for bad in ({"languages": ["sw"]}, {"connect": torch.tensor([True, False])}):
        with pytest.raises(ValueError, match="4"):
            _generate(model, data, **bad)


def test_each_row_takes_its_languages_matrix():
    model = cc_model(dtype=torch.float64)
    matrices = torch.stack([_transform(), -_transform()])
    data = _left_padded(_prompts())
    each = []
    for matrix in matrices:
        model.set_transform(matrix)
        each.append(_generate(model, data))
    model.set_transform(Transform([matrices], "per_language", ("sw", "yo")))
    mixed = _generate(model, data, languages=["yo", "en", "sw", "yo"])
    plain = _generate(model, data, connect=False)
    assert torch.equal(mixed, torch.stack([each[1][0], plain[1], each[0][2], each[1][3]]))
    with pytest.raises(ValueError, match="name 4 languages"):
        _generate(model, data)


def test_streamers_and_stopping_criteria():
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append(None)

    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    prompt, streamer = _prompts()[1], Kept()
    tokens = _generate(model, {"input_ids": prompt[None]}, streamer=streamer)[0].tolist()
    assert streamer.ids == [*prompt.tolist(), *tokens, None]
    stopped = model.generate(
        prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        stopping_criteria=[lambda ids, scores: ids[:, -1] == tokens[2]],
    )  # fmt: skip
    first = tokens.index(tokens[2])
    assert stopped[0, len(prompt) :].tolist() == tokens[: first + 1]


def test_stop_strings():
    """That stand in two tokens."""
    letters = {chr(ord("A") + number): number for number in range(VOCAB)}
    core = Tokenizer(models.BPE(letters, []))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    prompt = _prompts()[1]
    tokens = _generate(model, {"input_ids": prompt[None]})[0].tolist()
    stop = tokenizer.decode(tokens[1:3])
    stopped = _generate(model, {"input_ids": prompt[None]}, stop_strings=[stop], tokenizer=tokenizer)[0].tolist()
    assert stopped == tokens[:3] != tokens


def test_threads_that_share_a_model_take_turns():
    model = cc_model()
    model.set_transform(_transform())
    asked = [
        ({"input_ids": prompt[None]}, {"connect": connect}) for prompt in _prompts()[:3] for connect in (True, False)
    ]
    expected = [_generate(model, data, **more) for data, more in asked]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda job: _generate(model, job[0], **job[1]), asked * 20)
        assert all(torch.equal(tokens, own) for tokens, own in zip(found, expected * 20, strict=True))


def test_a_copied_model_connects_by_itself():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    data = _left_padded(_prompts())
    twin = copy.deepcopy(model)
    assert torch.equal(_generate(twin, data), _generate(model, data))
    with twin.one_generation, ThreadPoolExecutor(1) as pool:  # the other's is free
        pool.submit(_generate, model, data).result(timeout=60)
    assert pickle.loads(pickle.dumps(model.one_generation)) is not model.one_generation


def test_generation_leaves_nothing_behind():
    model = cc_model()
    model.set_transform(_transform())
    data = _left_padded(_prompts())
    before = model(**data).logits
    first = _generate(model, data)
    assert torch.equal(model(**data).logits, before)
    assert torch.equal(_generate(model, data), first)
    with pytest.raises(ValueError):
        model.generate(**data, max_new_tokens=-1)
    assert torch.equal(model(**data).logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"attention_mask": d["attention_mask"].flip(1)}, "padded on the left"),
        (lambda d: d | {"anchors": torch.tensor([0, 0, 0, 0])}, "none of them padding"),
        (lambda d: d | {"anchors": torch.tensor([99, 11, 11, 11])}, "must be prompt positions in"),
        (lambda d: d | {"anchors": torch.tensor([11])}, r"anchors must have shape \(4,\)"),
    ],
)
def test_bad_input(change, message):
    model = cc_model()
    model.set_transform(_transform())
    with pytest.raises(ValueError, match=message):
        _generate(model, change(_left_padded(_prompts())))
