"""Attacks a `vikdf serve` of its own while an ordinary client goes on asking, and writes what that cost the client.

An attack comes from 16 connections of an address of its own (Linux has all of 127.0.0.0/8). It is held if the ordinary
client's requests take at most twice their idle time (means; idle is measured just before and just after), `/health`
always answers with 200 within a second, and the server's memory grows by less than the budget. `--fuzz`, `--clients`
and `--requests` add malformed requests, which must all get a 4xx; many clients, whose answers must not be mixed up;
and ordinary requests, with which memory must not grow.

Example run (the model is a small random one that reads 8,192 tokens, unless --model names another):
    python eval/speed/attack_server.py --fuzz 10000 --clients 64 --seconds 120 --requests 2000 \
        --output eval/results/serving/attacks.json
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from load_server import SENTENCES, ask, send_malformed
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.building import load_model
from modeling_vikdf.evaluation.reports import versions


ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
JSON_TYPE = {"Content-Type": "application/json"}
ATTACKERS = 16  # connections
MAX_RATIO = 2.0
HEALTH_SECONDS = 1.0
GROWTH = 16 * 2**20  # bytes by which ordinary requests may grow the memory


# ---- the server ----


def build_tiny(folder: Path) -> Path:
    """Saves a small random model with eyes, whose LLM reads 8,192 tokens, and its backbones; the model's folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import llm_config, tower_configs
    from tiny_tokenizers import bert_tokenizer, image_processor, qwen_tokenizer

    torch.manual_seed(0)
    config, towers = llm_config("qwen"), tower_configs("separate")
    config.max_position_embeddings = 8192
    for name, part in {
        "llm": (AutoModelForCausalLM.from_config(config), qwen_tokenizer()),
        "text": (AutoModel.from_config(towers["context_config"]), bert_tokenizer()),
        "vision": (AutoModel.from_config(towers["vision_config"]), image_processor()),
    }.items():
        for each in part:
            each.save_pretrained(folder / name)
    names = [str(folder / name) for name in ("llm", "text", "vision")]
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in names[:2]]
    processor = VikdfProcessor.from_backbones(
        *tokenizers, AutoImageProcessor.from_pretrained(names[2]), vocab_size=512, num_knowledge_tokens=4
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = VikdfForConditionalGeneration.from_backbones(
        *names, processor=processor, iqformer_config=sizes, project_inputs=True, dtype=torch.float32
    )
    # every reply is as long as it may be
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False, suppress_tokens=[2])
    for part in (model, processor):
        part.save_pretrained(folder / "vikdf")
    return folder / "vikdf"


@dataclass
class Server:
    """A server process, its address, and the name of its model."""

    url: str
    model: str
    process: psutil.Process

    def memory(self) -> int:
        """Bytes that the process holds."""
        return self.process.memory_info().rss

    def client(self, address: str, connections: int = ATTACKERS) -> httpx.AsyncClient:
        """A client at an address of its own."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        transport = httpx.AsyncHTTPTransport(local_address=address, limits=limits)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=120)


@contextmanager
def serving(model: str) -> Iterator[Server]:
    """`vikdf serve` as a process of its own, which has warmed up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_vikdf", "serve", "--model", model, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with suppress(httpx.TransportError):
                name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
                break
            if process.poll() is not None:
                raise SystemExit(f"`{' '.join(command)}` ended with status {process.returncode}.")
            time.sleep(0.2)
        yield Server(url, name, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


# ---- the attacks: what an attacker does again and again ----


@dataclass
class Attacker:
    """Where an attack goes to, where it comes from, and the longest chat, in words, that is accepted."""

    server: Server
    client: httpx.AsyncClient
    address: str
    words: int

    async def chat(self, content: Any, **settings: Any) -> None:
        """Asks for a reply, and waits for it."""
        await self.client.post(CHAT, json=self.body(content, **settings))

    def body(self, content: Any, **settings: Any) -> dict[str, Any]:
        """A chat of one message."""
        return {"model": self.server.model, "messages": [{"role": "user", "content": content}], **settings}

    async def connect(self, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own over which something has been sent."""
        url = httpx.URL(self.server.url)
        reader, writer = await asyncio.open_connection(url.host, url.port, local_addr=(self.address, 0), limit=1)
        writer.write(content)
        await writer.drain()
        return reader, writer


def post(content: bytes, path: str = CHAT, length: int | None = None) -> bytes:
    """A request with a body of so many bytes (default: all of it), of which this is what is sent."""
    length = len(content) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + content


@cache
def one_bit_picture(side: int) -> dict[str, Any]:
    """A part that shows a picture whose file is small and whose pixels are many."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def many_pictures(attacker: Attacker) -> None:
    """60 pictures of 5,000 x 5,000 pixels in one request."""
    await attacker.chat([one_bit_picture(5000)] * 60 + [{"type": "text", "text": "Look!"}])


async def one_large_picture(attacker: Attacker) -> None:
    """The largest picture that is accepted."""
    await attacker.chat([one_bit_picture(5000), {"type": "text", "text": "Look!"}], max_tokens=2)


async def endless_stops(attacker: Attacker) -> None:
    """Stop sequences of 300,000 characters, then the longest that are accepted."""
    await attacker.chat("Hello!", stop=["é" * 300_000] * 4)
    await attacker.chat("Hello!", stop=["é" * 256] * 4, max_tokens=256)


async def long_prompts(attacker: Attacker) -> None:
    """The longest chat that is accepted, with beams."""
    await attacker.chat("blue " * attacker.words, num_beams=2, max_tokens=64)


async def long_replies(attacker: Attacker) -> None:
    """Long replies to short chats, sampled, each in a batch of its own."""
    await attacker.chat("Hello!", temperature=1.0, seed=1, max_tokens=2000)


async def long_texts(attacker: Attacker) -> None:
    """200,000 characters, which take a second to be tokenized."""
    await attacker.chat("blue " * 40_000)


async def leavers(attacker: Attacker) -> None:
    """Clients that ask for much and leave."""
    content = json.dumps(attacker.body("blue " * attacker.words, num_beams=2, max_tokens=64)).encode()
    _, writer = await attacker.connect(post(content))
    await asyncio.sleep(0.1)
    writer.close()


async def half_headers(attacker: Attacker) -> None:
    """30 connections at a time, each with half a header."""
    writers = [(await attacker.connect(b"GET /health HTTP/1.1\r\nHost:"))[1] for _ in range(30)]
    await asyncio.sleep(1)
    for writer in writers:
        writer.close()


async def stalled_bodies(attacker: Attacker) -> None:
    """Bodies of 8 MB of which the last byte never comes."""
    _, writer = await attacker.connect(post(b" " * 7_999_999, length=8_000_000))
    await asyncio.sleep(5)
    writer.close()


MANY_FIELDS = b"0," + b",".join(b'"x%d":1' % number for number in range(600_000))


@cache
def large_body(model: str, inner: bytes) -> bytes:
    """A request with something large in a field that it need not have."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "metadata": "INNER"}
    return json.dumps(body).encode().replace(b'"INNER"', inner)


async def nested_bodies(attacker: Attacker) -> None:
    """8 MB of JSON that are empty lists."""
    content = large_body(attacker.server.model, b"[" + b"[]," * 2_600_000 + b"1]")
    await attacker.client.post(CHAT, content=content, headers=JSON_TYPE)


async def unknown_fields(attacker: Attacker) -> None:
    """8 MB of fields that the server does not know."""
    content = large_body(attacker.server.model, MANY_FIELDS)
    await attacker.client.post(CHAT, content=content, headers=JSON_TYPE)


async def no_readers(attacker: Attacker) -> None:
    """Answers that are asked for again and again, and never read."""
    content = json.dumps(attacker.body("Hello!")).encode()
    _, writer = await attacker.connect(post(content, "/v1/knowledge") * 1000)
    await asyncio.sleep(5)
    writer.close()


ATTACKS: tuple[Callable[[Attacker], Awaitable[None]], ...] = (
    *(many_pictures, one_large_picture, endless_stops, long_prompts, long_replies, long_texts, leavers),
    *(half_headers, stalled_bodies, nested_bodies, unknown_fields, no_readers),
)


# ---- what they cost others ----


@contextmanager
def attacked(attack: Callable[[Attacker], Awaitable[None]], server: Server, words: int) -> Iterator[None]:
    """While in it, a process of its own repeats the attack in many tasks."""

    async def repeat(attacker: Attacker) -> None:
        while True:
            with suppress(httpx.HTTPError, OSError):
                await attack(attacker)
            await asyncio.sleep(0.01)  # so that what is refused at once is not asked for without pause

    async def run() -> None:
        async with server.client("127.0.0.2") as client:
            attacker = Attacker(server, client, "127.0.0.2", words)
            await asyncio.gather(*(repeat(attacker) for _ in range(ATTACKERS)))

    process = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(run()), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


@asynccontextmanager
async def watched(server: Server) -> AsyncIterator[dict[str, Any]]:
    """The most memory of the server, and how many times `/health` did not answer with 200 in time, while in it."""
    seen = {"memory": 0, "health_asked": 0, "health_failed": 0}

    async def watch_memory() -> None:
        while True:
            seen["memory"] = max(seen["memory"], server.memory())
            await asyncio.sleep(0.02)

    async def watch_health() -> None:
        async with server.client("127.0.0.3") as client:
            while True:
                status = None
                with suppress(httpx.HTTPError, TimeoutError):
                    async with asyncio.timeout(HEALTH_SECONDS):
                        status = (await client.get("/health")).status_code
                seen["health_asked"] += 1
                seen["health_failed"] += status != 200
                await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(watch()) for watch in (watch_memory, watch_health)]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()


async def seconds_of_requests(server: Server, number: int, max_tokens: int) -> list[float]:
    """What an ordinary client waits for each of its replies; infinite for one that it does not get."""
    seconds = []
    async with server.client("127.0.0.1") as client:
        for index in range(number):
            try:
                seconds.append((await ask(client, server.model, SENTENCES[index % len(SENTENCES)], max_tokens))[1])
            except httpx.HTTPError:
                seconds.append(float("inf"))
    return seconds


async def at_rest(server: Server) -> None:
    """Waits until the server has worked off what an attack has left it; `cpu_percent` is that since the last call."""
    while server.process.cpu_percent() > 5:
        await asyncio.sleep(1)


async def measure(server: Server, attack: Callable[[Attacker], Awaitable[None]], args: argparse.Namespace) -> dict:
    """One row of the table: what an attack costs an ordinary client."""
    await at_rest(server)
    idle = await seconds_of_requests(server, args.ordinary, args.max_tokens)
    before = server.memory()
    async with watched(server) as seen:
        with attacked(attack, server, args.words):
            await asyncio.sleep(1)  # until it has come into its own
            busy = await seconds_of_requests(server, args.ordinary, args.max_tokens)
    await at_rest(server)
    idle += await seconds_of_requests(server, args.ordinary, args.max_tokens)  # of a machine that others use, too
    ratio, grown = statistics.mean(busy) / statistics.mean(idle), max(0, seen["memory"] - before) / 2**20
    return {
        "attack": attack.__name__,
        "held": ratio <= MAX_RATIO and seen["health_failed"] == 0 and grown <= args.budget,
        "ratio_of_times": round(ratio, 2),
        "ratio_of_slowest": round(max(busy) / max(idle), 2),
        "health_asked": seen["health_asked"],
        "health_failed": seen["health_failed"],
        "memory_mib": round(grown),
    }


# ---- many requests ----


async def fuzz(server: Server, requests: int) -> dict[str, Any]:
    """Malformed requests: each has to get an answer, and it has to be a 4xx."""
    async with server.client("127.0.0.1") as client:
        statuses, wrong = await send_malformed(client, server.model, requests, seed=0)
        await ask(client, server.model, SENTENCES[0], 4)  # it still answers
    return {"held": not wrong, "statuses": statuses}


async def many_clients(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Clients at addresses of their own that ask all the while: each reply has to be the one that it gets alone."""
    chats = [f"{sentence} {word}" for sentence in SENTENCES for word in ("Really.", "I think.", "Why?", "Well.")]

    async def reply(client: httpx.AsyncClient, chat: str) -> str:
        body = {"model": server.model, "messages": [{"role": "user", "content": chat}], "max_tokens": 16}
        response = await client.post(CHAT, json=body | {"temperature": 0})
        return response.raise_for_status().json()["choices"][0]["message"]["content"]

    async with server.client("127.0.0.1") as client:
        alone = {chat: await reply(client, chat) for chat in chats}
    end, counts = time.monotonic() + seconds, Counter()

    async def one_client(number: int) -> None:
        rng = random.Random(number)
        async with server.client(f"127.0.1.{number + 1}") as client:
            while time.monotonic() < end:
                chat = rng.choice(chats)
                counts[await reply(client, chat) == alone[chat]] += 1

    await asyncio.gather(*map(one_client, range(clients)))
    return {
        "held": counts[True] > 0 == counts[False],
        "clients": clients,
        "replies": counts.total(),
        "mixed_up": counts[False],
        "different_replies": len(set(alone.values())),
    }


async def growth(server: Server, requests: int, max_tokens: int) -> dict[str, Any]:
    """Memory after a quarter of many ordinary requests, and after all of them."""
    await seconds_of_requests(server, requests // 4, max_tokens)
    quarter = server.memory()
    await seconds_of_requests(server, requests - requests // 4, max_tokens)
    grown = server.memory() - quarter
    return {"held": grown <= GROWTH, "requests": requests, "grown_mib": grown / 2**20}


# ---- the report ----


def words_of_longest_chat(model: str, budget: int = 16_384) -> int:
    """How many words fit into a batch with two beams, 64 new tokens and the prompt's template."""
    loaded, processor = load_model(model)
    tokens = len(processor.tokenizer("blue " * 100, add_special_tokens=False)["input_ids"]) / 100
    window = min(loaded.config.text_config.max_position_embeddings, budget // 2)
    return int((window - 64 - 200) / tokens)


async def run(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for; prints each row as it comes."""
    await seconds_of_requests(server, 5, args.max_tokens)  # warms up
    report: dict[str, Any] = {"attacks": []}
    for attack in ATTACKS:
        if not args.only or attack.__name__ in args.only:
            report["attacks"].append(await measure(server, attack, args))
            print(*(f"{key}={value}" for key, value in report["attacks"][-1].items()), flush=True)
    if args.fuzz:
        report["fuzz"] = await fuzz(server, args.fuzz)
    if args.clients:
        report["clients"] = await many_clients(server, args.clients, args.seconds)
    if args.requests:
        report["requests"] = await growth(server, args.requests, args.max_tokens)
    return report


def main() -> None:
    """Starts a server, attacks it, and writes the report."""
    parser = argparse.ArgumentParser(description="Attack a `vikdf serve` and measure what that costs others.")
    parser.add_argument("--model", help="folder or Hub id (default: a small random model)")
    parser.add_argument(
        "--only", nargs="+", choices=[attack.__name__ for attack in ATTACKS], help="only these attacks"
    )
    parser.add_argument("--ordinary", type=int, default=20, help="ordinary requests in an attack (default: 20)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of their replies (default: 32)")
    parser.add_argument("--budget", type=int, default=1024, help="MiB by which memory may grow (default: 1024)")
    parser.add_argument("--fuzz", type=int, default=0, help="malformed requests (default: none)")
    parser.add_argument("--clients", type=int, default=0, help="clients at a time (default: none)")
    parser.add_argument("--seconds", type=float, default=120, help="how long these ask (default: 120)")
    parser.add_argument(
        "--requests", type=int, default=0, help="ordinary requests one after the other (default: none)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(build_tiny(Path(folder)))
        args.words = words_of_longest_chat(model)
        with serving(model) as server:
            report = asyncio.run(run(server, args))
    report |= {
        "kind": "attacks",
        "model": args.model or "small random model",
        "limits": {"ratio_of_times": MAX_RATIO, "health_seconds": HEALTH_SECONDS, "memory_mib": args.budget},
        "connections_of_the_attacker": ATTACKERS,
        "requests_of_the_other_client": {"in_each_attack": args.ordinary, "max_tokens": args.max_tokens},
        "versions": versions(),
    }
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
