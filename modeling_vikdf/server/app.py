"""`vikdf serve`: a VIKDF model behind OpenAI's chat API, and its knowledge for language models served elsewhere.

Reads as a request flows:

    GuardedProtocol (header, connections) -> RequestGuard (key, size, time to arrive, share) -> request body
      -> prepare (chat -> tensors of one row) -> Job
      -> Worker: the one thread that runs the model; waiting jobs with the same decoding settings form a batch
      -> BatchSteps: sees each new token of the batch, emits text, ends rows that are finished or cancelled
      -> stream_updates -> one JSON response, or server-sent events

User text is never logged: a request is one line with its route, status and duration, a failure its exception's type
and traceback without the message. Pictures come with the request; the server fetches nothing.

Knows HTTP; what a request may say is in schema.py, what is answered in answers.py, how the model answers in worker.py,
which connections end in connections.py.

Example run:
    VIKDF_API_KEY=secret vikdf serve --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer secret" \
        -H "Content-Type: application/json" \
        -d '{"model": "vikdf", "messages": [{"role": "user", "content": "It snowed all night."}], "stream": true}'
"""

import asyncio
import base64
import gc
import hmac
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import torch
from fastapi import APIRouter, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import CompileConfig

from .. import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration, VikdfProcessor
from ..building import load_model, unload_language_model
from ..modeling_compilation import compile_config_for, compiles_by_default
from ..pipeline_vikdf import prompt_embeddings as prompt_embeddings  # was here up to 0.1: for one more release
from .answers import ChatCompletion, Health, Knowledge, Model, ModelList, Refusal, completion, server_sent_events
from .engine import Engine, EngineWorker, connect
from .engine import encode_prompt_embeddings as encode_prompt_embeddings  # was here up to 0.1: for one more release
from .jobs import Job, Update
from .limits import BYTES_PER_SECOND, MAX_OPEN_BYTES, SMALL_BODY, Budget, Pace, client_network
from .logprobs import TokenTexts
from .schema import ChatBody, ChatCompletionRequest, KnowledgeRequest, error_response
from .worker import Metrics, Worker, log_failure


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
MAX_MARKS = 250_000  # brackets and colons of a body: each may begin an object, of 100 times its bytes, and takes time
REQUESTS_PER_SECOND = 4  # of a client, for each that it may have open
CLIENT_LEFT = 499  # never sent: for the log and the metrics only
ANSWERED_CHAT = {200: {"model": ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's


# ---- before a request is read ----


class RequestGuard:
    """
    The outermost ASGI middleware, but for that of other origins.

    It refuses wrong keys, bodies that are too large or too slow, and what exceeds a client's share; lets clients that
    are too fast wait; turns unexpected errors into a 500, and counts and logs every response.

    Args:
        app: the application behind it.
        metrics: where responses are counted.
        api_key: the bearer token that `/v1` requires, or `None`.
        timeout: seconds that a request may take to arrive.
        max_client_requests: requests to `/v1` that a client may have open.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, timeout: float, max_client_requests: int):
        self.app, self.metrics, self.timeout = app, metrics, timeout
        self.open_requests = Budget(math.inf, max_client_requests)
        self.open_bytes = Budget(MAX_OPEN_BYTES, MAX_OPEN_BYTES // 2)
        per_second = REQUESTS_PER_SECOND * max_client_requests
        self.request_pace = Pace(per_second, per_second)
        self.byte_pace = Pace(BYTES_PER_SECOND, MAX_BODY_BYTES)  # the largest body comes in at once
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guards an HTTP request; passes everything else on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, started, finished = time.monotonic(), 500, False, False
        reading, size, marks, deadline = True, 0, 0, asyncio.get_running_loop().time() + self.timeout
        # a mounted application's paths begin with where it is mounted
        is_api = scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1")
        client, counted, held = client_network(scope["client"]), False, 0  # `held` bytes of the body

        async def limited_receive() -> Message:
            nonlocal reading, size, marks, held, status
            try:
                async with asyncio.timeout_at(deadline if reading else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The request did not arrive in time.") from None
            body = message.get("body", b"")
            size, marks = size + len(body), marks + sum(map(body.count, (b"[", b"{", b":")))
            if size > MAX_BODY_BYTES or marks > MAX_MARKS:
                limits = f"{MAX_BODY_BYTES} bytes, or {MAX_MARKS} of '[', '{{', ':'"
                raise HTTPException(413, f"The request has more than {limits}.")
            more = min(len(body), max(0, size - SMALL_BODY))
            if more:
                await asyncio.sleep(self.byte_pace.take(client, more))
            if not self.open_bytes.take(client, more):
                raise HTTPException(503, "Too many large requests are open; try again.", {"Retry-After": "1"})
            held += more
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
            if is_api and not self._has_key(scope):
                refusal = error_response(
                    401, "A valid API key is needed: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, counted_send)
            elif {b"content-length", b"transfer-encoding"} <= dict(scope["headers"]).keys():
                # proxies and servers that disagree about where a request ends can be made to smuggle another one
                close = {"Connection": "close"}
                refusal = error_response(400, "Send Content-Length or Transfer-Encoding, not both.", close)
                await refusal(scope, receive, counted_send)
            elif is_api and not (counted := self.open_requests.take(client, 1)):
                refusal = error_response(
                    429, "Your address has too many open requests; wait for an answer.", {"Retry-After": "1"}
                )
                await refusal(scope, receive, counted_send)
            else:
                if is_api:
                    await asyncio.sleep(self.request_pace.take(client, 1))
                await self.app(scope, limited_receive, counted_send)
        except Exception as error:
            log_failure(error)
            if not started:
                await error_response(500, "Internal error.")(scope, receive, counted_send)
        finally:
            self.open_requests.give_back(client, counted)
            self.open_bytes.give_back(client, held)
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
    The updates of a job's replies, up to the one with a finish reason of each.

    Replies that are not finished by the deadline are cut there, with the finish reason "length". Closing the iterator
    cancels the job.

    Raises:
        HTTPException: 504 if no token arrives before the deadline, or the error that the job ended with.
    """
    tokens: dict[int, int] = {}  # of each reply that has some
    unfinished = dict.fromkeys(range(len(job.replies)))
    try:
        while unfinished:
            async with asyncio.timeout_at(job.deadline):
                update = await job.events.get()
            if isinstance(update, Exception):
                raise update
            tokens[update.index] = update.tokens
            if update.finish_reason is not None:
                del unfinished[update.index]
            yield update
    except TimeoutError:
        if not tokens:
            raise HTTPException(504, "No answer before the deadline.") from None
        for index in unfinished:
            yield Update("", "length", tokens.get(index, 0), index)
    finally:
        worker.cancel(job)


async def cancel_when_client_leaves(request: Request, job: Job, worker: Worker) -> None:
    """
    Cancels the job when the client disconnects, or at its deadline, for a client that does not read would keep it.

    Without effect once the response is complete.
    """
    try:
        async with asyncio.timeout_at(job.deadline):
            while (await request.receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return worker.cancel(job)
    worker.cancel(job)
    job.events.put_nowait(HTTPException(CLIENT_LEFT, "The client disconnected."))


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
    texts: TokenTexts = field(init=False)
    preparing: int = 0  # requests whose job is not yet in the worker's queue
    # a picture or a long text at a time, of a client and in all; one thread, since each keeps memory for the next one
    preparing_large: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "vikdf-prepare"))
    turns: WeakValueDictionary[str | None, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def __post_init__(self):
        self.texts = TokenTexts(self.worker.processor)

    async def submit(self, body: ChatBody, request: Request) -> Job:
        """
        Puts a request's job into the worker's queue.

        Raises:
            HTTPException: 404 for another model's name, 400 for a chat that the processor refuses, 413 for too much
                text, 429 if the queue is full, 503 if the server is shutting down.
        """
        self._check_name(body.model)
        self.worker.check_room(self.preparing)  # before any work is done
        client = client_network(request.client)
        deadline = asyncio.get_running_loop().time() + self.timeout
        self.preparing += 1
        try:
            job = await self._prepare(body, client, deadline)
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("row 0").lstrip(":, ")) from error
        finally:
            self.preparing -= 1
        job.client = client
        self.worker.submit(job)
        job.watcher = asyncio.create_task(cancel_when_client_leaves(request, job, self.worker))
        return job

    async def _prepare(self, body: ChatBody, client: str | None, deadline: float) -> Job:
        loop = asyncio.get_running_loop()
        prepare = partial(self.worker.prepare, body, deadline, loop)
        if not body.is_large():
            return await loop.run_in_executor(None, prepare)
        async with self.turns.setdefault(client, asyncio.Lock()):  # one client's second behind any other's first
            return await loop.run_in_executor(self.preparing_large, prepare)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A reply or several, whole or streamed."""
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
            events = server_sent_events(job, first, updates, head, self.texts, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)
        return JSONResponse(completion(job, [first, *[update async for update in updates]], head, self.texts))

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
    max_client_requests: int = 32,
    timeout: float = 60.0,
    allow_origins: Sequence[str] = (),
    compile: bool | CompileConfig = False,
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
        max_client_requests: maximum number of requests that an address may have open, so that one client leaves room
            for the others; further ones get 429. Four times as many are let in a second; what comes faster waits.
            Raise it where all clients come from one address.
        timeout: seconds that a request may take to arrive, and its response after that.
        allow_origins: origins whose pages a browser lets use this server, `https://example.org` or `*` for all. They
            need the key, too.
        compile: whether decoding steps are compiled before the first request is answered, or how; see the pipeline.
            Caches then have few sizes, and `max_batch_tokens` counts their tokens.
        engine: the vLLM that runs the language model, from `connect`; `None`: it runs here.

    Raises:
        ValueError: if the key is empty, a limit is not positive, an origin is none that a browser sends, or the model
            cannot be compiled.
    """
    if api_key == "":
        raise ValueError("The API key is empty; leave it out to require none.")
    limits = {
        "max_batch": max_batch,
        "max_batch_tokens": max_batch_tokens,
        "max_queue": max_queue,
        "max_client_requests": max_client_requests,
        "timeout": timeout,
    }
    for setting, value in limits.items():
        if value is not None and value <= 0:
            raise ValueError(f"{setting} must be positive, not {value}.")
    metrics = Metrics()
    if engine is not None and compile:
        raise ValueError("The engine runs the language model: compile is for one that runs here.")
    compile_config = compile_config_for(model, compile)
    new_worker = Worker if engine is None else partial(EngineWorker, engine)
    worker = new_worker(model, processor, max_batch, max_batch_tokens, max_queue, metrics, compile_config)
    api = Api(name, worker, metrics, timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()  # a mounted application has no lifespan: there the first request starts it
        await asyncio.to_thread(worker.warm.wait)
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    # no documentation pages: they load their scripts from elsewhere
    app = FastAPI(title="VIKDF", lifespan=lifespan, docs_url=None, redoc_url=None)
    guard = {"metrics": metrics, "api_key": api_key, "timeout": timeout, "max_client_requests": max_client_requests}
    app.add_middleware(RequestGuard, **guard)
    add_origins(app, allow_origins)
    app.add_exception_handler(StarletteHTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    add_routes(app, api, api_key is not None)
    return app


def add_routes(app: FastAPI, api: Api, has_key: bool) -> None:
    """Adds the routes with what the OpenAPI page says of them; it is the guard that checks the key."""
    v1 = APIRouter(
        prefix="/v1",
        responses={"4XX": {"model": Refusal}, "5XX": {"model": Refusal}},
        dependencies=[Security(HTTPBearer(auto_error=False))] if has_key else [],
    )
    v1.post("/chat/completions", responses=ANSWERED_CHAT)(api.chat_completions)
    v1.post("/knowledge", responses={200: {"model": Knowledge}})(api.knowledge)
    v1.get("/models", responses={200: {"model": ModelList}})(api.models)
    v1.get("/models/{model:path}", responses={200: {"model": Model}})(api.model)  # a Hub id contains a slash
    app.include_router(v1)
    app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})(api.health)
    app.get("/metrics", response_class=PlainTextResponse)(api.metrics_page)


def add_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """
    Lets browsers show the answers to pages of other origins.

    Raises:
        ValueError: unless all are `*`, or written as browsers send them.
    """
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}".lower()):
            raise ValueError(
                f"{origin!r} is no origin that a browser sends: write scheme, host and any port, in lower case, as in "
                "https://example.org or http://localhost:3000, or * for all."
            )
    if origins:
        app.add_middleware(  # outside the guard: browsers ask without the key first, and pages read its refusals, too
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients send many of their own
            expose_headers=("Retry-After",),
        )


def serve(
    source: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    engine_url: str | None = None,
    engine_api_key: str | None = None,
    **settings: Any,
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
        **settings: see `create_app`.

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
    engine, compile = None, False
    if engine_url is not None:
        engine = connect(engine_url, model, engine_api_key)
        unload_language_model(model)
    elif compile := compiles_by_default(model):
        logger.info("Compiling, which takes some minutes; requests are answered after that.")
    app = create_app(model, processor, name, api_key=api_key, compile=compile, engine=engine, **settings)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("Anyone who can reach %s:%d can use this server: it requires no API key.", host, port)
    if api_key is None and "*" in settings.get("allow_origins", ()):
        logger.warning("Any page in a browser on this machine can use this server: it requires no API key.")
    gc.collect()
    gc.freeze()  # or each full collection, which large bodies cause, looks at all that was imported, in 0.2 s
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
