"""Models of the shapes that people train, with random weights: a benchmark on a GPU, or without one what predicts it.

`SHAPES` has the sizes; `training_model` and `training_batch` build what a step needs, `training_step` and
`language_model_step` are what is compared. `benchmark_shapes` times both, and replies, on a GPU. `count_training` and
`count_generation` count what they ask of the host, in models of the same depth and tiny widths.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig

from .configuration_vikdf import OBJECTIVES, VikdfConfig
from .environment import versions
from .host_counts import count_host_work, count_python_calls
from .modeling_distillation import VikdfForPreTraining
from .modeling_objectives import cells_to_pixels, scored_patches, to_patches
from .modeling_prefix import chosen_columns, locate_columns, stack_rows
from .modeling_vikdf import VikdfForConditionalGeneration


# ---- shapes ----

# of prompts: the targets end the caption's
CAPTION_TOKENS, CAPTION_PROMPT, DRAW_PROMPT, TARGET_TOKENS = 20, 24, 32, 14
KNOWLEDGE_TOKENS, KNOWLEDGE_ID, IMAGE_SIZE = 32, 3, 224
NEW_TOKENS = 32  # as in the paper


@dataclass(frozen=True)
class Shapes:
    """Fields of the configurations of an LLM, of CLIP's towers and of the IQ-Former."""

    llm: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    iqformer: dict[str, Any]

    def narrow(self) -> "Shapes":
        """The same depths with tiny widths: as many operations, which take next to no time."""
        widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        parts = {name: {**part, **widths} for name, part in vars(self).items()}
        # heads share keys and values where they do in the original
        parts["llm"]["num_key_value_heads"] = 1 + (self.llm["num_key_value_heads"] == self.llm["num_attention_heads"])
        for tower in ("text", "vision"):
            parts[tower]["projection_dim"] = 32
        return replace(self, **parts)

    def config(self, objectives: dict[str, float], knowledge_tokens: int = KNOWLEDGE_TOKENS) -> VikdfConfig:
        """The configuration of a whole model with these objectives."""
        return VikdfConfig(
            text_config=LlamaConfig(**self.llm, bos_token_id=1, eos_token_id=2, pad_token_id=0),
            context_config=CLIPTextConfig(**self.text),
            vision_config=CLIPVisionConfig(**self.vision, image_size=IMAGE_SIZE),
            iqformer_config=self.iqformer,
            num_knowledge_tokens=knowledge_tokens,
            knowledge_token_id=KNOWLEDGE_ID,
            loss_weights=objectives,
        )


def _block(hidden_size: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"intermediate_size": 4 * hidden_size, **sizes, **others}


SHAPES = {
    # SmolLM2-135M; CLIP-like towers and Q-Former at which the authors' code was measured for comparison
    "small": Shapes(
        llm=_block(576, 30, 9, intermediate_size=1536, num_key_value_heads=3, vocab_size=49152)
        | {"tie_word_embeddings": True},
        text=_block(384, 6, 6, projection_dim=384),
        vision=_block(384, 6, 6, projection_dim=384, patch_size=16),
        iqformer=_block(384, 6, 6),
    ),
    # the paper's: Llama-2-7b, CLIP ViT-L/14, a Q-Former of BERT's size
    "paper": Shapes(
        llm=_block(4096, 32, 32, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000)
        | {"tie_word_embeddings": False},
        text=_block(768, 12, 12, projection_dim=768),
        vision=_block(1024, 24, 16, projection_dim=768, patch_size=14),
        iqformer=_block(768, 12, 12),
    ),
}


# ---- training ----


def training_model(
    shapes: Shapes,
    objectives: dict[str, float],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    knowledge_tokens: int = KNOWLEDGE_TOKENS,
) -> VikdfForPreTraining:
    """A model to train: the LLM, and on a GPU the encoders too, in the given dtype, the trained part in float32."""
    # imported here because it needs the extra "train", which the benchmark of generation does not
    from .training.stages import use_plain_attention
    from .training.trainer import freeze_unused

    torch.manual_seed(0)
    with torch.device(device):
        model = VikdfForPreTraining(shapes.config(objectives, knowledge_tokens))
    freeze_unused(model)
    frozen = ("language_model",) if device == "cpu" else ("language_model", "context_encoder", "vision_encoder")
    for part in frozen:
        getattr(model, part).to(dtype)
    if device == "cpu" and dtype == torch.bfloat16:
        use_plain_attention(model)
    return model.train()


def training_batch(
    config: VikdfConfig, rows: int, device: str = "cpu", context_tokens: int = CAPTION_TOKENS
) -> dict[str, torch.Tensor]:
    """A random batch with inputs for all five objectives, and where in it what lies, as a collator gives it."""
    torch.manual_seed(0)
    n, vocabulary = config.num_knowledge_tokens, config.text_config.vocab_size
    caption = torch.randint(10, config.context_config.vocab_size - 2, (rows, context_tokens))
    caption[:, -1] = config.context_config.eos_token_id
    labels = torch.full_like(caption, -100)
    labels[:, 5:8] = caption[:, 5:8]
    knowledge = torch.full((rows, n), KNOWLEDGE_ID)
    prompt, draw = (torch.randint(10, vocabulary, (rows, length)) for length in (CAPTION_PROMPT, DRAW_PROMPT))
    prompt = torch.cat([prompt[:, :-TARGET_TOKENS], knowledge, prompt[:, -TARGET_TOKENS:]], dim=1)
    targets = torch.full_like(prompt, -100)
    targets[:, -TARGET_TOKENS:] = prompt[:, -TARGET_TOKENS:]
    draw = {"input_ids": torch.cat([draw, knowledge], dim=1)}
    draw["attention_mask"] = torch.ones_like(draw["input_ids"])
    batch = {
        "context_input_ids": caption,
        "context_attention_mask": torch.ones_like(caption),
        "pixel_values": torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE),
        "masked_cells": torch.rand(rows, (IMAGE_SIZE // 28) ** 2) < 0.6,
        "masked_input_ids": caption.masked_fill(labels != -100, 5),
        "masked_labels": labels,
        "masked_columns": chosen_columns(labels != -100),
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "labels": targets,
    }
    patch = config.vision_config.patch_size
    pixels = cells_to_pixels(batch["masked_cells"], IMAGE_SIZE, IMAGE_SIZE, patch)[:, None]
    batch["scored_patches"] = scored_patches(to_patches(pixels, patch))
    batch |= locate_columns(batch, KNOWLEDGE_ID)
    batch |= {f"draw_{name}": value for name, value in (draw | locate_columns(draw, KNOWLEDGE_ID)).items()}
    return {name: value.to(device) for name, value in batch.items()}


def with_states(model: VikdfForPreTraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as from the feature cache: with the states of the frozen encoders."""
    return batch | {
        "context_states": model.encode_context(batch["context_input_ids"], batch["context_attention_mask"]),
        "vision_states": model.encode_images(batch["pixel_values"]),
    }


def training_step(model: VikdfForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward pass of all objectives, under autocast with a bfloat16 LLM, as in a Trainer."""
    half = model.language_model.dtype == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def language_model_step(model: VikdfForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    """The bare LLM's forward and backward pass, through its frozen weights, on the same tokens of both directions."""
    for ids in (batch["input_ids"], batch["draw_input_ids"]):
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        model.language_model(inputs_embeds=embeds, labels=ids).loss.backward()


def _language_model_pass(model: VikdfForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    """The same in a single pass, padded as it must be."""
    ids, mask = (stack_rows([batch[name], batch[f"draw_{name}"]]) for name in ("input_ids", "attention_mask"))
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model.language_model(inputs_embeds=embeds, attention_mask=mask, labels=ids).loss.backward()


# ---- what is asked of the host ----


def count_training(shapes: Shapes, rows: int = 2) -> dict[str, Any]:
    """
    What a training step of all five objectives, forward and backward, asks of the host.

    Returns:
        `count_host_work` of the `step`, of that with cached states and of that with gradient checkpointing; of the
        `language_model` alone, all tokens in one pass; of the frozen `encoders`, once; of the `iqformer`, forward and
        backward, for texts and pictures. `step_over_parts`: operations of the step with cached states, which encodes
        masked inputs alone, over those of these three.
    """
    model = training_model(shapes.narrow(), OBJECTIVES)
    batch = training_batch(model.config, rows)
    cached = with_states(model, batch)

    def iqformer() -> None:
        text = model.iqformer.text_knowledge(cached["context_states"], batch["context_attention_mask"])
        (text.sum() + model.iqformer.image_knowledge(cached["vision_states"]).sum()).backward()

    calls = {
        "step": lambda: model(**batch).loss.backward(),
        "step_with_cached_states": lambda: model(**cached).loss.backward(),
        "language_model": functools.partial(_language_model_pass, model, batch),
        "encoders": functools.partial(with_states, model, batch),
        "iqformer": iqformer,
    }
    counts = {}
    for name, call in calls.items():
        call()
        model.zero_grad()
        counts[name] = count_host_work(call)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()  # by its name since transformers 5.24
    counts["step_with_gradient_checkpointing"] = count_host_work(calls["step_with_cached_states"])
    parts = sum(counts[name]["aten_ops"] for name in ("language_model", "encoders", "iqformer"))
    return counts | {"step_over_parts": counts["step_with_cached_states"]["aten_ops"] / parts}


def count_generation(shapes: Shapes) -> dict[str, Any]:
    """
    What one decoding step asks of the host, of the model and of the bare LLM, and the ratios of both.

    Counted are `aten_ops`, `python_calls` and what else `count_host_work` does: the difference between replies of 12
    and of 2 tokens, by ten.
    """
    model = VikdfForConditionalGeneration(shapes.narrow().config({})).eval()
    arms, counts = reply_arms(model, batch_size=1), {}
    for name, reply in arms.items():
        reply(2)
        short, long = (
            count_host_work(functools.partial(reply, length))
            | {"python_calls": count_python_calls(functools.partial(reply, length))}
            for length in (2, 12)
        )
        counts[name] = {key: (long[key] - short[key]) / 10 for key in short}
    ratios = {key: counts["vikdf"][key] / counts["language_model"][key] for key in ("aten_ops", "python_calls")}
    return counts | {"ratios": ratios}


# ---- replies ----


def reply_arms(
    model: VikdfForConditionalGeneration, batch_size: int, **settings: Any
) -> dict[str, Callable[[int], Any]]:
    """Calls that generate so many new tokens: with knowledge, from context to reply, and by the bare LLM."""
    torch.manual_seed(0)
    device, length = model.device, CAPTION_PROMPT + KNOWLEDGE_TOKENS
    prompt = torch.randint(10, model.config.text_config.vocab_size, (batch_size, length), device=device)
    vocabulary = model.config.context_config.vocab_size
    context = torch.randint(10, vocabulary, (batch_size, CAPTION_TOKENS), device=device)
    bare = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    placed = prompt.clone()
    placed[:, 10 : 10 + KNOWLEDGE_TOKENS] = KNOWLEDGE_ID
    ours = bare | {"input_ids": placed, "context_input_ids": context}
    # nothing ends a reply before its length
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return {
        "vikdf": lambda tokens: model.generate(**ours, max_new_tokens=tokens, **settings),
        "language_model": lambda tokens: model.language_model.generate(**bare, max_new_tokens=tokens, **settings),
    }


# ---- times on a GPU ----


def choose_device() -> str:
    """A GPU where PyTorch sees one, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def benchmark_shapes(what: str, shapes: str, device: str, repeats: int = 9) -> dict[str, Any]:
    """
    Speed and memory of random models of given shapes.

    Args:
        what: "training" or "generation".
        shapes: a name in `SHAPES`.
        device: "cuda" or "cpu".
        repeats: timed turns of each arm, alternating; medians are reported, and of ratios those of adjacent turns.

    Returns:
        `host_counts` of `count_training` or `count_generation`; on a GPU also its times and peak memory.

    Raises:
        ValueError: for a GPU that PyTorch does not see.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('PyTorch sees no GPU: pass device "cpu", on which is counted what predicts its speed.')
    report = {"what": what, "shapes": shapes, "device": device}
    count, measure = {
        "training": (count_training, _time_training),
        "generation": (count_generation, _time_generation),
    }[what]
    report["host_counts"] = count(SHAPES[shapes])
    if device == "cuda":
        report |= {"gpu": torch.cuda.get_device_name(), "repeats": repeats, **measure(SHAPES[shapes], device, repeats)}
    return report | {"threads": torch.get_num_threads(), "versions": versions()}


def _time_training(shapes: Shapes, device: str, repeats: int) -> dict[str, Any]:
    """By batch size: pairs a second, over the LLM's own step, and peak memory."""
    model = training_model(shapes, OBJECTIVES, torch.bfloat16, device)
    result = {}
    for rows in (4, 32):
        batch = training_batch(model.config, rows, device)
        cached = with_states(model, batch)
        steps = {
            "uncached": functools.partial(training_step, model, batch),
            "cached": functools.partial(training_step, model, cached),
            "language_model": functools.partial(language_model_step, model, batch),
        }
        seconds = turns(steps, repeats, device)
        result[f"batch_{rows}"] = {
            "pairs_per_s": {name: rows / statistics.median(values) for name, values in seconds.items()},
            "step_over_llm_ratio": ratio(seconds["cached"], seconds["language_model"]),
            "peak_memory_gb": {name: peak_gb(step) for name, step in steps.items()},
        }
    return result


def _time_generation(shapes: Shapes, device: str, repeats: int) -> dict[str, Any]:
    """Greedy replies by batch size, the first token, beams, and compiled decoding with a static cache."""
    torch.manual_seed(0)
    with torch.device(device):
        model = VikdfForConditionalGeneration(shapes.config({})).eval()
    for part in ("language_model", "context_encoder", "vision_encoder"):
        getattr(model, part).to(torch.bfloat16)
    settings = {
        "batch_1": (1, NEW_TOKENS, {}),
        "batch_8": (8, NEW_TOKENS, {}),
        "batch_64": (64, NEW_TOKENS, {}),
        "first_token": (1, 1, {}),
        "beams_3": (1, NEW_TOKENS, {"num_beams": 3}),
        "compiled_static_cache": (1, NEW_TOKENS, {"cache_implementation": "static"}),
    }
    result = {}
    for name, (rows, tokens, generation) in settings.items():
        arms = {arm: functools.partial(reply, tokens) for arm, reply in reply_arms(model, rows, **generation).items()}
        seconds = turns(arms, repeats, device)
        median = {arm: statistics.median(values) for arm, values in seconds.items()}
        result[name] = {
            "seconds": median,
            "tokens_per_s": {arm: rows * tokens / value for arm, value in median.items()},
            "overhead_ratio": ratio(seconds["vikdf"], seconds["language_model"]),
            "peak_memory_gb": peak_gb(arms["vikdf"]),
        }
    return result


def turns(steps: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step [repeats], run alternately after two warm-ups, which compile what is to be compiled."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: [] for name in steps}
    for turn in range(-2, repeats):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_gb(step: Callable[[], Any]) -> float:
    """Peak memory in GB that a step allocates on the GPU, the model's own included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def ratio(ours: list[float], alone: list[float]) -> float:
    """The median ratio of the steps of one turn."""
    return statistics.median(a / b for a, b in zip(ours, alone, strict=True))


__all__ = ["SHAPES", "Shapes", "benchmark_shapes", "choose_device", "count_generation", "count_training"]
