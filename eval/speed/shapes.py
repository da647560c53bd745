"""What training and replies cost, by shapes: times on a GPU, or what is asked of the host; and by what a step grows.

Example run (on a GPU it times both shapes, which takes some minutes; elsewhere it counts):
    python eval/speed/shapes.py --output eval/results/speed.json
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from modeling_vikdf.benchmark_shapes import (
    KNOWLEDGE_TOKENS,
    SHAPES,
    Shapes,
    benchmark_shapes,
    choose_device,
    language_model_step,
    ratio,
    training_batch,
    training_model,
    training_step,
    turns,
)
from modeling_vikdf.configuration_vikdf import OBJECTIVES


RESULTS = Path(__file__).parents[1] / "results"
BATCH, CONTEXT_TOKENS = 8, 32
SWEEPS = {
    "batch": (1, 2, 4, 8, 16, 32),
    "context_tokens": (16, 32, 64, 128, 256, 512),
    "queries": (4, 8, 16, 32, 64),
}


def tiny_shapes() -> Shapes:
    """Small enough for a CPU, with an LLM that is most of the model and a text encoder that reads long contexts."""
    widths = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 1024}
    tower, longest = widths | {"projection_dim": 64}, {"max_position_embeddings": max(SWEEPS["context_tokens"])}
    llm = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    return Shapes(
        llm=llm | words | {"num_key_value_heads": 4},
        text=tower | words | longest | {"bos_token_id": 1022, "eos_token_id": 1023},
        vision=tower | {"patch_size": 32},
        iqformer=widths,
    )


def sweep(device: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Of each axis of `SWEEPS`: the seconds of a step that encodes all, and their ratio to those of the LLM's own."""
    points: dict[str, list[dict[str, float]]] = {axis: [] for axis in SWEEPS}
    bar = tqdm(total=sum(map(len, SWEEPS.values())), desc="sweep", unit="point")
    for axis, values in SWEEPS.items():
        for value in values:
            sizes = {"batch": BATCH, "context_tokens": CONTEXT_TOKENS, "queries": KNOWLEDGE_TOKENS} | {axis: value}
            model = training_model(tiny_shapes(), OBJECTIVES, device=device, knowledge_tokens=sizes["queries"])
            batch = training_batch(model.config, sizes["batch"], device, sizes["context_tokens"])
            seconds = turns(
                {
                    "step": functools.partial(training_step, model, batch),
                    "language_model": functools.partial(language_model_step, model, batch),
                },
                repeats,
                device,
            )
            points[axis].append(
                {axis: value, "seconds": statistics.median(seconds["step"]), "ratio": ratio(*seconds.values())}
            )
            bar.update()
    return points


def plot(points: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A panel for each axis: the cost of a step over the LLM's own."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vikdf"  # the same figures, the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(points), figsize=(9, 3), layout="constrained", sharey=True)
    for axes, (axis, values) in zip(panels, points.items(), strict=True):
        axes.plot([point[axis] for point in values], [point["ratio"] for point in values], "o-")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(axis.replace("_", " "))
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("training step over the LLM's own")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Writes the report, and beside it the plot."""
    parser = argparse.ArgumentParser(description="Cost of training and of replies, by shapes.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=choose_device())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json")
    args = parser.parse_args()

    settings: dict[str, Any] = {"device": args.device, "repeats": args.repeats}
    report = {
        "speed": {
            shapes: {what: benchmark_shapes(what, shapes, **settings) for what in ("training", "generation")}
            for shapes in SHAPES
        },
        "sweeps": sweep(args.device, args.repeats),
        **settings,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report["sweeps"], args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
