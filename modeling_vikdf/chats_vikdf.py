"""Chats: messages become turns of plain text, and turns become a prompt by the LLM's chat template.

    messages -> `read_batch`: turns, and the pictures among them
    turns    -> `ChatTemplate.render`: the prompt as text, with user text escaped
             -> `ChatTemplate.locate_replies`: the spans in which the assistant speaks

Knows what templates do to texts, and that they may refuse a chat. Knows no ids, no knowledge and no padding.
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .text_vikdf import PLACEHOLDER, STAND_IN, TextTokenizer, map_strings, whole_characters


GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template that never mistakes user text for its own control tokens.

    Args:
        tokenizer: The tokenizer with the template and its variables.
        text_tokenizer: Escapes user text; see `TextTokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self.text_tokenizer = text_tokenizer

    def variables(self, in_use: str, chat_template: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the template: its source and its variables, escaped.

        Args:
            in_use: The default template.
            chat_template: A Jinja template, or the name of one of the tokenizer's, that replaces it; or None.
            variables: Variables of the template.

        Raises:
            ValueError: If `chat_template` is not a template, or does not mention a variable.
        """
        template = in_use
        if chat_template is not None:
            template = self.tokenizer.get_chat_template(chat_template)
            if "{" not in template:
                raise ValueError(f"chat_template is neither a Jinja template nor the name of one: {chat_template!r}.")
        for name in variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(f"{name!r} is neither an argument of the processor nor a chat template variable.")
        return {"chat_template": template, **self.text_tokenizer.escape(variables)}

    def spoken(self, turns: list[dict], **how: Any) -> list[dict]:
        """The non-empty turns; all turns if the template refuses these, as it may if it requires alternating roles."""
        spoken = [turn for turn in turns if not is_empty(turn)]
        if len(spoken) < len(turns):
            try:
                self.render(spoken, **how)
            except ValueError:
                return turns
        return spoken

    def render(self, turns: list[dict], **how: Any) -> str:
        """The rendered chat, with user text escaped; see `TextTokenizer`."""
        return self._apply_template(self._escape_turns(turns, **how), **how)

    def _apply_template(self, turns: list[dict], **how: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **how)
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(
                f"the LLM's chat template refuses a chat with the roles {[turn['role'] for turn in turns]}: {error} "
                "Change the chat or the system_prompt, or pass another chat_template=."
            ) from error

    def _escape_turns(self, turns: list[dict], **how: Any) -> list[dict]:
        """The turns with their texts escaped, so that they can be recognised in the rendered chat.

        A template may act on control tokens in a text, such as the </think> after which a reasoning model's reply
        begins, and cannot see them in an escaped text. Where that makes a difference, the turn's text is replaced by
        what the template would render for it; if that cannot be determined, the text is passed unescaped.
        """
        escaped = [{**self.text_tokenizer.escape(turn), "role": turn["role"]} for turn in turns]
        if escaped == turns or self._spelt_out(escaped, **how) == self._spelt_out(turns, **how):
            return escaped
        for index, turn in enumerate(turns):
            if turn["content"] != escaped[index]["content"]:
                content = self._rendered_content([*escaped[:index], turn, *escaped[index + 1 :]], index, **how)
                escaped[index] = {**escaped[index], "content": self.text_tokenizer.escape(content)}
        return escaped

    def _spelt_out(self, turns: list[dict], **how: Any) -> str:
        return self.text_tokenizer.spell_out(self._apply_template(turns, **how))

    def _rendered_content(self, turns: list[dict], index: int, **how: Any) -> str:
        """What the template renders for the content of a turn; the content itself if it also affects the rest."""
        rendered = self._spelt_out(turns, **how)
        stand_in = {**turns[index], "content": STAND_IN}
        before, _, after = self._spelt_out([*turns[:index], stand_in, *turns[index + 1 :]], **how).partition(STAND_IN)
        if rendered.startswith(before) and rendered.endswith(after) and len(before + after) <= len(rendered):
            return rendered[len(before) : len(rendered) - len(after)]
        return turns[index]["content"]

    def locate_replies(self, turns: list[dict], rendered: str, **how: Any) -> list[tuple[int, int]]:
        """The span (start, stop) of each assistant turn in the rendered chat, end-of-turn token included.

        Raises:
            ValueError: If the spans cannot be determined from the template.
        """
        marked = GENERATION_BLOCK.search(how["chat_template"])
        return (self._marked_replies if marked else self._rendered_replies)(turns, rendered, **how)

    def _marked_replies(self, turns: list[dict], text: str, **how: Any) -> list[tuple[int, int]]:
        """The spans of the template's `{% generation %}` blocks, each extended by the end-of-turn token after it.

        The tokenizer's own mask of assistant tokens would lose the last bytes of a reply that ends in an emoji.
        """
        _, (blocks,) = render_jinja_template(
            [self._escape_turns(turns, **how)],
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **how},
        )
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        replies = []
        for start, stop in blocks:
            stop = len(text[:stop].rstrip())
            after = text[stop:].lstrip()
            end_of_turn = next((token for token in special if after.startswith(token)), None)
            if end_of_turn and not text[:stop].endswith(special):
                stop = len(text) - len(after) + len(end_of_turn)
            replies.append((start, stop))
        if len(replies) != (expected := sum(turn["role"] == "assistant" for turn in turns)):
            raise ValueError(
                f"the chat template's {{% generation %}} blocks mark {len(replies)} of {expected} replies. They must "
                "enclose every one."
            )
        return replies

    def _rendered_replies(self, turns: list[dict], text: str, **how: Any) -> list[tuple[int, int]]:
        """The span that each reply adds to its generation prompt; a reply that opens a chat has none."""
        replies = []
        for index in (i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"):
            prompt = self.render(turns[:index], **{**how, "add_generation_prompt": True})
            answered = self.render(turns[: index + 1], **{**how, "add_generation_prompt": False})
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise ValueError(
                    f"the chat template renders the reply {turns[index]['content'][:40]!r} differently depending on "
                    "the other turns, so its tokens cannot be labelled. Pass chat_template= with {% generation %} "
                    "and {% endgeneration %} around what the assistant says."
                )
            replies.append((len(prompt), len(answered.rstrip())))  # without the template's newline after the turn
        return replies


def read_batch(messages: list, images: Any, system_prompt: str | None) -> tuple[list[list[dict[str, Any]]], list[Any]]:
    """Validates chats and reads them as turns of plain text, with the system prompt in front.

    Args:
        messages: One chat or a list of chats; see `VikdfProcessor.__call__`.
        images: One picture, or a list with a picture or None for every chat; None for none.
        system_prompt: Inserted in chats without a system message, unless None.

    Returns:
        B chats, and for each chat its picture or None.

    Raises:
        TypeError, ValueError: If a chat or message is malformed; the error names row and message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a chat (a list of messages) or a list of chats, not {messages!r}.")
    chats = messages if isinstance(messages[0], (list, tuple)) else [messages]
    if not isinstance(images, (list, tuple)):
        images = [None] * len(chats) if images is None else [images]
    if len(images) != len(chats):
        raise ValueError(f"{len(images)} images for {len(chats)} chats: give one image or None for every chat.")
    all_turns, pictures = [], []
    for row, (chat, image) in enumerate(zip(chats, images, strict=True)):
        turns, shown = _read_chat(chat, row)
        shown += [] if image is None else [image]
        if len(shown) > 1:
            raise ValueError(f"row {row}: the chat shows {len(shown)} pictures; at most one is supported.")
        if system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": whole_characters(system_prompt)})
        all_turns.append(turns)
        pictures.append(shown[0] if shown else None)
    return all_turns, pictures


def _read_chat(chat: Any, row: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with their contents as plain text, and the pictures among them."""
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"row {row}: a chat must be a list of at least one message, not {chat!r}.")
    turns, pictures = [], []
    for index, message in enumerate(chat):
        where = f"row {row}, message {index}"
        if not isinstance(message, dict):
            raise TypeError(f"{where}: a message must be a dictionary with role and content, not {message!r}.")
        if missing := [key for key in ("role", "content") if key not in message]:
            raise ValueError(f"{where}: {' and '.join(missing)} missing; a message has a role and a content.")
        check_choice(f"{where}: role", message["role"], ("system", "user", "assistant"))
        text, shown = _read_content(message["content"], where)
        if message["role"] == "user" and not text.strip() and not shown:
            raise ValueError(f"{where}: the content is empty; give it some text or leave the message out.")
        turns.append(map_strings(whole_characters, {**message, "content": text}))
        pictures += shown
    if all(map(is_empty, turns)):
        raise ValueError(f"row {row}: all messages of the chat are empty.")
    return turns[is_empty(turns[0]) and turns[0]["role"] == "system" :], pictures


def _read_content(content: Any, where: str) -> tuple[str, list[Any]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{where}: a content must be a string or a list of parts, not {content!r}.")
    texts, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and (
            sources := [part[key] for key in ("image", "url", "path") if part.get(key) is not None]
        ):
            pictures += sources
        else:
            raise ValueError(
                f"{where}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': ...}} (or "
                f"with 'url' or 'path'), not {part!r}."
            )
    return "\n".join(texts), pictures


def place_knowledge(turns: list[dict], slots: int, message: str, placement: str) -> list[dict]:
    """Writes `slots` placeholders into a message, at its start or end; see `VikdfProcessor`.

    Raises:
        ValueError: If there is no user message, or no system message where that should carry the knowledge.
    """
    if slots == 0:
        return turns
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise ValueError("knowledge is computed from what the user says, but there is no user message.")
    carrier = {"system": 0, "first_user": users[0], "last_user": users[-1]}[message]
    if message == "system" and turns[0]["role"] != "system":
        raise ValueError("no system message to carry the knowledge; give one, or set system_prompt.")
    placeholders, content = PLACEHOLDER * slots, turns[carrier]["content"]
    content = placeholders + content if placement == "start" else content + placeholders
    return [*turns[:carrier], {**turns[carrier], "content": content}, *turns[carrier + 1 :]]


def is_empty(turn: dict[str, Any]) -> bool:
    """Whether a turn is blank; a user turn without text shows a picture."""
    return turn["role"] != "user" and not turn["content"].strip()


def prompt_ending(
    turns: list[dict], add_generation_prompt: bool | None, continue_final_message: bool | None, return_labels: bool
) -> dict[str, bool]:
    """How the chat template ends the prompt: its `add_generation_prompt` and `continue_final_message`.

    Args:
        turns: The chat.
        add_generation_prompt: As for `VikdfProcessor.__call__`; None for the default.
        continue_final_message: As for `VikdfProcessor.__call__`; None for the default.
        return_labels: Whether the chat is for training.

    Raises:
        ValueError: If the arguments exclude each other or do not fit the chat.
    """
    replies = [turn for turn in turns if turn["role"] == "assistant"]
    if return_labels and not replies:
        raise ValueError("return_labels=True needs an assistant message to learn, but there is none.")
    if return_labels and (is_empty(turns[-1]) or all(map(is_empty, replies))):
        raise ValueError("return_labels=True needs a reply to learn, but the assistant's message is empty.")
    roles = [turn["role"] for turn in turns if not is_empty(turn)]
    if continue_final_message is None:
        continue_final_message = roles[-1] == "assistant" and not return_labels and add_generation_prompt is None
    if add_generation_prompt is None:
        add_generation_prompt = not (continue_final_message or return_labels)
    if continue_final_message and roles[-1] != "assistant":
        raise ValueError(
            f"continue_final_message needs an assistant message at the end, but the last message is the {roles[-1]}'s."
        )
    if continue_final_message and (add_generation_prompt or return_labels):
        raise ValueError("continue_final_message excludes add_generation_prompt and return_labels: choose one.")
    return {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}


def last_user(turns: list[dict]) -> int:
    """Index of the last user turn; -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises a ValueError that names the setting and the allowed values, unless the value is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")


__all__ = ["ChatTemplate", "place_knowledge", "prompt_ending", "read_batch"]
