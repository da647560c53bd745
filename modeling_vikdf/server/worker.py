"""Where the model runs: jobs wait in a queue, and one thread answers those with the same decoding settings as a batch.

Knows tensors, batches and the text of replies; of HTTP only the errors that a job may end with.
"""

import asyncio
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor
from .schema import ChatBody, ChatCompletionRequest, Decoding


logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 16_384  # if the window is not larger: 16 rows of 1,024 tokens

STATM = Path("/proc/self/statm")  # where Linux, and no other system, tells the memory of this process


# ---- jobs ----


class Update(NamedTuple):
    """New text of a reply, the finish reason if the reply ends here, and the tokens so far."""

    text: str
    finish_reason: str | None
    tokens: int


@dataclass(eq=False)
class Job:
    """
    A request in progress: its input for the worker, and the queue through which its results return.

    Args:
        features: tensors of one row, from the processor.
        decoding: `None` asks for the knowledge instead of a reply.
        max_new_tokens, stop: the reply's maximum length, and its stop sequences.
        deadline: on the event loop's clock.
        loop: the event loop that waits for the results.
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
    watcher: asyncio.Task | None = None  # kept here: the event loop holds only weak references to tasks
    ids: list[int] = field(default_factory=list)
    searched: int = 0  # characters of the decoded text that are known to hold no stop sequence
    text: str = ""  # the part of the reply that cannot change any more
    sent: int = 0  # characters of it that were emitted

    @property
    def copies(self) -> int:
        """Rows that the reply takes: its beams, or its candidates."""
        return 1 if self.decoding is None else self.decoding.num_beams * self.decoding.num_candidates

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, placeholders included."""
        return self.features["input_ids"].shape[1]

    def append(self, token: int, ends: bool, decode: Callable[[list[int]], str]) -> None:
        """
        Takes the next token of the reply and emits the text that cannot change any more.

        Args:
            token: its id.
            ends: whether it is an end-of-sequence token.
            decode: ids -> text.
        """
        self.ids.append(token)
        text = decode(self.ids)
        reason = "stop" if ends else "length" if len(self.ids) >= self.max_new_tokens else None
        ends_at = (text.find(stop, max(0, self.searched - len(stop) + 1)) for stop in self.stop)
        if positions := [at for at in ends_at if at >= 0]:
            text, reason = text[: min(positions)], "stop"
        elif reason is None:
            self.searched = len(text.rstrip("\ufffd"))
            text = text[: len(text) - _undecided(text, self.stop)]
        # trailing white space waits, too, so that streamed and whole replies are the same
        self.text = text.rstrip() if self.continued else text.strip()
        # broken UTF-8 at the end can change text that was emitted already; a stream cannot take it back
        new = self.text[self.sent :]
        self.sent += len(new)
        self.finished = reason is not None
        if new or reason:
            self.emit(Update(new, reason, len(self.ids)))

    def emit(self, event: Any) -> None:
        """Passes an update, a result or an exception to the event loop, from any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


def _undecided(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may yet change: an incomplete character, or the beginning of a stop sequence."""
    incomplete = len(text) - len(text.rstrip("\ufffd"))
    longest = (range(min(len(stop) - 1, len(text)), 0, -1) for stop in stops)
    beginnings = (n for stop, lengths in zip(stops, longest, strict=True) for n in lengths if text.endswith(stop[:n]))
    return max(incomplete, max(beginnings, default=0))


# ---- what is counted and logged ----


class Metrics:
    """What the server counts, in a Prometheus registry of its own: two servers in one process are counted apart."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vikdf_requests_total",
            "Requests by HTTP status; 499: the client disconnected.",
            ["status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("vikdf_prompt_tokens_total", "Prompt tokens processed.", registry=registry)
        self.completion_tokens = Counter("vikdf_completion_tokens_total", "Tokens generated.", registry=registry)
        self.queue_length = Gauge("vikdf_queue_length", "Requests waiting.", registry=registry)
        self.running_requests = Gauge("vikdf_running_requests", "Requests running.", registry=registry)
        self.batch_size = Histogram(
            "vikdf_batch_size", "Requests answered together.", registry=registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self.time_to_first_token = Histogram(
            "vikdf_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            registry=registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        if STATM.exists():
            memory = Gauge(
                "vikdf_resident_memory_bytes", "Resident memory of the server's process.", registry=registry
            )
            memory.set_function(resident_memory)


def resident_memory() -> int:
    """Bytes of memory that this process holds, on Linux."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def log_failure(error: Exception) -> None:
    """Logs type and traceback alone, for the message may quote user text."""
    logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


# ---- the worker thread ----


class Worker(threading.Thread):
    """
    The thread that owns the model. It answers waiting jobs in batches, oldest first.

    Args:
        model, processor: the model and its own processor.
        max_batch: maximum number of rows in a batch.
        max_batch_tokens: maximum number of its tokens, those of the replies, and of all beams or candidates, included.
        max_queue: maximum number of waiting jobs.
        metrics: where batches and tokens are counted, and the queue is shown.
    """

    def __init__(
        self,
        model: VikdfForConditionalGeneration,
        processor: VikdfProcessor,
        max_batch: int,
        max_batch_tokens: int | None,
        max_queue: int,
        metrics: Metrics,
    ):
        super().__init__(name="vikdf-worker", daemon=True)
        self.model, self.processor, self.metrics = model, processor, metrics
        self.max_batch, self.max_queue = max_batch, max_queue
        self.window = getattr(model.config.text_config, "max_position_embeddings", None)
        self.max_batch_tokens = max_batch_tokens or max(self.window or 0, DEFAULT_BATCH_TOKENS)
        self.progressed = time.monotonic()  # when the model last took a step, or began to work
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._tokenizing = threading.Lock()  # tokenizers keep their truncation as state
        metrics.queue_length.set_function(lambda: len(self._waiting))
        metrics.running_requests.set_function(lambda: len(self._running))

    @property
    def generation_config(self) -> GenerationConfig:
        """What holds where a request says nothing."""
        return self.model.generation_config

    # called from outside the thread

    def is_stuck(self, seconds: float) -> bool:
        """Whether the thread has died, or has jobs and has made no step for some time."""
        if self.ident is None:  # the first request of a mounted application starts it
            return False
        return not self.is_alive() or bool(self._running) and time.monotonic() - self.progressed > seconds

    def check_room(self, preparing: int = 0) -> None:
        """Raises `HTTPException` 429 while the queue is full, with those that are on their way to it."""
        if len(self._waiting) + preparing >= self.max_queue:
            raise HTTPException(429, "Too many requests are waiting; try again.", {"Retry-After": "1"})

    def prepare(self, body: ChatBody, deadline: float, loop: asyncio.AbstractEventLoop) -> Job:
        """
        Turns a request into a job, its chat into the tensors of one row.

        Raises:
            HTTPException: 413 if the chat has too much text.
            ValueError: if the processor refuses the chat, it leaves no room for the reply, or both with all beams or
                candidates exceed a batch's tokens.
        """
        if body.pictures():
            self._check_eyes()
        chat, config = body.chat(), self.generation_config
        decoding, new_tokens, stop = None, 0, ()
        if isinstance(body, ChatCompletionRequest):
            decoding, new_tokens, stop = body.decoding(config), body.max_new_tokens(config), body.stops()
        if self.window is not None and new_tokens >= self.window:
            raise ValueError(f"max_tokens={new_tokens} leaves no room: the model's window is {self.window} tokens.")
        with self._tokenizing:
            features = self.processor(
                [chat],
                use_knowledge=decoding is None or decoding.use_knowledge,
                continue_final_message=getattr(body, "continue_final_message", None),
                max_length=None if self.window is None else self.window - new_tokens,
            )
        job = Job(features, decoding, new_tokens, stop, deadline, loop, features.continued[0])
        if self._tokens([job]) > self.max_batch_tokens:
            raise ValueError(
                f"the chat's {job.prompt_length} tokens and the reply's {new_tokens}, times {job.copies} for beams or "
                f"candidates, are {self._tokens([job])} tokens; at most {self.max_batch_tokens} are processed. Send a "
                "shorter chat, or ask for fewer max_tokens, num_beams or num_candidates."
            )
        return job

    def _check_eyes(self) -> None:
        """Raises `ValueError` if the model cannot see; called before a picture is decoded."""
        if self.processor.image_processor is None:
            raise ValueError("the model was built without image_processor, so this server accepts no pictures.")
        if self.model.vision_encoder is None:
            raise ValueError("this server has no vision encoder, so it accepts no pictures.")

    @staticmethod
    def _tokens(jobs: list[Job]) -> int:
        """Tokens of a batch, which all of its rows are padded to, with all beams or candidates."""
        length = max(job.prompt_length for job in jobs) + max(job.max_new_tokens for job in jobs)
        return len(jobs) * jobs[0].copies * length

    def submit(self, job: Job) -> None:
        """
        Adds a job to the end of the queue.

        Raises:
            HTTPException: 429 if the queue is full, 503 if the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise HTTPException(503, "The server is shutting down.")
            self.check_room()
            if self.ident is None:  # a mounted application has no lifespan that starts it
                self.start()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancels a job; without effect on a finished one."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Ends the thread after its current decoding step, and all jobs with a 503."""
        with self._changed:
            self._closing = True
            for job in [*self._waiting, *self._running]:
                job.cancelled = True
                job.emit(HTTPException(503, "The server is shutting down."))
            self._waiting.clear()
            self._changed.notify()

    # called in the thread

    def run(self) -> None:
        """Answers batches until it is stopped. An error ends the jobs of its own batch only."""
        while batch := self._take():
            self.metrics.batch_size.observe(len(batch))
            try:
                if batch[0].decoding is None:
                    self._compute_knowledge(batch)
                else:
                    self._reply(batch)
            except Exception as error:
                log_failure(error)
                for job in batch:
                    job.emit(HTTPException(500, "The model failed to answer the request."))

    def _take(self) -> list[Job]:
        """Waits for jobs; returns the oldest and those that can share its batch, or an empty list once stopped."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or self._closing)
            for job in self._waiting:
                if job.decoding == self._waiting[0].decoding and self._fit([*self._running, job]):
                    self._running.append(job)
            self._waiting = [job for job in self._waiting if job not in self._running]
            self.progressed = time.monotonic()
            return self._running

    def _fit(self, jobs: list[Job]) -> bool:
        """Whether jobs fit into one batch: the longest prompt with the longest reply into the window, all into it."""
        seeded = jobs[0].decoding is not None and jobs[0].decoding.seed is not None
        length = max(job.prompt_length for job in jobs) + max(job.max_new_tokens for job in jobs)
        in_window = self.window is None or length <= self.window
        few = len(jobs) <= (1 if seeded else self.max_batch) and self._tokens(jobs) <= self.max_batch_tokens
        return in_window and few

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
        if pictures := [row["pixel_values"] for row in rows if "pixel_values" in row]:
            blank = torch.zeros_like(pictures[0])
            batch["pixel_values"] = torch.cat([row.get("pixel_values", blank) for row in rows])  # [B, 3, H, W]
            batch["image_mask"] = torch.tensor(["pixel_values" in row for row in rows])  # [B]
        return batch.to(self.model.device)

    @torch.no_grad()
    def _compute_knowledge(self, jobs: list[Job]) -> None:
        inputs = self._collate(jobs)
        knowledge = self.model.get_knowledge(
            inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("pixel_values")
        )  # [B, m, h]
        projected = self.model.project_knowledge(knowledge)  # [B, m, d_llm]
        n = self.model.config.num_knowledge_tokens
        for row, job in enumerate(jobs):
            own = n * (1 + ("pixel_values" in job.features))  # rows without a picture are padded to those with one
            job.emit((knowledge[row, :own].float().cpu(), projected[row, :own].float().cpu()))

    def _reply(self, jobs: list[Job]) -> None:
        decoding, inputs = jobs[0].decoding, self._collate(jobs)
        steps = BatchSteps(jobs, self._step, self._progress)
        self.metrics.prompt_tokens.inc(sum(job.prompt_length for job in jobs))
        with torch.random.fork_rng(enabled=decoding.seed is not None):
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed)
            sequences = self.model.generate(
                **inputs,
                max_new_tokens=max(job.max_new_tokens for job in jobs),
                num_beams=decoding.num_beams,
                num_candidates=decoding.num_candidates,
                processor=self.processor,
                num_return_sequences=1,
                return_dict_in_generate=False,
                stopping_criteria=StoppingCriteriaList([steps]),
                **dict(decoding.sampling),
            )
        # beam search, and the choice among candidates, know their tokens only at the end
        for job, tokens in zip(jobs, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            for token in tokens[len(job.ids) :]:
                self._step(job, token)

    def _progress(self) -> None:
        self.progressed = time.monotonic()

    def _step(self, job: Job, token: int) -> None:
        """Appends a token to a row's reply, unless it is finished or cancelled."""
        if job.finished or job.cancelled:
            return
        self.metrics.completion_tokens.inc()
        if not job.ids:
            self.metrics.time_to_first_token.observe(time.monotonic() - job.arrived)
        ends = self.generation_config.eos_token_id
        job.append(
            token,
            token in (ends if isinstance(ends, list) else [ends]),
            partial(
                self.processor.decode_behind,
                job.features["input_ids"][0, -1:].tolist() if job.continued else [],
                skip_special_tokens=True,
            ),
        )


class BatchSteps(StoppingCriteria):
    """
    Streams the rows of a batch, where transformers' streamers take one row only.

    It passes each row its new token, and ends rows that are finished or cancelled. With beams or candidates it
    only ends them.

    Args:
        jobs: the rows.
        step: called with a row and its new token.
        progress: called once a step.
    """

    def __init__(self, jobs: list[Job], step: Callable[[Job, int], None], progress: Callable[[], None]):
        self.jobs, self.step, self.progress = jobs, step, progress

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Which rows end, bool [B * copies], after the step that wrote the last of `input_ids` [B * copies, T]."""
        self.progress()
        copies = input_ids.shape[0] // len(self.jobs)
        if copies == 1:
            for job, token in zip(self.jobs, input_ids[:, -1].tolist(), strict=True):
                self.step(job, token)
        ended = [job.finished or job.cancelled for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device).repeat_interleave(copies)  # [B * copies]
