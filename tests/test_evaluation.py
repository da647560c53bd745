"""Evaluation: exact likelihoods and ranks, arms, statistics against known values, work that survives a kill."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import build_from
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import PACKAGE_ROOT, fails, run
from tiny_tokenizers import CHATML_WITH_GENERATION, LLAMA_WITH_GENERATION
from tiny_training import WORDS, dialogue_model, processor

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.cli import main
from modeling_vikdf.data import SkipReport, load_dialogues
from modeling_vikdf.data.collators import DialogueCollator
from modeling_vikdf.evaluation import dialogues as evaluation
from modeling_vikdf.evaluation.arms import KNOWLEDGE_ARMS, arm_knowledge, compute_knowledge
from modeling_vikdf.evaluation.dialogues import (
    EvaluationSettings,
    evaluate_dialogues,
    evaluate_file,
    generate_replies,
    map_batches,
    prefill,
    prepare,
    score_candidates,
)
from modeling_vikdf.evaluation.journal import Journal
from modeling_vikdf.evaluation.reports import compare, kind_of
from modeling_vikdf.metrics import bleu, distinct, embedding_similarity, rouge_l
from modeling_vikdf.training import shrinking
from modeling_vikdf.training.shrinking import FEWEST_TO_SHRINK, choose_share


COUNT = 14
LIKELIHOOD = EvaluationSettings(generation=False, batch_size=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Dialogues of two to five turns; every third has further references."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("data") / "talk.jsonl"

    def text() -> str:
        return " ".join(draw.sample(WORDS, draw.randrange(2, 9)))

    lines = []
    for i in range(COUNT):
        turns = [text() for _ in range(draw.randrange(2, 6))]
        more = {} if i % 3 else {"references": [turns.pop(), text(), text()]}
        lines.append(json.dumps({"turns": turns, **more}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def dialogues(data) -> list[dict]:
    return list(load_dialogues(str(data)))


@pytest.fixture(scope="module")
def parts() -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    return dialogue_model().eval(), processor(chat_template=CHATML_WITH_GENERATION)


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, reader = build_from(backbones, "qwen", "separate")
    reader.chat_template = CHATML_WITH_GENERATION
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def likelihood(model, reader, messages: list[dict], arm: str = "own", knowledge: torch.Tensor | None = None):
    """Log-likelihoods of the tokens of a chat's last message by one plain pass over it alone, [tokens]."""
    inputs = reader([messages], return_labels=True, use_knowledge=arm != "none")
    asked = reader([messages[:-1]], use_knowledge=arm != "none")["input_ids"]
    labels = inputs.pop("labels")[0]
    labels[: asked.shape[1]] = -100  # earlier replies
    with torch.no_grad():
        predicted = model(**inputs, knowledge=knowledge).logits[0, :-1].log_softmax(-1)  # [T-1, vocabulary]
    targets = labels[1:]
    return predicted.gather(1, targets.clamp(min=0)[:, None])[targets != -100, 0]


def chat(dialogue: dict, reply: str) -> list[dict]:
    return [*dialogue["messages"][:-1], {"role": "assistant", "content": reply}]


# ---- likelihood ----


@pytest.mark.parametrize("arm", ["own", "none"])
@pytest.mark.parametrize(
    ("llm", "placing"),
    [("qwen", {}), ("llama", {}), ("qwen", {"knowledge_message": "first_user", "knowledge_placement": "start"})],
    ids=["qwen", "llama", "first-user"],
)
def test_likelihoods_are_those_of_one_chat_at_a_time(dialogues, llm, placing, arm):
    template = {"qwen": CHATML_WITH_GENERATION, "llama": LLAMA_WITH_GENERATION}[llm]
    reader = processor(llm, system_prompt="Answer.", chat_template=template, **placing)
    model = dialogue_model(llm=llm, knowledge_token_id=reader.knowledge_token_id).eval()
    choice = EvaluationSettings(arm, all_references=True)
    # Llama's template refuses dialogues that begin with the assistant
    examples, _ = prepare(model, reader, dialogues, choice, None, SkipReport())
    assert len(examples) == COUNT if llm == "qwen" else 4 <= len(examples) < COUNT
    examples = examples[:6]
    knowledge = compute_knowledge(model, reader, [each.context for each in examples]) if arm == "own" else None
    scores = score_candidates(model, reader, examples, 7, prefill(model, reader, examples, knowledge))
    dialogues = {dialogue["key"]: dialogue for dialogue in dialogues}
    for example, row in zip(examples, scores, strict=True):
        dialogue = dialogues[example.key]
        assert len(row) == len(dialogue["references"]) + evaluation.DISTRACTORS
        for reference, score in zip(dialogue["references"], row, strict=False):
            expected = likelihood(model, reader, chat(dialogue, reference), arm)
            torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)


@given(st.lists(st.integers(0, 90), max_size=60), st.integers(1, 200))
def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may(lengths, tokens):
    batches = list(evaluation.batch_by_tokens(lengths, tokens))
    assert sorted(itertools.chain(*batches)) == [*range(len(lengths))]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_one_long_candidate_does_not_lengthen_the_others(parts, dialogues):
    """Padding is computed like any token, and was a third of what DailyDialog's replies took."""
    model, reader = parts
    long = {**dialogues[0], "references": [" ".join(["dog"] * 60)]}
    examples, _ = prepare(model, reader, [long, *dialogues[1:]], EvaluationSettings(limit=4), None, SkipReport())
    knowledge = compute_knowledge(model, reader, [example.context for example in examples])
    with patch.object(model, "forward", wraps=model.forward) as forward:
        score_candidates(model, reader, examples, 16, prefill(model, reader, examples, knowledge))
    computed = sum(call.kwargs["input_ids"].numel() for call in forward.call_args_list)
    assert computed < 1.5 * sum(len(ids) - 1 for example in examples for ids in example.candidates)


def test_perplexities(parts, dialogues):
    model, reader = parts
    report = evaluate_dialogues(model, reader, dialogues, LIKELIHOOD)
    alone = [-likelihood(model, reader, each["messages"]).double() for each in dialogues]
    assert [record["tokens"] for record in report["dialogues"]] == [len(each) for each in alone]
    for record, each in zip(report["dialogues"], alone, strict=True):
        assert record["nll"] == pytest.approx(each.sum().item(), abs=1e-4)
    metrics = report["metrics"]
    assert metrics["nll"] == pytest.approx(torch.cat(alone).mean().item(), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    by_example = torch.stack([each.mean() for each in alone]).mean().exp().item()
    assert metrics["perplexity_per_example"] == pytest.approx(by_example, rel=1e-4)
    assert report["num_dialogues"] == COUNT and report["skipped"] == {}
    for name, (low, high) in report["confidence_95"].items():
        assert low <= metrics[name] <= high
    assert not {"bleu_1", "nll_visual_words"} & set(metrics)
    json.dumps(report, allow_nan=False)


def test_likelihood_is_the_loss_of_training(parts, dialogues):
    model, reader = parts
    report = evaluate_dialogues(model, reader, dialogues, LIKELIHOOD)
    with torch.no_grad():
        loss = model(**DialogueCollator(reader)(dialogues)).loss.item()
    assert report["metrics"]["nll"] == pytest.approx(loss, abs=1e-5)


def test_all_references_count(parts, dialogues):
    model, reader = parts
    report = evaluate_dialogues(
        model, reader, dialogues, EvaluationSettings(generation=False, ranking=False, all_references=True)
    )
    for dialogue, record in zip(dialogues, report["dialogues"], strict=True):
        alone = [-likelihood(model, reader, chat(dialogue, text)).double() for text in dialogue["references"]]
        assert record["examples"] == len(alone) and record["tokens"] == sum(map(len, alone))
        assert record["nll"] == pytest.approx(sum(each.sum().item() for each in alone), abs=1e-4)
        assert record["mean_nll"] == pytest.approx(sum(each.mean().item() for each in alone), abs=1e-4)
    assert "hits_at_1" not in report["metrics"]


def test_visual_words_are_told_apart(parts, dialogues, tmp_path):
    model, reader = parts
    words = tmp_path / "words.txt"
    words.write_text("Dog\nmountains\nblue\nzeppelin\n")
    choice = EvaluationSettings(generation=False, ranking=False, visual_words=str(words))
    report = evaluate_dialogues(model, reader, dialogues, choice)
    for dialogue, record in zip(dialogues, report["dialogues"], strict=True):
        pieces = {word: len(reader.tokenizer(" " + word)["input_ids"]) for word in ("dog", "mountains", "blue")}
        reply = dialogue["references"][0].split()
        first = len(reader.tokenizer(reply[0])["input_ids"]) if reply[0] in pieces else 0  # no space before it
        assert record["visual_tokens"] == first + sum(pieces.get(word, 0) for word in reply[1:])
        assert record["visual_tokens"] + record["other_tokens"] == record["tokens"]
        assert record["visual_nll"] + record["other_nll"] == pytest.approx(record["nll"])
    assert any(count > 1 for count in pieces.values())
    metrics, records = report["metrics"], report["dialogues"]
    visual = sum(record["visual_nll"] for record in records) / sum(record["visual_tokens"] for record in records)
    assert metrics["nll_visual_words"] == pytest.approx(visual) != metrics["nll_other_words"]

    words.write_text("zeppelin")
    metrics = evaluate_dialogues(model, reader, dialogues, choice)["metrics"]
    assert "nll_visual_words" not in metrics and metrics["nll_other_words"] == pytest.approx(metrics["nll"])


def test_which_tokens_belong_to_a_word():
    text, words = "A red, reddish dog's tail", {"red", "dog"}
    offsets = [(0, 1), (1, 5), (5, 6), (6, 10), (10, 14), (14, 16), (16, 18), (18, 20), (20, 25)]
    # "A", " red", ",", " red", "dish", " d", "og", "'s", " tail"
    expected = [False, True, False, False, False, True, True, False, False]
    assert evaluation._touches(offsets, text, words) == expected


# ---- ranking ----


def test_ranks_are_those_of_brute_force(parts, dialogues):
    model, reader = parts
    report = evaluate_dialogues(model, reader, dialogues, LIKELIHOOD)
    pool, ranks = {each["references"][0] for each in dialogues}, []
    for dialogue, record in zip(dialogues, report["dialogues"], strict=True):
        others = evaluation._draw_distractors(dialogue, sorted(pool), seed=0)
        assert len(set(others)) == 9 and set(others) <= pool - set(dialogue["references"])
        own, *rest = (
            likelihood(model, reader, chat(dialogue, text)).mean() for text in (dialogue["references"][0], *others)
        )
        ranks.append(1 + sum(bool(each > own) for each in rest))
        assert record["rank"] == ranks[-1]
    assert report["metrics"]["hits_at_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / COUNT)
    assert report["metrics"]["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / COUNT)
    assert len(set(ranks)) > 2


@pytest.mark.parametrize(("distractors", "rank"), [([-3.0, -3.0], 1), ([-2.0, -3.0], 2), ([-1.0, math.nan], 3)])
def test_ties_and_what_is_no_number_count_against_the_model(distractors, rank):
    scores = [torch.tensor([-1.0, -3.0]), *(torch.tensor([each]) for each in distractors)]
    example = evaluation.Example("", [""], [], [], [], [], [], [[False, False]])
    record = evaluation._likelihood_record(example, scores, False)
    assert (record["rank"], record["hits_at_1"], record["mrr"]) == (rank, float(rank == 1), 1 / rank)


def test_a_limit_leaves_the_others_as_they_are(parts, dialogues):
    whole, few = (
        evaluate_dialogues(*parts, dialogues, EvaluationSettings(generation=False, limit=limit)) for limit in (None, 3)
    )
    assert few["num_dialogues"] == 3
    for record, other in zip(few["dialogues"], whole["dialogues"], strict=False):
        assert record == pytest.approx(other, abs=1e-4)


def test_another_seed_draws_other_distractors(parts, dialogues):
    ranks = [
        [
            record["rank"]
            for record in evaluate_dialogues(*parts, dialogues, EvaluationSettings(generation=False, seed=seed))[
                "dialogues"
            ]
        ]
        for seed in (0, 1)
    ]
    assert ranks[0] != ranks[1]


def test_too_few_replies_to_rank_among(parts, dialogues):
    with pytest.raises(ValueError, match="needs 9 different replies.*--no-ranking"):
        evaluate_dialogues(*parts, dialogues[:9], LIKELIHOOD)


# ---- arms ----


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(0, 99))
@settings(max_examples=60)
def test_shuffled_knowledge_is_that_of_another_group(groups, seed):
    knowledge = torch.arange(len(groups)).float()[:, None, None].expand(-1, 2, 3)
    if 2 * max(map(groups.count, groups)) > len(groups):
        with pytest.raises(ValueError, match="same group"):
            arm_knowledge(knowledge, "shuffled", seed, groups)
        return
    shuffled = arm_knowledge(knowledge, "shuffled", seed, groups)
    source = shuffled[:, 0, 0].long().tolist()
    assert sorted(source) == list(range(len(groups)))
    assert all(groups[i] != groups[j] for i, j in enumerate(source))
    assert torch.equal(shuffled, arm_knowledge(knowledge, "shuffled", seed, groups))


def test_arms_of_knowledge():
    knowledge = torch.randn(50, 2, 3)
    assert torch.equal(arm_knowledge(knowledge, "own"), knowledge)
    assert torch.equal(arm_knowledge(knowledge, "mean")[7], knowledge.mean(0))
    assert arm_knowledge(knowledge, "mean").shape == knowledge.shape
    one, other = (arm_knowledge(knowledge, "shuffled", seed) for seed in (0, 1))
    assert not (one == knowledge).any() and not torch.equal(one, other)
    with pytest.raises(ValueError, match="use_knowledge=False"):
        arm_knowledge(knowledge, "none")
    with pytest.raises(ValueError, match="'all' is unknown"):
        arm_knowledge(knowledge, "all")
    with pytest.raises(ValueError, match="Cannot shuffle 1"):
        arm_knowledge(knowledge[:1], "shuffled")


def test_arms_differ_in_the_knowledge_alone(parts, dialogues):
    model, reader = parts
    knowledge = torch.cat(
        [model.get_text_knowledge(reader(each["messages"][:-1])["context_input_ids"]).detach() for each in dialogues]
    )  # [N, n, h]
    found = {}
    for arm in KNOWLEDGE_ARMS:
        choice = EvaluationSettings(knowledge=arm, generation=False, ranking=False, seed=3)
        found[arm] = [record["nll"] for record in evaluate_dialogues(model, reader, dialogues, choice)["dialogues"]]
        for i, dialogue in enumerate(dialogues):
            given = None if arm == "none" else arm_knowledge(knowledge, arm, seed=3)[i : i + 1]
            alone = -likelihood(model, reader, dialogue["messages"], arm, given).sum().item()
            assert found[arm][i] == pytest.approx(alone, abs=1e-4)
    for one, other in itertools.combinations(found.values(), 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01


def test_dialogues_with_the_same_context_do_not_swap_knowledge(parts, dialogues):
    twins = [{**dialogues[i % 2], "key": str(i)} for i in range(4)]
    choice = EvaluationSettings(knowledge="shuffled", generation=False, ranking=False)
    own, shuffled = (
        [record["nll"] for record in evaluate_dialogues(*parts, twins, each)["dialogues"]]
        for each in (EvaluationSettings(generation=False, ranking=False), choice)
    )
    assert all(abs(a - b) > 1e-3 for a, b in zip(own, shuffled, strict=True))


def test_the_system_prompt_is_an_arm_too(parts, dialogues):
    plain, told = (
        evaluate_dialogues(
            *parts, dialogues, EvaluationSettings("none", system_prompt=prompt, generation=False, ranking=False)
        )["metrics"]["nll"]
        for prompt in (None, "Answer in one short sentence.")
    )
    assert plain != pytest.approx(told, abs=1e-3)
    assert parts[1].system_prompt is None


# ---- dialogues that do not fit ----


def test_too_long_dialogues_are_shortened_or_skipped(parts, dialogues):
    model, reader = parts
    long = [dict(dialogue) for dialogue in dialogues]
    for i, (turns, words) in enumerate([(20, 9), (1, 300)]):
        said = [{"role": role, "content": " ".join((WORDS * 50)[:words])} for role in ("user", "assistant")] * turns
        long[i] = {**dialogues[i], "messages": [*said[:-1], dialogues[i]["messages"][-1]]}
    long[2] = {**dialogues[2], "messages": [*dialogues[2]["messages"], dialogues[2]["messages"][-1]]}
    report = SkipReport()
    found = evaluate_dialogues(model, reader, long, EvaluationSettings(limit=4, batch_size=2), report=report)
    assert found["num_dialogues"] == 2 and found["shortened_prompts"] == 1
    assert [record["key"] for record in found["dialogues"]] == [long[0]["key"], long[3]["key"]]
    assert found["skipped"] == {"unusable dialogue": 2}
    reasons = report.skipped()["unusable dialogue"]
    assert "tokens" in reasons[long[1]["key"]] and "not the user's" in reasons[long[2]["key"]]
    examples, _ = prepare(model, reader, long[:1], EvaluationSettings(ranking=False), None, SkipReport())
    window = model.config.text_config.max_position_embeddings
    assert window - 120 < len(examples[0].prompt) <= window - 32
    with pytest.raises(ValueError, match="None of 1 dialogues is usable"):
        evaluate_dialogues(model, reader, long[1:2], EvaluationSettings(ranking=False))


# ---- generation ----


def test_replies_and_their_metrics(parts, dialogues, tmp_path):
    model, reader = parts
    table = tmp_path / "vectors.txt"
    vectors = {word: [math.sin(i), math.cos(3 * i), 0.1] for i, word in enumerate(WORDS)}
    table.write_text("".join(f"{word} {' '.join(map(str, values))}\n" for word, values in vectors.items()))
    choice = EvaluationSettings(ranking=False, batch_size=5, word_vectors=str(table))
    report = evaluate_dialogues(model, reader, dialogues, choice)
    replies = [record["reply"] for record in report["dialogues"]]
    for dialogue, reply in zip(dialogues[:4], replies, strict=False):
        inputs = reader([dialogue["messages"][:-1]])
        written = model.generate(**inputs, num_beams=3, no_repeat_ngram_size=3, max_new_tokens=32, do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :]
        assert reader.tokenizer.decode(new, skip_special_tokens=True).strip() == reply
    references = [dialogue["references"] for dialogue in dialogues]
    expected = bleu(replies, references) | rouge_l(replies, references) | distinct(replies)
    similar = embedding_similarity(replies, references, vectors)
    expected |= {f"embedding_{name}": similar[name] for name in ("average", "extrema", "greedy")}
    metrics = report["metrics"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["share_im_not_sure"] == 0
    for name, (low, high) in report["confidence_95"].items():
        assert low <= metrics[name] <= high, name
    assert set(report["confidence_95"]) == set(metrics)


def test_replies_do_not_depend_on_the_batch(parts, dialogues):
    model, reader = parts
    examples, _ = prepare(model, reader, dialogues, EvaluationSettings(ranking=False), None, SkipReport())
    knowledge = compute_knowledge(model, reader, [each.context for each in examples])
    together = generate_replies(model, reader, examples, knowledge)
    alone = [generate_replies(model, reader, [each], knowledge[i : i + 1])[0] for i, each in enumerate(examples)]
    assert together == alone
    choice = EvaluationSettings(ranking=False, batch_size=5)
    found = evaluate_dialogues(model, reader, dialogues, choice)["dialogues"]
    assert [record["reply"] for record in found] == together


@pytest.mark.parametrize("arm", ["own", "none"])
@pytest.mark.parametrize(
    ("llm", "placing"),
    [("qwen", {}), ("llama", {}), ("qwen", {"knowledge_message": "first_user", "knowledge_placement": "start"})],
    ids=["qwen", "llama", "first-user"],
)
def test_a_prompt_that_was_scored_is_not_read_again(dialogues, llm, placing, arm, monkeypatch):
    template = {"qwen": CHATML_WITH_GENERATION, "llama": LLAMA_WITH_GENERATION}[llm]
    reader = processor(llm, system_prompt="Answer.", chat_template=template, **placing)
    model = dialogue_model(llm=llm, knowledge_token_id=reader.knowledge_token_id).eval()
    examples, _ = prepare(model, reader, dialogues, EvaluationSettings(arm), None, SkipReport())
    examples = examples[:6]
    knowledge = compute_knowledge(model, reader, [each.context for each in examples]) if arm == "own" else None
    expected = generate_replies(model, reader, examples, knowledge)
    prefixes = prefill(model, reader, examples, knowledge)
    read, forward = [], model.language_model.forward

    def counting(*args, **kwargs):
        read.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", counting)
    assert generate_replies(model, reader, examples, knowledge, prefixes) == expected
    assert set(read) == {1}


# ---- several batches at a time ----


@pytest.fixture()
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_cores_share_the_batches_out_among_them(parts, four_threads, monkeypatch):
    monkeypatch.setattr(evaluation, "WORKERS", 2)
    together, cores = threading.Barrier(2), []

    def work(batch: int) -> int:
        together.wait(timeout=60)  # lets nobody pass alone
        cores.append(torch.get_num_threads())
        return -batch

    assert list(map_batches(parts[0], work, range(6))) == [0, -1, -2, -3, -4, -5]
    assert cores == [2] * 6
    assert torch.get_num_threads() == 4
    later = threading.Thread(target=lambda: cores.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert cores[6:] == [4]
    cpu, caller = torch.device("cpu"), threading.get_ident()
    for one in (SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(device=cpu, hf_device_map={"": "cpu"})):
        assert set(map_batches(one, lambda _: threading.get_ident(), range(3))) == {caller}


def test_after_an_error_the_other_batches_are_not_begun(parts, four_threads):
    begun = []

    def work(batch: int) -> int:
        begun.append(batch)
        if batch == 2:
            raise Interrupted
        time.sleep(0.05)
        return batch

    found = map_batches(parts[0], work, range(1000))
    with pytest.raises(Interrupted):
        list(found)
    assert len(begun) < 100 and torch.get_num_threads() == 4


def test_evaluation_does_not_depend_on_how_many_batches_run_at_a_time(parts, dialogues, four_threads):
    model, reader = parts
    choice = EvaluationSettings(batch_size=2)
    together = evaluate_dialogues(model, reader, dialogues, choice)
    torch.set_num_threads(1)
    assert evaluate_dialogues(model, reader, dialogues, choice) == together


# ---- interruptions ----


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Makes a function of the module fail when it is called once more than `calls` times."""
    real, count = getattr(evaluation, name), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count > calls:
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(evaluation, name, failing)


def test_an_interrupted_evaluation_goes_on(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "WORKERS", 1)  # so that it is certain which batch fails
    choice = EvaluationSettings(batch_size=4)
    expected = evaluate_file(checkpoint, data, tmp_path / "whole.json", choice)
    output, partial = tmp_path / "report.json", tmp_path / "report.json.partial.jsonl"
    for name, calls in (("score_candidates", 2), ("generate_replies", 1), ("score_candidates", 0)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, name, calls)
            evaluate_file(checkpoint, data, output, choice)
        assert not output.exists()
    # three batches of four, one of two; two batches, then one more, were finished
    done = [json.loads(line) for line in partial.read_text().splitlines()]
    assert len(done) == 1 + 12 and all(each["record"]["reply"] is not None for each in done[1:])
    assert kind_of(expected) == expected["kind"] == "dialogues"
    with open(partial, "a") as file:
        file.write('{"key": "talk.jsonl:1')  # killed while it wrote
    with monkeypatch.context() as patch:
        interrupt(patch, "generate_replies", 1)
        assert evaluate_file(checkpoint, data, output, choice) == expected
    assert output.read_text() == (tmp_path / "whole.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "whole.json"]


def test_a_killed_evaluation_goes_on(checkpoint, data, tmp_path):
    choice, output = EvaluationSettings(batch_size=4, ranking=False), tmp_path / "report.json"
    script = f"""
import os, signal
from modeling_vikdf.evaluation import dialogues as evaluation
from modeling_vikdf.evaluation.journal import Journal

write = Journal._write
def write_and_die(self, lines):
    write(self, lines)
    if "record" in str(lines):
        os.kill(os.getpid(), signal.SIGKILL)
Journal._write = write_and_die
choice = evaluation.EvaluationSettings(batch_size=4, ranking=False)
evaluation.evaluate_file({str(checkpoint)!r}, {str(data)!r}, {str(output)!r}, choice)
"""
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert len((tmp_path / "report.json.partial.jsonl").read_text().splitlines()) == 5
    found = evaluate_file(checkpoint, data, output, choice)
    assert found == evaluate_file(checkpoint, data, tmp_path / "whole.json", choice)


def test_unfinished_work_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "report.json.partial.jsonl"
    with Journal(path, {"seed": 0, "model": "a", "versions": {"torch": "2"}}):
        pass
    with Journal(path, {"seed": 0, "model": "a", "versions": {"torch": "2"}}):
        pass
    with pytest.raises(ValueError, match="differs in model, versions.*delete the file"):
        Journal(path, {"seed": 0, "model": "b", "versions": {"torch": "3"}})
    path.write_text('{"seed": 0')  # killed before it had written who it is
    with Journal(path, {"seed": 1}):
        pass
    assert path.read_text() == '{"seed": 1}\n'


def test_a_refused_evaluation_does_not_stand_in_the_way_of_the_next(checkpoint, data, tmp_path):
    """Neither one that is refused before it begins nor one whose word vectors are of no use at its end."""
    output, vectors = tmp_path / "report.json", tmp_path / "vectors.txt"
    with pytest.raises(ValueError, match="Ranking needs"):
        few = tmp_path / "few.jsonl"
        few.write_text("\n".join(data.read_text().splitlines()[:5]))
        evaluate_file(checkpoint, few, output, EvaluationSettings())
    assert not list(tmp_path.glob("report*"))
    vectors.write_text("nowhere-to-be-found 0.1 0.2\n")
    with pytest.raises(ValueError, match="none of the words"):
        evaluate_file(checkpoint, data, output, EvaluationSettings(word_vectors=str(vectors)))
    vectors.write_text("".join(f"{word} 0.1 0.2\n" for word in WORDS))
    for choice in (EvaluationSettings(word_vectors=str(vectors)), EvaluationSettings()):
        evaluate_file(checkpoint, data, output, choice)
    assert [path.name for path in tmp_path.glob("report*")] == ["report.json"]


# ---- files and commands ----


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """As many dialogues as choosing a share needs."""
    draw, path = random.Random(1), tmp_path_factory.mktemp("many") / "many.jsonl"
    lines = [[" ".join(draw.sample(WORDS, 4)) for _ in range(draw.choice((2, 4)))] for _ in range(FEWEST_TO_SHRINK)]
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in lines))
    return path


def test_what_is_shrunk_has_the_likelihood_that_is_told(checkpoint, many, capsys, tmp_path):
    options = ("--data", many, "--validation", many, "--output", tmp_path / "shrunk")
    out, _ = run(capsys, "shrink", "--model", checkpoint, *options)
    told = json.loads(out)
    nlls = {float(share): nll for share, nll in told["nll_by_share"].items()}
    assert list(nlls) == [0, 0.25, 0.5, 0.75, 1] and told["dialogues"] == FEWEST_TO_SHRINK
    assert told["gain"] == pytest.approx(nlls[1] - nlls[told["share"]])
    settings = EvaluationSettings(ranking=False, generation=False)
    for folder, share in ((checkpoint, 1.0), (tmp_path / "shrunk", told["share"])):
        report = evaluate_file(folder, many, tmp_path / f"{share}-{folder.name}.json", settings)
        assert report["metrics"]["nll"] == pytest.approx(nlls[share], abs=1e-6)
    stage = yaml.safe_load((tmp_path / "shrunk" / "recipe.yaml").read_text())
    assert stage["stage"] == "shrink" and stage["share"] == told["share"] and stage["data"]["train"] == many.name


def likelihoods(nlls: list[float], noise: float, rows: int = FEWEST_TO_SHRINK) -> dict[float, list[torch.Tensor]]:
    """Of two tokens a dialogue, whose mean differs by the share as told, and by chance from dialogue to dialogue."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(len(nlls), rows, 2, generator=generator).double()
    draws -= draws.mean((1, 2), keepdim=True)
    means = torch.tensor(nlls).double()[:, None, None]
    return dict(zip(shrinking.SHARES, [list(rows) for rows in -(means + noise * draws)], strict=True))


@pytest.mark.parametrize(
    ("nlls", "noise", "share"),
    [
        ([3.0, 2.9, 2.8, 2.7, 2.9], 0.1, 0.75),
        ([3.0, 2.9, 2.8, 2.7, 2.9], 5.0, 1.0),  # not clear of zero
        ([2.5, 2.6, 2.7, 2.8, 2.9], 0.1, 0.0),
        ([2.699, 2.7, 2.9, 2.9, 2.9], 0.1, 0.25),  # the mean alone is no clear gain over a quarter
        ([2.7, 2.8, 2.9, 2.95, 2.9], 0.1, 0.0),  # behind a hump
        ([3.0, 3.0, 3.0, 3.0, 2.9], 0.1, 1.0),
        ([2.9, 2.9, 2.9, 2.9, 2.9], 0.0, 1.0),
    ],
)
def test_knowledge_is_given_up_for_a_gain_that_is_clear_of_zero(nlls, noise, share):
    found = choose_share(likelihoods(nlls, noise))
    assert found["share"] == share
    assert found["nll_by_share"] == pytest.approx(dict(zip(shrinking.SHARES, nlls, strict=True)))
    assert found["gain"] == pytest.approx(nlls[-1] - nlls[shrinking.SHARES.index(share)])
    low, high = found["gain_interval"]
    assert low <= found["gain"] <= high and (low > 0) == (share < 1)


def test_too_few_dialogues_to_shrink_by_are_refused(checkpoint, data, many, capsys, tmp_path):
    """Before anything is computed, whichever file it is."""
    options = ("--model", checkpoint, "--output", tmp_path / "shrunk")
    with patch("modeling_vikdf.building.load_model", side_effect=AssertionError("not needed")):
        for files in ((data, many), (many, data)):
            message = fails(capsys, "shrink", *options, "--data", files[0], "--validation", files[1])
            assert f"talk.jsonl has {COUNT}" in message and f"at least {FEWEST_TO_SHRINK}" in message
    with pytest.raises(ValueError, match=f"13 .* at least {FEWEST_TO_SHRINK}"):
        choose_share(likelihoods([3.0, 2.9, 2.8, 2.7, 2.9], 0.1, rows=13))


@pytest.mark.parametrize(
    ("nlls", "said"),
    [
        ([2.5, 2.6, 2.7, 2.8, 2.9], "WARNING: share 0.0.*constant"),
        ([2.9, 2.9, 2.9, 2.9, 2.9], "WARNING: .*clear of zero.*share 1.0"),
        ([3.0, 2.9, 2.8, 2.7, 2.9], None),
    ],
)
def test_shrinking_to_nothing_and_not_at_all_is_said_aloud(checkpoint, many, capsys, tmp_path, nlls, said):
    options = ("--data", many, "--validation", many, "--output", tmp_path / "shrunk")
    with patch.object(shrinking, "score_shares", return_value=likelihoods(nlls, 0.1)):
        _, err = run(capsys, "shrink", "--model", checkpoint, *options)
    assert re.search(said, err.replace("\n", " ")) if said else "WARNING" not in err
    assert (tmp_path / "shrunk" / "model.safetensors").is_file()


def test_the_command_says_that_a_share_is_what_remains(capsys):
    with pytest.raises(SystemExit):
        main(["shrink", "--help"])
    assert "share of the deviations from the mean that is kept" in " ".join(capsys.readouterr().out.split())


def test_a_limit_that_leaves_nothing_out_is_none(checkpoint, data, tmp_path):
    reports = [tmp_path / f"{limit}.json" for limit in (None, 1000)]
    for output, limit in zip(reports, (None, 1000), strict=True):
        settings = EvaluationSettings(limit=limit, ranking=False, generation=False)
        assert evaluate_file(checkpoint, data, output, settings)["limit"] is None
    assert compare(reports[:1], reports[1:])["metrics"]["nll"]["difference"] == 0


def test_commands_end_to_end(checkpoint, data, capsys, tmp_path):
    reports = {}
    for arm in ("--knowledge=own", "--knowledge=shuffled", "--baseline=language-model"):
        output = tmp_path / f"{arm.split('=')[1]}.json"
        out, _ = run(
            capsys, "evaluate", "--model", checkpoint, "--data", data, "--output", output, arm, "--limit", 5,
            *([] if "own" in arm else ["--no-generation"]),
        )  # fmt: skip
        reports[arm] = json.loads(output.read_text())
        printed = json.loads(out)
        assert printed["metrics"] == reports[arm]["metrics"] and printed["num_dialogues"] == 5
    own, _, bare = reports.values()
    assert own["data"] == "talk.jsonl" and len(own["data_sha256"]) == 64 and own["seed"] == 0
    assert own["knowledge"] == "own" and bare["knowledge"] == "none" and own["versions"]["torch"] == torch.__version__
    assert own["command"].startswith("vikdf") and len(own["weights_sha256"]) == 64
    assert {"nll", "tokens", "rank", "reply", "rouge_l"} <= set(own["dialogues"][0])
    assert "reply" not in bare["dialogues"][0]

    out, _ = run(capsys, "compare", tmp_path / "own.json", tmp_path / "language-model.json")
    found = json.loads(out)["metrics"]
    assert set(found) == {"nll", "nll_per_example", "hits_at_1", "mrr"}
    assert found["nll"]["difference"] == pytest.approx(own["metrics"]["nll"] - bare["metrics"]["nll"])
    written = tmp_path / "compared.json"
    names = [tmp_path / "own.json", tmp_path / "shuffled.json"]
    out, _ = run(capsys, "compare", "--a", *names, "--b", tmp_path / "language-model.json", "--output", written)
    assert json.loads(out) == json.loads(written.read_text()) and len(json.loads(out)["a"]) == 2


def test_errors_of_the_commands(checkpoint, data, capsys, tmp_path):
    def error(data: Path = data, output: Path = tmp_path / "o.json", *more: object) -> str:
        return fails(capsys, "evaluate", "--model", checkpoint, "--data", data, "--output", output, *more)

    empty, alone, few = (tmp_path / name for name in ("empty.jsonl", "alone.jsonl", "few.jsonl"))
    empty.write_text("")
    alone.write_text('{"turns": ["nobody answers"]}\n')
    few.write_text('{"turns": ["a dog", "on the beach"]}\n')
    assert "Nothing is readable" in error(empty)
    assert "no reply" in error(alone)
    assert "nothing.jsonl" in error(tmp_path / "nothing.jsonl")
    assert "limit must be at least 1" in error(data, tmp_path / "o.json", "--limit", 0)
    assert "batch_size must be at least 1" in error(data, tmp_path / "o.json", "--batch-size", 0)
    assert "--no-ranking" in error(few)
    assert "no-folder" in error(data, tmp_path / "no-folder" / "o.json")
    assert "is a folder" in error(data, tmp_path)
    assert "no-words" in error(data, tmp_path / "o.json", "--visual-words", tmp_path / "no-words")
    with pytest.raises(ValueError, match="knowledge must be one of own, shuffled, mean, none, not 'all'"):
        EvaluationSettings(knowledge="all")
    for wrong in (["--knowledge", "all"], ["--knowledge", "mean", "--baseline", "language-model"]):
        with pytest.raises(SystemExit) as exit_:
            run(capsys, "evaluate", "--data", data, "--output", tmp_path / "o.json", *wrong)
        assert exit_.value.code == 2
    assert "two reports" in fails(capsys, "compare", data)
    assert "is not a report" in fails(capsys, "compare", data, data)
