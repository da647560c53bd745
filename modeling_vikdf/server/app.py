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
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration, VikdfProcessor
from ..backbones import load_model
from .schema import ChatBody, ChatCompletionRequest, KnowledgeRequest, error_response
from .worker import Job, Metrics, Update, Worker, log_failure


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
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

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, timeout: float):
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


@dataclass
class Api:
    """
    The routes: from a request's body to a job, and from what the worker makes of it to the answer.

    Args:
        name: what clients call the model.
        worker: what answers.
        metrics: what was counted.
        timeout: seconds from a request's arrival to its answer.
        started: when, in seconds since 1970.
    """

    name: str
    worker: Worker
    metrics: Metrics
    timeout: float
    started: int = field(default_factory=lambda: int(time.time()))

    async def submit(self, body: ChatBody, request: Request) -> Job:
        """
        Puts what a request asks for into the queue.

        Raises:
            HTTPException: 404 for another model, 400 for a chat that cannot be read, 413, 429 and 503 as below it.
        """
        loop = asyncio.get_running_loop()
        if body.model != self.name:
            raise HTTPException(404, f"There is no such model here; this is {self.name!r}.")
        self.worker.check_room()  # before any work is put into it
        try:
            job = await asyncio.to_thread(self.worker.prepare, body, loop.time() + self.timeout, loop)
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("row 0").lstrip(":, ")) from error
        self.worker.submit(job)
        job.watcher = asyncio.create_task(cancel_when_client_leaves(request, job, self.worker))
        return job

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A reply, whole or streamed."""
        job = await self.submit(body, request)
        updates = follow(job, self.worker)
        first = await anext(updates)  # what fails before there is text has a status of its own
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": self.name,
        }
        if body.stream:
            events = server_sent_events(first, updates, job, head, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        last = [first, *[update async for update in updates]][-1]
        message = {"role": "assistant", "content": job.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return JSONResponse(head | {"choices": [choice], "usage": usage(job, last.tokens)})

    async def knowledge(self, body: KnowledgeRequest, request: Request) -> Response:
        """The vectors that a chat evokes, and what the LLM reads of them."""
        job = await self.submit(body, request)
        try:
            async with asyncio.timeout_at(job.deadline):
                result = await job.events.get()
        except TimeoutError:
            raise HTTPException(504, "No answer in time.") from None
        finally:
            self.worker.cancel(job)
        if isinstance(result, Exception):
            raise result
        vectors, projected = result  # [m, h], [m, d_llm]
        answer = {
            "object": "knowledge",
            "model": self.name,
            "encoding_format": body.encoding_format,
            "knowledge": {"shape": list(vectors.shape), "data": encode(vectors, body.encoding_format)},
            "projected": {"shape": list(projected.shape), "data": encode(projected, body.encoding_format)},
        }
        return JSONResponse(answer)

    async def models(self) -> Response:
        """The one model that there is."""
        this = {"id": self.name, "object": "model", "created": self.started, "owned_by": "vikdf"}
        return JSONResponse({"object": "list", "data": [this]})

    async def health(self) -> Response:
        """Whether the worker lives."""
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the worker has died"}, 200 if alive else 503)

    async def metrics_page(self) -> Response:
        """The page that Prometheus reads."""
        return PlainTextResponse(self.metrics.render(*self.worker.load()), media_type="text/plain; version=0.0.4")


async def refuse(request: Request, error: StarletteHTTPException) -> Response:
    """What was raised as an HTTP error."""
    return error_response(error.status_code, error.detail, error.headers)


async def refuse_body(request: Request, error: RequestValidationError) -> Response:
    """What does not fit the schema, three faults at most."""
    lines = []
    for each in error.errors()[:3]:
        where = ".".join(str(part) for part in each["loc"] if part != "body")[:100] or "body"
        what = "not supported by this server" if each["type"] == "extra_forbidden" else each["msg"]
        lines.append(f"{where}: {what}")
    return error_response(400, "; ".join(lines))


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
    metrics = Metrics()
    worker = Worker(model, processor, max_batch, max_queue, metrics)
    api = Api(name, worker, metrics, timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    # no documentation pages: they load their scripts from elsewhere
    app = FastAPI(title="VIKDF", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, metrics=metrics, api_key=api_key, timeout=timeout)

    app.add_exception_handler(StarletteHTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.post("/v1/chat/completions")(api.chat_completions)
    app.post("/v1/knowledge")(api.knowledge)
    app.get("/v1/models")(api.models)
    app.get("/health")(api.health)
    app.get("/metrics")(api.metrics_page)
    return app


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
