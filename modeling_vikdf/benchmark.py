"""The cost of knowledge: times the model and its bare LLM alternately in one run, under the same conditions."""

import contextlib
import functools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import pipeline

from .benchmark_shapes import (
    NEW_TOKENS,
    SHAPES,
    language_model_step,
    ratio,
    training_batch,
    training_model,
    training_step,
    turns,
    with_states,
)
from .building import load_model
from .configuration_vikdf import OBJECTIVES
from .environment import versions


CHAT = [{"role": "user", "content": "I spent the whole day at the beach with my dog. What do you think we did there?"}]


def _peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (on Linux `ru_maxrss` would start at the parent's)."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def benchmark_generation(model: str | None = None, repeats: int = 7) -> dict[str, Any]:
    """
    Times replies of exactly 32 tokens.

    Args:
        model: folder or Hub id of a VIKDF model; `None` for the packaged default.
        repeats: timed runs of each arm; medians are reported.

    Returns:
        `overhead_ratio`: time of a greedy reply with knowledge, from chat to text, over that of the bare LLM on a
        prompt of equal length (median over adjacent pairs of runs). `time_to_first_token_s`,
        `language_model_time_to_first_token_s`: seconds. `tokens_per_s`: greedy at batch size 1.
        `batch8_over_batch1`: throughput of beam search (3 beams) at batch size 8 over batch size 1.
        `peak_memory_mb`: of the whole process. Further keys describe the run.
    """
    from . import DEFAULT_CHECKPOINT

    loaded, processor = load_model(model or DEFAULT_CHECKPOINT)
    pipe = pipeline("vikdf-dialogue", model=loaded, processor=processor)
    exactly = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    inputs = pipe.processor([CHAT]).to(pipe.device)
    # the same tokens, so the same length; to the bare LLM a placeholder is an ordinary token
    bare_inputs = {
        "input_ids": inputs["input_ids"].clamp(max=pipe.model.config.text_config.vocab_size - 1),
        "attention_mask": inputs["attention_mask"],
    }
    # both arms decode with the same settings
    language_model = pipe.model.language_model
    language_model.generation_config = pipe.model.generation_config

    def llm_alone(**kwargs: Any) -> Callable[[], Any]:
        return lambda: pipe.processor.batch_decode(language_model.generate(**bare_inputs, **kwargs))

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
        "peak_memory_mb": _peak_rss_mb(),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "device": str(pipe.device),
        "dtype": str(language_model.dtype),
        **_environment(),
    }


# ---- training ----

BATCH = 8


def _peak_memory(step: str, dtype: torch.dtype, connection: Any) -> None:
    """Sends the peak memory in MB of a process that builds the model and runs the step once."""
    model = training_model(SHAPES["small"], OBJECTIVES, dtype)
    batch = training_batch(model.config, BATCH)
    {"all": training_step, "language_model": language_model_step}[step](model, batch)
    connection.send(_peak_rss_mb())


def _peak_memory_mb(step: str, dtype: torch.dtype) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(step, dtype, sender))
    process.start()
    process.join()
    return receiver.recv()


def benchmark_training(repeats: int = 5) -> dict[str, Any]:
    """
    Times one forward and backward pass of all five objectives at batch size 8, in float32 and with a bfloat16 LLM.

    Args:
        repeats: timed steps of each arm; medians are reported.

    Returns:
        `pairs_per_s` by precision, with cached encoder states of captions and pictures (masked inputs are still
        encoded); `pairs_per_s_uncached`; `step_over_llm_ratio` (float32) and `step_over_llm_ratio_bfloat16`: the
        cached step's time over the bare LLM's forward and backward pass on the same tokens (median over adjacent
        steps); `peak_memory_mb` of the float32 step and `language_model_peak_memory_mb`, each in its own process;
        `share`: fraction of the float32 step's time that each objective takes. Further keys describe the run.
    """
    pairs_per_s, uncached, ratios, share = {}, {}, {}, {}
    paper = [objective for objective, weight in OBJECTIVES.items() if weight]
    rounds = tqdm(total=2 + len(paper), desc="benchmark", unit="part")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = training_model(SHAPES["small"], OBJECTIVES, dtype)
        batch = training_batch(model.config, BATCH)
        cached = with_states(model, batch)
        seconds = turns(
            {
                "cached": functools.partial(training_step, model, cached),
                "language_model": functools.partial(language_model_step, model, batch),
                "uncached": functools.partial(training_step, model, batch),
            },
            repeats,
        )
        pairs_per_s[name] = BATCH / statistics.median(seconds["cached"])
        uncached[name] = BATCH / statistics.median(seconds["uncached"])
        ratios[name] = ratio(seconds["cached"], seconds["language_model"])
        rounds.update()
    for objective in paper:
        whole = training_model(SHAPES["small"], OBJECTIVES)
        without = training_model(SHAPES["small"], OBJECTIVES | {objective: 0.0})
        cached = with_states(whole, batch)
        seconds = turns(
            {
                "whole": functools.partial(training_step, whole, cached),
                "without": functools.partial(training_step, without, cached),
            },
            max(repeats // 2, 1),
        )
        share[objective] = 1 - statistics.median(seconds["without"]) / statistics.median(seconds["whole"])
        rounds.update()
    return {
        "pairs_per_s": pairs_per_s,
        "pairs_per_s_uncached": uncached,
        "step_over_llm_ratio": ratios["float32"],
        "step_over_llm_ratio_bfloat16": ratios["bfloat16"],
        "peak_memory_mb": _peak_memory_mb("all", torch.float32),
        "language_model_peak_memory_mb": _peak_memory_mb("language_model", torch.float32),
        "share": share,
        "repeats": repeats,
        **_environment(),
    }


def _environment() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "versions": versions()}
