"""Decoding on a GPU: eager and compiled, with knowledge and by the bare LLM, by size of the batch; and in the server.

All arms of a point take turns, so that a busy host slows all alike; ratios are of neighbours, figures are medians.
Weights are random, which makes no difference to time; the server serves a checkpoint.

Example run:
    python eval/speed/gpu.py --shapes small paper --server default --output decoding.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, LlamaConfig, set_seed

from modeling_vikdf import DEFAULT_CHECKPOINT, VikdfConfig, VikdfForConditionalGeneration, benchmark_shapes
from modeling_vikdf.benchmark_shapes import CAPTION_PROMPT, KNOWLEDGE_ID, KNOWLEDGE_TOKENS, ratio, turns
from modeling_vikdf.building import load_model
from modeling_vikdf.environment import versions
from modeling_vikdf.modeling_compilation import SHORTEST, compile_config_for


SHAPES = {
    name: {"text_config": shapes.llm, "iqformer_config": shapes.iqformer}
    for name, shapes in benchmark_shapes.SHAPES.items()
}


def build_model(shapes: dict[str, dict], device: str, dtype: torch.dtype) -> VikdfForConditionalGeneration:
    """A model with random weights; knowledge is given to it, so its encoders are as small as they can be."""
    config = VikdfConfig(
        text_config=LlamaConfig(**shapes["text_config"], eos_token_id=None, pad_token_id=0),
        context_config={"model_type": "bert", "num_hidden_layers": 1},
        iqformer_config={"cross_attention_frequency": 1, **shapes["iqformer_config"]},
        num_knowledge_tokens=KNOWLEDGE_TOKENS,
        knowledge_token_id=KNOWLEDGE_ID,
        project_inputs=True,
    )
    set_seed(0)
    with torch.device(device):
        model = VikdfForConditionalGeneration(config)
    model.language_model.to(dtype)
    return model.eval()


def measure(
    model: VikdfForConditionalGeneration,
    batch: int,
    new_tokens: int,
    repeats: int,
    compile: bool | CompileConfig = True,
) -> dict[str, Any]:
    """
    Times greedy replies of exactly `new_tokens` tokens to prompts of equal length, and beam search with three beams.

    Args:
        model: from `build_model`.
        batch: prompts at once.
        new_tokens: of a reply.
        repeats: turns that are timed, after two that are not.
        compile: how; see `compile_config_for`.

    Returns:
        Seconds of each arm, `tokens_per_s` of the whole batch, `overhead` and `overhead_compiled` over the bare LLM,
        `first_token_overhead` and `compiled_speedup`; medians.
    """
    device, language_model = model.device, model.language_model
    size = batch, CAPTION_PROMPT + KNOWLEDGE_TOKENS
    ids = torch.randint(10, model.config.text_config.vocab_size, size, device=device)
    ids[:, CAPTION_PROMPT // 2 : CAPTION_PROMPT // 2 + KNOWLEDGE_TOKENS] = KNOWLEDGE_ID
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    knowledge = torch.randn(batch, KNOWLEDGE_TOKENS, model.config.iqformer_config.hidden_size, device=device)
    exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    config = compile_config_for(model, compile)
    static = {"cache_implementation": "static", "compile_config": config}
    one, beams = exactly | {"max_new_tokens": 1, "min_new_tokens": 1}, exactly | {"num_beams": 3}
    ours, bare = partial(model.generate, **inputs, knowledge=knowledge), partial(language_model.generate, **inputs)
    seconds = turns(
        {
            "vikdf": partial(ours, **exactly),
            "llm": partial(bare, **exactly),
            "vikdf_compiled": partial(ours, **exactly, **static),
            "llm_compiled": partial(bare, **exactly, **static, max_cache_len=SHORTEST),
            "vikdf_first_token": partial(ours, **one),
            "llm_first_token": partial(bare, **one),
            "vikdf_beams": partial(ours, **beams),
            "llm_beams": partial(bare, **beams),
        },
        repeats,
        device.type,
    )

    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_per_s": {name: batch * new_tokens / statistics.median(seconds[name]) for name in list(seconds)[:4]},
        "overhead": ratio(seconds["vikdf"], seconds["llm"]),
        "overhead_compiled": ratio(seconds["vikdf_compiled"], seconds["llm_compiled"]),
        "first_token_overhead": ratio(seconds["vikdf_first_token"], seconds["llm_first_token"]),
        "compiled_speedup": ratio(seconds["vikdf"], seconds["vikdf_compiled"]),
    }


def measure_server(source: str, batches: Sequence[int], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second that a server gives to so many clients at once, eager and compiled, greedily."""
    from fastapi.testclient import TestClient

    from modeling_vikdf.server import create_app

    model, processor = load_model(source)
    body = {"model": "vikdf", "temperature": 0, "max_tokens": new_tokens}
    body["messages"] = [{"role": "user", "content": "I spent the whole day at the beach with my dog."}]
    figures = {}
    for name, compile in (("eager", False), ("compiled", True)):
        with TestClient(create_app(model, processor, max_batch=max(batches), compile=compile)) as client:
            for batch in batches:
                rates = []
                for turn in range(repeats + 1):
                    start = time.perf_counter()
                    with ThreadPoolExecutor(batch) as pool:
                        requests = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(batch)]
                    tokens = sum(each.result().json()["usage"]["completion_tokens"] for each in requests)
                    if turn:
                        rates.append(tokens / (time.perf_counter() - start))
                figures[f"{name}_batch{batch}"] = statistics.median(rates)
    return figures


def main() -> None:
    """Prints all figures as JSON, and writes them."""
    parser = argparse.ArgumentParser(description="Time decoding, eager and compiled, with knowledge and without.")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--server", metavar="MODEL", help="a checkpoint to serve, too; 'default': the packaged one")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    figures: dict[str, Any] = {"device": device, "new_tokens": args.new_tokens, "versions": versions()}
    for shapes in args.shapes:
        model = build_model(SHAPES[shapes], args.device, torch.bfloat16)
        for batch in args.batches:
            figures[f"{shapes}_batch{batch}"] = measure(model, batch, args.new_tokens, args.repeats)
            print(json.dumps({f"{shapes}_batch{batch}": figures[f"{shapes}_batch{batch}"]}), flush=True)
        del model
    if args.server:
        source = DEFAULT_CHECKPOINT if args.server == "default" else args.server
        figures["server_tokens_per_s"] = measure_server(source, args.batches, args.new_tokens, args.repeats)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
