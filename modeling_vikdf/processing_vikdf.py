"""The processor: chats and pictures become the tensors a VIKDF model reads.

    messages -> the dialogue as text                         -> context tokenizer -> context_input_ids (text encoder)
             -> the LLM's chat template, with n placeholders -> tokenizer         -> input_ids         (LLM)
    pictures ------------------------------------------------> image processor    -> pixel_values      (vision encoder)

This module knows which token is the knowledge placeholder, where placeholders go and what is dropped from a chat that
is too long. It knows no model: models find the placeholders by `knowledge_token_id`.

User text is plain text: control tokens (`<|im_start|>`, `[SEP]`, the placeholder) come only from the chat template and
this module; typed into a message they are ordinary characters. See `TextTokenizer`.
"""

import copy
import difflib
import inspect
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers' own may need torchvision
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from .atomic_saving import replace_files, saved_in
from .chats_vikdf import ChatTemplate, check_choice, is_empty, last_user, place_knowledge, prompt_ending, read_batch
from .pictures_vikdf import MAX_PICTURE_BYTES, MAX_PIXELS, PICTURE_FORMATS, load_picture, read_file, read_picture
from .sharing import push_to_hub
from .text_vikdf import KNOWLEDGE_TOKEN, PLACEHOLDER, TextTokenizer, encode_truncated, reserve_token


logger = logging.get_logger(__name__)

IGNORED = -100  # the label that the loss ignores


class _Row(NamedTuple):
    """One chat of a batch, encoded."""

    ids: list[int]
    labels: list[int]
    continued: bool
    dropped_turns: int
    context_ids: list[int]
    dropped_context_turns: int


class VikdfProcessor(ProcessorMixin):
    """Turns chats into model inputs: prompts with knowledge placeholders, contexts for the text encoder, pictures.

    The processor changes its tokenizers: prompts are padded on the left, contexts truncated on the left, and a
    tokenizer without padding token pads with its end-of-sequence token.

    Args:
        tokenizer: The LLM's tokenizer; it must know `knowledge_token` as one special token (see `from_backbones`).
        context_tokenizer: The text encoder's tokenizer.
        image_processor: The vision encoder's image processor; without one, pictures are refused.
        chat_template: Replaces the chat template of the LLM's tokenizer; or name -> template, "default" being used.
        num_knowledge_tokens: n, placeholders for the text's knowledge; a chat with a picture has n more for it.
        knowledge_token: The placeholder of a knowledge vector, a special token; typed into a message it is plain text.
        knowledge_message: The message that carries the placeholders: "system", "first_user" or "last_user".
        knowledge_placement: Their position in its content: "start" or "end".
        system_prompt: The system message of chats without one.
        max_context_length: Maximum number of tokens of a context; by default the context tokenizer's own.

    Raises:
        ValueError: If a setting is invalid, or `tokenizer` is not fast or lacks a chat template or `knowledge_token`.
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
        check_choice("knowledge_message", knowledge_message, ("system", "first_user", "last_user"))
        check_choice("knowledge_placement", knowledge_placement, ("start", "end"))
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
            raise ValueError(f"{type(tokenizer).__name__} is written in Python; pass the LLM's fast tokenizer.")
        for part in (tokenizer, context_tokenizer):
            if part.pad_token is None:
                part.pad_token = part.eos_token
        tokenizer.padding_side = "left"  # replies grow on the right
        context_tokenizer.truncation_side = "left"  # the newest words matter most for the reply

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
        """Builds a processor from the backbones' own parts; the tokenizers are copied, not changed.

        The LLM is frozen and its embedding never resized, so the placeholder must be one of its rows: by default a new
        token in a free row, otherwise one that the vocabulary reserves, otherwise the unknown token.

        Args:
            tokenizer: As for `VikdfProcessor`.
            context_tokenizer: As for `VikdfProcessor`.
            image_processor: As for `VikdfProcessor`.
            vocab_size: Rows of the LLM's embedding; by default its tokenizer's number of tokens.
            knowledge_token: The placeholder; it is added if it is unknown and a row is free.
            settings: Further settings of `VikdfProcessor`, such as `num_knowledge_tokens`.

        Raises:
            ValueError: If no token of the vocabulary is suitable, or `knowledge_token` has no row.
        """
        tokenizer, context_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(context_tokenizer)
        knowledge_token = reserve_token(tokenizer, vocab_size or len(tokenizer), knowledge_token)
        return cls(tokenizer, context_tokenizer, image_processor, knowledge_token=knowledge_token, **settings)

    @property
    def knowledge_token_id(self) -> int:
        """The id of the placeholder in `input_ids`."""
        return self.tokenizer.convert_tokens_to_ids(self.knowledge_token)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The LLM's tokenizer for user text, and for chats rendered by `template`."""
        return TextTokenizer(self.tokenizer, self.knowledge_token_id)

    @cached_property
    def context_text_tokenizer(self) -> TextTokenizer:
        """The text encoder's tokenizer for user text: contexts and captions."""
        return TextTokenizer(self.context_tokenizer)

    @property
    def template(self) -> ChatTemplate:
        """The LLM's chat template, which keeps user text apart from control tokens."""
        return ChatTemplate(self.tokenizer, self.text_tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` may return, except labels."""
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
        parts, `{"type": "text", "text": ...}` (joined by newlines) and `{"type": "image", "image": ...}` (anything
        that [`read_picture`] reads: a PIL image, a path, a URL, ...). A chat shows at most one picture. Control tokens
        typed into a message are plain text. Empty assistant and system messages are dropped, unless the LLM's template
        requires alternating roles.

        A prompt that is too long loses its oldest turns, up to the next user turn; a leading system message and the
        newest turn are kept. The context is the dialogue up to the last user turn without system messages, joined by
        newlines; a reply after it is excluded, because knowledge must not depend on the reply it helps to predict.
        A context that is too long loses its oldest turns, and the beginning of the newest if that alone is too long.

        Args:
            messages: One chat or a list of chats.
            images: One picture, or a list with a picture or None for every chat, instead of image parts.
            use_knowledge: False gives the LLM's plain prompt, token for token; pictures are ignored.
            max_length: Maximum number of tokens of a prompt; by default the LLM's tokenizer's own.
            add_generation_prompt: Whether prompts end where the assistant speaks next; by default unless they continue
                the assistant's message or `return_labels` is set.
            return_labels: Whether to supervise the assistant's turns, each with its end-of-turn token. Knowledge
                placed before the last user turn depends on earlier replies, so these are then not supervised. Nor is a
                turn that opens the dialogue, unless the template marks it by a `{% generation %}` block.
            continue_final_message: Whether prompts end inside the last message, the assistant's, for the LLM to
                continue; by default if it is the assistant's and neither of the two above is set.
            padding: True or "longest"; "max_length" (prompts only; contexts are padded to the longest); or False.
            truncation: False never shortens prompts. Contexts are always truncated to the text encoder's limit.
            return_tensors: "pt", "np", or None for lists.
            chat_template: A Jinja template, or the name of one of the tokenizer's, instead of the default.
            chat_template_kwargs: Variables of the chat template, such as `{"enable_thinking": False}`.

        Returns:
            int64 `input_ids` and `attention_mask` [B, T], padded on the left; `labels` [B, T] with `return_labels`;
            with knowledge `context_input_ids` and `context_attention_mask` [B, C]; and if any chat shows a picture,
            float32 `pixel_values` [B, 3, H, W], zeros for the others, and bool `image_mask` [B]. The attributes
            `dropped_turns` and `dropped_context_turns` (lists of B integers) count the turns that each prompt and
            context lost; `continued` (B booleans) tells which prompts end inside the last message.

        Raises:
            TypeError, ValueError: If a chat, a picture or an argument is malformed; the error names row and message.
        """
        check_choice("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
        check_choice("truncation", truncation, (True, False, "longest_first", "do_not_truncate"))
        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        variables = self.template.variables(self.chat_template, chat_template, chat_template_kwargs or {})
        chats, pictures = read_batch(messages, images, self.system_prompt)
        if not use_knowledge:
            pictures = [None] * len(chats)
        rows, cut = [], limit if truncation not in (False, "do_not_truncate") else None
        for row, (turns, picture) in enumerate(zip(chats, pictures, strict=True)):
            slots = self.num_knowledge_tokens * (use_knowledge + (picture is not None))
            context = self._encode_context(turns) if use_knowledge else ([], 0)
            try:
                ending = prompt_ending(turns, add_generation_prompt, continue_final_message, return_labels)
                prompt = self._encode_turns(turns, slots, return_labels, cut, **ending, **variables)
                rows.append(_Row(*prompt, *context))
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
        data = self._collate(rows, pictures, use_knowledge, return_labels, self._padded_length(padding, limit))
        inputs = BatchFeature({name: _convert(value, name, return_tensors) for name, value in data.items()})
        return _report_dropped_turns(inputs, rows)

    def pixel_values(self, pictures: Iterable[Any]) -> torch.Tensor:
        """Preprocessed pictures for the vision encoder, [B, 3, H, W], float32.

        Args:
            pictures: One or more of anything that [`read_picture`] reads.

        Raises:
            TypeError, ValueError: If one cannot be read, or there is no image processor.
        """
        if self.image_processor is None:
            raise ValueError("There are pictures, but this processor was built without image_processor.")
        images = [read_picture(picture) for picture in pictures]
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def decode_behind(self, before: list[int], ids: list[int], **decode_kwargs: Any) -> str:
        """The text of `ids` decoded after the ids `before`; decoded alone they may lose their leading space."""
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
        """The prompt or the model inputs of a conversation; by default the untruncated prompt with placeholders.

        Args:
            conversation: One chat or a list of chats, as for `__call__`.
            chat_template: As for `__call__`.
            add_generation_prompt: As for `__call__`.
            continue_final_message: As for `__call__`.
            tokenize: Whether to return ids; in text, control tokens typed by users look like the template's own.
            return_dict: Whether to return all model inputs instead of only the `input_ids`.
            processor_kwargs: Further arguments of `__call__`; without `tokenize` only `images` and `use_knowledge`.
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
        """A chat's prompt without knowledge: its text, its ids, and the (start, stop) of each id in the text."""
        (turns,), _ = read_batch(chat, None, self.system_prompt)
        how = prompt_ending(turns, False, continue_final_message, False)
        _, rendered = self._render(turns, 0, **how, **self.template.variables(self.chat_template, None, {}))
        return self.text_tokenizer.spell_out(rendered), *self.text_tokenizer.locate(rendered)

    # ---- the steps of `__call__`, in their order ----

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
        variables, texts = self.template.variables(self.chat_template, chat_template, chat_template_kwargs), []
        for row, (turns, picture) in enumerate(zip(*read_batch(messages, images, self.system_prompt), strict=True)):
            slots = self.num_knowledge_tokens * (1 + (picture is not None)) if use_knowledge else 0
            try:
                _, rendered = self._render(turns, slots, **prompt_ending(turns, *ending.values(), False), **variables)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
            texts.append(self.text_tokenizer.spell_out(rendered).replace(PLACEHOLDER, self.knowledge_token))
        return texts

    def _render(self, turns: list[dict], slots: int, **how: Any) -> tuple[list[dict], str]:
        """The non-empty turns with `slots` placeholders in one of them, and the rendered chat."""
        spoken = self.template.spoken(turns, **how)
        spoken = place_knowledge(spoken, slots, self.knowledge_message, self.knowledge_placement)
        return spoken, self.template.render(spoken, **how)

    def _encode_turns(
        self, turns: list[dict], slots: int, with_labels: bool, limit: int | None, **how: Any
    ) -> tuple[list[int], list[int], bool, int]:
        """Ids; labels, or []; whether the prompt continues the last message; and the number of dropped turns."""
        kept, rendered, ids, dropped = self._fit(turns, slots, limit, **how)
        labels = self._label(kept, rendered, **how) if with_labels else []
        return ids, labels, how["continue_final_message"], dropped

    def _fit(
        self, turns: list[dict], slots: int, limit: int | None, **how: Any
    ) -> tuple[list[dict], str, list[int], int]:
        """Drops as few of the oldest turns as possible: kept turns, rendered chat, ids, number of dropped turns."""
        head = int(turns[0]["role"] == "system")
        # Templates expect a dialogue to begin with the user, so chats are only cut before a user turn.
        cuts = [head] + [index for index, turn in enumerate(turns) if turn["role"] == "user" and index > head]

        @cache
        def attempt(cut: int) -> tuple[list[dict], str, list[int]]:
            kept, rendered = self._render(turns[:head] + turns[cut:], slots, **how)
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

    def _encode_prompt(self, rendered: str, slots: int) -> list[int]:
        ids = self.text_tokenizer.encode(rendered)
        if slots and ids.count(self.knowledge_token_id) != slots:
            raise ValueError(
                f"expected {slots} {self.knowledge_token!r} in the rendered chat, got "
                f"{ids.count(self.knowledge_token_id)}: the chat template must render message contents unchanged."
            )
        return ids

    def _label(self, turns: list[dict], rendered: str, **how: Any) -> list[int]:
        """The prompt's ids where the assistant speaks or ends its turn, `IGNORED` elsewhere."""
        replies = self.template.locate_replies(turns, rendered, **how)
        if self.knowledge_message != "last_user":  # knowledge before earlier replies was computed from them: a leak
            final = sum(turn["role"] == "assistant" for turn in turns[last_user(turns) + 1 :])
            replies = replies[len(replies) - final :]
        ids, offsets = self.text_tokenizer.locate(rendered)
        starts, ends = zip(*offsets, strict=True)
        labels = [IGNORED] * len(ids)
        for start, stop in replies:
            tokens = slice(bisect_right(ends, start), bisect_left(starts, stop))  # all that overlap the reply
            labels[tokens] = ids[tokens]
        return labels

    def _encode_context(self, turns: list[dict]) -> tuple[list[int], int]:
        """The ids of as many of the newest turns as the text encoder can read, and the number of dropped turns."""
        dialogue = [turn for turn in turns[: last_user(turns) + 1] if turn["role"] != "system"]
        limit = self.max_context_length or self.context_tokenizer.model_max_length

        def encode(first: int) -> list[int]:
            spoken = [turn["content"] for turn in dialogue[first:] if not is_empty(turn)]
            return self.context_text_tokenizer("\n".join(spoken))["input_ids"]

        if len(ids := encode(0)) <= limit:  # the usual case
            return ids, 0
        ids = encode_truncated(self.context_text_tokenizer, dialogue[-1]["content"], limit)
        for older in range(len(dialogue) - 1, 0, -1):
            if len(longer := encode(older - 1)) > limit:
                return ids, older
            ids = longer
        return ids, 0

    def _collate(
        self, rows: list[_Row], pictures: list[Any], use_knowledge: bool, with_labels: bool, length: int | None
    ) -> dict[str, torch.Tensor | list[list[int]]]:
        """Rows as tensors; prompts padded on the left to `length`, see `_padded_length`."""
        prompts, contexts = [row.ids for row in rows], [row.context_ids for row in rows]
        data = {
            "input_ids": _pad(prompts, self.tokenizer.pad_token_id, "left", length),  # [B, T]
            "attention_mask": _pad([[1] * len(ids) for ids in prompts], 0, "left", length),  # [B, T]
        }
        if with_labels:
            data["labels"] = _pad([row.labels for row in rows], IGNORED, "left", length)  # [B, T]
        if use_knowledge:
            side, length = self.context_tokenizer.padding_side, None if length is None else 0
            data["context_input_ids"] = _pad(contexts, self.context_tokenizer.pad_token_id, side, length)  # [B, C]
            data["context_attention_mask"] = _pad([[1] * len(ids) for ids in contexts], 0, side, length)  # [B, C]
        if any(picture is not None for picture in pictures):
            data["pixel_values"], data["image_mask"] = self._encode_pictures(pictures)  # [B, 3, H, W], [B]
        return data

    def _padded_length(self, padding: bool | str, limit: int) -> int | None:
        """The length that prompts are padded to: 0 for the longest prompt's, None for no padding."""
        if padding == "max_length" and limit > LARGE_INTEGER:
            raise ValueError('padding="max_length" needs max_length: the LLM\'s tokenizer has no maximum length.')
        return {"max_length": limit, "do_not_pad": None, False: None}.get(padding, 0)

    def _encode_pictures(self, pictures: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W], zeros for rows without picture, and the mask [B] (bool) of rows with one."""
        loaded = [load_picture(picture, row) for row, picture in enumerate(pictures) if picture is not None]
        pixels = self.pixel_values(loaded)
        image_mask = torch.tensor([picture is not None for picture in pictures])
        pixel_values = pixels.new_zeros(len(pictures), *pixels.shape[1:])
        pixel_values[image_mask] = pixels
        return pixel_values, image_mask

    # ---- saving and loading ----

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The required parts; `image_processor` may be None and is saved with the settings."""
        return ["tokenizer", "context_tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """The settings, and the vocabulary sizes, by which `from_pretrained` verifies the tokenizers."""
        return {**super().to_dict(), "vocabulary_sizes": [len(self.tokenizer), len(self.context_tokenizer)]}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """Writes tokenizers, chat template and settings.

        An earlier processor is replaced as a whole or, if the process is killed, not at all; see atomic_saving.py.

        Returns:
            The paths of the settings, as transformers does.

        Raises:
            ValueError: For `push_to_hub=True`; use the method `push_to_hub`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call push_to_hub(repo_id) instead.")
        with replace_files(save_directory, "processor_config.json") as folder:
            paths = super().save_pretrained(folder, **kwargs)
        return [os.path.join(save_directory, os.path.basename(path)) for path in paths]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "VikdfProcessor":
        """Loads a saved processor; the context tokenizer is in the sub-folder `context_tokenizer/`.

        Args:
            pretrained_model_name_or_path: A folder or a repository of the Hub.
            kwargs: Arguments for the Hub (`revision`, `cache_dir`, `local_files_only`, ...), and settings to override.

        Raises:
            OSError: If there is no VIKDF processor, or one of its files is missing.
            TypeError: For an unknown setting.
            ValueError: If a tokenizer is not the one that was saved.
        """
        path = pretrained_model_name_or_path
        folder = os.path.join(path, kwargs.get("subfolder", ""))
        if os.path.isdir(folder) and (aside := saved_in(folder, "processor_config.json")):
            kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), aside)
        settings, overrides = cls.get_processor_dict(path, **kwargs)
        if "_from_pipeline" not in kwargs:  # a pipeline passes the model's arguments to all its parts
            _check_settings(overrides, inspect.signature(cls.__init__).parameters)
        if "vocabulary_sizes" not in settings:
            raise OSError(f"{path} holds no VIKDF processor; build one with VikdfProcessor.from_backbones.")
        where = {key: value for key, value in kwargs.items() if key not in overrides}
        root = where.pop("subfolder", "")
        # With an empty configuration AutoTokenizer looks for none: the one in the root is the model's, and
        # `context_tokenizer/` has none. The tokenizers' own files name their class.
        tokenizer, context_tokenizer = (
            AutoTokenizer.from_pretrained(path, subfolder=folder, config=PreTrainedConfig(), **where)
            for folder in (root, f"{root}/context_tokenizer".lstrip("/"))
        )
        sizes, saved_sizes = [len(tokenizer), len(context_tokenizer)], settings.pop("vocabulary_sizes")
        if sizes != saved_sizes:
            raise ValueError(
                f"The tokenizers in {path} (the LLM's, the text encoder's) have {sizes} tokens, but had {saved_sizes} "
                "when they were saved. Load an unchanged copy, or save the processor again."
            )
        image_processor = None
        if settings.pop("image_processor") is not None:
            image_processor = AutoImageProcessor.from_pretrained(path, subfolder=root, **where)
        return cls.from_args_and_dict([tokenizer, context_tokenizer, image_processor], settings, **overrides)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Commits the processor to a repository of the Hub, in one commit; see `sharing.push_to_hub`.

        Args:
            repo_id: "org/name"; created if it does not exist.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`.

        Raises:
            OSError: If the Hub refuses or the connection breaks; the repository is then unchanged.
        """
        return push_to_hub(repo_id, processor=self, **kwargs)


# ---- helpers that need no processor ----


def _check_settings(settings: dict[str, Any], known: Iterable[str]) -> None:
    known = {*known, "trust_remote_code", "code_revision", "return_unused_kwargs"} - {"self"}
    for name in settings.keys() - known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Expected one of {', '.join(sorted(known))}."
        raise TypeError(f"{name!r} is neither a setting of a VIKDF processor nor an argument for the Hub.{hint}")


def pad(rows: list[torch.Tensor], value: float = 0, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows [T, ...] of different lengths to [B, longest, ...]; also returns their mask [B, longest], int64."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    return pad_sequence(rows, True, value, side), mask


def _pad(rows: list[list[int]], value: int, side: str, length: int | None) -> torch.Tensor | list[list[int]]:
    """Pads rows to the longest of them or to `length`, whichever is more: [B, T]. With None they stay lists."""
    if length is None:
        return rows
    missing = [max(length, *map(len, rows), 0) - len(row) for row in rows]
    pads = [[value] * count for count in missing]
    return torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)])


def _report_dropped_turns(inputs: BatchFeature, rows: list[_Row]) -> BatchFeature:
    """Reports dropped turns in attributes: entries would be passed on by `model.generate(**inputs)`."""
    for name in ("dropped_turns", "dropped_context_turns", "continued"):
        setattr(inputs, name, [getattr(row, name) for row in rows])
    if any(inputs.dropped_turns) or any(inputs.dropped_context_turns):
        logger.warning(
            f"Too long: {sum(inputs.dropped_turns)} of the oldest turns were dropped from the prompts and "
            f"{sum(inputs.dropped_context_turns)} from the contexts; see dropped_turns and dropped_context_turns."
        )
    return inputs


def _convert(value: torch.Tensor | list[list[int]], name: str, return_tensors: str | None) -> Any:
    if return_tensors is None:
        return value.tolist() if isinstance(value, torch.Tensor) else value
    if isinstance(value, list):
        if len({len(row) for row in value}) > 1:
            raise ValueError(f"{name}: rows of different lengths need padding=True, or return_tensors=None.")
        value = torch.tensor(value)
    return value.numpy() if return_tensors == "np" else value


__all__ = ["KNOWLEDGE_TOKEN", "MAX_PICTURE_BYTES", "MAX_PIXELS", "PICTURE_FORMATS", "TextTokenizer", "VikdfProcessor"]
__all__ += ["encode_truncated", "pad", "read_file", "read_picture"]
