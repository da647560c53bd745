"""A request in progress: what the worker needs to know of it, and its replies as they are written.

Knows tokens, texts and where they end; nothing of models, batches and HTTP.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import BatchFeature

from .logprobs import TokenLogprobs
from .schema import Decoding


class Update(NamedTuple):
    """
    New text of a reply, the finish reason if the reply ends here, and the tokens so far.

    `index` says which of the request's replies it is; `logprobs` are those of the text's tokens, if asked for.
    """

    text: str
    finish_reason: str | None
    tokens: int
    index: int = 0
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(eq=False)
class Reply:
    """One reply of a job, as far as it is written."""

    ids: list[int] = field(default_factory=list)
    searched: int = 0  # characters of the decoded text that are known to hold no stop sequence
    text: str = ""  # the part of the reply that cannot change any more
    sent: int = 0  # characters of it that were emitted
    finished: bool = False
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)  # not emitted; where their text begins

    def pop_logprobs(self, end: int) -> list[TokenLogprobs]:
        """Those of the tokens whose text begins before a place in the decoded text."""
        told = [logprobs for start, logprobs in self.logprobs if start < end]
        self.logprobs = self.logprobs[len(told) :]
        return told


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
        num_logprobs: how many likely tokens are told beside each of the reply's own; `None` for not even these.
        client: whose request it is.
    """

    features: BatchFeature
    decoding: Decoding | None
    max_new_tokens: int
    stop: tuple[str, ...]
    deadline: float
    loop: asyncio.AbstractEventLoop
    continued: bool = False
    num_logprobs: int | None = None
    client: str | None = None
    turn: float = 0.0  # jobs with lower ones come first
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    watcher: asyncio.Task | None = None  # kept here: the event loop holds only weak references to tasks
    replies: list[Reply] = field(init=False)

    def __post_init__(self):
        self.replies = [Reply() for _ in range(1 if self.decoding is None else self.decoding.num_replies)]

    @property
    def copies(self) -> int:
        """Rows that the replies take: their beams, or the candidates that they are chosen from."""
        return 1 if self.decoding is None else max(len(self.replies), self.decoding.options)

    @property
    def seeded(self) -> bool:
        """Whether its reply is drawn from a seed of its own, so that it shares no batch."""
        return self.decoding is not None and self.decoding.seed is not None

    @property
    def finished(self) -> bool:
        """Whether all of its replies are finished."""
        return all(reply.finished for reply in self.replies)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and the longest reply, with all beams, candidates and replies."""
        return self.copies * (self.prompt_length + self.max_new_tokens)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, placeholders included."""
        return self.features["input_ids"].shape[1]

    def append(
        self,
        token: int,
        ends: bool,
        decode: Callable[[list[int]], str],
        index: int = 0,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """
        Takes the next token of a reply and emits the text that cannot change any more.

        Args:
            token: its id.
            ends: whether it is an end-of-sequence token.
            decode: ids -> text.
            index: which reply.
            logprobs: the token's.
        """
        reply = self.replies[index]
        reply.ids.append(token)
        if logprobs is not None:
            reply.logprobs.append((reply.searched, logprobs))
        text = decode(reply.ids)
        reason = "stop" if ends else "length" if len(reply.ids) >= self.max_new_tokens else None
        ends_at = (text.find(stop, max(0, reply.searched - len(stop) + 1)) for stop in self.stop)
        if positions := [at for at in ends_at if at >= 0]:
            text, reason = text[: min(positions)], "stop"
        elif reason is None:
            reply.searched = len(text.rstrip("\ufffd"))
            text = text[: len(text) - _undecided(text, self.stop)]
        # trailing white space waits, too, so that streamed and whole replies are the same
        text = text.rstrip()
        reply.text = text if self.continued else text.lstrip()
        # broken UTF-8 at the end can change text that was emitted already; a stream cannot take it back
        new = reply.text[reply.sent :]
        reply.sent += len(new)
        reply.finished = reason is not None
        if new or reason:
            self.emit(Update(new, reason, len(reply.ids), index, reply.pop_logprobs(len(text))))

    def emit(self, event: Any) -> None:
        """Passes an update, a result or an exception to the event loop, from any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


def _undecided(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may yet change: an incomplete character, or the beginning of a stop sequence."""
    incomplete = len(text) - len(text.rstrip("\ufffd"))
    return max([incomplete, *(_begun(text[max(0, len(text) - len(stop) + 1) :], stop) for stop in stops)])


def _begun(end: str, stop: str) -> int:
    """How many characters of a stop sequence the end of a text is the beginning of."""
    at = end.find(stop[0])
    while at >= 0 and not stop.startswith(end[at:]):
        at = end.find(stop[0], at + 1)
    return len(end) - at if at >= 0 else 0


__all__ = ["Job", "Reply", "Update"]
