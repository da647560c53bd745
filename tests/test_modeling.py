"""IQ-Former and dialogue model: the same numbers as plain torch and the bare LLM give, and clear errors."""

import copy

import pytest
import torch
from tiny_models import KNOWLEDGE_ID, VOCABULARY, llm_config, pictures, prompt, row, tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForPreTraining, BertConfig, BertModel, DynamicCache

from modeling_vikdf import VikdfForConditionalGeneration, VikdfIQFormer, initialize_from_bert
from modeling_vikdf.modeling_iqformer import VikdfMatchingHead
from modeling_vikdf.modeling_prefix import CACHE


# ---- IQ-Former ----


@torch.no_grad()
def test_shapes(model):
    batch = prompt([9, 14])
    text = model.get_text_knowledge(batch["context_input_ids"], batch["context_attention_mask"])
    image = model.get_image_knowledge(pictures(3))
    assert (text.shape, image.shape) == ((2, 4, 32), (3, 4, 32))
    assert text.dtype == image.dtype == torch.float32
    assert not torch.allclose(text[0], text[1]) and not torch.allclose(image[0], image[1])


@torch.no_grad()
def test_padding_of_the_context_changes_nothing(model):
    batch = prompt([9, 20])
    together = model.get_text_knowledge(batch["context_input_ids"], batch["context_attention_mask"])
    alone = row(batch, 0)
    text = model.get_text_knowledge(alone["context_input_ids"], alone["context_attention_mask"])
    assert batch["context_input_ids"].shape[1] > alone["context_input_ids"].shape[1]
    torch.testing.assert_close(together[:1], text)
    # a mask of ones is what no mask means; and the mask matters, for the encoder and for the IQ-Former
    torch.testing.assert_close(model.get_text_knowledge(alone["context_input_ids"]), text)
    assert not torch.allclose(model.get_text_knowledge(batch["context_input_ids"])[:1], text, atol=1e-3)


@torch.no_grad()
def test_the_iqformer_itself_masks(llama_model):
    states = torch.randn(1, 5, 32)
    longer = torch.cat([states, 100 * torch.randn(1, 3, 32)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(llama_model.iqformer(longer, mask), llama_model.iqformer(states))
    assert not torch.allclose(llama_model.iqformer(longer), llama_model.iqformer(states), atol=1e-3)


def linear(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights, name: str, x: torch.Tensor, source: torch.Tensor, heads: int) -> torch.Tensor:
    """Post-norm multi-head attention of x [n, h] to source [S, d], head by head."""
    q, k, v = (
        linear(weights, f"{name}.attention.{part}", of)
        for part, of in (("query", x), ("key", source), ("value", source))
    )
    width = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**0.5
        outputs.append(scores.softmax(-1) @ v[:, part])
    return norm(
        weights, f"{name}.output.LayerNorm", linear(weights, f"{name}.output.dense", torch.cat(outputs, 1)) + x
    )


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [False, True], ids=["free_queries", "conditioned_queries"])
def test_one_layer_by_hand(conditioned):
    torch.manual_seed(0)
    config = tiny_config(towers="siglip", condition_queries=conditioned)
    config.iqformer_config.num_hidden_layers = 1
    iqformer = VikdfIQFormer(config).eval()
    for parameter in iqformer.parameters():
        parameter.normal_(std=0.5)
    weights = dict(iqformer.qformer.named_parameters())
    states = torch.randn(1, 6, 32)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])

    queries = iqformer.query_tokens[0]
    if conditioned:
        pooled = torch.cat([states[0, 0], states[0, :4].mean(0)])
        queries = queries + linear(dict(iqformer.named_parameters()), "pooled_projection", pooled)
    x = norm(weights, "layernorm", queries)  # [n, h]
    x = attend(weights, "encoder.layer.0.attention", x, x, heads=4)
    query = linear(weights, "encoder.layer.0.crossattention.attention.query", x).view(4, 4, 8)  # [n, heads, h / heads]
    key = linear(weights, "encoder.layer.0.crossattention.attention.key", states[0, :4]).view(4, 4, 8)
    attention = (torch.einsum("qhd,thd->hqt", query, key) / 8**0.5).softmax(-1).mean(0)  # [n, T]
    torch.testing.assert_close(iqformer.text_attention(states, mask)[0, :, :4], attention, atol=1e-5, rtol=1e-5)
    assert iqformer.text_attention(states, mask)[0, :, 4:].count_nonzero() == 0
    x = attend(weights, "encoder.layer.0.crossattention", x, states[0, :4], heads=4)
    inner = F.gelu(linear(weights, "encoder.layer.0.intermediate_query.dense", x))
    x = norm(
        weights,
        "encoder.layer.0.output_query.LayerNorm",
        linear(weights, "encoder.layer.0.output_query.dense", inner) + x,
    )
    torch.testing.assert_close(iqformer(states, mask)[0], x, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_state_dropout_hides_states_in_training_alone():
    torch.manual_seed(0)
    config = tiny_config(towers="siglip", condition_queries=True, state_dropout=0.5)
    config.iqformer_config.hidden_dropout_prob = config.iqformer_config.attention_probs_dropout_prob = 0.0
    iqformer = VikdfIQFormer(config).eval()
    iqformer.query_tokens.normal_()
    states, mask = torch.randn(1, 3, 32), torch.tensor([[1, 1, 0]])
    whole, first_alone = iqformer(states, mask), iqformer(states[:, :1])
    iqformer.train()
    drawn = [iqformer(states, mask) for _ in range(40)]
    # padding stays hidden and the first state is always seen, so there are two cases, and both occur
    cases = [[torch.allclose(knowledge, case, atol=1e-6) for case in (whole, first_alone)] for knowledge in drawn]
    assert all(any(case) for case in cases)
    assert 8 < sum(case[0] for case in cases) < 32
    # without a mask as well
    assert any(not torch.allclose(iqformer(states), iqformer(states), atol=1e-6) for _ in range(10))
    with pytest.raises(ValueError, match="state_dropout must be at least 0 and below 1, got 1"):
        tiny_config(state_dropout=1.0)


@torch.no_grad()
def test_conditioned_queries_of_a_new_model_are_not_alike():
    """What conditions them is the same for all: beside it small queries would stay n copies of one."""
    torch.manual_seed(0)
    model = VikdfForConditionalGeneration(tiny_config(towers="siglip", condition_queries=True)).eval()
    knowledge = F.normalize(model.iqformer(torch.randn(8, 6, 32)), dim=-1)  # [8, n, h]
    alike = (knowledge @ knowledge.mT)[:, ~torch.eye(4, dtype=torch.bool)]  # [8, n * (n - 1)]
    assert alike.mean() < 0.8


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["first", "mean", "each"])
def test_what_matching_compares(pooling):
    torch.manual_seed(0)
    head = VikdfMatchingHead(tiny_config(knowledge_pooling=pooling, matching_dim=6))
    text, image = torch.randn(2, 4, 32), torch.randn(3, 4, 32)
    weights = dict(head.named_parameters())
    found = head.text(text) @ head.image(image).T  # [2, 3]
    if pooling == "each":
        assert set(weights) == {"projection.weight", "projection.bias", "logit_scale"}
        text, image = (linear(weights, "projection", each) for each in (text, image))
        expected = F.cosine_similarity(text[:, None], image[None], dim=-1).mean(-1)  # [2, 3, n] -> [2, 3]
    else:
        text, image = (each[:, 0] if pooling == "first" else each.mean(1) for each in (text, image))
        text, image = linear(weights, "text_projection", text), linear(weights, "image_projection", image)
        expected = F.cosine_similarity(text[:, None], image[None], dim=-1)
    torch.testing.assert_close(found, expected)


def test_attention_to_the_words_of_a_context(model):
    """Through the encoder and the input projection; rows sum to 1 and the model stays as it was."""
    batch = prompt([9, 5])
    context = {
        "context_input_ids": batch["context_input_ids"],
        "context_attention_mask": batch["context_attention_mask"],
    }
    knowledge = model.get_text_knowledge(**context)
    attention = model.get_text_attention(**context)  # [B, n, T]
    assert attention.shape == (2, 4, context["context_input_ids"].shape[1])
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4))
    assert attention[~context["context_attention_mask"].bool()[:, None].expand_as(attention)].count_nonzero() == 0
    for index in range(2):
        alone = row(batch, index)["context_input_ids"]
        torch.testing.assert_close(model.get_text_attention(alone)[0], attention[index, :, : alone.shape[1]])
    assert model.iqformer.qformer.config._attn_implementation == "sdpa"
    assert torch.equal(model.get_text_knowledge(**context), knowledge)


@torch.no_grad()
def test_cross_attention_in_every_second_layer():
    layers = VikdfIQFormer(tiny_config(towers="siglip")).qformer.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [True, False]


def bert(layers: int = 2, **sizes) -> BertModel:
    defaults = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    model = BertModel(BertConfig(num_hidden_layers=layers, **{**defaults, **sizes}))
    with torch.no_grad():  # fresh norms and biases are all alike and would match without being copied
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same_as_bert(iqformer: VikdfIQFormer, source: BertModel) -> None:
    theirs = source.state_dict()
    ours = iqformer.qformer.state_dict()
    fresh = [name for name in ours if "crossattention" in name]
    for name in ours.keys() - set(fresh):
        their_name = {
            "layernorm.weight": "embeddings.LayerNorm.weight",
            "layernorm.bias": "embeddings.LayerNorm.bias",
        }.get(
            name,
            name.replace("attention.attention.", "attention.self.")
            .replace("intermediate_query", "intermediate")
            .replace("output_query", "output"),
        )
        assert torch.equal(ours[name], theirs[their_name]), name
    # all of BERT's layers arrived, and only cross-attention is ours alone
    assert len(ours) - len(fresh) == 2 + 16 * len(iqformer.qformer.encoder.layer)
    assert all("crossattention" in name for name in fresh)


def test_all_bert_weights_reach_the_iqformer():
    config = tiny_config(towers="siglip")
    iqformer, source = VikdfIQFormer(config), bert()
    initialize_from_bert(iqformer, source)
    assert_same_as_bert(iqformer, source)


def test_a_deeper_bert_lends_its_first_layers():
    iqformer, source = VikdfIQFormer(tiny_config(towers="siglip")), bert(layers=3)
    initialize_from_bert(iqformer, source)
    assert_same_as_bert(iqformer, source)


@pytest.mark.parametrize(
    ("source", "message"),
    [(bert(intermediate_size=64), "intermediate_size is 64, the IQ-Former's is 48"), (bert(layers=1), "only 1")],
)
def test_a_bert_of_other_sizes_is_refused(source, message):
    iqformer = VikdfIQFormer(tiny_config(towers="siglip"))
    before = {name: weight.clone() for name, weight in iqformer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_from_bert(iqformer, source)
    assert all(torch.equal(weight, before[name]) for name, weight in iqformer.state_dict().items())


# ---- without knowledge the model is its LLM ----


def plain_prompt(rows: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    batch = prompt(rows, n=0, seed=seed)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def test_without_knowledge_the_logits_are_the_llms(model):
    inputs = plain_prompt([8, 13])
    assert torch.equal(model(**inputs).logits, model.language_model(**inputs).logits)
    assert model(**inputs).knowledge is None


@pytest.mark.parametrize("seed", range(4))
def test_without_knowledge_the_replies_are_the_llms(model, seed):
    inputs = plain_prompt([8, 13], seed)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), model.language_model.generate(**inputs, **settings))


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_knowledge_the_llm_may_write_the_placeholder(llama_model, use_cache):
    inputs = plain_prompt([8])
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    expected = llama_model.language_model.generate(**inputs, **settings)
    llama_model.config.knowledge_token_id = int(expected[0, 9])  # its second word
    assert torch.equal(llama_model.generate(**inputs, **settings), expected)


@torch.no_grad()
def test_a_decoding_step_of_ones_own_may_read_the_placeholder(llama_model):
    step = torch.tensor([[KNOWLEDGE_ID]])
    assert torch.equal(llama_model(input_ids=step).logits, llama_model.language_model(input_ids=step).logits)


@torch.no_grad()
def test_silent_knowledge_is_the_base_text(model, request):
    own = tiny_model(*request.node.callspec.params["model"])
    batch = prompt([9, 14])
    words = torch.tensor([20, 30, 40, 50])
    embeddings = own.get_input_embeddings()
    own.knowledge_gate.zero_()
    own.knowledge_base.copy_(embeddings(words))
    in_its_place = batch["input_ids"].clone()
    in_its_place[in_its_place == KNOWLEDGE_ID] = words.repeat(2)
    expected = own.language_model(
        inputs_embeds=embeddings(in_its_place), attention_mask=batch["attention_mask"]
    ).logits
    assert torch.equal(own(**batch).logits, expected)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-2)  # the gate is what silences


# ---- knowledge ----


@torch.no_grad()
def test_knowledge_moves_the_logits_from_its_place_on(model):
    batch = prompt([12])
    other = {**batch, "context_input_ids": batch["context_input_ids"].flip(1)}
    logits, others = model(**batch).logits, model(**other).logits
    assert torch.equal(logits[:, :2], others[:, :2])  # two words stand before the knowledge
    changed = (logits - others).abs().amax(-1)[0, 2:]
    assert (changed > 1e-3).all()


@pytest.mark.parametrize("share", [-0.25, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(llama_model, share):
    gate = llama_model.knowledge_gate.clone()
    with pytest.raises(ValueError, match=f"fraction of the deviations.*got {share}"):
        llama_model.shrink_knowledge(torch.zeros(4, 32), share)
    assert torch.equal(llama_model.knowledge_gate, gate)


class Refusing(nn.Module):
    """An encoder that must not be called."""

    def forward(self, **kwargs):
        raise AssertionError("an encoder ran although the knowledge was given")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shrunk_knowledge_is_read_as_nearer_to_its_mean(llama_model, share):
    model = llama_model
    nn.init.normal_(model.knowledge_base), nn.init.normal_(model.knowledge_gate)
    generator = torch.Generator().manual_seed(0)
    n, width = model.config.num_knowledge_tokens, model.config.iqformer_config.hidden_size
    knowledge, mean = (torch.randn(*shape, generator=generator) for shape in ((3, n, width), (n, width)))
    expected = model.project_knowledge(mean + share * (knowledge - mean))
    model.shrink_knowledge(mean, share)
    torch.testing.assert_close(model.project_knowledge(knowledge), expected)


@torch.no_grad()
def test_precomputed_knowledge_skips_both_encoders():
    model = tiny_model("qwen", "separate")
    batch = prompt([10, 15], sources=2)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = model(**batch, pixel_values=pictures(2))
    replies = model.generate(**batch, pixel_values=pictures(2), max_new_tokens=4, do_sample=False)
    model.context_encoder = model.vision_encoder = Refusing()
    assert torch.equal(model(**inputs, knowledge=expected.knowledge).logits, expected.logits)
    given = {**batch, "pixel_values": pictures(2), "knowledge": expected.knowledge}
    assert torch.equal(model(**given).logits, expected.logits)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), replies)
    with pytest.raises(AssertionError, match="an encoder ran"):
        model(**batch)


@torch.no_grad()
def test_text_and_picture_together(model):
    batch = prompt([14, 17], sources=2)
    outputs = model(**batch, pixel_values=pictures(2))
    text = model.get_text_knowledge(batch["context_input_ids"], batch["context_attention_mask"])
    image = model.get_image_knowledge(pictures(2))
    assert torch.equal(outputs.knowledge, torch.cat([text, image], dim=1))
    spliced = model.embed_prompt(batch["input_ids"], outputs.knowledge)
    for knowledge, part in ((text, slice(2, 6)), (image, slice(6, 10))):
        assert torch.equal(spliced[1, part], model.project_knowledge(knowledge)[1])
    words = batch["input_ids"] != KNOWLEDGE_ID
    assert torch.equal(spliced[words], model.get_input_embeddings()(batch["input_ids"])[words])


@torch.no_grad()
def test_a_picture_alone(model):
    batch = prompt([10])
    inputs = {"input_ids": batch["input_ids"], "pixel_values": pictures()}
    assert torch.equal(model(**inputs).knowledge, model.get_image_knowledge(pictures()))


@torch.no_grad()
def test_only_some_rows_have_a_picture(model):
    """
    Weights in float64: alone and in company kernels round differently, on some processors by more than the bounds for
    float32, which hold then, for the norms still compute in that.
    """
    model, bounds = copy.deepcopy(model).double(), {"rtol": 1.3e-6, "atol": 1e-5}
    with_picture, without = prompt([14], sources=2, seed=1), prompt([9], seed=2)
    width, context_width = 14, with_picture["context_input_ids"].shape[1]
    pad = width - 9, context_width - without["context_input_ids"].shape[1]
    batch = {
        name: torch.cat(
            [with_picture[name], F.pad(without[name], (0, pad[1]) if "context" in name else (pad[0], 0))], dim=0
        )
        for name in without
    }
    pixels = torch.cat([pictures(), torch.zeros(1, 3, 32, 32)])
    logits = model(**batch, pixel_values=pixels, image_mask=torch.tensor([True, False])).logits
    torch.testing.assert_close(logits[:1], model(**with_picture, pixel_values=pictures()).logits, **bounds)
    torch.testing.assert_close(logits[1:, pad[0] :], model(**without).logits, **bounds)


@torch.no_grad()
def test_projection_by_hand(llama_model):
    knowledge = torch.randn(2, 8, 32)
    weight, bias = llama_model.language_projection.weight, llama_model.language_projection.bias
    for i in (0, 3, 5):
        base, gate = llama_model.knowledge_base[i % 4], llama_model.knowledge_gate[i % 4]
        expected = base + gate * (weight @ knowledge[1, i] + bias)
        torch.testing.assert_close(llama_model.project_knowledge(knowledge)[1, i], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_half_precision_llm_beside_a_trained_part_in_float32(llama_model):
    batch = prompt([10, 13])
    expected = llama_model(**batch)
    llama_model.language_model.to(torch.bfloat16)
    outputs = llama_model(**batch)
    assert (outputs.logits.dtype, outputs.knowledge.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(outputs.knowledge, expected.knowledge)
    scale = expected.logits.std()
    assert (outputs.logits.float() - expected.logits).abs().mean() < 0.05 * scale


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForPreTraining])
def test_a_new_model_in_half_precision_trains_in_float32(auto_class):
    model = auto_class.from_config(tiny_config(), dtype=torch.bfloat16)
    assert {part.dtype for part in (model.language_model, model.context_encoder)} == {torch.bfloat16}
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and set(trained.values()) == {torch.float32}, trained


def test_states_that_are_asked_for_are_those_of_all_tokens(llama_model):
    """Also with labels in training, where text before the knowledge is otherwise read apart."""
    batch = prompt([10, 13])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = llama_model(**batch, output_hidden_states=True).hidden_states
    assert {tuple(states.shape) for states in whole} == {(2, 13, 48)}
    llama_model.language_model.config.output_hidden_states = True
    assert torch.equal(torch.stack(llama_model(**batch).hidden_states), torch.stack(whole))


@torch.no_grad()
def test_outputs_as_transformers_models_give_them(llama_model):
    batch = prompt([10])
    outputs = llama_model(**batch, output_hidden_states=True, use_cache=True)
    assert len(outputs.hidden_states) == 3 and outputs.past_key_values.get_seq_length() == 10
    assert outputs[CACHE] is outputs.past_key_values  # whatever transformers calls it
    as_tuple = llama_model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_either_of_its_names(llama_model, name):
    """transformers 5.24 renamed it; callers and code on the Hub use both."""
    ids = torch.tensor([[20, 21, 22, 23]])
    expected = llama_model(input_ids=ids).logits[:, -1:]
    read = llama_model(input_ids=ids[:, :-1], use_cache=True)
    logits = llama_model(input_ids=ids[:, -1:], **{name: read[CACHE]}).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    assert read[CACHE].get_seq_length() == 4  # that very cache was used

    cache = DynamicCache(config=llama_model.config.text_config)
    llama_model.generate(ids, max_new_tokens=2, do_sample=False, **{name: cache})
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_the_cache_under_both_names_at_once(llama_model, method):
    caches = {name: DynamicCache(config=llama_model.config.text_config) for name in ("cache", "past_key_values")}
    with pytest.raises(ValueError, match="two names of one argument"):
        getattr(llama_model, method)(input_ids=torch.tensor([[20, 21]]), **caches)


# ---- loss ----


def supervised(rows: list[int], last: int = 3) -> dict[str, torch.Tensor]:
    """A batch whose labels are the last `last` tokens of each row but the first row's very last."""
    batch = prompt(rows)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -last:] = batch["input_ids"][:, -last:]
    labels[0, -1] = -100
    return {**batch, "labels": labels}


def by_hand(model, batch) -> tuple[torch.Tensor, int]:
    """Sum of the negative log-likelihoods of all labels, and their number."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
    total, count = 0.0, 0
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        total = total - logits[b, t - 1].log_softmax(-1)[batch["labels"][b, t]]
        count += 1
    return total, count


@torch.no_grad()
def test_loss_by_hand(model):
    batch = supervised([9, 14])
    total, count = by_hand(model, batch)
    assert count == 5
    torch.testing.assert_close(model(**batch).loss, total / count)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(20)).loss, total / 20)
    torch.testing.assert_close(model(**batch, num_items_in_batch=20).loss, total / 20)


@torch.no_grad()
def test_logits_only_where_something_is_learned(model):
    batch = supervised([9, 14])
    everywhere = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert everywhere.shape == (2, 14, VOCABULARY)
    logits = model(**batch).logits
    assert logits.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(logits, everywhere[:, 10:13])


@torch.no_grad()
@pytest.mark.parametrize("keep", [4, torch.tensor([10, 11, 12])])
def test_a_loss_over_chosen_logits(llama_model, keep):
    batch = supervised([9, 14])
    outputs = llama_model(**batch, logits_to_keep=keep)
    assert outputs.logits.shape[1] == (keep if isinstance(keep, int) else len(keep))
    torch.testing.assert_close(outputs.loss, llama_model(**batch).loss)


def test_accumulated_losses_are_those_of_the_whole_batch(llama_model):
    batch = supervised([12, 12, 12])
    whole = llama_model(**batch).loss
    count = int((batch["labels"] != -100).sum())
    parts = [
        llama_model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=count).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("num_items", [None, 7])
def test_nothing_to_learn_is_zero(llama_model, num_items):
    batch = supervised([9, 14])
    batch["labels"][:] = -100
    loss = llama_model(**batch, num_items_in_batch=num_items).loss
    assert loss == 0.0
    loss.backward()  # a step over such a batch alone changes nothing, and does not fail
    gradients = [parameter.grad for parameter in llama_model.parameters() if parameter.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_label_on_the_first_token_has_nothing_before_it(llama_model):
    batch = prompt([9])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 0] = batch["input_ids"][0, 0]
    assert llama_model(**batch, labels=labels).loss == 0.0


# ---- training ----

BACKBONES = ("language_model.", "context_encoder.", "vision_encoder.")


def test_gradients_reach_all_that_is_trained_and_nothing_else(model, request):
    model = tiny_model(*request.node.callspec.params["model"]).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(BACKBONES) for name in trained)
    assert all(name.startswith(BACKBONES) for name, p in model.named_parameters() if not p.requires_grad)
    batch = supervised([15, 18])
    batch |= prompt([15, 18], sources=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch, pixel_values=pictures(2)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith(BACKBONES):
            assert parameter.grad is None, name
        elif name.startswith("matching_head."):
            continue  # trained by the matching objective, no part of a dialogue
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # a softmax does not feel a shift of all its scores, so key biases get nothing
            assert name.endswith("key.bias") or parameter.grad.abs().sum() > 0, name
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(BACKBONES))
    assert not torch.equal(after["iqformer.query_tokens"], before["iqformer.query_tokens"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[12], [9, 30, 14]])
@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_gradients_are_those_of_the_whole_sequence(llm, rows, attention):
    """However the loss is computed: as of one plain run of the LLM over all that is spliced."""
    model = tiny_model(llm)
    model.language_model.set_attn_implementation(attention)
    batch = supervised(rows)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.enable_grad():
        actual = model(**batch).loss
        knowledge = model.get_knowledge(batch["context_input_ids"], batch["context_attention_mask"])
        embeds = model.embed_prompt(batch["input_ids"], knowledge)
        logits = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual), gradients(expected), atol=1e-5, rtol=1e-3)


def test_backbones_stay_in_evaluation_mode(llama_model):
    llama_model.train()
    backbones = (llama_model.language_model, llama_model.context_encoder, llama_model.vision_encoder)
    assert llama_model.training and llama_model.iqformer.training
    assert not any(module.training for backbone in backbones for module in backbone.modules())
    assert any(isinstance(module, nn.Dropout) and module.training for module in llama_model.iqformer.modules())
    llama_model.eval()
    assert not any(module.training for module in llama_model.modules())


def test_a_fresh_model_starts_at_the_papers_parametrisation():
    model = VikdfForConditionalGeneration(tiny_config())
    assert (model.knowledge_base == 0).all() and (model.knowledge_gate == 1).all()
    assert model.iqformer.query_tokens.std() > 0.01


# ---- bad input ----


@pytest.mark.parametrize("count", [0, 3, 5, 8])
def test_number_of_placeholders(llama_model, count):
    batch = prompt([14], n=4)
    batch["input_ids"][0] = torch.arange(14) + 20
    batch["input_ids"][0, 2 : 2 + count] = KNOWLEDGE_ID
    with pytest.raises(ValueError, match=rf"expected \[4\], found \[{count}\]"):
        llama_model(**batch)
    with pytest.raises(ValueError, match=rf"expected \[4\], found \[{count}\]"):
        llama_model.generate(**batch, max_new_tokens=2)


def test_placeholders_that_balance_out_between_rows(llama_model):
    """Filling by mask alone would accept 3 + 5 for 4 + 4."""
    batch = prompt([14, 14])
    batch["input_ids"][0, 5] = 20
    batch["input_ids"][1, 6] = KNOWLEDGE_ID
    with pytest.raises(ValueError, match=r"expected \[4, 4\], found \[3, 5\]"):
        llama_model(**batch)


def test_placeholders_without_knowledge(llama_model):
    batch = prompt([14])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for call in (llama_model, lambda **inputs: llama_model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="4 knowledge placeholders but no knowledge"):
            call(**inputs)


@pytest.mark.parametrize("shape", [(1, 3, 32), (1, 4, 31), (4, 32), (1, 12, 32), (2, 4, 32)])
def test_knowledge_of_a_wrong_shape(llama_model, shape):
    batch = prompt([14])
    with pytest.raises(ValueError, match="knowledge"):
        llama_model(input_ids=batch["input_ids"], knowledge=torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_knowledge_that_is_not_finite(llama_model, value):
    batch, knowledge = prompt([14]), torch.zeros(1, 4, 32)
    knowledge[0, 2, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        llama_model(input_ids=batch["input_ids"], knowledge=knowledge)


def test_token_ids_or_embeddings_but_one_of_them(llama_model):
    ids = torch.tensor([[20, 21]])
    with pytest.raises(ValueError, match="exactly one"):
        llama_model()
    with pytest.raises(ValueError, match="exactly one"):
        llama_model(input_ids=ids, inputs_embeds=llama_model.get_input_embeddings()(ids))


def test_knowledge_beside_embeddings(llama_model):
    """Embeddings hold no placeholders, so the knowledge would be lost without a word."""
    embeds = torch.zeros(1, 5, 48)
    for call in (llama_model, lambda **inputs: llama_model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="inputs_embeds"):
            call(inputs_embeds=embeds, knowledge=torch.zeros(1, 4, 32))


def test_a_context_longer_than_the_encoder_reads(llama_model):
    with pytest.raises(ValueError, match="513 tokens.*at most 512.*max_context_length"):
        llama_model.get_text_knowledge(torch.ones(1, 513, dtype=torch.long))


def test_a_picture_for_a_model_without_eyes():
    model = tiny_model(towers="siglip", vision_config=None)
    with pytest.raises(ValueError, match="no vision encoder"):
        model.get_image_knowledge(pictures())


def test_a_model_that_was_not_told_its_placeholder():
    model = tiny_model(knowledge_token_id=None)
    plain = plain_prompt([9])
    assert torch.equal(model(**plain).logits, model.language_model(**plain).logits)
    assert model(**plain, labels=plain["input_ids"]).loss > 0
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="knowledge_token_id is not set"):
            call(**prompt([9]))


def test_a_backbone_that_is_not_attached():
    config = tiny_config(backbones={"language_model": {"repo_id": "org/llm"}})
    with pytest.raises(ValueError, match="language_model.*attach_backbones"):
        VikdfForConditionalGeneration(config)(**prompt([9]))


def test_the_placeholder_may_lie_outside_the_vocabulary():
    model = tiny_model(knowledge_token_id=VOCABULARY + 3)
    batch = prompt([9])
    batch["input_ids"][batch["input_ids"] == KNOWLEDGE_ID] = VOCABULARY + 3
    assert torch.equal(model(**batch).logits, tiny_model()(**prompt([9])).logits)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] > 9


def test_the_llms_of_the_tests_are_two_families():
    assert {type(tiny_model(llm).language_model).__name__ for llm in ("llama", "qwen")} == {
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
    }
    assert llm_config("qwen").tie_word_embeddings and not llm_config("llama").tie_word_embeddings
