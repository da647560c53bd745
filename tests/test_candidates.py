"""Candidates: of several sampled replies the one with the best score, whose terms are what they say they are."""

from os.path import commonprefix

import pytest
import torch
from conftest import build_from
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from modeling_vikdf import VikdfDialoguePipeline
from modeling_vikdf.modeling_candidates import EnoughFinished, LikelihoodRecorder, score_replies


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
        return score_replies(model, processor, replies, mask, likelihood, weights, knowledge)[0]

    lengths = torch.tensor([float(len(row)) for row in rows])
    torch.testing.assert_close(score(likelihood=2.0), 2 * likelihood[0] / lengths)

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
    score = score_replies(model, processor, replies, mask, likelihood, {"match": 1.0}, knowledge, inputs["image_mask"])
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
