"""How high a score must be for a picture or caption of the Space's index to suit a message, by validation captions.

Each validation picture's first caption is a message. What the index finds is called apt if one of its captions (of the
picture; or the caption found) has a content word in common with the message: colours, clothes, people and postures do
not count. On the even messages the lowest threshold is chosen at which the wanted share of what is shown is apt; the
odd ones measure it. The thresholds are written into the index. It prints the figures, and messages with what is shown.

Example run:
    python eval/analyses/picture_thresholds.py --data flickr8k/validation-00000.tar --index spaces_demo/pictures
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import torch

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import SkipReport, load_image_text_pairs
from modeling_vikdf.picture_index import PictureIndex, Thresholds, embed_texts


SHOWN = 3  # of pictures, and of captions
COMMON = frozenset(
    """a an the this that there it its his her hers him he she they their them some and or of on in into onto at to
    with without by from for as up down off out over under above below between through across around along near
    next beside behind front back top side end middle is are be been being was were has have has having do does
    doing can while who which what where one two three four five several many few other others another each both
    all very no not white black red blue green yellow orange pink purple brown grey gray gold golden silver dark
    light bright colorful color colored large small big little tall long short old young man men woman women boy
    boys girl girls child children kid kids baby toddler person people guy guys lady ladies group couple crowd
    wearing wear wears dressed shirt shirts pants shorts jacket coat hat dress clothes suit sitting sits sit
    standing stands stand holding holds hold looking looks look going goes go getting gets get taking takes take
    making makes make posing poses pose background picture photo image view camera close closeup something
    someone""".split()
)


def content_words(text: str) -> set[str]:
    """Stems of the words that say what is to be seen."""
    return {stem(word) for word in re.findall("[a-z]+", text.lower()) if word not in COMMON and len(word) > 2}


def stem(word: str) -> str:
    """A word without its ending, so that "running", "runs" and "run" are one."""
    for ending in ("ing", "ies", "es", "s", "ed", "er"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word.rstrip("ey")


def lowest_apt(scores: torch.Tensor, apt: torch.Tensor, wanted: float) -> tuple[float, float, int]:
    """The lowest score from which on at least the wanted share is apt; that share, and of how many pictures."""
    order = scores.argsort(descending=True)
    shares = apt[order].float().cumsum(0) / torch.arange(1, len(order) + 1)
    reached = (shares >= wanted).nonzero()
    if not len(reached):
        raise SystemExit(f"No threshold makes {wanted:.0%} of what is shown apt.")
    last = int(reached[-1])
    return scores[order[last]].item(), shares[last].item(), last + 1


def choose(scores: torch.Tensor, apt: torch.Tensor, wanted: float) -> float:
    """The lowest score of what is apt, rounded up to 0.001."""
    return (lowest_apt(scores, apt, wanted)[0] * 1000 + 1) // 1 / 1000


def figures(scores: torch.Tensor, apt: torch.Tensor, threshold: float) -> dict[str, float]:
    """Share of messages [B, k] for which something is shown, and of what is shown that is apt."""
    shown = scores >= threshold
    return {
        "threshold": threshold,
        "messages_with_any": shown.any(1).float().mean().item(),
        "apt": apt[shown].float().mean().item(),
        "apt_without_threshold": apt.float().mean().item(),
    }


def main() -> None:
    """Writes the thresholds into the index and prints how apt the pictures and captions are that reach them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="validation pictures with captions")
    parser.add_argument("--index", type=Path, required=True, help="folder of the picture index")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="VIKDF model that embedded the index")
    parser.add_argument("--apt", type=float, default=0.8, help="wanted share of what is shown (default: 0.8)")
    parser.add_argument("--list", type=int, default=50, help="measured messages to list (default: 50)")
    args = parser.parse_args()

    index = PictureIndex.load(args.index)
    model, processor = load_model(str(args.model))
    index.check_model(model)
    pairs = load_image_text_pairs(args.data, shuffle_buffer=0, report=SkipReport())
    messages = [pair["captions"][0] for pair in pairs]
    embeddings = embed_texts(model, processor, messages)

    index.thresholds = None
    said = [content_words(message) for message in messages]
    pictures, captions = index.nearest(embeddings, SHOWN), index.nearest_captions(embeddings, SHOWN)
    found = {
        "picture": [[(match.score, " ".join(match.note.captions)) for match in row] for row in pictures],
        "caption": [[(score, caption) for caption, score in row] for row in captions],
    }
    report, lowest = {}, {}
    for kind, rows in found.items():
        scores = torch.tensor([[score for score, _ in row] for row in rows])  # [B, k]
        apt = [[bool(said[i] & content_words(text)) for _, text in row] for i, row in enumerate(rows)]
        apt = torch.tensor(apt)  # [B, k]
        lowest[kind] = choose(scores[::2].flatten(), apt[::2].flatten(), args.apt)
        report[kind] = figures(scores[1::2], apt[1::2], lowest[kind])
    index.thresholds = Thresholds(**lowest)
    index.save(args.index)
    print(json.dumps({"messages": len(messages[1::2]), **report}, indent=2))
    for i in itertools.islice(range(1, len(messages), 2), args.list):
        print(f"\n{messages[i]}")
        for match in index.nearest(embeddings[i : i + 1], SHOWN)[0]:
            print(f"    picture {match.score:.2f} {match.title}")
        for caption, score in index.nearest_captions(embeddings[i : i + 1], SHOWN)[0]:
            print(f"    caption {score:.2f} {caption}")


if __name__ == "__main__":
    main()
