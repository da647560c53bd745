"""Where the model runs: jobs wait in a queue, and one thread answers those with the same decoding settings as a batch.

A batch can be interrupted before each pass of the LLM, and long prompts are read in pieces. There a batch that nobody
waits for any more ends, and short jobs that arrived meanwhile are answered, as a batch of their own.

Knows tensors, batches and the text of replies; of HTTP only the errors that a job may end with.
"""

import asyncio
import copy
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BatchFeature,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..modeling_compilation import SHORTEST, next_size, warm_up
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor
from .jobs import Job
from .limits import Pace
from .logprobs import LogprobRecorder, TokenLogprobs
from .schema import ChatBody, ChatCompletionRequest, Decoding


logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 16_384  # if the window is not larger: 16 rows of 1,024 tokens

# Tokens of prompts that the LLM reads in one pass, by the device's type: a GPU is no faster with fewer.
PIECE_TOKENS = {"cpu": 512, "cuda": 4096}
UNDISTURBED = 0.25  # seconds that an interrupted batch then runs for each second of the interruption

STATM = Path("/proc/self/statm")  # where Linux, and no other system, tells the memory of this process


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


class Abandoned(Exception):
    """Nobody waits for any row of a batch any more."""


@dataclass(eq=False)
class Batch:
    """
    Jobs that are answered together.

    Args:
        jobs: one a row.
        undisturbed_until: when the next short jobs may go between its passes, on the monotonic clock.
    """

    jobs: list[Job]
    undisturbed_until: float = 0.0


class Worker(threading.Thread):
    """
    The thread that owns the model. It answers waiting jobs in batches, each client's oldest first.

    Args:
        model, processor: the model and its own processor.
        max_batch: maximum number of rows in a batch.
        max_batch_tokens: maximum number of its tokens, those of the replies, and of all beams or candidates, included.
        max_queue: maximum number of waiting jobs.
        metrics: where batches and tokens are counted, and the queue is shown.
        compile_config: how decoding steps are compiled; `None` if they are not. Beam search never is.
    """

    def __init__(
        self,
        model: VikdfForConditionalGeneration,
        processor: VikdfProcessor,
        max_batch: int,
        max_batch_tokens: int | None,
        max_queue: int,
        metrics: Metrics,
        compile_config: CompileConfig | None = None,
    ):
        super().__init__(name="vikdf-worker", daemon=True)
        self.compile_config, self.warm = compile_config, threading.Event()
        self.model, self.processor, self.metrics = model, processor, metrics
        self.max_batch, self.max_queue = max_batch, max_queue
        self.window = getattr(model.config.text_config, "max_position_embeddings", None)
        self.max_batch_tokens = max_batch_tokens or max(self.window or 0, DEFAULT_BATCH_TOKENS)
        self.progressed = time.monotonic()  # when the model last took a step, or began to work
        self._waiting: list[Job] = []
        self._running: list[Batch] = []  # the first was interrupted for the second, and so on
        self._changed = threading.Condition()
        self._closing = False
        # start-time fair queueing: tokens in place of seconds, of which as many have passed as were served to a client
        self._served = 0.0
        self._turns = Pace(1, 0, clock=lambda: self._served)
        # tokenizers keep their truncation as state, so one chat at a time uses them; large ones use a copy, so that no
        # other waits for them
        processors = {False: processor, True: copy.deepcopy(processor)}
        self._preparing = {large: (each, threading.Lock()) for large, each in processors.items()}
        metrics.queue_length.set_function(lambda: len(self._waiting))
        metrics.running_requests.set_function(lambda: sum(len(batch.jobs) for batch in self._running))

    @property
    def generation_config(self) -> GenerationConfig:
        """What holds where a request says nothing."""
        return self.model.generation_config

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end a reply."""
        ends = self.generation_config.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

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
        decoding, new_tokens, stop, num_logprobs = None, 0, (), None
        if isinstance(body, ChatCompletionRequest):
            decoding, new_tokens, stop = body.decoding(config), body.max_new_tokens(config), body.stops()
            num_logprobs = body.num_logprobs(decoding.num_beams)
            if body.n > self.max_batch:
                raise ValueError(f"n={body.n} replies; this server writes at most {self.max_batch} at once.")
        if self.window is not None and new_tokens >= self.window:
            raise ValueError(f"max_tokens={new_tokens} leaves no room: the model's window is {self.window} tokens.")
        processor, alone = self._preparing[body.is_large()]
        with alone:
            features = processor(
                [chat],
                use_knowledge=decoding is None or decoding.use_knowledge,
                continue_final_message=getattr(body, "continue_final_message", None),
                max_length=None if self.window is None else self.window - new_tokens,
            )
        job = Job(features, decoding, new_tokens, stop, deadline, loop, features.continued[0], num_logprobs)
        if self._tokens([job]) > self.max_batch_tokens:
            raise ValueError(
                f"the chat's {job.prompt_length} tokens and the reply's {new_tokens}, times {job.copies} for beams, "
                f"candidates or replies, are {self._tokens([job])} tokens; at most {self.max_batch_tokens} are "
                "processed. Send a shorter chat, or ask for less by max_tokens, n, num_beams or num_candidates."
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
        return len(jobs) * jobs[0].copies * Worker._length(jobs)

    @staticmethod
    def _length(jobs: list[Job]) -> int:
        """Tokens of the longest prompt, and of the longest reply."""
        return max(job.prompt_length for job in jobs) + max(job.max_new_tokens for job in jobs)

    def submit(self, job: Job) -> None:
        """
        Adds a job to the queue, in which clients take turns so that each may ask for as many tokens as any other.

        Raises:
            HTTPException: 429 if the queue is full, 503 if the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise HTTPException(503, "The server is shutting down.")
            self.check_room()
            if self.ident is None:  # a mounted application has no lifespan that starts it
                self.start()
            if not (self._waiting or self._running):  # nobody is owed anything by a server that has nothing to do
                self._turns.due.clear()
            job.turn = self._served + self._turns.take(job.client, job.tokens)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancels a job; without effect on a finished one."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Ends the thread before the LLM's next pass, and all jobs with a 503."""
        with self._changed:
            self._closing = True
            for job in [*self._waiting, *(job for batch in self._running for job in batch.jobs)]:
                job.cancelled = True
                job.emit(HTTPException(503, "The server is shutting down."))
            self._waiting.clear()
            self._changed.notify()

    # called in the thread

    def run(self) -> None:
        """Compiles, then answers batches until it is stopped. An error ends the jobs of its own batch only."""
        if self.compile_config is not None:
            self._compile()
        self.warm.set()
        decoder = self.model.language_model.base_model
        # a hook would be compiled, too: then nothing goes between the passes
        hook = decoder.register_forward_pre_hook(self._before_pass) if self.compile_config is None else None
        while self._wait():
            self._answer(lambda job: self.max_batch_tokens)
        if hook is not None:
            hook.remove()

    def _compile(self) -> None:
        """Compiles in this thread: no other could replay what it records on a GPU. Goes on without if that fails."""
        batches = [2**i for i in range(self.max_batch.bit_length())]
        try:
            warm_up(self.model, self.processor, batches, self.compile_config, self.max_batch_tokens)
        except Exception as error:
            log_failure(error)
            logger.error("The model could not be compiled: replies are decoded without that.")
            self.compile_config = None

    def _wait(self) -> bool:
        """Waits for jobs; false once it is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return not self._closing

    def _answer(self, max_tokens: Callable[[Job], int]) -> None:
        """Answers the next job whose batch may have its tokens, and those that can share it, if there is one."""
        batch = self._take(max_tokens)
        if not batch.jobs:
            return
        self.metrics.batch_size.observe(len(batch.jobs))
        try:
            if batch.jobs[0].decoding is None:
                self._compute_knowledge(batch.jobs)
            else:
                self._reply(batch.jobs)
        except Abandoned:
            pass
        except Exception as error:
            log_failure(error)
            for job in batch.jobs:
                job.emit(HTTPException(500, "The model failed to answer the request."))
        finally:
            with self._changed:
                self._running.remove(batch)

    def _take(self, max_tokens: Callable[[Job], int]) -> Batch:
        """The first job that fits, and those that fit into its batch, as the batch that runs; none if none fits."""
        jobs: list[Job] = []
        with self._changed:
            for job in sorted(self._waiting, key=lambda job: job.turn):
                if (not jobs or job.decoding == jobs[0].decoding) and self._fit([*jobs, job], max_tokens(job)):
                    jobs.append(job)
            self._waiting = [job for job in self._waiting if job not in jobs]
            batch = Batch(jobs)
            if jobs:
                self._running.append(batch)
                self._served = max(self._served, jobs[0].turn - jobs[0].tokens)
        self.progressed = time.monotonic()
        return batch

    def _before_pass(self, *_: Any) -> None:
        """
        Called before each pass of the LLM: ends a batch that nobody waits for, and lets short jobs go first.

        See `_limits_between` for which, and `UNDISTURBED` for how the time is shared.

        Raises:
            Abandoned: if every job of the batch is finished or cancelled.
        """
        if threading.current_thread() is not self:  # somebody else uses the same model
            return
        batch, now = self._running[-1], time.monotonic()
        self.progressed = now
        if all(job.finished or job.cancelled for job in batch.jobs):
            raise Abandoned
        if self._waiting and now >= batch.undisturbed_until:
            self._interrupt(batch)
            end = time.monotonic()
            batch.undisturbed_until = end + UNDISTURBED * (end - now)

    def _limits_between(self, batch: Batch) -> Callable[[Job], int]:
        """
        How many tokens a batch between the passes of another one may have.

        It is a quarter of one of its rows: what is not much shorter waits, and shares a batch, which is faster for
        all. For a client that waits for none of its rows it is a quarter of them all, as long as it has had no more
        tokens than those who do, and nothing after that.
        """
        turns = {job.client: job.turn for job in batch.jobs if not (job.finished or job.cancelled)}  # the last of each
        tokens = self._tokens(batch.jobs)

        def max_tokens(job: Job) -> int:
            if job.client in turns or not turns:
                return tokens // len(batch.jobs) // 4
            return tokens // 4 if job.turn <= min(turns.values()) else 0

        return max_tokens

    def _interrupt(self, batch: Batch) -> None:
        with torch.random.fork_rng(enabled=batch.jobs[0].seeded):
            if batch.jobs[0].seeded:
                torch.seed()  # for numbers of their own
            self._answer(self._limits_between(batch))

    def _fit(self, jobs: list[Job], max_tokens: int) -> bool:
        """Whether jobs fit into a batch of so many tokens, and the longest prompt and reply of any into the window."""
        if jobs[0].seeded and len(jobs) > 1:
            return False
        length = self._length(jobs)
        in_window = self.window is None or length <= self.window
        replies, tokens = sum(len(job.replies) for job in jobs), self._tokens(jobs)
        if self.compile_config is not None and len(jobs) > 1:  # of the static cache
            tokens = next_size(len(jobs) * jobs[0].copies) * next_size(length, SHORTEST)
        return in_window and replies <= self.max_batch and tokens <= max_tokens

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
        steps, compiled = BatchSteps(jobs, self._step, self._progress), self._compiled(decoding)
        rows, columns = inputs["input_ids"].shape
        piece = PIECE_TOKENS.get(self.model.device.type, PIECE_TOKENS["cuda"]) // rows
        self.metrics.prompt_tokens.inc(sum(job.prompt_length for job in jobs))
        with torch.random.fork_rng(enabled=decoding.seed is not None):
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed)
            sequences = self.model.generate(
                **inputs,
                **compiled,
                max_new_tokens=max(job.max_new_tokens for job in jobs),
                num_beams=decoding.num_beams,
                num_candidates=decoding.num_candidates,
                processor=self.processor,
                num_return_sequences=decoding.num_replies,
                return_dict_in_generate=False,
                prefill_chunk_size=max(1, piece) if columns > piece and not compiled else None,
                logits_processor=LogitsProcessorList([steps.recorder] if steps.recorder else []),
                stopping_criteria=StoppingCriteriaList([steps]),
                **dict(decoding.sampling),
            )
        steps.finish(sequences, columns)

    def _compiled(self, decoding: Decoding) -> dict[str, Any]:
        """The arguments of `generate` by which it compiles, if it does."""
        if self.compile_config is None or decoding.num_beams > 1:
            return {}
        return {"cache_implementation": "static", "compile_config": self.compile_config}

    def _progress(self) -> None:
        self.progressed = time.monotonic()

    def _step(self, job: Job, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """Appends a token to a reply, unless it is finished or cancelled."""
        if job.replies[index].finished or job.cancelled:
            return
        self.metrics.completion_tokens.inc()
        if not any(reply.ids for reply in job.replies):
            self.metrics.time_to_first_token.observe(time.monotonic() - job.arrived)
        if job.num_logprobs is None:
            logprobs = None  # another job of the batch asks for them
        else:
            logprobs = logprobs._replace(top=logprobs.top[: job.num_logprobs])
        job.append(
            token,
            token in self.ends,
            partial(
                self.processor.decode_behind,
                job.features["input_ids"][0, -1:].tolist() if job.continued else [],
                skip_special_tokens=True,
            ),
            index,
            logprobs,
        )


class BatchSteps(StoppingCriteria):
    """
    Streams the rows of a batch, where transformers' streamers take one row only.

    It passes each reply its new token, and ends rows that are finished or cancelled. Beams and candidates it only
    ends; `finish` passes on what is chosen among them.

    Args:
        jobs: those of the batch, whose decoding is the same.
        step: called with a job, which of its replies, its new token and that token's log-probabilities, if any job
            asks for these.
        progress: called once a step.

    Attributes:
        recorder: the logits processor that `generate` needs for them, or `None`.
    """

    def __init__(
        self,
        jobs: list[Job],
        step: Callable[[Job, int, int, TokenLogprobs | None], None],
        progress: Callable[[], None],
    ):
        self.jobs, self.step, self.progress = jobs, step, progress
        self.replies = [(job, index) for job in jobs for index in range(len(job.replies))]
        self.chooses = jobs[0].decoding.options > 1
        asked = [job.num_logprobs for job in jobs if job.num_logprobs is not None]
        self.recorder = LogprobRecorder(max(asked)) if asked else None
        self.recorded: list[list[TokenLogprobs]] = []  # a list of all rows for each step
        self.written: torch.Tensor | None = None  # prompts and replies of all rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Which rows end, bool [R], after the step that wrote the last of `input_ids` [R, T]."""
        self.progress()
        newest = input_ids[:, -1]  # [R]
        logprobs = [None] * len(newest) if self.recorder is None else self.recorder.read(newest)
        if self.chooses:
            self.recorded.append(logprobs)  # of candidates; it is known in the end which are the replies
            self.written = input_ids
            copies = len(newest) // len(self.jobs)  # a beam search looks at more than its beams
            ended = [job.cancelled for job in self.jobs for _ in range(copies)]
        else:
            for (job, index), *told in zip(self.replies, newest.tolist(), logprobs, strict=True):
                self.step(job, index, *told)
            ended = [job.cancelled or job.replies[index].finished for job, index in self.replies]
        return torch.tensor(ended, device=input_ids.device)

    def finish(self, sequences: torch.Tensor, start: int) -> None:
        """Passes on the replies that were chosen among beams or candidates, `sequences` [B * n, T] from `start` on."""
        if not self.chooses:
            return
        for (job, index), sequence in zip(self.replies, sequences, strict=True):
            row = None if self.recorder is None else self._row(job, sequence)
            for place, token in enumerate(sequence[start:].tolist()):
                self.step(job, index, token, None if row is None else self.recorded[place][row])

    def _row(self, job: Job, sequence: torch.Tensor) -> int:
        """The candidate that a chosen sequence [T] is."""
        first = self.jobs.index(job) * job.copies
        candidates = self.written[first : first + job.copies, : len(sequence)]  # [copies, T]
        return first + int((candidates == sequence).all(1).nonzero()[0])
