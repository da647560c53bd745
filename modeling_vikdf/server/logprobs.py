"""How likely the LLM found what it wrote: recorded while it writes, and tokens as clients read them.

Knows logits and tokens; nothing of requests, batches and texts of replies.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..processing_vikdf import VikdfProcessor


LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write; as in OpenAI's API
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level vocabularies


class TokenLogprobs(NamedTuple):
    """A token that was written, its log-probability in nats, and the most likely tokens in its place with theirs."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]


class LogprobRecorder(LogitsProcessor):
    """
    Computes log-probabilities of each step, before temperature and truncation change them.

    Args:
        top: how many of the most likely tokens to tell.
    """

    def __init__(self, top: int):
        self.top = top
        self.logprobs = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the logits [R, vocabulary], and leaves them as they are."""
        self.logprobs = scores.float().log_softmax(-1).clamp(min=LOWEST)  # [R, vocabulary]
        return scores

    def read(self, tokens: torch.Tensor) -> list[TokenLogprobs]:
        """Those of the tokens [R] that these logits led to."""
        chosen = self.logprobs.gather(1, tokens[:, None])[:, 0]  # [R]
        top = self.logprobs.topk(min(self.top, self.logprobs.shape[1]))  # [R, k]
        rows = zip(tokens.tolist(), chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        return [TokenLogprobs(id_, logprob, [*zip(ids, values, strict=True)]) for id_, logprob, ids, values in rows]


class TokenTexts:
    """
    The text and the bytes of single tokens.

    A token that is part of a character has U+FFFD for text, and its bytes, which are those of the character together
    with its neighbours'.

    Args:
        processor: the model's processor.
    """

    def __init__(self, processor: VikdfProcessor):
        self._processor = processor
        # in front of each token: some decoders strip the space in front of a text's first word
        self._before = processor.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._read_once = lru_cache(maxsize=2**16)(self._read)

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """Text and bytes of a token's id; `None` for bytes that its vocabulary does not tell."""
        return self._read_once(token)

    def _read(self, token: int) -> tuple[str, list[int] | None]:
        text = self._processor.decode_behind(self._before, [token], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text, list(text.encode())
        piece = self._processor.tokenizer.convert_ids_to_tokens(token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return text, [int(byte[1], 16)]
        return text, [BYTES[character] for character in piece] if set(piece) <= BYTES.keys() else None


__all__ = ["LogprobRecorder", "TokenLogprobs", "TokenTexts"]
