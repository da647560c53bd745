"""What choosing among candidates costs: the time of a reply at batch 1, over that of a single sample.

Each message is answered by turns with one sample and with each number of candidates, so that a busy machine slows all
alike. A reply that is chosen is shown whole, so its time is that to the first words, too.

Example run:
    python eval/speed/candidates.py --data eval/first_messages.jsonl
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import pipeline

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import load_dialogues
from modeling_vikdf.evaluation.statistics import bootstrap_interval


def main() -> None:
    """Prints the seconds of replies, and their ratio to those of single samples (95 % interval over messages)."""
    parser = argparse.ArgumentParser(description="Time replies that are chosen among candidates.")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id (default: the packaged one)")
    parser.add_argument("--data", type=Path, required=True, help="dialogues (JSON Lines); their replies are not used")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor, device=model.device)
    chats = [dialogue["messages"][:-1] for dialogue in load_dialogues(str(args.data))]
    seconds = {number: torch.zeros(len(chats), args.repeats) for number in args.candidates}
    pipe(chats[0], num_candidates=max(args.candidates))  # warms up
    for repeat in tqdm(range(args.repeats), desc="Replies", unit=" rounds"):
        for i, chat in enumerate(chats):
            for number, times in seconds.items():
                torch.manual_seed(repeat)
                start = time.perf_counter()
                pipe(chat, num_candidates=number)
                times[i, repeat] = time.perf_counter() - start
    one = seconds[args.candidates[0]].sum(1)  # [messages]
    print(f"{len(chats)} messages, {args.repeats} replies to each; {torch.get_num_threads()} threads, {model.dtype}")
    for number, times in seconds.items():
        low, high = bootstrap_interval(times.sum(1), one)
        print(
            f"{number} candidates: median {statistics.median(times.flatten().tolist()):.2f} s, slowest "
            f"{times.max():.2f} s; {times.sum() / one.sum():.2f} [{low:.2f}, {high:.2f}] x the time of "
            f"{args.candidates[0]}"
        )


if __name__ == "__main__":
    main()
