"""The API's schema: requests as OpenAI's clients send them, and errors as they read them.

Knows JSON, the processor's messages and the arguments of `generate`; knows nothing of queues, batches and routes.
"""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import GenerationConfig

from ..processing_vikdf import read_picture


MAX_CHARACTERS = 200_000  # of all messages; beyond any context window, so that tokenizing more would waste time
MAX_PIXELS = 25_000_000  # a small file can decompress into a picture of any size
LARGE_TEXT = 4_000  # characters that take noticeable time to be tokenized: one such chat at a time
MAX_FIELDS = 64  # of an object; each that is unknown is an error, and costs as much time as a page of text
MAX_STOP = 256  # characters of a stop sequence, which is looked for at each token
MIN_TEMPERATURE = 0.001  # above 0; logits divided by less overflow
MAX_MESSAGE = 1000  # characters of an error, which may quote a body
DEFAULT_MAX_TOKENS = 256  # where neither the request nor the model sets one


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message[:MAX_MESSAGE].encode(errors="replace").decode()  # it may quote half a surrogate pair
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers)


class Decoding(NamedTuple):
    """Decoding settings. Jobs with the same ones can share a batch."""

    use_knowledge: bool
    num_replies: int
    num_beams: int
    num_candidates: int
    max_new_tokens: int | None  # beams and candidates stop together; other rows where their own request says
    seed: int | None
    sampling: tuple[tuple[str, Any], ...]  # arguments of `generate`

    @property
    def options(self) -> int:
        """Beams or candidates that the replies are chosen from; 1: nothing is chosen."""
        return self.num_beams * self.num_candidates


class _Body(BaseModel):
    """
    Strict JSON types; `null` means "not given"; fields that are unknown and ask for something are refused.

    `neutral` are values of other fields that ask for nothing, which some clients send: these are accepted.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra=lambda schema, body: body.describe_what_asks_for_nothing(schema),
    )

    @classmethod
    def asks_for_nothing(cls, field: str, value: Any) -> bool:
        """Whether a field's value is `null` or neutral."""
        neutral = cls.neutral.get(field, ())
        return value is None or any(type(value) is type(each) and value == each for each in neutral)

    @classmethod
    def describe_what_asks_for_nothing(cls, schema: dict[str, Any]) -> None:
        """Adds to a JSON schema what is accepted beside the fields and their values."""
        fields, null = schema["properties"], {"type": "null"}
        for name in fields.keys() - {*schema.get("required", ())}:
            if null not in fields[name].get("anyOf", ()):
                about = {key: fields[name].pop(key) for key in ("title", "default") if key in fields[name]}
                fields[name] = {"anyOf": [fields[name], null], **about}
        fields |= {name: {"enum": [*values, None]} for name, values in cls.neutral.items()}
        schema["additionalProperties"] = null

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"an object has {len(value)} fields; the limit is {MAX_FIELDS}")
        return {key: item for key, item in value.items() if not cls.asks_for_nothing(key, item)}


class TextPart(_Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str

    def for_processor(self) -> dict[str, Any]:
        """The part as the processor reads it."""
        return {"type": "text", "text": self.text}


class ImageURL(_Body):
    """A picture as a `data:` URL; other URLs are refused, so that the server fetches nothing."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # accepted and unused: the vision encoder has one input size


class ImagePart(_Body):
    """A picture part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL

    def for_processor(self) -> dict[str, Any]:
        """
        The part as the processor reads it.

        Raises:
            ValueError: if the URL is not a `data:` URL, or its data are not a picture or too large a one.
        """
        if self.image_url.url[:5].lower() != "data:":  # nor a path
            raise ValueError("a picture must be a data: URL (data:image/png;base64,...); the server fetches nothing.")
        return {"type": "image", "image": read_picture(self.image_url.url, MAX_PIXELS)}


class ChatMessage(_Body):
    """One turn: plain text, or parts. `developer` is another name for `system`."""

    neutral = {"tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(fail_fast=True)]
    name: str | None = None  # accepted and unused: chat templates have no place for it

    def characters(self) -> int:
        """Length of its text in characters."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    def pictures(self) -> int:
        """Number of its pictures."""
        return 0 if isinstance(self.content, str) else sum(isinstance(part, ImagePart) for part in self.content)

    def for_processor(self) -> dict[str, Any]:
        """The message as the processor reads it."""
        content = self.content
        if not isinstance(content, str):
            content = [part.for_processor() for part in content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(_Body):
    """What both requests share: the model's name, as `/v1/models` lists it, and a chat."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)]

    def characters(self) -> int:
        """Length of the chat's text in characters."""
        return sum(message.characters() for message in self.messages)

    def pictures(self) -> int:
        """Number of pictures in the chat."""
        return sum(message.pictures() for message in self.messages)

    def is_large(self) -> bool:
        """Whether it takes time or memory to prepare it for the model."""
        return self.characters() > LARGE_TEXT or self.pictures() > 0

    def chat(self) -> list[dict[str, Any]]:
        """
        The messages as the processor reads them. Nothing is decoded before everything is counted.

        Raises:
            HTTPException: 413 if the messages have more than `MAX_CHARACTERS` characters.
            ValueError: if there are several pictures, or one cannot be read.
        """
        characters = self.characters()
        if characters > MAX_CHARACTERS:
            raise HTTPException(413, f"The messages have {characters} characters; the limit is {MAX_CHARACTERS}.")
        if self.pictures() > 1:
            raise ValueError(f"the chat shows {self.pictures()} pictures; at most one is supported.")
        return [message.for_processor() for message in self.messages]


class KnowledgeRequest(ChatBody):
    """
    The body of `/v1/knowledge`.

    Args:
        model: as `/v1/models` lists it.
        messages: the chat; parts of type `image_url` hold a `data:` URL.
        encoding_format: return vectors as lists of numbers, or as base64 of little-endian float32.
    """

    encoding_format: Literal["float", "base64"] = "float"


class StreamOptions(_Body):
    """Whether a streamed reply ends with a chunk that holds its token counts."""

    neutral = {"include_obfuscation": (False,)}

    include_usage: bool = False


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class ChatCompletionRequest(ChatBody):
    """
    The body of `/v1/chat/completions`.

    It has OpenAI's parameters, and this server's own `num_beams`, `num_candidates` and `use_knowledge`.

    The reply to a chat that ends in an assistant's message continues that message; with vLLM's parameter
    `continue_final_message` set to false it is a new message.

    Without `temperature` and `top_p` the model's generation config decides; `temperature=0` is greedy. A request with
    a `seed` has a batch of its own, since samples depend on the batch.

    With `num_beams` or `num_candidates` the `n` replies are the best of these, the best first. `logprobs` are those
    before temperature and truncation.
    """

    neutral = {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),  # among no tools
        "parallel_tool_calls": (True, False),
        "functions": ([],),  # the older names
        "function_call": ("none", "auto"),
        "logit_bias": ({},),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = []
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    num_candidates: Annotated[int, Field(ge=1, le=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    use_knowledge: bool = True
    continue_final_message: bool | None = None
    # accepted and unused: names of users and of prompts, for a provider's statistics and cache
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # accepted at their defaults alone, which some clients send
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0

    @field_validator("temperature")
    @classmethod
    def _temperature_that_logits_survive(cls, value: float | None) -> float | None:
        if value and value < MIN_TEMPERATURE:
            raise ValueError(f"must be 0, which is greedy, or at least {MIN_TEMPERATURE}")
        return value

    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def decoding(self, config: GenerationConfig) -> Decoding:
        """The decoding settings, with the model's generation config for defaults."""
        sampling: dict[str, Any] = {}
        if self.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None or self.top_p is not None:
            temperature = 1.0 if self.temperature is None else self.temperature
            sampling = {"do_sample": True, "temperature": temperature, "top_p": self.top_p, "top_k": 0}
        num_beams = self.num_beams or config.num_beams or 1
        samples = sampling.get("do_sample", config.do_sample) and num_beams == 1
        num_candidates = self._candidates(config, samples)
        self._check_replies(num_beams * num_candidates, samples)
        return Decoding(
            use_knowledge=self.use_knowledge,
            num_replies=self.n,
            num_beams=num_beams,
            num_candidates=num_candidates,
            max_new_tokens=self.max_new_tokens(config) if num_beams > 1 or num_candidates > 1 else None,
            seed=self.seed if sampling.get("do_sample", config.do_sample) else None,
            sampling=tuple(sampling.items()),
        )

    def _candidates(self, config: GenerationConfig, samples: bool) -> int:
        """How many replies are sampled to choose the best from; greedy and beam search have one."""
        if (self.num_candidates or 1) > 1 and not samples:
            raise ValueError("num_candidates needs a temperature above 0 and num_beams=1, or there is one candidate.")
        if not samples or self.num_candidates:
            return self.num_candidates or 1
        default = getattr(config, "num_candidates", None) or 1
        return default if default == 1 else max(default, self.n)

    def _check_replies(self, options: int, samples: bool) -> None:
        """Raises `ValueError` unless decoding with so many beams or candidates has `n` replies."""
        if 1 < options < self.n:
            raise ValueError(
                f"n={self.n} replies cannot be the best of {options} beams or candidates: ask for as many, or for "
                "num_beams=1 and num_candidates=1."
            )
        if options == 1 < self.n and not samples:
            raise ValueError(f"n={self.n} needs a temperature above 0, or num_beams: greedy decoding has one reply.")

    def num_logprobs(self, num_beams: int) -> int | None:
        """
        How many of the most likely tokens are told beside each of the reply's own; `None` for not even these.

        Raises:
            ValueError: if there are none to tell.
        """
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        if self.logprobs and num_beams > 1:
            raise ValueError("logprobs need num_beams=1.")
        return self.top_logprobs if self.logprobs else None

    def max_new_tokens(self, config: GenerationConfig) -> int:
        """The reply's maximum length in tokens, with the model's generation config for defaults."""
        return self.max_completion_tokens or self.max_tokens or config.max_new_tokens or DEFAULT_MAX_TOKENS
