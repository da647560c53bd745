"""`vikdf prefer`: pairs of replies, how likely the LLM alone finds them, and what is learnt from them."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_from, load_script
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import (
    arguments,
    dialogue_model,
    dialogues,
    mixed,
    preferences,
    pretraining_model,
    processor,
    trained_weights,
)

from modeling_vikdf import VikdfForConditionalGeneration, modeling_prefix, modeling_vikdf
from modeling_vikdf.cli import main
from modeling_vikdf.data import DialogueCollator, PreferenceCollator, SkipReport, load_preferences
from modeling_vikdf.modeling_vikdf import reply_loss
from modeling_vikdf.training import PreferenceTrainer, PreferenceTrainingArguments
from modeling_vikdf.training.preferences import preference_loss
from modeling_vikdf.training.recipe import check_recipe
from modeling_vikdf.training.stages import run_stage


IGNORED = -100


def make_trainer(folder: Path, train=None, *, model=None, collator=None, evaluation=None, **kwargs):
    settings = {"per_device_train_batch_size": 8, "log_level": "error", "max_steps": 2, **kwargs}
    return PreferenceTrainer(
        model=model or dialogue_model(),
        args=arguments(folder, PreferenceTrainingArguments, **settings),
        train_dataset=mixed() if train is None else train,
        eval_dataset=evaluation,
        data_collator=collator or PreferenceCollator(processor()),
        processing_class=processor(),
    )


@torch.no_grad()
def bare_log_likelihood(model, messages: list[dict]) -> float:
    """Of the last message, and the end of its turn, by one pass of the LLM over the whole chat, without any cache."""
    reader = processor()
    prompt = reader([messages[:-1]], use_knowledge=False)["input_ids"]
    whole = reader([messages], use_knowledge=False, return_labels=True)
    ids, labels = whole["input_ids"], whole["labels"][0]
    labels[: prompt.shape[1]] = IGNORED
    logits = model.language_model(input_ids=ids).logits[0].log_softmax(-1)
    places = (labels != IGNORED).nonzero()[:, 0].tolist()
    assert len(places) > 1
    return sum(logits[t - 1, ids[0, t]].item() for t in places)


def reject(example: dict) -> list[dict]:
    return [*example["messages"][:-1], {"role": "assistant", "content": example["rejected"]}]


# ---- the loss ----


def test_the_loss_is_that_of_the_paper():
    chosen, rejected = torch.tensor([1.5, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    expected = [math.log(1 + math.exp(-0.2 * margin)) for margin in (1.0, -3.0, 0.0)]
    assert preference_loss(chosen, rejected, beta=0.2).item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert preference_loss(chosen[:0], rejected[:0], beta=0.2).item() == 0
    parts = [preference_loss(chosen[part], rejected[part], 0.2, count=3) for part in (slice(2), slice(2, 3))]
    assert sum(parts).item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_the_gradient_of_the_loss_is_its_finite_difference():
    chosen = torch.tensor([0.7, -4.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, beta=0.5), (chosen, rejected))


def test_the_steps_loss_is_computed_by_hand(tmp_path):
    """From each row alone: log σ of the pairs, the likelihood of chosen replies and that of dialogues, weighted."""
    trainer = make_trainer(tmp_path, beta=0.3, rpo_alpha=0.4, reply_weight=0.7)
    examples = [trainer.train_dataset[i] for i in range(5)]
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model.eval(), batch)

    @torch.no_grad()
    def policy(messages):
        inputs = DialogueCollator(processor())([{"messages": messages}])
        tokens = (inputs["labels"] != IGNORED).sum().item()
        return -trainer.model(**inputs).loss.item() * tokens, tokens

    margins, chosen, plain = [], [], []
    for example in examples:
        likelihood = policy(example["messages"])
        if "rejected" not in example:
            plain.append(likelihood)
            continue
        chosen.append(likelihood)
        ratio = likelihood[0] - bare_log_likelihood(trainer.model, example["messages"])
        other = policy(reject(example))[0] - bare_log_likelihood(trainer.model, reject(example))
        margins.append(ratio - other)
    assert len(margins) == 3 and len(plain) == 2
    nll = [-sum(value for value, _ in part) / sum(tokens for _, tokens in part) for part in (chosen, plain)]
    preference = sum(math.log(1 + math.exp(-0.3 * margin)) for margin in margins) / len(margins)
    assert loss.item() == pytest.approx(preference + 0.4 * nll[0] + 0.7 * nll[1], rel=1e-4)


def test_a_step_computes_no_other_loss(tmp_path, monkeypatch):
    """The model's own, of all replies together, would be thrown away."""
    trainer, computed = make_trainer(tmp_path, max_steps=1), []
    monkeypatch.setattr(modeling_vikdf, "reply_loss", lambda *args: computed.append(args) or reply_loss(*args))
    trainer.train()
    assert trainer.state.log_history[0]["loss_chosen"] > 0 and not computed


def test_what_comes_before_the_knowledge_is_read_without_gradient(tmp_path, monkeypatch):
    """Where that pays, and it changes no loss and no gradient."""
    runs = []
    for worth in (256, 0):
        monkeypatch.setattr(modeling_prefix, "WORTH_APART", {"cpu": worth})
        trainer = make_trainer(tmp_path, max_steps=1, optim="sgd")
        model, read = trainer.model, []
        model.read_prefix = lambda *args, own=model.read_prefix, read=read: read.append(1) or own(*args)
        trainer.train()
        assert len(read) == (1 if worth == 0 else 0)
        runs.append((trainer.state.log_history[0]["grad_norm"], trained_weights(model)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert all(torch.allclose(runs[1][1][name], value, atol=1e-6) for name, value in runs[0][1].items())


# ---- the reference ----


@pytest.mark.parametrize("share", [True, False], ids=["Dataset", "list"])
def test_the_reference_is_the_language_model_alone(tmp_path, share):
    """Whatever the knowledge, and in float32; an ordinary dialogue has none."""
    examples = mixed()
    if share:
        examples = Dataset.from_list([{"rejected": None, **example} for example in examples])
    trainer = make_trainer(tmp_path, examples, evaluation={"one": examples})
    for data in (trainer.train_dataset, trainer.eval_dataset["one"]):
        assert len(data) == 16
        for example in data:
            if example.get("rejected") is None:
                continue
            for chat, name in ((example["messages"], "chosen"), (reject(example), "rejected")):
                found = example[f"ref_{name}_logps"]
                assert found == pytest.approx(bare_log_likelihood(trainer.model, chat), rel=1e-5)
                assert found == torch.tensor(found, dtype=torch.float32).item()


def test_the_reference_is_computed_once(tmp_path, monkeypatch):
    """Each prompt is read by the LLM once for both replies, before training, and never again."""
    from modeling_vikdf.training import preferences as module

    read, prefill = [], module.prefill

    def counted(model, reader, examples, knowledge):
        assert knowledge is None
        read.extend(example.key for example in examples)
        return prefill(model, reader, examples, knowledge)

    monkeypatch.setattr(module, "prefill", counted)
    trainer = make_trainer(tmp_path, preferences(6), evaluation=preferences(3), max_steps=4, eval_strategy="steps")
    before = sorted(read)
    trainer.train()
    trainer.evaluate()
    assert sorted(read) == before and len(read) == 9
    trainer.evaluate(preferences(2))  # others than the Trainer has get theirs
    assert len(read) == 11


def test_both_replies_and_the_reference_follow_the_same_turns(tmp_path):
    """A long reply costs old turns, and then the other one does without them, too."""
    text = "rain on blue mountains " * 4
    chat = [{"role": role, "content": text} for _ in range(3) for role in ("user", "assistant")]
    example = {"key": "long", "messages": [*chat[:-1], {"role": "assistant", "content": "a dog"}]}
    example["rejected"] = "red umbrellas in rain" + " in rain" * 20
    lengths = [processor()([chat])["input_ids"].shape[1] for chat in (example["messages"], reject(example))]
    collator = PreferenceCollator(processor(), max_length=sum(lengths) // 2)
    trainer = make_trainer(tmp_path, [example] * 2, collator=collator)
    batch = trainer.data_collator(trainer.train_dataset[:1])
    start = (batch["input_ids"] == processor().knowledge_token_id).int().argmax(1)
    assert torch.equal(batch["input_ids"][0, : start[0]], batch["input_ids"][1, : start[1]])
    assert torch.equal(batch["context_input_ids"][0], batch["context_input_ids"][1])
    kept = [*chat[2:-1], {"role": "assistant", "content": example["rejected"]}]
    assert batch["ref_rejected_logps"].item() == pytest.approx(bare_log_likelihood(trainer.model, kept), rel=1e-5)


def test_with_lora_the_reference_is_the_language_model_as_it_was(tmp_path):
    """Also after a run that went on from a checkpoint, and the adapter is trained with the knowledge."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["language_projection"]
    )
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        torch.manual_seed(0)
        model = peft.get_peft_model(dialogue_model(), settings)
        kwargs = {"model": model, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path, preferences(4), **kwargs)
        found.append([example["ref_chosen_logps"] for example in trainer.train_dataset])
        trainer.train(resume_from_checkpoint=checkpoint)
    assert found[0] == found[1]
    bare = [bare_log_likelihood(dialogue_model(), example["messages"]) for example in preferences(4)]
    assert found[0] == pytest.approx(bare, rel=1e-5)
    trained = trained_weights(trainer.model)
    assert any(name.endswith("lora_B.default.weight") and value.any() for name, value in trained.items())


# ---- batches ----


def test_a_batch_holds_both_replies_of_each_pair(tmp_path):
    trainer = make_trainer(tmp_path)
    examples = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(examples)
    assert batch["chosen"].tolist() == [0, 2] and batch["rejected"].tolist() == [4, 5]
    assert batch["ordinary"].tolist() == [1, 3]
    chats = [*(example["messages"] for example in examples), *map(reject, examples[::2])]
    expected = DialogueCollator(processor())([{"messages": chat} for chat in chats])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["ref_chosen_logps"].dtype == torch.float32
    assert batch["ref_chosen_logps"].tolist() == [example["ref_chosen_logps"] for example in examples[::2]]


def test_a_dialogue_goes_with_each_pair(tmp_path):
    """Another one in every epoch, and none in an evaluation."""
    collator = PreferenceCollator(processor(), beside=dialogues(16))
    trainer = make_trainer(tmp_path, preferences(3), evaluation=preferences(3), collator=collator)
    batches = []
    for epoch in (0, 0, 1):
        collator.epoch = epoch
        batches.append(collator(trainer.train_dataset))
    assert batches[0]["chosen"].tolist() == [0, 1, 2] and batches[0]["rejected"].tolist() == [3, 5, 7]
    assert batches[0]["ordinary"].tolist() == [4, 6, 8]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    one, other = ({tuple(row[row > 0].tolist()) for row in batch["input_ids"][4::2]} for batch in batches[1:])
    assert one != other
    trainer.train()
    assert trainer.state.log_history[0]["loss_reply"] > 0
    assert "eval_loss_reply" not in trainer.evaluate()


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_goes_as_a_whole(tmp_path, long):
    """If one reply is too long, the other one is not learnt either, and it is told."""
    examples = preferences(3)
    text = "rain " * 300
    if long == "chosen":
        examples[1]["messages"][-1] = {"role": "assistant", "content": text}
    else:
        examples[1]["rejected"] = text
    report = SkipReport(tmp_path / "skipped")
    collator = PreferenceCollator(processor(), max_length=200, report=report)
    trainer = make_trainer(tmp_path, examples, collator=collator)
    batch = collator(trainer.train_dataset)
    labelled = (batch["labels"] != IGNORED).any(1)
    assert labelled.tolist() == [True, False, True, True, False, True]
    assert batch["chosen"].tolist() == [0, 2] and batch["rejected"].tolist() == [3, 5]
    assert report.counts() == {"unusable dialogue": 1}
    assert list(report.skipped()["unusable dialogue"]) == ["dialogue/1"]
    alone = collator(trainer.train_dataset[1:2])  # a step in which nothing is scored
    loss = trainer.compute_loss(trainer.model.train(), alone)
    assert loss.item() == 0
    loss.backward()


def test_a_pair_without_its_reference_is_refused():
    with pytest.raises(ValueError, match="ref_chosen_logps.*PreferenceTrainer"):
        PreferenceCollator(processor())(preferences(1))


# ---- data ----


def write_lines(path: Path, records: list) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


PROMPT = [{"role": "user", "content": "a dog?"}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))


@pytest.mark.parametrize(
    "record",
    [
        {"turns": ["a dog?", "yes"], "rejected": " no "},
        {"messages": PROMPT + CHOSEN, "rejected": "no"},
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
        {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
    ],
    ids=["turns", "messages", "explicit prompt", "implicit prompt"],
)
@pytest.mark.parametrize("hub", [False, True], ids=["file", "Dataset"])
def test_pairs_are_read_from_every_format(record, hub, tmp_path):
    source = Dataset.from_list([record]) if hub else write_lines(tmp_path / "d.jsonl", [record])
    [example] = load_preferences(source)
    assert example["messages"] == PROMPT + CHOSEN and example["rejected"] == "no"
    assert example["references"] == ["yes"] and example["key"]


def test_rows_without_a_rejected_reply_are_ordinary_dialogues(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [{"turns": ["a", "b"], "rejected": "c"}, {"turns": ["d", "e"]}])
    other = write_lines(tmp_path / "other.jsonl", [{"turns": ["f", "g"]}])
    assert {example["key"]: example["rejected"] for example in load_preferences([one, other])} == {
        "one:1": "c",
        "one:2": None,
        "other:1": None,
    }


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"turns": ["a", "b"], "rejected": " "}, "empty turn"),
        ({"turns": ["a", "b"], "rejected": "b "}, "the rejected reply is the chosen one"),
        ({"turns": ["a", "b"], "rejected": ["c"]}, "a turn that is not text"),
        ({"prompt": PROMPT, "chosen": CHOSEN}, "a chosen reply without a rejected one"),
        ({"prompt": "a dog?", "chosen": "yes", "rejected": "no"}, "a prompt or replies that are not messages"),
        ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": PROMPT + REJECTED}, "replies to different turns"),
        (
            {"messages": PROMPT + CHOSEN + CHOSEN, "rejected": "no"},
            "replies that do not follow a user's turn",
        ),
    ],
)
def test_unusable_pairs_are_told(record, reason, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [record, {"turns": ["a", "b"], "rejected": "c"}])
    report = SkipReport(tmp_path / "skipped")
    assert [example["key"] for example in load_preferences(path, report=report)] == ["d:2"]
    assert report.skipped() == {reason: {"d:1": ""}}


# ---- training ----


def test_a_batch_in_parts_is_the_whole_batch(tmp_path):
    """Pairs and dialogues fall unevenly on the parts; losses, rewards and weights are those of the whole batch."""
    settings = {"optim": "sgd", "max_grad_norm": 0, "rpo_alpha": 0.3, "reply_weight": 0.5}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    runs = []
    for name, change in (("whole", {}), ("parts", halves)):
        trainer = make_trainer(tmp_path / name, **settings, **change)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged = [{k: v for k, v in step.items() if k.startswith(("loss", "grad", "rewards"))} for step in steps]
        runs.append((logged, trained_weights(trainer.model)))
    (whole, weights), (parts, others) = runs
    assert set(whole[0]) == {
        "loss",
        "loss_preference",
        "loss_chosen",
        "loss_reply",
        "grad_norm",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
    }
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-5)
        total = one["loss_preference"] + 0.3 * one["loss_chosen"] + 0.5 * one["loss_reply"]
        assert one["loss"] == pytest.approx(total, abs=1e-4)
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)


def test_the_margin_grows(tmp_path):
    trainer = make_trainer(tmp_path, preferences(8), evaluation=preferences(8), max_steps=12, beta=0.5)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 1
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]
    assert after["eval_rewards/accuracies"] >= 0.75 and after["eval_loss"] < before["eval_loss"]
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]
    assert not [name for name in trained_weights(trainer.model) if name.startswith(("language_model", "matching"))]


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    metrics = []
    for size in (3, 16):
        trainer = make_trainer(tmp_path, evaluation=mixed(), per_device_eval_batch_size=size, rpo_alpha=0.3)
        metrics.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "rewards" in k})
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    one = metrics[0]
    total = one["eval_loss_preference"] + 0.3 * one["eval_loss_chosen"] + one["eval_loss_reply"]
    assert one["eval_loss"] == pytest.approx(total, rel=1e-5)
    pairs = trainer.evaluate([example for example in mixed() if "rejected" in example])
    assert pairs["eval_rewards/margins"] == pytest.approx(one["eval_rewards/margins"], rel=1e-4)
    assert "eval_loss_reply" not in pairs
    with pytest.raises(ValueError, match="hold no pair"):
        trainer.evaluate(dialogues(3))


def test_dialogues_of_similar_length_may_be_read_together(tmp_path):
    """The losses of all data in one batch are the same in any order."""
    examples, losses = Dataset.from_list([{"rejected": None, **example} for example in mixed()]), []
    for strategy in ("random", "group_by_length"):
        settings = {"per_device_train_batch_size": 16, "max_steps": 1, "train_sampling_strategy": strategy}
        trainer = make_trainer(tmp_path, examples, **settings)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert trainer.state.log_history[0]["loss_reply"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_interrupted_run_is_the_whole_run(tmp_path):
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = dialogue_model(dropout=0.1)
        trainer = make_trainer(tmp_path, model=model, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append(trained_weights(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": float("nan")}, "beta must be above 0"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be 0 or more"),
        ({"reply_weight": float("inf")}, "reply_weight must be 0 or more"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be used"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False cannot be used"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_data_and_parts_that_cannot_be_meant(tmp_path):
    for data in ({"train": dialogues(4)}, {"evaluation": dialogues(4)}, {"evaluation": {"one": []}}):
        with pytest.raises(ValueError, match="hold no pair"):
            make_trainer(tmp_path, **data)
    with pytest.raises(ValueError, match="10 dialogues without a rejected reply.*reply_weight=0"):
        make_trainer(tmp_path, reply_weight=0.0)
    with pytest.raises(ValueError, match="4 dialogues without a rejected reply"):
        beside = PreferenceCollator(processor(), beside=dialogues(4))
        make_trainer(tmp_path, preferences(2), collator=beside, reply_weight=0.0)
    with pytest.raises(ValueError, match="a stream"):
        make_trainer(tmp_path, Dataset.from_list(preferences(2)).to_iterable_dataset())
    with pytest.raises(ValueError, match="objectives of its own"):
        make_trainer(tmp_path, model=pretraining_model({"reply": 1.0}))
    with pytest.raises(TypeError, match="PreferenceCollator"):
        make_trainer(tmp_path, collator=DialogueCollator(processor()))
    with pytest.raises(TypeError, match="PreferenceTrainingArguments"):
        PreferenceTrainer(dialogue_model(), arguments(tmp_path), PreferenceCollator(processor()))
    with pytest.raises(ValueError, match="makes no predictions"):
        make_trainer(tmp_path).predict(preferences(2))


# ---- the stage ----


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prefer") / "start"
    for part in build_from(backbones, "qwen", "separate"):
        part.save_pretrained(folder)
    return folder


def recipe_of(checkpoint: Path, folder: Path, **data) -> dict:
    records = [{"messages": example["messages"], "rejected": example["rejected"]} for example in preferences(6)]
    plain = [{"messages": example["messages"]} for example in dialogues(6)]
    train, human = write_lines(folder / "pairs.jsonl", records), write_lines(folder / "human.jsonl", plain)
    training = {"output_dir": str(folder / "out"), "max_steps": 2, "save_steps": 1, "logging_steps": 1}
    return {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"train": train, "validation": train, "dialogues": human, **data},
        "collator": {"max_length": 300},
        "training": training | {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    }


def test_the_command_trains_and_resumes(checkpoint, tmp_path, capsys):
    recipe = recipe_of(checkpoint, tmp_path, dialogues=None)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ["prefer", "--config", str(tmp_path / "tiny.yaml"), f"data.dialogues={tmp_path / 'human.jsonl'}"]
    main([*command, "beta=2.0e-1", "rpo_alpha=3e-1"])
    told = capsys.readouterr().out
    metrics = json.loads(told[told.rindex("{") :])
    assert {"eval_loss", "eval_loss_preference", "eval_rewards/accuracies", "eval_rewards/margins"} <= set(metrics)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"][0]["loss_reply"] > 0
    records = list(yaml.safe_load_all((tmp_path / "out" / "recipe.yaml").read_text()))
    assert records[-1]["stage"] == "prefer" and records[-1]["training"]["beta"] == 0.2
    start, end = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    assert start.keys() == end.keys()
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"iqformer", "language_projection", "knowledge_base", "knowledge_gate"}
    VikdfForConditionalGeneration.from_pretrained(tmp_path / "out")
    main([*command, "beta=2.0e-1", "max_steps=3"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_pairs_beside_pairs_are_refused(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, tmp_path, dialogues=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ValueError, match=r"data.dialogues hold pairs.*data.train"):
        run_stage("prefer", recipe)


def test_a_card_names_the_dialogues_beside_the_pairs():
    from modeling_vikdf.cards.facts import describe_data_sets

    stage = {"stage": "prefer", "data": {"train": "pairs.jsonl", "dialogues": "human.jsonl"}}
    assert [data["name"] for data in describe_data_sets([stage])] == ["pairs.jsonl", "human.jsonl"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": None}}, "set data.train"),
        ({"data": {"pairs": "p.tar"}}, r"Unknown keys \['pairs'\] in section 'data'.*'prefer' knows"),
        ({"collator": {"hide_context": 0.3}}, r"Unknown keys \['hide_context'\].*max_length"),
        ({"collator": {"max_length": "long"}}, "collator.max_length must be int, not 'long'"),
        ({"objectives": {"knowledge_to_text": 1.0}}, "beta, rpo_alpha and reply_weight"),
        ({"training": {"betta": 0.1}}, "for 'betta', did you mean 'beta'"),
        ({"training": {"beta": -1}}, "beta must be above 0"),
        ({"training": {"beta": "high"}}, "beta must be a number, got 'high'"),
        ({"training": {"rpo_alpha": None}}, "rpo_alpha must be 0 or more, got None"),
    ],
)
def test_recipes_that_cannot_be_meant(sections, message, tmp_path):
    recipe = {"model": {"checkpoint": "nowhere"}, "data": {"train": "d.jsonl"}, "training": {"output_dir": "out"}}
    for section, settings in sections.items():
        recipe[section] = {**recipe.get(section, {}), **settings}
    with pytest.raises(ValueError, match=message):
        run_stage("prefer", recipe)


def test_settings_of_preferences_are_those_of_its_stage_alone():
    recipe = {"model": {"checkpoint": "x"}, "data": {"train": "d.jsonl"}, "training": {"output_dir": "o", "beta": 0.1}}
    assert check_recipe("prefer", recipe).training["beta"] == 0.1
    with pytest.raises(ValueError, match=r"Unknown keys \['beta'\] in section 'training'"):
        check_recipe("tune", recipe)


# ---- the pairs ----


def test_the_replies_that_are_chosen_are_pairs(tmp_path, monkeypatch):
    """The best of the LLM's own replies as the last turn, the worst that it has ended rejected."""
    script, calls = load_script("choose_replies"), []

    def reply(chats, num_return_sequences, use_knowledge, **kwargs):
        calls.append((len(chats), use_knowledge))
        texts = [" good ", *["fair"] * 5, "bad\n", "broken off"][:num_return_sequences]
        return [[{"generated_text": text} for text in texts]] * len(chats)

    class Model:
        device = "cpu"
        generation_config = type("Config", (), {"num_candidates": 8})

    monkeypatch.setattr(script, "load_model", lambda source: (Model, None))
    monkeypatch.setattr(script, "pipeline", lambda *args, **kwargs: reply)
    source, output = write_lines(tmp_path / "d.jsonl", [{"turns": ["a dog?", "yes"]}] * 2), tmp_path / "pairs.jsonl"
    options = ["--model", "m", "--dialogues", source, "--contexts", "2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["choose_replies.py", *options])
    script.main()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records == [{"turns": ["A dog?", "good"], "rejected": "bad"}] * 2
    assert {example["rejected"] for example in load_preferences(str(output))} == {"bad"}
    output.unlink()
    monkeypatch.setattr("sys.argv", ["choose_replies.py", *options, "--knowledge"])
    script.main()
    assert calls == [(2, False), (2, True)]
