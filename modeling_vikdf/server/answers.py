"""The API's answers, as OpenAI's clients read them: a chat completion, whole or as server-sent events.

Knows updates of replies and JSON; nothing of requests, routes and models.
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import HTTPException
from typing_extensions import TypedDict  # typing's lacks what pydantic needs before Python 3.12

from .jobs import Job, Update
from .logprobs import TokenTexts
from .schema import error_response


# ---- what is answered: these types are the OpenAPI page's ----


class TopLogprob(TypedDict):
    """A likely token. One that is a part of a character has U+FFFD for text, and its own bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the reply, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """The tokens of a text."""

    content: list[TokenLogprob]


class Message(TypedDict):
    """A whole reply."""

    role: Literal["assistant"]
    content: str


class Choice(TypedDict):
    """One of the replies."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Usage(TypedDict):
    """Token counts; knowledge placeholders count as prompt tokens, and a prompt counts once for all its replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(TypedDict):
    """The answer to a chat that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Vectors(TypedDict):
    """Vectors [m, d]: rows of numbers, or base64 of little-endian float32."""

    shape: list[int]
    data: list[list[float]] | str


class Knowledge(TypedDict):
    """A chat's knowledge vectors [m, h], and their projections [m, d_llm], which the LLM reads."""

    object: Literal["knowledge"]
    model: str
    encoding_format: Literal["float", "base64"]
    knowledge: Vectors
    projected: Vectors


class Model(TypedDict):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The models."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """`ok`, or what is wrong."""

    status: str


class Error(TypedDict):
    """What is wrong, and whose fault it is."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: None
    code: None


class Refusal(TypedDict):
    """An error, as OpenAI's clients read it."""

    error: Error


# ---- from a job to its answer ----


def usage(job: Job, last: dict[int, Update]) -> Usage:
    """Token counts of a job whose replies have these last updates."""
    tokens = sum(update.tokens for update in last.values())
    return {
        "prompt_tokens": job.prompt_length,
        "completion_tokens": tokens,
        "total_tokens": job.prompt_length + tokens,
    }


def token_logprobs(updates: list[Update], texts: TokenTexts) -> list[TokenLogprob]:
    """The tokens of updates, as OpenAI shows them."""

    def shown(token: int, logprob: float) -> TopLogprob:
        text, its_bytes = texts(token)
        return {"token": text, "logprob": logprob, "bytes": its_bytes}

    entries = [entry for update in updates for entry in update.logprobs]
    return [
        {**shown(entry.id, entry.logprob), "top_logprobs": [shown(*likely) for likely in entry.top]}
        for entry in entries
    ]


def completion(job: Job, updates: list[Update], head: dict[str, Any], texts: TokenTexts) -> ChatCompletion:
    """The whole answer; `head` holds the fields that do not depend on the replies."""
    last = {update.index: update for update in updates}
    choices: list[Choice] = []
    for index, reply in enumerate(job.replies):
        logprobs = None
        if job.num_logprobs is not None:
            logprobs = {"content": token_logprobs([each for each in updates if each.index == index], texts)}
        message = {"role": "assistant", "content": reply.text}
        reason = last[index].finish_reason
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return {**head, "choices": choices, "usage": usage(job, last)}


async def server_sent_events(
    job: Job,
    first: Update,
    rest: AsyncIterator[Update],
    head: dict[str, Any],
    texts: TokenTexts,
    include_usage: bool,
) -> AsyncIterator[str]:
    """The answer as OpenAI streams it; `head` holds the fields that all chunks share."""

    def event(index: int, delta: dict[str, str], logprobs: Logprobs | None = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        no_usage_yet = {"usage": None} if include_usage else {}
        return f"data: {json.dumps(head | {'choices': [choice]} | no_usage_yet)}\n\n"

    for index in range(len(job.replies)):
        yield event(index, {"role": "assistant", "content": ""})
    async with aclosing(rest):
        try:
            last, update = {}, first
            while update is not None:
                last[update.index] = update
                if update.text:
                    logprobs = {"content": token_logprobs([update], texts)} if update.logprobs else None
                    yield event(update.index, {"content": update.text}, logprobs)
                if update.finish_reason is not None:
                    yield event(update.index, {}, reason=update.finish_reason)
                update = await anext(rest, None)
            if include_usage:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(job, last)})}\n\n"
        except HTTPException as error:  # the status has been sent
            yield f"data: {error_response(error.status_code, error.detail).body.decode()}\n\n"
    yield "data: [DONE]\n\n"


__all__ = ["ChatCompletion", "Health", "Knowledge", "Model", "ModelList", "Refusal"]
__all__ += ["completion", "server_sent_events"]
