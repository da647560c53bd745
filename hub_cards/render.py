"""Fills the templates of this folder from a run; `modeling_vikdf.cards` does the work.

Example runs:
    python hub_cards/render.py model --folder outputs/smollm2/tune --repo-id ORG/NAME --output card/README.md
    python hub_cards/render.py space --folder outputs/smollm2/tune --repo-id ORG/NAME --output spaces_demo/README.md
    python hub_cards/render.py dataset --folder prepared --source DailyDialog --output prepared/README.md
    python hub_cards/render.py eval-results --report evaluation.json --metric hits_at_1 \
        --dataset-id ORG/BENCHMARK --task-id TASK --output .eval_results/benchmark.yaml
"""

import argparse
import shutil
from pathlib import Path

from modeling_vikdf.cards.render import (
    FIGURE,
    render_dataset_card,
    render_eval_results,
    render_model_card,
    render_space_readme,
)


def model(args: argparse.Namespace) -> str:
    """Renders a model card, and copies its figure beside it."""
    text = render_model_card(args.folder, args.repo_id, args.results)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    beside = args.output.with_name(FIGURE.name)
    if not (beside.exists() and beside.samefile(FIGURE)):
        shutil.copyfile(FIGURE, beside)
    return text


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Render the cards of the Hub.")
    commands = parser.add_subparsers(required=True)

    sub = commands.add_parser("model", help="the card of a checkpoint")
    sub.add_argument("--folder", type=Path, required=True, help="the checkpoint")
    sub.add_argument("--repo-id", help="its repository on the Hub")
    sub.add_argument("--results", type=Path, nargs="+", default=[], help="reports of this model beside the folder's")
    sub.set_defaults(run=model)

    sub = commands.add_parser("space", help="the README of the Space that demonstrates a checkpoint")
    sub.add_argument("--folder", type=Path, required=True, help="the checkpoint")
    sub.add_argument("--repo-id", help="its repository on the Hub (default: the packaged checkpoint)")
    sub.set_defaults(run=lambda args: render_space_readme(args.folder, args.repo_id))

    sub = commands.add_parser("dataset", help="the card of data to train on")
    sub.add_argument("--folder", type=Path, required=True, help="holds *.jsonl and *.tar")
    sub.add_argument("--repo-id", help="their repository on the Hub")
    sub.add_argument("--source", action="append", default=[], help="a data set they were made from; may be repeated")
    sub.set_defaults(run=lambda args: render_dataset_card(args.folder, args.repo_id, args.source))

    sub = commands.add_parser("eval-results", help="a file for .eval_results/, of a benchmark that the Hub knows")
    sub.add_argument("--report", type=Path, required=True, help="JSON that vikdf evaluate wrote")
    sub.add_argument("--metric", required=True, help="which of its metrics")
    sub.add_argument("--dataset-id", required=True, help="the benchmark's repository")
    sub.add_argument("--task-id", required=True, help="the task in the benchmark's eval.yaml")
    sub.set_defaults(run=lambda args: render_eval_results(args.report, args.metric, args.dataset_id, args.task_id))

    for sub in commands.choices.values():
        sub.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    text = args.run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
