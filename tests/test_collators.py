"""Batches: what is drawn depends on the example alone, shares are right, nothing of a prompt is lost."""

import copy
import logging
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import ALL, WORDS, dialogues, model_config, pairs, picture, processor
from torch.utils.data import DataLoader

from modeling_vikdf.data.collators import (
    CAPTION_INSTRUCTIONS,
    DRAW_INSTRUCTIONS,
    MAX_CAPTION,
    DialogueCollator,
    JointCollator,
    PreTrainingCollator,
    align_at_knowledge,
)
from modeling_vikdf.data.sources import SkipReport
from modeling_vikdf.modeling_prefix import COLUMNS


PLACEHOLDER = 400  # the id that processor() gives to knowledge


def collator(objectives=ALL, *, size: int = 64, **kwargs) -> PreTrainingCollator:
    return PreTrainingCollator(processor(size=size), model_config(loss_weights=dict(objectives)), **kwargs)


def drawn(batch: dict[str, torch.Tensor], row: int) -> dict[str, list]:
    """All that a batch says of one of its examples, without padding."""
    found = {}
    context = batch["context_attention_mask"][row].bool()
    found["caption"] = batch["context_input_ids"][row][context].tolist()
    if row < len(batch["masked_cells"]):
        found["scored"] = batch["masked_cells"][row].tolist()
        found["hidden"] = batch["hidden_cells"][row].tolist()
        found["masked_ids"] = batch["masked_input_ids"][row][context].tolist()
        found["masked_labels"] = batch["masked_labels"][row][context].tolist()
    prompt = batch["attention_mask"][row].bool()
    for key in ("input_ids", "labels", "position_ids"):
        found[key] = batch[key][row][prompt].tolist()
    found["draw"] = batch["draw_input_ids"][row][batch["draw_attention_mask"][row].bool()].tolist()
    found["image"] = bool(batch["use_image_knowledge"][row])
    return found


# ---- what is drawn ----

EXAMPLES = pairs(12)


@settings(max_examples=30)
@given(
    rows=st.lists(st.sampled_from(range(12)), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_draws_are_a_function_of_seed_epoch_and_key(rows, seed, epoch):
    """An example is drawn alike alone, in any company, and when it brings its epoch along."""
    settings = {"seed": seed, "image_knowledge_share": 0.5, "other_caption": True}
    together, alone = collator(**settings), collator(**settings)
    together.epoch = epoch
    batch = together([EXAMPLES[row] for row in rows])
    for place, row in enumerate(rows):
        assert drawn(batch, place) == drawn(alone([{**EXAMPLES[row], "epoch": epoch}]), 0)


def test_seed_epoch_and_key_each_change_what_is_drawn():
    each = collator(image_knowledge_share=0.5)
    first = drawn(each(EXAMPLES[:1]), 0)
    each.epoch = 1
    assert drawn(each(EXAMPLES[:1]), 0) != first
    assert drawn(collator(seed=1, image_knowledge_share=0.5)(EXAMPLES[:1]), 0) != first
    assert drawn(collator(image_knowledge_share=0.5)([{**EXAMPLES[0], "key": "another"}]), 0) != first
    assert drawn(collator(image_knowledge_share=0.5)(EXAMPLES[:1]), 0) == first


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_the_same_and_learn_of_a_new_epoch(persistent):
    """Also workers that outlive the epoch they were started in."""
    here, there = (collator(image_knowledge_share=0.5) for _ in range(2))
    loader = DataLoader(EXAMPLES[:4], batch_size=2, collate_fn=there, num_workers=2, persistent_workers=persistent)
    for epoch in range(2):
        here.epoch = there.epoch = epoch
        for number, batch in enumerate(loader):
            expected = here(EXAMPLES[2 * number : 2 * number + 2])
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_the_evaluation_collator_stays_in_its_epoch():
    training = collator(image_knowledge_share=0.5)
    evaluation = training.for_evaluation()
    first = drawn(evaluation(EXAMPLES[:1]), 0)
    training.epoch = 5
    assert evaluation.epoch == 0 and drawn(evaluation(EXAMPLES[:1]), 0) == first
    evaluation.epoch = 2
    assert training.epoch == 5


# ---- shares ----


@pytest.mark.parametrize(("size", "cells"), [(64, 4), (112, 16), (30, 1), (90, 9)])
def test_shares_of_cells(size, cells):
    each = collator({"masked_image": 1.0}, size=size)
    scored, hidden = [], []
    for epoch in range(400):
        batch = each._masked_cells([random.Random(epoch)], size, True)
        assert batch["masked_cells"].shape == (1, cells)
        assert not (batch["hidden_cells"] & ~batch["masked_cells"]).any()
        scored.append(batch["masked_cells"].float().mean().item())
        hidden.append(batch["hidden_cells"].float().mean().item())
    assert sum(scored) / 400 == pytest.approx(0.6, abs=0.07)
    assert sum(hidden) / 400 == pytest.approx(0.6 * 0.8, abs=0.07)


@pytest.mark.parametrize("size", [56, 64, 65, 30])
def test_cells_fit_the_pictures(size):
    batch = collator({"masked_image": 1.0}, size=size)([{**EXAMPLES[0], "image": picture(0, 100)}])
    assert batch["pixel_values"].shape[-2:] == (size, size)
    assert batch["masked_cells"].shape[1] == (size // 28) ** 2


def test_shares_of_tokens():
    """15 % of the words are scored, 80 % of these replaced by the mask token; special tokens and padding never."""
    each = collator({"masked_text": 1.0})
    words = [{"key": str(i), "image": picture(0), "captions": [" ".join(WORDS)]} for i in range(60)]
    words.append({"key": "short", "image": picture(0), "captions": ["a"]})  # mostly padding
    counts = Counter()
    tokenizer = processor().context_tokenizer
    for epoch in range(3):
        each.epoch = epoch
        batch = each(words)
        ids, masked, labels = (batch[key] for key in ("context_input_ids", "masked_input_ids", "masked_labels"))
        chosen = labels != -100
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        assert not (chosen & special).any()
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(masked[~chosen], ids[~chosen])
        assert ((masked == tokenizer.mask_token_id) | (masked == ids))[chosen].all()
        counts["words"] += int((~special).sum())
        counts["chosen"] += int(chosen.sum())
        counts["replaced"] += int((masked != ids).sum())
    assert counts["chosen"] / counts["words"] == pytest.approx(0.15, abs=0.02)
    assert counts["replaced"] / counts["chosen"] == pytest.approx(0.8, abs=0.05)


def test_the_unknown_token_masks_where_there_is_no_mask_token():
    reader = copy.deepcopy(processor(towers="clip"))
    config = model_config(towers="clip", loss_weights={"masked_text": 1.0})
    with pytest.raises(ValueError, match="mask or unknown token"):
        PreTrainingCollator(reader, config)
    reader.context_tokenizer.unk_token = "<|endoftext|>"  # as CLIP's has it
    batch = PreTrainingCollator(reader, config)(pairs(8))
    replaced = batch["masked_input_ids"] != batch["context_input_ids"]
    assert replaced.any() and (batch["masked_input_ids"][replaced] == reader.context_tokenizer.eos_token_id).all()


def test_share_of_masked_rows():
    """Half of the examples take part, chosen by their keys; they come first, and only their pictures are needed."""
    objectives = {"masked_image": 1.0, "masked_text": 1.0}
    each = collator(objectives, masked_share=0.5)
    part = {key for i in range(12) for key in [EXAMPLES[i]["key"]] if each([EXAMPLES[i]])["masked_cells"].any()}
    batch = each(EXAMPLES)
    assert 2 <= len(part) <= 10
    assert len(batch["masked_cells"]) == len(batch["masked_input_ids"]) == len(part)
    assert batch["masked_cells"].any(1).all()
    assert len(batch["context_input_ids"]) == 12
    only_pixels = collator({"masked_image": 1.0, "knowledge_to_text": 1.0}, masked_share=0.5)(EXAMPLES)
    assert len(only_pixels["pixel_values"]) == len(part)


def test_no_masked_row_scores_nothing_but_runs_the_same_way():
    each = collator({"masked_image": 1.0, "masked_text": 1.0}, masked_share=0.5)
    out = next(example for example in EXAMPLES if not each([example])["masked_cells"].any())
    batch = each([out])
    assert len(batch["masked_cells"]) == 1 and not batch["hidden_cells"].any()
    assert (batch["masked_labels"] == -100).all()


@pytest.mark.parametrize("settings", [{"masked_share": 1.5}, {"masked_share": 0}, {"image_knowledge_share": -0.1}])
def test_impossible_shares_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        collator(**settings)


def test_share_of_image_knowledge():
    each = collator({"knowledge_to_text": 1.0}, image_knowledge_share=0.3)
    chosen = []
    for epoch in range(30):
        each.epoch = epoch
        chosen += each(EXAMPLES)["use_image_knowledge"].tolist()
    assert sum(chosen) / len(chosen) == pytest.approx(0.3, abs=0.07)
    assert "use_image_knowledge" not in collator({"knowledge_to_text": 1.0})(EXAMPLES)


# ---- which inputs ----


@pytest.mark.parametrize(
    ("objective", "inputs"),
    [
        ("text_image_matching", {"pixel_values"}),
        ("masked_image", {"pixel_values", "masked_cells", "hidden_cells", "scored_patches"}),
        ("masked_text", {"pixel_values", "masked_input_ids", "masked_labels", "masked_columns"}),
        ("knowledge_to_text", {"input_ids", "attention_mask", "position_ids", "labels", *COLUMNS}),
        (
            "text_to_knowledge",
            {"draw_input_ids", "draw_attention_mask", "draw_position_ids", *(f"draw_{name}" for name in COLUMNS[:3])},
        ),
    ],
)
def test_each_objective_gets_its_inputs_and_no_others(objective, inputs):
    batch = collator({objective: 1.0})(EXAMPLES[:2])
    assert set(batch) == inputs | {"context_input_ids", "context_attention_mask"}


def test_cached_states_take_the_place_of_pictures_and_captions():
    objectives = {"text_image_matching": 1.0, "masked_text": 1.0, "knowledge_to_text": 1.0}
    plain = collator(objectives)(EXAMPLES[:3])
    tokenizer = processor().context_tokenizer
    examples = [
        {
            "key": example["key"],
            "captions": example["captions"],
            "vision_states": torch.full((5, 40), float(i), dtype=torch.float16),
            "context_input_ids": [torch.tensor(tokenizer(caption)["input_ids"]) for caption in example["captions"]],
            "context_states": [
                torch.full((len(tokenizer(caption)["input_ids"]), 32), float(i)) for caption in example["captions"]
            ],
        }
        for i, example in enumerate(EXAMPLES[:3])
    ]
    cached = collator(objectives)(examples)
    assert "pixel_values" not in cached and cached["vision_states"].shape == (3, 5, 40)
    for key in ("context_input_ids", "context_attention_mask", "masked_input_ids", "labels"):
        assert torch.equal(cached[key], plain[key])
    inside = cached["context_attention_mask"].bool()
    assert torch.equal(cached["context_states"][..., 0], torch.arange(3.0)[:, None] * inside)
    with pytest.raises(ValueError, match="masked_image needs the pictures"):
        collator(ALL)(examples)


# ---- prompts ----


def test_caption_prompts():
    """An instruction, the knowledge, and as the only text to learn the caption with the end of its turn."""
    tokenizer = processor().tokenizer
    batch = collator({"knowledge_to_text": 1.0})(EXAMPLES)
    assert ((batch["input_ids"] == PLACEHOLDER).sum(1) == 4).all()
    asked = set()
    for row, example in enumerate(EXAMPLES):
        text = tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
        instruction = [each for each in CAPTION_INSTRUCTIONS if each in text]
        assert len(instruction) == 1
        asked |= set(instruction)
        labels = batch["labels"][row]
        learnt = tokenizer.decode(labels[labels != -100]).removesuffix("<|im_end|>")
        context = batch["context_input_ids"][row]
        evoking = processor().context_tokenizer.decode(context, skip_special_tokens=True)
        assert learnt in example["captions"] and learnt == evoking
    assert len(asked) > 3


def test_another_caption_than_the_one_the_knowledge_is_from():
    tokenizer, context = processor().tokenizer, processor().context_tokenizer
    one = {"key": "one", "image": picture(0), "captions": ["a dog"]}
    batch = collator({"knowledge_to_text": 1.0}, other_caption=True)([*EXAMPLES, one])
    for row, example in enumerate([*EXAMPLES, one]):
        labels = batch["labels"][row]
        learnt = tokenizer.decode(labels[labels != -100]).removesuffix("<|im_end|>")
        evoking = context.decode(batch["context_input_ids"][row], skip_special_tokens=True)
        assert learnt in example["captions"] and evoking in example["captions"]
        assert (learnt != evoking) == (len(example["captions"]) > 1)


@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("message", ["first_user", "last_user"])
def test_draw_prompts_end_in_the_placeholders(llm, message):
    """Wherever dialogues put the knowledge."""
    reader = processor(llm, knowledge_message=message, knowledge_placement="start")
    config = model_config(llm, loss_weights={"text_to_knowledge": 1.0}, knowledge_token_id=reader.knowledge_token_id)
    batch = PreTrainingCollator(reader, config)(EXAMPLES)
    ids, mask = batch["draw_input_ids"], batch["draw_attention_mask"]
    assert (ids[:, -4:] == reader.knowledge_token_id).all() and mask[:, -4:].all()
    assert ((ids == reader.knowledge_token_id).sum(1) == 4).all()
    for row, example in enumerate(EXAMPLES):
        text = reader.tokenizer.decode(ids[row][mask[row].bool()])
        assert any(f"{told} {caption}" in text for told in DRAW_INSTRUCTIONS for caption in example["captions"])
    assert reader.knowledge_placement == "start"  # the processor itself is as it was


def test_a_caption_is_matched_with_another_of_its_picture():
    reader = processor().context_tokenizer
    examples = pairs(20)
    batch = collator({"text_text_matching": 1.0})(examples)
    for role in ("context", "partner"):
        assert batch[f"{role}_attention_mask"].sum() == (batch[f"{role}_input_ids"] != reader.pad_token_id).sum()
    own, partners = (
        reader.batch_decode(batch[f"{role}_input_ids"], skip_special_tokens=True) for role in ("context", "partner")
    )
    for example, caption, partner in zip(examples, own, partners, strict=True):
        assert caption != partner and {caption, partner} <= {*example["captions"]}
    lonely = collator({"text_text_matching": 1.0})([{**each, "captions": each["captions"][:1]} for each in examples])
    assert torch.equal(lonely["partner_input_ids"], lonely["context_input_ids"])


def test_captions_that_no_prompt_can_hold():
    """The placeholder's own text, and a caption longer than the LLM reads, do not end a run of days."""
    captions = [f"a {processor().knowledge_token} dog", processor().knowledge_token, "rain " * 5000]
    examples = [{"key": str(i), "image": picture(0), "captions": [text]} for i, text in enumerate(captions)]
    batch = collator(ALL)(examples)
    assert ((batch["input_ids"] == PLACEHOLDER).sum(1) == 4).all()
    assert ((batch["draw_input_ids"] == PLACEHOLDER).sum(1) == 4).all()
    assert batch["input_ids"].shape[1] < MAX_CAPTION + 200
    prompts = processor().batch_decode(batch["input_ids"])
    assert captions[0] in prompts[0] and prompts[1].count(captions[1]) == prompts[2].count(captions[1]) + 1, "as text"


# ---- dialogues beside pictures ----


def test_hidden_context_is_hidden_from_the_llm_alone():
    reader, examples = processor(system_prompt="Be kind."), dialogues(6)
    whole, hidden = DialogueCollator(reader)(examples), DialogueCollator(reader, hide_context=1.0)(examples)
    for key in ("context_input_ids", "context_attention_mask"):
        assert torch.equal(whole[key], hidden[key])
    for row, example in enumerate(examples):
        seen = hidden["attention_mask"][row].bool()
        newest = [{"role": "system", "content": "Be kind."}, *example["messages"][-2:]]
        expected = reader([newest], return_labels=True)
        assert torch.equal(hidden["input_ids"][row][seen], expected["input_ids"][0])
        assert torch.equal(hidden["labels"][row][seen], expected["labels"][0])
    assert whole["input_ids"].shape[1] > hidden["input_ids"].shape[1]


def test_what_is_hidden_changes_with_the_epoch_and_is_nothing_in_an_evaluation():
    collator, examples = DialogueCollator(processor(), hide_context=0.5, seed=3), dialogues(12)
    whole = DialogueCollator(processor())(examples)

    def lengths(batch):
        return batch["attention_mask"].sum(1).tolist()

    drawn = []
    for epoch in (0, 1, 0):
        collator.epoch = epoch
        drawn.append(lengths(collator(examples)))
    assert drawn[0] == drawn[2] != drawn[1]
    shorter = sum(short < long for short, long in zip(drawn[0], lengths(whole), strict=True))
    assert 1 <= shorter <= 11
    assert lengths(collator.for_evaluation()(examples)) == lengths(whole)
    with pytest.raises(ValueError, match="hide_context must be between 0 and 1, got 2"):
        DialogueCollator(processor(), hide_context=2)


def test_dialogues_beside_pictures():
    """Each dialogue with a picture of its own, another in the next epoch; in an evaluation of other pictures."""
    config = model_config(loss_weights={"text_image_matching": 1.0, "reply": 1.0})
    inner = DialogueCollator(processor()), PreTrainingCollator(processor(), config)
    seen, validation = pairs(9), [{**pair, "captions": ["blue"]} for pair in pairs(2)]
    joint, examples = JointCollator(*inner, seen, validation), dialogues(4)
    assert joint.uses_pictures
    batches = []
    for epoch in (0, 1, 0):
        joint.epoch = epoch
        batches.append(joint(examples))
    for key, value in inner[0](examples).items():
        assert torch.equal(batches[0]["dialogues"][key], value)
    first, second, again = (batch["pixel_values"] for batch in batches)
    assert torch.equal(first, again) and len(first) == 4 and not torch.equal(first, second)
    evaluated = joint.for_evaluation()(examples)
    blue = inner[1]([{"key": "0", "image": picture(0), "captions": ["blue"]}])["context_input_ids"]
    assert torch.equal(evaluated["context_input_ids"], blue.expand(4, -1))


# ---- alignment ----


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=5),
    extra=st.integers(0, 2),
)
def test_alignment_loses_nothing(rows, extra):
    """Rows of (tokens before, tokens behind, placeholders), padded on the left, are shifted and nothing else."""
    width = max(sum(row) for row in rows) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    expected = []
    for number, (before, behind, placeholders) in enumerate(rows):
        tokens = [*range(10, 10 + before), *[PLACEHOLDER] * placeholders, *range(30, 30 + behind)]
        targets = [-100] * (len(tokens) - behind) + tokens[len(tokens) - behind :]
        ids[number, width - len(tokens) :] = torch.tensor(tokens)
        labels[number, width - len(tokens) :] = torch.tensor(targets)
        mask[number, width - len(tokens) :] = 1
        expected.append((tokens, targets))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "other": torch.ones(1)}
    aligned = align_at_knowledge(batch, processor())
    first = (aligned["input_ids"] == PLACEHOLDER).int().argmax(1)
    assert len(set(first.tolist())) == 1
    head = min(before for before, _, _ in rows)  # all rows count up from the same token
    for number, (tokens, targets) in enumerate(expected):
        inside = aligned["attention_mask"][number].bool()
        assert aligned["input_ids"][number][inside].tolist() == tokens
        assert aligned["labels"][number][inside].tolist() == targets
        assert aligned["position_ids"][number][inside].tolist() == list(range(len(tokens)))
        assert (aligned["labels"][number][~inside] == -100).all()
        assert (aligned["input_ids"][number][~inside] == processor().tokenizer.pad_token_id).all()
        # one block of tokens behind what all rows begin with: nothing else is torn apart
        columns = inside.nonzero()[:, 0]
        assert (columns[head:].diff() == 1).all()
        assert columns[:head].tolist() == list(range(head))
    # no wider than it must be
    assert aligned["attention_mask"][:, 0].any() and aligned["attention_mask"][:, -1].any()
    assert torch.equal(batch["input_ids"], ids) and aligned["other"] is batch["other"]


# ---- dialogues ----


def test_dialogues_are_learnt_behind_the_knowledge():
    tokenizer = processor().tokenizer
    examples = dialogues(8)
    assert any(len(example["messages"]) > 2 for example in examples)
    batch = DialogueCollator(processor())(examples)
    for row, example in enumerate(examples):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != -100]) == example["messages"][-1]["content"] + "<|im_end|>"
        context = processor().context_tokenizer.decode(batch["context_input_ids"][row], skip_special_tokens=True)
        assert context == " ".join(message["content"] for message in example["messages"][:-1])
    every = DialogueCollator(processor(), earlier_replies=True)(examples)
    for row, example in enumerate(examples):
        labels = every["labels"][row]
        replies = [message["content"] + "<|im_end|>" for message in example["messages"][1::2]]
        assert tokenizer.decode(labels[labels != -100]) == "".join(replies)


def test_a_dialogue_that_is_too_long_loses_its_oldest_turns():
    turns = [{"role": role, "content": "a dog runs"} for _ in range(10) for role in ("user", "assistant")]
    batch = DialogueCollator(processor(), max_length=60)([{"messages": turns}])
    assert batch["attention_mask"].sum() <= 60
    labels = batch["labels"][0]
    assert processor().tokenizer.decode(labels[labels != -100]) == "a dog runs<|im_end|>"


BAD_DIALOGUES = {
    "too long": [{"role": "user", "content": "rain " * 300}, {"role": "assistant", "content": "yes"}],
    "empty reply": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " "}],
    "no reply": [{"role": "user", "content": "hello"}],
    "no dialogue": "hello",
}


@pytest.mark.parametrize("kind", BAD_DIALOGUES)
def test_a_dialogue_that_cannot_be_used_is_skipped_and_reported(kind, tmp_path):
    """The others are read as they would be without it, and its row teaches nothing."""
    report = SkipReport(tmp_path)
    good = dialogues(2)
    bad = {"key": "bad", "messages": BAD_DIALOGUES[kind]}
    collate = DialogueCollator(processor(), max_length=150, report=report)
    batch = collate([good[0], bad, good[1]])
    alone = DialogueCollator(processor(), max_length=150)(good)
    assert (batch["labels"][1] == -100).all()
    for row, other in ((0, 0), (2, 1)):
        for key in ("input_ids", "labels", "position_ids"):
            mine = batch[key][row][batch["attention_mask"][row].bool()]
            assert torch.equal(mine, alone[key][other][alone["attention_mask"][other].bool()])
    assert report.counts() == {"unusable dialogue": 1}
    only = collate([bad])
    assert len(only["input_ids"]) == 1 and (only["labels"] == -100).all()


def test_skipped_dialogues_are_logged_without_a_report(caplog):
    logging.getLogger("transformers").propagate = True
    try:
        DialogueCollator(processor())([{"key": "bad", "messages": BAD_DIALOGUES["no reply"]}])
    finally:
        logging.getLogger("transformers").propagate = False
    assert "Skipped the dialogue bad" in caplog.text
