"""Replies of a language model that runs in vLLM: the knowledge is computed here, the words are generated there.

    chat -> EngineWorker: knowledge -> embeddings of the whole prompt -> the engine's /v1/completions
         -> ids of the reply's tokens as they come -> the text that the worker without an engine would make of them

Knows what vLLM's completions API takes and streams; nothing of the routes.
"""

import asyncio
import base64
import copy
import io
import json
import logging
from functools import cached_property
from typing import Any, NamedTuple

import httpx
import torch
from fastapi import HTTPException
from transformers import GenerationConfig

from .jobs import Job
from .schema import ChatBody, ChatCompletionRequest
from .worker import Worker, log_failure


logger = logging.getLogger(__name__)

# What a request may ask for; of beams and candidates one. All else must be at its default.
FORWARDED = {"model", "messages", "stream", "stream_options", "max_completion_tokens", "max_tokens", "temperature"}
FORWARDED |= {"top_p", "seed", "stop", "use_knowledge", "continue_final_message"}
FORWARDED |= {"user", "safety_identifier", "prompt_cache_key"}  # which change nothing
MIN_TEMPERATURE = 0.01  # above 0; vLLM raises what is lower
# Settings that transformers and vLLM call by the same names, with transformers' defaults.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# The other settings of a generation configuration that are honoured, or do not matter to the reply.
HONOURED = {"do_sample", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id"}
HONOURED |= {"suppress_tokens", "use_cache", "transformers_version"}
START = "start it with: vllm serve LANGUAGE_MODEL --enable-prompt-embeds"
AWAY = "The engine that runs the language model does not answer; try again."
FAILED = "The engine that runs the language model failed to answer the request."


class EngineError(ValueError):
    """The engine does not do what it should. The message may quote it, for it is sent no text."""


class Engine(NamedTuple):
    """A running vLLM: its address, the headers it wants, its model's name, and that model's window in tokens."""

    url: str
    headers: dict[str, str]
    model: str
    window: int | None


def encode_prompt_embeddings(embeddings: torch.Tensor) -> str:
    """
    Prompt embeddings [T, d_llm] as the `prompt_embeds` of a request to `vllm serve --enable-prompt-embeds`.

    They are base64 of what `torch.save` writes.

    vLLM warns that embeddings of a wrong shape may crash its engine: enable them for trusted clients only.
    `torch.save` writes a pickle: read one from an untrusted source with `torch.load(..., weights_only=True)` only.
    """
    buffer = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone(), buffer)  # cloned: a view would be saved with its whole storage
    return base64.b64encode(buffer.getvalue()).decode()


def connect(url: str, model: Any, api_key: str | None = None) -> Engine:
    """
    Asks an engine for its model, and for a token behind a prompt of one embedding.

    Args:
        url: its address, with or without `/v1`.
        model: the [`VikdfForConditionalGeneration`] whose language model it runs.
        api_key: its key.

    Raises:
        OSError: if no engine answers there.
        ValueError: if it refuses prompt embeddings, or those of this width, or returns no token ids.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    prompt = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device=model.device))  # [1, d_llm]
    probe = {"max_tokens": 1, "return_token_ids": True, "prompt_embeds": encode_prompt_embeddings(prompt)}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            served = read(client.get("/v1/models"))["data"][0]
            reply = read(client.post("/v1/completions", json={"model": served["id"], **probe}))
        if not reply["choices"][0].get("token_ids"):
            raise ValueError(f"The engine at {url} returns no token ids (return_token_ids); a newer vLLM does.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"No engine answers at {url} ({error}); {START}") from error
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"What answers at {url} is no OpenAI API; {START}") from error
    return Engine(url, headers, served["id"], served.get("max_model_len"))


def read(response: httpx.Response) -> dict[str, Any]:
    """What the engine answered. Raises `EngineError` if that is an error."""
    if response.is_success:
        return response.json()
    raise EngineError(f"The engine refuses the request: {response.status_code} {response.text[:300]}; {START}")


class EngineWorker(Worker):
    """
    The worker of a server whose language model runs in an engine; it refuses what the engine cannot do.

    Its thread computes prompt embeddings in batches; the engine's answers are read on the event loop. A request counts
    as waiting until it is answered, so that at most `max_queue` prompts are held.

    Args:
        engine: where the language model runs.
        *args: as for `Worker`.
    """

    def __init__(self, engine: Engine, *args: Any):
        super().__init__(*args)
        self.engine = engine
        self.window = min(filter(None, (self.window, engine.window)), default=None)
        self.client = httpx.AsyncClient(
            base_url=engine.url,
            headers=engine.headers,
            timeout=httpx.Timeout(None, connect=5),  # jobs have deadlines
            limits=httpx.Limits(keepalive_expiry=2),  # vLLM closes idle connections after 5 seconds
        )
        self._forwarding: dict[Job, asyncio.Task] = {}  # changed on the event loop only
        self.metrics.running_requests.set_function(self._count_running)
        config = self.model.generation_config.to_diff_dict()
        if lost := sorted(name for name in config.keys() - SAMPLING.keys() - HONOURED if config[name] is not None):
            logger.warning("The engine replies without these of the model's generation settings: %s", ", ".join(lost))

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The model's, with one reply: the engine has neither beams nor a choice among candidates."""
        config = copy.deepcopy(self.model.generation_config)
        config.num_beams = config.num_candidates = 1
        return config

    def _count_running(self) -> int:
        return len({job for batch in self._running for job in batch.jobs} | self._forwarding.keys())

    def check_room(self, preparing: int = 0) -> None:
        """Raises `HTTPException` 429 if too many requests are not answered yet."""
        super().check_room(preparing + len(self._forwarding))

    def prepare(self, body: ChatBody, deadline: float, loop: asyncio.AbstractEventLoop) -> Job:
        """As in the base class, which also raises `ValueError` for what the engine cannot do."""
        if isinstance(body, ChatCompletionRequest):
            neutral = {name: field.default for name, field in type(body).model_fields.items()}
            neutral |= {"num_beams": 1, "num_candidates": 1}
            asked = sorted(body.model_fields_set - FORWARDED)
            if refused := [name for name in asked if getattr(body, name) not in (None, neutral[name])]:
                raise ValueError(f"{', '.join(refused)}: not supported by the engine that runs the language model.")
            if body.temperature and body.temperature < MIN_TEMPERATURE:
                raise ValueError(f"temperature: must be 0, which is greedy, or at least {MIN_TEMPERATURE}.")
        return super().prepare(body, deadline, loop)

    def cancel(self, job: Job) -> None:
        """Cancels a job; that closes its connection, by which the engine knows."""
        super().cancel(job)
        task = self._forwarding.pop(job, None)
        if task is not None and not job.finished:
            task.cancel()  # once: a second time would break off the closing

    # called in the thread

    @torch.no_grad()
    def _reply(self, jobs: list[Job]) -> None:
        inputs = self._collate(jobs)
        context = (inputs.get(name) for name in ("context_input_ids", "context_attention_mask", "pixel_values"))
        knowledge = self.model.get_knowledge(*context)  # [B, m, h]; None for prompts without
        prompts = self.model.embed_prompt(inputs["input_ids"], knowledge, inputs.get("image_mask"))  # [B, T, d_llm]
        self.metrics.prompt_tokens.inc(sum(job.prompt_length for job in jobs))
        for job, prompt in zip(jobs, prompts, strict=True):  # padded on the left
            body = {**self._settings(job), "prompt_embeds": encode_prompt_embeddings(prompt[-job.prompt_length :])}
            job.loop.call_soon_threadsafe(self._start, job, json.dumps(body).encode())

    def _settings(self, job: Job) -> dict[str, Any]:
        """A completion's settings, all that the engine has defaults of its own for among them."""
        config = self.generation_config.to_dict() | dict(job.decoding.sampling)
        sampling = {name: value if config.get(name) is None else config[name] for name, value in SAMPLING.items()}
        never = [*(config["suppress_tokens"] or ())]
        if job.decoding.use_knowledge:
            never.append(self.processor.knowledge_token_id)
        vocabulary = self.model.config.text_config.vocab_size
        return {
            "model": self.engine.model,
            "max_tokens": job.max_new_tokens,
            **(sampling if config["do_sample"] else GREEDY),
            "seed": job.decoding.seed,
            "repetition_penalty": 1.0,
            "logit_bias": {str(token): -100 for token in never if token < vocabulary},
            "stop_token_ids": self.ends,
            "ignore_eos": True,  # of the engine's own
            "stream": True,
            "return_token_ids": True,
        }

    # called on the event loop

    def _start(self, job: Job, body: bytes) -> None:
        if not job.cancelled:
            self._forwarding[job] = task = job.loop.create_task(self._forward(job, body))
            task.add_done_callback(lambda _: self._forwarding.pop(job, None))

    async def _forward(self, job: Job, body: bytes) -> None:
        """Has the engine answer; what goes wrong ends the job."""
        headers = {"Content-Type": "application/json"}
        try:
            async with self.client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
                if response.is_error:
                    await response.aread()
                    read(response)
                async for line in response.aiter_lines():
                    if line.startswith("data: {") and self._append(job, json.loads(line.removeprefix("data: "))):
                        return
            if not job.finished:
                raise EngineError("The engine broke off its reply.")
        except Exception as error:
            if isinstance(error, EngineError):
                logger.error("%s", error)
            else:
                log_failure(error)
            job.emit(HTTPException(503, AWAY) if isinstance(error, httpx.HTTPError) else HTTPException(502, FAILED))

    def _append(self, job: Job, chunk: dict[str, Any]) -> bool:
        """Adds a chunk's tokens to the reply; whether the reply ends here, but not the engine's."""
        if not isinstance(choices := chunk.get("choices"), list):
            raise EngineError(f"The engine broke off its reply: {str(chunk)[:300]}")
        for token in (token for choice in choices for token in choice["token_ids"]):
            self._step(job, 0, token, None)
        return job.finished and all(choice["finish_reason"] is None for choice in choices)


__all__ = ["Engine", "EngineWorker", "connect", "encode_prompt_embeddings"]
