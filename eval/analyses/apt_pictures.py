"""Are the pictures that the Space shows apt? Validation captions as messages, judged by readers.

    sheet:  captions -> sheet.json: messages with the captions of the nearest pictures; scores.json, kept from readers
    choose: sheet, scores and verdicts on four fifths of the messages -> the threshold from which on pictures are shown
    tally:  sheet and verdicts on the others -> a list of messages and pictures, with the share that is apt

A reader, person or language model, sees the sheet alone and gives {"1": ["apt", "not"], ...}: of each item's pictures,
whether somebody who gets that message may well picture such a scene. Scores are not on the sheet.

Example run:
    apt="python eval/analyses/apt_pictures.py"
    $apt sheet --choosing --data validation-00000.tar --index spaces_demo/pictures --output c
    $apt choose --sheet c --judgements one.json --index spaces_demo/pictures
    $apt sheet --data validation-00000.tar --index spaces_demo/pictures --output m
    $apt tally --sheet m --judgements two.json three.json --output eval/results/space_pictures.md
"""

import argparse
import json
import math
from pathlib import Path

import torch
from picture_thresholds import SHOWN, lowest_apt

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import SkipReport, load_image_text_pairs
from modeling_vikdf.evaluation.statistics import bootstrap_interval
from modeling_vikdf.picture_index import PictureIndex, embed_texts


LOWEST = 0.65  # of scores that readers judge to choose the threshold
VERDICTS = ("apt", "not")


def sheet(args: argparse.Namespace) -> None:
    """Writes what the Space shows for validation captions; for choosing, from a low score on."""
    index = PictureIndex.load(args.index)
    model, processor = load_model(str(DEFAULT_CHECKPOINT))
    index.check_model(model)
    pairs = load_image_text_pairs(args.data, shuffle_buffer=0, report=SkipReport())
    messages = [pair["captions"][0] for number, pair in enumerate(pairs) if (number % 5 < 4) == args.choosing]
    if args.choosing:
        index.thresholds = index.thresholds._replace(picture=LOWEST)
    rows = index.nearest(embed_texts(model, processor, messages), SHOWN)
    items = [
        {"item": number, "message": message, "pictures": [list(match.note.captions) for match in row]}
        for number, (message, row) in enumerate(zip(messages, rows, strict=True), 1)
    ]
    scores = {str(number): [match.score for match in row] for number, row in enumerate(rows, 1)}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, value in (("sheet", items), ("scores", scores)):
        (args.output / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    shown = [item for item in items if item["pictures"]]
    print(f"{len(shown)} of {len(items)} messages get {sum(len(item['pictures']) for item in shown)} pictures")


def read(args: argparse.Namespace) -> tuple[list[dict], list[list[tuple[str, ...]]]]:
    """The items of a sheet, and for each item's pictures the verdicts of all readers."""
    items = json.loads((args.sheet / "sheet.json").read_text(encoding="utf-8"))
    readers = [json.loads(path.read_text(encoding="utf-8")) for path in args.judgements]
    for reader, path in zip(readers, args.judgements, strict=True):
        for item in items:
            verdicts = reader.get(str(item["item"]), [])
            if len(verdicts) != len(item["pictures"]) or set(verdicts) - {*VERDICTS}:
                raise SystemExit(f"{path}: item {item['item']} has {len(item['pictures'])} pictures, got {verdicts}")
    return items, [list(zip(*(each.get(str(item["item"]), []) for each in readers), strict=True)) for item in items]


def choose(args: argparse.Namespace) -> None:
    """Writes into the index the lowest score from which on the wanted share of the readers' verdicts is "apt"."""
    items, votes = read(args)
    scores = json.loads((args.sheet / "scores.json").read_text(encoding="utf-8"))
    judged = [
        (score, sum(verdict == "apt" for verdict in row) / len(row))
        for item, rows in zip(items, votes, strict=True)
        for score, row in zip(scores[str(item["item"])], rows, strict=True)
    ]
    scores, apt = torch.tensor(judged, dtype=torch.float64).unbind(1)  # [pictures]
    lowest, share, count = lowest_apt(scores, apt, args.apt)
    index = PictureIndex.load(args.index)
    index.thresholds = index.thresholds._replace(picture=math.floor(lowest * 1000) / 1000)
    index.save(args.index)
    print(f"from {index.thresholds.picture} on {share:.0%} of {count} are apt, of all {apt.mean():.0%}")


def tally(args: argparse.Namespace) -> None:
    """Writes the list of messages and pictures with the readers' verdicts."""
    items, votes = read(args)
    pairs = [pair for rows in votes for pair in rows]
    shown = [rows for rows in votes if rows]
    shares = [sum(verdict == "apt" for pair in rows for verdict in pair) / sum(map(len, rows)) for rows in shown]
    shares = torch.tensor(shares)  # [messages with pictures]
    low, high = bootstrap_interval(shares)
    apt = sum(verdict == "apt" for pair in pairs for verdict in pair) / sum(map(len, pairs))
    agreement = sum(len(set(pair)) == 1 for pair in pairs) / len(pairs)
    lines = [
        "# What the Space pictures",
        "",
        f"Of {len(items)} validation captions, typed as messages, {len(shown)} get pictures, {len(pairs)} in all. "
        f"{len(pairs[0])} readings by {args.reader}, blind to scores, call {apt:.0%} of them apt; the mean over "
        f"messages is {shares.mean():.0%} [{low:.0%}, {high:.0%}]. They agree on {agreement:.0%}.",
        "",
        "| message | pictures, by their first captions: apt, not, or split |",
        "|---|---|",
    ]
    marks = {pair: pair[0] if len(set(pair)) == 1 else "split" for pair in pairs}
    for item, rows in zip(items, votes, strict=True):
        cells = [f"{captions[0]} (**{marks[pair]}**)" for captions, pair in zip(item["pictures"], rows, strict=True)]
        if cells:
            lines.append(f"| {item['message']} | {'<br>'.join(cells)} |")
    nothing = [item["message"] for item in items if not item["pictures"]]
    lines += ["", "Nothing is shown for these:", "", *(f"* {message}" for message in nothing)]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[2])


def main() -> None:
    """Runs one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("sheet", help="what the Space shows for validation captions")
    step.add_argument("--data", required=True, help="validation pictures with captions")
    step.add_argument("--index", type=Path, required=True, help="folder of the picture index")
    step.add_argument(
        "--choosing", action="store_true", help="four fifths, to choose the threshold (default: the others)"
    )
    step.add_argument("--output", type=Path, required=True)
    step.set_defaults(run=sheet)
    step = steps.add_parser("choose", help="the threshold by what the readers say")
    step.add_argument("--sheet", type=Path, required=True, help="folder")
    step.add_argument("--judgements", type=Path, nargs="+", required=True)
    step.add_argument("--index", type=Path, required=True, help="folder of the picture index")
    step.add_argument("--apt", type=float, default=0.75, help="wanted share of what is shown (default: 0.75)")
    step.set_defaults(run=choose)
    step = steps.add_parser("tally", help="what the readers say")
    step.add_argument("--sheet", type=Path, required=True, help="folder")
    step.add_argument("--judgements", type=Path, nargs="+", required=True)
    step.add_argument("--reader", default="a language model (Claude)", help="who read")
    step.add_argument("--output", type=Path, required=True)
    step.set_defaults(run=tally)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
