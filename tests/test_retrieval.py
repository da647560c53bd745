"""Recall against cases worked by hand and a plain sort, its intervals, and the embeddings it is computed from."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import TOWERS, tiny_model
from tiny_tokenizers import bert_tokenizer, clip_like_tokenizer, image_processor, llama_tokenizer

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.data.features import cache_features
from modeling_vikdf.evaluation import retrieval
from modeling_vikdf.evaluation.reports import kind_of
from modeling_vikdf.evaluation.retrieval import embed_pairs, evaluate_retrieval, retrieval_intervals, retrieval_recall


DIRECTIONS = ("text_to_image", "image_to_text")


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors [N, 2] at angles, so that nearness is a difference of angles."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_recall_worked_by_hand():
    images, texts, text_to_image = at(0, 60, 90), at(10, 100, 70, 25), torch.tensor([0, 1, 2, 1])
    # text 0 at 10: pictures 0 (10 away), 1 (50), 2 (80)  -> its picture 0 is first
    # text 1 at 100: pictures 2 (10), 1 (40), 0 (100)     -> its picture 1 is second
    # text 2 at 70: pictures 1 (10), 2 (20), 0 (70)       -> its picture 2 is second
    # text 3 at 25: pictures 0 (25), 1 (35), 2 (65)       -> its picture 1 is second
    # picture 0 at 0: texts 0 (10), 3, 2, 1               -> its text 0 is first
    # picture 1 at 60: texts 2 (10), 3 (35), 1 (40), 0    -> the better of its texts, 3, is second
    # picture 2 at 90: texts 1 (10), 2 (20), 3, 0         -> its text 2 is second
    recall = retrieval_recall(texts, images, text_to_image, ks=(1, 2))
    assert recall["text_to_image"] == pytest.approx({"recall_at_1": 25, "recall_at_2": 100})
    assert recall["image_to_text"] == pytest.approx({"recall_at_1": 100 / 3, "recall_at_2": 100})


def test_several_texts_of_a_picture_do_not_stand_in_each_others_way():
    """A picture's own texts at rank 1 to 3 are one hit at 1; that the third is no hit at 1 does not matter."""
    recall = retrieval_recall(at(0, 1, 2, 50), at(0, 50), torch.tensor([0, 0, 0, 1]), ks=(1,))
    assert recall == {"text_to_image": {"recall_at_1": 100.0}, "image_to_text": {"recall_at_1": 100.0}}


def test_pictures_without_texts_can_be_found_but_do_not_ask():
    recall = retrieval_recall(at(0, 40), at(0, 30, 50), torch.tensor([0, 2]), ks=(1, 2))
    # text 1 at 40 is as far from picture 1, which has no text, as from its own: a tie, so second
    assert recall["text_to_image"] == {"recall_at_1": 50.0, "recall_at_2": 100.0}
    assert recall["image_to_text"] == {"recall_at_1": 100.0, "recall_at_2": 100.0}


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_embeddings_that_tell_nothing_apart_find_nothing(value):
    """However many texts the pictures have, and whatever rounding makes of equal vectors."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((618, 37), value / 37**0.5) + 1e-8 * torch.randn(618, 1, generator=generator)
    recall = retrieval_recall(*rows.split([515, 103]), torch.arange(515) // 5)
    assert all(set(recall[direction].values()) == {0.0} for direction in DIRECTIONS)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 25))
@settings(max_examples=40)
def test_recall_is_that_of_a_plain_sort(seed, num_images, num_texts):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.nn.functional.normalize(
        torch.randn(num_images + num_texts, 3, generator=generator), dim=-1
    ).split([num_images, num_texts])
    owner = torch.randint(num_images, (num_texts,), generator=generator)
    scores, owners = texts @ images.T, owner.tolist()
    found = {"text_to_image": [], "image_to_text": []}
    for text in range(num_texts):
        order = sorted(range(num_images), key=lambda image: -scores[text, image])
        found["text_to_image"].append(order.index(owners[text]))
    for image in set(owners):
        order = sorted(range(num_texts), key=lambda text: -scores[text, image])
        found["image_to_text"].append(min(i for i, text in enumerate(order) if owners[text] == image))
    expected = {
        direction: {f"recall_at_{k}": 100 * np.mean([rank < k for rank in ranks]) for k in (1, 5, 10)}
        for direction, ranks in found.items()
    }
    recall = retrieval_recall(texts, images, owner)
    assert all(recall[direction] == pytest.approx(expected[direction]) for direction in DIRECTIONS)


def test_chunks_change_nothing(monkeypatch):
    texts, images = torch.nn.functional.normalize(torch.randn(80, 4), dim=-1).split([60, 20])
    owner = torch.arange(60) // 3
    whole = retrieval_recall(texts, images, owner)
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    assert retrieval_recall(texts, images, owner) == whole


@pytest.mark.parametrize("owner", [[0, 1], [0, 1, 3], [0, -1, 1], [[0], [1], [2]]])
def test_texts_of_no_picture_are_refused(owner):
    with pytest.raises(ValueError, match="one of 3 pictures for each of 3 texts"):
        retrieval_recall(at(0, 1, 2), at(0, 1, 2), torch.tensor(owner))


def test_intervals_are_those_of_photographs_not_of_captions():
    """Half of the photographs are always found, with all five captions, and half never: a binomial of photographs."""
    number = 400
    images = torch.nn.functional.normalize(torch.randn(number, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = torch.where(torch.arange(number)[:, None] < number // 2, images, images.roll(1, 0)).repeat_interleave(5, 0)
    owner = torch.arange(number).repeat_interleave(5)
    intervals = retrieval_intervals(texts, images, owner, ks=(1,), resamples=2000)
    expected = 196 * math.sqrt(0.25 / number)  # 1.96 standard errors, in %
    low, high = intervals["text_to_image"]["recall_at_1"]
    assert (50 - low, high - 50) == pytest.approx((expected, expected), abs=0.75)
    recall = retrieval_recall(texts, images, owner, ks=(1,))
    for direction in DIRECTIONS:
        assert intervals[direction]["recall_at_1"][0] < recall[direction]["recall_at_1"]
        assert recall[direction]["recall_at_1"] < intervals[direction]["recall_at_1"][1]
    assert intervals == retrieval_intervals(texts, images, owner, ks=(1,), resamples=2000)
    assert intervals != retrieval_intervals(texts, images, owner, ks=(1,), resamples=2000, seed=1)


# ---- embedding ----


CAPTIONS = [
    ["A dog runs.", "The dog is running after a red ball in the park, and it is happy."],
    ["It is snowing outside."],
    ["Pizza.", "Pizza with cheese, tomatoes and olives.", "My favourite food"],
    ["blue water", "The water was so blue!"],
]
OWNER = [0, 0, 1, 2, 2, 2, 3, 3]


@pytest.fixture(scope="module", params=TOWERS)
def parts(request: pytest.FixtureRequest) -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    context_tokenizer = bert_tokenizer() if request.param == "separate" else clip_like_tokenizer()
    processor = VikdfProcessor.from_backbones(
        llama_tokenizer(), context_tokenizer, image_processor(), vocab_size=512, num_knowledge_tokens=4
    )
    model = tiny_model("llama", request.param)
    with torch.no_grad():
        for parameter in model.iqformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # freshly initialised it makes nearly the same of everything
    return model, processor


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 40, 48, 3), dtype=np.uint8)
    return [
        {"key": str(i), "image": Image.fromarray(picture), "captions": captions}
        for i, (picture, captions) in enumerate(zip(pixels, CAPTIONS, strict=True))
    ]


def test_every_picture_and_caption_is_embedded(parts, pairs):
    model, processor = parts
    model.train()  # dropout must not act
    texts, images, text_to_image = embed_pairs(model, processor, iter(pairs), batch_size=3, progress=False)
    assert model.training
    model.eval()
    assert text_to_image.tolist() == OWNER and not texts.requires_grad
    captions = [caption for pair in pairs for caption in pair["captions"]]
    for caption, embedding in zip(captions, texts, strict=True):
        inputs = processor.context_tokenizer(caption, return_tensors="pt")
        alone = model.get_text_embeddings(inputs["input_ids"])[0]
        torch.testing.assert_close(embedding, alone, rtol=1e-4, atol=1e-5)
    for pair, embedding in zip(pairs, images, strict=True):
        pixel_values = processor.image_processor(pair["image"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(embedding, model.get_image_embeddings(pixel_values)[0], rtol=1e-4, atol=1e-5)
    assert (texts[:, None] - texts[None]).abs().amax(-1).fill_diagonal_(1).min() > 0.01  # all different


def test_cached_states_are_embedded_without_the_encoders(parts, pairs, tmp_path, monkeypatch):
    model, processor = parts
    expected = embed_pairs(model, processor, pairs, progress=False)
    cached = cache_features(model, processor, pairs, tmp_path, shard_size=3)

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(model.vision_encoder, "forward", refuse)
    monkeypatch.setattr(model.context_encoder, "forward", refuse)
    found = embed_pairs(model, processor, cached, batch_size=3, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)  # the cache is float16


def test_no_pairs_are_refused(parts):
    with pytest.raises(ValueError, match="no pairs"):
        embed_pairs(*parts, [])


def test_evaluation_reports_recall_and_intervals_and_counts(parts, pairs):
    model, processor = parts
    report = json.loads(json.dumps(evaluate_retrieval(model, processor, pairs, batch_size=2)))
    assert kind_of(report) == report["kind"] == "retrieval"
    embeddings = embed_pairs(model, processor, pairs, progress=False)
    recall = retrieval_recall(*embeddings)
    assert (report["num_pictures"], report["num_captions"]) == (len(pairs), len(OWNER))
    for direction in DIRECTIONS:
        assert report[direction] == pytest.approx(recall[direction])
        for name, (low, high) in report["confidence_95"][direction].items():
            assert 0 <= low <= report[direction][name] <= high <= 100
        assert report[direction]["recall_at_10"] == 100  # of eight captions and four pictures
    assert report == evaluate_retrieval(model, processor, pairs, batch_size=2)
