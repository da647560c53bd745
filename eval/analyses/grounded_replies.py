"""How much is there to gain? Replies that a photograph stands for, with the knowledge of the photograph itself.

In each dialogue one turn was replaced by a photograph that shows what it says. That turn is scored as the reply to the
turns before it, over all words and over visual ones, with the knowledge that these turns evoke (`context`), that those
of another dialogue evoke (`wrong_context`), that of the photograph (`picture`) and of another one (`wrong_picture`).
The lead of `picture` is what a model could gain that foresees exactly what will be seen. Intervals are over
photographs.

Example run:
    python eval/analyses/grounded_replies.py --model outputs/smollm2/tune --data image_grounded_validation.jsonl \
        --pictures "train-*.tar" "validation-*.tar" --visual-words visual_words.txt --output grounded.json
"""

import argparse
import json
from io import StringIO
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.building import load_model
from modeling_vikdf.data import SkipReport, load_image_text_pairs
from modeling_vikdf.data.dialogues import as_messages
from modeling_vikdf.evaluation.arms import arm_knowledge, compute_knowledge
from modeling_vikdf.evaluation.dialogues import EvaluationSettings, prepare, score_replies
from modeling_vikdf.evaluation.statistics import bootstrap_interval


PAIRS = (("picture", "wrong_picture"), ("context", "wrong_context"), ("picture", "context"))
KINDS = ("nll", "nll_visual_words")  # in nats a token


def read_dialogues(path: Path) -> tuple[list[dict], list[str]]:
    """
    The dialogues up to the replaced turn, which is the reply, and the names of the photographs.

    Dialogues whose first turn was replaced are left out, because it replies to nothing.
    """
    dialogues, names = [], []
    for number, line in enumerate(StringIO(path.read_text(encoding="utf-8")), start=1):
        row = json.loads(line)
        end = row["replaced_index"]
        if end == 0:
            continue
        messages = as_messages(row["turns"][: end + 1], "assistant")
        dialogues.append({"key": str(number), "messages": messages, "references": [row["turns"][end]]})
        names.append(Path(row["image"]).stem)
    return dialogues, names


@torch.no_grad()
def read_pictures(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, sources: list[str], names: set[str]
) -> dict[str, torch.Tensor]:
    """
    The knowledge K^I [n, h] of the named photographs.

    Raises:
        ValueError: if photographs are missing.
    """
    known = {}
    for pair in tqdm(load_image_text_pairs(sources, shuffle_buffer=0), unit=" pictures", desc="Pictures"):
        name = Path(pair["key"]).name
        if name in names and name not in known:
            pixels = processor.pixel_values([pair["image"]])
            [known[name]] = model.get_image_knowledge(pixels.to(model.device)).cpu()
    if missing := sorted(names - set(known)):
        raise ValueError(f"{len(missing)} photographs are not in {sources}, the first is {missing[0]}.")
    return known


@torch.no_grad()
def main() -> None:
    """Prints and writes the NLL of each arm, and the differences between the arms of `PAIRS`."""
    parser = argparse.ArgumentParser(description="Replies that answer a photograph, with its knowledge or without.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a VIKDF model with a vision encoder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of turns, replaced_index and image")
    parser.add_argument("--pictures", required=True, nargs="+", help="image-text pairs among which the pictures are")
    parser.add_argument("--visual-words", required=True, help="file with a word a line")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    dialogues, names = read_dialogues(args.data)
    words = set(Path(args.visual_words).read_text(encoding="utf-8").lower().split())
    settings, report = EvaluationSettings(ranking=False, generation=False), SkipReport()
    examples, _ = prepare(model, processor, dialogues, settings, words, report)
    if len(examples) < len(dialogues):
        raise ValueError(f"Not every dialogue can be scored. {report.summary()}")
    known = read_pictures(model, processor, args.pictures, set(names))
    pictures = torch.stack([known[name] for name in names])  # [N, n, h]
    contexts = compute_knowledge(model, processor, [example.context for example in examples])  # [N, n, h]
    arms = {
        "picture": pictures,
        "wrong_picture": arm_knowledge(pictures, "shuffled", groups=names),
        "context": contexts,
        "wrong_context": arm_knowledge(contexts, "shuffled", groups=names),
    }
    tokens = torch.tensor([[example.tokens[0], sum(example.visual[0])] for example in examples])  # [N, all or visual]
    visual = [torch.tensor(example.visual[0]) for example in examples]
    losses = {}
    for name, knowledge in arms.items():
        scores = score_replies(model, processor, examples, knowledge, args.batch_size, name)
        losses[name] = -torch.tensor(
            [[reply.sum(), reply[mask].sum()] for reply, mask in zip(scores, visual, strict=True)]
        )  # [N, all or visual]
    result = {
        "model": "/".join(Path(args.model).parts[-2:]),
        "data": args.data.name,
        "num_dialogues": len(examples),
        "num_pictures": len(known),
    }
    losses |= {f"{a}_minus_{b}": losses[a] - losses[b] for a, b in PAIRS}
    for name, nlls in losses.items():
        values = nlls.sum(0) / tokens.sum(0)
        for kind, value, low, high in zip(KINDS, values, *bootstrap_interval(nlls, tokens, names), strict=True):
            result.setdefault(kind, {})[name] = {"value": value.item(), "confidence_95": [low, high]}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
