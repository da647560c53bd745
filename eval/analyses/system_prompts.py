"""How well the LLM alone predicts replies under several system prompts, so that it is compared with the best one.

Example run, on validation dialogues:
    python eval/analyses/system_prompts.py --prompts configs/system_prompts.txt --data image_chat_validation.jsonl \
        --limit 800
"""

import argparse
from pathlib import Path

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.evaluation.dialogues import EvaluationSettings, evaluate_file


def main() -> None:
    """Writes a report for each prompt and prints the perplexities, lowest first."""
    parser = argparse.ArgumentParser(description="Compare system prompts of the LLM without knowledge.")
    parser.add_argument("--prompts", type=Path, required=True, help="file with a system prompt a line")
    parser.add_argument("--data", required=True, help="dialogues (JSONL)")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="VIKDF model that names the LLM")
    parser.add_argument("--output", type=Path, default=Path("outputs/system_prompts"), help="folder of the reports")
    parser.add_argument("--limit", type=int, help="dialogues (default: all)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    for number, prompt in enumerate(args.prompts.read_text(encoding="utf-8").splitlines()):
        settings = EvaluationSettings(
            knowledge="none", system_prompt=prompt, limit=args.limit, ranking=False, generation=False
        )
        report = evaluate_file(args.model, args.data, args.output / f"{number}.json", settings)
        results.append((report["metrics"]["perplexity"], report["confidence_95"]["perplexity"], prompt))
    for perplexity, (low, high), prompt in sorted(results):
        print(f"{perplexity:.2f} [{low:.2f}, {high:.2f}] {prompt}")


if __name__ == "__main__":
    main()
