"""`pipeline("vikdf-dialogue")`: a chat in, a reply out. Everything it does is processor -> generate -> decode."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Pipeline, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


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
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_text_knowledge"):
            raise ValueError(
                f"vikdf-dialogue needs a VikdfForConditionalGeneration, got {type(self.model).__name__}. For a plain "
                'language model use the "text-generation" pipeline.'
            )
        for entry in getattr(self.model.config, "custom_pipelines", {}).values():
            # transformers has put classes in place of their names, which could not be saved
            entry["pt"] = [getattr(each, "__name__", each) for each in entry["pt"]]

    def __call__(self, inputs: Any, images: Any = None, **kwargs: Any) -> list:
        """
        Args:
            inputs: a string (one user turn), a chat (list of messages with `role` and `content`), or a list, generator
                or dataset of either.
            images: a picture (PIL image, path or URL) for a single input, or a list with a picture or `None` for each.
            batch_size: how many chats are answered at once.
            use_knowledge: `False` asks the bare LLM.
            return_full_text: for chats, whether `generated_text` is the chat with the reply appended (default) or the
                reply alone; a string is always answered with the reply alone.
            continue_final_message: whether the reply continues the last message, and is appended to it; by default it
                does if that is the assistant's. `False` adds a message behind it.
            streamer, generate_kwargs, and everything that `generate` takes.

        Returns:
            As the text-generation pipeline: `[{"generated_text": ...}]` for one input, a list of such for several.

        Raises:
            ValueError: for empty or malformed chats, or images that do not fit the inputs.
        """
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError(
                    "Nothing to reply to: expected a string, a chat or a list of chats, got an empty list."
                )
            if isinstance(inputs[0], dict):
                return super().__call__({"chat": list(inputs), "image": images}, **kwargs)
            images = [None] * len(inputs) if images is None else images
            if not isinstance(images, (list, tuple)) or len(images) != len(inputs):
                count = len(images) if isinstance(images, (list, tuple)) else "a single picture"
                raise ValueError(
                    f"{len(inputs)} inputs need a list of {len(inputs)} images (None for no picture), got {count}."
                )
            items = [{"chat": chat, "image": image} for chat, image in zip(inputs, images, strict=True)]
            return super().__call__(items, **kwargs)
        if isinstance(inputs, str):
            return super().__call__({"chat": inputs, "image": images}, **kwargs)
        if images is not None:
            raise ValueError("With a generator or dataset put the pictures into the messages, as image parts.")
        return super().__call__(inputs, **kwargs)

    def stream(self, chat: str | list[dict], images: Any = None, **kwargs: Any) -> Iterator[str]:
        """
        Yields the reply to one chat piece by piece; closing the iterator stops the generation.

        Args:
            chat, images, kwargs: as for a call.

        Raises:
            Whatever the generation raises.
        """
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
        continue_final_message: bool | None = None,
        generate_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        forward = {**kwargs, **(generate_kwargs or {})}
        if use_knowledge is not None:
            forward["use_knowledge"] = use_knowledge
        if continue_final_message is not None:
            forward["continue_final_message"] = continue_final_message
        return {}, forward, {} if return_full_text is None else {"return_full_text": return_full_text}

    def preprocess(self, item: Any) -> dict[str, Any]:
        """One input -> its messages and its picture; they become tensors in `_forward`, a batch at a time."""
        if not (isinstance(item, dict) and "chat" in item):
            item = {"chat": item, "image": None}
        chat = item["chat"]
        # a dataset's chats come wrapped in an object with the messages in it
        messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else getattr(chat, "messages", chat)
        if not isinstance(messages, (list, tuple)):
            raise ValueError(f"A chat is a string or a list of messages with role and content, got {chat!r}.")
        return {"messages": messages, "image": item["image"], "is_text": isinstance(chat, str)}

    def _forward(
        self,
        inputs: dict[str, Any],
        use_knowledge: bool = True,
        continue_final_message: bool | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        batched = isinstance(inputs["is_text"], list)
        chats = inputs["messages"] if batched else [inputs["messages"]]
        images = inputs["image"] if batched else [inputs["image"]]
        features = self.processor(
            chats,
            images=images if any(image is not None for image in images) else None,
            use_knowledge=use_knowledge,
            continue_final_message=continue_final_message,
            max_length=self._room_for_prompt(generate_kwargs),
        ).to(self.device)
        if isinstance(streamer := generate_kwargs.get("streamer"), _ReplyStreamer):
            streamer.continued = features.continued[0]
        sequences = self.model.generate(**features, **generate_kwargs)
        if not isinstance(sequences, torch.Tensor):
            sequences = sequences.sequences
        new_tokens = sequences[:, features["input_ids"].shape[1] :]  # [B * replies, T_new]
        # a reply that continues a message is decoded behind its last token: alone it may lose the space between them
        continued = torch.tensor(features.continued)  # [B]
        last = features["input_ids"][:, -1].cpu()  # [B]
        generated = new_tokens.reshape(len(chats), -1, new_tokens.shape[1]).cpu()
        return {"generated": generated, "continued": continued, "last": last, **inputs}

    def postprocess(self, outputs: dict[str, Any], return_full_text: bool = True) -> list[dict[str, Any]]:
        """Token ids of the replies to one chat [1, replies, T_new] -> `[{"generated_text": ...}, ...]`."""
        if outputs["continued"][0]:
            return self._continue(outputs, return_full_text)
        replies = self.processor.batch_decode(outputs["generated"][0], skip_special_tokens=True)
        if outputs["is_text"] or not return_full_text:
            return [{"generated_text": reply.strip()} for reply in replies]
        messages = list(outputs["messages"])
        return [{"generated_text": [*messages, {"role": "assistant", "content": reply.strip()}]} for reply in replies]

    def _continue(self, outputs: dict[str, Any], return_full_text: bool) -> list[dict[str, Any]]:
        """The same for replies that continue the last message."""
        *messages, message = outputs["messages"]
        last = outputs["last"][:1].tolist()
        replies = [self.processor.decode_behind(last, reply).rstrip() for reply in outputs["generated"][0].tolist()]
        if not return_full_text:
            return [{"generated_text": reply} for reply in replies]
        return [{"generated_text": [*messages, _extend(message, reply)]} for reply in replies]

    def _room_for_prompt(self, generate_kwargs: dict[str, Any]) -> int | None:
        """
        How many tokens the prompt may have so that the reply still fits into the LLM's window.

        Raises:
            ValueError: if the reply alone may be longer than that.
        """
        window = getattr(self.model.config.text_config, "max_position_embeddings", None)
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        new_tokens = generate_kwargs.get("max_new_tokens", config.max_new_tokens) or 0
        if window is not None and new_tokens >= window:
            raise ValueError(
                f"max_new_tokens={new_tokens} leaves no room for a prompt: the language model reads {window} tokens."
            )
        return None if window is None else window - new_tokens

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes model and processor into one folder that `pipeline("vikdf-dialogue", model=folder)` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Commits model and processor to a repository of the Hub, in one step.

        Args:
            repo_id, kwargs: as for the model's `push_to_hub`.

        Raises:
            OSError: if the Hub refuses or breaks off; the repository is then as it was.
            ValueError: if the model would not load elsewhere.
        """
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)


def _extend(message: dict[str, Any], reply: str) -> dict[str, Any]:
    """A message with more text at the end of its content, a string or a list of parts."""
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


__all__ = ["VikdfDialoguePipeline"]
