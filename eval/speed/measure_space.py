"""Starts the Space as a process, and measures the time to the first words, memory and users at once. Prints JSON.

Example run:
    python eval/speed/measure_space.py
    VIKDF_MODEL=outputs/my-model python eval/speed/measure_space.py --messages 50
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradio_client import Client


APP = Path(__file__).parents[2] / "spaces_demo" / "app.py"
SENTENCES = (
    "It snowed all night.",
    "I spent the whole day at the beach with my dog, and now there is sand everywhere.",
    "What does your kitchen look like?",
    "My grandmother grows tomatoes, beans and sunflowers behind her house, and in summer we all help her.",
)
NOTHING_YET = "…"


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(port: int) -> tuple[subprocess.Popen, Client]:
    """The running Space and a client of it."""
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, APP], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return process, Client(f"http://127.0.0.1:{port}", verbose=False)
        time.sleep(0.2)
    raise SystemExit(f"The Space ended with code {process.returncode} before it answered.")


def ask(client: Client, text: str) -> tuple[float, float, str]:
    """Sends a message as a new visitor: seconds to the first words of the reply, to its end, and the reply."""
    begin, first, reply = time.perf_counter(), None, ""
    job = client.submit({"text": text, "files": []}, [], [], False, 64, 0, 1, api_name="/send")
    for _, chat, _ in job:
        reply = read(chat[-1]["content"])
        if first is None and reply != NOTHING_YET:
            first = time.perf_counter() - begin
    end = time.perf_counter() - begin
    return end if first is None else first, end, reply


def read(content: Any) -> str:
    """The text of a message."""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return text.replace("\N{WORD JOINER}", "")  # see `inert` in the Space


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"p50": statistics.median(seconds), "p95": statistics.quantiles(seconds, n=20, method="inclusive")[-1]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=20, help="messages sent one after another (default: 20)")
    parser.add_argument("--users", type=int, default=8, help="visitors at once (default: 8)")
    args = parser.parse_args(argv)
    port, begin = free_port(), time.perf_counter()
    process, client = start(port)
    try:
        started = time.perf_counter() - begin
        ask(client, SENTENCES[0])  # warm
        alone = [ask(client, SENTENCES[turn % len(SENTENCES)]) for turn in range(args.messages)]
        clients = [Client(f"http://127.0.0.1:{port}", verbose=False) for _ in range(args.users)]
        texts = [SENTENCES[user % len(SENTENCES)] for user in range(args.users)]
        with ThreadPoolExecutor(args.users) as pool:
            together = list(pool.map(ask, clients, texts))
        expected = {SENTENCES[turn % len(SENTENCES)]: reply for turn, (*_, reply) in enumerate(alone)}
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        figures = {
            "seconds_to_start": started,
            "first_words_seconds": percentiles([first for first, *_ in alone]),
            "whole_reply_seconds": percentiles([end for _, end, _ in alone]),
            "users_at_once": args.users,
            "answered": sum(reply != NOTHING_YET for *_, reply in together),
            "answered_as_alone": sum(
                reply == expected.get(text, reply) for text, (*_, reply) in zip(texts, together, strict=True)
            ),
            "first_words_seconds_at_once": percentiles([first for first, *_ in together]),
            "whole_reply_seconds_at_once": percentiles([end for _, end, _ in together]),
            "peak_memory_mb": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024,
        }
    finally:
        process.terminate()
        process.wait()
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
