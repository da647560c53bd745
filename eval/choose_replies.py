"""Pairs of replies, the first and the last of several of the language model's own: what knowledge can learn from.

    dialogues, each without its last turn -> candidates of the LLM alone, without those that would make the others wait
        -> the first and the last of them, as the reward head ranks them

One that has reached the longest length is among them, behind all that ended, so it is often the one rejected.

The LLM alone speaks, without knowledge, so that what is learnt from its replies is which of them to give and not how
others write. `--captions` are dialogues as well: someone tells what is to be seen, as a caption does.

Example run, with the reward of `vikdf reward --no-knowledge`:
    python eval/choose_replies.py --model outputs/rewarded_without_knowledge --dialogues dialogues_train.jsonl \
        --captions "train-*.tar" --contexts 1920 --output pairs.jsonl
    vikdf prefer --config configs/smollm2/prefer.yaml data.train=pairs.jsonl data.validation=pairs_validation.jsonl \
        data.dialogues=dialogues_train.jsonl
"""

import argparse
import json
import random
from pathlib import Path

import torch
from prepare_data import as_written
from tqdm.auto import tqdm
from transformers import pipeline

from modeling_vikdf.building import load_model
from modeling_vikdf.data import load_dialogues, load_image_text_pairs
from modeling_vikdf.data.dialogues import as_messages
from modeling_vikdf.modeling_candidates import count_ending


BATCH = 8  # contexts at a time
CAPTIONS = 0.25  # the share of contexts that are captions


def draw_turns(dialogues: str, captions: list[str], count: int, seed: int) -> list[list[str]]:
    """What is said before a reply: of `count` contexts, a quarter of them captions if there are any."""
    rng = random.Random(seed)
    told = [rng.choice(pair["captions"]) for pair in load_image_text_pairs(captions)] if captions else []
    told = [[as_written(caption)] for caption in rng.sample(told, min(len(told), round(CAPTIONS * count)))]
    said = [[as_written(turn["content"]) for turn in each["messages"][:-1]] for each in load_dialogues(dialogues)]
    turns = rng.sample(said, count - len(told)) + told
    rng.shuffle(turns)
    return turns


def main() -> None:
    """Writes the dialogues, a batch at a time; what is there already is kept."""
    parser = argparse.ArgumentParser(description="Let the language model answer, and keep its best and worst reply.")
    parser.add_argument("--model", required=True, help="with a reward head that was fitted without knowledge")
    parser.add_argument("--dialogues", required=True, help="JSONL file")
    parser.add_argument("--captions", nargs="*", default=[], help="image-text shards")
    parser.add_argument("--contexts", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--knowledge", action="store_true", help="the model replies with knowledge: a further round")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor, device=model.device)
    turns = draw_turns(args.dialogues, args.captions, args.contexts, args.seed)
    # those of similar length together
    batches = [turns[start : start + 8 * BATCH] for start in range(0, len(turns), 8 * BATCH)]
    batches = [sorted(part, key=lambda said: sum(map(len, said))) for part in batches]
    batches = [part[start : start + BATCH] for part in batches for start in range(0, len(part), BATCH)]
    done = len(args.output.read_text(encoding="utf-8").splitlines()) if args.output.is_file() else 0
    candidates = model.generation_config.num_candidates
    ending = count_ending(candidates)  # the others are always broken off, and would be rejected for that
    with open(args.output, "a", encoding="utf-8") as file:
        for number, part in enumerate(tqdm(batches, desc="replies", unit=" batches")):
            if number * BATCH < done:
                continue
            torch.manual_seed(args.seed * len(batches) + number)
            chats = [as_messages(said, "user") for said in part]
            outputs = pipe(
                chats,
                batch_size=BATCH,
                return_full_text=False,
                use_knowledge=args.knowledge,
                num_return_sequences=ending,
            )
            for said, replies in zip(part, outputs, strict=True):
                best, *_, rejected = [reply["generated_text"].strip() for reply in replies]
                file.write(json.dumps({"turns": [*said, best], "rejected": rejected}, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
