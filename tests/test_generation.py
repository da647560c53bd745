"""Generation: every mode gives the tokens that reading the whole prompt anew for each token gives, or is refused."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KNOWLEDGE_ID, pictures, prompt, row, tiny_model
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer


GREEDY = {"do_sample": False, "max_new_tokens": 8}


@torch.no_grad()
def step_by_step(model, inputs: dict[str, torch.Tensor], new_tokens: int = 8) -> torch.Tensor:
    """The greedy reply to one unpadded prompt: a full `forward`, nothing cached, for every token. [1, T + new]"""
    ids, eos = inputs["input_ids"], model.config.text_config.eos_token_id
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "knowledge" not in given:
        image_mask = {"image_mask": given.pop("image_mask")} if "image_mask" in given else {}
        given = {"knowledge": model.get_knowledge(**given), **image_mask}
    vectors = model.embed_prompt(ids, **given)
    for _ in range(new_tokens):
        embeds = torch.cat([vectors, model.get_input_embeddings()(ids[:, vectors.shape[1] :])], dim=1)
        logits = model.language_model(inputs_embeds=embeds).logits[:, -1]
        logits[:, KNOWLEDGE_ID] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == eos:
            break
    return ids


def reply(sequence: torch.Tensor, length: int, eos: int = 2) -> list[int]:
    """The new tokens of one row up to the end of the reply."""
    tokens = sequence[length:].tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("seed", range(3))
def test_greedy(model, seed):
    inputs = prompt([11], seed=seed)
    assert torch.equal(model.generate(**inputs, **GREEDY), step_by_step(model, inputs))


def test_replies_depend_on_the_knowledge(model):
    inputs = prompt([11])
    silent = {**inputs, "knowledge": torch.zeros(1, 4, 32)}
    assert not torch.equal(model.generate(**inputs, **GREEDY), model.generate(**silent, **GREEDY))


@settings(max_examples=12, derandomize=True)
@given(lengths=st.lists(st.integers(7, 40), min_size=2, max_size=6), seed=st.integers(0, 2**16))
def test_a_row_of_a_batch_replies_as_it_does_alone(model, lengths, seed):
    batch = prompt(lengths, seed=seed)
    together = model.generate(**batch, **GREEDY)
    for index in range(len(lengths)):
        alone = model.generate(**row(batch, index), **GREEDY)
        assert reply(together[index], max(lengths)) == reply(alone[0], lengths[index])


def test_a_row_of_a_batch_with_pictures_replies_as_it_does_alone(model):
    batch = prompt([13, 25, 18], sources=2)
    pixels = pictures(3)
    together = model.generate(**batch, pixel_values=pixels, **GREEDY)
    for index, length in enumerate((13, 25, 18)):
        alone = model.generate(**row(batch, index), pixel_values=pixels[index : index + 1], **GREEDY)
        assert reply(together[index], 25) == reply(alone[0], length)


def test_beams_of_a_row_of_a_batch_are_those_alone(model):
    batch = prompt([13, 20])
    beams = {"num_beams": 3, "no_repeat_ngram_size": 3, **GREEDY}
    together = model.generate(**batch, **beams)
    for index, length in enumerate((13, 20)):
        assert reply(together[index], 20) == reply(model.generate(**row(batch, index), **beams)[0], length)


def test_beam_search_finds_what_its_score_says(model):
    """The score of the best beam is the mean log-likelihood of its tokens, as a plain forward gives it."""
    inputs = prompt([13])
    found = model.generate(
        **inputs, num_beams=4, return_dict_in_generate=True, output_scores=True, num_return_sequences=4, **GREEDY
    )
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        tokens = torch.tensor([reply(sequence, 13)])
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids, context_input_ids=inputs["context_input_ids"]).logits
        likelihoods = logits[0, 12:-1].log_softmax(-1).gather(1, tokens[0, :, None])
        torch.testing.assert_close(score, likelihoods.sum() / tokens.shape[1], atol=1e-4, rtol=1e-4)
    assert len({tuple(sequence.tolist()) for sequence in found.sequences}) == 4


def test_sampling_draws_from_the_models_distribution(model):
    inputs = prompt([11])
    drawn = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "num_return_sequences": 3}
    torch.manual_seed(3)
    first = model.generate(**inputs, **drawn)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **drawn), first)
    assert first.shape[0] == 3 and len({tuple(sequence.tolist()) for sequence in first}) == 3
    torch.manual_seed(3)  # from one prompt the copies make, to three
    copies = {name: value.repeat(3, 1) for name, value in inputs.items()}
    assert torch.equal(model.generate(**copies, **{**drawn, "num_return_sequences": 1}), first)


@pytest.mark.parametrize(
    "mode",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 1}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_modes_that_only_differ_in_speed(model, mode, seed):
    inputs = prompt([17], seed=seed)
    # prompt lookup looks for repetitions, of which placeholders are the longest
    inputs["input_ids"][0, 10:13] = inputs["input_ids"][0, 14:17]
    assert torch.equal(model.generate(**inputs, **mode, **GREEDY), step_by_step(model, inputs))


@pytest.mark.parametrize("mode", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_modes_with_beams_and_a_batch(model, mode):
    batch = prompt([13, 20])
    beams = {"num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(**batch, **mode, **beams), model.generate(**batch, **beams))


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_the_placeholder_is_never_written(mode):
    """If it were, the prompt would hold one place too many when it is read again."""
    model = tiny_model()
    inputs = prompt([11])
    with torch.no_grad():
        model.language_model.lm_head.weight[KNOWLEDGE_ID] = 0
    favourite = int(model.generate(**inputs, **GREEDY)[0, 11])
    weight = model.language_model.lm_head.weight
    with torch.no_grad():
        weight[KNOWLEDGE_ID] = 3 * weight[favourite]
    assert int(model(**inputs).logits[0, -1].argmax()) == KNOWLEDGE_ID
    written = model.generate(**inputs, **mode, **GREEDY)
    assert torch.equal(written, step_by_step(model, inputs))
    assert not (written[0, 11:] == KNOWLEDGE_ID).any()


def test_own_logits_processors_are_kept(llama_model):
    inputs = prompt([11])
    favourite = int(llama_model.generate(**inputs, **GREEDY)[0, 11])

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([favourite]), -torch.inf)

    other = llama_model.generate(**inputs, logits_processor=LogitsProcessorList([forbid]), **GREEDY)
    assert not (other[0, 11:] == favourite).any()


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(model):
    inputs, streamer = prompt([11]), Collector()
    sequence = model.generate(**inputs, streamer=streamer, **GREEDY)
    assert streamer.tokens == sequence[0].tolist() and streamer.ended


# ---- cache reuse ----


def crop(cache: DynamicCache, length: int) -> None:
    cache.crop(length - int(cache.get_seq_length()))


def test_a_prompt_that_continues_a_cached_one(model):
    """Second turn: the first prompt with its knowledge is cached, the new words are not."""
    first = prompt([11])
    knowledge = model.get_knowledge(first["context_input_ids"], first["context_attention_mask"])
    cache = DynamicCache(config=model.config.text_config)
    answered = model.generate(**first, past_key_values=cache, **GREEDY)
    ids = torch.cat([answered, torch.tensor([[31, 32, 33]])], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "knowledge": knowledge}
    expected = model.generate(**second, **GREEDY)
    assert torch.equal(expected, step_by_step(model, second))
    with patch.object(type(model), "get_text_knowledge", side_effect=AssertionError("not needed")):
        assert torch.equal(model.generate(**second, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("cut", [1, 2, 4, 6, 9])
def test_a_cache_cropped_to_the_common_prefix(model, cut):
    """Another prompt that begins alike, cut before, in and behind the places of knowledge."""
    first = prompt([11])
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**first, past_key_values=cache, **GREEDY)
    second = {**first, "input_ids": first["input_ids"].clone()}
    second["input_ids"][0, max(cut, 6) :] += 1
    if cut <= 2:  # nothing of the knowledge is cached, so it may be new
        second["context_input_ids"] = first["context_input_ids"].flip(1)
    expected = model.generate(**second, **GREEDY)
    crop(cache, cut)
    assert torch.equal(model.generate(**second, past_key_values=cache, **GREEDY), expected)


def test_three_turns_with_one_cache(model):
    """As a chat does it: the knowledge moves to each newest turn, all before its old place stays cached."""
    cache, ids = DynamicCache(config=model.config.text_config), torch.tensor([[20, 21]])
    for turn in range(3):
        kept = ids[:, : int(cache.get_seq_length())]
        words = torch.tensor([[30 + turn, 40 + turn]])
        spliced = torch.cat([ids, words, torch.full((1, 4), KNOWLEDGE_ID), torch.tensor([[3]])], dim=1)
        assert torch.equal(spliced[:, : kept.shape[1]], kept)
        context = prompt([11], seed=turn)["context_input_ids"]
        inputs = {"input_ids": spliced, "attention_mask": torch.ones_like(spliced), "context_input_ids": context}
        answered = model.generate(**inputs, past_key_values=cache, **GREEDY)
        assert torch.equal(answered, step_by_step(model, inputs))
        crop(cache, ids.shape[1] + 2)
        ids = torch.cat([ids, words, answered[:, spliced.shape[1] :]], dim=1)


PICTURE = {"pixel_values": pictures(1)}


def answered_with_picture(model, length: int = 15) -> tuple[dict, DynamicCache, torch.Tensor]:
    """A prompt with places for text and picture, what it left in a cache, and the next turn's ids."""
    first, cache = prompt([length], sources=2), DynamicCache(config=model.config.text_config)
    answered = model.generate(**first, **PICTURE, past_key_values=cache, **GREEDY)
    return first, cache, torch.cat([answered, torch.tensor([[31, 32, 33]])], dim=1)


@pytest.mark.parametrize("given", ["context", "nothing", "picture"])
def test_a_picture_chat_goes_on_from_its_cache(model, given):
    """All places of knowledge are cached, so neither the picture nor the context has to come again."""
    first, cache, ids = answered_with_picture(model)
    context = {name: first[name] for name in ("context_input_ids", "context_attention_mask")}
    knowledge = model.get_knowledge(**context, **PICTURE)
    mask = {"attention_mask": torch.ones_like(ids)}
    expected = step_by_step(model, {"input_ids": ids, **mask, "knowledge": knowledge})
    again = {"context": context, "nothing": {}, "picture": {**context, **PICTURE}}[given]
    assert torch.equal(model.generate(input_ids=ids, **mask, **again, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_cache_that_ends_before_the_pictures_places_needs_the_picture(model, cut):
    first, cache, ids = answered_with_picture(model)
    crop(cache, cut)
    context = {name: first[name] for name in ("context_input_ids", "context_attention_mask")}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **context}
    with pytest.raises(ValueError, match="placeholders for a text and a picture.*pixel_values"):
        model.generate(**inputs, past_key_values=cache, **GREEDY)
    expected = model.generate(**inputs, **PICTURE, **GREEDY)
    assert torch.equal(model.generate(**inputs, **PICTURE, past_key_values=cache, **GREEDY), expected)


def test_a_picture_prompt_without_its_picture_says_so(model):
    with pytest.raises(ValueError, match="placeholders for a text and a picture.*pixel_values"):
        model.generate(**prompt([15], sources=2), **GREEDY)
    with pytest.raises(ValueError, match="placeholders for a text and a picture.*pixel_values"):
        model(**prompt([15], sources=2))


def test_beams_go_on_from_a_cache_without_the_picture(model):
    first, _, ids = answered_with_picture(model)
    context = {name: first[name] for name in ("context_input_ids", "context_attention_mask")}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    beams = {"num_beams": 2, **GREEDY}
    expected = model.generate(**inputs, **context, **PICTURE, **beams)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**first, **PICTURE, past_key_values=cache, **GREEDY)
    cache.batch_repeat_interleave(2)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **beams), expected)


# ---- the knowledge is computed once a row ----


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
def test_encoders_run_once_for_each_row(model, mode):
    batch, rows = prompt([13, 20], sources=2), []
    hooks = [
        encoder.register_forward_hook(
            lambda module, args, kwargs, output: rows.append(output.last_hidden_state.shape[0]), with_kwargs=True
        )
        for encoder in (model.context_encoder, model.vision_encoder, model.iqformer.qformer)
    ]
    try:
        model.generate(**batch, pixel_values=pictures(2), **mode, **GREEDY)
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == [2, 2, 2, 2]  # each encoder, and the IQ-Former behind each


def test_without_placeholders_no_encoder_runs(model):
    inputs = prompt([11], n=0)
    with patch.object(type(model), "encode_context", side_effect=AssertionError("not needed")):
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert model.generate(**plain, **GREEDY).shape[1] > 11


# ---- prompts that are read in chunks ----


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_prompts_in_chunks_get_the_same_replies(model, chunk, mode):
    batch = prompt([13, 25, 18], sources=2) | {"pixel_values": pictures(3)}
    replies = []
    for size in (None, chunk):
        torch.manual_seed(0)
        replies.append(model.generate(**batch, **{**GREEDY, **mode}, prefill_chunk_size=size))
    assert torch.equal(*replies)


@pytest.mark.parametrize("where", ["argument", "generation_config", "defaults"])
@pytest.mark.parametrize("with_knowledge", [True, False])
def test_the_llm_reads_a_chunk_at_a_time(where, with_knowledge):
    model, kwargs, widths = tiny_model(), {}, []
    inputs = prompt([11, 9], n=4 if with_knowledge else 0)
    if not with_knowledge:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, **GREEDY)
    if where == "argument":
        kwargs["prefill_chunk_size"] = 4
    elif where == "generation_config":
        kwargs["generation_config"] = GenerationConfig(prefill_chunk_size=4, eos_token_id=2, pad_token_id=0)
    else:
        model.generation_config.prefill_chunk_size = 4
    model.language_model.base_model.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(**inputs, **kwargs, **GREEDY), expected)
    assert widths[:4] == [4, 4, 2, 1] and set(widths[4:]) == {1}


def test_chunked_prefill_may_be_taken_back(llama_model):
    inputs = prompt([11])
    expected = llama_model.generate(**inputs, **GREEDY)
    llama_model.generation_config.prefill_chunk_size = 4
    assert torch.equal(llama_model.generate(**inputs, prefill_chunk_size=None, **GREEDY), expected)


@pytest.mark.parametrize(
    "mode, message",
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"cache": DynamicCache()}, "cache"),
        ({"prefill_chunk_size": 0}, "at least 1"),
    ],
)
def test_chunks_are_refused_where_the_prompt_is_read_otherwise(llama_model, mode, message):
    with pytest.raises(ValueError, match=f"prefill_chunk_size.*{message}"):
        llama_model.generate(**prompt([11]), **{"prefill_chunk_size": 4, **mode})


def test_chunks_of_embeddings_are_refused(llama_model):
    embeds = llama_model.get_input_embeddings()(torch.tensor([[20, 21, 22]]))
    with pytest.raises(ValueError, match="prefill_chunk_size.*input_ids"):
        llama_model.generate(inputs_embeds=embeds, prefill_chunk_size=2)


# ---- what would ignore the knowledge is refused ----


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(llama_model, name):
    with pytest.raises(NotImplementedError, match="ignore the knowledge"):
        getattr(llama_model, name)([[20, 21]])


def test_an_assistant_model_is_refused(llama_model):
    """It would be handed the placeholders without the knowledge."""
    with pytest.raises(ValueError, match="assistant_model"):
        llama_model.generate(**prompt([11]), assistant_model=llama_model.language_model, **GREEDY)


def test_a_generation_config_of_ones_own(model):
    inputs = prompt([11])
    expected = model.generate(**inputs, num_beams=2, **GREEDY)
    config = GenerationConfig(num_beams=2, pad_token_id=0, eos_token_id=2, **GREEDY)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)


def test_unknown_arguments_are_refused(llama_model):
    with pytest.raises(ValueError, match="max_new_tokns"):
        llama_model.generate(**prompt([11]), max_new_tokns=3)


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_the_prompt_is_read_once_a_row(model, copies):
    """Beams and several replies share what their row's prompt left in the cache."""
    batch, rows = prompt([11, 20]), []
    decoder = model.language_model.base_model
    read = decoder.forward

    def counted(*args, inputs_embeds=None, **kwargs):
        rows.append(tuple(inputs_embeds.shape[:2]))
        return read(*args, inputs_embeds=inputs_embeds, **kwargs)

    with patch.object(decoder, "forward", counted):
        model.generate(**batch, **{**GREEDY, **copies})
    assert rows[0] == (2, 19), "the prompts but for their last token, once a row"
    assert set(rows[1:]) == {(6, 1)}, "then a token at a time, in three copies"


@pytest.mark.parametrize("beams", [1, 3])
def test_the_vocabulary_head_reads_no_more_than_it_must(llama_model, beams):
    """One column a step, copied: of a slice of more PyTorch on a CPU copies the frozen head for every row."""
    seen = []
    head = llama_model.language_model.lm_head
    handle = head.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape, given[0].is_contiguous())))
    try:
        llama_model.generate(**prompt([9, 14]), num_beams=beams, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    finally:
        handle.remove()
    assert seen == [((2 * beams, 1, llama_model.config.text_config.hidden_size), True)] * 4
