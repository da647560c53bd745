"""Does the LLM read pictures through their knowledge? The perplexity of captions under the right and the wrong K^I.

The LLM is asked to describe a picture and scored on its first caption, with the knowledge of the picture itself
(`picture`), of another one (`wrong_picture`), of another of its captions (`caption`) and of another picture's caption
(`wrong_caption`). Intervals are over photographs. `knowledge_similarity` tells whether an LLM that reads K^I can read
K^T: the mean cosine between the two of a pair, after the mean of all pairs is subtracted from both.

Example run:
    python eval/analyses/caption_perplexity.py --model outputs/smollm2/tune --data "validation-*.tar" \
        --output captions.json
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vikdf.building import load_model
from modeling_vikdf.data import SkipReport, load_image_text_pairs
from modeling_vikdf.data.collators import CAPTION_INSTRUCTIONS
from modeling_vikdf.data.features import tokenize_captions
from modeling_vikdf.evaluation.arms import compute_knowledge
from modeling_vikdf.evaluation.dialogues import EvaluationSettings, prepare, score_replies
from modeling_vikdf.evaluation.statistics import bootstrap_interval


@torch.no_grad()
def main() -> None:
    """Prints and writes the perplexities, and by how much they are lower with the right knowledge."""
    parser = argparse.ArgumentParser(description="Perplexity of captions under right and wrong knowledge.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a VIKDF model with a vision encoder")
    parser.add_argument("--data", required=True, nargs="+", help="image-text pairs with two captions or more")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="pictures (default: all)")
    args = parser.parse_args()

    model, processor = load_model(args.model)
    pairs = itertools.islice(load_image_text_pairs(args.data, shuffle_buffer=0), args.limit)
    batches = iter(lambda: list(itertools.islice(pairs, args.batch_size)), [])
    dialogues, pictures, texts = [], [], []
    for batch in tqdm(batches, unit=" batches", desc="Pictures"):
        for pair in batch:
            roles = ("user", CAPTION_INSTRUCTIONS[0]), ("assistant", pair["captions"][0])
            messages = [{"role": role, "content": content} for role, content in roles]
            dialogues.append({"key": pair["key"], "messages": messages, "references": pair["captions"][:1]})
        pixels = processor.pixel_values(pair["image"] for pair in batch)
        pictures.append(model.get_image_knowledge(pixels.to(model.device)).cpu())
        texts += [ids.tolist() for ids in tokenize_captions(processor, [pair["captions"][1] for pair in batch])]
    pictures, texts = torch.cat(pictures), compute_knowledge(model, processor, texts)  # [N, n, h]
    settings, report = EvaluationSettings(ranking=False, generation=False), SkipReport()
    examples, _ = prepare(model, processor, dialogues, settings, None, report)
    if len(examples) < len(dialogues):
        raise ValueError(f"Not every caption can be scored. {report.summary()}")
    arms = {
        "picture": pictures,
        "wrong_picture": pictures.roll(1, 0),
        "caption": texts,
        "wrong_caption": texts.roll(1, 0),
    }
    tokens = torch.tensor([example.tokens[0] for example in examples])  # [N]
    losses = {}
    for name, knowledge in arms.items():
        scores = score_replies(model, processor, examples, knowledge, args.batch_size, name)
        losses[name] = -torch.stack([caption.sum() for caption in scores])  # [N]
    centred = [(knowledge - knowledge.mean(0)).flatten(1) for knowledge in (texts, pictures)]  # [N, n * h]
    similarity = torch.nn.functional.cosine_similarity(*centred)  # [N]
    result = {
        "model": "/".join(Path(args.model).parts[-2:]),
        "num_pictures": len(examples),
        "knowledge_similarity": {"value": similarity.mean().item(), "confidence_95": bootstrap_interval(similarity)},
        "perplexity": {},
    }
    for name, nlls in losses.items():
        ends = [torch.tensor(end).exp().item() for end in bootstrap_interval(nlls, tokens)]
        result["perplexity"][name] = {"value": (nlls.sum() / tokens.sum()).exp().item(), "confidence_95": ends}
    for name in ("picture", "caption"):
        gap = losses[name] - losses[f"wrong_{name}"]
        ends = (gap.sum() / tokens.sum(), *map(torch.tensor, bootstrap_interval(gap, tokens)))
        value, *interval = (100 * torch.expm1(end).item() for end in ends)
        result[f"{name}_minus_wrong_percent"] = {"value": value, "confidence_95": interval}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
