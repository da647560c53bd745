"""User text is plain text: no tokenizer reads control tokens in it.

`TextTokenizer` finds no control tokens in user text, and only the template's own in a rendered chat. `reserve_token`
chooses the placeholder among the LLM's vocabulary. Knows neither messages nor templates.
"""

import copy
import itertools
import re
import secrets
from collections.abc import Callable
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase


KNOWLEDGE_TOKEN = "<|knowledge|>"
# Names of tokens that vocabularies reserve: <empty_output>, <|reserved_special_token_0|>, [unused0], [PAD151665], ...
SPARE_TOKEN = re.compile(
    r"[<\[].*(empty_output|reserved|unused|extra_id|placeholder|dummy|pad\d+).*[>\]]", re.IGNORECASE
)
# Added tokens that are words or white space are text; all others, such as <think>, are control tokens.
WORDS = re.compile(r"[\w\s]*")
# In a rendered chat; lone surrogates, which no message contains: `whole_characters` replaces them by U+FFFD.
PLACEHOLDER, STAND_IN, FIRST_ESCAPE = "\ud800", "\ud801", 0xDC00


class TextTokenizer:
    """A copy of a tokenizer that reads user text as nothing but text.

    It finds no control tokens in a text. Those of a chat are the template's: for each the copy has a *mark*, an added
    token that nobody can guess. `encode` replaces the template's control tokens by their marks, tokenizes, and maps
    the marks back to the control tokens' ids. Template and texts are tokenized together, so the ids are the usual
    ones unless somebody typed a control token.

    In a *rendered* chat the texts are escaped: the characters that control tokens begin and end with are replaced by
    lone surrogates. So every control token in it is the template's. `PLACEHOLDER` stands for knowledge.

    Args:
        tokenizer: The tokenizer; it is not changed.
        placeholder_id: Id of the control token that `PLACEHOLDER` stands for; required to encode chats.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placeholder_id: int | None = None):
        self.truncation_side = tokenizer.truncation_side
        added = tokenizer.added_tokens_decoder.items()
        controls = {id_: token for id_, token in added if token.special or not WORDS.fullmatch(token.content)}
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.split_special_tokens = True  # permanently: setting it for one call would affect all threads
        ordinary = [AddedToken(token.content, special=True) for token in controls.values() if not token.special]
        self._tokenizer.add_tokens(ordinary, special_tokens=True)
        self._spellings = self._find_spellings(controls)

        edges = dict.fromkeys(edge for token in controls.values() for edge in _edges(token.content))
        self._escapes = {ord(edge): chr(FIRST_ESCAPE + number) for number, edge in enumerate(edges)}
        self._written = {escape: chr(edge) for edge, escape in self._escapes.items()}  # in a chat -> for the tokenizer
        self._unescapes = {ord(escape): edge for escape, edge in self._written.items()}
        self._marked: dict[int, int] = {}  # id of a mark -> id of its control token
        self._surplus: dict[int, int] = {}  # id of a mark -> characters by which it is longer than its control token
        if placeholder_id is not None:
            self._add_marks(controls, placeholder_id)
        longest_first = sorted(self._written, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _find_spellings(self, controls: dict[int, AddedToken]) -> dict[int, tuple[int, ...]]:
        """Id of each control token -> ids of its characters: some vocabularies (T5's </s>) merge these into it."""
        if not self._tokenizer.is_fast:  # slow tokenizers do not
            return {}
        spellings = {}
        for id_, token in controls.items():
            characters = self._tokenizer.convert_tokens_to_ids(list(token.content))
            spellings[id_] = tuple(char for char in characters if char is not None and char not in controls)
        return spellings

    def _add_marks(self, controls: dict[int, AddedToken], placeholder_id: int) -> None:
        marked = [*((token.content, id_) for id_, token in controls.items()), (PLACEHOLDER, placeholder_id)]
        secret = secrets.token_hex(8)
        marks = [f"{secret}{number:04x}" for number in range(len(marked))]
        flags = ("lstrip", "rstrip", "normalized")
        self._tokenizer.add_tokens(
            [
                AddedToken(mark, special=False, **{flag: getattr(controls[id_], flag) for flag in flags})
                for mark, (_, id_) in zip(marks, marked, strict=True)
            ]
        )
        for mark, (content, id_) in zip(marks, marked, strict=True):
            ids = self._tokenizer(mark, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:  # otherwise a normalizer changes the mark, and would change the control token as well
                self._written[content] = mark
                self._marked[ids[0]] = id_
                self._surplus[ids[0]] = len(mark) - len(content)

    def __deepcopy__(self, memo: dict) -> "TextTokenizer":
        return self  # immutable

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **kwargs: Any) -> dict[str, list]:
        """Tokenizes user text.

        Args:
            text: A text, or a list of texts.
            add_special_tokens: Whether to add the tokenizer's own special tokens.
            kwargs: For the tokenizer: `return_offsets_mapping`.

        Returns:
            `input_ids`, and `offset_mapping` on request: lists [T], or lists of them for a list of texts.
        """
        texts = [whole_characters(item) for item in ([text] if isinstance(text, str) else text)]
        kwargs |= {"add_special_tokens": add_special_tokens, "verbose": False}
        encoding = self._tokenizer(texts, **kwargs)
        result = {name: encoding[name] for name in ("input_ids", "offset_mapping") if name in encoding}
        framing = self._tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
        for row, ids in enumerate(encoding["input_ids"]):
            if self._count_controls(texts[row], ids) > framing:
                spelt = self._spell(texts[row], ids, add_special_tokens)
                for name, values in result.items():
                    repeated = [[value] * len(tokens) for value, tokens in zip(values[row], spelt, strict=True)]
                    values[row] = list(itertools.chain(*(spelt if name == "input_ids" else repeated)))
        return {name: values[0] for name, values in result.items()} if isinstance(text, str) else result

    def _count_controls(self, text: str, ids: list[int]) -> int:
        """Number of control tokens, not counting unknown characters."""
        control_ids = self._spellings.keys() & set(ids)
        if self._tokenizer.unk_token_id in control_ids and self._tokenizer.unk_token not in text:
            control_ids.remove(self._tokenizer.unk_token_id)
        return sum(map(ids.count, control_ids))

    def _spell(self, text: str, ids: list[int], add_special_tokens: bool) -> list[tuple[int, ...]]:
        """A text's tokens with control tokens spelt out, except those around the text and unknown characters."""
        flags = {"return_special_tokens_mask": True, "return_offsets_mapping": True, "verbose": False}
        encoding = self._tokenizer(text, add_special_tokens=add_special_tokens, **flags)
        unknown, unknown_id = self._tokenizer.unk_token, self._tokenizer.unk_token_id
        spelt = []
        tokens = zip(ids, encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
        for id_, framing, (start, stop) in tokens:
            kept = framing or (id_ == unknown_id and text[start:stop].strip() != unknown)
            spelt.append((id_,) if kept else self._spellings.get(id_, (id_,)))
        return spelt

    # ---- rendered chats ----

    def escape(self, value: Any) -> Any:
        """A value for the chat template with all strings in it escaped, so that none contains a control token."""
        return map_strings(lambda text: text.translate(self._escapes), value)

    def spell_out(self, rendered: str) -> str:
        """A rendered chat as readable text, without escapes."""
        return rendered.translate(self._unescapes)

    def encode(self, rendered: str) -> list[int]:
        """The ids of a rendered chat; control tokens come only from the template and `PLACEHOLDER`."""
        ids = self(self._with_marks(rendered), add_special_tokens=False)["input_ids"]
        return [self._marked.get(id_, id_) for id_ in ids]

    def locate(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a rendered chat, and the span (start, stop) of each token in it."""
        encoding = self(self._with_marks(rendered), add_special_tokens=False, return_offsets_mapping=True)
        spans, shift = [], 0
        for id_, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            surplus = self._surplus.get(id_, 0)
            spans.append((start - shift, stop - shift - surplus))
            shift += surplus
        return [self._marked.get(id_, id_) for id_ in encoding["input_ids"]], spans

    def _with_marks(self, rendered: str) -> str:
        return self._pattern.sub(lambda match: self._written[match[0]], rendered)


def _edges(control: str) -> tuple[str, str]:
    """The first and the last punctuation mark of a control token; escaping them destroys the token."""
    marks = [character for character in control if not character.isalnum() and not character.isspace()] or control
    return marks[0], marks[-1]


def map_strings(function: Callable[[str], str], value: Any) -> Any:
    """Applies a function to every string in nested lists and dictionaries, keys excepted."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: map_strings(function, item) for key, item in value.items()}
    return [map_strings(function, item) for item in value] if isinstance(value, (list, tuple)) else value


def whole_characters(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def encode_truncated(tokenizer: "PreTrainedTokenizerBase | TextTokenizer", text: str, limit: int) -> list[int]:
    """
    The ids of a text, special tokens included, truncated to `limit` on the tokenizer's truncation side.

    `truncation=True` would set a state of the tokenizer that all threads share, and might truncate another's text.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return ids
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    before, behind = ids[:start], ids[start + len(bare) :]
    excess = len(ids) - limit
    return before + (bare[excess:] if tokenizer.truncation_side == "left" else bare[:-excess]) + behind


def reserve_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int, wanted: str | None) -> str:
    """Makes one token the knowledge placeholder, a special token, and returns it.

    Args:
        tokenizer: The LLM's tokenizer, changed in place.
        vocab_size: Rows of the LLM's embedding.
        wanted: The token to use; None for a new one if a row is free, otherwise a reserved one.

    Raises:
        ValueError: If the token has no row, or no token is suitable.
    """
    wanted = wanted or (KNOWLEDGE_TOKEN if len(tokenizer) < vocab_size else _spare_token(tokenizer, vocab_size))
    tokenizer.add_tokens([AddedToken(wanted, normalized=False, special=True)], special_tokens=True)
    if (id_ := tokenizer.convert_tokens_to_ids(wanted)) >= vocab_size:
        raise ValueError(
            f"knowledge_token {wanted!r} would have the id {id_}, but the LLM's embedding has {vocab_size} rows and "
            "is not resized. Name a special token of its vocabulary that no text uses."
        )
    return wanted


def _spare_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """A token of the vocabulary that neither texts nor the chat template use."""
    busy = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        free = id_ < vocab_size and id_ not in busy and token not in str(tokenizer.chat_template)
        if free and (token == KNOWLEDGE_TOKEN or SPARE_TOKEN.fullmatch(token)):
            return token
    # The unknown token is suitable if unknown characters are encoded as bytes, so that no text contains it.
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in busy and unknown not in tokenizer("\U0001242b")["input_ids"]:
        return tokenizer.unk_token
    raise ValueError(
        f"The LLM's embedding has no free row beyond its {vocab_size} tokens, and none of these is reserved. Name a "
        "special token that no text uses: knowledge_token=."
    )


__all__ = ["KNOWLEDGE_TOKEN", "PLACEHOLDER", "STAND_IN", "TextTokenizer", "encode_truncated", "reserve_token"]
