"""Does the LLM read pictures through their knowledge? The perplexity of captions under the right and the wrong K^I.

The LLM is asked to describe a picture and scored on the first caption of each, with the knowledge of the picture
itself (`picture`), of another one (`wrong_picture`), of another of its captions (`caption`) and of another picture's
caption (`wrong_caption`). Intervals are over photographs. `knowledge_similarity` says whether an LLM that reads K^I
can read K^T: the mean cosine between the two of a pair, each less its mean over all pairs.

Example run:
    python eval/caption_perplexity.py --model outputs/smollm2/tune --data "validation-*.tar" --output captions.json
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.collators import CAPTION_INSTRUCTIONS, align_at_knowledge
from modeling_vikdf.data import load_image_text_pairs
from modeling_vikdf.evaluation import bootstrap_interval


@torch.no_grad()
def caption_losses(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, captions: list[str], knowledge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood, in nats, of each caption [B] given knowledge [B, n, h], and its tokens [B]."""
    chats = [
        [{"role": "user", "content": CAPTION_INSTRUCTIONS[0]}, {"role": "assistant", "content": caption}]
        for caption in captions
    ]
    inputs = align_at_knowledge(dict(processor(chats, return_labels=True)), processor)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}
    logits = model(**inputs, knowledge=knowledge).logits.float()  # [B, k, vocabulary]: where some row has a label
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]  # [B, T]
    targets = targets[:, (targets != -100).any(0)]  # [B, k]
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")  # [B, k]
    return losses.sum(1), (targets != -100).sum(1)


@torch.no_grad()
def main() -> None:
    """Prints and writes the perplexities, and how much lower the right knowledge's is than the wrong one's."""
    parser = argparse.ArgumentParser(description="Perplexity of captions under right and wrong knowledge.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a VIKDF model with a vision encoder")
    parser.add_argument("--data", required=True, nargs="+", help="image-text pairs with two captions or more each")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="pictures (default: all)")
    args = parser.parse_args()

    model = VikdfForConditionalGeneration.from_pretrained(args.model).eval()
    processor = VikdfProcessor.from_pretrained(args.model)
    pairs = itertools.islice(load_image_text_pairs(args.data, shuffle_buffer=0), args.limit)
    batches = iter(lambda: list(itertools.islice(pairs, args.batch_size)), [])
    captions, pictures, texts = [], [], []
    for batch in tqdm(batches, unit=" batches", desc="Knowledge"):
        captions += [pair["captions"][0] for pair in batch]
        pixels = processor.image_processor([pair["image"] for pair in batch], return_tensors="pt")["pixel_values"]
        pictures.append(model.get_image_knowledge(pixels))
        words = processor.context_tokenizer(
            [pair["captions"][1] for pair in batch], padding=True, truncation=True, return_tensors="pt"
        )
        texts.append(model.get_text_knowledge(words["input_ids"], words["attention_mask"]))
    pictures, texts = torch.cat(pictures), torch.cat(texts)  # [N, n, h]
    arms = {
        "picture": pictures,
        "wrong_picture": pictures.roll(1, 0),
        "caption": texts,
        "wrong_caption": texts.roll(1, 0),
    }
    losses = {}
    for name, knowledge in arms.items():
        rows = torch.arange(len(captions)).split(args.batch_size)
        parts = [
            caption_losses(model, processor, [captions[i] for i in some], knowledge[some])
            for some in tqdm(rows, unit=" batches", desc=name)
        ]
        losses[name], tokens = (torch.cat(each) for each in zip(*parts, strict=True))
    centred = [(each - each.mean(0)).flatten(1) for each in (texts, pictures)]  # [N, n * h]
    similarity = torch.nn.functional.cosine_similarity(*centred)  # [N]
    result = {
        "model": "/".join(Path(args.model).parts[-2:]),
        "num_pictures": len(captions),
        "knowledge_similarity": {"value": similarity.mean().item(), "confidence_95": bootstrap_interval(similarity)},
        "perplexity": {},
    }
    for name, each in losses.items():
        low, high = bootstrap_interval(each, tokens)
        ends = [torch.tensor(end).exp().item() for end in (low, high)]
        result["perplexity"][name] = {"value": (each.sum() / tokens.sum()).exp().item(), "confidence_95": ends}
    for name in ("picture", "caption"):
        gap = losses[name] - losses[f"wrong_{name}"]
        ends = (gap.sum() / tokens.sum(), *map(torch.tensor, bootstrap_interval(gap, tokens)))
        value, *interval = (100 * torch.expm1(end).item() for end in ends)
        result[f"{name}_minus_wrong_percent"] = {"value": value, "confidence_95": interval}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
