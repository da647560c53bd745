"""Throughput of running servers, one of them with an engine, say: greedy replies to many clients at once. Prints JSON.

The servers are measured in turns, because a machine's speed changes: the ratio says more than the figures.

Example run:
    vikdf serve --port 8000 &
    vikdf serve --port 8002 --engine-url http://127.0.0.1:8001 &
    python eval/speed/compare_servers.py --urls http://127.0.0.1:8000 http://127.0.0.1:8002
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import httpx


SUBJECTS = ("the beach", "a kitchen", "snow", "my dog", "a wedding", "the harbour", "tomatoes", "an old train")
SENTENCES = [f"{start} {subject}." for start in ("Tell me all about", "I dreamt of") for subject in SUBJECTS]


async def measure(url: str, clients: int, max_tokens: int) -> tuple[float, list[str]]:
    """Tokens a second while every client sends one request, and the replies."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

        async def ask(text: str) -> dict[str, Any]:
            body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
            response = await client.post("/v1/chat/completions", json=body | {"max_tokens": max_tokens})
            return response.raise_for_status().json()

        start = time.monotonic()
        answers = await asyncio.gather(*(ask(SENTENCES[index % len(SENTENCES)]) for index in range(clients)))
        seconds = time.monotonic() - start
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / seconds, [answer["choices"][0]["message"]["content"] for answer in answers]


async def compare(urls: list[str], clients: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of the rounds, ratios to the first server, and in how many replies the last round's servers agree."""
    speeds: dict[str, list[float]] = {url: [] for url in urls}
    for number in range(rounds + 1):
        replies = []
        for url in urls:
            speed, texts = await measure(url, clients, max_tokens)
            replies.append(texts)
            if number:  # the first warms up
                speeds[url].append(speed)
    first, *others = urls
    return {
        "clients": clients,
        "tokens_per_second": {url: statistics.median(speeds[url]) for url in urls},
        "ratio": {
            url: statistics.median(b / a for a, b in zip(speeds[first], speeds[url], strict=True)) for url in others
        },
        "equal_replies": sum(len(set(texts)) == 1 for texts in zip(*replies, strict=True)),
    }


def main() -> None:
    """Compares running servers."""
    parser = argparse.ArgumentParser(description="Compare the throughput of running servers.")
    parser.add_argument("--urls", nargs="+", required=True, help="the first is what the others are compared with")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="clients at a time (default: 1 16)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest reply in tokens (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each server (default: 5)")
    args = parser.parse_args()
    for clients in args.clients:
        print(json.dumps(asyncio.run(compare(args.urls, clients, args.max_tokens, args.rounds)), indent=2))


if __name__ == "__main__":
    main()
