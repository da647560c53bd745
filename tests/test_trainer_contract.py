"""Trainer's contract: every setting of it works, or is refused before anything runs."""

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from tiny_training import (
    ALL,
    arguments,
    dialogue_model,
    dialogues,
    logged_losses,
    make_trainer,
    pairs,
    pretraining_model,
    processor,
)
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from modeling_vikdf import (
    VikdfConfig,
    VikdfForConditionalGeneration,
    VikdfForPreTraining,
    VikdfProcessor,
    modeling_distillation,
    modeling_prefix,
    modeling_vikdf,
)
from modeling_vikdf.data.collators import DialogueCollator, JointCollator, PreTrainingCollator
from modeling_vikdf.modeling_prefix import CACHE
from modeling_vikdf.training import arguments as training_arguments
from modeling_vikdf.training import trainer as training
from modeling_vikdf.training.trainer import VikdfTrainer, VikdfTrainingArguments


def enable_checkpointing(model: nn.Module, **kwargs) -> None:
    """By its present name, or the one it had up to transformers 5.23."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs or None)


def saved_bytes(run, where=lambda: True) -> int:
    """How much the backward pass of `run()` keeps, but for parameters; of what runs `where()` holds."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        if where() and not isinstance(tensor, nn.Parameter):
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def batch_of(model: nn.Module, rows: int = 4) -> dict:
    if hasattr(model, "pixel_decoder"):
        collate = PreTrainingCollator(processor(), model.config, image_knowledge_share=0.5, other_caption=True)
        return collate(pairs(rows))
    return DialogueCollator(processor())(dialogues(rows))


def gradients(model: nn.Module, **batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODELS = {"dialogues": dialogue_model, "pairs": lambda **kwargs: pretraining_model(ALL, **kwargs)}


# ---- gradient checkpointing ----


@pytest.fixture
def apart(monkeypatch):
    """The prefix is read in a pass of its own, which does not pay for models as small as these."""
    monkeypatch.setattr(modeling_prefix, "WORTH_APART", {"cpu": 0, "cuda": 0})


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_keeps_the_gradients(kind, llm, use_reentrant):
    """With dropout in what trains and, had it its way, in the LLM; the prefix is read once, into the cache."""
    model = MODELS[kind](llm=llm, dropout=0.1)
    model.language_model.config.attention_dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = batch_of(model)
    expected = gradients(model, **batch)
    read = []
    model.read_prefix = lambda *args: read.append(type(model).read_prefix(model, *args)) or read[-1]
    enable_checkpointing(model, use_reentrant=use_reentrant)
    found = gradients(model, **batch)
    assert read and all(cache.get_seq_length() > 0 for cache in read)
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not any(module.training for module in model.language_model.modules())


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_keeps_the_input_of_the_llms_layers_alone(kind):
    """And of the columns behind the prefix alone, which is read without gradient as it is without checkpointing."""
    model = MODELS[kind]()
    batch, inside, inputs = batch_of(model), [], []

    def enter(layer, args):
        inside.append(torch.is_grad_enabled())
        inputs.append(args[0].numel() * args[0].element_size() if inside[-1] else 0)

    def leave(*_):
        inside.pop()

    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    activations = saved_bytes(lambda: model(**batch), where=lambda: inside and inside[-1])
    whole = 4 * batch["input_ids"].numel() * model.config.text_config.hidden_size
    inputs.clear()
    enable_checkpointing(model)
    kept = saved_bytes(lambda: model(**batch), where=lambda: inside and inside[-1])
    assert kept == sum(inputs) < activations / 5
    assert max(inputs) < whole


def test_the_llms_own_checkpointing_saves_as_much():
    """The knowledge in the first column, so that there is no prefix to read apart."""
    model = dialogue_model()
    batch = DialogueCollator(processor())(dialogues(4))
    first = int((batch["input_ids"] == model.config.knowledge_token_id).any(0).int().argmax())
    batch |= {key: batch[key][:, first:] for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    found, expected = [], []
    for enabled in (False, True):
        if enabled:
            enable_checkpointing(model)
            model.iqformer.eval()
        found.append(saved_bytes(lambda: model(**batch)))
        llm = copy.deepcopy(model.language_model.model).train()
        embeds = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size, requires_grad=True)
        inputs = {"inputs_embeds": embeds, **{key: batch[key] for key in ("attention_mask", "position_ids")}}
        expected.append(saved_bytes(functools.partial(llm, **inputs)))
    assert found[0] - found[1] == expected[0] - expected[1] > expected[0] / 2


@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_by_trainer(kind, tmp_path):
    """Its setting reaches the LLM's layers, with its own arguments, and changes no loss."""
    losses, layers = [], []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}):
        trainer = make_trainer(tmp_path, None if kind == "dialogues" else ALL, max_steps=2, **settings)
        trainer.train()
        losses.append(logged_losses(trainer))
        layers.append([layer.gradient_checkpointing for layer in trainer.model.language_model.model.layers])
    assert layers == [[False, False], [True, False]]
    for step, other in zip(*losses, strict=True):
        assert other == pytest.approx(step, abs=2e-6)


def test_checkpointing_with_lora():
    """An LLM that is trained has no prefix that is read without gradient, and no cache."""
    model = lora(dialogue_model())
    batch = batch_of(model)
    expected = gradients(model, **batch)
    plain = saved_bytes(lambda: model(**batch))
    enable_checkpointing(model.get_base_model())
    found = gradients(model, **batch)
    assert any("lora_B" in name for name in expected) and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert saved_bytes(lambda: model(**batch)) < plain / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dropout_of_lora_is_on_in_training(checkpointing):
    """Its own and no other's in the LLM, and the same in both passes over a checkpointed layer."""
    model = lora(dialogue_model(), dropout=0.5)
    llm, batch = model.get_base_model().language_model, batch_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = gradients(model.train(), **batch)
    assert nn.Dropout in {type(module) for module in llm.modules() if module.training}
    assert not any(layer.training for layer in llm.model.layers)
    if checkpointing:
        enable_checkpointing(model.get_base_model())
        found = gradients(model, **batch)
        assert all(torch.allclose(found[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())
    with torch.no_grad():
        losses = [[model.train(mode)(**batch).loss.item() for _ in range(2)] for mode in (True, False)]
    assert losses[0][0] != losses[0][1] and losses[1][0] == losses[1][1]


def test_a_cache_of_ones_own_is_read_and_not_written_with_checkpointing():
    model = dialogue_model()
    ids = torch.randint(10, 390, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 6:]
        cache = model(input_ids=ids[:, :6], use_cache=True)[CACHE]
    enable_checkpointing(model)
    logits = model(input_ids=ids[:, 6:], **{CACHE: cache}).logits
    logits.sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 6


def test_an_llm_whose_layers_cannot_checkpoint_says_so():
    model = dialogue_model()
    model.language_model.model.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    model.language_model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="has no layers of transformers' GradientCheckpointingLayer"):
        model(**batch_of(model))


# ---- what the loss is ----


def lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        lora_dropout=dropout,
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["iqformer", "language_projection"],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def plain_trainer(folder, model: nn.Module, data: list, collator=None, **kwargs) -> Trainer:
    """transformers' own, with the settings of `arguments`."""
    constructor = {name: kwargs.pop(name) for name in ("compute_metrics", "eval_dataset") if name in kwargs}
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder), remove_unused_columns=False, report_to=[], use_cpu=True, **settings | kwargs
    )
    collator = DialogueCollator(processor()) if collator is None else collator
    return Trainer(model=model, args=args, train_dataset=data, data_collator=collator, **constructor)


def vikdf_trainer(folder, model: nn.Module, data: list, collator=None, **kwargs) -> VikdfTrainer:
    names = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "eval_dataset", "optimizers")
    names += ("optimizer_cls_and_kwargs", "model_init")
    constructor = {name: kwargs.pop(name) for name in names if name in kwargs}
    collator = DialogueCollator(processor()) if collator is None else collator
    args = arguments(folder, log_level="error", **{"max_steps": 1, **kwargs})
    return VikdfTrainer(model=model, args=args, train_dataset=data, data_collator=collator, **constructor)


TRAINERS = {"Trainer": plain_trainer, "VikdfTrainer": vikdf_trainer}
WRAPPERS = {"bare": lambda model: model, "peft": lora}


def smoothed(logits: torch.Tensor, targets: torch.Tensor, epsilon: float) -> float:
    """By hand: of each target 1 - epsilon, and of every token of the vocabulary epsilon / V; mean over targets."""
    known = targets != -100
    log_probs = logits.detach().double().log_softmax(-1)[known]  # [K, V]
    own = log_probs.gather(1, targets[known][:, None]).mean()
    return -float((1 - epsilon) * own + epsilon * log_probs.mean())


def logits_of(model: nn.Module, batch: dict) -> torch.Tensor:
    """Of all columns [B, T, V]."""
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.mark.parametrize("epsilon", [0.3, 1e-9])
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("make", TRAINERS)
def test_labels_are_smoothed_where_they_are_predicted(make, wrap, epsilon, tmp_path):
    model, batch = WRAPPERS[wrap](dialogue_model()), DialogueCollator(processor())(dialogues(4))
    expected = smoothed(logits_of(model, batch)[:, :-1], batch["labels"][:, 1:], epsilon)
    trainer = TRAINERS[make](tmp_path, model, dialogues(4), label_smoothing_factor=epsilon, eval_dataset=dialogues(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged_losses(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["masked_text", "knowledge_to_text"])
def test_labels_are_smoothed_in_pretraining(objective, tmp_path, monkeypatch):
    """In the objectives that predict tokens, whose logits and targets the loss functions see."""
    name, module = {
        "masked_text": ("masked_text_loss", modeling_distillation),
        "knowledge_to_text": ("reply_loss", modeling_vikdf),
    }[objective]
    seen, loss = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (seen.append(args[:2]), loss(*args))[1])
    settings = {"max_steps": 1, "per_device_train_batch_size": 16}
    trainer = make_trainer(tmp_path, {objective: 1.0}, label_smoothing_factor=0.3, **settings)
    trainer.train()
    logged = trainer.state.log_history[0]
    expected = smoothed(*seen[0], 0.3)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged[f"loss_{objective}"] == pytest.approx(expected, rel=1e-4)


def test_replies_are_smoothed_beside_pictures():
    model = pretraining_model({"reply": 1.0})
    batch = DialogueCollator(processor())(dialogues(4))
    expected = smoothed(logits_of(dialogue_of(model), batch)[:, :-1], batch["labels"][:, 1:], 0.3)
    assert model(dialogues=batch, smoothing=0.3).loss.item() == pytest.approx(expected, rel=1e-5)


def dialogue_of(model: nn.Module) -> nn.Module:
    other = VikdfForConditionalGeneration(model.config)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.train()


def test_smoothing_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor: no objective .* predicts tokens"):
        make_trainer(tmp_path, {"text_image_matching": 1.0}, label_smoothing_factor=0.1)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("make", TRAINERS)
def test_neftune_adds_its_noise_to_the_prompt_in_training_alone(make, wrap, tmp_path):
    """Uniform and at most alpha / sqrt(T d), on every token but the knowledge, which replaces what was looked up."""
    model, batch, alpha = WRAPPERS[wrap](dialogue_model()), DialogueCollator(processor())(dialogues(4)), 5.0
    base, embeds = (model.get_base_model() if wrap == "peft" else model), []
    run = base.run_language_model
    base.run_language_model = lambda embedded, *args, **kwargs: (
        embeds.append(embedded.detach()),
        run(embedded, *args, **kwargs),
    )[1]
    model(**batch)
    settings = {"train_sampling_strategy": "sequential", "neftune_noise_alpha": alpha}
    settings |= {"eval_dataset": dialogues(4), "eval_strategy": "steps"}
    trainer = TRAINERS[make](tmp_path, model, dialogues(4), **settings)
    trainer.train()
    plain, noisy, evaluated = embeds
    # of all tokens that are looked up, those are read that something is predicted from
    placeholders = batch["input_ids"].gather(1, batch["token_columns"]) == base.config.knowledge_token_id
    noise = (noisy - plain)[~placeholders].abs()
    bound = alpha / (batch["input_ids"].shape[1] * plain.shape[2]) ** 0.5
    assert 0.95 * bound < noise.max() <= bound * (1 + 1e-5) and noise.mean() == pytest.approx(bound / 2, rel=0.05)
    assert torch.equal(noisy[placeholders], plain[placeholders])
    assert torch.equal(evaluated[~placeholders], plain[~placeholders])  # what trains has moved


def test_neftune_in_pretraining(tmp_path):
    """The prompts of captions are noisy, too, and the frozen encoders' texts are not."""
    losses = []
    for alpha in (None, 5.0):
        trainer = make_trainer(tmp_path, ALL, max_steps=1, neftune_noise_alpha=alpha)
        trainer.train()
        losses.append(logged_losses(trainer)[0])
    moved = {name for name in losses[0] if losses[0][name] != losses[1][name]}
    assert moved == {"loss", "loss_knowledge_to_text", "loss_text_to_knowledge"}


def test_shifted_labels_by_hand():
    """They are what each position predicts, in place of `labels`, and may be all that is given."""
    model, batch = dialogue_model(), DialogueCollator(processor())(dialogues(4))
    logits = logits_of(model, batch)
    targets = torch.full_like(batch["labels"], -100)
    targets[:, 3::5] = torch.randint(0, 390, targets[:, 3::5].shape, generator=torch.Generator().manual_seed(0))
    expected = smoothed(logits, targets, 0.0)
    assert model(**batch, shift_labels=targets).loss.item() == pytest.approx(expected, rel=1e-5)
    labels = batch.pop("labels")
    output = model(**batch, shift_labels=targets)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5) and output.logits.shape == logits.shape
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    assert model(**batch, shift_labels=shifted).loss.item() == pytest.approx(
        model(**batch, labels=labels).loss.item(), rel=1e-6
    )


@pytest.mark.parametrize("make", TRAINERS)
def test_shifted_labels_of_a_collator(make, tmp_path):
    """Other numbers of targets in the parts of a batch: they count, and not the labels."""

    def collate(examples):
        batch = DialogueCollator(processor())(examples)
        targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clone()
        if examples[0]["key"] == "dialogue/0":
            targets[:, ::2] = -100
        return {**batch, "shift_labels": targets}

    model, log, count = dialogue_model(), 0.0, 0
    for start in (0, 2):
        batch = collate(dialogues(4)[start : start + 2])
        known = int((batch["shift_labels"] != -100).sum())
        log += smoothed(logits_of(model, {**batch, "shift_labels": None}), batch["shift_labels"], 0.0) * known
        count += known
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = TRAINERS[make](tmp_path, model, dialogues(4), collate, train_sampling_strategy="sequential", **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(log / count, rel=1e-5)


def label_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels of every token that another one, not padding, stands directly before."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    behind = F.pad(mask, (1, 0))[:, :-1]
    return ids.masked_fill(~(mask & behind) | (ids == processor().knowledge_token_id), -100)


def test_labels_that_a_collator_changes_are_scored(tmp_path):
    """Also those that it adds outside of the columns in which `DialogueCollator` found some."""

    def collate(examples):
        batch = DialogueCollator(processor())(examples)
        return {**batch, "labels": label_tokens(batch)}

    batch, model = collate(dialogues(4)), dialogue_model()
    expected = smoothed(logits_of(model, batch), F.pad(batch["labels"], (0, 1), value=-100)[:, 1:], 0.0)
    trainer = vikdf_trainer(tmp_path, model, dialogues(4), collate, eval_dataset=dialogues(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged_losses(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_what_a_collator_changes_of_pairs_is_scored(kind, tmp_path):
    """Other labels of captions, masked tokens and pictures than `PreTrainingCollator` chose, and beside dialogues."""

    class Everything(JointCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            for prompts in (batch, batch["dialogues"]):
                prompts["labels"] = label_tokens(prompts)
            batch["masked_labels"] = batch["context_input_ids"].where(batch["context_attention_mask"] == 1, -100)
            batch["masked_cells"] = torch.ones_like(batch["masked_cells"])
            return batch

    model = pretraining_model({**ALL, "reply": 1.0})
    readers = DialogueCollator(processor()), PreTrainingCollator(processor(), model.config)
    collate, found = Everything(*readers, pairs(4), pairs(4)), ("_columns", "_positions", "_patches")
    batch = collate(dialogues(4))
    plain = {name: value for name, value in batch.items() if not name.endswith(found)}
    plain["dialogues"] = {name: value for name, value in batch["dialogues"].items() if not name.endswith(found)}
    with torch.no_grad():
        expected = {f"loss_{name}": value.item() for name, value in model(**plain).losses.items()}
    data = dialogues(4) if kind == "map-style" else datasets.Dataset.from_list(dialogues(4)).to_iterable_dataset()
    trainer = vikdf_trainer(tmp_path, model, data, collate)
    trainer.train()
    logged = logged_losses(trainer)[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_loss_of_ones_own(wrap, tmp_path):
    """It sees the logits of all columns, the labels, and how many are scored in all parts of the batch."""

    def halved(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch / 2

    runs = []
    for settings in ({}, {"compute_loss_func": halved}):
        model = WRAPPERS[wrap](dialogue_model())
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = vikdf_trainer(tmp_path, model, dialogues(4), eval_dataset=dialogues(4), **parts, **settings)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        runs.append([before, logged_losses(trainer)[0]["loss"]])
    assert runs[1] == pytest.approx([value / 2 for value in runs[0]], rel=1e-5)


# ---- predictions and metrics ----


def likelihood(prediction) -> dict[str, float]:
    """As one writes it for any causal LM: logits up to the last but one, labels from the second on."""
    logits, labels = torch.from_numpy(prediction.predictions[:, :-1]), torch.from_numpy(prediction.label_ids[:, 1:])
    hits = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    return {"nats": smoothed(logits, labels, 0.0), "accuracy": float(hits)}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_metrics_see_what_eval_loss_scores(wrap, tmp_path):
    """Batches of other lengths, padded; what is computed from the predictions is the loss that is reported."""
    trainer = vikdf_trainer(
        tmp_path,
        WRAPPERS[wrap](dialogue_model()),
        dialogues(7),
        eval_dataset=dialogues(7),
        compute_metrics=likelihood,
        per_device_eval_batch_size=2,
        eval_accumulation_steps=1,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_nats"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    test = trainer.predict(dialogues(7))
    assert test.metrics["test_nats"] == pytest.approx(metrics["eval_nats"], rel=1e-6)
    assert test.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    labels = DialogueCollator(processor())(dialogues(7))["labels"]
    assert test.predictions.shape == (*test.label_ids.shape, 512) and test.label_ids.shape[1] < labels.shape[1]
    for row, whole in zip(test.label_ids, labels, strict=True):
        assert row[row != -100].tolist() == whole[whole != -100].tolist()


def test_predictions_hide_nothing(tmp_path):
    """A collator that hides contexts in training shows them in a prediction, as in an evaluation."""
    predicted = []
    for collator in (DialogueCollator(processor()), DialogueCollator(processor(), hide_context=1.0)):
        trainer = vikdf_trainer(tmp_path, dialogue_model(), dialogues(4), collator)
        predicted.append(trainer.predict(dialogues(4)).predictions)
    assert (predicted[0] == predicted[1]).all()


def test_predictions_without_labels(tmp_path):
    def collate(examples):
        batch = DialogueCollator(processor())(examples)
        return {key: value for key, value in batch.items() if key != "labels"}

    model = dialogue_model().eval()
    trainer = vikdf_trainer(tmp_path, model, dialogues(4), collate)
    output = trainer.predict(dialogues(3))
    assert output.label_ids is None and "test_loss" not in output.metrics
    torch.testing.assert_close(torch.from_numpy(output.predictions), model(**collate(dialogues(3))).logits.detach())


def test_logits_are_processed_before_they_are_kept(tmp_path):
    shapes = []

    def best(logits, labels):
        shapes.append((logits.shape[:2], labels.shape))
        return logits.argmax(-1)

    def accuracy(prediction):
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[prediction.label_ids[:, 1:] != -100].mean())}

    found = {}
    for metrics, process in ((likelihood, None), (accuracy, best)):
        settings = {"compute_metrics": metrics, "preprocess_logits_for_metrics": process}
        trainer = vikdf_trainer(tmp_path, dialogue_model(), dialogues(4), eval_dataset=dialogues(5), **settings)
        found[metrics] = trainer.evaluate()["eval_accuracy"]
    assert found[likelihood] == pytest.approx(found[accuracy]) and all(one == other for one, other in shapes)


def test_metrics_batch_by_batch_with_inputs_and_losses(tmp_path):
    kept = []

    def count(prediction, compute_result=None):
        kept.append(prediction)
        return {"batches": len(kept)}

    settings = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2}
    trainer = vikdf_trainer(
        tmp_path,
        dialogue_model(),
        dialogues(4),
        eval_dataset=dialogues(4),
        compute_metrics=count,
        batch_eval_metrics=True,
        **settings,
    )
    assert trainer.evaluate()["eval_batches"] == 2
    batch = DialogueCollator(processor())(dialogues(4)[2:])
    assert torch.as_tensor(kept[1].inputs["input_ids"]).equal(batch["input_ids"])
    expected = smoothed(logits_of(trainer.model, batch)[:, :-1], batch["labels"][:, 1:], 0.0)
    assert torch.as_tensor(kept[1].losses).tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_the_best_model_by_a_metric_of_ones_own(tmp_path):
    trainer = vikdf_trainer(
        tmp_path,
        dialogue_model(),
        dialogues(4),
        eval_dataset=dialogues(4),
        compute_metrics=likelihood,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="nats",
        greater_is_better=True,
    )
    trainer.train()
    nats = [entry["eval_nats"] for entry in trainer.state.log_history if "eval_nats" in entry]
    assert trainer.state.best_metric == max(nats) and len(set(nats)) == 3
    assert trainer.evaluate()["eval_nats"] == pytest.approx(max(nats), rel=1e-6)


@pytest.mark.parametrize("setting", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"], ids=str)
def test_pretraining_refuses_what_needs_predictions(setting, tmp_path):
    model = pretraining_model({"masked_text": 1.0})
    collator = PreTrainingCollator(processor(), model.config)
    with pytest.raises(ValueError, match=f"{setting}=.* cannot be used here"):
        vikdf_trainer(tmp_path, model, pairs(4), collator, **{setting: likelihood})


def test_pretraining_predicts_nothing(tmp_path):
    with pytest.raises(ValueError, match="makes no predictions"):
        make_trainer(tmp_path, {"masked_text": 1.0}).predict(pairs(2))


# ---- where the model comes from ----


class Grid:
    """A search that tries what it is given, as the backends do that transformers knows."""

    @staticmethod
    def ensure_available():
        pass

    @staticmethod
    def default_hp_space(trial):
        return {}

    @staticmethod
    def run(trainer, n_trials, direction, grid):
        runs = []
        for trial in grid:
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=trial)
            runs.append((trainer.evaluate()["eval_loss"], trial, trainer.model))
        return min(runs, key=lambda run: run[0])


def test_hyperparameters_are_searched_with_new_models(tmp_path, monkeypatch):
    """Each begins anew, with what it does not train frozen as ever, and what it does moves at the trial's rate."""
    monkeypatch.setattr("transformers.integrations.hp_params", vars)  # wants the package of the backend
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Grid)
    trainer = vikdf_trainer(
        tmp_path,
        None,
        dialogues(4),
        model_init=lambda: dialogue_model(),
        eval_dataset=dialogues(4),
        max_steps=2,
        learning_rates={"iqformer": 0},
    )
    grid = [SimpleNamespace(number=i, params={"learning_rate": rate}) for i, rate in enumerate((1e-12, 1e-2))]
    search = {"backend": "optuna", "hp_space": lambda trial: trial.params}
    loss, trial, best = trainer.hyperparameter_search(grid=grid, n_trials=2, **search)
    assert trial is grid[1]
    untrained = vikdf_trainer(tmp_path, dialogue_model(), dialogues(4), eval_dataset=dialogues(4)).evaluate()
    assert loss < untrained["eval_loss"]
    trained = {name.partition(".")[0] for name, parameter in best.named_parameters() if parameter.requires_grad}
    assert trained == {"language_projection", "knowledge_base", "knowledge_gate"}


def test_a_model_of_model_init_trains_as_one_that_is_passed(tmp_path):
    runs = []
    for model, given in ((dialogue_model(), {}), (None, {"model_init": lambda: dialogue_model()})):
        given["train_sampling_strategy"] = "sequential"
        trainer = vikdf_trainer(tmp_path, model, dialogues(8), max_steps=2, **given)
        trainer.train()
        runs.append(logged_losses(trainer))
    assert runs[0] == runs[1]


def saved_token_ids(model: nn.Module, reader: VikdfProcessor, folder: Path) -> list[dict]:
    """What the LLM's configuration and the generation's call the special tokens, after a step of training."""
    is_pretraining = isinstance(model, VikdfForPreTraining)
    trainer = VikdfTrainer(
        model=model,
        args=arguments(folder, max_steps=1, log_level="warning"),
        train_dataset=pairs(4) if is_pretraining else dialogues(4),
        data_collator=PreTrainingCollator(reader, model.config) if is_pretraining else DialogueCollator(reader),
        processing_class=reader,
    )
    trainer.train()
    trainer.save_model()
    configs = VikdfConfig.from_pretrained(folder).text_config, GenerationConfig.from_pretrained(folder)
    return [{name: getattr(config, name) for name in SPECIAL_TOKENS} for config in configs]


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAKERS = {"dialogues": dialogue_model, "pretraining": functools.partial(pretraining_model, ALL)}


@pytest.mark.parametrize("make_model", MAKERS.values(), ids=MAKERS)
def test_special_tokens_become_the_tokenizers_in_silence(make_model, tmp_path, caplog):
    reader = processor("llama")
    bos, eos, pad = (getattr(reader.tokenizer, name) for name in SPECIAL_TOKENS)
    model = make_model(llm="llama", knowledge_token_id=reader.knowledge_token_id)
    model.config.text_config.update({"pad_token_id": None, "eos_token_id": [7, eos]})
    model.generation_config = GenerationConfig(eos_token_id=[7, 9], bos_token_id=bos)
    of_llm, of_generation = saved_token_ids(model, reader, tmp_path)
    assert not [message for message in caplog.messages if "PAD/BOS/EOS" in message]
    assert of_llm == {"bos_token_id": bos, "eos_token_id": [7, eos], "pad_token_id": pad}
    # what ended a reply still ends it
    assert of_generation == {"bos_token_id": bos, "eos_token_id": [eos, 7, 9], "pad_token_id": pad}


def test_special_tokens_that_agree_stay_as_they_are(tmp_path, caplog):
    reader = processor("llama")
    tokens = {name: getattr(reader.tokenizer, name) for name in SPECIAL_TOKENS}
    model = dialogue_model(llm="llama", knowledge_token_id=reader.knowledge_token_id)
    model.config.text_config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    of_llm, of_generation = saved_token_ids(model, reader, tmp_path)
    assert not [message for message in caplog.messages if "PAD/BOS/EOS" in message]
    as_list = {"eos_token_id": [tokens["eos_token_id"]]}  # transformers 5.17's Trainer writes one as a list
    assert of_llm == tokens and of_generation in (tokens, tokens | as_list)


def test_neither_model_nor_model_init(tmp_path):
    with pytest.raises(RuntimeError, match="model_init"):
        vikdf_trainer(tmp_path, None, dialogues(4))


# ---- what is refused ----


def test_arguments_of_transformers_are_refused_by_name(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for wrong in (args, None):
        with pytest.raises(TypeError, match=rf"must be VikdfTrainingArguments.*got {type(wrong).__name__}"):
            VikdfTrainer(dialogue_model(), wrong, DialogueCollator(processor()))


def test_a_collator_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"DialogueCollator\(processor\) for dialogues, or PreTrainingCollator"):
        VikdfTrainer(dialogue_model(), arguments(tmp_path), train_dataset=dialogues(4), processing_class=processor())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("remove_unused_columns", True),
        ("label_names", ["replies"]),
        ("hub_strategy", "checkpoint"),
        ("optim_target_modules", ["attn"]),
        ("use_liger_kernel", True),
        ("use_cache", True),
        ("train_sampling_strategy", "by_colour"),
    ],
)
def test_settings_that_nothing_can_use(setting, value, tmp_path):
    with pytest.raises(ValueError, match=f"{setting}=.* cannot be used here: ."):
        VikdfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{setting: value})
    VikdfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, label_names=["labels"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("include_for_metrics", ["inputs"]),
        ("batch_eval_metrics", True),
        ("include_num_input_tokens_seen", True),
        ("average_tokens_across_devices", False),
    ],
)
def test_settings_that_pretraining_cannot_use(setting, value, tmp_path):
    with pytest.raises(ValueError, match=f"{setting}=.* cannot be used here: ."):
        make_trainer(tmp_path, ALL, **{setting: value})
    make_trainer(tmp_path, None, **{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_loss_func": likelihood, "label_smoothing_factor": 0.1}, "compute_loss_func replaces the loss"),
        ({"compute_metrics": likelihood, "prediction_loss_only": True}, "prediction_loss_only"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None), "learning_rates": {"iqformer": 1.0}}, "its own"),
    ],
    ids=["loss", "metrics", "optimizer"],
)
def test_settings_that_would_ignore_each_other(settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"would be ignored.*{message}"):
        vikdf_trainer(tmp_path, dialogue_model(), dialogues(4), **settings)


@pytest.mark.parametrize(
    "settings",
    [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": {"split_batches": True}}],
    ids=str,
)
def test_settings_that_a_stream_ignores(settings, tmp_path):
    stream = datasets.Dataset.from_list(dialogues(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match="would be ignored.*a stream"):
        vikdf_trainer(tmp_path, dialogue_model(), stream, **settings)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_raw_dialogues_are_grouped_by_length(strategy, tmp_path):
    """In training, and with what is evaluated; a list has no place for the lengths."""
    data = datasets.Dataset.from_list(dialogues(12))
    settings = {"train_sampling_strategy": strategy, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 1}
    trainer = vikdf_trainer(tmp_path, dialogue_model(), data, eval_dataset={"some": data}, **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    expected = make_trainer(tmp_path, None, evaluation=dialogues(12), learning_rate=0.0)
    expected.model.load_state_dict(trainer.model.state_dict())
    loss = expected.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_some_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(ValueError, match="needs the lengths of the examples: pass a datasets.Dataset"):
        vikdf_trainer(tmp_path, dialogue_model(), dialogues(12), **settings)


def test_an_optimizer_of_ones_own(tmp_path):
    """Its class and arguments are used, and the rates of `learning_rates` beside its own."""
    chosen = (torch.optim.RMSprop, {"lr": 0.25, "alpha": 0.5})
    trainer = vikdf_trainer(
        tmp_path,
        dialogue_model(),
        dialogues(4),
        optimizer_cls_and_kwargs=chosen,
        learning_rates={"knowledge_gate": 0.125},
    )
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.RMSprop and optimizer.defaults["alpha"] == 0.5
    gate = trainer.model.knowledge_gate
    rates = {group["lr"]: any(p is gate for p in group["params"]) for group in optimizer.param_groups}
    assert rates == {0.25: False, 0.125: True}


@pytest.mark.parametrize("chosen", [(lambda: None, {}), (torch.optim.SGD, {"params": []})], ids=["factory", "groups"])
def test_optimizers_that_group_by_themselves_are_refused(chosen, tmp_path):
    trainer = vikdf_trainer(tmp_path, dialogue_model(), dialogues(4), optimizer_cls_and_kwargs=chosen)
    with pytest.raises(ValueError, match="would ignore learning_rates"):
        trainer.train()


# ---- nothing to learn ----

TOO_LONG = {"max_length": 22}  # tokens: less than the knowledge and any of the turns


@pytest.mark.parametrize(
    ("data", "settings"),
    [(dialogues(3), {"collator": TOO_LONG}), ([], {}), (dialogues(3), {"dataloader_drop_last": True})],
    ids=["too long", "none", "dropped"],
)
def test_an_evaluation_of_nothing_is_an_error(data, settings, tmp_path):
    trainer = make_trainer(tmp_path, None, evaluation=data, **settings)
    with pytest.raises(ValueError, match=f"{len(data)} examples.* nothing to score"):
        trainer.evaluate()


def test_an_objective_without_anything_to_score_is_named(tmp_path):
    trainer = make_trainer(tmp_path, {"masked_text": 1.0, "knowledge_to_text": 1.0}, evaluation=pairs(4))
    collate = trainer.data_collator.__class__.__call__

    class Unlabelled(type(trainer.data_collator)):
        def __call__(self, examples):
            batch = collate(self, examples)
            batch["labels"][:] = -100
            return batch

    trainer.data_collator.__class__ = Unlabelled
    with pytest.raises(ValueError, match="nothing to score for knowledge_to_text"):
        trainer.evaluate()


def test_what_was_masked_of_nothing_has_no_loss(tmp_path):
    """Not 0.0, which would be the best there is."""
    trainer = make_trainer(tmp_path, ALL, evaluation=pairs(2), collator={"masked_share": 1e-9})
    metrics = trainer.evaluate()
    losses = {name.removeprefix("eval_loss_"): value for name, value in metrics.items() if "_loss_" in name}
    assert losses.keys() == {name for name in ALL if "masked" not in name}
    assert metrics["eval_loss"] == pytest.approx(sum(ALL[name] * value for name, value in losses.items()), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [(dialogues(3), "nothing to score"), ([], "no examples"), ("stream", "no examples")],
    ids=["too long", "none", "stream"],
)
def test_a_training_on_nothing_is_an_error(data, message, tmp_path):
    if data == "stream":
        data = datasets.Dataset.from_list(dialogues(4)).to_iterable_dataset().filter(lambda example: False)
    collator = TOO_LONG if isinstance(data, list) and data else None
    trainer = make_trainer(tmp_path, None, train=data, collator=collator, max_steps=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---- what is logged ----


def test_several_evaluation_sets_are_off_the_clock_once(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock[0] += 2.0  # a step takes two seconds

        def on_evaluate(self, *args, **kwargs):
            clock[0] += 100.0

    several = {"one": dialogues(2), "other": dialogues(3), "third": dialogues(4)}
    trainer = make_trainer(
        tmp_path,
        None,
        evaluation=several,
        max_steps=3,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[Clock()],
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["pairs_per_s"] == pytest.approx(12 / 6)
    for name, data in several.items():
        alone = trainer.evaluate(data)["eval_loss"]
        logged = [entry[f"eval_{name}_loss"] for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert logged[-1] == pytest.approx(alone, rel=1e-6)


def test_trackers_are_checked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(training_arguments, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ImportError, match=r"report_to=\['trackio'\] is not installed.*modeling_vikdf\[track\]"):
        VikdfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=["wandb", "trackio"])
    with pytest.raises(ValueError, match="is not supported"):
        VikdfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="ledger")


def test_trackers_of_the_recipes_come_with_an_extra():
    root = Path(__file__).parents[1]
    setup = re.search(r'"track": (\[.*?\])', (root / "setup.py").read_text(encoding="utf-8"))
    packages = {re.match(r"\w+", package)[0] for package in json.loads(setup[1])}
    for path in root.glob("configs/**/*.yaml"):
        trackers = re.findall(r"report_to: (\w+)", path.read_text(encoding="utf-8"))
        assert {*trackers} - {"none"} <= packages
        assert trackers in ([], ["none"]) or "[train,track]" in path.read_text(encoding="utf-8")
