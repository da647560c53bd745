"""Chats for base LLMs: turns end with the LLM's own line break, which no message can contain."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import base_tokenizer, bert_tokenizer, qwen_tokenizer
from transformers import AutoTokenizer

from modeling_vikdf import VikdfProcessor
from modeling_vikdf.base_chat import LINE_BREAK, TWO_SPEAKERS, chat_tokenizer, ends_of_turns


# what could be mistaken for a turn or its end
PIECES = ["\n", "\n\n", "\r\n", LINE_BREAK, "Bob:", "Ann: ", " ", "<s>", "</s>", "<0x0A>", "a dog", "é", "\u2028"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=6).map("".join)


@cache
def processor() -> VikdfProcessor:
    tokenizer = chat_tokenizer(base_tokenizer(), TWO_SPEAKERS)
    return VikdfProcessor.from_backbones(tokenizer, bert_tokenizer(), vocab_size=512, num_knowledge_tokens=4)


def test_the_prompt_of_a_chat():
    chat = [("system", "Be brief."), ("user", "It rained."), ("assistant", "Oh no!"), ("user", "Why?")]
    chat = [{"role": role, "content": content} for role, content in chat]
    prompt = processor().apply_chat_template(chat, add_generation_prompt=True, use_knowledge=False)
    lines = ["<s>Be brief.", "Ann: It rained.", "Bob: Oh no!", "Ann: Why?", "Bob:"]
    assert prompt.split(LINE_BREAK) == lines
    own = base_tokenizer()  # the LLM reads a dialogue as it has read others
    ids = processor()(chat, use_knowledge=False)["input_ids"][0].tolist()
    assert ids == own("\n".join(lines), add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(exclude_characters="\n")))
def test_ordinary_text_keeps_its_tokens(text):
    own, ours = base_tokenizer(), processor().tokenizer
    ids = own(text)["input_ids"]
    assert ours(text, split_special_tokens=True)["input_ids"] == own(text, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == own.decode(ids, skip_special_tokens=True)


@given(st.lists(TEXTS.filter(str.strip), min_size=2, max_size=6), st.booleans())
def test_only_turns_end_turns(contents, with_system):
    roles = ["system"] * with_system + ["user", "assistant"] * 3
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    if chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": "Yes."})
    if not any(turn["role"] == "user" for turn in chat):
        chat.insert(-1, {"role": "user", "content": "No?"})
    inputs, tokenizer = processor()(chat, return_labels=True), processor().tokenizer
    ends = set(ends_of_turns(tokenizer))
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    assert sum(id_ in ends for id_ in ids) == len(chat)
    # what is learnt: each reply, as it was written, and that it ends
    replies, learnt = [turn["content"] for turn in chat if turn["role"] == "assistant"], [[]]
    for label in labels:
        if label in ends:
            learnt.append([])
        elif label >= 0:
            learnt[-1].append(label)
    assert learnt.pop() == []
    assert [tokenizer.decode(tokens)[1:] for tokens in learnt] == [_as_decoded(reply) for reply in replies]


def _as_decoded(text: str) -> str:
    own = base_tokenizer()
    return own.decode(own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def test_a_reply_ends_with_its_line_and_without_a_trace(tmp_path):
    processor().save_pretrained(tmp_path)
    loaded = VikdfProcessor.from_pretrained(tmp_path).tokenizer
    one, two = (base_tokenizer().convert_tokens_to_ids(text) for text in ("\n", "\n\n"))
    for tokenizer in (processor().tokenizer, loaded):
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == (LINE_BREAK, one)
        assert ends_of_turns(tokenizer) == [one, two]
        reply = tokenizer(" a dog")["input_ids"]
        assert tokenizer.decode([*reply, one], skip_special_tokens=True).strip() == "a dog"
        assert tokenizer.decode([*reply, two], skip_special_tokens=True).strip() == "a dog"


def test_the_tokenizer_is_not_changed(tmp_path):
    own = base_tokenizer()
    before = own.backend_tokenizer.to_str()
    chat_tokenizer(own, TWO_SPEAKERS).save_pretrained(tmp_path)
    assert own.backend_tokenizer.to_str() == before and own.chat_template is None
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TWO_SPEAKERS


def test_a_tokenizer_that_cannot_spell_a_line_break_is_refused():
    with pytest.raises(ValueError, match="cannot spell one in bytes"):
        chat_tokenizer(qwen_tokenizer(), TWO_SPEAKERS)
