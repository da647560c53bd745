"""Candidates: of several sampled replies the one with the best score, whose terms are what they say they are."""

import json
import random
from os.path import commonprefix

import pytest
import torch
from conftest import build_from
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from modeling_vikdf import VikdfDialoguePipeline
from modeling_vikdf.cli import main
from modeling_vikdf.modeling_candidates import EnoughFinished, LikelihoodRecorder, score_replies
from modeling_vikdf.training.rewarding import add_reward_head, fit_reward, reply_states


CHATS = [
    [{"role": "user", "content": "What is your dog doing?"}],
    [{"role": "user", "content": "I went to the beach yesterday and the water was so blue!"}],
]
SAMPLED = {"do_sample": True, "max_new_tokens": 6, "top_k": 0}


@pytest.fixture(scope="module", params=[("qwen", "separate"), ("llama", "clip")], ids="-".join)
def parts(request, backbones):
    model, processor = build_from(backbones, *request.param, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **SAMPLED)
    return model, processor


def cut(row: torch.Tensor) -> list[int]:
    """A reply's tokens up to its end."""
    tokens = row.tolist()
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


@torch.no_grad()
def mean_log_likelihood(model, processor, chat, reply: list[int]) -> float:
    """By a forward pass of prompt and reply without any cache."""
    inputs = processor([chat])
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1)[range(len(reply)), reply].mean().item()


@pytest.mark.parametrize("chat", CHATS)
def test_all_candidates_come_in_the_order_of_their_likelihood(parts, chat):
    model, processor = parts
    inputs = processor([chat])
    torch.manual_seed(3)
    replies = model.generate(
        **inputs, num_candidates=5, num_return_sequences=5, candidate_weights={"likelihood": 1.0}, processor=processor
    )[:, inputs["input_ids"].shape[1] :]
    ended = [2 in reply.tolist() for reply in replies]
    assert ended == sorted(ended, reverse=True)  # those that were broken off come last
    scores = [mean_log_likelihood(model, processor, chat, cut(reply)) for reply in replies[: sum(ended)]]
    assert scores == sorted(scores, reverse=True)
    torch.manual_seed(3)
    [best] = model.generate(**inputs, num_candidates=5, candidate_weights={"likelihood": 1.0}, processor=processor)
    assert cut(best[inputs["input_ids"].shape[1] :]) == cut(replies[0])


def test_the_recorded_likelihood_is_that_of_a_forward_pass(parts):
    model, processor = parts
    chat, inputs, recorder = CHATS[1], processor([CHATS[1]]), LikelihoodRecorder()
    torch.manual_seed(0)
    outputs = model.generate(**inputs, logits_processor=[recorder], temperature=0.5, num_return_sequences=3)
    written = outputs[:, inputs["input_ids"].shape[1] :]
    recorded = recorder.log_likelihoods(written)
    for row, values in zip(written, recorded, strict=True):
        reply = cut(row)
        expected = mean_log_likelihood(model, processor, chat, reply)
        assert values[: len(reply)].mean().item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_terms_are_what_they_say(parts):
    model, processor = parts
    texts = ["dog", "blue water", "the beach"]
    rows = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] for text in texts]
    longest = max(map(len, rows))
    replies = torch.tensor([row + [0] * (longest - len(row)) for row in rows])[None]  # [1, 3, T]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])[None]
    context = processor([CHATS[1]])
    knowledge = model.get_knowledge(context["context_input_ids"], context["context_attention_mask"])
    likelihood = torch.tensor([[-3.0, -6.0, -12.0]])

    def score(**weights):
        return score_replies(model, processor, replies, mask, likelihood, weights, knowledge=knowledge)[0]

    lengths = torch.tensor([float(len(row)) for row in rows])
    torch.testing.assert_close(score(likelihood=2.0), 2 * likelihood[0] / lengths)
    torch.testing.assert_close(score(length=0.5), 0.5 * lengths.log())

    # alone: in a chat whose message is empty
    chats = [[{"role": "user", "content": content}] for content in "xy"]
    prompts = [processor([chat], use_knowledge=False)["input_ids"][0].tolist() for chat in chats]
    beginning = commonprefix(prompts)
    ending = commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    assert 0 < len(prompts[0]) - len(beginning + ending) < 4  # what is left out is the message
    header = torch.tensor(beginning + ending)
    for row, value in zip(rows, score(alone=1.0), strict=True):
        ids = torch.cat([header, torch.tensor(row)])[None]
        logits = model.language_model(input_ids=ids).logits[0, len(header) - 1 : -1]
        assert value.item() == pytest.approx(logits.log_softmax(-1)[range(len(row)), row].mean().item(), abs=1e-4)

    embedded = model.get_text_embeddings(context["context_input_ids"], context["context_attention_mask"])  # [1, d]
    for text, value in zip(texts, score(match=1.0), strict=True):
        read = processor([[{"role": "user", "content": text}]])
        own = model.get_text_embeddings(read["context_input_ids"], read["context_attention_mask"])
        assert value.item() == pytest.approx((own @ embedded.T).item(), abs=1e-5)
    together = score(likelihood=1.0, alone=-0.5, match=3.0)
    torch.testing.assert_close(together, score(likelihood=1.0) - 0.5 * score(alone=1.0) + 3 * score(match=1.0))


@torch.no_grad()
def test_with_a_picture_the_match_is_with_both(parts):
    model, processor = parts
    picture = Image.new("RGB", (32, 32), "red")
    inputs = processor(CHATS, images=[picture, None])
    context = inputs["context_input_ids"], inputs["context_attention_mask"]
    knowledge = model.get_knowledge(*context, inputs["pixel_values"])
    replies = torch.tensor(processor.tokenizer("dog", add_special_tokens=False)["input_ids"] + [2]).expand(2, 1, -1)
    mask, likelihood = torch.ones_like(replies), torch.zeros(2, 1)
    context = {"knowledge": knowledge, "image_mask": inputs["image_mask"]}
    score = score_replies(model, processor, replies, mask, likelihood, {"match": 1.0}, **context)
    read = processor([[{"role": "user", "content": "dog"}]])
    own = model.get_text_embeddings(read["context_input_ids"], read["context_attention_mask"])[0]
    n = model.config.num_knowledge_tokens
    said, shown = model.matching_head.text(knowledge[:, :n]) @ own, model.matching_head.image(knowledge[:, n:]) @ own
    torch.testing.assert_close(score[:, 0], torch.stack([(said[0] + shown[0]) / 2, said[1]]))


@given(
    rows=st.lists(st.lists(st.sampled_from([2, 7, 8]), min_size=9, max_size=9), min_size=2, max_size=6),
    copies=st.integers(1, 3),
)
@settings(max_examples=50)
def test_rows_run_until_enough_of_their_prompt_have_ended(rows, copies):
    rows = rows[: len(rows) // copies * copies]
    if not rows:
        return
    enough = -(-copies // 2)
    criterion, over = EnoughFinished(copies, enough, torch.tensor([2, 0])), None
    ids = torch.tensor(rows)
    for step in range(1, ids.shape[1] + 1):
        over = criterion(ids[:, :step], None)
    for start in range(0, len(rows), copies):
        group = rows[start : start + copies]
        ends = [row.index(2) + 1 if 2 in row else 99 for row in group]
        stop = min(sorted(ends)[enough - 1], ids.shape[1])  # where the last of enough ends
        lengths = criterion.lengths[start : start + copies].tolist()
        assert lengths == [min(end, stop) for end in ends]
        assert criterion.finished[start : start + copies].tolist() == [end <= stop for end in ends]
        assert over[start : start + copies].tolist() == [end <= stop or sorted(ends)[enough - 1] <= 9 for end in ends]


def test_what_cannot_be_chosen_is_refused(parts):
    model, processor = parts
    inputs, settings_ = processor([CHATS[0]]), {"processor": processor, "candidate_weights": {"likelihood": 1.0}}
    for wrong, message in (
        ({"num_candidates": 3, "processor": None}, "pass processor="),
        ({"num_candidates": 3, "do_sample": False}, "greedy"),
        ({"num_candidates": 3, "num_beams": 2}, "beam"),
        ({"num_candidates": 0}, "whole number from 1"),
        ({"num_candidates": "many"}, "whole number from 1"),
        ({"num_candidates": 2, "num_return_sequences": 3}, "num_return_sequences=3"),
        ({"num_candidates": 2, "output_hidden_states": True}, "output_hidden_states"),
        ({"num_candidates": 2, "candidate_weights": {"likelyhood": 1.0}}, "likelyhood"),
        ({"num_candidates": 1}, "candidate_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **settings_ | wrong)


def test_a_checkpoint_that_chooses_does_so_only_where_replies_are_sampled(parts, tmp_path):
    model, processor = parts
    before = model.generation_config
    choosing = GenerationConfig(**before.to_diff_dict())
    choosing.num_candidates, choosing.candidate_weights = 4, {"likelihood": 1.0}
    choosing.save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    try:
        inputs = processor([CHATS[0]])
        with pytest.raises(ValueError, match="num_candidates=4"):
            model.generate(**inputs)
        torch.manual_seed(1)
        best = model.generate(**inputs, processor=processor)
        torch.manual_seed(1)
        same = model.generate(**inputs, processor=processor, num_candidates=4, candidate_weights={"likelihood": 1.0})
        assert torch.equal(best, same)
        torch.manual_seed(1)
        any_ = model.generate(**inputs, processor=processor, candidate_weights={})  # of those that ended, by no score
        assert model.generation_config.candidate_weights == {"likelihood": 1.0}
        torch.manual_seed(1)
        again = model.generate(**inputs, processor=processor, candidate_weights={"likelihood": 0.0})
        assert torch.equal(any_, again)
        assert model.generate(**inputs, do_sample=False).shape[0] == 1  # greedy decoding has one candidate
        assert model.generate(**inputs, num_candidates=1).shape[0] == 1
    finally:
        model.generation_config = before


def test_scores_are_those_of_the_chosen_reply(parts):
    model, processor = parts
    inputs = processor(CHATS)
    torch.manual_seed(2)
    outputs = model.generate(
        **inputs, processor=processor, num_candidates=4, candidate_weights={"alone": -1.0}, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    written = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(outputs.logits) == written.shape[1] and all(step.shape[0] == 2 for step in outputs.logits)
    for index, chat in enumerate(CHATS):
        reply = cut(written[index])
        logits = torch.stack([step[index] for step in outputs.logits[: len(reply)]])
        expected = mean_log_likelihood(model, processor, chat, reply)
        assert logits.log_softmax(-1)[range(len(reply)), reply].mean().item() == pytest.approx(expected, abs=1e-4)


def test_the_pipeline_chooses_and_streams_the_choice_whole(parts):
    pipe = VikdfDialoguePipeline(model=parts[0], processor=parts[1])
    how = {"num_candidates": 4, "candidate_weights": {"likelihood": 1.0, "match": 1.0}, "return_full_text": False}
    torch.manual_seed(5)
    [answer] = pipe(CHATS[0], **how)
    torch.manual_seed(5)
    assert "".join(pipe.stream(CHATS[0], **how)).strip() == answer["generated_text"]
    several = pipe(CHATS, **how, num_return_sequences=2, batch_size=2)
    assert [len(replies) for replies in several] == [2, 2]
    with_picture = pipe(CHATS, images=[Image.new("RGB", (32, 32), "red"), None], **how, batch_size=2)
    bare = pipe(CHATS, use_knowledge=False, **how)
    assert all(isinstance(reply["generated_text"], str) for [reply] in [*with_picture, *bare])


# ---- the reward head ----


@torch.no_grad()
def reward_of(model, processor, chat, reply: list[int], layer: int) -> float:
    """By a forward pass of prompt and reply without any cache: of the mean state of all tokens but the last."""
    inputs = processor([chat])
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    states = model(**inputs, output_hidden_states=True).hidden_states[layer][0, prompt:-1]
    return (states.mean(0) @ model.reward_weight).item() if len(states) else 0.0


@pytest.fixture
def rewarded(backbones):
    model, processor = build_from(backbones, "llama", "separate", dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **SAMPLED)
    add_reward_head(model, torch.randn(48, generator=torch.Generator().manual_seed(0)), 1)
    return model, processor


def test_candidates_come_in_the_order_of_their_reward(rewarded):
    model, processor = rewarded
    for chat in CHATS:
        inputs = processor([chat])
        torch.manual_seed(4)
        replies = model.generate(
            **inputs, num_candidates=6, num_return_sequences=3, candidate_weights={"reward": 1.0}, processor=processor
        )[:, inputs["input_ids"].shape[1] :]
        rewards = [(2 in reply.tolist(), reward_of(model, processor, chat, cut(reply), 1)) for reply in replies]
        assert len(set(rewards)) > 1 and rewards == sorted(rewards, reverse=True)  # those broken off come last
    with pytest.raises(ValueError, match="no reward head"):
        model.config.reward_layer = None
        model.generate(**inputs, num_candidates=2, candidate_weights={"reward": 1.0}, processor=processor)


def test_a_reward_head_is_saved_and_loaded(rewarded, tmp_path):
    model, processor = rewarded
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.reward_layer == 1 and torch.equal(loaded.reward_weight, model.reward_weight)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.reward_weight.dtype == torch.float32 and torch.equal(half.reward_weight, model.reward_weight)
    with pytest.raises(ValueError, match="reward_layer must be from 0 to 2"):
        model.config_class(**{**model.config.to_dict(), "reward_layer": 3})


def graded(count: int, generator: torch.Generator, direction: torch.Tensor, noise: float):
    states = [torch.randn(6, len(direction), generator=generator) + 3 * i for i in range(count)]
    grades = [(rows @ direction + noise * torch.randn(6, generator=generator) + 5).tolist() for rows in states]
    return states, grades


def test_a_head_finds_what_grades_depend_on():
    generator = torch.Generator().manual_seed(0)
    direction = torch.zeros(20)
    direction[3], direction[7] = 1.0, -0.5
    fit = fit_reward(*graded(80, generator, direction, noise=0.5))
    assert torch.nn.functional.cosine_similarity(fit["weight"], direction, dim=0) > 0.9
    assert fit["gain_interval"][0] > 0.5 and fit["rank_correlation"] > 0.6
    assert fit["grade_of_best"] - fit["grade_of_any"] == pytest.approx(fit["gain"])


def test_grades_that_depend_on_nothing_give_no_gain():
    generator = torch.Generator().manual_seed(1)
    fit = fit_reward(*graded(80, generator, torch.zeros(20), noise=1.0))
    assert fit["gain_interval"][0] < 0.1 and abs(fit["rank_correlation"]) < 0.15


def test_the_states_of_written_replies_are_those_of_generated_ones(rewarded):
    model, processor = rewarded
    example = {"messages": CHATS[1], "replies": ["blue water", "the dog"]}
    [states] = reply_states(model, processor, [example], 1)
    rewards = (states @ model.reward_weight).tolist()
    for reply, reward in zip(example["replies"], rewards, strict=True):
        ids = processor.text_tokenizer(reply, add_special_tokens=False)["input_ids"]
        assert reward == pytest.approx(reward_of(model, processor, CHATS[1], [*ids, 2], 1), abs=1e-4)


def write_grades(path, grade) -> None:
    rng = random.Random(0)
    words = ["dog", "water", "beach", "sky", "blue", "snow"]
    lines = []
    for number in range(60):
        replies = [" ".join(rng.choices(words, k=3)) for _ in range(4)]
        grades = [grade(reply, rng) for reply in replies]
        lines.append({"turns": [f"I saw {number}."], "replies": replies, "grades": grades})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def test_the_command_fits_a_head_and_the_model_chooses_by_it(rewarded, tmp_path, capsys):
    model, processor = rewarded
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_grades(tmp_path / "grades.jsonl", lambda reply, rng: reply.count("dog") + rng.random() / 10)
    arguments = ["reward", "--model", tmp_path / "model", "--grades", tmp_path / "grades.jsonl", "--layer", "2"]
    main([*map(str, arguments), "--num-candidates", "4", "--output", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out)["gain_interval"][0] > 0
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.config.reward_layer == 2 and loaded.generation_config.num_candidates == 4
    pipe = VikdfDialoguePipeline(model=loaded, processor=processor)
    assert isinstance(pipe(CHATS[0], return_full_text=False)[0]["generated_text"], str)
    assert "stage: reward" in (tmp_path / "out/recipe.yaml").read_text()


def test_the_command_refuses_grades_that_say_nothing(rewarded, tmp_path):
    model, processor = rewarded
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["reward", "--model", str(tmp_path / "model"), "--layer", "2", "--output", str(tmp_path / "out")]
    for lines, message in (
        (None, "no better than chance"),
        ('{"turns": ["a"], "replies": ["b", "c"], "grades": [1]}\n', "2 replies have 1 grades"),
        ("[]\n", "expected turns, replies, grades"),
        ('{"turns": ["a"], "replies": ["b", "c"], "grades": [1, 2]}\n', "1 contexts"),
    ):
        path = tmp_path / "grades.jsonl"
        write_grades(path, lambda reply, rng: rng.random()) if lines is None else path.write_text(lines)
        with pytest.raises((SystemExit, ValueError), match=message):
            main([*arguments, "--grades", str(path)])


def test_what_has_no_weight_is_not_computed(rewarded):
    model, processor = rewarded
    inputs, kept = processor([CHATS[0]]), set()
    how = {"num_candidates": 4, "processor": processor, "min_new_tokens": 3}
    read = model.register_forward_hook(
        lambda model, args, output: kept.update(
            index for index, states in enumerate(output.hidden_states or ()) if states is not None
        )
    )

    def generate(**weights) -> dict[str, int]:
        kept.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.generate(**inputs, candidate_weights=weights, **how)
        return {event.key: event.count for event in profile.key_averages()}

    try:
        assert generate(likelihood=1.0)["aten::logsumexp"] >= 3 and not kept
        assert "aten::logsumexp" not in generate(reward=1.0, match=1.0, length=0.5)
        assert kept == {1}  # the layer that the head reads, and no other
    finally:
        read.remove()


@pytest.mark.parametrize("chats", [CHATS, CHATS[:1]], ids=["padded", "one"])
@pytest.mark.parametrize("use_knowledge", [True, False])
def test_a_row_that_has_ended_is_not_read_any_more(rewarded, use_knowledge, chats):
    model, processor = rewarded
    inputs, rows, limit, every = processor(chats, use_knowledge=use_knowledge), [], 12, 6 * len(chats)
    how = {"num_candidates": 6, "processor": processor, "max_new_tokens": limit, "candidate_weights": {"reward": 1.0}}
    read = model.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    criteria, first = [], EnoughFinished.__init__

    def keep(self, *args):
        criteria.append(self)
        first(self, *args)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EnoughFinished, "__init__", keep)
            model.language_model.lm_head.weight.data[2] *= 3  # ends are likely, at different places
            replies = {}
            for name, on_cpu in (("skipping", True), ("reading", False)):
                rows.clear()
                torch.manual_seed(0)
                if not on_cpu:
                    patch.setattr(EnoughFinished, "select_rows", lambda *_: None)
                replies[name] = model.generate(**inputs, **how)
                lengths = criteria[-1].lengths
                steps = int(lengths.max()) - 1
                expected = [int((lengths > step + 1).sum()) for step in range(steps)] if on_cpu else [every] * steps
                assert rows[-steps:] == expected and steps > 2
                assert on_cpu is (sum(expected) < every * steps)
    finally:
        read.remove()
    assert torch.equal(replies["skipping"], replies["reading"])
