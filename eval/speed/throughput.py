"""How long evaluating dialogues takes (likelihood and replies by beam search), in batches and one at a time.

Example run:
    python eval/speed/throughput.py --data dialogues.jsonl --output eval/results/throughput.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import SkipReport, load_dialogues
from modeling_vikdf.evaluation.arms import compute_knowledge
from modeling_vikdf.evaluation.dialogues import (
    EvaluationSettings,
    evaluate_dialogues,
    generate_replies,
    prefill,
    prepare,
    score_candidates,
)
from modeling_vikdf.evaluation.reports import versions


RESULTS = Path(__file__).parents[1] / "results"
WARM_UP = 2  # dialogues


def main() -> None:
    """Writes the seconds a dialogue takes in batches and one at a time, and their ratio."""
    parser = argparse.ArgumentParser(description="Time the evaluation of dialogues in batches and one at a time.")
    parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT), help="folder or Hub id (default: packaged)")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of dialogues")
    parser.add_argument("--limit", type=int, default=160, help="dialogues (the first)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json")
    args = parser.parse_args()

    model, processor = load_model(args.model)
    settings = EvaluationSettings(ranking=False, batch_size=args.batch_size)
    dialogues = list(load_dialogues(str(args.data)))[: args.limit]
    examples, _ = prepare(model, processor, dialogues, settings, None, SkipReport())

    def one_at_a_time(some: slice) -> None:
        # the LLM's work alone, so that preparing and summarising single dialogues does not count against this way
        knowledge = compute_knowledge(model, processor, [example.context for example in examples[some]])
        for example, own in zip(tqdm(examples[some], desc="One at a time"), knowledge.unbind(), strict=True):
            prefixes = prefill(model, processor, [example], own[None])
            score_candidates(model, processor, [example], 1, prefixes)
            generate_replies(model, processor, [example], own[None], prefixes)

    def in_batches(some: slice) -> None:
        evaluate_dialogues(model, processor, dialogues[some], settings)

    seconds = {}
    for name, call in (("in_batches", in_batches), ("one_at_a_time", one_at_a_time)):
        call(slice(WARM_UP))
        start = time.perf_counter()
        call(slice(None))
        seconds[name] = (time.perf_counter() - start) / len(examples)
    times_faster = seconds["one_at_a_time"] / seconds["in_batches"]
    report = {
        "throughput": {"seconds_a_dialogue": seconds, "times_faster": times_faster},
        "data": args.data.name,
        "num_dialogues": len(examples),
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.language_model.dtype),
        "versions": versions(),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
