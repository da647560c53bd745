"""Chats for base LLMs, which were never taught any: two people talk, and a turn ends with its line.

A base LLM has no token that ends a turn, and its frozen weights would not write one. What it does write after a line
of a dialogue is a line break. So the line break becomes the control token with which turns end: generation stops at
it, labels include it, and what a user types cannot be mistaken for it.
"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


LINE_BREAK = "<|line_break|>"  # the name of the control token; its id is that of the LLM's own line break

# A line of instructions, then a line for each turn. The space before a reply is written with its first word.
TWO_SPEAKERS = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Bob:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ ('Ann: ' if message['role'] == 'user' else '') + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bob:' }}{% endif %}"
)


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerFast:
    """
    A base LLM's tokenizer for chats: with a chat template, and with the line break as the token that ends turns.

    Every token keeps its id. Line breaks in messages are spelt in bytes, as any control token in them would be.

    Args:
        tokenizer: the LLM's own, a fast one; it is not changed.
        chat_template: a template that ends each turn with `eos_token`.

    Raises:
        ValueError: if the line break is no token of its own, or the tokenizer cannot spell it in bytes.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"].get("merges")
    if "\n" not in vocabulary or not state["model"].get("byte_fallback"):
        raise ValueError(
            f"{type(tokenizer).__name__} has no token for a line break, or cannot spell one in bytes, so a line break "
            "cannot end a turn. Write a chat template with another token that this LLM writes of itself."
        )
    token = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    token |= {"id": vocabulary["\n"], "content": LINE_BREAK, "special": True}
    state["model"]["vocab"] = {LINE_BREAK if text == "\n" else text: id_ for text, id_ in vocabulary.items()}
    # no text becomes a line break, alone or as part of several
    state["model"]["merges"] = [pair for pair in merges if not any("\n" in piece for piece in pair)]
    state["added_tokens"] = [each for each in state["added_tokens"] if "\n" not in each["content"]] + [token]
    names = tokenizer.special_tokens_map | {"eos_token": LINE_BREAK}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=chat_template, **names
    )


def ends_of_turns(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which a turn ends: the line break's, and those of several in a row."""
    several = [id_ for text, id_ in tokenizer.get_vocab().items() if not text.strip("\n")]
    return [tokenizer.eos_token_id, *sorted(several)]


__all__ = ["TWO_SPEAKERS", "chat_tokenizer", "ends_of_turns"]
