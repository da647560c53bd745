"""What knowledge costs: the model against its own LLM, in one run, in turns, so that both see the same machine."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import pipeline


CHAT = [{"role": "user", "content": "I spent the whole day at the beach with my dog. What do you think we did there?"}]
NEW_TOKENS = 32  # as in the paper


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def benchmark_generation(model: str | None = None, repeats: int = 7) -> dict[str, Any]:
    """
    Times replies of exactly 32 tokens.

    Args:
        model: folder or Hub id of a VIKDF model; `None` for the packaged default.
        repeats: timed runs of each arm; the medians are reported.

    Returns:
        `overhead_ratio`: greedy reply with knowledge, from the chat to the text, over the LLM alone on a prompt of
        equal length (median over pairs of runs next to each other). `time_to_first_token_s`,
        `language_model_time_to_first_token_s` [s]. `tokens_per_s`: greedy at batch 1. `batch8_over_batch1`: tokens a
        second of beam search (3 beams) at batch 8 over batch 1. `peak_memory_mb`: of the whole process.
    """
    from . import DEFAULT_CHECKPOINT

    pipe = pipeline("vikdf-dialogue", model=model or str(DEFAULT_CHECKPOINT))
    exactly = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    inputs = pipe.processor([CHAT]).to(pipe.device)
    # the same tokens, so the same length; to the LLM alone a placeholder is a token like any other
    alone = {
        "input_ids": inputs["input_ids"].clamp(max=pipe.model.config.text_config.vocab_size - 1),
        "attention_mask": inputs["attention_mask"],
    }
    # both arms decode by the same settings; only these arms are compared, so what they are does not matter
    language_model = pipe.model.language_model
    language_model.generation_config = pipe.model.generation_config

    def llm_alone(**kwargs: Any) -> Callable[[], Any]:
        return lambda: pipe.processor.batch_decode(language_model.generate(**alone, **kwargs))

    arms = {
        "vikdf": lambda: pipe(CHAT, **exactly),
        "language_model": llm_alone(**exactly),
        "first_token": lambda: pipe(CHAT, max_new_tokens=1, do_sample=False),
        "language_model_first_token": llm_alone(max_new_tokens=1, do_sample=False),
        "beam_batch1": lambda: pipe([CHAT], batch_size=1, num_beams=3, **exactly),
        "beam_batch8": lambda: pipe([CHAT] * 8, batch_size=8, num_beams=3, **exactly),
    }
    for call in arms.values():
        call()  # warm up
    seconds = {name: [] for name in arms}
    for _ in tqdm(range(repeats), desc="benchmark", unit="round"):
        for name, call in arms.items():
            seconds[name].append(_seconds(call))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["vikdf"], seconds["language_model"], strict=True)]
    return {
        "overhead_ratio": statistics.median(ratios),
        "overhead_ratio_all": ratios,
        "time_to_first_token_s": median["first_token"],
        "language_model_time_to_first_token_s": median["language_model_first_token"],
        "tokens_per_s": NEW_TOKENS / median["vikdf"],
        "batch8_over_batch1": 8 * median["beam_batch1"] / median["beam_batch8"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": str(pipe.device),
        "dtype": str(language_model.dtype),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
