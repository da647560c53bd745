"""`pipeline("vikdf-dialogue")`: a chat in, a reply out. Everything it does is processor -> generate -> decode.

`prompt_embeddings` stops in front of `generate`: what the LLM reads, for one that runs elsewhere.
"""

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BatchFeature,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    Pipeline,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.utils.chat_template_utils import Chat

from .atomic_saving import replace_files
from .modeling_compilation import compile_config_for, warm_up


GENERATION_FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
# what else goes through to `generate`: its own arguments, and some of those that it takes by `**kwargs`
GENERATE_ARGUMENTS = {*inspect.signature(GenerationMixin.generate).parameters} - {"self", "inputs", "kwargs"}
GENERATE_ARGUMENTS |= {"cache", "past_key_values", "knowledge", "tokenizer", "num_candidates", "candidate_weights"}
# Arguments of the text-generation pipeline that have no meaning here, and what to do instead.
REFUSED = {
    "return_tensors": "replies come as text; call model.generate for token ids",
    "return_text": "replies always come as text",
    "return_type": "say with return_full_text whether the chat comes with the reply",
    "prefix": "write it into the message, or into a system message",
    "handle_long_generation": "a chat that is too long always loses its oldest turns",
    "truncation": "a chat that is too long always loses its oldest turns",
    "padding": "batches are always padded, on the left",
    "add_special_tokens": "the chat template writes the special tokens",
    "tokenizer_encode_kwargs": "set what differs on the processor",
    "tools": "the chats of this model have none",
    "documents": "write them into a message",
    "assistant_model": "it would draft without the knowledge; prompt_lookup_num_tokens drafts without one",
    "assistant_tokenizer": "there is no assistant_model here",
}
# What the processor's errors advise, and what that means here.
ADVICE = {
    "raise max_length": "ask for fewer max_new_tokens",
    "this processor was built without image_processor": "this model has no vision encoder",
}
NAMED = 10  # inputs that an error names; the others are in its `errors`


class VikdfInputsError(ValueError):
    """
    Some inputs of a list cannot be answered. The others were, and their replies are not lost.

    Attributes:
        errors: place in the list -> the error, in the order of the list.
        replies: what the call would have returned, with `None` in those places.
    """

    def __init__(self, errors: dict[int, Exception], replies: list):
        self.errors, self.replies = errors, replies
        lines = [f"{len(errors)} of {len(replies)} inputs cannot be answered:"]
        lines += map(str, islice(errors.values(), NAMED))
        if len(errors) > NAMED:
            lines.append(f"... and {len(errors) - NAMED} more; this error's `errors` has all.")
        if len(errors) < len(replies):
            lines.append("The replies to the others are this error's `replies`.")
        super().__init__("\n".join(lines))


class VikdfDialoguePipeline(Pipeline):
    """
    Replies to chats with a [`VikdfForConditionalGeneration`].

    ```python
    >>> import modeling_vikdf
    >>> from transformers import pipeline

    >>> chat = pipeline("vikdf-dialogue")
    >>> chat([{"role": "user", "content": "I spent the day at the beach."}], return_full_text=False)
    [{'generated_text': '...'}]
    ```

    It is called as the text-generation pipeline is, but for this:

    * A string is one user turn and not the beginning of a text, so it is answered with the reply alone, and may not be
      empty. Replies are stripped of white space.
    * Lengths and sampling are those of the model's `generation_config`; there are no defaults of the pipeline's own.
    * A chat that is too long for the language model always loses its oldest turns.
    * Columns, arrays and rows `{"messages": ...}` of `datasets`, and any iterator, are accepted as well.
    * A bad input of a list or stream does not stop the others from being answered (see `__call__`).
    * With beams `return_dict_in_generate` brings `sequences_scores` alone, for the scores of a step belong to beams
      and not to replies; attentions and hidden states are refused.
    * Refused are the arguments that have no meaning here (`REFUSED` says why) and, at once, unknown ones.
    * `compile=True` compiles the decoding steps, when the pipeline is built: that takes a minute or two, and then
      replies on a GPU are several times as fast; they are the same. A `CompileConfig` of transformers says how. Beam
      search and `prompt_lookup_num_tokens` are decoded as without it. All replies are generated by one thread, one
      batch after the other.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def __init__(self, *args: Any, compile: bool | CompileConfig = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_text_knowledge"):
            raise ValueError(
                f"vikdf-dialogue needs a VikdfForConditionalGeneration, got {type(self.model).__name__}. For a plain "
                'language model use the "text-generation" pipeline.'
            )
        # kept apart, because a call's generation_config replaces them all, as in text-generation
        names = [name for name in self._forward_params if name in GENERATION_FIELDS or name == "generation_config"]
        self._constructor_settings = _with_length({name: self._forward_params.pop(name) for name in names})
        for entry in getattr(self.model.config, "custom_pipelines", {}).values():
            # transformers has put classes in place of their names, which could not be saved
            entry["pt"] = [getattr(auto_class, "__name__", auto_class) for auto_class in entry["pt"]]
        self._compile_config, self._thread = compile_config_for(self.model, compile), None
        if self._compile_config is not None:
            # what was recorded on a GPU can only be replayed by the thread that recorded it
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="vikdf-compiled")
            batches = sorted({1, self._batch_size or 1})
            self._thread.submit(warm_up, self.model, self.processor, batches, self._compile_config).result()

    def __call__(self, inputs: Any, images: Any = None, **kwargs: Any) -> list | Iterable[list]:
        """
        Replies to one input or to several.

        Args:
            inputs: a string (one user turn), a chat (list of messages with `role` and `content`) or a row
                `{"messages": ...}` with either; or several of them, in a list, column or array, or in a dataset,
                generator or other iterator.
            images: a picture (PIL image, path or URL) for a single input, or a list with a picture or `None` for each.
            batch_size: how many chats are answered at once.
            use_knowledge: `False` asks the bare LLM.
            return_full_text: whether `generated_text` is the chat with the reply appended, the default for chats, or
                the reply alone, the default for strings.
            num_candidates: how many replies are sampled to choose the best from; see the model's `generate`. A stream
                gets the chosen one in one piece.
            stop_sequence: one or more strings, each of which ends a reply that contains it.
            skip_special_tokens, clean_up_tokenization_spaces: for the tokenizer that decodes the replies.
            generation_config: replaces all generation settings that the pipeline was built with.
            continue_final_message: whether the reply continues the last message, and is appended to it; by default it
                does if that is the assistant's. `False` adds a message behind it.
            **kwargs: `streamer`, `generate_kwargs`, and everything that `generate` takes.

        Returns:
            As the text-generation pipeline: `[{"generated_text": ...}]` for one input; a list of such for a list,
            column or array; an iterator of such for a dataset, generator or other iterator, which is read as it goes.
            With `return_dict_in_generate` each reply has its `scores`, `logits` or `sequences_scores`, if asked for.

        Raises:
            VikdfInputsError: if inputs of a list are empty or malformed chats, too long, or have a picture that cannot
                be read, after all others have been answered: it names them by their places, and has the replies to the
                others. An iterator raises a `ValueError` or `TypeError` in the place of such an input, and can be
                continued behind it.
            ValueError: for a single input like that, for images that do not fit the inputs, and for settings that are
                unknown or refused.
        """
        if hasattr(inputs, "tolist"):  # arrays, and columns of data frames
            inputs = inputs.tolist()
        if _is_single(inputs):
            return super().__call__(_item(inputs, images), **kwargs)
        if isinstance(inputs, Sequence):
            return self._reply_to_list(inputs, images, **kwargs)
        if images is not None:
            raise ValueError("With a generator or dataset put the pictures into the messages, as image parts.")
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            return super().__call__(_Items(inputs), **kwargs)
        stream = iter(inputs)
        first = list(islice(stream, 1))
        if first and _is_message(first[0]):
            return self([*first, *stream], **kwargs)
        items = (_item(entry, place=place) for place, entry in enumerate(chain(first, stream)))
        return super().__call__(items, **kwargs)

    def _reply_to_list(self, inputs: Sequence, images: Any, **kwargs: Any) -> list:
        if not len(inputs):
            raise ValueError("Nothing to reply to: expected a string, a chat or a list of chats, got an empty list.")
        images = [None] * len(inputs) if images is None else images
        several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
        if not several or len(images) != len(inputs):
            count = len(images) if several else "a single picture"
            raise ValueError(
                f"{len(inputs)} inputs need a list of {len(inputs)} images (None for no picture), got {count}."
            )
        pairs = zip(inputs, images, strict=True)
        items = [_item(entry, image, place, raises=False) for place, (entry, image) in enumerate(pairs)]
        outputs = super().__call__(items, **kwargs)
        errors = {place: output for place, output in enumerate(outputs) if isinstance(output, Exception)}
        if errors:
            replies = [None if place in errors else output for place, output in enumerate(outputs)]
            raise VikdfInputsError(errors, replies)
        return outputs

    def stream(self, chat: str | list[dict], images: Any = None, **kwargs: Any) -> Iterator[str]:
        """
        Yields the reply to one chat piece by piece; closing the iterator stops the generation.

        Args:
            chat: a string or a list of messages, as for a call with a single input.
            images: its picture, if it has one.
            **kwargs: settings, as for a call.

        Raises:
            ValueError: for several inputs.
            Exception: whatever the generation raises.
        """
        if not _is_single(chat):
            raise ValueError(f"Only one chat can be streamed (a string or messages), got {type(chat).__name__}.")
        streamer = _ReplyStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = _Stop(), []
        criteria = StoppingCriteriaList([*kwargs.pop("stopping_criteria", []), stop])

        def reply() -> None:
            try:
                self(chat, images, streamer=streamer, stopping_criteria=criteria, **kwargs)
            except BaseException as error:
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)  # it hands over nothing while a word is incomplete
        finally:
            stop.event.set()
            thread.join()
        if errors:
            raise errors[0]

    def _sanitize_parameters(
        self,
        use_knowledge: bool | None = None,
        return_full_text: bool | None = None,
        stop_sequence: str | list[str] | None = None,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        continue_final_message: bool | None = None,
        generate_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if twice := sorted(set(kwargs) & set(generate_kwargs or {})):
            raise ValueError(f"{', '.join(twice)} is given twice: as an argument and in generate_kwargs.")
        forward = {**kwargs, **(generate_kwargs or {})}
        forward = {name: value for name, value in forward.items() if name not in REFUSED or value is not None}
        own = inspect.signature(self._sanitize_parameters).parameters
        _refuse(forward, GENERATION_FIELDS | GENERATE_ARGUMENTS | set(own) - {"kwargs"})
        if stop_sequence is not None:
            if "stop_strings" in forward:
                raise ValueError("stop_sequence and stop_strings are two names of one setting: pass one of them.")
            forward["stop_strings"] = stop_sequence
        if use_knowledge is not None:
            forward["use_knowledge"] = use_knowledge
        if continue_final_message is not None:
            forward["continue_final_message"] = continue_final_message
        post = {
            "return_full_text": return_full_text,
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return {}, forward, {name: value for name, value in post.items() if value is not None}

    def preprocess(self, item: dict[str, Any]) -> dict[str, Any]:
        """One input -> its messages; they become tensors in `_forward`, a batch at a time."""
        chat = item["entry"]
        if isinstance(chat, Mapping) and "messages" in chat:
            chat = chat["messages"]
        chat = chat.messages if isinstance(chat, Chat) else chat.tolist() if hasattr(chat, "tolist") else chat
        messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
        return {**item, "messages": messages, "is_text": isinstance(chat, str)}

    def _forward(
        self,
        inputs: dict[str, Any],
        use_knowledge: bool = True,
        continue_final_message: bool | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        batched = isinstance(inputs["is_text"], list)
        inputs = inputs if batched else {name: [value] for name, value in inputs.items()}
        items = [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
        defaults = {} if "generation_config" in generate_kwargs else self._constructor_settings
        generate_kwargs = {**defaults, **_with_length(generate_kwargs)}
        room = self._room_for_prompt(generate_kwargs)
        settings = {"use_knowledge": use_knowledge, "continue_final_message": continue_final_message}
        features, errors = self._read_good(items, max_length=room, **settings)
        replies = iter(self._generate(features, errors.count(None), generate_kwargs) if features else ())
        outputs = {"reply": [next(replies) if error is None else None for error in errors], "error": errors, **inputs}
        return outputs if batched else {name: value for name, [value] in outputs.items()}

    def _read_good(
        self, items: list[dict[str, Any]], **settings: Any
    ) -> tuple[BatchFeature | None, list[Exception | None]]:
        """The model's inputs for all items that can be read, and for each item its error, or `None`."""
        try:
            return self._read(items, **settings), [None] * len(items)
        except (TypeError, ValueError):
            errors = [self._find_error(item, **settings) for item in items]
            if not any(errors):
                raise
        good = [item for item, error in zip(items, errors, strict=True) if error is None]
        return self._read(good, **settings) if good else None, errors

    def _find_error(self, item: dict[str, Any], **settings: Any) -> Exception | None:
        """Why an item cannot be read, in the caller's terms: not the processor's row but the place in the list."""
        try:
            self._read([item], **settings)
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("row 0, ").removeprefix("row 0: ")
            for theirs, ours in ADVICE.items():
                text = text.replace(theirs, ours)
            explained = type(error)(text if item["place"] is None else f"inputs[{item['place']}]: {text}")
            explained.__cause__ = error
            return explained
        return None

    def _read(self, items: list[dict[str, Any]], **settings: Any) -> BatchFeature:
        for item in items:
            row = item["entry"] if isinstance(item["entry"], Mapping) else {}
            if not isinstance(item["messages"], (list, tuple)):
                raise ValueError(
                    "Expected a string, a list of messages with role and content, or a row with either as 'messages', "
                    f"got {item['messages']!r:.200}."
                )
            if unread := [name for name in ("image", "images") if row.get(name) is not None]:
                raise ValueError(
                    f"{unread[0]!r} of a row is not read: put the picture into the messages, as an image part, or "
                    "pass the messages and images= apart."
                )
        images = [item["image"] for item in items]
        images = images if any(image is not None for image in images) else None
        return self.processor([item["messages"] for item in items], images=images, **settings).to(self.device)

    def _generate(
        self, features: BatchFeature, rows: int, generate_kwargs: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        """
        Generates the replies to a batch.

        Returns:
            For each row the token ids of its replies, `generated` [replies, T_new], and the scores that were asked
            for [replies, ...]; if the replies continue the last message, also its last token, `behind` [1].
        """
        for name in ("output_attentions", "output_hidden_states"):
            if self._setting(name, generate_kwargs):
                raise ValueError(f"{name}: a reply has no place for these; call the processor and model.generate.")
        if self._setting("output_logits", generate_kwargs) and (self._setting("num_beams", generate_kwargs) or 1) > 1:
            raise ValueError("output_logits with num_beams: they belong to beams and not to replies; leave out one.")
        if isinstance(streamer := generate_kwargs.get("streamer"), _ReplyStreamer):
            streamer.continued = features.continued[0]
        reads = {"tokenizer": self.processor.tokenizer, "processor": self.processor}
        outputs = self._decode(**features, **reads | generate_kwargs)
        if isinstance(outputs, torch.Tensor):
            outputs = {"sequences": outputs}
        fields = {"generated": outputs["sequences"][:, features["input_ids"].shape[1] :], **_scores(outputs)}
        by_row = [value.unflatten(0, (rows, -1)).cpu() for value in fields.values()]  # [B, replies, ...] of each field
        replies = [dict(zip(fields, values, strict=True)) for values in zip(*by_row, strict=True)]
        for row, ids, continued in zip(replies, features["input_ids"].cpu(), features.continued, strict=True):
            if continued:
                row["behind"] = ids[-1:]
        return replies

    def _decode(self, **kwargs: Any) -> Any:
        """What the model generates; compiled, where that is set up and the decoding is not another."""
        searches = (self._setting("num_beams", kwargs) or 1) > 1 or self._setting("use_cache", kwargs) is False
        own = ("prompt_lookup_num_tokens", "cache_implementation", "cache", "past_key_values")
        if self._thread is None:
            return self.model.generate(**kwargs)
        if not searches and not any(self._setting(name, kwargs) for name in own):
            kwargs |= {"cache_implementation": "static", "compile_config": self._compile_config}
        stop = _Stop()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), stop])
        try:
            return self._thread.submit(self.model.generate, **kwargs).result()
        finally:
            stop.event.set()  # for who interrupts this thread: the other would go on

    def postprocess(
        self, outputs: dict[str, Any], return_full_text: bool | None = None, **decode_kwargs: Any
    ) -> list[dict[str, Any]] | Exception:
        """The replies to one chat -> `[{"generated_text": ...}, ...]`."""
        if outputs["error"] is not None:
            if outputs["raises"]:
                raise outputs["error"]
            return outputs["error"]
        fields = {name: value.tolist() for name, value in outputs["reply"].items()}
        decode_kwargs = {"skip_special_tokens": True, **decode_kwargs}
        behind, generated = fields.pop("behind", None), fields.pop("generated")
        if behind is None:
            replies = [text.strip() for text in self.processor.batch_decode(generated, **decode_kwargs)]
        else:  # decoded behind the last token of the message: alone it may lose the space between them
            replies = [self.processor.decode_behind(behind, ids, **decode_kwargs).rstrip() for ids in generated]
        if not outputs["is_text"] if return_full_text is None else return_full_text:
            *before, last = outputs["messages"] if behind else [*outputs["messages"], None]
            replies = [[*before, _extend(last, reply)] for reply in replies]
        fields = {"generated_text": replies, **fields}
        return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]

    def _setting(self, name: str, generate_kwargs: dict[str, Any]) -> Any:
        """What `generate` takes for a setting: the argument, that of the configuration given, or the model's own."""
        if name in generate_kwargs:
            return generate_kwargs[name]
        given = getattr(generate_kwargs.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if given is None else given

    def _room_for_prompt(self, generate_kwargs: dict[str, Any]) -> int | None:
        """
        How many tokens the prompt may have so that the reply still fits into the LLM's window.

        Raises:
            ValueError: if the reply alone, or both together, may be longer than that.
        """
        window = getattr(self.model.config.text_config, "max_position_embeddings", None)
        new_tokens = self._setting("max_new_tokens", generate_kwargs) or 0
        if window is not None and new_tokens >= window:
            raise ValueError(
                f"max_new_tokens={new_tokens} leaves no room for a prompt: the language model reads {window} tokens."
            )
        length = generate_kwargs.get("max_length")
        if None not in (window, length) and length > window:
            raise ValueError(f"max_length={length} is too long: the language model reads {window} tokens.")
        return None if window is None else window - new_tokens

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Writes model and processor into one folder that `pipeline("vikdf-dialogue", model=folder)` loads.

        Both are replaced together or not at all, wherever the process is killed; see atomic_saving.py.
        """
        with replace_files(save_directory, "config.json") as folder:
            self.model.save_pretrained(folder, **kwargs)
            self.processor.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Commits model and processor to a repository of the Hub, in one step.

        Args:
            repo_id: "org/name", or a name in the namespace of the token's owner.
            **kwargs: as for the model's `push_to_hub`.

        Raises:
            OSError: if the Hub refuses or breaks off; the repository is then as it was.
            ValueError: if the model would not load elsewhere.
        """
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)


@torch.no_grad()
def prompt_embeddings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    max_length: int | None = None,
) -> torch.Tensor:
    """
    A chat as the LLM reads it: the embeddings of its prompt, with the knowledge in place.

    Any runtime of the same LLM that takes `inputs_embeds` can generate from them. It should suppress
    `processor.knowledge_token_id`, as this package does, if the LLM could generate that token.

    Args:
        model: a [`VikdfForConditionalGeneration`].
        processor: its processor.
        messages: the chat, as the processor takes it.
        max_length: the longest prompt in tokens; the oldest turns of a longer one are left out.

    Returns:
        [T, d_llm], in the LLM's own precision.

    Raises:
        TypeError, ValueError: if the processor refuses the chat.
    """
    inputs = processor([messages], max_length=max_length).to(model.device)
    knowledge = model.get_knowledge(
        inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("pixel_values")
    )  # [1, m, h]
    return model.embed_prompt(inputs["input_ids"], knowledge)[0]


def _item(entry: Any, image: Any = None, place: int | None = None, raises: bool = True) -> dict[str, Any]:
    """
    What goes through the steps of the pipeline.

    Args:
        entry: string, chat or row.
        image: its picture, if that came beside it.
        place: where it stands in what the caller passed; `None` if it is all.
        raises: whether its error is raised in the place of its reply, or takes that place.
    """
    return {"entry": entry, "image": image, "place": place, "raises": raises}


class _Items(Dataset):
    """A dataset with a length whose rows are the pipeline's items, read as they are asked for."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return _item(self.dataset[place], place=place)


def _is_message(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "messages" not in entry


def _is_single(inputs: Any) -> bool:
    """Whether this is one input, though perhaps a bad one, and not several."""
    if isinstance(inputs, (str, bytes, Mapping, Chat)) or not isinstance(inputs, (Iterable, Sized)):
        return True
    return isinstance(inputs, Sequence) and len(inputs) > 0 and _is_message(inputs[0])


def _refuse(settings: Iterable[str], known: set[str]) -> None:
    for name in settings:
        if name in REFUSED:
            raise ValueError(f"{name} is no setting of vikdf-dialogue: {REFUSED[name]}.")
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1)
            raise ValueError(f"{name} is no setting of vikdf-dialogue{f'; did you mean {near[0]}?' if near else '.'}")


def _with_length(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a total length, if it is given, does not lose against another's number of new tokens."""
    config = settings.get("generation_config")
    for source in (settings, {} if config is None else vars(config)):
        if source.get("max_new_tokens") is not None:
            return settings
        if source.get("max_length") is not None:
            return {**settings, "max_length": source["max_length"], "max_new_tokens": None}
    return settings


def _scores(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of each reply its `scores` and `logits` [B * replies, T_new, vocabulary], of beams their score [B * replies]."""
    if isinstance(outputs, GenerateBeamDecoderOnlyOutput):
        scores = outputs.sequences_scores  # [B * replies]
        return {} if scores is None else {"sequences_scores": scores}
    names = [name for name in ("scores", "logits") if outputs.get(name) is not None]
    return {name: torch.stack(outputs[name], dim=1) for name in names}


def _extend(message: dict[str, Any] | None, reply: str) -> dict[str, Any]:
    """A message with more text at the end of its content, a string or a list of parts; or a new message."""
    if message is None:
        return {"role": "assistant", "content": reply}
    if isinstance(message["content"], str):
        return {**message, "content": message["content"] + reply}
    parts = list(message["content"])
    last = max(index for index, part in enumerate(parts) if part["type"] == "text")
    parts[last] = {**parts[last], "text": parts[last]["text"] + reply}
    return {**message, "content": parts}


class _ReplyStreamer(TextIteratorStreamer):
    """Decodes a reply that continues a message behind that message's last token."""

    continued = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, T], then one token [1] after the other."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if is_prompt and self.continued:
            self.token_cache = value.flatten()[-1:].tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))


class _Stop(StoppingCriteria):
    """Ends a generation from another thread."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


__all__ = ["VikdfDialoguePipeline", "VikdfInputsError", "prompt_embeddings"]
