"""`vikdf serve`: a VIKDF model behind OpenAI's chat API, and its knowledge for language models served elsewhere.

Reads as a request flows:

    Gate (key, size, time to send) -> request body -> prepare (chat -> tensors of one row) -> Job
      -> Worker: the one thread that runs the model; jobs that wait and agree in their decoding become a batch
      -> Steps: sees each new token of the batch, hands out text, ends rows that are done or no longer wanted
      -> follow -> one JSON answer, or server-sent events

What people write is never logged: a line a request says what was asked for and how it ended, a failure names its type
and the lines of code it passed. Pictures come with the request; the server fetches nothing.

Example run:
    VIKDF_API_KEY=secret vikdf serve --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer secret" \
        -H "Content-Type: application/json" \
        -d '{"model": "vikdf", "messages": [{"role": "user", "content": "It snowed all night."}], "stream": true}'
"""

import asyncio
import base64
import hmac
import io
import json
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .. import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration, VikdfProcessor
from ..building import load_model
from ..processing_vikdf import read_picture


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
MAX_CHARACTERS = 200_000  # of all messages; more than any window holds would only cost time to tokenize
MAX_PIXELS = 25_000_000  # a small file can unfold into a picture of any size
DEFAULT_MAX_TOKENS = 256  # where neither the request nor the model says
CLIENT_LEFT = 499  # nobody receives it; it is for log and metrics


# ---- the gate: what a request passes before anyone reads it ----


class Gate:
    """
    ASGI middleware, the outermost: refuses wrong keys and bodies that are too large or too slow, turns what nobody
    expected into a 500, counts and logs every answer.

    Args:
        app: what lies behind.
        metrics: where answers are counted.
        api_key: what `/v1` asks for, or `None`.
        timeout: seconds that a request may take to arrive.
    """

    def __init__(self, app: ASGIApp, metrics: "Metrics", api_key: str | None, timeout: float):
        self.app, self.metrics, self.timeout = app, metrics, timeout
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, started, finished = time.monotonic(), 500, False, False
        reading, size, deadline = True, 0, asyncio.get_running_loop().time() + self.timeout

        async def limited_receive() -> Message:
            nonlocal reading, size, status
            try:
                async with asyncio.timeout_at(deadline if reading else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The request did not arrive in time.") from None
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request has more than {MAX_BODY_BYTES} bytes.")
            reading = message.get("more_body", False)
            if message["type"] == "http.disconnect" and not finished:
                status = CLIENT_LEFT
            return message

        async def counted_send(message: Message) -> None:
            nonlocal started, finished, status
            if message["type"] == "http.response.start":
                started, status = True, status if status == CLIENT_LEFT else message["status"]
            elif not message.get("more_body", False):
                finished = True
            await send(message)

        try:
            if scope["path"].startswith("/v1") and not self._has_key(scope):
                refusal = error_response(
                    401, "A valid API key is needed: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, counted_send)
            else:
                await self.app(scope, limited_receive, counted_send)
        except Exception as error:
            log_failure(error)
            if not started:
                await error_response(500, "Internal error.")(scope, receive, counted_send)
        finally:
            self.metrics.add("requests_total", labels=f'{{status="{status}"}}')
            # the path of a route, not of the request: that may hold anything
            path = scope["route"].path if "route" in scope else "-"
            logger.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - start)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.expected is None or hmac.compare_digest(given, self.expected)  # in constant time


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="replace").decode()  # it may quote half a surrogate pair
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers)


def log_failure(error: Exception) -> None:
    """Type and place; the message may quote what somebody wrote."""
    logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


# ---- what may be asked ----


class _Body(BaseModel):
    """Types as they are in JSON, `null` for "not given", and nothing that would be ignored without a word."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class TextPart(_Body):
    """Text in a message of several parts."""

    type: Literal["text"]
    text: str

    def for_processor(self) -> dict[str, Any]:
        """The part as the processor reads it."""
        return {"type": "text", "text": self.text}


class ImageURL(_Body):
    """A picture as a `data:` URL; others are refused, so that the server fetches nothing."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # one size is all that the vision encoder knows


class ImagePart(_Body):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageURL

    def for_processor(self) -> dict[str, Any]:
        """
        The part as the processor reads it.

        Raises:
            ValueError: for a URL that is no `data:` URL, and for what is no picture or too large a one.
        """
        if self.image_url.url[:5].lower() != "data:":  # and so no path either
            raise ValueError("a picture must be a data: URL (data:image/png;base64,...); the server fetches nothing.")
        return {"type": "image", "image": read_picture(self.image_url.url, MAX_PIXELS)}


class ChatMessage(_Body):
    """One turn: plain text, or parts. `developer` is another name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    def characters(self) -> int:
        """Length of its text."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    def for_processor(self) -> dict[str, Any]:
        """The message as the processor reads it."""
        content = self.content
        if not isinstance(content, str):
            content = [part.for_processor() for part in content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _ChatBody(_Body):
    """What both requests begin with: a model's name, as `/v1/models` has it, and a chat."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]

    def chat(self) -> list[dict[str, Any]]:
        """
        The messages as the processor reads them.

        Raises:
            HTTPException: 413 for too much text.
            ValueError: for a picture that cannot be read.
        """
        characters = sum(message.characters() for message in self.messages)
        if characters > MAX_CHARACTERS:
            raise HTTPException(413, f"The messages have {characters} characters; at most {MAX_CHARACTERS} are read.")
        return [message.for_processor() for message in self.messages]


class KnowledgeRequest(_ChatBody):
    """
    What `/v1/knowledge` takes.

    Args:
        model: as `/v1/models` names it.
        messages: the chat; parts of type `image_url` hold a `data:` URL.
        encoding_format: vectors as lists of numbers, or as base64 of little-endian float32.
    """

    encoding_format: Literal["float", "base64"] = "float"


class StreamOptions(_Body):
    """Whether a streamed reply ends with a chunk that counts its tokens."""

    include_usage: bool = False


Text = Annotated[str, Field(min_length=1)]


class ChatCompletionRequest(_ChatBody):
    """
    What `/v1/chat/completions` takes: OpenAI's parameters, and of ours `num_beams` and `use_knowledge`.

    A reply to a chat that ends in an assistant's message continues that message; with vLLM's parameter
    `continue_final_message` set to false it is another message.

    Without `temperature` and `top_p` tokens are chosen as the model's own generation config says; `temperature=0` is
    greedy. A request with a `seed` is drawn alone, since draws depend on the batch.
    """

    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] = []
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    use_knowledge: bool = True
    continue_final_message: bool | None = None
    user: str | None = None  # for the provider's statistics, of which there are none
    # what clients send without meaning it
    n: Annotated[int, Field(ge=1, le=1)] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0

    def stops(self) -> tuple[str, ...]:
        """Texts at which the reply ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def decoding(self, config: GenerationConfig) -> "Decoding":
        """How tokens are to be chosen, given the model's defaults."""
        sampling: dict[str, Any] = {}
        if self.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None or self.top_p is not None:
            temperature = 1.0 if self.temperature is None else self.temperature
            sampling = {"do_sample": True, "temperature": temperature, "top_p": self.top_p, "top_k": 0}
        num_beams = self.num_beams or config.num_beams or 1
        return Decoding(
            use_knowledge=self.use_knowledge,
            num_beams=num_beams,
            max_new_tokens=self.max_new_tokens(config) if num_beams > 1 else None,
            seed=self.seed if sampling.get("do_sample", config.do_sample) else None,
            sampling=tuple(sampling.items()),
        )

    def max_new_tokens(self, config: GenerationConfig) -> int:
        """Most tokens of the reply, given the model's defaults."""
        return self.max_completion_tokens or self.max_tokens or config.max_new_tokens or DEFAULT_MAX_TOKENS


# ---- from a request to a job ----


class Decoding(NamedTuple):
    """How tokens are chosen. Jobs that agree in it share a batch."""

    use_knowledge: bool
    num_beams: int
    max_new_tokens: int | None  # beams stop together; otherwise each row stops where its own request says
    seed: int | None
    sampling: tuple[tuple[str, Any], ...]  # arguments of `generate`


class Update(NamedTuple):
    """New text of a reply, and why it ends here if it does."""

    text: str
    finish_reason: str | None
    tokens: int


@dataclass(eq=False)
class Job:
    """
    A request on its way: what the worker needs, and the way back to the one who waits for it.

    Args:
        features: tensors of one row, from the processor.
        decoding: `None` asks for the knowledge, not for a reply.
        max_new_tokens, stop: where the reply ends at the latest, and at which texts.
        deadline: when the event loop's clock says that it is too late.
        continued: whether the reply continues the chat's last message.
    """

    features: BatchFeature
    decoding: Decoding | None
    max_new_tokens: int
    stop: tuple[str, ...]
    deadline: float
    loop: asyncio.AbstractEventLoop
    continued: bool = False
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    finished: bool = False
    watcher: asyncio.Task | None = None  # kept here, for the event loop holds tasks by weak references only
    ids: list[int] = field(default_factory=list)
    text: str = ""  # what is known of the reply for sure
    sent: int = 0  # how much of it was handed out

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, placeholders among them."""
        return self.features["input_ids"].shape[1]

    def append(self, token: int, ends: bool, decode: Callable[[list[int]], str]) -> None:
        """
        Takes the next token of the reply and hands out the text that cannot change any more.

        Args:
            token: its id.
            ends: whether it is an end-of-sequence token.
            decode: ids -> text.
        """
        self.ids.append(token)
        text = decode(self.ids)
        reason = "stop" if ends else "length" if len(self.ids) >= self.max_new_tokens else None
        if found := [at for stop in self.stop if (at := text.find(stop)) >= 0]:
            text, reason = text[: min(found)], "stop"
        elif reason is None:
            text = text[: len(text) - _undecided(text, self.stop)]
        # what is white at the end waits, too: streamed and whole replies are the same
        self.text = text.rstrip() if self.continued else text.strip()
        # broken UTF-8 at the end can turn what was handed out into something else, which is then too late for a stream
        new = self.text[self.sent :]
        self.sent += len(new)
        self.finished = reason is not None
        if new or reason:
            self.emit(Update(new, reason, len(self.ids)))

    def emit(self, event: Any) -> None:
        """Hands an update, a result or an exception over to the event loop, from any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


def _undecided(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may yet change: half a character, or the beginning of a text to stop at."""
    incomplete = len(text) - len(text.rstrip("\ufffd"))
    beginnings = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(incomplete, max(beginnings, default=0))


# ---- the worker: where the model runs ----


class Worker(threading.Thread):
    """
    The thread that owns the model. It takes what waits together, oldest first, and answers it as a batch.

    Args:
        model, processor: the model and its own processor.
        max_batch: most rows of a batch.
        max_queue: most jobs that wait.
        metrics: where batches and tokens are counted.
    """

    def __init__(
        self,
        model: VikdfForConditionalGeneration,
        processor: VikdfProcessor,
        max_batch: int,
        max_queue: int,
        metrics: "Metrics",
    ):
        super().__init__(name="vikdf-worker", daemon=True)
        self.model, self.processor, self.metrics = model, processor, metrics
        self.max_batch, self.max_queue = max_batch, max_queue
        self.window = getattr(model.config.text_config, "max_position_embeddings", None)
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._tokenizing = threading.Lock()  # tokenizers keep their truncation as state

    # called from the event loop's side

    def load(self) -> tuple[int, int]:
        """How many jobs wait, and how many are being answered."""
        return len(self._waiting), len(self._running)

    def check_room(self) -> None:
        """Raises 429 while the queue is full."""
        if len(self._waiting) >= self.max_queue:
            raise HTTPException(429, "Too many requests are waiting; try again.", {"Retry-After": "1"})

    def prepare(self, body: _ChatBody, deadline: float, loop: asyncio.AbstractEventLoop) -> Job:
        """
        Reads a request into the tensors of its row.

        Raises:
            ValueError: for a chat that the processor refuses, or that leaves no room for the reply.
        """
        chat, config = body.chat(), self.model.generation_config
        decoding, new_tokens, stop = None, 0, ()
        if isinstance(body, ChatCompletionRequest):
            decoding, new_tokens, stop = body.decoding(config), body.max_new_tokens(config), body.stops()
        if self.window is not None and new_tokens >= self.window:
            raise ValueError(f"max_tokens={new_tokens} leaves no room: the model reads {self.window} tokens in all.")
        with self._tokenizing:
            features = self.processor(
                [chat],
                use_knowledge=decoding is None or decoding.use_knowledge,
                continue_final_message=getattr(body, "continue_final_message", None),
                max_length=None if self.window is None else self.window - new_tokens,
            )
        if "pixel_values" in features and self.model.vision_encoder is None:
            raise ValueError("this server has no vision encoder: it takes no pictures.")
        return Job(features, decoding, new_tokens, stop, deadline, loop, features.continued[0])

    def submit(self, job: Job) -> None:
        """
        Puts a job behind those that wait.

        Raises:
            HTTPException: 429 if the queue is full, 503 if the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise HTTPException(503, "The server is shutting down.")
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job that nobody wants any more; without effect on one that is finished."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Ends the thread after the step that it is at."""
        with self._changed:
            self._closing = True
            for job in [*self._waiting, *self._running]:
                job.cancelled = True
                job.emit(HTTPException(503, "The server is shutting down."))
            self._waiting.clear()
            self._changed.notify()

    # the thread itself

    def run(self) -> None:
        """Answers batches until it is stopped. A batch that fails fails alone."""
        while batch := self._take():
            self.metrics.observe("batch_size", len(batch))
            try:
                if batch[0].decoding is None:
                    self._find_knowledge(batch)
                else:
                    self._reply(batch)
            except Exception as error:
                log_failure(error)
                for job in batch:
                    job.emit(HTTPException(500, "The model failed to answer."))

    def _take(self) -> list[Job]:
        """Waits for jobs; the oldest one and those that can share a batch with it. Nothing once it is stopped."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or self._closing)
            for job in self._waiting:
                if job.decoding == self._waiting[0].decoding and self._fit([*self._running, job]):
                    self._running.append(job)
            self._waiting = [job for job in self._waiting if job not in self._running]
            return self._running

    def _fit(self, jobs: list[Job]) -> bool:
        """Whether jobs fit into one batch: its longest prompt must leave room for its longest reply."""
        seeded = jobs[0].decoding is not None and jobs[0].decoding.seed is not None
        length = max(job.prompt_length for job in jobs) + max(job.max_new_tokens for job in jobs)
        return len(jobs) <= (1 if seeded else self.max_batch) and (self.window is None or length <= self.window)

    def _collate(self, jobs: list[Job]) -> BatchFeature:
        """The rows of the jobs as one batch, on the model's device."""
        rows, context = [job.features for job in jobs], self.processor.context_tokenizer
        padding = {
            "input_ids": (self.processor.tokenizer.pad_token_id, "left"),  # [B, T]
            "attention_mask": (0, "left"),
            "context_input_ids": (context.pad_token_id, context.padding_side),  # [B, C]
            "context_attention_mask": (0, context.padding_side),
        }
        batch = BatchFeature(
            {
                name: pad_sequence([row[name][0] for row in rows], True, value, side)
                for name, (value, side) in padding.items()
                if name in rows[0]
            }
        )
        if shown := [row["pixel_values"] for row in rows if "pixel_values" in row]:
            nothing = torch.zeros_like(shown[0])
            batch["pixel_values"] = torch.cat([row.get("pixel_values", nothing) for row in rows])  # [B, 3, H, W]
            batch["image_mask"] = torch.tensor(["pixel_values" in row for row in rows])  # [B]
        return batch.to(self.model.device)

    @torch.no_grad()
    def _find_knowledge(self, jobs: list[Job]) -> None:
        inputs = self._collate(jobs)
        knowledge = self.model.get_knowledge(
            inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("pixel_values")
        )  # [B, m, h]
        projected = self.model.project_knowledge(knowledge)  # [B, m, d_llm]
        n = self.model.config.num_knowledge_tokens
        for row, job in enumerate(jobs):
            own = n * (1 + ("pixel_values" in job.features))  # another row's picture makes room in this one
            job.emit((knowledge[row, :own].float().cpu(), projected[row, :own].float().cpu()))

    def _reply(self, jobs: list[Job]) -> None:
        decoding, inputs = jobs[0].decoding, self._collate(jobs)
        steps = Steps(jobs, self._step)
        self.metrics.add("prompt_tokens_total", sum(job.prompt_length for job in jobs))
        with torch.random.fork_rng(enabled=decoding.seed is not None):
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed)
            sequences = self.model.generate(
                **inputs,
                max_new_tokens=max(job.max_new_tokens for job in jobs),
                num_beams=decoding.num_beams,
                num_return_sequences=1,
                return_dict_in_generate=False,
                stopping_criteria=StoppingCriteriaList([steps]),
                **dict(decoding.sampling),
            )
        # beams are known when the search is over
        for job, tokens in zip(jobs, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            for token in tokens[len(job.ids) :]:
                self._step(job, token)

    def _step(self, job: Job, token: int) -> None:
        """Gives a row its next token, unless it needs none."""
        if job.finished or job.cancelled:
            return
        self.metrics.add("completion_tokens_total")
        if not job.ids:
            self.metrics.observe("time_to_first_token_seconds", time.monotonic() - job.arrived)
        ends = self.model.generation_config.eos_token_id
        job.append(
            token,
            token in (ends if isinstance(ends, list) else [ends]),
            partial(
                self.processor.decode_behind,
                job.features["input_ids"][0, -1:].tolist() if job.continued else [],
                skip_special_tokens=True,
            ),
        )


class Steps(StoppingCriteria):
    """
    Sees a batch after each step: transformers' streamers know one row only. Hands every row its new token, and ends
    the rows that are finished or cancelled. Beams, several to a row, are only ended.

    Args:
        jobs: the rows.
        step: takes a row and its new token.
    """

    def __init__(self, jobs: list[Job], step: Callable[[Job, int], None]):
        self.jobs, self.step = jobs, step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        copies = input_ids.shape[0] // len(self.jobs)
        if copies == 1:
            for job, token in zip(self.jobs, input_ids[:, -1].tolist(), strict=True):
                self.step(job, token)
        ended = [job.finished or job.cancelled for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device).repeat_interleave(copies)  # [B * copies]


# ---- from a job to the answer ----


async def follow(job: Job, worker: Worker) -> AsyncIterator[Update]:
    """
    The updates of a reply, up to the one with a finish reason. A reply that is not done in time ends early, with the
    finish reason "length"; whoever stops listening cancels it.

    Raises:
        HTTPException: 504 if there is no word of it in time; or whatever became of it.
    """
    update = None
    try:
        while update is None or update.finish_reason is None:
            async with asyncio.timeout_at(job.deadline):
                update = await job.events.get()
            if isinstance(update, Exception):
                raise update
            yield update
    except TimeoutError:
        if update is None:
            raise HTTPException(504, "No answer in time.") from None
        yield Update("", "length", update.tokens)
    finally:
        worker.cancel(job)


async def cancel_when_client_leaves(request: Request, job: Job, worker: Worker) -> None:
    """Waits for the client to hang up, which it also does, without effect, when it has the whole answer."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    worker.cancel(job)
    job.events.put_nowait(HTTPException(CLIENT_LEFT, "The client left."))


def usage(job: Job, tokens: int) -> dict[str, int]:
    """Numbers of tokens; knowledge placeholders count as the prompt's."""
    return {
        "prompt_tokens": job.prompt_length,
        "completion_tokens": tokens,
        "total_tokens": job.prompt_length + tokens,
    }


async def server_sent_events(
    first: Update, rest: AsyncIterator[Update], job: Job, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """A reply as OpenAI streams it; `head` is what all its chunks begin with."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    async with aclosing(rest):
        try:
            update = first
            while True:
                if update.text:
                    yield event({"content": update.text})
                if update.finish_reason is not None:
                    break
                update = await anext(rest)
            yield event({}, update.finish_reason)
            if include_usage:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(job, update.tokens)})}\n\n"
        except HTTPException as error:  # the status is long sent
            yield f"data: {error_response(error.status_code, error.detail).body.decode()}\n\n"
    yield "data: [DONE]\n\n"


def encode(vectors: torch.Tensor, encoding_format: str) -> list[list[float]] | str:
    """Vectors [m, d], float32, as JSON takes them."""
    if encoding_format == "float":
        return vectors.tolist()
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


# ---- the application ----


def create_app(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    name: str = "vikdf",
    *,
    api_key: str | None = None,
    max_batch: int = 16,
    max_queue: int = 64,
    timeout: float = 60.0,
) -> FastAPI:
    """
    The server as an ASGI application, to be started once.

    Args:
        model, processor: what answers. Pictures are taken if the model's vision encoder is attached.
        name: what clients call the model.
        api_key: what clients must send as bearer token, except for `/health` and `/metrics`; `None` for nothing.
        max_batch: most replies that are generated together.
        max_queue: most requests that wait; further ones get 429.
        timeout: seconds that a request may take to arrive, and from then on its answer.

    Raises:
        ValueError: for an empty key, or limits that are not positive.
    """
    if api_key == "":
        raise ValueError("The API key is empty; leave it out to ask for none.")
    for setting, value in (("max_batch", max_batch), ("max_queue", max_queue), ("timeout", timeout)):
        if value <= 0:
            raise ValueError(f"{setting} must be positive, not {value}.")
    metrics, started = Metrics(), int(time.time())
    worker = Worker(model, processor, max_batch, max_queue, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    # no documentation pages: they load their scripts from elsewhere
    app = FastAPI(title="VIKDF", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, metrics=metrics, api_key=api_key, timeout=timeout)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        lines = []
        for each in error.errors()[:3]:
            where = ".".join(str(part) for part in each["loc"] if part != "body")[:100] or "body"
            what = "not supported by this server" if each["type"] == "extra_forbidden" else each["msg"]
            lines.append(f"{where}: {what}")
        return error_response(400, "; ".join(lines))

    async def submit(body: _ChatBody, request: Request) -> Job:
        loop = asyncio.get_running_loop()
        if body.model != name:
            raise HTTPException(404, f"There is no such model here; this is {name!r}.")
        worker.check_room()  # before any work is put into it
        try:
            job = await asyncio.to_thread(worker.prepare, body, loop.time() + timeout, loop)
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("row 0").lstrip(":, ")) from error
        worker.submit(job)
        job.watcher = asyncio.create_task(cancel_when_client_leaves(request, job, worker))
        return job

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        job = await submit(body, request)
        updates = follow(job, worker)
        first = await anext(updates)  # what fails before there is text has a status of its own
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": name,
        }
        if body.stream:
            events = server_sent_events(first, updates, job, head, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        last = [first, *[update async for update in updates]][-1]
        message = {"role": "assistant", "content": job.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return JSONResponse(head | {"choices": [choice], "usage": usage(job, last.tokens)})

    @app.post("/v1/knowledge")
    async def knowledge(body: KnowledgeRequest, request: Request) -> Response:
        job = await submit(body, request)
        try:
            async with asyncio.timeout_at(job.deadline):
                result = await job.events.get()
        except TimeoutError:
            raise HTTPException(504, "No answer in time.") from None
        finally:
            worker.cancel(job)
        if isinstance(result, Exception):
            raise result
        vectors, projected = result  # [m, h], [m, d_llm]
        answer = {
            "object": "knowledge",
            "model": name,
            "encoding_format": body.encoding_format,
            "knowledge": {"shape": list(vectors.shape), "data": encode(vectors, body.encoding_format)},
            "projected": {"shape": list(projected.shape), "data": encode(projected, body.encoding_format)},
        }
        return JSONResponse(answer)

    @app.get("/v1/models")
    async def models() -> Response:
        this = {"id": name, "object": "model", "created": started, "owned_by": "vikdf"}
        return JSONResponse({"object": "list", "data": [this]})

    @app.get("/health")
    async def health() -> Response:
        alive = worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the worker has died"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return PlainTextResponse(metrics.render(*worker.load()), media_type="text/plain; version=0.0.4")

    return app


class Metrics:
    """Counters, gauges and histograms in Prometheus' text format."""

    KINDS = {
        "requests_total": ("counter", "Answered requests by HTTP status; 499: the client left."),
        "prompt_tokens_total": ("counter", "Tokens of prompts that were read."),
        "completion_tokens_total": ("counter", "Tokens that were generated."),
        "queue_length": ("gauge", "Requests that wait."),
        "running_requests": ("gauge", "Requests that are being answered."),
        "resident_memory_bytes": ("gauge", "Memory of the server's process."),
        "batch_size": ("histogram", "Requests that were answered together."),
        "time_to_first_token_seconds": ("histogram", "From a request's arrival to its first token."),
    }
    BUCKETS = {
        "batch_size": (1, 2, 4, 8, 16, 32),
        "time_to_first_token_seconds": (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    }

    def __init__(self):
        self._lock = threading.Lock()  # the worker and the event loop both count
        self._samples: dict[str, dict[str, float]] = {name: {} for name in self.KINDS}  # name -> labels -> value
        for name, edges in self.BUCKETS.items():
            buckets = [f'_bucket{{le="{edge}"}}' for edge in (*edges, "+Inf")]
            self._samples[name] = dict.fromkeys([*buckets, "_sum", "_count"], 0)

    def add(self, name: str, value: float = 1, labels: str = "") -> None:
        """Adds to a counter."""
        with self._lock:
            self._samples[name][labels] = self._samples[name].get(labels, 0) + value

    def observe(self, name: str, value: float) -> None:
        """Enters a value into a histogram."""
        for edge in self.BUCKETS[name]:
            if value <= edge:
                self.add(name, labels=f'_bucket{{le="{edge}"}}')
        self.add(name, labels='_bucket{le="+Inf"}')
        self.add(name, value, "_sum")
        self.add(name, labels="_count")

    def render(self, queue_length: int, running_requests: int) -> str:
        """The page that Prometheus reads."""
        now = {"queue_length": queue_length, "running_requests": running_requests}
        statm = Path("/proc/self/statm")  # Linux only
        if statm.exists():
            now["resident_memory_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        lines = []
        with self._lock:
            for name, (kind, text) in self.KINDS.items():
                samples = {"": now[name]} if name in now else self._samples[name]
                lines += [f"# HELP vikdf_{name} {text}", f"# TYPE vikdf_{name} {kind}"]
                lines += [f"vikdf_{name}{labels} {value}" for labels, value in samples.items()]
        return "\n".join(lines) + "\n"


def serve(
    source: str | None = None, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None, **limits: Any
) -> None:
    """
    Loads a model and serves it until the process is told to end.

    Args:
        source: folder or Hub id of a VIKDF model, which lends it its name; `None`: the packaged one, named "vikdf".
        host, port: where to listen.
        api_key, limits: see `create_app`.

    Raises:
        OSError, ValueError: if the model cannot be loaded, or for a setting that makes no sense.
    """
    import uvicorn

    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logger.setLevel(logging.INFO)
    name = "vikdf" if source is None else Path(source).resolve().name if Path(source).is_dir() else source
    source = source or DEFAULT_CHECKPOINT
    model, processor = load_model(source)
    if processor.image_processor is not None:
        try:
            model.attach_vision_encoder()
        except OSError:
            logger.warning("The vision encoder was not found: requests with pictures are refused.")
    app = create_app(model, processor, name, api_key=api_key, **limits)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("Anyone who can reach %s:%d can use this server: it asks for no API key.", host, port)
    # uvicorn's own log would show whole addresses, with whatever stands in them
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=5)


# ---- the knowledge for a language model that runs elsewhere ----


@torch.no_grad()
def prompt_embeddings(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    messages: list[dict[str, Any]],
    max_length: int | None = None,
) -> torch.Tensor:
    """
    A chat as the LLM reads it: the embeddings of its whole prompt, chat template applied, knowledge in its place. Any
    runtime of the same LLM that takes `inputs_embeds` goes on from them. The model itself must not write the
    placeholder; elsewhere forbid `processor.knowledge_token_id`, should that be a token the LLM writes.

    Args:
        messages, max_length: as for the processor.

    Returns:
        [T, d_llm], in the LLM's own precision.

    Raises:
        TypeError, ValueError: see the processor.
    """
    inputs = processor([messages], max_length=max_length).to(model.device)
    knowledge = model.get_knowledge(
        inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("pixel_values")
    )  # [1, m, h]
    return model.embed_prompt(inputs["input_ids"], knowledge)[0]


def encode_prompt_embeddings(embeddings: torch.Tensor) -> str:
    """
    Prompt embeddings [T, d_llm] as `vllm serve --enable-prompt-embeds` takes them: the `prompt_embeds` of a completion
    request, base64 of what `torch.save` writes.

    vLLM warns that embeddings of a wrong shape may crash its engine: switch it on for trusted clients only. And what
    `torch.save` wrote is a pickle: whoever reads one from elsewhere must use `torch.load(..., weights_only=True)`.
    """
    buffer = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone(), buffer)  # cloned: a view would bring all that it looks at
    return base64.b64encode(buffer.getvalue()).decode()
