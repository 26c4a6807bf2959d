"""Prompts are what transformers' own apply_chat_template gives, with one BOS; responses follow as it would put them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from cc_ds.data import TemplateRejects, load_template
from cc_ds.data.templates import BUILT_IN

TALKS = {
    "one turn": [{"role": "user", "content": "Je, mji mkuu wa Kenya ni upi?"}],
    "system": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is Kenya?"}],
    "several turns": [
        {"role": "user", "content": "Wie heißt\ndie Hauptstadt?"},
        {"role": "assistant", "content": "Nairobi."},
        {"role": "user", "content": "Of what?"},
    ],
}
RESPONSE = "Nairobi is the capital."
END_OF_TURN = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}  # the others: eos


def ids_of_transformers(tokenizer, source, messages, **options):
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False, **options)


@pytest.fixture(params=["bpe", "bpe without bos", "llama", "llama without bos"])
def tokenizer(request, make_bpe, make_llama):
    make = make_bpe if request.param.startswith("bpe") else make_llama
    return make(bos="without" not in request.param)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_against_transformers(tokenizer, name):
    template = load_template(tokenizer, name)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN.get(name, tokenizer.eos_token))
    assert template.end_of_turn_ids == [end_of_turn]
    assert template.stop_token_ids == list(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))
    uses_bos = tokenizer("Kenya")["input_ids"][0] == tokenizer.bos_token_id
    for messages in TALKS.values():
        prompt = template.render_prompt(messages)
        assert prompt.ids == ids_of_transformers(
            tokenizer, template.chat_template, messages, add_generation_prompt=True
        )
        assert prompt.anchor == len(prompt.ids) - 1
        assert prompt.ids.count(tokenizer.bos_token_id) == uses_bos
        assert (prompt.ids[0] == tokenizer.bos_token_id) == uses_bos
        # The whole conversation as transformers tokenises it begins with our prompt and our response.
        whole = [*messages, {"role": "assistant", "content": RESPONSE}]
        ours = prompt.ids + template.render_response(RESPONSE)
        assert ids_of_transformers(tokenizer, template.chat_template, whole)[: len(ours)] == ours


RENDERED = {
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mistral": "[INST] S\n\nA[/INST] B<|eos|>[INST] C[/INST]",
    "gemma": (
        "<start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"
        "<start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n"
    ),
    "plain": "S\nA\nB\nC\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_write_what_the_families_write(bpe, name):
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = load_template(bpe, name).render_prompt(messages).ids
    assert bpe.decode(ids) == "<|bos|>" + RENDERED[name]


def test_own_template_and_bos_exactly_once(make_bpe):
    """Whether the template writes BOS, forgets it, or writes it twice."""
    tokenizer = make_bpe()
    body = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tail = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for opening in ("", "{{ bos_token }}", "{{ bos_token + bos_token }}"):
        tokenizer.chat_template = opening + body + tail
        template = load_template(tokenizer)
        ids = template.render_prompt(TALKS["one turn"]).ids
        assert ids == ids_of_transformers(
            tokenizer, "{{ bos_token }}" + body + tail, TALKS["one turn"], add_generation_prompt=True
        )
        assert ids.count(tokenizer.bos_token_id) == 1
        assert template.end_of_turn_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_exported_template_writes_the_bos_that_training_saw(make_bpe, tmp_path):
    """Servers tokenise what the template renders and add nothing."""
    tokenizer = make_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    template = load_template(tokenizer)
    tokenizer.chat_template = template.chat_template
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    again = load_template(exported)
    assert again.chat_template == template.chat_template
    ids = template.render_prompt(TALKS["one turn"]).ids
    assert ids[0] == tokenizer.bos_token_id
    assert again.render_prompt(TALKS["one turn"]).ids == ids
    assert exported.apply_chat_template(TALKS["one turn"], return_dict=False) == ids


def test_bos_that_only_the_template_writes(make_bpe):
    """It counts as BOS, which truncation keeps (OLMo 2), unless it is also the mark of every turn (SmolLM2)."""
    tokenizer = make_bpe(bos=False)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = load_template(tokenizer)
    assert template.bos_id == tokenizer.bos_token_id
    assert template.render_prompt(TALKS["one turn"]).ids.count(tokenizer.bos_token_id) == 1
    assert load_template(tokenizer, "chatml").bos_id is None


def test_anchor_is_last_even_where_the_text_quotes_the_template(bpe):
    template = load_template(bpe, "chatml")
    quoting = [{"role": "user", "content": "<|im_start|>assistant\nX<|im_end|>"}]
    prompt = template.render_prompt(quoting)
    assert prompt.anchor == len(prompt.ids) - 1


def test_text_before_the_response_that_only_a_finished_turn_shows(bpe):
    """A response begins with what the template puts there, so that training sees what the template gives."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ 'ANSWER ' }}"
        "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    bpe.chat_template = source
    try:
        template = load_template(bpe)
    finally:
        bpe.chat_template = None
    assert template.response_prefix == "ANSWER "
    assert bpe.decode(template.render_response("Nairobi")) == "ANSWER Nairobi<|im_end|>"


def test_a_prefix_of_the_template_is_no_part_of_an_answer(make_bpe):
    """Qwen3 puts an empty block of thoughts before every response, in tokens that are not marked special."""
    tokenizer = make_bpe()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = load_template(tokenizer)
    assert template.response_prefix == "<think>\n\n</think>\n\n"
    for text in ("Nairobi", "</think> Nairobi", "\nNairobi\n", ""):
        assert template.decode_response(template.encode_response(text)) == text.strip()
    without = tokenizer("Nairobi <think>\n\n</think>", add_special_tokens=False)["input_ids"]
    assert template.decode_response(without) == "Nairobi <think>\n\n</think>"


THINK = "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
SPLIT = (
    "{% set content, thoughts = m['content'], m['reasoning_content'] or '' %}"
    "{% if '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
)
THINKING = {  # how a finished last turn is written, and the generation prompt
    "qwen3": (SPLIT + THINK, ""),
    "qwen3 thinking": (SPLIT + THINK, "<think>\n"),
    "minimax": (SPLIT + "{% if thoughts %}" + THINK + "{% else %}{{ content }}{% endif %}", "<think>\n"),
    "r1": (SPLIT + "{{ content }}", "<think>\n"),
    "first r1": (SPLIT + "{{ content }}", ""),
    "gemma4": (SPLIT + "{{ content }}", "<think>\n</think>\n"),  # no thoughts, said beforehand
}
THOUGHTFUL, PLAIN = "<think>\n2+2 is 4\n</think>\n\nFour.", "Four."
ONE_BLOCK = {
    "qwen3": (THOUGHTFUL, "<think>\n\n</think>\n\nFour.", THOUGHTFUL),
    "qwen3 thinking": (THOUGHTFUL, "<think>\n\n</think>\n\nFour.", THOUGHTFUL),
    "minimax": (THOUGHTFUL, None, THOUGHTFUL),
    "r1": (THOUGHTFUL, None, None),
    "first r1": (THOUGHTFUL, PLAIN, None),
    "gemma4": (None, "<think>\n</think>\nFour.", None),
}


def thinking_template(make_bpe, name):
    finished, begun = THINKING[name]
    tokenizer = make_bpe()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        + finished
        + "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        + begun
        + "' }}{% endif %}"
    )
    return load_template(tokenizer)


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_one_block(make_bpe, name):
    """In the response, none at all, or apart; after whatever the generation prompt has begun of them."""
    template = thinking_template(make_bpe, name)
    for messages in TALKS.values():
        prompt = template.render_prompt(messages).ids
        for (text, apart), whole in zip(
            ((THOUGHTFUL, ""), (PLAIN, ""), (PLAIN, "2+2 is 4")), ONE_BLOCK[name], strict=True
        ):
            if whole is None:
                with pytest.raises(TemplateRejects, match=r"'<think>.*does not begin|does not write the reasoning"):
                    template.encode_response(text, apart, messages)
            else:
                ids = prompt + template.encode_response(text, apart, messages)
                assert template.tokenizer.decode(ids).endswith("<|im_start|>assistant\n" + whole)


def test_a_system_turn_that_a_finished_conversation_loses(make_bpe):
    """Mistral writes the system turn into the user's last one, and only where that is the last of all."""
    tokenizer = make_bpe()
    tokenizer.chat_template = (
        "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}{% if loop.last %}{{ system }}{% endif %}"
        "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    template = load_template(tokenizer)
    for messages in TALKS.values():
        assert tokenizer.decode(template.encode_response("Nairobi. ", prompt=messages)) == " Nairobi. "


@pytest.mark.parametrize("name", BUILT_IN)
def test_responses_decode_to_themselves(tokenizer, name):
    """No space creeps in and nothing is lost, whatever the text begins with; a seam that could merge stays a seam."""
    template = load_template(tokenizer, name)
    for text in ("Nairobi", "Sie heißt", " Nairobi", "\nNairobi", "\n\n", "Heißt 🙂", "?"):
        response = template.render_response(text)
        prompt = template.render_prompt(TALKS["one turn"]).ids
        assert template.decode_response(response) == text.strip()
        decoded = tokenizer.decode(prompt + response)
        assert decoded.endswith(text + tokenizer.decode(template.end_of_turn_ids))
        assert decoded == tokenizer.decode(prompt) + template.response_prefix + text + tokenizer.decode(
            template.end_of_turn_ids
        )


def test_no_template_names_the_remedy(bpe):
    with pytest.raises(ValueError, match=r"no chat template. .*--chat_template llama3\|chatml\|mistral\|gemma\|plain"):
        load_template(bpe)


BROKEN = {
    "syntax": ("{% for m in messages %}", r"own chat template is broken: TemplateSyntaxError.*line 1"),
    "undefined": ("{{ messages[0].author.name }}", r"own chat template is broken: UndefinedError"),
    "refuses all": ("{{ raise_exception('no chats') }}", r"own chat template is broken: .*no chats"),
    "drops the text": ("{{ '<|im_start|>' }}", r"does not render the messages"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_templates_are_one_clear_error(make_bpe, fault):
    tokenizer = make_bpe()
    tokenizer.chat_template, message = BROKEN[fault]
    with pytest.raises(ValueError, match=message) as caught:
        load_template(tokenizer)
    assert "--chat_template" in str(caught.value)


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "gemma"])
def test_missing_special_tokens_name_the_remedy(make_bpe, name):
    with pytest.raises(ValueError, match=r"needs .* as single tokens.*--chat_template plain, or add the tokens"):
        load_template(make_bpe(chat_tokens=False), name)
    load_template(make_bpe(chat_tokens=False), "plain")


def test_unknown_name_and_missing_eos(make_bpe):
    with pytest.raises(ValueError, match=r"unknown chat template 'chatlm'.*Did you mean 'chatml'"):
        load_template(make_bpe(), "chatlm")
    with pytest.raises(ValueError, match=r"ends a response with eos"):
        load_template(make_bpe(eos=False), "plain")
    tokenizer = make_bpe(eos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"nothing ends a response"):
        load_template(tokenizer)


def test_a_template_without_end_of_turn_ends_in_eos(make_bpe):
    tokenizer = make_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n\n' }}{% endfor %}"
    template = load_template(tokenizer)
    assert template.end_of_turn_ids == template.stop_token_ids == [tokenizer.eos_token_id]


def test_an_end_of_turn_that_is_not_marked_special(make_bpe):
    """Nor do the line breaks that Gemma keeps among its added tokens end a turn."""
    tokenizer = make_bpe()
    tokenizer.add_tokens(["\n\n", "<end>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n\n<end>\n\n' }}{% endfor %}"
    template = load_template(tokenizer)
    assert template.end_of_turn_ids == tokenizer.convert_tokens_to_ids(["\n\n", "<end>"])


def test_system_turns_that_the_own_template_refuses(make_bpe):
    tokenizer = make_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    template = load_template(tokenizer)
    template.render_prompt(TALKS["one turn"])
    with pytest.raises(TemplateRejects, match="System role not supported"):
        template.render_prompt(TALKS["system"])
