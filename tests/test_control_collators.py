"""eval/study/collators.py: what the study's controls show in place of pictures, and read beside contexts."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_script
from tiny_training import dialogues, model_config, processor

from modeling_vikdf.data.collators import DialogueCollator


STEPS = yaml.safe_load((Path(__file__).parents[1] / "configs" / "study.yaml").read_text())["steps"]
controls = load_script("study/collators")


def test_a_caption_in_the_place_of_a_picture():
    """The control without pictures: states of another caption than the chosen one, as many as a picture has."""
    states = [torch.full((length, 8), float(i)) for i, length in enumerate((4, 6, 11))]
    for each in states:
        each[0] += 0.5  # the first state stays first
    example = {"key": "0", "captions": ["a", "b", "c"], "context_states": states, "vision_states": torch.zeros(5, 8)}
    example["context_input_ids"] = [torch.tensor([1, 10 + i, 2]) for i in range(3)]
    config = model_config(loss_weights={"text_image_matching": 1.0})
    without_pictures = controls.CaptionsAsPictures(processor(), config)
    pairings = set()
    for key in "abcdefghij":
        batch = without_pictures([{**example, "key": key}])
        chosen, other = int(batch["context_input_ids"][0, 1]) - 10, int(batch["vision_states"][0, 1, 0])
        assert batch["vision_states"].shape == (1, 5, 8) and batch["vision_states"][0, 0, 0] == other + 0.5
        pairings.add((chosen, other))
    assert len(pairings) > 3 and all(chosen != other for chosen, other in pairings)
    with pytest.raises(ValueError, match="a feature cache and at least two captions"):
        without_pictures([{key: value for key, value in example.items() if key != "context_states"}])
    lonely = {key: value[:1] for key, value in example.items() if isinstance(value, list)}
    with pytest.raises(ValueError, match="a feature cache and at least two captions"):
        without_pictures([example | lonely])


def test_the_posterior_reads_the_reply_and_the_llm_does_not_read_it_twice():
    reader, examples = processor(), dialogues(6)
    posterior_of_all = controls.PosteriorDialogues(reader, posterior_share=1.0)
    prior, posterior = DialogueCollator(reader)(examples), posterior_of_all(examples)
    for key in ("input_ids", "attention_mask", "labels", "position_ids"):
        assert torch.equal(prior[key], posterior[key])
    for row, example in enumerate(examples):
        words = "\n".join(message["content"] for message in example["messages"])
        ids = posterior["context_input_ids"][row][posterior["context_attention_mask"][row].bool()]
        assert ids.tolist() == reader.context_tokenizer(words)["input_ids"]
    evaluated = posterior_of_all.for_evaluation()(examples)
    assert torch.equal(evaluated["context_input_ids"], prior["context_input_ids"])
    with pytest.raises(ValueError, match="posterior_share must be between 0 and 1, got 2"):
        controls.PosteriorDialogues(reader, posterior_share=2)


def test_what_is_hidden_does_not_depend_on_what_has_read_the_reply():
    """Which contexts are hidden is drawn first, so that the arms with and without the control hide the same ones."""
    reader, examples = processor(), dialogues(12)
    settings = {"hide_context": 0.5, "seed": 3}
    without = DialogueCollator(reader, **settings)(examples)
    batch = controls.PosteriorDialogues(reader, **settings)(examples)
    assert torch.equal(batch["input_ids"], without["input_ids"])
    longer = batch["context_attention_mask"].sum(1) > without["context_attention_mask"].sum(1)
    assert 1 <= longer.sum() <= 11


def test_an_arm_that_learns_from_captions_sees_no_picture_in_any_stage():
    kinds = {name: step.get("collators", {}) for name, step in STEPS.items()}
    assert all(hasattr(controls, collator) for kind in kinds.values() for collator in kind.values())
    shown = {name for name, kind in kinds.items() if kind == {"pairs": "CaptionsAsPictures"}}
    assert {"distill_captions", "integrate_captions", "caption_only"} < shown
    assert [name for name, kind in kinds.items() if kind == {"dialogues": "PosteriorDialogues"}] == ["with_posterior"]
    for name, step in STEPS.items():
        reads_pairs = not step.get("recipe", "").endswith("prefer.yaml")  # preferences have no picture
        assert "parent" not in step or (name in shown) == (reads_pairs and step["parent"] in shown), name
