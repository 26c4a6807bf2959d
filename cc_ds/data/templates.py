"""Render chats with a model's chat template, and know where the prompt ends.

`load_template` takes the tokenizer's own template or a built-in one and reads from it, once, by rendering two
sentinel turns, what stands before and after a response. From then on a prompt is rendered, tokenised and given its
anchor (its last token), and a response becomes its tokens plus the end-of-turn. Positions always come from the
rendering, never from a search for token ids: a search finds the wrong place as soon as a text quotes the template.
Each response is rendered as well, as templates of thinking models write a thoughtful one otherwise than a plain one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# `{bos}` is filled in with "{{ bos_token }}" for tokenizers that use one, so that the stock `apply_chat_template` of an
# exported model gives the ids that training saw.
BUILT_IN = {
    "llama3": (
        "{bos}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{bos}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{bos}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + '[/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{bos}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] + '\n\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
        "{% if m['role'] == 'user' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}"
        "{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "plain": (
        "{bos}{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    ),
}
NEEDED_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "plain": (),
}
REMEDY = f"Name one with --chat_template {'|'.join(BUILT_IN)}"
SENTINEL_QUESTION, SENTINEL_ANSWER = "sentinelquestion", "sentinelanswer"
ASKED = {"role": "user", "content": SENTINEL_QUESTION}
OPEN_TAG = re.compile(r"<\w+>\s*$")  # a generation prompt that ends in "<think>\n"


class TemplateRejects(ValueError):
    """The chat template refuses this conversation (its own reason is the message): a fault of the row, not of the
    run."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A tokenised prompt, generation prompt included."""

    ids: list[int]
    anchor: int
    """Index of the prompt's last token (METHOD.md, Training, 1)."""


@dataclass(frozen=True)
class Template:
    """A chat template bound to its tokenizer; made by `load_template`."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    """A built-in name, or "own"."""
    chat_template: str
    """The Jinja source. Written into an exported tokenizer, it renders as in training."""
    bos_id: int | None
    """The token that every prompt opens with, put there by the tokenizer or the template; None if neither does."""
    generation_prompt: str
    """What the template puts between the user's last words and the response."""
    response_prefix: str
    """What the template puts between the generation prompt and the response (often "", " " for Mistral, an empty
    "<think>" block for Qwen3). It is trained as part of the response."""
    begun_response: str
    """What the generation prompt writes of a response beyond what a finished turn has (mostly "", "<think>\\n" for
    DeepSeek R1)."""
    finished_opening: str
    """What stands between the user's last words and the response of a finished turn."""
    finished_closing: str
    """What stands after the response of a finished turn."""
    end_of_turn_ids: list[int]
    """The tokens that end a response: what follows it in the template up to the first special token, or eos."""
    stop_token_ids: list[int]
    """Tokens that end generation: the end of turn and eos."""

    def render_prompt(self, messages: list[dict[str, str]], where: str | None = None) -> RenderedPrompt:
        """Token ids of the prompt with its generation prompt; exactly one BOS where there is a `bos_id`.

        Raises TemplateRejects where the template refuses the conversation; the message begins with `where` it stands.
        """
        if where is not None:
            try:
                return self.render_prompt(messages)
            except TemplateRejects as error:
                raise TemplateRejects(f"{where}: the chat template rejects it ({error})") from error
        ids = _encode(self.tokenizer, _render(self.tokenizer, self.chat_template, messages, add_generation_prompt=True))
        if self.bos_id is not None:
            first = next((index for index, token in enumerate(ids) if token != self.bos_id), len(ids))
            ids = [self.bos_id, *ids[first:]]
        if not ids:
            raise TemplateRejects("the chat template renders this prompt to nothing")
        return RenderedPrompt(ids, len(ids) - 1)

    def render_response(self, text: str) -> list[int]:
        """Token ids of the response as they follow the generation prompt, then the end of turn."""
        return self.encode_response(text) + self.end_of_turn_ids

    def encode_response(
        self, text: str, reasoning_content: str = "", prompt: Sequence[Mapping[str, str]] = (ASKED,)
    ) -> list[int]:
        """`render_response` without the end of turn, with the thoughts that led to the text, as an answer to `prompt`.

        Raises TemplateRejects where the template does not write the thoughts, or begins some that the text lacks.
        """
        text = self._follow(text, reasoning_content, prompt)
        return _encode_after(self.tokenizer, self.generation_prompt, text)

    def _follow(self, text: str, reasoning_content: str, prompt: Sequence[Mapping[str, str]]) -> str:
        """What follows the generation prompt: mostly response_prefix and the text, as the row has it."""
        answer = {"role": "assistant", "content": text}
        if reasoning_content:
            answer["reasoning_content"] = reasoning_content
        whole = _render(self.tokenizer, self.chat_template, [*prompt, answer], add_generation_prompt=False)
        if reasoning_content and _squeezed(reasoning_content) not in _squeezed(whole):
            raise TemplateRejects(
                "it does not write the reasoning_content. Put the thoughts into the response, or leave them out"
            )
        begun, closing = self.begun_response, self.finished_closing
        finished = whole[: len(whole) - len(closing)] if whole.endswith(closing) else ""
        # The usual case. The text stays as the row has it, though some templates trim it.
        as_it_is = not reasoning_content and _ends_in(finished, self.finished_opening, text)
        if as_it_is and not OPEN_TAG.search(begun):
            return self.response_prefix + text
        # Thoughts, which the template writes in its own way.
        asked = _render(self.tokenizer, self.chat_template, prompt, add_generation_prompt=True)
        if finished.startswith(asked) and _squeezed(text) in _squeezed(finished):
            return finished.removeprefix(asked)
        # Thoughts that the template drops from a finished turn, though it may begin them for the model.
        tag = begun.rstrip()
        if not text.startswith(tag):
            raise TemplateRejects(f"the generation prompt ends in {tag!r} and the response does not begin with that")
        return self.response_prefix + text.removeprefix(tag).removeprefix(begun[len(tag) :])

    def decode_response(self, ids: list[int]) -> str:
        """The response in generated tokens: without special tokens, the template's prefix and outer whitespace."""
        prefix = _encode_after(self.tokenizer, self.generation_prompt, self.response_prefix)
        prefix, text = (self.tokenizer.decode(each, skip_special_tokens=True).strip() for each in (prefix, ids))
        return text.removeprefix(prefix).strip()

    def shortest_prompt_length(self) -> int:
        """Tokens that truncation must keep of any prompt: BOS, something of the text, the generation prompt."""
        generation_prompt = _encode_after(self.tokenizer, SENTINEL_QUESTION, self.generation_prompt)
        return (self.bos_id is not None) + 1 + len(generation_prompt)


def load_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Template:
    """The tokenizer's own chat template (name None) or a built-in one: llama3, chatml, mistral, gemma, plain.

    Raises ValueError where there is no template, it does not compile or does not show the response, or the vocabulary
    lacks the special tokens of a built-in one.
    """
    bos_id = _bos_in_use(tokenizer)
    source = _own_source(tokenizer) if name is None else _built_in_source(tokenizer, name, uses_bos=bos_id is not None)
    what = "the tokenizer's own chat template" if name is None else f"the chat template {name!r}"
    answered = {"role": "assistant", "content": SENTINEL_ANSWER}
    try:
        prompt = _render(tokenizer, source, [ASKED], add_generation_prompt=True)
        whole = _render(tokenizer, source, [ASKED, answered], add_generation_prompt=False)
    except TemplateRejects as error:
        raise ValueError(
            f"{what} is broken: {error}. {REMEDY}, or mend the template of the model's tokenizer."
        ) from error
    if SENTINEL_QUESTION not in prompt or SENTINEL_ANSWER not in whole:
        raise ValueError(f"{what} does not render the messages it is given. {REMEDY}.")
    if bos_id is not None and not prompt.startswith(tokenizer.bos_token):
        # Training adds BOS; servers tokenise what the exported template renders, and add none.
        source = "{{ bos_token }}" + source
    elif _opens_with_bos(tokenizer, prompt):
        bos_id = tokenizer.bos_token_id
    before, _, after = whole.rpartition(SENTINEL_ANSWER)
    opening, generation_prompt = (text.rpartition(SENTINEL_QUESTION)[2] for text in (before, prompt))
    end_of_turn = _end_of_turn(tokenizer, after)
    if not end_of_turn:
        raise ValueError(
            f"nothing ends a response: {what} writes no special token after it and the tokenizer has no eos_token. "
            "Set the tokenizer's eos_token, or use a template with an end-of-turn token."
        )
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Template(
        tokenizer=tokenizer,
        name=name or "own",
        chat_template=source,
        bos_id=bos_id,
        generation_prompt=generation_prompt,
        response_prefix=before.removeprefix(prompt) if before.startswith(prompt) else "",
        begun_response=generation_prompt.removeprefix(opening) if generation_prompt.startswith(opening) else "",
        finished_opening=opening,
        finished_closing=after,
        end_of_turn_ids=end_of_turn,
        stop_token_ids=list(dict.fromkeys([end_of_turn[-1], *eos])),
    )


def _own_source(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template. {REMEDY}.")
    return tokenizer.get_chat_template()


def _built_in_source(tokenizer: PreTrainedTokenizerBase, name: str, uses_bos: bool) -> str:
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown chat template {name!r}; the built-in ones are {', '.join(BUILT_IN)}.{hint}")
    missing = [token for token in NEEDED_TOKENS[name] if tokenizer.tokenize(token) != [token]]
    if missing:
        raise ValueError(
            f"the chat template {name!r} needs {', '.join(missing)} as single tokens, which this tokenizer does not "
            "have. Use --chat_template plain, or add the tokens (tokenizer.add_tokens(..., special_tokens=True)) and "
            "resize the model's embeddings."
        )
    if name in ("mistral", "plain") and tokenizer.eos_token is None:
        raise ValueError(
            f"the chat template {name!r} ends a response with eos, and this tokenizer has no eos_token: set it."
        )
    return BUILT_IN[name].replace("{bos}", "{{ bos_token }}" if uses_bos else "")


def _bos_in_use(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer puts one before a text by itself, else None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    added = tokenizer("")["input_ids"][:1] == [bos]
    return bos if added or getattr(tokenizer, "add_bos_token", False) else None


def _opens_with_bos(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether the template writes BOS. What comes again within one turn is the mark of a turn (SmolLM2), not BOS."""
    bos = tokenizer.bos_token
    return bool(bos) and prompt.startswith(bos) and prompt.count(bos) == 1


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _ends_in(whole: str, opening: str, text: str) -> bool:
    """Whether `whole` ends in the opening and the text, in which templates trim whitespace (Llama 3)."""
    whole, text = whole.rstrip(), text.strip()
    return whole.endswith(text) and whole[: len(whole) - len(text)].rstrip().endswith(opening.rstrip())


def _render(
    tokenizer: PreTrainedTokenizerBase, source: str, messages: Sequence[Mapping[str, str]], **options: Any
) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=source, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError) as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateRejects(f"{type(error).__name__}: {error}{line}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_after(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int]:
    """Tokens of `text` as they follow `context`, whose own tokens stay as they are.

    SentencePiece puts a space before the start of a text, so a response tokenised by itself would begin with a space
    that generation never sees. Where a token would span the seam the context is eos, which nothing merges with.
    """
    for before in (context, tokenizer.eos_token or ""):
        context_ids = _encode(tokenizer, before) if before else []
        ids = _encode(tokenizer, before + text)
        if ids[: len(context_ids)] == context_ids:
            return ids[len(context_ids) :]
    return _encode(tokenizer, text)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str) -> list[int]:
    """Tokens of what follows a response, up to and including the first special one; eos if there is none."""
    ids = _encode_after(tokenizer, SENTINEL_ANSWER, after) if after else []
    special = set(tokenizer.all_special_ids)
    # Added tokens count too, marked special or not, but for the line breaks that some vocabularies keep among them.
    special |= {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special or token.content.strip()
    }
    end = next((index for index, token in enumerate(ids) if token in special), None)
    if end is not None:
        return ids[: end + 1]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
