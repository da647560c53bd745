"""Text dialogues from any source, as plain examples.

    JSON Lines files, Hub datasets -> load_dialogues   -> {"key", "messages", "references"}
                                   -> load_preferences -> the same, and "rejected"

This module knows the formats of a dialogue; sources.py finds and reads files.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from .sources import (
    ONCE_EACH,
    SkipReport,
    find_column,
    find_sources,
    hash_values,
    interleave,
    map_or_drop,
    name_files,
    read_records,
    replace_surrogates,
    require_example,
    stream_shards,
)


DIALOGUE_COLUMNS = ("messages", "turns", "dialogue", "dialog", "conversation")
PREFERENCE_COLUMNS = (*DIALOGUE_COLUMNS, "chosen")
BESIDE = {"references", "prompt", "rejected"}  # columns that go with those
DIALOGUES = Features(
    key=Value("string"),
    messages=List({"role": Value("string"), "content": Value("string")}),
    references=List(Value("string")),
)
PREFERENCES = Features(**DIALOGUES, rejected=Value("string"))


def load_dialogues(
    sources: Any,
    *,
    split: str = "train",
    streaming: bool = False,
    column: str | None = None,
    report: SkipReport | None = None,
) -> Dataset | IterableDataset:
    """Loads dialogues, `{"key": str, "messages": [{"role": str, "content": str}, ...], "references": [str, ...]}`.

    A source is a JSON Lines file (a path, glob, brace range or URL; plain or in gzip), a Hub dataset or an object of
    `datasets`, with
      * `turns`, a list of strings: the last is the assistant's reply, and before it user and assistant alternate, so
        that an odd number of turns begins with the assistant;
      * `turns` and `references`: several replies to the turns, the last of which is the user's;
      * `messages`, with roles; with `references` they may end with the user's message.
    In the result the last of `messages` is the assistant's reply and equals the first of `references`.

    Dialogues without a reply, without a user turn before it, with an empty turn or an unknown role, and malformed
    lines are skipped and reported. Keys are unique: `file:line`, or a hash of a Hub dataset's row.

    Args:
        sources: A source, or a list of sources.
        split: The split of Hub datasets.
        streaming: True reads while iterating, in order; False reads everything now, into memory.
        column: The column of turns or messages, if its name is unusual.
        report: Records what is skipped; by default one in a temporary folder.

    Raises:
        FileNotFoundError: If a file or Hub dataset does not exist.
        ValueError: If nothing of a source is readable, or the column is missing.
    """
    dialogues = _stream(_try_dialogue, DIALOGUES, sources, split, column, report or SkipReport())
    return dialogues if streaming else Dataset.from_list(list(dialogues), features=DIALOGUES)


def load_preferences(sources: Any, *, split: str = "train", report: SkipReport | None = None) -> Dataset:
    """Loads dialogues of which some have a reply that was rejected, `{..., "rejected": str | None}`.

    A source is one of [`load_dialogues`], in which
      * a dialogue that ends in the chosen reply may have `rejected`, the text of the other one; or
      * there are `chosen` and `rejected`, lists of messages, with their `prompt` or beginning with it (TRL's
        conversational format).
    Other dialogues have `None` as their rejected reply. Pairs whose replies are the same, or do not both follow the
    same user's turn, are skipped and reported, too.

    Args:
        sources: A source, or a list of sources.
        split: The split of Hub datasets.
        report: Records what is skipped; by default one in a temporary folder.

    Raises:
        FileNotFoundError: If a file or Hub dataset does not exist.
        ValueError: If nothing of a source is readable.
    """
    preferences = _stream(_try_preference, PREFERENCES, sources, split, None, report or SkipReport())
    return Dataset.from_list(list(preferences), features=PREFERENCES)


def _stream(
    read: Callable, features: Features, sources: Any, split: str, column: str | None, report: SkipReport
) -> IterableDataset:
    """The examples of all sources, each of them as `read(key, record, column, report)` makes it."""
    usual, beside = (PREFERENCE_COLUMNS, BESIDE) if features is PREFERENCES else (DIALOGUE_COLUMNS, {"references"})
    paths, hub = find_sources(sources, split)
    names = name_files(paths)
    shards = [(names[path], path, column, read) for path in paths]
    streams = [stream_shards(_generate_dialogues, shards, features, report)] if shards else []
    for name, dataset in hub:
        used = find_column(dataset, column, usual, name, "column")
        dataset = dataset.select_columns([used, *beside.intersection(dataset.column_names)])
        streams.append(map_or_drop(dataset, _read_row, features, name=name, column=used, read=read, report=report))
    for stream in streams:
        require_example(stream, paths + [name for name, _ in hub], report)
    return interleave(streams, stopping_strategy=ONCE_EACH)


def _generate_dialogues(
    shards: list[tuple[str, str, str | None, Callable]], report: SkipReport
) -> Iterator[dict[str, Any]]:
    """The dialogues of JSONL files given as (name, path, column, read)."""
    for name, path, column, read in shards:
        for key, record in read_records(name, path, report):
            if dialogue := read(key, record, column, report):
                yield dialogue


def _read_row(row: dict[str, Any], name: str, column: str, read: Callable, report: SkipReport) -> dict | None:
    return read(f"{name}/{hash_values(row)}", row, column, report)


def _try_dialogue(key: str, record: dict, column: str | None, report: SkipReport) -> dict[str, Any] | None:
    try:
        messages, references = _read_dialogue(record, column)
    except ValueError as error:
        return report.add(str(error), key)
    return {"key": key, "messages": messages, "references": references}


def _try_preference(key: str, record: dict, column: str | None, report: SkipReport) -> dict[str, Any] | None:
    try:
        return {"key": key, **_read_preference(record)}
    except ValueError as error:
        return report.add(str(error), key)


def _read_preference(record: dict) -> dict[str, Any]:
    """Messages, references and rejected reply; raises a ValueError as `_read_dialogue` does."""
    if record.get("chosen") is not None:
        record = _join_prompt(record)
    messages, references = _read_dialogue(record, None)
    if (rejected := record.get("rejected")) is None:
        return {"messages": messages, "references": references, "rejected": None}
    rejected = _read_text(rejected)
    if messages[-2]["role"] != "user":
        raise ValueError("replies that do not follow a user's turn")
    if rejected == messages[-1]["content"]:
        raise ValueError("the rejected reply is the chosen one")
    return {"messages": messages, "references": references, "rejected": rejected}


def _join_prompt(record: dict) -> dict[str, Any]:
    """A record with `chosen` and `rejected` messages as one with the chosen ones and the rejected reply's text."""
    prompt, chosen, rejected = record.get("prompt") or [], record["chosen"], record.get("rejected")
    if rejected is None:
        raise ValueError("a chosen reply without a rejected one")
    if not all(isinstance(part, list) and all(isinstance(each, dict) for each in part) for part in (prompt, chosen)):
        raise ValueError("a prompt or replies that are not messages")
    if not (isinstance(rejected, list) and rejected and isinstance(rejected[-1], dict)):
        raise ValueError("a prompt or replies that are not messages")
    if rejected[:-1] != chosen[:-1] or rejected[-1].get("role") != "assistant":
        raise ValueError("replies to different turns")
    return {"messages": [*prompt, *chosen], "rejected": rejected[-1].get("content")}


def _read_dialogue(record: dict[str, Any], column: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """Messages and references; raises a ValueError if the dialogue is unusable, whose text is the reason reported."""
    columns = [column] if column else DIALOGUE_COLUMNS
    turns = next(filter(None, map(record.get, columns)), None)
    if not isinstance(turns, list):
        raise ValueError("no turns")
    references = record.get("references") or []
    if not isinstance(references, list):
        raise ValueError("references that are not a list")
    references = [_read_text(reference) for reference in references]
    if all(isinstance(turn, dict) for turn in turns):
        messages = [{"role": turn.get("role"), "content": _read_text(turn.get("content"))} for turn in turns]
    else:
        messages = as_messages([_read_text(turn) for turn in turns], "user" if references else "assistant")
    if references and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": references[0]})
    roles = [message["role"] for message in messages]
    if not all(role in ("user", "assistant") for role in roles[roles[0] == "system" :]):
        raise ValueError("unknown role or misplaced system message")
    if roles[-1] != "assistant" or "user" not in roles:
        raise ValueError("no reply to a user's turn")
    reply = messages[-1]["content"]
    return messages, references if reply in references[:1] else [reply, *references]


def as_messages(turns: Sequence[str], last: str) -> list[dict[str, str]]:
    """
    Turns as messages of user and assistant, who alternate.

    Args:
        turns: what each says.
        last: whose the last turn is, "user" or "assistant".
    """
    other = {"user": "assistant", "assistant": "user"}[last]
    return [{"role": last if (len(turns) - i) % 2 else other, "content": turn} for i, turn in enumerate(turns)]


def _read_text(content: Any) -> str:
    """The stripped text of a content, a string or a list of text parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise ValueError("a turn that is not text")
    if not content.strip():
        raise ValueError("empty turn")
    return replace_surrogates(content.strip())
