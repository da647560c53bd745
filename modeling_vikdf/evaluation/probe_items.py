"""Probe items: lines of JSON and templates -> questions, beginnings of replies, and choices.

Knows neither models nor tokens; probes.py scores the items.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Relation -> questions, beginnings of the reply, and texts that evoke the knowledge, of which the first is used. X is
# the subject with its article, CONTEXT a caption; a cloze marked "(action)" is only for items of that category.
TEMPLATES = {
    "color": {
        "chat": ["What color is X?"],
        "cloze": ["The color of X is", "X is usually", "In most photos, X is"],
        "k_text": ["X"],
    },
    "shape": {
        "chat": ["What shape is X?"],
        "cloze": ["The shape of X is", "Its outline is", "X is shaped like this:"],
        "k_text": ["X"],
    },
    "material": {
        "chat": ["What is X made of?"],
        "cloze": ["X is made of", "The material of X is", "X is mostly"],
        "k_text": ["X"],
    },
    "unsaid": {
        "chat": ["I have a photo. CONTEXT What else can be seen in it?"],
        "cloze": [
            "In the photo there is also a",
            "The photo also shows the",
            "(action) Somebody in the photo is",
            "(color) Something in the photo is",
            "(clothing) Somebody in the photo wears a",
        ],
        "k_text": ["CONTEXT"],
    },
}
CLOZE = re.compile(r"(?:CONTEXT )?(?:\((\w+)\) )?(.+)", re.DOTALL)  # drops the context, which is in the question
NOTHING = {"Most X": "it", "X": "it", "CONTEXT": "..."}  # subject-free replacements
FIELDS = {  # task -> required fields of its items, besides an id
    "pair": {"relation": str, "choices": list, "answer": int, "context": str},
    "choice": {"relation": str, "choices": list, "answer": int, "subject": str},
    "dist": {"relation": str, "choices": list, "answer": int, "subject": str, "dist": list},
    "rank": {"context": list, "positives": list, "adversarial": list, "random": list},
}
NEGATIVES = ("random", "adversarial")
MISSING_REPLY = "Repeated"  # DailyDialog++'s marker for a missing reply


@dataclass(frozen=True)
class Question:
    """A chat, messages as (role, content), and the beginnings of its reply that may precede a choice."""

    chat: tuple[tuple[str, str], ...]
    beginnings: tuple[str, ...] = ("",)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat as messages for the processor."""
        return [{"role": role, "content": content} for role, content in self.chat]


@dataclass
class ProbeItem:
    """
    One line of a probe's file.

    fields: its JSON object; task: see `load_items`; questions: to score; unconditional: the same without their
    subject; evoking: the chat whose words evoke the knowledge; choices: continuations to score.
    """

    fields: dict[str, Any]
    task: str
    questions: list[Question]
    unconditional: list[Question]
    evoking: Question
    choices: tuple[str, ...]

    @property
    def cluster(self) -> str:
        """The photograph, subject or id: items that share it are not independent."""
        return str(next(self.fields[key] for key in ("image", "subject", "id") if key in self.fields))

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets that the item belongs to, for breakdowns."""
        keys = ("relation", "category", "group", "text_nb_correct")
        names = ["all", *(f"{key}={str(self.fields[key]).lower()}" for key in keys if key in self.fields)]
        if "flickr8k_subject" in self.fields:
            stated, seen = self.fields.get("flickr8k_subject_and_gold"), self.fields["flickr8k_subject"]
            names.append("stated" if stated else "seen, not stated" if seen else "unseen")
        return names


def load_items(
    path: str | Path, templates: dict[str, dict[str, list[str]]] | None = None, limit: int | None = None
) -> list[ProbeItem]:
    """
    Reads a probe: JSON Lines, all of one task.

    Every item has an `id`, and further fields by its `task`:
      * "pair": `relation`, `context` (a caption), `choices`, `answer` (index of the correct choice);
      * "choice": `relation`, `subject`, `choices`, `answer`;
      * "dist": the same and `dist`, the share of people or pictures for each choice;
      * "rank", for items without `task`: `context` (turns, the last one the user's), `positives`, `adversarial` and
        `random` (replies).

    Args:
        path: the file.
        templates: relation -> `chat`, `cloze` and `k_text`, lists of templates as in `TEMPLATES` (default). `chat`
            has the questions; without it the first `k_text` is the question. The reply begins with each `cloze` of
            the item's category (those marked with it if there are any, otherwise the unmarked ones) and, if there is
            a `chat`, with the choice itself.
        limit: number of items to read; default all.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if an item is malformed, or its relation has no templates; the error names the line.
    """
    items, lines_of_ids = [], {}
    with open(path, encoding="utf-8") as lines:
        for number, line in itertools.islice(enumerate(lines, 1), limit):
            try:
                item = _read_item(json.loads(line), TEMPLATES if templates is None else templates)
                if items and item.task != items[0].task:
                    raise ValueError(f"task {item.task!r} after {items[0].task!r}; a file must have a single task.")
                if (first := lines_of_ids.setdefault(item.fields["id"], number)) != number:
                    raise ValueError(f"the id {item.fields['id']!r} is already used on line {first}.")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            items.append(item)
    if not items:
        raise ValueError(f"{path} has no items.")
    return items


def _read_item(fields: Any, templates: dict[str, dict[str, list[str]]]) -> ProbeItem:
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, not {fields!r}.")
    task = fields.get("task", "rank" if "positives" in fields else None)
    if task not in FIELDS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(FIELDS)}.")
    for key, kind in {"id": str, **FIELDS[task]}.items():
        if not isinstance(fields.get(key), kind) or fields[key] in ("", []):
            raise ValueError(f"{key!r} must be of type {kind.__name__} and not empty; got {fields.get(key)!r}.")
    if task == "rank":
        return _read_dialogue(fields)
    choices, answer, relation = fields["choices"], fields["answer"], fields["relation"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"'choices' must be two or more words, not {choices!r}.")
    if not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is {answer}, but there are {len(choices)} choices, counted from 0.")
    if task == "dist" and not (len(fields["dist"]) == len(choices) and min(fields["dist"]) >= 0 < sum(fields["dist"])):
        raise ValueError(
            f"'dist' must have a share of 0 or more for each of {len(choices)} choices: {fields['dist']}."
        )
    if relation not in templates:
        raise ValueError(f"no templates for the relation {relation!r}, only for {', '.join(templates)}.")
    words = {}
    if "subject" in fields:
        # "the" is right for countable and uncountable nouns
        noun = " ".join(filter(None, [fields.get("descriptor"), fields["subject"]]))
        words = {"Most X": f"Most {fields.get('plural') or noun}", "X": f"the {noun}"}
    if "context" in fields:
        words["CONTEXT"] = fields["context"]
    chat, cloze, k_text = (templates[relation].get(key, []) for key in ("chat", "cloze", "k_text"))
    if not k_text or not (chat or cloze):
        raise ValueError(f"the templates of the relation {relation!r} need 'k_text', and 'chat' or 'cloze'.")
    marked = [CLOZE.fullmatch(template).groups() for template in cloze]
    category = fields.get("category")
    fitting = [text for mark, text in marked if mark == category] or [text for mark, text in marked if mark is None]

    def questions(words: dict[str, str]) -> list[Question]:
        beginnings = tuple(_fill(text, words) for text in fitting) + (("",) if chat else ())
        return [Question((("user", _fill(text, words)),), beginnings) for text in chat or k_text[:1]]

    evoking = Question((("user", _fill(k_text[0], words)),))
    choices = tuple(choice.strip() for choice in choices)
    return ProbeItem(fields, task, questions(words), questions(NOTHING), evoking, choices)


def _read_dialogue(fields: dict[str, Any]) -> ProbeItem:
    """An item of the task "rank": the choices are whole replies, without a beginning."""
    for key in FIELDS["rank"]:
        if not all(isinstance(text, str) and text.strip() for text in fields[key]):
            raise ValueError(f"{key!r} must be a list of texts, not {fields[key]!r}.")
    turns, roles = fields["context"], itertools.cycle(("user", "assistant"))
    question = Question(tuple(zip(roles, reversed(turns), strict=False))[::-1])
    fields = fields | {key: [text for text in fields[key] if text != MISSING_REPLY] for key in NEGATIVES}
    choices = tuple(text.strip() for key in ("positives", *NEGATIVES) for text in fields[key])
    return ProbeItem(fields, "rank", [question], [Question((("user", NOTHING["CONTEXT"]),))], question, choices)


def _fill(template: str, words: dict[str, str]) -> str:
    """Fills a template and capitalises it; raises a ValueError if the item lacks one of its variables."""

    def word(match: re.Match) -> str:
        if match[0] not in words:
            raise ValueError(f"the template {template!r} mentions {match[0]}, which the item does not have.")
        return words[match[0]]

    text = re.sub(r"\b(Most X|X|CONTEXT)\b", word, template)
    return text[0].upper() + text[1:]


__all__ = ["TEMPLATES", "ProbeItem", "Question", "load_items"]
