"""What knowledge adds to the time of a reply, by the length of the context and the number of queries.

Example run:
    python eval/speed/latency.py --output eval/results/latency.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm

from modeling_vikdf.building import new_model
from modeling_vikdf.evaluation.reports import versions


ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32
SENTENCE = "We walked along the beach and watched the boats come in. "  # 13 tokens


def main() -> None:
    """Writes the seconds of a reply and their ratio to the LLM's, for each number of queries and length of context."""
    parser = argparse.ArgumentParser(description="Time replies with knowledge against the LLM alone.")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "smollm2" / "distill.yaml")
    parser.add_argument("--queries", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 8, 32, 96], help="lengths of the context")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "latency.json")
    args = parser.parse_args()

    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))["model"]
    exactly = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    points = []
    bar = tqdm(total=len(args.queries) * len(args.sentences), desc="latency", unit="point")
    for queries in args.queries:
        # untrained: the time does not depend on the weights
        model, processor = new_model(**recipe | {"num_knowledge_tokens": queries})
        model.eval()
        for sentences in args.sentences:
            chat = [{"role": "user", "content": SENTENCE * sentences}]
            arms = {
                "vikdf": lambda chat=chat, m=model, p=processor: m.generate(**p(chat), **exactly),
                "language_model": lambda chat=chat, m=model, p=processor: m.generate(
                    **p(chat, use_knowledge=False), **exactly
                ),
            }
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for repeat in range(args.repeats + 1):
                for name, call in arms.items():
                    start = time.perf_counter()
                    call()
                    if repeat:  # the first warms up
                        seconds[name].append(time.perf_counter() - start)
            ratios = [ours / alone for ours, alone in zip(*seconds.values(), strict=True)]
            points.append(
                {
                    "queries": queries,
                    "context_tokens": len(processor.tokenizer(chat[0]["content"])["input_ids"]),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                    "seconds": statistics.median(seconds["vikdf"]),
                    "language_model_seconds": statistics.median(seconds["language_model"]),
                }
            )
            bar.update()
    report = {
        "new_tokens": NEW_TOKENS,
        "repeats": args.repeats,
        "latency": points,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
