"""Loads a running `vikdf serve`: many clients against one, then malformed requests. Prints JSON.

Example run:
    vikdf serve --model MODEL --port 8000 &
    python eval/speed/load_server.py --url http://127.0.0.1:8000 --requests 64 --malformed 10000
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import time
from collections import Counter
from random import Random
from typing import Any

import httpx


SENTENCES = (
    "It snowed all night.",
    "I spent the whole day at the beach with my dog, and now there is sand everywhere.",
    "What does your kitchen look like?",
    "My grandmother grows tomatoes, beans and sunflowers behind her house, and in summer we all help her.",
)
# Fields and wrong values for them, all of which the server must refuse.
WRONG: dict[tuple[str | int, ...], list[Any]] = {
    ("model",): [1, True, [], {}, "", "no-such-model"],
    ("messages",): [
        *("", "text", 1, True, {}, [], [1], [[]], [{}], ["text"]),
        [{"role": "system", "content": "a"}],
        [{"role": "user", "content": "a"}] * 2000,
    ],
    ("messages", 0, "role"): ["tool", "function", "System", "user " * 1000, "", 1, [], {}],
    ("messages", 0, "content"): [
        *("", " \n", 1, 1.5, True, {}, [], [1], ["a"], [{}]),
        *([{"type": kind}] for kind in ("text", "image_url", "audio", "", 1)),
        *([{"type": "text", "text": text}] for text in (1, None, [], "")),
        *([{"type": "image_url", "image_url": url}] for url in (1, "data:image/png;base64,AAAA", {}, {"url": 1})),
        *(
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
            for url in (
                *("http://127.0.0.1:9/a.png", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", ""),
                *("data:,", "data:image/png;base64,", "data:image/png;base64,!", "data:image/png;base64,AAAA"),
                "data:text/html;base64,AAAA",
            )
        ),
        "a" * 300_000,
    ],
    ("messages", 0, "name"): [1, [], {}],
    ("max_tokens",): [-1, 0, 1.5, "4", True, [], {}, 10**9, 10**400],
    ("max_completion_tokens",): [-1, 0, 1.5, "4", False, 10**9],
    ("temperature",): [-1, 2.1, "0", True, [], {}, float("nan"), float("inf"), 10**400],
    ("top_p",): [0, -1, 1.1, "1", [], float("nan")],
    ("stop",): [1, "", {}, [""], [1], ["a", None], ["a"] * 5],
    ("stream",): ["true", 1, 0, [], {}],
    ("stream_options",): [1, [], "a", {"a": 1}, {"include_usage": 1}],
    ("seed",): [1.5, "1", True, 2**64, []],
    ("n",): [0, 129, -1, 1.5, "2", True],
    ("num_beams",): [0, -1, 9, 1.5, "2", True],
    ("use_knowledge",): ["no", 0, []],
    ("user",): [1, [], {}],
    ("logprobs",): [1, "a"],
    ("frequency_penalty",): [1, -1, "0"],
    ("presence_penalty",): [0.5, [], True],
    **{
        (name,): [1, "a", True, {"a": 1}, [{}]]
        for name in (
            "tools",
            "tool_choice",
            "functions",
            "response_format",
            "logit_bias",
            "top_logprobs",
            "top_k",
            "x",
        )
    },
}


def malformed_body(random: Random, model: str) -> bytes:
    """A body for `/v1/chat/completions` with one or more mistakes in it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": random.choice(SENTENCES)}],
        "max_tokens": 4,
    }
    kind = random.choice(("noise", "cut", "bracket", "not an object", "missing", *["wrong"] * 5))
    if kind == "noise":
        return random.randbytes(random.randrange(200))
    if kind == "cut":
        text = json.dumps(body)
        return text[: random.randrange(len(text) - 1)].encode()
    if kind == "bracket":
        return random.choice((b"[", b'{"messages":', b'{"a":[')) * random.choice((1, 10, 1000, 100_000))
    if kind == "not an object":
        return json.dumps(random.choice((None, True, 1, 1.5, "a", [], [body], {}))).encode()
    if kind == "missing":
        where, key = random.choice(
            [(body, "model"), (body, "messages"), (body["messages"][0], "role"), (body["messages"][0], "content")]
        )
        del where[key]
        return json.dumps(body).encode()
    # the innermost first: what is around it may be replaced as well
    for path in sorted(random.sample(list(WRONG), random.randint(1, 3)), key=len, reverse=True):
        target: Any = body
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = random.choice(WRONG[path])
    return json.dumps(body).encode()


async def ask(client: httpx.AsyncClient, model: str, text: str, max_tokens: int) -> tuple[float, float, int]:
    """Streams one reply: seconds to its first text, seconds to its end, tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, tokens = time.monotonic(), None, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if first is None and chunk["choices"][0]["delta"].get("content"):
                    first = time.monotonic() - start
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    end = time.monotonic() - start
    return end if first is None else first, end, tokens


async def measure(client: httpx.AsyncClient, model: str, clients: int, requests: int, max_tokens: int) -> dict:
    """Throughput and waiting times while this many clients send one request after the other."""
    waiting = iter([SENTENCES[index % len(SENTENCES)] for index in range(requests)])

    async def one_client() -> list[tuple[float, float, int]]:
        return [await ask(client, model, text, max_tokens) for text in waiting]

    start = time.monotonic()
    answers = sum(await asyncio.gather(*(one_client() for _ in range(clients))), [])
    seconds = time.monotonic() - start
    firsts, ends, tokens = zip(*answers, strict=True)
    return {
        "clients": clients,
        "requests": len(answers),
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "time_to_first_text_p50": statistics.median(firsts),
        "time_to_first_text_p95": sorted(firsts)[int(0.95 * (len(firsts) - 1))],
        "seconds_p95": sorted(ends)[int(0.95 * (len(ends) - 1))],
    }


async def memory(client: httpx.AsyncClient) -> int | None:
    """Bytes that the server's process holds, where it knows."""
    page = (await client.get("/metrics")).text
    memory = re.search(r"^vikdf_resident_memory_bytes (\S+)$", page, re.MULTILINE)  # in float notation
    return int(float(memory[1])) if memory else None


async def send_malformed(
    client: httpx.AsyncClient, model: str, requests: int, seed: int
) -> tuple[dict[int, int], list[str]]:
    """How many malformed requests got each status (0: no answer), and those that did not get a 4xx."""
    random, statuses, wrong = Random(seed), Counter(), []
    for _ in range(requests):
        body = malformed_body(random, model)
        headers = {"Content-Type": "application/json"}
        try:
            status = (await client.post("/v1/chat/completions", content=body, headers=headers)).status_code
        except httpx.TransportError:
            status = 0
        statuses[status] += 1
        if not 400 <= status < 500:
            wrong.append(repr(body[:500]))
    return dict(sorted(statuses.items())), wrong


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one client, many clients and malformed requests, and the server's memory after each of the three."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=120, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        await measure(client, model, args.clients, args.clients, args.max_tokens)  # warms up
        report: dict[str, Any] = {"model": model, "memory": {"before": await memory(client)}}
        report["one"] = await measure(client, model, 1, args.requests, args.max_tokens)
        report["many"] = await measure(client, model, args.clients, args.requests, args.max_tokens)
        report["throughput_ratio"] = report["many"]["tokens_per_second"] / report["one"]["tokens_per_second"]
        report["memory"]["after_load"] = await memory(client)

        report["malformed"], wrong = await send_malformed(client, model, args.malformed, args.seed)
        if wrong:
            report["wrongly_answered"] = wrong
        report["memory"]["after_malformed"] = await memory(client)
        await ask(client, model, SENTENCES[0], args.max_tokens)  # it still answers
    return report


def main() -> None:
    """Measures a running server."""
    parser = argparse.ArgumentParser(description="Load a running `vikdf serve`.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("VIKDF_API_KEY"))
    parser.add_argument("--clients", type=int, default=16, help="clients at a time (default: 16)")
    parser.add_argument("--requests", type=int, default=64, help="requests in a measurement (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest reply in tokens (default: 32)")
    parser.add_argument("--malformed", type=int, default=10_000, help="malformed requests (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the malformed requests (default: 0)")
    print(json.dumps(asyncio.run(run(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
