"""A Space to chat with a frozen LLM with visual knowledge, and to see what that knowledge pictures.

    message -> Demo.accept: the visitor's bubble, at once
            -> Demo.reply -> Demo.respond -> Demo.answer: what was pictured, then the reply, word by word
                                             (optionally side by side with the same LLM without knowledge)

Example run:
    python spaces_demo/app.py                          # the packaged checkpoint, on this machine alone
    VIKDF_MODEL=outputs/my-model python spaces_demo/app.py

The page holds the whole dialogue and sends it with each message, so visitors share no state.
"""

import base64
import html
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from mimetypes import guess_type
from pathlib import Path
from typing import Any


try:
    import spaces  # on ZeroGPU, where it must be imported before torch
except ImportError:
    spaces = None
import gradio as gr
import torch
from fastapi import Depends, HTTPException, Request
from PIL import Image
from transformers import BatchFeature, GenerationConfig, pipeline

from modeling_vikdf import DEFAULT_CHECKPOINT, VikdfDialoguePipeline, VikdfProcessor
from modeling_vikdf.building import load_model
from modeling_vikdf.modeling_compilation import compiles_by_default
from modeling_vikdf.picture_index import Match, Note, PictureIndex
from modeling_vikdf.processing_vikdf import read_picture


PICTURES = Path(__file__).parent / "pictures"
PICTURED = "What the model pictured"
PENDING = "…"  # shown until the reply's first word
SHOWN_PICTURES, SHOWN_CAPTIONS, SHOWN_WORDS = 3, 3, 60
LONGEST_MESSAGE, LONGEST_CHAT = 4000, 200_000  # characters
NO_PICTURES = "This model takes no pictures, because it has no vision encoder here."
RETRY_TEMPERATURE = 0.7  # greedy decoding would repeat the same reply
BARE = {"use_knowledge": False, "num_candidates": 1}  # the language model alone
EXAMPLES = (
    "We flew kites in the park on Sunday.",
    "My dog loves to catch a frisbee in the yard.",
    "I watched the skiers come down the mountain.",
)

HEADER = """
# VIKDF
A small language model that never sees a picture reads, beside your message, vectors of **visual knowledge** that the
message evokes ([how](https://arxiv.org/abs/2405.10121)). Below each message: the words that this knowledge attends to,
and the pictures and captions that lie nearest to it, if any stand out.
"""
FOOTER = """
Replies come from a small language model and can be wrong, bland or unfit. The model has no such pictures in mind: of
{count} captioned photographs that it is asked about these lie nearest, by scores that are cosines of matching
embeddings; about one in four that are shown does not suit the message.
"""
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.chat .example { border: 1px solid var(--border-color-primary); }
.chat .message:not(.thought-group) > .message-content { white-space: pre-wrap; }
.chat .thought-group { border: 0; padding: 0; margin: 0; background: none; }
.chat .prose, .chat .message-content { opacity: 1 !important; }
.chat [aria-label="Clear"] { display: none; }
.gradio-container :is(.info-text, .min_value, .max_value) { color: var(--body-text-color); }
.pictured-words { line-height: 1.7; }
.pictured-words mark { color: inherit; border-radius: .25rem; padding: .05rem .1rem; }
.pictured-title { margin-top: .75rem; }
.pictured-row { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .5rem; }
.pictured-card { width: 96px; text-align: center; font-size: .7rem; line-height: 1.2; overflow-wrap: anywhere; }
.pictured-card img { width: 96px !important; height: 96px; object-fit: contain; background: white;
    border-radius: .5rem; margin: 0 0 .2rem !important; border: 1px solid var(--border-color-primary); }
.pictured-score, .pictured-license { display: block; }
.pictured-license a { text-decoration: underline; }
.pictured-captions { margin: .5rem 0 0; padding-left: 1.2rem; list-style: disc; font-size: .8rem; }
.dark .pictured-words mark:not([style*=" 0.00"]) { background-image: linear-gradient(#0007, #0007); }
"""


def only_send(request: Request) -> None:
    """Closes the page's own handlers, which Gradio only hides, to whoever calls them by name."""
    if request.path_params.get("api_name", "send") not in ("send", "predict"):  # the page calls "predict", by number
        raise HTTPException(404, "The API has one endpoint: /send.")


# Both dialogues follow their newest reply, from each message on until the visitor scrolls back. For screen readers the
# input box gets a name, and the arrow within the button "What the model pictured" is no second, nameless button.
FOLLOW = """
() => {
    const logs = () => document.querySelectorAll(".chat [role=log]");
    let following = true;
    const follow = () => following && logs().forEach((log) => { log.scrollTop = log.scrollHeight; });
    const name = () => {
        document.querySelectorAll("textarea").forEach((box) => { box.ariaLabel ||= box.placeholder; });
        document.querySelectorAll(".thought-group .arrow").forEach((arrow) => { arrow.inert = true; });
    };
    const back = (event) => { if (event.target.closest(".chat") && !(event.deltaY > 0)) following = false; };
    document.addEventListener("wheel", back, { passive: true });
    document.addEventListener("touchmove", back, { passive: true });
    window.followReplies = () => { following = true; follow(); };
    const changed = new MutationObserver(() => { follow(); name(); });
    changed.observe(document.body, { childList: true, subtree: true, characterData: true });
}
"""

FOLLOWED = "(...inputs) => { window.followReplies(); return inputs; }"

QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # of handlers that need no model

LAUNCH = {
    "css": CSS,
    "theme": gr.themes.Default(primary_hue="amber", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "footer_links": [],
    "max_file_size": "10mb",
    "app_kwargs": {"dependencies": [Depends(only_send)]},
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
}


class Demo:
    """
    The page and its event handlers.

    Args:
        pipe: answers chats; pictures are refused, with a note, if its model's vision encoder cannot be loaded.
        index: the pictures to compare knowledge with; `None` shows only the words.
    """

    def __init__(self, pipe: VikdfDialoguePipeline, index: PictureIndex | None):
        self.pipe, self.index = pipe, index
        self.no_pictures = ""  # the reason if the model takes none
        try:
            pipe.model.attach_vision_encoder()  # now, not when the first visitor waits for it
        except (OSError, ValueError) as error:
            print(f"Shown without uploads. {error}")  # for who runs the Space: a visitor can do nothing about it
            self.no_pictures = NO_PICTURES
        # on ZeroGPU only this function has the GPU, so it does everything that needs the model
        self.answer: Callable[..., Iterator[tuple[str, str, str]]] = self._answer
        if spaces is not None:
            self.answer = spaces.GPU(self._answer)

    def _answer(
        self, chat: list[dict], bare: list[dict], picture: Image.Image | None, settings: dict[str, Any]
    ) -> Iterator[tuple[str, str, str]]:
        """
        Yields (what was pictured, as HTML; the reply so far; the reply without knowledge so far).

        Args:
            chat: messages up to the one to reply to.
            bare: the same for the dialogue without knowledge; empty to skip it.
            picture: the last picture in the chat, or `None`.
            settings: arguments of `generate`.
        """
        pipe, texts = self.pipe, ["", ""]
        pictured = self.show_knowledge(chat, picture)
        yield pictured, *texts
        requests = [(chat, picture, {})] + ([(bare, None, BARE)] if bare else [])
        if settings["num_beams"] > 1:  # beam search cannot stream
            for side, (messages, image, how) in enumerate(requests):
                texts[side] = pipe(messages, image, return_full_text=False, **settings | how)[0]["generated_text"]
                yield pictured, *texts
            return
        with ExitStack() as stack:  # closes both streams if the visitor stops or leaves
            streams = [
                stack.enter_context(closing(pipe.stream(messages, image, **settings | how)))
                for messages, image, how in requests
            ]
            running = dict(enumerate(streams))
            while running:
                for side, stream in list(running.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del running[side]
                    else:
                        texts[side] += piece
                        yield pictured, *texts

    @torch.no_grad()
    def show_knowledge(self, chat: list[dict], picture: Image.Image | None) -> str:
        """The words of the context that the queries attended to, and the pictures nearest to the knowledge: HTML."""
        model, processor = self.pipe.model, self.pipe.processor
        inputs = processor(chat, images=picture).to(self.pipe.device)
        context = inputs["context_input_ids"], inputs["context_attention_mask"]
        attention = model.get_text_attention(*context)[0].mean(0)  # [T]: of all queries
        lines = [render_words(attended_words(processor, chat, inputs, attention.tolist()))]
        if self.index is not None:
            embeddings = model.get_text_embeddings(*context)  # [1, d]
            lines.append(render_pictures(self.index.nearest(embeddings, SHOWN_PICTURES)[0]))
            lines.append(render_captions(self.index.nearest_captions(embeddings, SHOWN_CAPTIONS)[0]))
            if picture is not None:
                embeddings = model.get_image_embeddings(inputs["pixel_values"])  # [1, d]
                if matches := self.index.nearest(embeddings, SHOWN_PICTURES)[0]:
                    lines += ['<div class="pictured-title">Nearest to your picture:</div>', render_pictures(matches)]
        return "".join(lines)

    # ---- visitors' actions ----

    def accept(self, message: dict, chat: list[dict], bare: list[dict]) -> tuple:
        """Takes a message from the input box: clears the box, and shows the message with its reply pending."""
        text, files = message["text"].strip(), message["files"]
        if files and self.no_pictures:
            gr.Warning(f"The picture was left out. {self.no_pictures}")
            files = []
        if not text and not files:
            raise gr.Error("Write something, or add a picture.", visible=False)
        check_length(text, chat)
        text = text or "What do you see?"
        chat = [*chat, user_message(text, files[-1:]), reply_message("")]
        bare = [*bare, user_message(text), reply_message("")] if bare else []
        return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True), chat, bare

    def accept_example(self, example: gr.SelectData, chat: list[dict], bare: list[dict]) -> tuple:
        """The same for one of the example messages of an empty page."""
        return self.accept({"text": example.value["text"], "files": []}, chat, bare)

    def reply(self, chat: list[dict], bare: list[dict], *controls: Any) -> Iterator[tuple]:
        """Replies to the message that was accepted."""
        yield from self.respond(chat[:-1], bare[:-1], *controls)

    def send(self, message: dict, chat: list[dict], bare: list[dict], *controls: Any) -> Iterator[tuple]:
        """Accepts a message and replies to it, in one request of an API client."""
        if not message["text"].strip() and (not message["files"] or self.no_pictures):
            yield gr.skip(), chat, bare
            return
        box, *dialogues = self.accept(message, chat, bare)
        steps = self.reply(*dialogues, *controls)
        _, *dialogues = next(steps)
        yield box, *dialogues
        yield from steps

    def retry(self, retried: gr.RetryData, chat: list[dict], bare: list[dict], *controls: Any) -> Iterator[tuple]:
        """Replies to a message again, and drops everything after it."""
        compare, length, temperature, _, *candidates = controls
        turn = count_turns(chat[: retried.index + 1])
        controls = compare, length, max(temperature, RETRY_TEMPERATURE), 1, *candidates
        yield from self.respond(until(chat, turn), until(bare, turn), *controls)

    def edit(self, edited: gr.EditData, chat: list[dict], bare: list[dict], *controls: Any) -> Iterator[tuple]:
        """Replies to an edited message, and drops everything after it."""
        turn = count_turns(chat[: edited.index + 1])
        chat, bare = until(chat, turn), until(bare, turn)
        text, (_, files) = edited.value, read_content(chat[-1]["content"])
        check_length(text, chat)
        bare = [*bare[:-1], user_message(text)] if bare else []
        yield from self.respond([*chat[:-1], user_message(text, files)], bare, *controls)

    def respond(
        self,
        chat: list[dict],
        bare: list[dict],
        compare: bool,
        length: int,
        temperature: float,
        beams: int,
        candidates: int = 1,
    ) -> Iterator[tuple]:
        """
        Replies to the last message.

        Yields updates of the input box, of the dialogue, with the reply so far, and of the dialogue without knowledge,
        which is empty unless `compare` is set.
        """
        check_length("", chat)
        messages, path = to_messages(chat)
        picture = None
        if path is not None:
            try:
                picture = read_picture(Path(path).read_bytes())
            except ValueError as error:
                reason = str(error).removeprefix("cannot read the picture: ")
                raise gr.Error(f"This picture cannot be read: {reason}") from error
        settings = {
            "max_new_tokens": int(length),
            "num_beams": int(beams),
            "do_sample": temperature > 0 and beams == 1,
        }
        if settings["do_sample"]:
            settings |= {"temperature": temperature, "num_candidates": int(candidates)}
            if not self.pipe.model.generation_config.do_sample:  # else the checkpoint knows what to leave out
                settings["top_p"] = 0.9
        if not compare:
            bare = []
        elif count_turns(bare) != count_turns(chat):  # side by side from here on
            bare = without_knowledge(chat)

        say = reply_message
        # a reply is present from the first update, so that roles alternate even if the visitor stops it at once
        yield gr.MultimodalTextbox(submit_btn=False, stop_btn=True), [*chat, say("")], [*bare, say("")] if bare else []
        try:
            for pictured, reply, bare_reply in self.answer(messages, to_messages(bare)[0], picture, settings):
                thought = {"role": "assistant", "content": pictured, "metadata": {"title": PICTURED}}
                yield gr.skip(), [*chat, thought, say(reply)], [*bare, say(bare_reply)] if bare else []
        except ValueError as error:  # for example a message that is too long
            raise gr.Error(str(error)) from error

    # ---- the page ----

    def page(self) -> gr.Blocks:
        """The page, to be launched."""
        with gr.Blocks(title="VIKDF", analytics_enabled=False) as page:
            page.load(None, js=FOLLOW, api_visibility="private")
            gr.Markdown(HEADER)
            chat, bare, beside = build_dialogues()
            box = self._message_box()
            with gr.Row(equal_height=True):
                compare = gr.Checkbox(label="Side by side with the same model without knowledge", min_width=280)
                new = gr.Button("New chat", size="sm", scale=0, min_width=120)
            settings = build_settings(self.pipe.model.generation_config)
            gr.Markdown(FOOTER.format(count=0 if self.index is None else len(self.index)))

            self._reply_to(box, chat, bare, [compare, *settings])
            # An event that clears the page could be followed by the last words of a reply that is being cancelled.
            new.click(None, js="() => window.location.reload()", api_visibility="private")
            compare.change(show_beside, [compare, chat], [*beside, bare], **QUICK).then(
                None, js="() => window.followReplies()", **QUICK
            )
        return page

    def _message_box(self) -> gr.MultimodalTextbox:
        """Where visitors write, with the reason below it if they cannot add pictures."""
        box = gr.MultimodalTextbox(
            placeholder="Message" if self.no_pictures else "Message or picture",
            sources=[] if self.no_pictures else ["upload"],
            file_types=["image"],
            show_label=False,
            label="Message",
            max_plain_text_length=LONGEST_MESSAGE,
        )
        if self.no_pictures:
            gr.Markdown(f"*{self.no_pictures}*")
        return box

    def _reply_to(self, box: gr.MultimodalTextbox, chat: gr.Chatbot, bare: gr.Chatbot, controls: list) -> None:
        """What visitors do with messages, and API clients, leads to replies, which the box's button stops."""
        state, busy = [chat, bare, *controls], {"concurrency_limit": 4, "concurrency_id": "model"}
        shown = [box, chat, bare]
        gr.Button(visible=False).click(self.send, [box, *state], shown, api_name="send", **busy)
        accepted = [
            box.submit(self.accept, shown, shown, **QUICK),
            chat.example_select(self.accept_example, [chat, bare], shown, **QUICK),
        ]
        sent, chosen = (
            event.success(self.reply, state, shown, api_visibility="private", js=FOLLOWED, **busy)
            for event in accepted
        )
        again = chat.retry(self.retry, state, shown, api_visibility="private", **busy)
        other = chat.edit(self.edit, state, shown, api_visibility="private", **busy)
        ready = {"fn": lambda: gr.MultimodalTextbox(submit_btn=True, stop_btn=False), "outputs": box}
        running = [sent, chosen, again, other]
        for event in running:
            event.then(**ready, **QUICK)
        box.stop(**ready, cancels=running, **QUICK)


# ---- parts of the page ----


def build_dialogues() -> tuple[gr.Chatbot, gr.Chatbot, tuple[gr.Markdown, gr.Column]]:
    """The dialogue, the one without knowledge, and what is shown only when both are: a title and the second column."""
    look = {
        "show_label": False,
        "buttons": [],
        "height": "min(60vh, 620px)",
        "elem_classes": "chat",
        "group_consecutive_messages": False,
        "latex_delimiters": [],
        "render_markdown": False,  # texts are shown as typed; their HTML is up to `inert`
    }
    with gr.Row():
        with gr.Column(min_width=320):
            title = gr.Markdown("**With knowledge**", visible=False)
            chat = gr.Chatbot(
                label="With knowledge",
                editable="user",
                placeholder="<h3>Say something, see what it pictures</h3>",
                examples=[{"text": text} for text in EXAMPLES],
                **look,
            )
        with gr.Column(min_width=320, visible=False) as column:
            gr.Markdown("**The same language model without knowledge**")
            bare = gr.Chatbot(label="Without knowledge", **look)
    return chat, bare, (title, column)


def build_settings(config: GenerationConfig) -> list[gr.Slider]:
    """Length, temperature, beams and candidates of replies, as the model's configuration has them."""
    with gr.Accordion("Settings", open=False), gr.Row():
        longest = config.max_new_tokens or 64
        length = gr.Slider(8, 200, longest, step=8, label="Longest reply", info="in tokens")
        temperature = gr.Slider(
            0,
            1.5,
            (config.temperature or 1.0) if config.do_sample else 0,
            step=0.1,
            label="Temperature",
            info="0 always takes the likeliest word; a retry never does",
        )
        beams = gr.Slider(1, 4, 1, step=1, label="Beams", info="more than one: no sampling, and no streaming")
        candidates = gr.Slider(
            1,
            16,
            getattr(config, "num_candidates", 1),
            step=1,
            label="Candidates",
            info="replies that are sampled, to give the best; one is streamed",
        )
    return [length, temperature, beams, candidates]


# ---- dialogues in the page's format ----


def user_message(text: str, files: Sequence[str] = ()) -> dict[str, Any]:
    """A visitor's message: its pictures, then its text."""
    pictures = [{"type": "file", "file": {"path": path, "mime_type": guess_type(path)[0]}} for path in files]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": inert(text)}]}


def reply_message(text: str) -> dict[str, Any]:
    """A reply so far."""
    return {"role": "assistant", "content": inert(text.strip()) or PENDING}


def inert(text: str) -> str:
    """
    A text that a page shows as it is: neither run, nor formatted, and nothing that it names is fetched.

    The page takes even plain texts for HTML. Behind an invisible character, "<" and "&" begin neither a tag nor an
    entity, and unlike "&lt;" look the same where a visitor edits the text. [`read_content`] takes it out again.
    """
    return re.sub("[<&](?!\N{WORD JOINER})", "\\g<0>\N{WORD JOINER}", text)


def check_length(text: str, chat: list[dict]) -> None:
    """Refuses what would keep others waiting, also from who does not use the page."""
    if len(text) > LONGEST_MESSAGE:
        raise gr.Error(f"Shorten the message: it has {len(text):,} characters of at most {LONGEST_MESSAGE:,}.")
    if sum(len(read_content(message["content"])[0]) for message in chat if not is_pictured(message)) > LONGEST_CHAT:
        raise gr.Error(f"This chat has more than {LONGEST_CHAT:,} characters: start a new one.")


def read_content(content: str | list[dict]) -> tuple[str, list[str]]:
    """Text and files of a message's content: a string, as API clients send it, or a list of parts, as pages do."""
    if isinstance(content, str):
        return content.replace("\N{WORD JOINER}", ""), []
    texts = [part["text"].replace("\N{WORD JOINER}", "") for part in content if part["type"] == "text"]
    return "\n".join(texts), [part["file"]["path"] for part in content if part["type"] == "file"]


def show_beside(compare: bool, chat: list[dict]) -> tuple[gr.Markdown, gr.Column, list[dict]]:
    """Shows or hides the dialogue without knowledge, with what was said so far."""
    dialogue = [message | {"content": inert(message["content"])} for message in without_knowledge(chat)]
    return gr.Markdown(visible=compare), gr.Column(visible=compare), dialogue if compare else []


def without_knowledge(chat: list[dict]) -> list[dict]:
    """The dialogue's text only."""
    messages = [message for message in chat if not is_pictured(message)]
    return [{"role": message["role"], "content": read_content(message["content"])[0]} for message in messages]


def is_pictured(message: dict) -> bool:
    """Whether a message is not part of the dialogue but shows what was pictured."""
    return (message.get("metadata") or {}).get("title") == PICTURED


def to_messages(chat: list[dict]) -> tuple[list[dict], str | None]:
    """The messages for the model, and the file of the last picture, or `None`."""
    files = [path for message in chat if not is_pictured(message) for path in read_content(message["content"])[1]]
    return without_knowledge(chat), files[-1] if files else None


def count_turns(chat: list[dict]) -> int:
    """Number of user messages."""
    return sum(message["role"] == "user" for message in chat)


def until(chat: list[dict], turn: int) -> list[dict]:
    """The dialogue up to its `turn`-th user message; the whole dialogue if it has fewer."""
    users = [index for index, message in enumerate(chat) if message["role"] == "user"]
    return chat[: users[turn - 1] + 1] if turn <= len(users) else list(chat)


# ---- what was pictured ----


def attended_words(
    processor: VikdfProcessor, chat: list[dict], inputs: BatchFeature, attention: list[float]
) -> list[tuple[str, float]]:
    """
    The words of the context, each with the sum of its tokens' attention.

    Args:
        processor: the model's processor.
        chat: the messages.
        inputs: the processor's output for the chat.
        attention: weight of each of the T context tokens.
    """
    turns = [message for message in chat if message["role"] != "system"][inputs.dropped_context_turns[0] :]
    spoken = [message for message in turns if message["role"] == "user" or message["content"].strip()]
    text = "\n".join(message["content"] for message in spoken)
    # The last tokens are those in `inputs`. The tokenizer does not truncate, because visitors share its settings.
    offsets = processor.context_text_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ids = inputs.context_input_ids[0].tolist()  # [T]
    framing = {*processor.context_tokenizer.all_special_ids} - {processor.context_tokenizer.unk_token_id}
    tokens = [
        (start, stop, weight)
        for (start, stop), token_id, weight in zip(offsets[-len(ids) :], ids, attention, strict=True)
        if token_id not in framing
    ]
    words = []
    for word in re.finditer(r"\S+", text):
        parts = [weight for start, stop, weight in tokens if start < word.end() and stop > word.start()]
        if parts:  # not a word beyond the text encoder's window
            words.append((word[0], sum(parts)))
    return words


def render_words(words: list[tuple[str, float]]) -> str:
    """HTML: the newest words, highlighted by their attention above the mean."""
    weights = [weight for _, weight in words]
    mean, largest = sum(weights) / len(weights), max(weights)
    marked = []
    for word, weight in words[-SHOWN_WORDS:]:
        strength = 0.65 * max(0.0, weight - mean) / (largest - mean) if largest > mean else 0
        escaped = html.escape(word)
        marked.append(f'<mark style="background: rgba(245, 158, 11, {strength:.2f})">{escaped}</mark>')
    cut = ["…"] if len(words) > SHOWN_WORDS else []
    return f'<div class="pictured-words">{" ".join(cut + marked)}</div>'


def render_pictures(matches: list[Match]) -> str:
    """HTML: a row of pictures with titles and scores."""
    cards = []
    for match in matches:
        licence = render_license(match.note)
        title, data = html.escape(match.title), base64.b64encode(match.thumbnail).decode()
        cards.append(
            f'<div class="pictured-card"><img src="data:image/webp;base64,{data}" alt="{title}">{title} '
            f'<span class="pictured-score">{match.score:.2f}</span>{licence}</div>'
        )
    return f'<div class="pictured-row">{"".join(cards)}</div>' if cards else ""


def render_license(note: Note) -> str:
    """HTML: a picture's licence and source, with links if those are web addresses."""
    parts = [(note.license, note.license_url), ("source" if note.source else "", note.source)]
    links = []
    for text, url in parts:
        text = html.escape(text)
        if url.startswith(("https://", "http://")):
            text = f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer">{text}</a>'
        links += [text] if text else []
    return f'<span class="pictured-license">{", ".join(links)}</span>' if links else ""


def render_captions(captions: list[tuple[str, float]]) -> str:
    """HTML: a list of captions with scores."""
    items = [f"<li>{html.escape(text)} <span>{score:.2f}</span></li>" for text, score in captions]
    return f'<ul class="pictured-captions" aria-label="Nearest captions">{"".join(items)}</ul>' if items else ""


# ---- starting ----


def load(source: str) -> Demo:
    """The demo of a checkpoint (folder or Hub id); without pictures if the index was embedded by another model."""
    model, processor = load_model(source)
    # not on ZeroGPU, where each reply has a new process, which would compile anew
    compile = spaces is None and compiles_by_default(model)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor, device=model.device, compile=compile)
    index = PictureIndex.load(PICTURES)
    try:
        index.check_model(model)
    except ValueError as error:
        print(f"Shown without pictures. {error}")
        index = None
    return Demo(pipe, index)


if __name__ == "__main__":
    load(os.environ.get("VIKDF_MODEL", str(DEFAULT_CHECKPOINT))).page().launch(**LAUNCH)
