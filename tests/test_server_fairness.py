"""`vikdf serve`: what one client sends, however much of it, does not stop the others."""

# ruff: noqa: F811 (fixtures that are imported)

import gc
import json
import select
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest


pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from test_server import (  # noqa: E402, F401
    CHAT,
    LOAD_SERVER,
    LONG,
    QUESTION,
    answer,
    body,
    client,
    data_url,
    from_client,
    held,
    let_pass,
    listening,
    parts,
    picture,
    pipe,
    raw,
    refused,
    requests_in,
    small_pieces,
    wait_until,
    watched_passes,
    with_picture,
)

from modeling_vikdf.processing_vikdf import read_picture  # noqa: E402
from modeling_vikdf.server import app, connections, limits, schema  # noqa: E402
from modeling_vikdf.server.jobs import Job  # noqa: E402
from modeling_vikdf.server.worker import Worker  # noqa: E402


# ---- how fast a client may go on ----


def test_a_pace():
    now = [0.0]
    pace = limits.Pace(rate=10, burst=20, clock=lambda: now[0])
    assert [pace.take("a", amount) for amount in (15, 5, 1, 9)] == pytest.approx([0, 0, 0.1, 1.0])
    assert pace.take("b", 20) == 0
    now[0] = 2.5
    assert pace.take("a", 15) == 0  # 30 were taken, 25 are worked off
    assert pace.take("b", 1) == 0 and list(pace.due) == ["a", "b"]
    now[0] = 100.0
    assert pace.take("c", 0) == 0 and list(pace.due) == ["c"]  # nothing is kept of the others


class StoppedPace(limits.Pace):
    """A pace at which time stands still: who has to wait waits for ever."""

    waiting = []

    def __init__(self, rate: float, burst: float):
        super().__init__(rate, burst, clock=lambda: 0.0)

    def take(self, client, amount):
        if super().take(client, amount) == 0:
            return 0.0
        self.waiting.append(client)
        return 3600.0


@pytest.fixture
def stopped():
    StoppedPace.waiting.clear()
    with patch.object(app, "Pace", StoppedPace):
        yield StoppedPace.waiting


def ask(client, number: int, **settings):
    return client.post(CHAT, json=body(**settings), headers=from_client(number))


def test_a_client_that_is_too_fast_waits_and_no_other(parts, stopped):
    with ThreadPoolExecutor(1) as pool, listening(parts, max_client_requests=2) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(2 * app.REQUESTS_PER_SECOND):
                assert ask(client, 1, max_tokens=0).status_code == 400
            late = pool.submit(ask, client, 1)
            wait_until(lambda: stopped or late.done())
            for path in ("/health", "/metrics"):
                assert client.get(path, headers=from_client(1)).status_code == 200
            assert ask(client, 2).status_code == 200
            assert stopped == ["10.0.0.1"] and not late.done()


def test_large_bodies_come_in_at_a_pace(parts, stopped):
    large = [{"role": "user", "content": "a" * 250_000}]
    with patch.object(app, "MAX_BODY_BYTES", 300_000), ThreadPoolExecutor(1) as pool, listening(parts) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            refused(ask(client, 1, messages=large), 413, "250\\d+ characters")
            late = pool.submit(ask, client, 1, messages=large)
            wait_until(lambda: stopped or late.done())
            refused(ask(client, 2, messages=large), 413, "250\\d+ characters")
            assert ask(client, 1).status_code == 200  # a small one need not wait
            assert stopped == ["10.0.0.1"] and not late.done()


def test_a_refused_request_is_read_slowly_to_its_end(parts):
    head = b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    read, original = [], connections.GuardedProtocol.data_received

    def count(protocol, data):
        read.append(len(data))
        original(protocol, data)

    def send(connection, size: int) -> None:
        """Sends a request and as much of its body as the server takes."""
        unsent = memoryview(head % size + b"a" * size)
        while unsent and select.select([], [connection], [], 0.5)[1]:
            unsent = unsent[connection.send(unsent[: 2**20]) :]

    with patch.object(connections.GuardedProtocol, "data_received", count), listening(parts) as url:
        with patch.object(connections, "REFUSED_PAUSE", 3600), raw(url, b"") as connection:
            send(connection, 64 * 2**20)
            assert connection.recv(1000).startswith(b"HTTP/1.1 404")
            assert sum(read) < 2**20
        with patch.object(connections, "REFUSED_PAUSE", 0.001), raw(url, b"") as connection:
            found = b""
            for number in (1, 2):  # the second request behind the whole of the first one
                connection.sendall(head % 2**20 + b"a" * 2**20)
                while found.count(b"Not Found") < 2 * number:
                    found += connection.recv(1000)
            assert found.count(b"HTTP/1.1 404") == 2


# ---- whose turn it is ----


def test_one_clients_many_requests_do_not_stand_before_anothers_single_one(parts):
    spy = patch.object(type(parts[0]), "generate", autospec=True, side_effect=type(parts[0]).generate)
    with listening(parts) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(9) as pool:
        with held(parts[0]) as (go, steps), spy as generate:
            asked = [pool.submit(ask, client, 1)]
            wait_until(lambda: steps)
            for number, heat in ((1, 0.2), (1, 0.3), (1, 0.4), (2, 0.5), (2, 0.6)):  # so that none share a batch
                asked.append(pool.submit(ask, client, number, temperature=heat))
                wait_until(lambda: requests_in(client) == len(asked))
            go.set()
            assert all(each.result().status_code == 200 for each in asked)
        order = [call.kwargs["temperature"] for call in generate.call_args_list[1:]]
        assert order == [0.5, 0.2, 0.6, 0.3, 0.4]


def test_an_idle_server_owes_nothing(parts):
    """What a client has had before does not put it behind another one that comes later."""
    spy = patch.object(type(parts[0]), "generate", autospec=True, side_effect=type(parts[0]).generate)
    with listening(parts) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(9) as pool:
        assert [ask(client, 1).status_code for _ in range(3)] == [200] * 3
        wait_until(lambda: not requests_in(client))
        with held(parts[0]) as (go, steps), spy as generate:
            asked = [pool.submit(ask, client, 3)]
            wait_until(lambda: steps)
            for number, heat in ((1, 0.2), (2, 0.3)):  # so that none share a batch
                asked.append(pool.submit(ask, client, number, temperature=heat))
                wait_until(lambda: requests_in(client) == len(asked))
            go.set()
            assert all(each.result().status_code == 200 for each in asked)
        assert [call.kwargs["temperature"] for call in generate.call_args_list[1:]] == [0.2, 0.3]


@pytest.mark.parametrize("path", [CHAT, "/v1/knowledge"])
def test_many_short_requests_do_not_interrupt_anothers_single_one(parts, small_pieces, path):
    short = body() if path == "/v1/knowledge" else body(max_tokens=2)
    long, taken, take = [{**LONG[0], "content": LONG[0]["content"][:460]}], [], Worker._take

    def note(self, limit):
        batch = take(self, limit)
        taken.append((len(self._running), Worker._tokens(batch.jobs) if batch.jobs else 0))
        return batch

    with (
        patch.object(Worker, "_take", note),
        listening(parts) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        with watched_passes(parts[0]) as (passes, go):
            single = pool.submit(ask, client, 1, messages=long, max_tokens=4)
            go.release()
            wait_until(lambda: passes)
            many = [pool.submit(client.post, path, json=short, headers=from_client(2)) for _ in range(16)]
            wait_until(lambda: requests_in(client) == 17)
            let_pass(passes, go, single)
            assert single.result().status_code == 200
            between = [tokens for depth, tokens in taken if depth == 2]
            assert 0 < sum(between) <= taken[0][1]  # at most as many tokens as the single one
            go.release(100_000)
            assert all(each.result().status_code == 200 for each in many)


def test_a_single_request_goes_between_the_passes_of_anothers_many(parts, small_pieces):
    with listening(parts) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(9) as pool:
        with watched_passes(parts[0]) as (passes, go):
            many = [pool.submit(ask, client, 1, max_tokens=40)]
            go.release()
            wait_until(lambda: passes)
            many += [pool.submit(ask, client, 1, max_tokens=40) for _ in range(4)]
            wait_until(lambda: requests_in(client) == 5)
            let_pass(passes, go, many[0])
            go.release()
            wait_until(lambda: passes[-1][0] == 4)  # rows
            asked = [pool.submit(ask, client, number, max_tokens=20) for number in (1, 2)]
            wait_until(lambda: requests_in(client) == 6)
            let_pass(passes, go, asked[1])
            assert asked[1].result().status_code == 200
            assert not asked[0].done() and not any(each.done() for each in many[1:])
            go.release(100_000)
            assert all(each.result().status_code == 200 for each in [*many, *asked])


def test_large_requests_are_prepared_in_turn_and_in_a_thread_of_their_own(parts):
    go, reads, threads, original = threading.Semaphore(0), [], [set(), set()], type(parts[1]).__call__

    def wait(url, *how):
        assert go.acquire(timeout=60)
        reads.append(url)
        return read_picture(url, *how)

    def note(processor, chats, **how):
        threads[isinstance(chats[0][0]["content"], str)].add(threading.get_ident())
        return original(processor, chats, **how)

    urls = {colour: data_url(picture(colour)) for colour in ("red", "green", "blue", "black")}
    whose = {"red": 1, "green": 1, "blue": 1, "black": 2}
    watched = patch.object(schema, "read_picture", wait), patch.object(type(parts[1]), "__call__", note)
    with watched[0], watched[1], listening(parts) as url, ThreadPoolExecutor(9) as pool:
        with httpx.Client(base_url=url, timeout=60) as client, patch.object(app.Api, "_prepare", autospec=True) as api:
            arrived = []

            async def prepare(self, *args):
                arrived.append(args)
                return await original_prepare(self, *args)

            api.side_effect = prepare
            asked = []
            for colour, number in whose.items():
                asked.append(pool.submit(ask, client, number, messages=with_picture(urls[colour])))
                wait_until(lambda: len(arrived) == len(asked))
            assert answer(client)
            go.release(4)
            assert all(each.result().status_code == 200 for each in asked)
    assert reads == [urls[colour] for colour in ("red", "black", "green", "blue")]
    assert len(threads[False]) == 1 and not threads[False] & threads[True]


original_prepare = app.Api._prepare


# ---- what a request costs ----


def test_an_error_does_not_repeat_a_body(client):
    word = "a" * 1_000_000
    for wrong in (
        {"messages": [{"role": "user", "content": [{"type": word}]}]},
        {"messages": with_picture(f"data:image/png;base64,{word}!")},
        {"stop": [word]},
        {"model": word},
        {word: 1},
    ):
        response = client.post(CHAT, json=body() | wrong)
        assert 400 <= response.status_code < 500 and len(response.content) < 2000, response.text[:100]


def test_the_server_does_not_look_again_and_again_at_what_was_imported(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    frozen = []
    with patch.object(uvicorn, "run", side_effect=lambda *_, **__: frozen.append(gc.get_freeze_count())):
        try:
            app.serve(str(tmp_path))
        finally:
            gc.unfreeze()
    assert frozen[0] > 100_000  # objects


def test_the_beginnings_of_a_stop_sequence_are_found_at_once():
    job = Job(None, None, 10_000, ("\u00e9" * 256,) * 4, 0.0, None)
    job.emit = lambda update: None
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        for _ in range(100):
            job.append(0, False, lambda ids: "abcd" * len(ids))
    finally:
        sys.setprofile(None)
    assert len(calls) < 100 * 200  # of functions, and their ends, not 2 * 4 * 255 at each token


@pytest.mark.parametrize("stop", ["abab", "aab", "a", "b"])
def test_the_longest_beginning_of_a_stop_sequence_waits(stop):
    for text in ("", "a", "ab", "aba", "xaab", "xaa", "aaaa", "abaab", "bab", "xyz"):
        told = []
        job = Job(None, None, 100, (stop,), 0.0, None)
        job.emit = told.append
        job.append(0, False, lambda ids, text=text: text)
        begun = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
        expected = text[: text.find(stop)] if stop in text else text[: len(text) - begun]
        assert "".join(update.text for update in told) == expected


# ---- the script that attacks ----


@pytest.mark.parametrize("path", LOAD_SERVER["WRONG"], ids=str)
def test_whatever_the_load_script_calls_malformed_is(client, path):
    for wrong in LOAD_SERVER["WRONG"][path]:
        request = body(max_tokens=4)
        target = request = json.loads(json.dumps(request))
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = wrong
        content = json.dumps(request)
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, content[:300]
