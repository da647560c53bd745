"""The Space in a real browser: Debian's chromium, driven by Playwright. Screenshots are left in outputs/browser/.

`make test-browser` installs chromium where it can; without it, or without Playwright, these tests are skipped.
"""

import contextlib
import io
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image


pytest.importorskip("gradio", reason="the extra [demo] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed (apt-get install chromium)", allow_module_level=True)

from test_picture_index import colours  # noqa: E402
from test_space import MEASURE, OTHER, QUESTION, build_demo, expected, launched, user  # noqa: E402

from spaces_demo import app  # noqa: E402


ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "outputs" / "browser"
FLAGS = [  # without them it looks for hosts of its maker's at every start
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KITES = "We flew kites in the park on Sunday."


@pytest.fixture(scope="module")
def browser():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(backbones):
    """A tiny model that takes its time, so that there is something to stop; it writes while `go` is set."""
    demo = build_demo(backbones)
    stream = demo.pipe.stream
    demo.go = threading.Event()
    demo.go.set()
    demo.pipe.model.generation_config.max_new_tokens = 64

    def wait(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        demo.go.wait()
        time.sleep(0.03)  # a token
        return torch.zeros(len(input_ids), dtype=torch.bool)

    demo.pipe.stream = lambda *args, **kwargs: stream(*args, **kwargs, stopping_criteria=[wait])
    return demo


@pytest.fixture(scope="module")
def url(demo):
    with launched(demo) as url:
        yield url


@pytest.fixture(scope="module")
def real_url():
    """The packaged checkpoint, started as its README says."""
    process, client = MEASURE["start"](MEASURE["free_port"]())
    yield client.src
    process.terminate()
    process.wait()


class Visitor:
    """A page of its own, and what a person does there. What goes wrong in the page is noted in `errors`."""

    def __init__(self, browser, url: str, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
        self.page, self.errors = self.context.new_page(), []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(120_000)
        dark = context.get("color_scheme") == "dark"
        self.page.goto(url + ("?__theme=dark" if dark else ""))
        self.box = self.page.get_by_placeholder("Message")
        self.box.wait_for()

    def say(self, text: str) -> None:
        asked = self.page.get_by_test_id("user")
        before = asked.count()
        self.box.fill(text)
        self.box.press("Enter")
        asked.nth(before).wait_for()

    def said(self):
        """The model's replies, without what it pictured."""
        return self.page.get_by_test_id("bot").filter(has_not=self.page.locator(".pictured-words"))

    def replies(self) -> list[str]:
        return [text.strip() for text in self.said().all_inner_texts()]

    def wait(self) -> str:
        """Until the reply is whole: the last one."""
        self.said().last.filter(has_not_text=app.PENDING).wait_for()
        self.page.locator(".submit-button").wait_for()
        return self.replies()[-1]

    def ask(self, text: str) -> str:
        self.say(text)
        return self.wait()

    def shoot(self, name: str) -> None:
        self.page.wait_for_timeout(300)  # until it has scrolled to the end
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def compare(self) -> None:
        """Asks for the same model without knowledge beside, and waits for what was said so far to be there, too."""
        turns = self.page.get_by_test_id("user").count()
        self.page.get_by_label("Side by side").check()
        self.page.get_by_test_id("user").nth(2 * turns - 1).wait_for()

    def open_settings(self) -> None:
        self.page.get_by_role("button", name="Settings").click()

    def set_length(self, tokens: int) -> None:
        field = self.page.get_by_label("number input for Longest reply")
        slider = self.page.get_by_label("range slider for Longest reply")
        # settings that were just opened may still be filled in by the page, over what is typed: a person types again
        for _ in range(10):
            field.fill(str(tokens))
            field.press("Enter")
            with contextlib.suppress(AssertionError):  # the page has taken it when the slider beside it has moved
                return playwright.expect(slider).to_have_value(str(tokens), timeout=1000)
        raise AssertionError(f"The slider stays at {slider.input_value()}, not {tokens}.")


@pytest.fixture
def visit(browser):
    visitors = []

    def start(url: str, **context) -> Visitor:
        visitors.append(Visitor(browser, url, **context))
        return visitors[-1]

    yield start
    for visitor in visitors:
        visitor.context.close()
        assert visitor.errors == []


def generations() -> int:
    """How many replies are being generated in this process: a thread each."""
    return sum("(reply)" in thread.name for thread in threading.enumerate())


# ---- the packaged checkpoint ----


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("light", {}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_first_visit(visit, real_url, name, context):
    visitor = visit(real_url, **context)
    page = visitor.page
    assert page.get_by_role("button", name=re.compile("^Select example")).count() == len(app.EXAMPLES)
    visitor.shoot(f"{name}-empty")
    visitor.say(KITES)
    pictures = page.locator(".pictured-card img")
    pictures.last.wait_for()
    assert visitor.wait()
    assert page.locator(".pictured-words mark").all_inner_texts() == KITES.split()
    assert 1 <= pictures.count() <= app.SHOWN_PICTURES
    assert page.locator(".pictured-license a").count() == 2 * pictures.count()
    assert all(pictures.evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    scores = [float(score) for score in page.locator(".pictured-score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    # nothing is wider than the screen, and nobody has to scroll to write
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert visitor.box.bounding_box()["y"] < page.viewport_size["height"] - 20
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (name == "dark")
    visitor.shoot(name)
    visitor.compare()
    visitor.ask("We watched the fireworks over the city last night.")
    assert page.get_by_text("The same language model without knowledge").is_visible()
    visitor.shoot(f"{name}-side-by-side")


# ---- what visitors do, with a tiny model ----


def test_a_reply_grows_word_by_word(visit, url, demo):
    visitor = visit(url)
    visitor.say(QUESTION)
    seen = []
    while visitor.page.locator(".stop-button").is_visible():
        seen += [text for text in visitor.replies() if text not in seen]
        visitor.page.wait_for_timeout(50)
    assert len(seen) > 4  # the page shows the reply while it grows
    assert visitor.wait() == expected(demo, QUESTION, max_new_tokens=64)
    assert visitor.box.input_value() == ""


def test_an_example_is_sent_by_a_click(visit, url, demo):
    visitor = visit(url)
    visitor.page.get_by_role("button", name=app.EXAMPLES[1]).click()
    visitor.said().last.wait_for()
    assert visitor.wait() == expected(demo, app.EXAMPLES[1], max_new_tokens=64)


def test_a_picture_is_shown(visit, url, demo, tmp_path):
    visitor = visit(url)
    colours(9)[3][1].save(tmp_path / "mine.png")
    visitor.page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    visitor.page.locator("[aria-label='Remove Image'], .thumbnail-item").first.wait_for()
    reply = visitor.ask(QUESTION)
    image = Image.open(tmp_path / "mine.png").convert("RGB")
    assert reply == expected(demo, QUESTION, image, max_new_tokens=64)
    shown = visitor.page.locator(".chat img:not(.pictured-card img)")
    assert shown.count() == 1 and shown.evaluate("image => image.naturalWidth") == 300
    assert visitor.page.locator(".pictured-row").count() == 2
    nearest = visitor.page.locator(".pictured-row").last.locator(".pictured-card").first
    assert nearest.inner_text().split() == ["picture", "3", "1.00"]
    visitor.shoot("picture")


def test_stop(visit, url):
    visitor = visit(url)
    visitor.open_settings()
    visitor.set_length(200)
    visitor.say(QUESTION)
    visitor.page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length > 1")
    visitor.page.wait_for_timeout(1000)
    assert generations() == 1
    visitor.page.locator(".stop-button").click()
    stopped = visitor.wait()
    visitor.page.wait_for_timeout(1000)
    assert visitor.replies() == [stopped] and app.PENDING not in stopped
    assert generations() == 0  # the model stopped as well
    visitor.set_length(8)
    assert visitor.ask(OTHER) and len(visitor.replies()) == 2


def test_a_new_chat_forgets_and_ends_what_was_running(visit, url, demo):
    visitor = visit(url)
    for milliseconds in (0, 200, 1000, 2000):
        visitor.say(QUESTION)
        visitor.page.wait_for_timeout(milliseconds)
        with visitor.page.expect_navigation():
            visitor.page.get_by_role("button", name="New chat").click()
        visitor.box.wait_for()
        visitor.page.wait_for_timeout(500)
        assert visitor.replies() == [] and visitor.page.get_by_test_id("user").count() == 0
        assert generations() == 0
    assert visitor.ask(OTHER) == expected(demo, OTHER, max_new_tokens=64)


def test_two_visitors_at_once_keep_their_own_dialogues(visit, url, demo):
    visitors = {QUESTION: visit(url), OTHER: visit(url)}
    for text, visitor in visitors.items():
        visitor.say(text)
    for text, visitor in visitors.items():
        assert visitor.wait() == expected(demo, text, max_new_tokens=64)
    for visitor in visitors.values():
        visitor.say("Look at the sky.")
    for text, visitor in visitors.items():
        visitor.wait()
        first = {"role": "assistant", "content": expected(demo, text, max_new_tokens=64)}
        second = expected(demo, [user(text), first, user("Look at the sky.")], max_new_tokens=64)
        assert visitor.replies() == [first["content"], second]


def test_retry_and_edit(visit, url, demo):
    visitor = visit(url)
    first = visitor.ask(QUESTION)
    visitor.page.get_by_label("Retry").click()
    visitor.page.locator(".stop-button").wait_for()
    assert visitor.wait() != first and len(visitor.replies()) == 1
    visitor.page.get_by_label("Edit").click()
    visitor.page.locator(".edit-textarea").fill(OTHER)
    visitor.page.get_by_test_id("user").get_by_label("Submit").or_(
        visitor.page.get_by_role("button", name="Submit")
    ).first.click()
    visitor.page.locator(".stop-button").wait_for()
    assert visitor.wait() == expected(demo, OTHER, max_new_tokens=64)
    assert visitor.page.get_by_test_id("user").all_inner_texts() == [OTHER]


def test_side_by_side_from_the_middle_of_a_dialogue(visit, url, demo):
    visitor = visit(url)
    first = visitor.ask(QUESTION)
    visitor.compare()
    visitor.ask(OTHER)
    said = {"role": "assistant", "content": expected(demo, QUESTION, max_new_tokens=64)}
    dialogue = [user(QUESTION), said, user(OTHER)]
    known = expected(demo, dialogue, max_new_tokens=64)
    bare = expected(demo, dialogue, max_new_tokens=64, use_knowledge=False)
    assert visitor.replies() == [first, known, first, bare]
    visitor.page.get_by_label("Side by side").uncheck()
    visitor.page.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 2")


def test_the_settings_are_folded_away_and_hold(visit, url, demo):
    visitor = visit(url)
    assert not visitor.page.get_by_text("Longest reply").is_visible()
    visitor.open_settings()
    visitor.set_length(8)
    assert visitor.ask(QUESTION) == expected(demo, QUESTION, max_new_tokens=8)


TYPED = [
    "__init__ *x* `y`",
    "# title",
    "<b>bold</b> & 1 < 2",
    "![a](http://evil.example/a.png) [b](http://evil.example/b)",
    '<img src="http://evil.example/c.png"><video src="http://evil.example/d.mp4" autoplay></video>',
    '<audio src="http://evil.example/e.mp3" autoplay></audio><link rel="stylesheet" href="http://evil.example/f.css">',
    "<style>@import 'http://evil.example/g.css'; p { background: url(http://evil.example/h.png) }</style>",
]


def test_texts_are_shown_as_typed_and_fetch_nothing(visit, url, demo, monkeypatch):
    """In a message, and in a reply."""
    visitor = visit(url)
    called = []
    visitor.page.on("request", lambda request: called.append(request.url))
    for text in TYPED:
        monkeypatch.setattr(demo.pipe, "stream", lambda *args, text=text, **kwargs: (piece for piece in [text]))
        shown = visitor.ask(text), visitor.page.get_by_test_id("user").last.inner_text().strip()
        assert [each.replace("\N{WORD JOINER}", "") for each in shown] == [text, text]  # which nobody sees
    visitor.page.wait_for_timeout(500)
    assert not [each for each in called if not each.startswith((url, "data:", "blob:"))]


def test_a_message_appears_at_once_and_both_sides_follow(visit, url, demo):
    """Also while others keep the model busy."""
    demo.go.clear()  # they keep it busy for as long as it takes
    try:
        others = [visit(url) for _ in range(5)]
        for other in others:
            other.say(QUESTION)
        visitor = visit(url)
        visitor.say(OTHER)
        visitor.said().wait_for()
        assert visitor.replies() == [app.PENDING]
    finally:
        demo.go.set()
    visitor.wait()
    visitor.compare()
    for text in (QUESTION, OTHER, QUESTION):
        visitor.ask(text)
    visitor.page.wait_for_timeout(500)
    rest = "logs => logs.map(log => [log.scrollHeight - log.clientHeight, log.scrollTop])"
    for most, top in visitor.page.locator(".chat [role=log]").evaluate_all(rest):
        assert most > 100 and top > most - 5
    visitor.shoot("both-follow")


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_highlight(visit, url, scheme):
    """As painted: a word's darkest and lightest pixels."""
    visitor = visit(url, color_scheme=scheme, device_scale_factor=4)
    visitor.ask(QUESTION)
    strongest = visitor.page.locator(".pictured-words mark[style*='0.65']").first
    image = Image.open(io.BytesIO(strongest.screenshot())).convert("RGB")
    background = image.getpixel((1, image.height // 2))
    text = re.findall(r"\d+", strongest.evaluate("mark => getComputedStyle(mark).color"))[:3]
    low, high = sorted((luminance(str(background)), luminance(str(text))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_nothing_keeps_out_who_uses_a_screen_reader(visit, url):
    """No serious or critical finding of axe; without it, at least a name for every button."""
    visitor = visit(url)
    visitor.open_settings()
    visitor.ask(QUESTION)
    visitor.compare()
    controls = (f"{each}:visible:not([inert] *)" for each in ("button", "[role=button]", "textarea", "input"))
    buttons = visitor.page.locator(", ".join(controls))
    names = buttons.evaluate_all(
        """all => all.filter(each => !(each.ariaLabel || each.innerText?.trim() || each.title || each.labels?.length))
                 .map(each => each.outerHTML.slice(0, 200))"""
    )
    assert names == []
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(visitor.page).response["violations"]
    assert [
        (each["id"], node["html"][:200])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ] == []


def test_what_visitors_write_is_not_run(visit, url):
    visitor = visit(url)
    visitor.ask('a dog <img src="x" onerror="window.ran = 1"> <script>window.ran = 1</script>')
    assert visitor.page.evaluate("window.ran") is None
    assert "<script>window.ran" in visitor.page.locator(".pictured-words").inner_text()
