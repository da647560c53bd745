"""The way in: chats and pictures become the tensors a VIKDF model reads.

    messages -> the dialogue as text                         -> context tokenizer -> context_input_ids (text encoder)
             -> the LLM's chat template, with n placeholders -> tokenizer         -> input_ids         (LLM)
    pictures ------------------------------------------------> image processor    -> pixel_values      (vision encoder)

This module knows which token holds the place of a knowledge vector, where the placeholders go and what is left out of
a chat that is too long. It knows no model: models find the placeholders by `knowledge_token_id`.

What people write is text. Control tokens (`<|im_start|>`, `[SEP]`, the placeholder) come from the chat template and
from this module alone; typed into a message they are so many ordinary characters. See `TextTokenizer`.
"""

import base64
import copy
import difflib
import inspect
import io
import itertools
import os
import re
import secrets
import stat
import time
import urllib.request
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote_to_bytes

import torch
from PIL import Image, ImageChops, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AddedToken,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # from the top it may want torchvision
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .atomic_saving import replace_files, saved_in


logger = logging.get_logger(__name__)

KNOWLEDGE_TOKEN = "<|knowledge|>"
# How vocabularies name tokens that no text uses: <empty_output>, <|reserved_special_token_0|>, [unused0], ...
SPARE_TOKEN = re.compile(r"[<\[].*(empty_output|reserved|unused|extra_id|placeholder|dummy).*[>\]]", re.IGNORECASE)
# Added tokens that are words or white space belong to a language; all others, such as <think>, control something.
WORDS = re.compile(r"[\w\s]*")
# In a rendered chat; halves of surrogate pairs, which no message has, for there they become U+FFFD.
PLACEHOLDER, STAND_IN, FIRST_ESCAPE = "\ud800", "\ud801", 0xDC00
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
IGNORED = -100  # the label that the loss skips
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none that starts other programs, as EPS does
MAX_PIXELS = 64_000_000  # more is taken for a decompression bomb
MAX_PICTURE_BYTES = 2**28  # as much as that many pixels take without compression
URL_TIMEOUT = 30.0  # seconds, without a byte and for the whole picture


class VikdfProcessor(ProcessorMixin):
    """Turns chats into model inputs: prompts with knowledge placeholders, contexts for the text encoder, pictures.

    The processor owns its tokenizers: it pads prompts on the left, cuts contexts on the left, and lends the
    end-of-sequence token to a tokenizer without padding token.

    Args:
        tokenizer: The LLM's tokenizer; it must know `knowledge_token` as one special token (see `from_backbones`).
        context_tokenizer: The text encoder's tokenizer.
        image_processor: The vision encoder's image processor; without one, pictures are refused.
        chat_template: Replaces the chat template of the LLM's tokenizer; or several by their names, "default" in use.
        num_knowledge_tokens: Placeholders for the knowledge drawn from the text; in a chat that shows a picture, as
            many for the picture follow them.
        knowledge_token: The special token that holds the place of a knowledge vector; in a message it is mere text.
        knowledge_message: The message that carries the placeholders: "system", "first_user" or "last_user".
        knowledge_placement: Where they stand in its content: "start" or "end".
        system_prompt: The system message of chats that bring none.
        max_context_length: Most tokens of a context; by default what the context tokenizer says its encoder reads.

    Raises:
        ValueError: If a setting is none of the above, or `tokenizer` lacks a chat template or `knowledge_token`, or is
            written in Python (not a "fast" one).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_tokenizer: PreTrainedTokenizerBase,
        image_processor: Any = None,
        chat_template: str | dict[str, str] | None = None,
        num_knowledge_tokens: int = 32,
        knowledge_token: str = KNOWLEDGE_TOKEN,
        knowledge_message: str = "last_user",
        knowledge_placement: str = "end",
        system_prompt: str | None = None,
        max_context_length: int | None = None,
    ):
        _check_choice("knowledge_message", knowledge_message, ("system", "first_user", "last_user"))
        _check_choice("knowledge_placement", knowledge_placement, ("start", "end"))
        if num_knowledge_tokens < 1:
            raise ValueError(f"num_knowledge_tokens must be at least 1, not {num_knowledge_tokens}.")
        special = context_tokenizer.num_special_tokens_to_add()
        if max_context_length is not None and max_context_length <= special:
            raise ValueError(f"max_context_length must exceed the {special} special tokens, not {max_context_length}.")
        if isinstance(chat_template, dict):  # the tokenizer keeps them all, the processor the one in use
            tokenizer.chat_template, chat_template = chat_template, None
        if chat_template is None and not tokenizer.chat_template:
            raise ValueError(
                "The LLM's tokenizer has no chat template. Pass chat_template=, and check that `tokenizer` and "
                "`context_tokenizer` are not swapped."
            )
        super().__init__(tokenizer, context_tokenizer, chat_template=tokenizer.get_chat_template(chat_template))
        if image_processor is not None:
            self.check_argument_for_proper_class("image_processor", image_processor)
        self.image_processor = image_processor
        self.num_knowledge_tokens = num_knowledge_tokens
        self.knowledge_token = knowledge_token
        self.knowledge_message = knowledge_message
        self.knowledge_placement = knowledge_placement
        self.system_prompt = system_prompt
        self.max_context_length = max_context_length

        known = tokenizer.added_tokens_decoder.get(self.knowledge_token_id)
        if known is None or known.content != knowledge_token or not known.special:
            raise ValueError(
                f"The LLM's tokenizer ({len(tokenizer)} tokens) does not know {knowledge_token!r} as a special token. "
                "Build the processor with VikdfProcessor.from_backbones, name another knowledge_token=, or check that "
                "`tokenizer` and `context_tokenizer` are not swapped."
            )
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is written in Python; take the LLM's fast tokenizer.")
        for each in (tokenizer, context_tokenizer):
            if each.pad_token is None:
                each.pad_token = each.eos_token
        tokenizer.padding_side = "left"  # replies grow on the right
        context_tokenizer.truncation_side = "left"  # the newest words tell most about the reply

    @classmethod
    def from_backbones(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        context_tokenizer: PreTrainedTokenizerBase,
        image_processor: Any = None,
        *,
        vocab_size: int | None = None,
        knowledge_token: str | None = None,
        **settings: Any,
    ) -> "VikdfProcessor":
        """Builds a processor from the backbones' own parts; the tokenizers are copied and stay as they are.

        The LLM is frozen and its embedding never resized, so the placeholder must be one of its rows: without
        `knowledge_token` a new token in a free row, else one the vocabulary keeps in reserve, else the unknown one.

        Args:
            tokenizer, context_tokenizer, image_processor: As for `VikdfProcessor`.
            vocab_size: Rows of the LLM's embedding; by default as many as its tokenizer has tokens.
            knowledge_token: The token to use; it is added if it is unknown and a row is free.
            settings: More settings of `VikdfProcessor`, such as `num_knowledge_tokens`.

        Raises:
            ValueError: If no token of the vocabulary will do, or the one asked for has no row.
        """
        tokenizer, context_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(context_tokenizer)
        knowledge_token = _reserve_token(tokenizer, vocab_size or len(tokenizer), knowledge_token)
        return cls(tokenizer, context_tokenizer, image_processor, knowledge_token=knowledge_token, **settings)

    @property
    def knowledge_token_id(self) -> int:
        """The id that holds the place of a knowledge vector in `input_ids`."""
        return self.tokenizer.convert_tokens_to_ids(self.knowledge_token)

    @cached_property
    def text_tokenizer(self) -> "TextTokenizer":
        """The LLM's tokenizer for what people write, and for chats that `_render` wrote."""
        return TextTokenizer(self.tokenizer, self.knowledge_token_id)

    @cached_property
    def context_text_tokenizer(self) -> "TextTokenizer":
        """The text encoder's tokenizer for what people write: contexts and captions."""
        return TextTokenizer(self.context_tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` may return, labels aside."""
        context_names = ["context_input_ids", "context_attention_mask"]
        return ["input_ids", "attention_mask", *context_names, "pixel_values", "image_mask"]

    def __call__(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        images: Any = None,
        use_knowledge: bool = True,
        max_length: int | None = None,
        add_generation_prompt: bool | None = None,
        return_labels: bool = False,
        *,
        continue_final_message: bool | None = None,
        padding: bool | str = True,
        truncation: bool | str = True,
        return_tensors: str | None = "pt",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> BatchFeature:
        """Prepares one chat or a batch of chats.

        A message is `{"role": "system" | "user" | "assistant", "content": ...}`; its content is a string or a list of
        parts, `{"type": "text", "text": ...}` (joined by newlines) and `{"type": "image", "image": ...}` (whatever
        [`read_picture`] reads: a PIL image, a path, a URL, ...). A chat shows at most one picture. Whatever a message
        says is text: control tokens typed into it are not read as such. Empty assistant and system messages are left
        out, unless the LLM's template insists on alternating turns.

        A prompt that is too long loses its oldest turns, up to the next user turn; a leading system message and the
        newest turn stay. The context is the dialogue up to the last user turn without system messages, joined by
        newlines; a reply after it is no part of it, for the knowledge must not have read what it helps to say.
        A context that is too long loses its oldest turns, and the beginning of the newest if that alone is too long.

        Args:
            messages: One chat or a list of chats.
            images: One picture, or a list with a picture or None for every chat, instead of image parts.
            use_knowledge: False gives the LLM's plain prompt, token for token; pictures are ignored.
            max_length: Most tokens of a prompt; by default what the LLM's tokenizer says it reads.
            add_generation_prompt: Whether prompts end where the assistant speaks next; by default where they neither
                continue the assistant's message nor `return_labels`.
            return_labels: Whether to supervise the assistant's turns, each with its end-of-turn token. Knowledge that
                stands before the last user turn has read the earlier replies, so these are then not supervised. Nor
                is a turn that opens the dialogue, unless the template marks it by a `{% generation %}` block.
            continue_final_message: Whether prompts end inside the last message, the assistant's, for the LLM to go on
                with; by default they do if it is the assistant's and neither of the two above is asked for.
            padding: True or "longest"; "max_length" (prompts only, contexts are as long as the longest); or False.
            truncation: False leaves a prompt as long as it is. Contexts are always cut: encoders read no more.
            return_tensors: "pt", "np", or None for lists.
            chat_template: A Jinja template, or the name of one of the tokenizer's, in the place of the usual one.
            chat_template_kwargs: Variables of the chat template, such as `{"enable_thinking": False}`.

        Returns:
            Tensors: `input_ids` and `attention_mask` [B, T], padded on the left; `labels` [B, T] if asked for; with
            knowledge `context_input_ids` and `context_attention_mask` [B, C]; and if any chat shows a picture
            `pixel_values` [B, 3, H, W], zeros for the others, and `image_mask` [B]. The attributes `dropped_turns` and
            `dropped_context_turns` (lists of B numbers) say how many turns each prompt and context lost; `continued`
            (B times True or False), which prompts end inside the last message.

        Raises:
            TypeError, ValueError: If a chat, a picture or an argument is not as described above; the error names row
                and message.
        """
        _check_choice("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
        _check_choice("truncation", truncation, (True, False, "longest_first", "do_not_truncate"))
        _check_choice("return_tensors", return_tensors, ("pt", "np", None))
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        variables = self._template_variables(chat_template, chat_template_kwargs or {})
        chats, pictures = self._read_batch(messages, images)
        if not use_knowledge:
            pictures = [None] * len(chats)

        prompts, labels, contexts, continued, dropped_turns, dropped_context_turns = [], [], [], [], [], []
        for row, (turns, picture) in enumerate(zip(chats, pictures, strict=True)):
            slots = self.num_knowledge_tokens * (use_knowledge + (picture is not None))
            try:
                ending = _prompt_ending(turns, add_generation_prompt, continue_final_message, return_labels)
                cut = limit if truncation not in (False, "do_not_truncate") else None
                kept, rendered, ids, dropped = self._fit(turns, slots, cut, **ending, **variables)
                if return_labels:
                    labels.append(self._label(kept, rendered, **ending, **variables))
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
            prompts.append(ids)
            continued.append(ending["continue_final_message"])
            dropped_turns.append(dropped)
            context, dropped = self._encode_context(turns) if use_knowledge else ([], 0)
            contexts.append(context)
            dropped_context_turns.append(dropped)

        length = self._padded_length(padding, limit)
        data = {
            "input_ids": _pad(prompts, self.tokenizer.pad_token_id, "left", length),  # [B, T]
            "attention_mask": _pad([[1] * len(ids) for ids in prompts], 0, "left", length),  # [B, T]
        }
        if return_labels:
            data["labels"] = _pad(labels, IGNORED, "left", length)  # [B, T]
        if use_knowledge:
            side, length = self.context_tokenizer.padding_side, None if length is None else 0
            data["context_input_ids"] = _pad(contexts, self.context_tokenizer.pad_token_id, side, length)  # [B, C]
            data["context_attention_mask"] = _pad([[1] * len(ids) for ids in contexts], 0, side, length)  # [B, C]
        if any(picture is not None for picture in pictures):
            data["pixel_values"], data["image_mask"] = self._encode_pictures(pictures)  # [B, 3, H, W], [B]

        inputs = BatchFeature({name: _convert(value, name, return_tensors) for name, value in data.items()})
        # Attributes and not entries, for `model.generate(**inputs)` must not receive them.
        inputs.dropped_turns, inputs.dropped_context_turns = dropped_turns, dropped_context_turns
        inputs.continued = continued
        if any(dropped_turns) or any(dropped_context_turns):
            logger.warning(
                f"Too long: {sum(dropped_turns)} of the oldest turns were left out of the prompts and "
                f"{sum(dropped_context_turns)} out of the contexts; see dropped_turns and dropped_context_turns."
            )
        return inputs

    def pixel_values(self, pictures: Iterable[Any]) -> torch.Tensor:
        """Pictures as the vision encoder reads them, [B, 3, H, W] in float32.

        Args:
            pictures: At least one of what [`read_picture`] reads.

        Raises:
            TypeError, ValueError: If one cannot be read, or there is no image processor.
        """
        if self.image_processor is None:
            raise ValueError("There are pictures, but this processor was built without image_processor.")
        images = [read_picture(picture) for picture in pictures]
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def decode_behind(self, before: list[int], ids: list[int], **decode_kwargs: Any) -> str:
        """The text of ids that stand behind others; alone they may lose their first space."""
        before_text = self.tokenizer.decode(before, **decode_kwargs)
        return self.tokenizer.decode([*before, *ids], **decode_kwargs)[len(before_text) :]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | torch.Tensor | BatchFeature:
        """What `__call__` makes of a conversation; by default its prompt as text, whole and with the placeholders.

        Args:
            conversation, chat_template, add_generation_prompt, continue_final_message: As for `__call__`.
            tokenize: False gives the text. A text does not tell typed control tokens from the template's own: prefer
                True for what people wrote.
            return_dict: Whether to return all model inputs instead of the `input_ids` alone.
            processor_kwargs: More arguments of `__call__`; without `tokenize` only `images` and `use_knowledge`.
            kwargs: The same, and variables of the chat template.

        Raises:
            TypeError, ValueError: As `__call__`; and for an argument that neither it nor the template knows.
        """
        known = inspect.signature(self.__call__).parameters.keys() - {"chat_template_kwargs"}
        settings = {name: kwargs.pop(name) for name in known & kwargs.keys()} | (processor_kwargs or {})
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if tokenize:
            how = {"chat_template": chat_template, "chat_template_kwargs": kwargs, **ending}
            inputs = self(conversation, **how, **settings)
            return inputs if return_dict else inputs["input_ids"]
        if surplus := settings.keys() - {"images", "use_knowledge"}:
            raise ValueError(f"{', '.join(sorted(surplus))}: without tokenize=True there is only text.")
        texts = self._write(conversation, chat_template, kwargs, **ending, **settings)
        return texts if isinstance(conversation[0], (list, tuple)) else texts[0]

    def locate_tokens(
        self, chat: list[dict[str, Any]], *, continue_final_message: bool = False
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        """A chat's plain prompt as text, its ids, and where in the text the characters of each id are."""
        ((turns,), _), variables = self._read_batch(chat, None), self._template_variables(None, {})
        ending = _prompt_ending(turns, False, continue_final_message, False)
        rendered = self._render(self._spoken(turns, **ending, **variables), **ending, **variables)
        return self.text_tokenizer.spell_out(rendered), *self.text_tokenizer.locate(rendered)

    # ---- the steps of `__call__`, in their order ----

    def _template_variables(self, chat_template: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        """The template and its variables; one that it does not mention would be without effect."""
        template = self.chat_template
        if chat_template is not None:
            template = self.tokenizer.get_chat_template(chat_template)
            if "{" not in template:
                raise ValueError(f"chat_template is neither a Jinja template nor the name of one: {chat_template!r}.")
        for name in variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(f"{name!r} is no argument of the processor and no variable of the chat template.")
        return {"chat_template": template, **self.text_tokenizer.escape(variables)}

    def _write(
        self,
        messages: list,
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any],
        images: Any = None,
        use_knowledge: bool = True,
        **ending: bool,
    ) -> list[str]:
        """The prompts as texts."""
        variables, texts = self._template_variables(chat_template, chat_template_kwargs), []
        for row, (turns, picture) in enumerate(zip(*self._read_batch(messages, images), strict=True)):
            slots = self.num_knowledge_tokens * (1 + (picture is not None)) if use_knowledge else 0
            try:
                how = {**_prompt_ending(turns, *ending.values(), False), **variables}
                rendered = self._render(self._place(self._spoken(turns, **how), slots), **how)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
            texts.append(self.text_tokenizer.spell_out(rendered).replace(PLACEHOLDER, self.knowledge_token))
        return texts

    def _read_batch(self, messages: list, images: Any) -> tuple[list[list[dict[str, Any]]], list[Any]]:
        """All chats as turns of plain text, the system prompt first; and the picture of each, or None."""
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
                raise ValueError(f"row {row}: the chat shows {len(shown)} pictures; at most one is understood.")
            if self.system_prompt is not None and turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": _whole_characters(self.system_prompt)})
            all_turns.append(turns)
            pictures.append(shown[0] if shown else None)
        return all_turns, pictures

    def _fit(
        self, turns: list[dict], slots: int, limit: int | None, **how: Any
    ) -> tuple[list[dict], str, list[int], int]:
        """Leaves out as few of the oldest turns as it can: the turns kept, rendered, their ids, how many went."""
        head = int(turns[0]["role"] == "system")
        # Templates want a dialogue to begin with the user, so a cut is only made in front of a user turn.
        cuts = [head] + [index for index, turn in enumerate(turns) if turn["role"] == "user" and index > head]

        @cache
        def attempt(cut: int) -> tuple[list[dict], str, list[int]]:
            kept = self._place(self._spoken(turns[:head] + turns[cut:], **how), slots)
            rendered = self._render(kept, **how)
            return kept, rendered, self._encode_prompt(rendered, slots)

        def fits(cut: int) -> bool:
            return limit is None or len(attempt(cut)[2]) <= limit

        first = 0 if fits(head) else bisect_left(cuts, True, lo=1, key=fits)
        if first == len(cuts):
            raise ValueError(
                f"the system message, the newest turn and {slots} knowledge placeholders take "
                f"{len(attempt(cuts[-1])[2])} tokens; at most {limit} are allowed. Shorten them or raise max_length."
            )
        return *attempt(cuts[first]), cuts[first] - head

    def _spoken(self, turns: list[dict], **how: Any) -> list[dict]:
        """The turns without empty ones, unless the template refuses the rest, as those that want alternating roles."""
        spoken = [turn for turn in turns if not _is_empty(turn)]
        if len(spoken) < len(turns):
            try:
                self._render(spoken, **how)
            except ValueError:
                return turns
        return spoken

    def _place(self, turns: list[dict], slots: int) -> list[dict]:
        """Writes `slots` placeholders into the message that carries them."""
        if slots == 0:
            return turns
        users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
        if not users:
            raise ValueError("knowledge is drawn from what the user says, but there is no user message.")
        carrier = {"system": 0, "first_user": users[0], "last_user": users[-1]}[self.knowledge_message]
        if self.knowledge_message == "system" and turns[0]["role"] != "system":
            raise ValueError("no system message to carry the knowledge; give one, or set system_prompt.")
        placeholders, content = PLACEHOLDER * slots, turns[carrier]["content"]
        content = placeholders + content if self.knowledge_placement == "start" else content + placeholders
        return [*turns[:carrier], {**turns[carrier], "content": content}, *turns[carrier + 1 :]]

    def _render(self, turns: list[dict], **how: Any) -> str:
        """The chat as the template writes it, with the texts in it escaped; see `TextTokenizer`."""
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
        """The turns with their texts escaped, so that what the template writes of them is known to be theirs.

        A template may act on control tokens in a text, such as the </think> that ends what a reasoning model need not
        read again. It does not see them in an escaped text. So where that makes a difference, the turn's text becomes
        what the template would have written in its place; if that cannot be told, the text is passed as it is.
        """
        escaped = [{**self.text_tokenizer.escape(turn), "role": turn["role"]} for turn in turns]
        if escaped == turns or self._spelt_out(escaped, **how) == self._spelt_out(turns, **how):
            return escaped
        for index, turn in enumerate(turns):
            if turn["content"] != escaped[index]["content"]:
                content = self._as_read([*escaped[:index], turn, *escaped[index + 1 :]], index, **how)
                escaped[index] = {**escaped[index], "content": self.text_tokenizer.escape(content)}
        return escaped

    def _spelt_out(self, turns: list[dict], **how: Any) -> str:
        return self.text_tokenizer.spell_out(self._apply_template(turns, **how))

    def _as_read(self, turns: list[dict], index: int, **how: Any) -> str:
        """What the template writes of the content of a turn; the content itself if that changes the rest."""
        seen = self._spelt_out(turns, **how)
        stand_in = {**turns[index], "content": STAND_IN}
        before, _, behind = self._spelt_out([*turns[:index], stand_in, *turns[index + 1 :]], **how).partition(STAND_IN)
        if seen.startswith(before) and seen.endswith(behind) and len(before + behind) <= len(seen):
            return seen[len(before) : len(seen) - len(behind)]
        return turns[index]["content"]

    def _encode_prompt(self, rendered: str, slots: int) -> list[int]:
        ids = self.text_tokenizer.encode(rendered)
        if slots and ids.count(self.knowledge_token_id) != slots:
            raise ValueError(
                f"{slots} times {self.knowledge_token!r} went into the chat and "
                f"{ids.count(self.knowledge_token_id)} came out of the chat template, which must render it unchanged."
            )
        return ids

    def _label(self, turns: list[dict], rendered: str, **how: Any) -> list[int]:
        """The prompt's ids where the assistant speaks or ends its turn, `IGNORED` elsewhere."""
        marked = GENERATION_BLOCK.search(how["chat_template"])
        replies = (self._marked_replies if marked else self._rendered_replies)(turns, rendered, **how)
        if self.knowledge_message != "last_user":  # the knowledge has read the earlier replies and must not whisper
            final = sum(turn["role"] == "assistant" for turn in turns[_last_user(turns) + 1 :])
            replies = replies[len(replies) - final :]
        ids, offsets = self.text_tokenizer.locate(rendered)
        starts, ends = zip(*offsets, strict=True)
        labels = [IGNORED] * len(ids)
        for start, stop in replies:
            tokens = slice(bisect_right(ends, start), bisect_left(starts, stop))  # all that touch the reply
            labels[tokens] = ids[tokens]
        return labels

    def _marked_replies(self, turns: list[dict], text: str, **how: Any) -> list[tuple[int, int]]:
        """Where the template's `{% generation %}` blocks are in the text, each up to the end-of-turn token behind it.

        Not by the tokenizer's mask of assistant tokens: that loses the last bytes of a reply that ends in an emoji.
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
            behind = text[stop:].lstrip()
            end_of_turn = next((token for token in special if behind.startswith(token)), None)
            if end_of_turn and not text[:stop].endswith(special):
                stop = len(text) - len(behind) + len(end_of_turn)
            replies.append((start, stop))
        if len(replies) != (said := sum(turn["role"] == "assistant" for turn in turns)):
            raise ValueError(
                f"the chat template's {{% generation %}} blocks mark {len(replies)} of {said} replies. They must "
                "enclose every one."
            )
        return replies

    def _rendered_replies(self, turns: list[dict], text: str, **how: Any) -> list[tuple[int, int]]:
        """What each reply adds to the text of the prompt that asks for it; nothing asks for one that opens a chat."""
        replies = []
        for index in (i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"):
            asked = self._render(turns[:index], **{**how, "add_generation_prompt": True})
            answered = self._render(turns[: index + 1], **{**how, "add_generation_prompt": False})
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise ValueError(
                    f"the chat template renders the reply {turns[index]['content'][:40]!r} differently depending on "
                    "what is around it, so labels cannot tell its tokens. Pass chat_template= with {% generation %} "
                    "and {% endgeneration %} around what the assistant says."
                )
            replies.append((len(asked), len(answered.rstrip())))  # without the template's newline behind the turn
        return replies

    def _encode_context(self, turns: list[dict]) -> tuple[list[int], int]:
        """The ids of as many of the newest turns as the text encoder reads, and how many older ones there are."""
        dialogue = [turn for turn in turns[: _last_user(turns) + 1] if turn["role"] != "system"]
        limit = self.max_context_length or self.context_tokenizer.model_max_length

        def encode(first: int) -> list[int]:
            spoken = [turn["content"] for turn in dialogue[first:] if not _is_empty(turn)]
            return self.context_text_tokenizer("\n".join(spoken))["input_ids"]

        if len(ids := encode(0)) <= limit:  # as most do
            return ids, 0
        ids = encode_truncated(self.context_text_tokenizer, dialogue[-1]["content"], limit)
        for older in range(len(dialogue) - 1, 0, -1):
            if len(longer := encode(older - 1)) > limit:
                return ids, older
            ids = longer
        return ids, 0

    def _padded_length(self, padding: bool | str, limit: int) -> int | None:
        """To how many tokens prompts are padded: 0 for as many as the longest has, None for not at all."""
        if padding == "max_length" and limit > LARGE_INTEGER:
            raise ValueError('padding="max_length" needs max_length: the tokenizer does not say what the LLM reads.')
        return {"max_length": limit, "do_not_pad": None, False: None}.get(padding, 0)

    def _encode_pictures(self, pictures: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W], zeros where there is no picture, and the mask [B] of the rows with one."""
        loaded = [_load_picture(picture, row) for row, picture in enumerate(pictures) if picture is not None]
        pixels = self.pixel_values(loaded)
        image_mask = torch.tensor([picture is not None for picture in pictures])
        pixel_values = pixels.new_zeros(len(pictures), *pixels.shape[1:])
        pixel_values[image_mask] = pixels
        return pixel_values, image_mask

    # ---- saving and loading ----

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are always there; `image_processor` may be None and is saved among the settings."""
        return ["tokenizer", "context_tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """The settings, and the sizes of the vocabularies, by which `from_pretrained` recognises the tokenizers."""
        return {**super().to_dict(), "vocabulary_sizes": [len(self.tokenizer), len(self.context_tokenizer)]}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """Writes tokenizers, chat template and settings.

        The folder's processor is replaced as a whole or not at all, wherever the process is killed; see
        atomic_saving.py.

        Returns:
            The path of the settings, as transformers does.

        Raises:
            ValueError: For `push_to_hub=True`; there is `push_to_hub`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call push_to_hub(repo_id) instead.")
        with replace_files(save_directory, "processor_config.json") as folder:
            paths = super().save_pretrained(folder, **kwargs)
        return [os.path.join(save_directory, os.path.basename(path)) for path in paths]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "VikdfProcessor":
        """Loads what `save_pretrained` wrote; the context tokenizer has a folder of its own, `context_tokenizer/`.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            kwargs: Where to look (`revision`, `cache_dir`, `local_files_only`, ...), and settings to override.

        Raises:
            OSError: If there is no VIKDF processor, or one of its files is missing.
            TypeError: If there is no such setting.
            ValueError: If a tokenizer is not the one that was saved.
        """
        path = pretrained_model_name_or_path
        folder = os.path.join(path, kwargs.get("subfolder", ""))
        if os.path.isdir(folder) and (aside := saved_in(folder, "processor_config.json")):
            kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), aside)
        settings, overrides = cls.get_processor_dict(path, **kwargs)
        if "_from_pipeline" not in kwargs:  # a pipeline passes the model's arguments to all parts
            _check_settings(overrides, inspect.signature(cls.__init__).parameters)
        if "vocabulary_sizes" not in settings:
            raise OSError(f"{path} holds no VIKDF processor; build one with VikdfProcessor.from_backbones.")
        where = {key: value for key, value in kwargs.items() if key not in overrides}
        root = where.pop("subfolder", "")
        # Tokenizers are given a configuration so that AutoTokenizer looks for none: the one in the root is the whole
        # model's, and `context_tokenizer/` has none. Their own files say which class they are.
        tokenizer, context_tokenizer = (
            AutoTokenizer.from_pretrained(path, subfolder=folder, config=PreTrainedConfig(), **where)
            for folder in (root, f"{root}/context_tokenizer".lstrip("/"))
        )
        sizes, saved_sizes = [len(tokenizer), len(context_tokenizer)], settings.pop("vocabulary_sizes")
        if sizes != saved_sizes:
            raise ValueError(
                f"The tokenizers in {path} (the LLM's, the text encoder's) have {sizes} tokens, but those that were "
                f"saved had {saved_sizes}. Load an unchanged copy, or save the processor again."
            )
        image_processor = None
        if settings.pop("image_processor") is not None:
            image_processor = AutoImageProcessor.from_pretrained(path, subfolder=root, **where)
        return cls.from_args_and_dict([tokenizer, context_tokenizer, image_processor], settings, **overrides)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Commits the processor to a repository of the Hub, in one step; see `sharing.push_to_hub`.

        Args:
            repo_id: "org/name"; created if it does not exist.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`.

        Raises:
            OSError: If the Hub refuses or breaks off; the repository is then as it was.
        """
        from .sharing import push_to_hub  # here, for it imports this module

        return push_to_hub(repo_id, processor=self, **kwargs)


class TextTokenizer:
    """A copy of a tokenizer to which what people write is nothing but text.

    It finds no control tokens in a text. Those of a chat are the template's: for each the copy knows a *mark*, an
    added token that nobody can guess. `encode` puts marks where the template wrote control tokens, and gives back the
    ids of these. Template and texts are read in one go, so tokens are as ever where nobody typed control tokens.

    In a *rendered* chat the texts are escaped: the characters that control tokens begin and end with are replaced by
    some that no text has. So every control token in it is the template's. `PLACEHOLDER` stands for knowledge.

    Args:
        tokenizer: It stays as it is.
        placeholder_id: What `PLACEHOLDER` means, one of its control tokens; only with it chats can be encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placeholder_id: int | None = None):
        self.truncation_side = tokenizer.truncation_side
        added = tokenizer.added_tokens_decoder.items()
        controls = {id_: token for id_, token in added if token.special or not WORDS.fullmatch(token.content)}
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.split_special_tokens = True  # for good: what is set for a call is set for all threads
        ordinary = [AddedToken(token.content, special=True) for token in controls.values() if not token.special]
        self._tokenizer.add_tokens(ordinary, special_tokens=True)
        self._spellings = self._find_spellings(controls)

        edges = dict.fromkeys(edge for token in controls.values() for edge in _edges(token.content))
        self._escapes = {ord(edge): chr(FIRST_ESCAPE + number) for number, edge in enumerate(edges)}
        self._written = {escape: chr(edge) for edge, escape in self._escapes.items()}  # in a chat -> for the tokenizer
        self._unescapes = {ord(escape): edge for escape, edge in self._written.items()}
        self._marked: dict[int, int] = {}  # what a mark stands for
        self._surplus: dict[int, int] = {}  # by how much it is longer than that
        if placeholder_id is not None:
            self._add_marks(controls, placeholder_id)
        longest_first = sorted(self._written, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _find_spellings(self, controls: dict[int, AddedToken]) -> dict[int, tuple[int, ...]]:
        """Control tokens that the vocabulary leads to from ordinary characters (T5's </s>), spelt out."""
        if not self._tokenizer.is_fast:  # those written in Python lead to none
            return {}
        spellings = {}
        for id_, token in controls.items():
            ids = self._tokenizer.convert_tokens_to_ids(list(token.content))
            spellings[id_] = tuple(each for each in ids if each is not None and each not in controls)
        return spellings

    def _add_marks(self, controls: dict[int, AddedToken], placeholder_id: int) -> None:
        stand_for = [*((token.content, id_) for id_, token in controls.items()), (PLACEHOLDER, placeholder_id)]
        secret = secrets.token_hex(8)
        marks = [f"{secret}{number:04x}" for number in range(len(stand_for))]
        flags = ("lstrip", "rstrip", "normalized")
        self._tokenizer.add_tokens(
            [
                AddedToken(mark, special=False, **{flag: getattr(controls[id_], flag) for flag in flags})
                for mark, (_, id_) in zip(marks, stand_for, strict=True)
            ]
        )
        for mark, (content, id_) in zip(marks, stand_for, strict=True):
            ids = self._tokenizer(mark, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:  # else a normalizer is in the way, and of the control token as well
                self._written[content] = mark
                self._marked[ids[0]] = id_
                self._surplus[ids[0]] = len(mark) - len(content)

    def __deepcopy__(self, memo: dict) -> "TextTokenizer":
        return self  # nothing of it changes

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **kwargs: Any) -> dict[str, list]:
        """Tokenizes what people wrote.

        Args:
            text: A text, or a list of texts.
            kwargs: For the tokenizer: `return_offsets_mapping`.

        Returns:
            `input_ids`, and `offset_mapping` if asked for: lists, or lists of them for a list of texts.
        """
        texts = [_whole_characters(each) for each in ([text] if isinstance(text, str) else text)]
        kwargs |= {"add_special_tokens": add_special_tokens, "verbose": False}
        encoding = self._tokenizer(texts, **kwargs)
        result = {name: encoding[name] for name in ("input_ids", "offset_mapping") if name in encoding}
        framing = self._tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
        for row, ids in enumerate(encoding["input_ids"]):
            if self._count_controls(texts[row], ids) > framing:
                spelt = self._spell(texts[row], ids, add_special_tokens)
                for name, values in result.items():
                    copied = [[value] * len(each) for value, each in zip(values[row], spelt, strict=True)]
                    values[row] = list(itertools.chain(*(spelt if name == "input_ids" else copied)))
        return {name: values[0] for name, values in result.items()} if isinstance(text, str) else result

    def _count_controls(self, text: str, ids: list[int]) -> int:
        """How many control tokens there are, unknown characters aside."""
        found = self._spellings.keys() & set(ids)
        if self._tokenizer.unk_token_id in found and self._tokenizer.unk_token not in text:
            found.remove(self._tokenizer.unk_token_id)
        return sum(map(ids.count, found))

    def _spell(self, text: str, ids: list[int], add_special_tokens: bool) -> list[tuple[int, ...]]:
        """The tokens of a text, its control tokens spelt out; those around it and unknown characters stay."""
        wanted = {"return_special_tokens_mask": True, "return_offsets_mapping": True, "verbose": False}
        encoding = self._tokenizer(text, add_special_tokens=add_special_tokens, **wanted)
        unknown, unknown_id = self._tokenizer.unk_token, self._tokenizer.unk_token_id
        spelt = []
        places = zip(ids, encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
        for id_, framing, (start, stop) in places:
            stays = framing or (id_ == unknown_id and text[start:stop].strip() != unknown)
            spelt.append((id_,) if stays else self._spellings.get(id_, (id_,)))
        return spelt

    # ---- rendered chats ----

    def escape(self, value: Any) -> Any:
        """Something for the chat template, in which no text can be taken for a control token."""
        return _map_strings(lambda text: text.translate(self._escapes), value)

    def spell_out(self, rendered: str) -> str:
        """A rendered chat without escapes, for people to read."""
        return rendered.translate(self._unescapes)

    def encode(self, rendered: str) -> list[int]:
        """The ids of a rendered chat; only the template and `PLACEHOLDER` give control tokens."""
        ids = self(self._with_marks(rendered), add_special_tokens=False)["input_ids"]
        return [self._marked.get(id_, id_) for id_ in ids]

    def locate(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and from where to where in the rendered chat the characters of each token are."""
        encoding = self(self._with_marks(rendered), add_special_tokens=False, return_offsets_mapping=True)
        spans, shift = [], 0
        for id_, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            surplus = self._surplus.get(id_, 0)
            spans.append((start - shift, stop - shift - surplus))
            shift += surplus
        return [self._marked.get(id_, id_) for id_ in encoding["input_ids"]], spans

    def _with_marks(self, rendered: str) -> str:
        return self._pattern.sub(lambda match: self._written[match[0]], rendered)


# ---- helpers that need no processor ----


def _edges(control: str) -> tuple[str, str]:
    """The first and the last punctuation mark of a control token; without them it would be another."""
    marks = [character for character in control if not character.isalnum() and not character.isspace()] or control
    return marks[0], marks[-1]


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")


def _check_settings(given: dict[str, Any], known: Iterable[str]) -> None:
    known = {*known, "trust_remote_code", "code_revision", "return_unused_kwargs"} - {"self"}
    for name in given.keys() - known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else f" There are {', '.join(sorted(known))}."
        raise TypeError(f"{name!r} is no setting of a VIKDF processor, nor a place to look for it.{hint}")


def _read_chat(chat: Any, row: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with their contents as plain text, and the pictures that were among them."""
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"row {row}: a chat must be a list of at least one message, not {chat!r}.")
    turns, pictures = [], []
    for index, message in enumerate(chat):
        where = f"row {row}, message {index}"
        if not isinstance(message, dict):
            raise TypeError(f"{where}: a message must be a dictionary with role and content, not {message!r}.")
        if missing := [key for key in ("role", "content") if key not in message]:
            raise ValueError(f"{where}: {' and '.join(missing)} missing; a message has a role and a content.")
        _check_choice(f"{where}: role", message["role"], ("system", "user", "assistant"))
        text, shown = _read_content(message["content"], where)
        if message["role"] == "user" and not text.strip() and not shown:
            raise ValueError(f"{where}: the content is empty; give it some text or leave the message out.")
        turns.append(_map_strings(_whole_characters, {**message, "content": text}))
        pictures += shown
    if all(map(_is_empty, turns)):
        raise ValueError(f"row {row}: all messages of the chat are empty.")
    return turns[_is_empty(turns[0]) and turns[0]["role"] == "system" :], pictures


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


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether there is nothing in a turn; the user's may be a picture."""
    return turn["role"] != "user" and not turn["content"].strip()


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    """Nested lists and dictionaries with a function of every string in them; keys stay."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_strings(function, each) for key, each in value.items()}
    return [_map_strings(function, each) for each in value] if isinstance(value, (list, tuple)) else value


def _whole_characters(text: str) -> str:
    """A text with U+FFFD for half a surrogate pair, which is no character: tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _prompt_ending(
    turns: list[dict], add_generation_prompt: bool | None, continue_final_message: bool | None, return_labels: bool
) -> dict[str, bool]:
    """How the chat template ends the prompt."""
    replies = [turn for turn in turns if turn["role"] == "assistant"]
    if return_labels and not replies:
        raise ValueError("return_labels=True needs an assistant message to learn, but there is none.")
    if return_labels and (_is_empty(turns[-1]) or all(map(_is_empty, replies))):
        raise ValueError("return_labels=True needs a reply to learn, but the assistant's message is empty.")
    said = [turn["role"] for turn in turns if not _is_empty(turn)]
    if continue_final_message is None:
        continue_final_message = said[-1] == "assistant" and not return_labels and add_generation_prompt is None
    if add_generation_prompt is None:
        add_generation_prompt = not (continue_final_message or return_labels)
    if continue_final_message and said[-1] != "assistant":
        raise ValueError(
            f"continue_final_message continues what the assistant said, but the last message is the {said[-1]}'s."
        )
    if continue_final_message and (add_generation_prompt or return_labels):
        raise ValueError("continue_final_message excludes add_generation_prompt and return_labels: choose one.")
    return {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}


def read_picture(picture: bytes | str | os.PathLike | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture, the same way wherever it comes from: upright, RGB, what is transparent on white, 16 bits as 8.

    Args:
        picture: The content of a file, its path, its `http(s)://` or `data:` URL, or a PIL image, which is read as its
            file would be. Of an animation the first frame counts, of a PIL image the one that it is at.
        max_pixels: Most pixels, width times height; the header tells them before anything is decoded.

    Returns:
        A new RGB image.

    Raises:
        TypeError: If it is none of these: an array, say, has to go through `PIL.Image.fromarray`.
        ValueError: If there is nothing to read, or it is damaged, truncated, without pixels, larger than allowed, in
            none of `PICTURE_FORMATS`, or of floating-point values, which have no agreed white.
    """
    if not isinstance(picture, Image.Image):
        picture = _open_picture(_read_content_of(picture), max_pixels)
    width, height = picture.size
    if width * height == 0:
        raise ValueError(f"the picture has no pixels, its size is {width} x {height}.")
    if width * height > max_pixels:
        raise ValueError(f"the picture has {width} x {height} pixels; at most {max_pixels} are read.")
    try:
        upright = ImageOps.exif_transpose(picture)  # which decodes it
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ValueError(f"cannot read the picture: it is no whole {_formats()} picture ({error}).") from error
    try:
        return _to_rgb(upright)
    except ValueError as error:
        raise ValueError(f"cannot read the picture: {error}.") from error


def _open_picture(content: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture has too many pixels; at most {max_pixels} are read ({error}).") from error
    except Exception as error:  # whose message would only name a BytesIO
        raise ValueError(f"cannot read the picture: it is no whole {_formats()} picture.") from error


def _formats() -> str:
    return f"{', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I;16N"):  # floating-point values have no agreed white, and Pillow converts I;16N wrongly
        raise ValueError(f"values of mode {image.mode} cannot be scaled, make it 8 bits a channel, mode L or RGB")
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:  # under which there may be anything, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, which Pillow would make white, as one of 8; its transparent value becomes alpha."""
    transparent, image = image.info.get("transparency"), image.convert("I")
    if image.getextrema()[0] < 0 or image.getextrema()[1] > 0xFFFF:
        raise ValueError(f"its values {image.getextrema()} exceed 16 bits, 0 to 65535")
    grey = image.point(lambda value: value / 256).convert("L")
    if transparent is not None:
        above, below = (image.point(lambda value, s=s: value * s - transparent * s).convert("L") for s in (1, -1))
        grey.putalpha(ImageChops.lighter(above, below).point(lambda distance: 255 if distance else 0))
    return grey


def _read_content_of(picture: Any) -> bytes:
    """The content of a picture's file: given, at a URL, or on the disk."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, (str, os.PathLike)):
        raise TypeError(
            "cannot read the picture: expected the content of a file, a path, an http(s):// or data: URL, or a PIL "
            f"image, not {type(picture).__name__}. PIL.Image.fromarray makes an image of an array."
        )
    scheme = re.match(r"(data(?=:)|[a-z][a-z0-9+.-]*(?=://))?", str(picture), re.IGNORECASE)[0].lower()
    try:
        if scheme == "data":
            return _decode_data_url(picture)
        if scheme in ("http", "https"):
            return _fetch(picture)
        if scheme:
            raise ValueError(f"only http://, https:// and data: URLs are read, no {scheme}:// ones")
        return read_file(picture, MAX_PICTURE_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"cannot read the picture: {error}.") from error


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger than `max_bytes`, or a folder, a device or a pipe, which may never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)} is no regular file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{os.fspath(path)} has more than {max_bytes} bytes")
    return content


def _decode_data_url(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/[^,]*;base64", head, re.IGNORECASE):
        raise ValueError(f"its data: URL begins with {url[:40]!r}, not with data:image/...;base64,")
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(data).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"its data: URL holds no base64 ({error})") from error


def _fetch(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # the usual one would follow a redirection to ftp://
    handlers = ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect")
    for handler in (*(f"{name}Handler" for name in handlers), "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, handler)())
    request = urllib.request.Request(url, headers={"User-Agent": "modeling_vikdf"})  # some servers refuse urllib's own
    deadline, content = time.monotonic() + URL_TIMEOUT, bytearray()
    with opener.open(request, timeout=URL_TIMEOUT) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if len(content) > MAX_PICTURE_BYTES:
                raise ValueError(f"{url} has more than {MAX_PICTURE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not arrive within {URL_TIMEOUT:g} seconds")
        if response.length:
            raise ConnectionError(f"{url} broke off {response.length} bytes before its end")
    return bytes(content)


def _load_picture(picture: Any, row: int) -> Image.Image:
    try:
        return read_picture(picture)
    except (TypeError, ValueError) as error:
        given = f" It was given as {str(picture)[:80]!r}." if isinstance(picture, (str, os.PathLike)) else ""
        raise ValueError(f"row {row}: {error}{given}") from error


def _last_user(turns: list[dict]) -> int:
    return max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)


def encode_truncated(tokenizer: "PreTrainedTokenizerBase | TextTokenizer", text: str, limit: int) -> list[int]:
    """
    The ids of a text, special tokens included, cut to `limit` of them on the tokenizer's truncation side.

    Not by `truncation=True`: that changes a state of the tokenizer which all threads share, and may cut the text of
    another one.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return ids
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    before, behind = ids[:start], ids[start + len(bare) :]
    excess = len(ids) - limit
    return before + (bare[excess:] if tokenizer.truncation_side == "left" else bare[:-excess]) + behind


def pad(rows: list[torch.Tensor], value: float = 0, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths [T, ...] as [B, longest, ...], and their mask [B, longest], int64."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    return pad_sequence(rows, True, value, side), mask


def _pad(rows: list[list[int]], value: int, side: str, length: int | None) -> torch.Tensor | list[list[int]]:
    """Rows of different lengths as one tensor [B, the longest or `length` if that is more]; as they are with None."""
    if length is None:
        return rows
    missing = [max(length, *map(len, rows), 0) - len(row) for row in rows]
    pads = [[value] * count for count in missing]
    return torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)])


def _convert(value: torch.Tensor | list[list[int]], name: str, return_tensors: str | None) -> Any:
    if return_tensors is None:
        return value.tolist() if isinstance(value, torch.Tensor) else value
    if isinstance(value, list):
        if len({len(row) for row in value}) > 1:
            raise ValueError(f"{name}: rows of different lengths need padding=True, or return_tensors=None.")
        value = torch.tensor(value)
    return value.numpy() if return_tensors == "np" else value


def _reserve_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int, wanted: str | None) -> str:
    """Makes one token the special token that holds the place of knowledge vectors, and returns its name."""
    wanted = wanted or (KNOWLEDGE_TOKEN if len(tokenizer) < vocab_size else _spare_token(tokenizer, vocab_size))
    tokenizer.add_tokens([AddedToken(wanted, normalized=False, special=True)], special_tokens=True)
    if (id_ := tokenizer.convert_tokens_to_ids(wanted)) >= vocab_size:
        raise ValueError(
            f"knowledge_token {wanted!r} would have the id {id_}, but the LLM's embedding has {vocab_size} rows and "
            "is not resized. Name a special token of its vocabulary that no text uses."
        )
    return wanted


def _spare_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """A token of the vocabulary that neither texts nor the chat template use."""
    busy = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        free = id_ < vocab_size and id_ not in busy and token not in str(tokenizer.chat_template)
        if free and (token == KNOWLEDGE_TOKEN or SPARE_TOKEN.fullmatch(token)):
            return token
    # The unknown token will do if bytes stand in for unknown characters, so that no text contains it.
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in busy and unknown not in tokenizer("\U0001242b")["input_ids"]:
        return tokenizer.unk_token
    raise ValueError(
        f"The LLM's embedding has no free row beyond its {vocab_size} tokens, and none of these is kept in reserve. "
        "Name a special token that no text uses: knowledge_token=."
    )
