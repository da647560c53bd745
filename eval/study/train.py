"""Trains the arms of a study and evaluates them: every step once a seed; what is there already is kept.

Example run:
    python eval/study/train.py --config configs/study.yaml --pairs "train-*.tar" --dialogues dialogues_train.jsonl \
        --steps vikdf soft_prompt --seeds 0 --evaluate image_chat_validation.jsonl --visual-words visual_words.txt
"""

import argparse
import copy
import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import collators
import yaml

from modeling_vikdf.building import load_model, new_model
from modeling_vikdf.data import load_dialogues
from modeling_vikdf.evaluation.dialogues import EvaluationSettings, evaluate_file
from modeling_vikdf.evaluation.probe_items import load_items
from modeling_vikdf.evaluation.probes import probe
from modeling_vikdf.training.shrinking import mean_knowledge, save_stage
from modeling_vikdf.training.stages import run_stage


PREFER = "smollm2/prefer.yaml"


def edit(recipe: dict[str, Any], changes: dict[str, Any], drop: list[str]) -> dict[str, Any]:
    """The recipe with each `section.key` set or left out; a name without a key stands for a whole section."""
    recipe = copy.deepcopy(recipe)
    for name in drop:
        section, _, key = name.partition(".")
        (recipe.get(section, {}) if key else recipe).pop(key or section, None)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            recipe.setdefault(section, {})[key] = value
        else:
            recipe[section] = value
    return recipe


def train(name: str, seed: int, steps: dict[str, dict], args: argparse.Namespace) -> Path:
    """Trains a step and, before it, its parents, unless their models are there already. Returns the model's folder."""
    folder = args.output / f"seed{seed}" / name
    if (folder / "finished.json").is_file():
        return folder
    step, configs = steps[name], args.config.parent
    print(f"== {name}, seed {seed}", flush=True)
    if "untrained" in step:
        model, processor = new_model(**load_model_settings(configs) | step["untrained"])
        processor.system_prompt = step["untrained"].get("system_prompt", processor.system_prompt)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    elif "shrink" in step:
        parent = train(step["parent"], seed, steps, args)
        model, processor = load_model(parent)
        mean = mean_knowledge(model, processor, list(load_dialogues(args.dialogues)))
        model.shrink_knowledge(mean, step["shrink"])
        data = {"train": Path(args.dialogues).name}
        save_stage("shrink", model, processor, parent, folder, {"data": data, "share": step["shrink"]})
    else:
        run(name, seed, folder, steps, args)
    (folder / "finished.json").write_text(json.dumps({"step": name, "seed": seed}) + "\n", encoding="utf-8")
    return folder


def load_model_settings(configs: Path) -> dict[str, Any]:
    """The section `model` of the first stage's recipe: backbones and sizes."""
    return yaml.safe_load((configs / "smollm2/distill.yaml").read_text(encoding="utf-8"))["model"]


def run(name: str, seed: int, folder: Path, steps: dict[str, dict], args: argparse.Namespace) -> None:
    """Trains a step by its recipe, with the step's own changes and collators."""
    step, configs = steps[name], args.config.parent
    stage = Path(step["recipe"]).stem
    recipe = yaml.safe_load((configs / step["recipe"]).read_text(encoding="utf-8"))
    recipe = edit(recipe, step.get("set", {}), step.get("drop", []))
    if "parent" in step:
        recipe["model"] = {"checkpoint": str(train(step["parent"], seed, steps, args))}
        if "swap" in step:  # the way into the other LLM starts as that into the first one did
            start = {name: load_model_settings(configs)[name] for name in ("base_text", "initial_gate")}
            recipe["model"] |= start | step["swap"]
    elif "new" in step:
        recipe["model"] = load_model_settings(configs) | step["new"]
    folder.mkdir(parents=True, exist_ok=True)
    data = recipe.setdefault("data", {})
    if stage == "tune":
        data["train"] = args.dialogues
    if stage == "prefer":
        data |= {"train": str(args.preferences), "dialogues": args.dialogues}
    if "few_shot_share" in step:
        if args.few_shot is None:
            raise ValueError(f"The step {name} learns from dialogues of the task itself; name them with --few-shot.")
        lines = list(StringIO(args.few_shot.read_text(encoding="utf-8")))
        sample = random.Random(seed).sample(lines, round(step["few_shot_share"] * len(lines)))
        data["train"] = str(folder / "few_shot.jsonl")
        Path(data["train"]).write_text("".join(sample), encoding="utf-8")
    if "objectives" in recipe:
        data |= {"pairs" if stage == "tune" else "train": args.pairs, "feature_cache": args.features}
    # arms are compared after equally many steps, by the evaluation below
    recipe["training"] |= {"output_dir": str(folder), "seed": seed, "eval_strategy": "no"}
    recipe["training"]["load_best_model_at_end"] = False
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    controls = {data: getattr(collators, name) for data, name in step.get("collators", {}).items()}
    run_stage(stage, recipe, controls)


def evaluate(folder: Path, arms: list[str], args: argparse.Namespace) -> None:
    """Evaluates a model on every file under every arm of knowledge, unless the report is there already."""
    for file in args.evaluate:
        for knowledge in arms:
            # a report of its own, because replies take longer and may be made for fewer dialogues
            output = folder / f"{Path(file).stem}{'_replies' if args.whole else ''}-{knowledge}.json"
            if not output.is_file():
                settings = EvaluationSettings(
                    knowledge=knowledge,
                    limit=args.limit,
                    ranking=args.whole,
                    generation=args.whole,
                    visual_words=args.visual_words,
                    word_vectors=args.word_vectors,
                    batch_size=args.batch_size,
                )
                print(output, evaluate_file(folder, file, output, settings)["metrics"], flush=True)
    loaded = None
    for file in args.probe:
        missing = {arm: output for arm in arms if not (output := folder / f"{Path(file).stem}-{arm}.json").is_file()}
        if missing:
            loaded, items = loaded or load_model(folder), load_items(file)
        for arm, output in missing.items():
            report = probe(*loaded, items, [arm])
            output.write_text(json.dumps(report) + "\n", encoding="utf-8")
            print(output, report["subsets"]["all"]["arms"], flush=True)


def main() -> None:
    """Trains the named steps and evaluates them on all files under the arms of knowledge."""
    parser = argparse.ArgumentParser(description="Train and evaluate the arms of a study.")
    parser.add_argument("--config", type=Path, required=True, help="the study (YAML)")
    parser.add_argument("--pairs", required=True, help="image-text pairs to train on")
    parser.add_argument("--dialogues", required=True, help="dialogues to train on (JSONL)")
    parser.add_argument("--few-shot", type=Path, help="dialogues that few-shot steps learn a share of (JSONL)")
    parser.add_argument("--preferences", type=Path, help="pairs of replies for steps of preference (JSONL)")
    parser.add_argument("--features", default="outputs/features", help="cache of the encoders' states")
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--steps", nargs="+", required=True, help="steps of the study to train and evaluate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate", nargs="*", default=[], help="files of dialogues")
    parser.add_argument("--probe", nargs="*", default=[], help="files of items for `vikdf probe`")
    parser.add_argument("--knowledge", nargs="+", default=["own", "shuffled"], help="arms of the evaluation")
    parser.add_argument("--limit", type=int, help="dialogues of each file")
    parser.add_argument("--batch-size", type=int, default=16, help="dialogues in a batch")
    parser.add_argument("--whole", action="store_true", help="rank and reply as well, reported as FILE_replies")
    parser.add_argument("--visual-words", help="file with a word a line")
    parser.add_argument("--word-vectors", help="file of word vectors")
    args = parser.parse_args()

    steps = yaml.safe_load(args.config.read_text(encoding="utf-8"))["steps"]
    unknown = sorted(set(args.steps) - set(steps))
    if unknown:
        parser.error(f"unknown steps {unknown}; {args.config} has {sorted(steps)}")
    if args.preferences is None and (learning := [name for name in args.steps if steps[name].get("recipe") == PREFER]):
        parser.error(f"{learning} learn from pairs of replies; name them with --preferences")
    for seed in args.seeds:
        for name in args.steps:
            folder = train(name, seed, steps, args)
            evaluate(folder, ["none"] if "untrained" in steps[name] else args.knowledge, args)


if __name__ == "__main__":
    main()
