"""`vikdf serve`: a VIKDF model behind OpenAI's chat API, and its knowledge for language models served elsewhere.

Reads as a request flows:

    GuardedProtocol (header, connections) -> RequestGuard (key, size, time to arrive) -> request body
      -> prepare (chat -> tensors of one row) -> Job
      -> Worker: the one thread that runs the model; waiting jobs with the same decoding settings form a batch
      -> BatchSteps: sees each new token of the batch, emits text, ends rows that are finished or cancelled
      -> stream_updates -> one JSON response, or server-sent events

User text is never logged: a request is one line with its route, status and duration, a failure its exception's type
and traceback without the message. Pictures come with the request; the server fetches nothing.

Knows HTTP; what a request may say is in schema.py, how the model answers it in worker.py, which connections end
in connections.py.

Example run:
    VIKDF_API_KEY=secret vikdf serve --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer secret" \
        -H "Content-Type: application/json" \
        -d '{"model": "vikdf", "messages": [{"role": "user", "content": "It snowed all night."}], "stream": true}'
"""

import asyncio
import base64
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration, VikdfProcessor
from ..building import load_model, unload_language_model
from ..pipeline_vikdf import prompt_embeddings as prompt_embeddings  # was here up to 0.1: for one more release
from .engine import Engine, EngineWorker, connect
from .engine import encode_prompt_embeddings as encode_prompt_embeddings  # was here up to 0.1: for one more release
from .schema import ChatBody, ChatCompletionRequest, KnowledgeRequest, error_response
from .worker import Job, Metrics, Update, Worker, log_failure


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
CLIENT_LEFT = 499  # never sent: for the log and the metrics only
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's


# ---- before a request is read ----


class RequestGuard:
    """
    The outermost ASGI middleware.

    It refuses wrong keys and bodies that are too large or too slow, turns unexpected errors into a 500, and counts and
    logs every response.

    Args:
        app: the application behind it.
        metrics: where responses are counted.
        api_key: the bearer token that `/v1` requires, or `None`.
        timeout: seconds that a request may take to arrive.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, timeout: float):
        self.app, self.metrics, self.timeout = app, metrics, timeout
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guards an HTTP request; passes everything else on."""
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
            # a mounted application's paths begin with where it is mounted
            if scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1") and not self._has_key(scope):
                refusal = error_response(
                    401, "A valid API key is needed: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, counted_send)
            elif {b"content-length", b"transfer-encoding"} <= dict(scope["headers"]).keys():
                # proxies and servers that disagree about where a request ends can be made to smuggle another one
                close = {"Connection": "close"}
                refusal = error_response(400, "Send Content-Length or Transfer-Encoding, not both.", close)
                await refusal(scope, receive, counted_send)
            else:
                await self.app(scope, limited_receive, counted_send)
        except Exception as error:
            log_failure(error)
            if not started:
                await error_response(500, "Internal error.")(scope, receive, counted_send)
        finally:
            self.metrics.requests.labels(status=status).inc()
            # the route's path, not the request's, which may hold anything
            path = scope["route"].path if "route" in scope else "-"
            logger.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - start)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.expected is None or hmac.compare_digest(given, self.expected)  # in constant time


# ---- from a job to the response ----


async def stream_updates(job: Job, worker: Worker) -> AsyncIterator[Update]:
    """
    The updates of a reply, up to the one with a finish reason.

    A reply that is not finished by its deadline is cut there, with the finish reason "length". Closing the iterator
    cancels the job.

    Raises:
        HTTPException: 504 if no token arrives before the deadline, or the error that the job ended with.
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
            raise HTTPException(504, "No answer before the deadline.") from None
        yield Update("", "length", update.tokens)
    finally:
        worker.cancel(job)


async def cancel_when_client_leaves(request: Request, job: Job, worker: Worker) -> None:
    """Cancels the job when the client disconnects; without effect once the response is complete."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    worker.cancel(job)
    job.events.put_nowait(HTTPException(CLIENT_LEFT, "The client disconnected."))


def usage(job: Job, tokens: int) -> dict[str, int]:
    """Token counts; knowledge placeholders count as prompt tokens."""
    return {
        "prompt_tokens": job.prompt_length,
        "completion_tokens": tokens,
        "total_tokens": job.prompt_length + tokens,
    }


async def server_sent_events(
    first: Update, rest: AsyncIterator[Update], job: Job, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """A reply as OpenAI streams it; `head` holds the fields that all chunks share."""

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
        except HTTPException as error:  # the status has been sent
            yield f"data: {error_response(error.status_code, error.detail).body.decode()}\n\n"
    yield "data: [DONE]\n\n"


def encode(vectors: torch.Tensor, encoding_format: str) -> list[list[float]] | str:
    """Vectors [m, d], float32, as lists of numbers or as base64 of little-endian bytes."""
    if encoding_format == "float":
        return vectors.tolist()
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


# ---- the routes ----


@dataclass
class Api:
    """
    The routes: from a request's body to a job, and from the job's result to the response.

    Args:
        name: the model's name in requests and responses.
        worker: the thread that runs the model.
        metrics: what `/metrics` shows.
        timeout: seconds from a request's arrival to its response.
        started: Unix time, which `/v1/models` shows.
    """

    name: str
    worker: Worker
    metrics: Metrics
    timeout: float
    started: int = field(default_factory=lambda: int(time.time()))
    preparing: int = 0  # requests whose job is not yet in the worker's queue
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a picture is decoded

    async def submit(self, body: ChatBody, request: Request) -> Job:
        """
        Puts a request's job into the worker's queue.

        Raises:
            HTTPException: 404 for another model's name, 400 for a chat that the processor refuses, 413 for too much
                text, 429 if the queue is full, 503 if the server is shutting down.
        """
        loop = asyncio.get_running_loop()
        self._check_name(body.model)
        self.worker.check_room(self.preparing)  # before any work is done
        deadline = loop.time() + self.timeout
        self.preparing += 1
        try:
            async with self.looking if body.pictures() else nullcontext():  # one large picture at a time
                job = await asyncio.to_thread(self.worker.prepare, body, deadline, loop)
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("row 0").lstrip(":, ")) from error
        finally:
            self.preparing -= 1
        self.worker.submit(job)
        job.watcher = asyncio.create_task(cancel_when_client_leaves(request, job, self.worker))
        return job

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A reply, whole or streamed."""
        job = await self.submit(body, request)
        updates = stream_updates(job, self.worker)
        first = await anext(updates)  # an error before the first text sets the status
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": self.name,
        }
        if body.stream:
            events = server_sent_events(first, updates, job, head, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)
        last = [first, *[update async for update in updates]][-1]
        message = {"role": "assistant", "content": job.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return JSONResponse(head | {"choices": [choice], "usage": usage(job, last.tokens)})

    async def knowledge(self, body: KnowledgeRequest, request: Request) -> Response:
        """A chat's knowledge vectors, and their projections, which the LLM reads."""
        job = await self.submit(body, request)
        try:
            async with asyncio.timeout_at(job.deadline):
                result = await job.events.get()
        except TimeoutError:
            raise HTTPException(504, "No answer before the deadline.") from None
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
        """The list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, model: str) -> Response:
        """The one model."""
        self._check_name(model)
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "vikdf"}

    def _check_name(self, model: str) -> None:
        if model != self.name:
            raise HTTPException(404, f"This server has no such model; it serves {self.name!r}.")

    async def health(self) -> Response:
        """200 while the worker answers, or waits for a request; 503 if it died, or hangs longer than a reply may."""
        if self.worker.is_stuck(self.timeout):
            return JSONResponse({"status": "the model has made no progress, or its thread has died"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_page(self) -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def refuse(request: Request, error: StarletteHTTPException) -> Response:
    """An HTTP error as OpenAI's clients read it."""
    return error_response(error.status_code, error.detail, error.headers)


async def refuse_body(request: Request, error: RequestValidationError) -> Response:
    """A body that does not fit the schema: a 400 that names its first three errors."""
    lines = []
    for fault in error.errors()[:3]:
        where = ".".join(str(part) for part in fault["loc"] if part != "body")[:100] or "body"
        what = "not supported by this server" if fault["type"] == "extra_forbidden" else fault["msg"]
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
    max_batch_tokens: int | None = None,
    max_queue: int = 64,
    timeout: float = 60.0,
    engine: Engine | None = None,
) -> FastAPI:
    """
    The server as an ASGI application, which can be started once, or mounted in another one.

    Args:
        model: the model to serve; pictures are accepted if its vision encoder is attached.
        processor: its processor.
        name: the model's name in requests and responses.
        api_key: bearer token that clients must send, except for `/health` and `/metrics`; `None` for none.
        max_batch: maximum number of replies generated together.
        max_batch_tokens: maximum number of tokens processed together: prompts and replies, times beams or candidates.
            Memory grows with it: the LLM caches a key and a value of each token in each layer. Requests that exceed
            it alone are refused. By default the LLM's window, so that each chat fits, or 16,384 if that is more.
        max_queue: maximum number of waiting requests; further ones get 429.
        timeout: seconds that a request may take to arrive, and its response after that.
        engine: the vLLM that runs the language model, from `connect`; `None`: it runs here.

    Raises:
        ValueError: if the key is empty, or a limit is not positive.
    """
    if api_key == "":
        raise ValueError("The API key is empty; leave it out to require none.")
    limits = {
        "max_batch": max_batch,
        "max_batch_tokens": max_batch_tokens,
        "max_queue": max_queue,
        "timeout": timeout,
    }
    for setting, value in limits.items():
        if value is not None and value <= 0:
            raise ValueError(f"{setting} must be positive, not {value}.")
    metrics = Metrics()
    new_worker = Worker if engine is None else partial(EngineWorker, engine)
    worker = new_worker(model, processor, max_batch, max_batch_tokens, max_queue, metrics)
    api = Api(name, worker, metrics, timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()  # a mounted application has no lifespan: there the first request starts it
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    # no documentation pages: they load their scripts from elsewhere
    app = FastAPI(title="VIKDF", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(RequestGuard, metrics=metrics, api_key=api_key, timeout=timeout)
    app.add_exception_handler(StarletteHTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.post("/v1/chat/completions")(api.chat_completions)
    app.post("/v1/knowledge")(api.knowledge)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{model:path}")(api.model)  # a Hub id contains a slash
    app.get("/health")(api.health)
    app.get("/metrics")(api.metrics_page)
    return app


def serve(
    source: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    engine_url: str | None = None,
    engine_api_key: str | None = None,
    **limits: Any,
) -> None:
    """
    Loads a model and serves it until the process is terminated.

    Args:
        source: folder or Hub id of a VIKDF model, also the name to serve it by; `None`: the packaged one, as "vikdf".
        host: address to listen on.
        port: port to listen on.
        api_key: see `create_app`.
        engine_url: address of a vLLM that runs the same language model with `--enable-prompt-embeds`.
        engine_api_key: the key that it requires.
        **limits: see `create_app`.

    Raises:
        OSError, ValueError: if the model cannot be loaded, the engine does not answer or cannot take its prompts, or a
            setting is out of range.
    """
    import uvicorn

    from .connections import BACKLOG, GuardedProtocol

    if not 0 <= port <= 65_535:
        raise ValueError(f"--port must be between 0 (any that is free) and 65535, not {port}.")
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
    engine = None
    if engine_url is not None:
        engine = connect(engine_url, model, engine_api_key)
        unload_language_model(model)
    app = create_app(model, processor, name, api_key=api_key, engine=engine, **limits)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("Anyone who can reach %s:%d can use this server: it requires no API key.", host, port)
    # uvicorn's own access log would show whole URLs, whatever they contain
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=GuardedProtocol,
        backlog=BACKLOG,
        ws="none",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
