"""The Space: what visitors see is the pipeline's and the index's, whatever they do and however many they are."""

import html
import json
import re
import runpy
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest
import torch
from conftest import build_from
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_picture_index import colours
from tiny_models import tiny_model
from transformers import GenerationConfig, pipeline

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.cards.render import render_space_readme
from modeling_vikdf.picture_index import Match, Note, PictureIndex, Thresholds


gr = pytest.importorskip("gradio", reason="the extra [demo] is not installed")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from spaces_demo import app  # noqa: E402


ROOT = Path(__file__).parents[1]
MEASURE = runpy.run_path(ROOT / "eval" / "speed" / "measure_space.py")
QUESTION, OTHER = "What is your dog doing?", "It is snowing outside."
PLAIN = False, 8, 0, 1  # the controls: compare, length, temperature, beams


def build_demo(backbones: Path, index: bool = True) -> app.Demo:
    """A tiny model whose every reply is as long as it may be, of plain words, which look everywhere the same."""
    model, processor = build_from(backbones, "llama", "separate", dtype=torch.float32)
    vocabulary = processor.tokenizer.get_vocab()
    never = [id_ for token, id_ in vocabulary.items() if not re.fullmatch("▁?[a-z]+", token)]
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, suppress_tokens=never, max_new_tokens=8)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
    return app.Demo(pipe, PictureIndex.build(model, processor, colours(9)) if index else None)


@pytest.fixture(scope="module")
def demo(backbones):
    return build_demo(backbones)


@contextmanager
def launched(demo: app.Demo):
    page = demo.page()
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    try:
        yield url
    finally:
        page.close()


@pytest.fixture(scope="module")
def url(demo):
    with launched(demo) as url:
        yield url


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def expected(demo: app.Demo, messages: str | list[dict], image=None, **settings) -> str:
    """What the pipeline says, as the page shows it."""
    messages = [user(messages)] if isinstance(messages, str) else messages
    settings = {"max_new_tokens": 8, **settings}
    return demo.pipe(messages, image, return_full_text=False, **settings)[0]["generated_text"].strip()


def text_of(message: dict) -> str:
    return MEASURE["read"](message["content"]).strip()


def last(steps) -> tuple:
    """What is left on the page in the end: the dialogue, and the one without knowledge."""
    *_, (_, chat, bare) = steps
    return chat, bare


# ---- dialogues as the page holds them ----


def test_dialogues_without_what_is_shown_beside_them():
    thought = {**assistant("<div>"), "metadata": {"title": app.PICTURED}}
    chat = [
        {"role": "user", "content": [{"type": "file", "file": {"path": "/a.png"}}, {"type": "text", "text": "Look!"}]},
        thought,
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}], "metadata": {"title": None}},
        user("And now?"),
    ]
    messages, picture = app.to_messages(chat)
    assert messages == [user("Look!"), assistant("A dog."), user("And now?")]
    assert picture == "/a.png"  # still the last that was shown
    assert app.to_messages([thought, user("Hi.")]) == ([user("Hi.")], None)


def test_dialogues_are_cut_at_a_turn():
    chat = [user("1"), assistant("a"), assistant("b"), user("2"), assistant("c"), user("3")]
    assert app.count_turns(chat) == 3 and app.count_turns([]) == 0
    assert app.until(chat, 2) == chat[:4]
    assert app.until(chat, 9) == chat and app.until([], 1) == []


# ---- what was pictured ----


@given(
    st.lists(
        st.one_of(
            st.text(alphabet="abz.,!? \n'é雪🐶", min_size=1, max_size=60).filter(str.strip),
            st.sampled_from(["[SEP] a[PAD]", "<|im_end|>\n<|im_start|>system"]),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60)
def test_every_token_counts_for_its_word(demo, texts):
    """Together the words have what the special tokens leave; whatever does not fit the text encoder is left out."""
    processor = demo.pipe.processor
    texts = texts[: len(texts) - (len(texts) + 1) % 2]  # the user's first and last
    chat = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    processor.max_context_length = 24
    try:
        inputs = processor(chat)
        ids = inputs["context_input_ids"][0].tolist()
        words = app.attended_words(processor, chat, inputs, [1.0] * len(ids))
    finally:
        processor.max_context_length = None
    special = sum(id_ in processor.context_tokenizer.all_special_ids for id_ in ids)
    unknown = ids.count(processor.context_tokenizer.unk_token_id)
    assert len(ids) - special <= sum(weight for _, weight in words) <= len(ids) - special + unknown
    kept = " ".join(texts[inputs.dropped_context_turns[0] :]).split()
    assert [word for word, _ in words] == kept[len(kept) - len(words) :]


def test_words_shine_by_their_share():
    shown = app.render_words([("snow", 0.5), ("<b>", 0.1), ("fell", 0.3)])
    assert "&lt;b&gt;" in shown and "<b>" not in shown
    strengths = [float(strength) for strength in re.findall(r"11, ([\d.]+)\)", shown)]
    assert strengths == pytest.approx([0.65, 0, 0])  # 0.3 is an even share
    assert app.render_words([("a", 1.0), ("b", 1.0)]).count("0.00") == 2
    long = app.render_words([(str(number), 1.0) for number in range(99)])
    assert ">98<" in long and ">38<" not in long and "…" in long


def test_titles_cannot_run_anything():
    shown = app.render_pictures([Match('<script>"', b"x", 0.5)])
    assert "<script" not in shown and 'alt="&lt;script&gt;&quot;"' in shown and "0.50" in shown


def test_pictures_bear_their_licence():
    note = Note((), "CC BY-SA 2.0", 'https://a.example/"1"')
    shown = app.render_pictures([Match("a dog", b"x", 0.5, note)])
    assert 'href="https://creativecommons.org/licenses/by-sa/2.0/"' in shown and ">CC BY-SA 2.0<" in shown
    assert 'href="https://a.example/&quot;1&quot;"' in shown
    assert "href" not in app.render_license(Note((), "<b>", "javascript:alert(1)"))
    assert app.render_license(Note()) == ""


def test_nothing_is_shown_where_nothing_stands_out(demo):
    assert app.render_pictures([]) == app.render_captions([]) == ""
    assert "a &lt;b&gt; dog" in app.render_captions([("a <b> dog", 0.9)])
    demo.index.thresholds = Thresholds(2.0, 2.0)
    try:
        shown = demo.show_knowledge([user(QUESTION)], colours(9)[3][1])
    finally:
        demo.index.thresholds = None
    assert "<mark" in shown and "<img" not in shown and "Nearest" not in shown


# ---- what visitors do ----


def test_a_message_is_answered_word_by_word(demo, client):
    job = client.submit({"text": QUESTION, "files": []}, [], [], *PLAIN, api_name="/send")
    steps = [chat for _, chat, _ in job]
    asked, thought, said = steps[-1]
    assert text_of(asked) == QUESTION and text_of(said) == expected(demo, QUESTION)
    replies = [text_of(chat[-1]) for chat in steps]
    assert replies[0] == app.PENDING and len(set(replies)) > 3
    inputs = demo.pipe.processor([user(QUESTION)])
    nearest = demo.index.nearest(
        demo.pipe.model.get_text_embeddings(inputs["context_input_ids"], inputs["context_attention_mask"])
    )[0][: app.SHOWN_PICTURES]
    shown = re.findall(r'alt="([^"]+)".*?score">([-\d.]+)<', text_of(thought))
    assert shown == [(match.title, f"{match.score:.2f}") for match in nearest]
    assert re.findall(r"<mark[^>]*>([^<]+)<", text_of(thought)) == QUESTION.split()


def test_the_dialogue_goes_on(demo, client):
    _, chat, bare = client.predict({"text": QUESTION, "files": []}, [], [], *PLAIN, api_name="/send")
    _, chat, bare = client.predict({"text": OTHER, "files": []}, chat, bare, *PLAIN, api_name="/send")
    messages = [user(QUESTION), assistant(expected(demo, QUESTION)), user(OTHER)]
    assert text_of(chat[-1]) == expected(demo, messages) != expected(demo, OTHER)
    assert [message["role"] for message in chat] == ["user", "assistant", "assistant"] * 2 and bare == []


def test_side_by_side(demo):
    chat, bare = last(demo.send({"text": QUESTION, "files": []}, [], [], True, 8, 0, 1))
    assert text_of(chat[-1]) == expected(demo, QUESTION)
    assert text_of(bare[-1]) == expected(demo, QUESTION, use_knowledge=False) != text_of(chat[-1])
    assert [text_of(message) for message in bare[:-1]] == [QUESTION]
    # each side goes on with its own replies
    chat, bare = last(demo.send({"text": OTHER, "files": []}, chat, bare, True, 8, 0, 1))
    own = [user(QUESTION), assistant(expected(demo, QUESTION, use_knowledge=False)), user(OTHER)]
    assert text_of(bare[-1]) == expected(demo, own, use_knowledge=False)
    assert app.without_knowledge(chat)[:3] != own


def test_side_by_side_from_the_middle_of_a_dialogue(demo):
    """What was said so far is taken over, as text, and stays out where nobody asks for it any more."""
    chat, bare = last(demo.send({"text": QUESTION, "files": []}, [], [], *PLAIN))
    assert bare == []
    chat, bare = last(demo.send({"text": OTHER, "files": []}, chat, [], True, 8, 0, 1))
    dialogue = [user(QUESTION), assistant(expected(demo, QUESTION)), user(OTHER)]
    assert bare == [*dialogue, assistant(expected(demo, dialogue, use_knowledge=False))]
    assert last(demo.send({"text": QUESTION, "files": []}, chat, bare, *PLAIN))[1] == []


def test_beams(demo):
    steps = list(demo.send({"text": QUESTION, "files": []}, [], [], True, 8, 1.0, 2))
    assert text_of(steps[-1][1][-1]) == expected(demo, QUESTION, num_beams=2)
    assert text_of(steps[-1][2][-1]) == expected(demo, QUESTION, num_beams=2, use_knowledge=False)


def test_candidates(demo):
    """The best of some, and beside it one sample of the language model alone."""
    torch.manual_seed(0)
    steps = list(demo.send({"text": QUESTION, "files": []}, [], [], False, 8, 1.0, 1, 3))
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "num_candidates": 3}
    assert text_of(steps[-1][1][-1]) == expected(demo, QUESTION, **how)
    with patch.object(demo.pipe.model, "generate", wraps=demo.pipe.model.generate) as generate:
        list(demo.send({"text": QUESTION, "files": []}, [], [], True, 8, 1.0, 1, 3))
    asked = [(call.kwargs["num_candidates"], "context_input_ids" in call.kwargs) for call in generate.call_args_list]
    assert (3, True) in asked and (1, False) in asked and (3, False) not in asked


def test_a_retry_says_something_else_and_forgets_what_followed(demo):
    chat, bare = last(demo.send({"text": QUESTION, "files": []}, [], [], True, 8, 0, 1))
    first = text_of(chat[-1])
    chat, bare = last(demo.send({"text": OTHER, "files": []}, chat, bare, True, 8, 0, 1))
    torch.manual_seed(0)
    again, bare_again = last(
        demo.retry(gr.RetryData(None, {"index": 0, "value": QUESTION}), chat, bare, True, 8, 0, 1)
    )
    assert len(again) == 3 and len(bare_again) == 2
    assert text_of(again[0]) == QUESTION and text_of(again[-1]) != first


def test_an_edited_message_is_answered_anew(demo):
    chat, bare = last(demo.send({"text": QUESTION, "files": []}, [], [], True, 8, 0, 1))
    event = gr.EditData(target=None, data={"index": 0, "previous_value": QUESTION, "value": OTHER})
    chat, bare = last(demo.edit(event, chat, bare, True, 8, 0, 1))
    assert [text_of(message) for message in (chat[0], chat[-1])] == [OTHER, expected(demo, OTHER)]
    assert [text_of(message) for message in bare] == [OTHER, expected(demo, OTHER, use_knowledge=False)]


def test_nothing_is_sent_for_nothing(demo):
    assert last(demo.send({"text": "  ", "files": []}, [user("a")], [], *PLAIN)) == ([user("a")], [])


def test_who_stops_or_leaves_ends_the_generation(demo):
    steps = demo.send({"text": QUESTION, "files": []}, [], [], True, 200, 0, 1)
    for _ in range(4):
        _, chat, bare = next(steps)
    before = threading.active_count()
    steps.close()
    assert threading.active_count() == before - 2  # one on each side
    # what was said so far is part of the dialogue
    chat, _ = last(demo.send({"text": OTHER, "files": []}, chat, bare, *PLAIN))
    assert text_of(chat[-1]) not in ("", app.PENDING)


def test_a_message_that_is_too_long_is_refused_with_the_reason(demo):
    with pytest.raises(gr.Error, match="Shorten"):
        list(demo.send({"text": "dog " * 600, "files": []}, [], [], *PLAIN))


@pytest.mark.parametrize("text", ["__init__", "# title", "a <b>dog</b> & 1 < 2", "    indented\n\n\n* one"])
def test_texts_go_to_the_page_as_typed(client, text):
    _, chat, _ = client.predict({"text": text, "files": []}, [], [], *PLAIN, api_name="/send")
    assert text_of(chat[0]) == text.strip()


def test_a_long_text_is_refused_before_any_work(demo, client):
    """Whoever calls the API is held to what the page takes, in a message and in the whole chat."""
    with pytest.raises(AppError, match="2,999,999 characters of at most 4,000"):
        client.predict({"text": "dog " * 750_000, "files": []}, [], [], *PLAIN, api_name="/send")
    with pytest.raises(AppError, match="start a new one"):
        chat = [app.user_message("dog " * 750_000)]
        client.predict({"text": "dog", "files": []}, chat, [], *PLAIN, api_name="/send")
    event = gr.EditData(target=None, data={"index": 0, "previous_value": "dog", "value": "d" * 4001})
    with pytest.raises(gr.Error, match="Shorten"):
        list(demo.edit(event, [user("dog")], [], *PLAIN))


def test_a_message_is_shown_before_the_model_is_free(demo):
    """The page accepts it in a step of its own, which waits for nobody."""
    _, chat, bare = demo.accept({"text": QUESTION, "files": []}, [], [])
    assert [text_of(message) for message in chat] == [QUESTION, app.PENDING] and bare == []
    assert last(demo.reply(chat, bare, *PLAIN)) == last(demo.send({"text": QUESTION, "files": []}, [], [], *PLAIN))
    steps = demo.page().get_config_file()["dependencies"]
    unqueued = [step for step in steps if step["targets"] and step["targets"][0][1] in ("submit", "example_select")]
    assert len(unqueued) == 2 and not any(each["queue"] for each in unqueued)


def test_only_sending_is_open_to_others(url):
    with httpx.Client(base_url=url) as web:
        assert web.get("/monitoring/summary").status_code in (403, 404)
        assert web.get("/gradio_api/monitoring/summary").status_code in (403, 404)
        for name in ("accept", "accept_example", "reply", "retry", "edit", "show_beside", "lambda"):
            event = web.post(f"/gradio_api/call/{name}", json={"data": []})
            assert event.status_code == 404, name
        assert set(web.get("/gradio_api/info").json()["named_endpoints"]) == {"/send"}


# ---- pictures ----


@pytest.fixture
def picture(tmp_path) -> Path:
    """The one in the index that is titled "picture 3"."""
    colours(9)[3][1].save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


def test_a_picture_becomes_knowledge(demo, client, picture):
    message = {"text": QUESTION, "files": [handle_file(picture)]}
    _, chat, _ = client.predict(message, [], [], *PLAIN, api_name="/send")
    said = expected(demo, QUESTION, Image.open(picture).convert("RGB"))
    assert text_of(chat[-1]) == said != expected(demo, QUESTION)
    thought = MEASURE["read"](chat[1]["content"])
    nearest_to_picture = thought.split("Nearest to your picture:")[1]
    assert re.search(r'alt="([^"]+)".*?score">([\d.]+)<', nearest_to_picture).groups() == ("picture 3", "1.00")


def test_a_picture_alone_stays_for_the_dialogue(demo, picture):
    chat, _ = last(demo.send({"text": "", "files": [str(picture)]}, [], [], *PLAIN))
    chat, _ = last(demo.send({"text": OTHER, "files": []}, chat, [], *PLAIN))
    image = Image.open(picture).convert("RGB")
    first = [user("What do you see?")]
    first.append(assistant(expected(demo, first, image)))
    assert text_of(chat[-1]) == expected(demo, [*first, user(OTHER)], image)


def test_what_is_no_picture_is_refused(demo, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(gr.Error, match="cannot be read"):
        list(demo.send({"text": "Look!", "files": [str(tmp_path / "a.png")]}, [], [], *PLAIN))


def test_a_model_without_eyes_says_so(demo, picture, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    processor = demo.pipe.processor
    model = tiny_model("llama", vision_config=None, knowledge_token_id=processor.knowledge_token_id)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
    blind = app.Demo(pipe, None)
    assert "no vision encoder" in blind.no_pictures
    chat, _ = last(blind.send({"text": QUESTION, "files": [str(picture)]}, [], [], *PLAIN))
    assert len(warnings) == 1 and "no vision encoder" in warnings[0]
    assert not re.search("[/'\"]", warnings[0])  # plain words: no model's name, no folder
    assert app.to_messages(chat)[1] is None and "<mark" in text_of(chat[1]) and "<img" not in text_of(chat[1])
    page = json.dumps(blind.page().get_config_file(), default=str)
    assert "This model takes no pictures" in page
    assert "This model takes no pictures" not in json.dumps(demo.page().get_config_file(), default=str)


# ---- many at once ----


def test_eight_visitors_at_once_get_their_own_replies(demo, url):
    texts = [f"{word} dog" for word in ("red", "blue", "green", "happy", "snow", "sea", "park", "pizza")]
    alone = [expected(demo, [user(text)]) for text in texts]
    assert len(set(alone)) > 4  # else it would not show that they are mixed up

    def visit(text: str) -> list[str]:
        client, chat = Client(url, verbose=False), []
        for turn in (text, QUESTION):
            _, chat, _ = client.predict({"text": turn, "files": []}, chat, [], *PLAIN, api_name="/send")
        return [text_of(message) for message in chat]

    with ThreadPoolExecutor(8) as pool:
        chats = list(pool.map(visit, texts))
    for text, reply, chat in zip(texts, alone, chats, strict=True):
        assert (chat[0], chat[2], chat[3]) == (text, reply, QUESTION)
        assert re.findall(r"<mark[^>]*>([^<]+)<", chat[1]) == text.split()
        assert chat[5] == expected(demo, [user(text), assistant(reply), user(QUESTION)])


# ---- starting ----


def test_pictures_of_another_model_are_not_shown(demo, tmp_path, monkeypatch, capsys):
    for part in (demo.pipe.model, demo.pipe.processor):
        part.save_pretrained(tmp_path / "model")
    demo.index.save(tmp_path / "pictures")
    monkeypatch.setattr(app, "PICTURES", tmp_path / "pictures")
    assert len(app.load(str(tmp_path / "model")).index) == 9
    assert capsys.readouterr().out == ""
    stale = PictureIndex.load(tmp_path / "pictures")
    stale.fingerprint = "0" * 16
    stale.save(tmp_path / "pictures")
    assert app.load(str(tmp_path / "model")).index is None
    assert "vikdf index" in capsys.readouterr().out


def test_on_zero_gpu_the_model_runs_where_the_gpu_is(backbones, monkeypatch):
    lent = []

    def gpu(function):
        def wrapper(*args):
            lent.append(function.__name__)
            yield from function(*args)

        return wrapper

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    on_spaces = runpy.run_path(ROOT / "spaces_demo" / "app.py")
    plain = build_demo(backbones, index=False)
    demo = on_spaces["Demo"](plain.pipe, None)
    chat, _ = last(demo.send({"text": QUESTION, "files": []}, [], [], *PLAIN))
    assert lent == ["_answer"] and text_of(chat[-1]) == expected(plain, QUESTION)


def test_the_readme_is_rendered():
    readme = (ROOT / "spaces_demo" / "README.md").read_text(encoding="utf-8")
    assert readme == render_space_readme(DEFAULT_CHECKPOINT)  # else: python hub_cards/render.py space
    assert not re.search(r"&\w+;", html.unescape(readme))


def test_the_measurement(capsys):
    """With the packaged checkpoint, in a process of its own, as `python spaces_demo/app.py` starts it."""
    begin = time.perf_counter()
    figures = MEASURE["main"](["--messages", "3"])
    assert json.loads(capsys.readouterr().out) == figures
    assert figures["answered"] == figures["answered_as_alone"] == 8
    assert 0 < figures["first_words_seconds"]["p50"] < figures["whole_reply_seconds"]["p50"]
    assert figures["whole_reply_seconds"]["p95"] < time.perf_counter() - begin
    assert 300 < figures["peak_memory_mb"] < 2000
