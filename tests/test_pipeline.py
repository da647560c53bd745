"""The pipeline `vikdf-dialogue`: what goes in, what comes out, and that nothing happens at import."""

import inspect
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import GeneratorType
from unittest.mock import patch

import datasets
import numpy
import pandas
import pytest
import torch
from conftest import build_from
from PIL import Image
from tiny_tokenizers import bert_tokenizer, qwen_tokenizer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextGenerationPipeline,
    TextStreamer,
    pipeline,
    set_seed,
)
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils.chat_template_utils import Chat

import modeling_vikdf
from modeling_vikdf import (
    VikdfDialoguePipeline,
    VikdfForConditionalGeneration,
    VikdfInputsError,
    VikdfProcessor,
)
from modeling_vikdf.backbones import PACKAGED_BACKBONES
from modeling_vikdf.pipeline_vikdf import REFUSED


PACKAGE_ROOT = Path(modeling_vikdf.__file__).parents[1]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
CHAT = [{"role": "user", "content": "What is your dog doing?"}]
LONGER = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "I went to the beach yesterday and the water was so blue!"},
    {"role": "assistant", "content": "Look at the sky."},
    {"role": "user", "content": "It is snowing outside."},
]


@pytest.fixture(scope="module", params=[("qwen", "separate"), ("llama", "clip")], ids="-".join)
def parts(request, backbones):
    model, processor = build_from(backbones, *request.param, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **GREEDY)
    return model, processor


@pytest.fixture(scope="module")
def pipe(parts) -> VikdfDialoguePipeline:
    """Shared: a test that changes a pipeline builds its own."""
    model, processor = parts
    return pipeline("vikdf-dialogue", model=model, processor=processor)


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 36), colour)


def by_hand(pipe, chat: list[dict], images=None, **kwargs) -> str:
    """processor -> generate -> decode, as the three are documented."""
    inputs = pipe.processor([chat], images=None if images is None else [images])
    tokens = pipe.model.generate(**inputs, **kwargs)[0, inputs["input_ids"].shape[1] :]
    return pipe.processor.decode(tokens, skip_special_tokens=True).strip()


# ---- inputs and outputs ----


@pytest.mark.parametrize("chat", [CHAT, LONGER])
def test_a_chat_comes_back_with_the_reply_appended(pipe, chat):
    before = [dict(message) for message in chat]
    outputs = pipe(chat)
    reply = {"role": "assistant", "content": by_hand(pipe, chat)}
    assert outputs == [{"generated_text": [*before, reply]}] and reply["content"]
    assert chat == before


def test_the_reply_alone(pipe):
    assert pipe(CHAT, return_full_text=False) == [{"generated_text": by_hand(pipe, CHAT)}]


def test_a_string_is_one_user_turn(pipe):
    assert pipe(CHAT[0]["content"]) == [{"generated_text": by_hand(pipe, CHAT)}]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 8])
def test_a_list_of_chats(pipe, batch_size):
    chats = [CHAT, LONGER, CHAT + LONGER[2:]]
    assert pipe(chats, batch_size=batch_size) == [pipe(chat) for chat in chats]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_list_of_strings(pipe, batch_size):
    texts = [CHAT[0]["content"], LONGER[3]["content"], LONGER[1]["content"]]
    assert pipe(texts, batch_size=batch_size) == [pipe(text) for text in texts]


def test_the_same_chat_many_times_is_computed_as_a_batch(pipe):
    with patch.object(type(pipe.model), "generate", autospec=True, side_effect=type(pipe.model).generate) as generate:
        pipe([CHAT] * 4, batch_size=4)
    assert generate.call_count == 1


class Chats(Dataset):
    def __init__(self, chats: list):
        self.chats = chats

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int):
        return self.chats[index]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("items", [[CHAT, LONGER, CHAT], ["It is snowing outside.", "Look at the sky.", "You are."]])
def test_generators_and_datasets_are_read_as_they_go(pipe, items, batch_size):
    expected = pipe(items)
    read = []

    def generator() -> GeneratorType:
        for item in items:
            read.append(item)
            yield item

    outputs = iter(pipe(generator(), batch_size=batch_size))
    first = next(outputs)
    assert len(read) <= batch_size + 1
    assert [first, *outputs] == expected
    assert list(pipe(Chats(items), batch_size=batch_size)) == expected


def test_several_replies(pipe):
    outputs = pipe(CHAT, num_beams=3, num_return_sequences=2, return_full_text=False)
    assert len(outputs) == 2 and outputs[0] != outputs[1]
    assert outputs[0] == pipe(CHAT, num_beams=3, return_full_text=False)[0]
    batched = pipe([CHAT, LONGER], batch_size=2, num_beams=3, num_return_sequences=2, return_full_text=False)
    assert batched[0] == outputs
    assert batched[1] == pipe(LONGER, num_beams=3, num_return_sequences=2, return_full_text=False)


def test_sampling_is_reproducible(pipe):
    drawn = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 8, "return_full_text": False}
    torch.manual_seed(0)
    first = pipe(CHAT, **drawn)
    torch.manual_seed(0)
    assert pipe(CHAT, **drawn) == first
    assert len({reply["generated_text"] for reply in first}) > 1


def test_parts_as_contents(pipe):
    chat = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert pipe(chat, return_full_text=False) == pipe(CHAT, return_full_text=False)


# ---- pictures ----


def test_pictures(pipe):
    expected = [by_hand(pipe, CHAT, picture("red")), by_hand(pipe, CHAT), by_hand(pipe, LONGER, picture("blue"))]
    images = [picture("red"), None, picture("blue")]
    for batch_size in (1, 2, 3):
        outputs = pipe([CHAT, CHAT, LONGER], images=images, batch_size=batch_size, return_full_text=False)
        assert [output[0]["generated_text"] for output in outputs] == expected
    assert pipe(CHAT, images=picture("red"), return_full_text=False)[0]["generated_text"] == expected[0]
    assert pipe(CHAT[0]["content"], images=picture("red"))[0]["generated_text"] == expected[0]
    assert expected[0] != expected[1]


def test_pictures_among_the_parts_and_in_files(pipe, tmp_path):
    picture("red").save(tmp_path / "red.png")
    expected = pipe(CHAT, images=picture("red"), return_full_text=False)
    assert pipe(CHAT, images=str(tmp_path / "red.png"), return_full_text=False) == expected
    parts = [{"type": "image", "image": picture("red")}, {"type": "text", "text": CHAT[0]["content"]}]
    chat = [{"role": "user", "content": parts}]
    assert pipe(chat, return_full_text=False) == expected
    assert pipe([chat, CHAT], batch_size=2, return_full_text=False)[0] == expected
    assert list(pipe((item for item in [chat, CHAT]), return_full_text=False))[0] == expected


# ---- settings ----


def test_generation_settings_come_in_either_way(pipe):
    expected = pipe(CHAT, max_new_tokens=3, num_beams=2)
    assert pipe(CHAT, generate_kwargs={"max_new_tokens": 3, "num_beams": 2}) == expected
    config = GenerationConfig(max_new_tokens=3, num_beams=2, do_sample=False)
    assert pipe(CHAT, generation_config=config) == expected
    assert expected != pipe(CHAT)


def test_settings_at_construction_are_defaults(parts):
    model, processor = parts
    own = pipeline(
        "vikdf-dialogue", model=model, processor=processor, max_new_tokens=3, return_full_text=False, batch_size=2
    )
    plain = pipeline("vikdf-dialogue", model=model, processor=processor)
    assert own(CHAT) == plain(CHAT, max_new_tokens=3, return_full_text=False)
    assert own(CHAT, max_new_tokens=5) == plain(CHAT, max_new_tokens=5, return_full_text=False)
    assert own([CHAT, LONGER]) == [own(CHAT), own(LONGER)]
    assert model.generation_config.max_new_tokens == 8


def test_without_knowledge_the_llm_itself_replies(parts, pipe):
    model, processor = parts
    source = AutoTokenizer.from_pretrained(model.config.backbones["language_model"]["repo_id"])
    llm = AutoModelForCausalLM.from_pretrained(
        model.config.backbones["language_model"]["repo_id"], dtype=torch.float32
    )
    inputs = source.apply_chat_template(LONGER, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = llm.generate(**inputs, **GREEDY, eos_token_id=2, pad_token_id=0, temperature=None, top_p=None)
    reply = source.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    with patch.object(type(model), "encode_context", side_effect=AssertionError("not needed")):
        outputs = pipe(LONGER, use_knowledge=False, return_full_text=False)
        assert outputs == [{"generated_text": reply}] and reply
        batched = pipe([CHAT, LONGER], batch_size=2, use_knowledge=False, return_full_text=False)
        assert batched[1] == outputs
        quiet = pipeline("vikdf-dialogue", model=model, processor=processor, use_knowledge=False)
        assert quiet(LONGER, return_full_text=False) == outputs
    assert pipe(LONGER, return_full_text=False) != outputs


def test_a_chat_too_long_for_the_llm_leaves_room_for_the_reply(pipe):
    window = pipe.model.config.text_config.max_position_embeddings
    turns = [{"role": role, "content": "the water was so blue! " * 4} for role in ("user", "assistant")] * 40
    chat = [*turns, *CHAT]
    assert pipe.processor.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"].__len__() > window
    with patch.object(type(pipe.model), "generate", autospec=True, side_effect=type(pipe.model).generate) as generate:
        reply = pipe(chat, max_new_tokens=20)[0]["generated_text"]
    length = generate.call_args.kwargs["input_ids"].shape[1]
    assert window - 20 - 120 < length <= window - 20
    assert reply[:-1] == chat  # only the prompt is shorter


def test_an_llm_without_padding_token_logs_nothing(backbones, caplog):
    model, processor = build_from(backbones, "llama", "separate")
    model.generation_config = GenerationConfig(eos_token_id=2, **GREEDY)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
    pipe([CHAT, LONGER], batch_size=2)
    assert caplog.messages == []


# ---- streaming ----


def test_streaming_yields_the_reply_in_pieces(pipe):
    expected = pipe(CHAT, return_full_text=False)[0]["generated_text"]
    pieces = list(pipe.stream(CHAT))
    assert "".join(pieces).strip() == expected
    assert "".join(pipe.stream(CHAT[0]["content"])).strip() == expected
    assert "".join(pipe.stream(CHAT, images=picture("red"))) != "".join(pieces)
    assert len("".join(pipe.stream(CHAT, max_new_tokens=2))) < len("".join(pieces))


def test_a_streamer_of_ones_own(pipe, capsys):
    outputs = pipe(CHAT, streamer=TextStreamer(pipe.processor.tokenizer, skip_prompt=True), return_full_text=False)
    assert outputs[0]["generated_text"] in capsys.readouterr().out


def test_closing_a_stream_ends_the_generation(pipe):
    steps = []

    def count(ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        steps.append(ids.shape[1])
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    before = threading.active_count()
    stream = pipe.stream(CHAT, max_new_tokens=300, min_new_tokens=300, stopping_criteria=[count])
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert 0 < len(steps) < 300
    assert pipe(CHAT) == pipe(CHAT)  # and the pipeline goes on working


def test_a_stream_never_begun_starts_nothing(pipe):
    before = threading.active_count()
    pipe.stream(CHAT).close()
    assert threading.active_count() == before


def test_an_error_while_streaming_is_raised(pipe):
    with patch.object(type(pipe.model), "generate", side_effect=RuntimeError("broken")):
        with pytest.raises(RuntimeError, match="broken"):
            list(pipe.stream(CHAT))
    with pytest.raises(ValueError, match="content is empty"):
        list(pipe.stream([{"role": "user", "content": ""}]))
    with pytest.raises(ValueError, match="num_beams"):
        list(pipe.stream(CHAT, num_beams=2))


def test_an_error_in_the_middle_of_a_stream(pipe):
    prompt_length = pipe.processor([CHAT])["input_ids"].shape[1]

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == prompt_length + 40:
            raise RuntimeError("broken in the middle")
        return scores

    pieces, settings = [], {"max_new_tokens": 60, "min_new_tokens": 60, "logits_processor": [fail]}
    with pytest.raises(RuntimeError, match="in the middle"):
        for piece in pipe.stream(CHAT, **settings):
            pieces.append(piece)
    assert pieces and all(pieces)


# ---- a reply that is begun ----

BEGUN = [*CHAT, {"role": "assistant", "content": "He is"}]


def continued(pipe, chat: list[dict], **kwargs) -> str:
    """What `generate` writes behind the prompt, read together with the prompt's end."""
    inputs = pipe.processor([chat], continue_final_message=True)
    length = inputs["input_ids"].shape[1]
    tokens = pipe.model.generate(**inputs, **kwargs)[0]
    before, whole = (pipe.processor.decode(ids, skip_special_tokens=True) for ids in (tokens[:length], tokens))
    assert before.endswith("He is") and whole.startswith(before)
    return whole[len(before) :].rstrip()


def test_a_reply_that_is_begun_is_continued(pipe):
    expected = continued(pipe, BEGUN)
    message = {"role": "assistant", "content": "He is" + expected}
    assert pipe(BEGUN) == [{"generated_text": [*CHAT, message]}] == pipe(BEGUN, continue_final_message=True)
    assert pipe(BEGUN, return_full_text=False) == [{"generated_text": expected}] != pipe(CHAT, return_full_text=False)
    assert "".join(pipe.stream(BEGUN)).rstrip() == expected
    assert BEGUN[-1]["content"] == "He is"
    parts = [{"type": "text", "text": "He is"}]
    (output,) = pipe([*CHAT, {"role": "assistant", "content": parts}])
    assert output["generated_text"][-1]["content"] == [{"type": "text", "text": "He is" + expected}]


def test_a_word_that_goes_on_keeps_its_space(pipe):
    """A piece that begins a word loses the space in front of it where nothing stands before it."""
    space = next(iter(pipe.processor.tokenizer(" a a", add_special_tokens=False)["input_ids"][-1:]))
    with patch.object(
        type(pipe.model),
        "generate",
        lambda self, input_ids, streamer=None, **kwargs: write(input_ids, streamer, space),
    ):
        assert pipe(BEGUN, return_full_text=False) == [{"generated_text": " a"}]
        assert pipe(BEGUN)[0]["generated_text"][-1]["content"] == "He is a"
        assert "".join(pipe.stream(BEGUN)) == " a"
        assert pipe(CHAT, return_full_text=False) == [{"generated_text": "a"}]


def write(input_ids: torch.Tensor, streamer, token: int) -> torch.Tensor:
    """`generate` of a model that says one token."""
    if streamer is not None:
        streamer.put(input_ids)
        streamer.put(torch.tensor([token]))
        streamer.end()
    return torch.cat([input_ids, input_ids.new_full((len(input_ids), 1), token)], 1)


def test_begun_and_other_chats_in_one_batch(pipe):
    outputs = pipe([BEGUN, CHAT, LONGER], batch_size=3)
    assert outputs == [pipe(BEGUN), pipe(CHAT), pipe(LONGER)]
    assert [len(output[0]["generated_text"]) for output in outputs] == [2, 2, 5]


def test_another_reply_behind_a_reply(pipe):
    if "INST" in pipe.processor.chat_template:
        pytest.skip("Llama's template has no prompt for a second reply")
    (output,) = pipe(BEGUN, continue_final_message=False)
    assert output["generated_text"][:2] == BEGUN and len(output["generated_text"]) == 3
    with pytest.raises(ValueError, match="the last message is the user's"):
        pipe(CHAT, continue_final_message=True)


def test_an_empty_reply_does_not_end_the_dialogue(pipe):
    with patch.object(type(pipe.model), "generate", lambda self, input_ids, **kwargs: write(input_ids, None, 2)):
        (output,) = pipe(CHAT)
    assert output["generated_text"][-1]["content"] == ""
    again = pipe([*output["generated_text"], {"role": "user", "content": "Are you there?"}])
    assert len(again[0]["generated_text"]) == 4


# ---- wrong inputs ----


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "empty list"),
        ([[]], "at least one message"),
        ([CHAT, []], "at least one message"),
        ("", "content is empty"),
        ([""], "content is empty"),
        ([{"role": "user", "content": ""}], "content is empty"),
        ([{"role": "user", "content": None}], "content must be a string"),
        ([{"role": "user", "content": 3}], "content must be a string"),
        ([{"role": "tool", "content": "a"}], "role"),
        ([{"role": "user"}], "content missing"),
        (None, "got None"),
        (3, "got 3"),
        ([None, None], "got None"),
        ({"role": "user", "content": "a"}, "got {'role'"),
    ],
)
def test_wrong_chats(pipe, chat, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(chat)


@pytest.mark.parametrize(
    ("chats", "images"),
    [
        ([CHAT, CHAT], [picture("red")]),
        ([CHAT], [None, None]),
        ([CHAT, CHAT], picture("red")),
        (CHAT, [picture("red"), picture("blue")]),
    ],
)
def test_wrong_numbers_of_pictures(pipe, chats, images):
    with pytest.raises(ValueError, match="images?|pictures?"):
        pipe(chats, images=images)


def test_pictures_beside_a_generator(pipe):
    with pytest.raises(ValueError, match="into the messages"):
        pipe((chat for chat in [CHAT]), images=[picture("red")])


def test_a_picture_that_is_none(pipe, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="cannot read the picture"):
        pipe(CHAT, images=str(tmp_path / "broken.png"))


def test_misspelled_settings(pipe):
    with pytest.raises(ValueError, match="max_new_tokns"):
        pipe(CHAT, max_new_tokns=3)


def test_a_plain_language_model_is_refused(backbones):
    llm = AutoModelForCausalLM.from_pretrained(backbones / "qwen")
    processor = VikdfProcessor.from_backbones(qwen_tokenizer(), bert_tokenizer(), vocab_size=512)
    with pytest.raises(ValueError, match='LlamaFor|Qwen2ForCausalLM.*"text-generation"'):
        pipeline("vikdf-dialogue", model=llm, processor=processor)


def test_a_reply_longer_than_the_llms_window_is_refused(pipe):
    with pytest.raises(ValueError, match="max_new_tokens=100000 leaves no room"):
        pipe(CHAT, max_new_tokens=100_000)


# ---- more kinds of inputs ----


def columns(items: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"messages": items, "id": list(range(len(items)))})


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda chats: columns(chats)["messages"],
        lambda chats: tuple(chats),
        lambda chats: [Chat(chat) for chat in chats],
        lambda chats: [{"messages": chat} for chat in chats],
        lambda chats: pandas.Series(chats),
    ],
    ids=["column", "tuple", "Chat", "rows", "series"],
)
def test_what_holds_chats_as_a_list_does_is_answered_by_a_list(pipe, wrap, batch_size):
    chats = [CHAT, LONGER, CHAT + LONGER[2:]]
    assert pipe(wrap(chats), batch_size=batch_size) == pipe(chats)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "wrap",
    [
        columns,
        lambda chats: columns(chats).to_iterable_dataset(),
        lambda chats: KeyDataset(columns(chats), "messages"),
        lambda chats: iter(chats),
        lambda chats: map(list, chats),
        lambda chats: ({"messages": chat} for chat in chats),
    ],
    ids=["dataset", "iterable dataset", "KeyDataset", "iterator", "map", "generator of rows"],
)
def test_datasets_and_iterators_are_answered_one_after_the_other(pipe, wrap, batch_size):
    chats = [CHAT, LONGER, CHAT + LONGER[2:]]
    outputs = pipe(wrap(chats), batch_size=batch_size)
    assert not isinstance(outputs, list) and list(outputs) == pipe(chats)


def test_arrays_of_strings(pipe):
    texts = ["It is snowing outside.", "Look at the sky."]
    assert pipe(numpy.array(texts)) == pipe(texts)
    assert pipe(numpy.array(texts, dtype=object), batch_size=2) == pipe(texts)
    assert pipe(numpy.array(texts[0])) == pipe(texts[0])


def test_a_row_and_a_chat_object_are_one_chat(pipe):
    assert pipe({"messages": CHAT, "id": 3}) == pipe(CHAT)
    assert pipe(Chat(CHAT)) == pipe(CHAT)
    assert pipe(Chat(CHAT), images=picture("red")) == pipe(CHAT, images=picture("red"))
    assert pipe({"messages": "It is snowing outside."}) == pipe("It is snowing outside.")


def test_a_generator_of_messages_is_one_chat(pipe):
    assert pipe(message for message in LONGER) == pipe(LONGER)


def test_nothing_to_iterate_over(pipe):
    assert list(pipe(chat for chat in [])) == []


def test_a_dataset_has_a_length_and_may_have_workers(pipe):
    outputs = pipe(columns([CHAT, LONGER]), num_workers=1)
    assert len(outputs) == 2 and list(outputs) == pipe([CHAT, LONGER])


def test_a_column_of_pictures(pipe):
    images = datasets.Dataset.from_dict({"image": [picture("red"), None]}, datasets.Features(image=datasets.Image()))
    expected = pipe([CHAT, LONGER], images=[picture("red"), None])
    assert pipe([CHAT, LONGER], images=images["image"]) == expected


@pytest.mark.parametrize("name", ["image", "images"])
def test_a_picture_in_a_row_is_not_dropped(pipe, name):
    with pytest.raises(ValueError, match=f"'{name}'.*image part"):
        pipe({"messages": CHAT, name: picture("red")})
    assert pipe({"messages": CHAT, name: None}) == pipe(CHAT)


# ---- bad inputs among good ones ----

EMPTY = [{"role": "user", "content": ""}]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_bad_inputs_of_a_list_do_not_cost_the_others_their_replies(pipe, batch_size):
    chats = [[{"role": "user", "content": f"We saw {i} dogs."}] for i in range(10)]
    good = pipe(chats, return_full_text=False)
    chats[3], chats[7] = EMPTY, [*CHAT, {"role": "robot", "content": "a"}]
    with pytest.raises(VikdfInputsError) as raised:
        pipe(chats, batch_size=batch_size, return_full_text=False)
    error = raised.value
    assert sorted(error.errors) == [3, 7] and isinstance(error, ValueError)
    assert "inputs[3]: message 0: the content is empty" in str(error)
    assert "inputs[7]: message 1: role must be one of" in str(error)
    assert error.replies == [None if i in (3, 7) else good[i] for i in range(10)]


def test_many_bad_inputs_make_a_message_that_can_be_read(pipe):
    with pytest.raises(VikdfInputsError) as raised:
        pipe([EMPTY] * 200, batch_size=50)
    assert len(raised.value.errors) == 200 and len(str(raised.value)) < 2000
    assert str(raised.value).startswith("200 of 200 inputs") and "inputs[199]" not in str(raised.value)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("wrap", [columns, iter, lambda chats: KeyDataset(columns(chats), "messages")])
def test_a_stream_raises_at_the_place_of_a_bad_input_and_goes_on(pipe, wrap, batch_size):
    good = pipe([CHAT, LONGER])
    outputs = iter(pipe(wrap([CHAT, EMPTY, LONGER]), batch_size=batch_size))
    assert next(outputs) == good[0]
    with pytest.raises(ValueError, match=r"^inputs\[1\]: message 0: the content is empty"):
        next(outputs)
    assert next(outputs) == good[1]
    assert next(outputs, None) is None


def test_an_unreadable_picture_among_others(pipe, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    images = [picture("red"), str(tmp_path / "broken.png"), None]
    with pytest.raises(VikdfInputsError, match=r"inputs\[1\]: cannot read the picture") as raised:
        pipe([CHAT, CHAT, CHAT], images=images, batch_size=3)
    assert raised.value.replies == [pipe(CHAT, images=picture("red")), None, pipe(CHAT)]


TOO_LONG = [{"role": "user", "content": "the water was so blue! " * 400}]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (EMPTY, "^message 0: the content is empty"),
        ([{"role": "user"}], "^message 0: content missing"),
        ([], "chat"),
        (None, "got None"),
        (TOO_LONG, "fewer max_new_tokens"),
        ({"text": "a"}, "'messages'.*'text'"),
        ([{"role": "system", "content": "a"}], "no user message"),
    ],
)
def test_errors_speak_of_what_the_caller_passed(pipe, chat, message):
    """And not of the processor's rows and arguments."""
    internals = re.compile(r"\brow \d|max_length|return_labels|add_generation_prompt|dropped_turns")
    if chat != []:
        with pytest.raises((ValueError, TypeError), match=message) as alone:
            pipe(chat)
        assert not internals.search(str(alone.value)) and "inputs[" not in str(alone.value)
    if chat != {"text": "a"}:
        with pytest.raises(VikdfInputsError) as listed:
            pipe(["Hello!", chat])
        assert "inputs[1]: " in str(listed.value) and not internals.search(str(listed.value))


def test_a_picture_for_a_model_that_reads_none(pipe):
    with patch.object(pipe.processor, "image_processor", None):
        with pytest.raises(ValueError, match="this model has no vision encoder") as raised:
            pipe(CHAT, images=picture("red"))
    assert "image_processor" not in str(raised.value)


def test_errors_of_settings_are_not_those_of_inputs(pipe):
    with pytest.raises(ValueError, match="num_return_sequences") as raised:
        pipe([CHAT, LONGER], num_return_sequences=3, do_sample=False)
    assert not isinstance(raised.value, VikdfInputsError)


# ---- settings, as the text-generation pipeline takes them ----


def test_the_calls_generation_config_beats_what_the_constructor_was_given(parts):
    model, processor = parts
    own = pipeline("vikdf-dialogue", model=model, processor=processor, max_new_tokens=2, num_beams=2, batch_size=2)
    plain = pipeline("vikdf-dialogue", model=model, processor=processor)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    assert own(CHAT, generation_config=config) == plain(CHAT, generation_config=config) != own(CHAT)
    assert own(CHAT, generation_config=config, max_new_tokens=4) == plain(CHAT, max_new_tokens=4)
    with_config = pipeline("vikdf-dialogue", model=model, processor=processor, generation_config=config)
    other = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert with_config(CHAT, generation_config=other) == plain(CHAT, max_new_tokens=3)
    assert with_config(CHAT, max_new_tokens=3) == plain(CHAT, max_new_tokens=3)
    assert config.max_new_tokens == 6 and config.num_beams in (None, 1)


def test_other_settings_of_the_constructor_stay_beside_a_generation_config(parts):
    model, processor = parts
    settings = {"use_knowledge": False, "return_full_text": False, "max_new_tokens": 2}
    quiet = pipeline("vikdf-dialogue", model=model, processor=processor, **settings)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    expected = quiet(CHAT, max_new_tokens=6)
    assert quiet(CHAT, generation_config=config) == expected


@pytest.mark.parametrize("way", ["argument", "config", "constructor", "beside the constructor's"])
def test_a_total_length_is_not_lost_to_the_models_number_of_new_tokens(parts, pipe, way, caplog):
    model, processor = parts
    total = processor([CHAT])["input_ids"].shape[1] + 3
    built = {"constructor": {"max_length": total}, "beside the constructor's": {"max_new_tokens": 5}}.get(way, {})
    own = pipeline("vikdf-dialogue", model=model, processor=processor, **built)
    settings = {"max_length": total}
    if way == "config":
        settings = {"generation_config": GenerationConfig(**settings)}
    asked = {} if way == "constructor" else settings
    expected = pipe(CHAT, max_new_tokens=3)
    caplog.clear()
    assert own(CHAT, **asked) == expected
    assert not [message for message in caplog.messages if "precedence" in message]
    assert own(CHAT, max_new_tokens=3) == expected


def test_a_total_length_beyond_the_llms_window_is_refused(pipe):
    with pytest.raises(ValueError, match="max_length=100000.*reads"):
        pipe(CHAT, max_length=100_000)
    with pytest.raises(ValueError, match="max_length"):
        pipe(CHAT, max_length=3)


def test_a_generation_config_without_length_leaves_the_room_that_the_models_asks_for(pipe):
    window = pipe.model.config.text_config.max_position_embeddings
    with patch.object(pipe.model.generation_config, "max_new_tokens", window - 1):
        with pytest.raises(ValueError, match="at most 1 are allowed"):
            pipe(CHAT, generation_config=GenerationConfig(num_beams=2))


def test_scores_come_with_the_replies(pipe):
    chats = [CHAT, LONGER, CHAT]
    asked = {"return_dict_in_generate": True, "output_scores": True, "return_full_text": False}
    plain = pipe(chats, return_full_text=False)
    for batch_size in (1, 2):
        outputs = pipe(chats, batch_size=batch_size, **asked)
        assert [[{"generated_text": each["generated_text"]}] for [each] in outputs] == plain
        for chat, [output] in zip(chats, outputs, strict=True):
            inputs = pipe.processor([chat])
            alone = pipe.model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
            expected = torch.stack(alone.scores, 1)[0]  # [T, vocabulary]
            found = torch.tensor(output["scores"])[: len(expected)]  # longer where another reply of the batch is
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_scores_of_beams(pipe):
    asked = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3, "num_return_sequences": 2}
    outputs = pipe([CHAT, LONGER], batch_size=2, **asked)
    for chat, replies in zip((CHAT, LONGER), outputs, strict=True):
        alone = pipe.model.generate(**pipe.processor([chat]), **asked)
        scores = torch.tensor([reply["sequences_scores"] for reply in replies])
        torch.testing.assert_close(scores, alone.sequences_scores, atol=1e-4, rtol=1e-4)
        assert set(replies[0]) == {"generated_text", "sequences_scores"}  # a step's scores belong to no reply


def test_logits_of_a_step_belong_to_no_reply_of_beams(pipe):
    asked = {"return_dict_in_generate": True, "num_beams": 2}
    with pytest.raises(ValueError, match="output_logits with num_beams"):
        pipe(CHAT, output_logits=True, **asked)
    assert pipe(CHAT, **asked) == pipe(CHAT, num_beams=2)  # no scores, for none were asked for
    assert set(pipe(CHAT, output_logits=True, return_dict_in_generate=True)[0]) == {"generated_text", "logits"}


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("way", ["argument", "config"])
def test_outputs_that_a_reply_has_no_place_for_are_refused(pipe, name, way):
    asked = {name: True, "return_dict_in_generate": True}
    settings = asked if way == "argument" else {"generation_config": GenerationConfig(**asked)}
    with pytest.raises(ValueError, match=f"{name}.*model.generate"):
        pipe(CHAT, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_tensors", True),
        ("return_text", True),
        ("return_type", 1),
        ("prefix", "a"),
        ("handle_long_generation", "hole"),
        ("truncation", True),
        ("padding", True),
        ("add_special_tokens", True),
        ("tokenizer_encode_kwargs", {"max_length": 3}),
        ("tools", [{}]),
        ("documents", [{}]),
        ("assistant_model", "org/name"),
        ("assistant_tokenizer", "org/name"),
        ("input_ids", torch.ones(1, 3)),
    ],
)
def test_settings_of_text_generation_that_have_no_meaning_here_are_refused(parts, pipe, name, value):
    model, processor = parts
    with pytest.raises(ValueError, match=rf"^{name}( |:).*vikdf-dialogue"):
        pipe(CHAT, **{name: value})
    with pytest.raises(ValueError, match=f"^{name}"):
        pipeline("vikdf-dialogue", model=model, processor=processor, **{name: value})
    if name in REFUSED:
        assert pipe(CHAT, **{name: None}) == pipe(CHAT)


def test_every_argument_of_text_generation_is_known_or_refused_by_name(pipe):
    """None of them is unknown, whatever the installed transformers adds."""
    theirs = inspect.signature(TextGenerationPipeline._sanitize_parameters).parameters
    for name in set(theirs) - {"self", "generate_kwargs"}:
        if name not in REFUSED:
            pipe._sanitize_parameters(**{name: True})


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_new_tokns", "max_new_tokens"), ("return_fulltext", "return_full_text"), ("use_knowlege", "use_knowledge")],
)
def test_a_misspelled_setting_names_the_nearest(parts, pipe, name, near):
    model, processor = parts
    for call in (
        lambda: pipe(CHAT, **{name: 3}),
        lambda: pipe(CHAT, generate_kwargs={name: 3}),
        lambda: list(pipe.stream(CHAT, **{name: 3})),
        lambda: pipeline("vikdf-dialogue", model=model, processor=processor, **{name: 3}),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{near}"):
            call()


def test_a_setting_given_twice_is_refused(pipe):
    with pytest.raises(ValueError, match="max_new_tokens.*twice"):
        pipe(CHAT, max_new_tokens=3, generate_kwargs={"max_new_tokens": 4})
    with pytest.raises(ValueError, match="stop_sequence.*stop_strings"):
        pipe(CHAT, stop_sequence="a", stop_strings="b")


@pytest.mark.parametrize("way", ["stop_sequence", "stop_strings", "generation_config", "list"])
def test_a_reply_ends_with_a_stop_sequence(pipe, way):
    reply = pipe(CHAT, return_full_text=False, min_new_tokens=8)[0]["generated_text"]
    stop = re.search("[a-z]{2}", reply)[0]
    settings = {
        "stop_sequence": {"stop_sequence": stop},
        "stop_strings": {"stop_strings": stop},
        "list": {"stop_sequence": ["never written", stop]},
        "generation_config": {"generation_config": GenerationConfig(stop_strings=stop, **GREEDY)},
    }[way]
    ended = pipe(CHAT, return_full_text=False, **settings)[0]["generated_text"]
    assert reply.startswith(ended) and stop in ended and len(ended) < len(reply)


def test_special_tokens_are_shown_if_asked_for(pipe):
    eos = pipe.processor.tokenizer.convert_ids_to_tokens(pipe.model.generation_config.eos_token_id)
    forced = {"forced_eos_token_id": 2, "return_full_text": False}
    assert pipe(CHAT, skip_special_tokens=False, **forced)[0]["generated_text"].endswith(eos)
    assert not pipe(CHAT, **forced)[0]["generated_text"].endswith(eos)


def test_cleaning_up_spaces_reaches_the_tokenizer(pipe):
    tokenizer = type(pipe.processor.tokenizer)
    with patch.object(tokenizer, "decode", autospec=True, side_effect=tokenizer.decode) as decode:
        pipe(CHAT, clean_up_tokenization_spaces=True)
    assert decode.call_args.kwargs["clean_up_tokenization_spaces"] is True


def test_the_whole_chat_of_a_string_if_asked_for(pipe):
    assert pipe(CHAT[0]["content"], return_full_text=True) == pipe(CHAT)


def test_only_one_chat_is_streamed(pipe):
    with pytest.raises(ValueError, match="one chat"):
        list(pipe.stream([CHAT, LONGER]))
    with pytest.raises(ValueError, match="one chat"):
        list(pipe.stream(chat for chat in [CHAT]))


# ---- the text-generation pipeline ----


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["folder", "model"])
def test_text_generation_says_once_that_it_ignores_the_knowledge(saved, pipe, way, caplog):
    logging.Logger.warning_once.cache_clear()
    if way == "folder":
        plain = pipeline("text-generation", model=str(saved))
    else:
        plain = pipeline("text-generation", model=pipe.model, tokenizer=pipe.processor.tokenizer)
    for _ in range(2):
        plain([CHAT, LONGER], **GREEDY)
        plain("It is snowing", **GREEDY)
    [warning] = [each for each in caplog.messages if "knowledge" in each]
    assert "text-generation" in warning and 'pipeline("vikdf-dialogue"' in warning


def test_other_ways_to_load_and_to_do_without_knowledge_warn_of_nothing(saved, caplog):
    logging.Logger.warning_once.cache_clear()
    own = pipeline("vikdf-dialogue", model=str(saved))
    own(CHAT, use_knowledge=False)
    list(own.stream(CHAT, use_knowledge=False))
    VikdfForConditionalGeneration.from_pretrained(saved)
    AutoModelForCausalLM.from_pretrained(saved).generate(**own.processor(CHAT, use_knowledge=False))
    assert not [each for each in caplog.messages if "knowledge" in each]


# ---- saving ----


@pytest.mark.parametrize("include_backbones", [False, True])
def test_a_saved_pipeline_gives_the_same_replies(pipe, tmp_path, include_backbones):
    pipe.save_pretrained(tmp_path, include_backbones=include_backbones)
    loaded = pipeline("vikdf-dialogue", model=str(tmp_path))
    assert type(loaded) is VikdfDialoguePipeline
    assert loaded.processor.chat_template == pipe.processor.chat_template
    assert loaded.model.generation_config.max_new_tokens == 8
    # a backbone that is not saved comes back in its own dtype
    loaded.model.language_model.float()
    for chats in (CHAT, [CHAT, LONGER]):
        assert loaded(chats) == pipe(chats)
    assert loaded(CHAT, images=picture("red")) == pipe(CHAT, images=picture("red"))


def test_settings_reach_the_model_that_is_loaded(backbones, tmp_path):
    for part in build_from(backbones, "llama", "separate"):
        part.save_pretrained(tmp_path)
    pipe = pipeline(
        "vikdf-dialogue",
        model=str(tmp_path),
        dtype=torch.float32,
        device_map={"": "cpu"},
        model_kwargs={"attn_implementation": "eager"},
    )
    assert pipe.model.language_model.dtype == torch.float32
    assert pipe.model.language_model.config._attn_implementation == "eager"
    assert pipe(CHAT, **GREEDY, temperature=None, top_p=None)


# ---- nothing happens at import ----

IMPORT = """
import socket, transformers.modeling_utils

def refuse(*args, **kwargs):
    raise AssertionError("at import")

socket.socket.connect = socket.getaddrinfo = refuse
transformers.PreTrainedModel.__init__ = transformers.PreTrainedModel.from_pretrained = refuse
import modeling_vikdf
assert "gguf" not in __import__("sys").modules
"""


def run_python(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, env={**keep, "PYTHONPATH": path, **env}, capture_output=True, text=True)


def test_import_builds_and_downloads_nothing(tmp_path):
    done = run_python(IMPORT, "-W", "error", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


# ---- the packaged default ----


def packaged(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(PACKAGED_BACKBONES[name].module) is not None


needs_packages = pytest.mark.skipif(
    not all(packaged(name) for name in PACKAGED_BACKBONES),
    reason="the packages with the default's backbones are absent",
)


@needs_packages
def test_the_default_speaks_english():
    pipe = pipeline("vikdf-dialogue")
    question = [{"role": "user", "content": "I spent the whole day at the beach with my dog."}]
    common = {"the", "a", "you", "i", "it", "is", "and", "to", "of", "that", "your", "in", "was", "with", "so", "for"}
    others = "I am baking a birthday cake for my sister.", "We saw a rainbow over the hills."
    greedy = {"do_sample": False, "no_repeat_ngram_size": 3, "return_full_text": False}
    for each in (question, *([{"role": "user", "content": text}] for text in others)):
        reply = pipe(each, **greedy)[0]["generated_text"]
        words = re.findall(r"[a-z']+", reply.lower())
        pieces = {piece for word in words for piece in word.split("'")}  # "I'm" says "I", too
        assert len(words) >= 4 and len(common & pieces) >= 2, reply
        assert all(character.isprintable() or character == "\n" for character in reply), reply
    # by default replies are sampled, and a seed repeats them
    set_seed(1)
    reply = pipe(question, return_full_text=False)[0]["generated_text"]
    set_seed(1)
    assert pipe(question, return_full_text=False)[0]["generated_text"] == reply
    set_seed(1)
    assert "".join(pipe.stream(question)).strip() == reply
    set_seed(2)
    assert pipe(question, return_full_text=False)[0]["generated_text"] != reply

    settings = {"max_new_tokens": 24, "do_sample": False, "no_repeat_ngram_size": 3}
    llm, tokenizer = pipe.model.language_model, pipe.processor.tokenizer
    system = [{"role": "system", "content": pipe.processor.system_prompt}]
    inputs = tokenizer.apply_chat_template(
        [*system, *question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = llm.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    alone = pipe(question, use_knowledge=False, return_full_text=False, **settings)
    assert alone == [{"generated_text": expected}]
