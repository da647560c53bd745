"""Makes a trained model the packaged default: the trained weights, the processor, the recipe, and the card.

Example run:
    python eval/package_default.py outputs/study/seed0/vikdf --results eval/results/image_chat_validation.json
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from modeling_vikdf import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.cards.render import FIGURE, render_model_card


# How the default speaks, as blind readers prefer it on validation data; see eval/analyses/candidate_weights.py.
DECODING = {
    "do_sample": True,
    "temperature": 1.0,
    "min_p": 0.1,
    "top_k": 0,
    "no_repeat_ngram_size": None,
    "max_new_tokens": 48,
    "num_candidates": 8,
    "candidate_weights": {"reward": 1.0, "match": 1.0, "length": 0.5},
}


def main() -> None:
    """Replaces modeling_vikdf/default_checkpoint by the trained model."""
    parser = argparse.ArgumentParser(description="Make a trained model the packaged default.")
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="reports for the card")
    args = parser.parse_args()

    model = VikdfForConditionalGeneration.from_pretrained(args.model)
    processor = VikdfProcessor.from_pretrained(args.model)
    model.generation_config.update(**DECODING)
    for path in DEFAULT_CHECKPOINT.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    model.save_pretrained(DEFAULT_CHECKPOINT)
    # half precision halves the package; loading converts to float32 again
    weights = DEFAULT_CHECKPOINT / "model.safetensors"
    tensors = load_file(weights)
    tensors = {name: tensor if name == "reward_weight" else tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    processor.save_pretrained(DEFAULT_CHECKPOINT)
    for name in ("recipe.yaml", "trainer_state.json"):
        shutil.copy(args.model / name, DEFAULT_CHECKPOINT)
    shutil.copy(FIGURE, DEFAULT_CHECKPOINT)
    card = render_model_card(DEFAULT_CHECKPOINT, results=args.results)
    (DEFAULT_CHECKPOINT / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in DEFAULT_CHECKPOINT.rglob("*") if path.is_file())
    print(f"{DEFAULT_CHECKPOINT}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
