"""Generating replies: prompts that are embedded with their knowledge, once a row.

`KnowledgeGenerationMixin` adds to transformers' `generate` what the knowledge needs: its inputs, the embeddings of a
prompt that is not cached yet, and that the LLM never writes the placeholder. It does not know how knowledge is
computed or spliced: that is the model's (`get_knowledge`, `embed_prompt`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Cache,
    CompileConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TextGenerationPipeline,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, logging

from .modeling_candidates import EnoughFinished, generate_best
from .modeling_compilation import SHORTEST, StaticCaches, keep_rows, next_size, pad_rows
from .modeling_prefix import CACHE, pop_cache


logger = logging.get_logger(__name__)

# With these a prompt is read by `generate` itself, in a single pass.
PLANS = (
    *(CACHE, "cache_implementation", "output_attentions", "output_hidden_states"),
    *("assistant_model", "prompt_lookup_num_tokens"),
)
DEFAULT_NEW_TOKENS = 20  # transformers' own, where no length is set


class KnowledgeGenerationMixin(GenerationMixin):
    """`generate` of a model with `get_knowledge`, `embed_prompt` and the attribute `language_model`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        knowledge: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        padded_rows: int | None = None,
        running: EnoughFinished | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Embeds the tokens that are not cached yet, those of the prompt with the knowledge among them.

        With `padded_rows` the batch is filled up to so many rows; of candidates only those `running` are read.
        """
        if running is not None and (rows := running.select_rows(kwargs.get(CACHE))) is not None:
            kwargs["placed"] = rows, len(input_ids)
            input_ids = input_ids[rows]
            given = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
            kwargs |= {name: value[rows] for name, value in given.items() if value is not None}
        if padded_rows is not None:
            kwargs["rows"] = len(input_ids)
            input_ids, knowledge, image_mask = (
                pad_rows(tensor, padded_rows) for tensor in (input_ids, knowledge, image_mask)
            )
            kwargs |= {name: pad_rows(kwargs.get(name), padded_rows) for name in ("attention_mask", "position_ids")}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        new_ids = model_inputs["input_ids"]
        if new_ids is None:
            return model_inputs
        reads_prompt = is_first_iteration or not kwargs.get("use_cache", True)
        if is_first_iteration and new_ids.shape[1] < input_ids.shape[1] and not self._has_placeholders(new_ids):
            embeds = self.get_input_embeddings()(new_ids)  # all knowledge is cached, and may be left out
        elif knowledge is not None and reads_prompt:
            # the whole prompt, because the cache may end anywhere in it
            embeds = self.embed_prompt(input_ids.to(new_ids.device), knowledge, image_mask)[:, -new_ids.shape[1] :]
        elif is_first_iteration:
            embeds = self.embed_prompt(new_ids)
        else:  # tokens the LLM wrote are its own, even the one that serves as placeholder
            embeds = self.get_input_embeddings()(new_ids)
        return model_inputs | {"input_ids": None, "inputs_embeds": embeds}

    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        """
        The LLM's attention masks for static caches, by its own configuration.

        The one in this model's does not say how the LLM attends, and then transformers makes no mask for padding.
        """
        create = getattr(self.language_model, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.language_model.config, **kwargs)

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        token_id = self.config.knowledge_token_id
        return token_id is not None and bool((input_ids == token_id).any())

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        knowledge: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generates replies; everything that `GenerationMixin.generate` takes, and the knowledge inputs of `forward`.

        The knowledge is computed once a row, before rows are copied for beams or several replies. With a cache that
        reaches behind a prompt's places of knowledge neither context nor picture need be given again: the LLM reads
        what is cached. They must be, where it ends before.

        With `cache_implementation="static"`, on which transformers compiles the steps on a GPU, the cache's rows and
        length are rounded up, so that few sizes are compiled; it is kept for the next prompts, and not returned.

        With `num_candidates` above 1, an argument or a field of the generation configuration, so many replies are
        sampled to each prompt, and the `num_return_sequences` best of them returned, by the score whose weights
        `candidate_weights` are; see modeling_candidates.py. That reads their text, so it needs `processor`, the
        model's own; a `streamer` gets the chosen reply in one piece. Greedy and beam search have no candidates.

        With `prefill_chunk_size` the LLM reads the prompt so many tokens at a time, which takes less memory; the
        knowledge is spliced into the whole prompt before.

        Raises:
            ValueError: for knowledge with `inputs_embeds` or with an `assistant_model` (it would draft without the
                knowledge); for candidates without a processor, fewer than the replies to return, or with what belongs
                to a single pass; for `prefill_chunk_size` without `input_ids`, or with what belongs to a single pass.
        """
        if (cache := pop_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        config = generation_config if generation_config is not None else self.generation_config
        chunk = _settings(config, kwargs)("prefill_chunk_size")
        kwargs["prefill_chunk_size"] = None  # in chunks the LLM reads here: transformers would lose the knowledge
        if knowledge is None:
            knowledge = self.get_knowledge(context_input_ids, context_attention_mask, pixel_values)
        processor, num_candidates = kwargs.pop("processor", None), _pop_candidates(config, kwargs)
        if num_candidates > 1:
            prompt, kwargs["knowledge"] = kwargs.pop("input_ids", inputs), knowledge
            return self._choose(prompt, generation_config, num_candidates, processor, chunk, **kwargs)
        if kwargs.pop("candidate_weights", None) is not None:
            raise ValueError("candidate_weights choose among candidates, and there is one: pass num_candidates, too.")
        prompt = kwargs.get("input_ids", inputs)
        if knowledge is not None:
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError("Knowledge cannot be spliced into inputs_embeds: pass input_ids with placeholders.")
            if kwargs.get("assistant_model") is not None:
                raise ValueError(
                    "An assistant_model would draft from the placeholders without the knowledge: leave it out. "
                    "prompt_lookup_num_tokens drafts without one."
                )
            kwargs["knowledge"] = knowledge
            if (token_id := self.config.knowledge_token_id) is not None:
                # what the LLM writes must not be taken for a place of knowledge
                suppress = SuppressToken(token_id)
                kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), suppress])
        elif _text_generation_calls():
            logger.warning_once(
                "The text-generation pipeline writes no places for knowledge into its prompts, so the LLM replies "
                'without it. For replies with knowledge import modeling_vikdf and use pipeline("vikdf-dialogue").'
            )
        if knowledge is not None or chunk is not None:
            if (cache := self._read_prompt_once(prompt, config, kwargs, chunk)) is not None:
                kwargs[CACHE] = cache
        if (size := self._static_size(prompt, config, kwargs)) is None:
            return super().generate(inputs, generation_config, **kwargs)
        del kwargs["cache_implementation"]
        with self.static_caches.borrow(self.language_model, *size) as cache:
            kwargs |= {CACHE: cache, "padded_rows": size[0]}
            outputs = super().generate(inputs, generation_config, **kwargs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name != CACHE})

    @functools.cached_property
    def static_caches(self) -> StaticCaches:
        """The caches of `cache_implementation="static"`, kept for the next prompts."""
        return StaticCaches()

    def _static_size(self, prompt: torch.Tensor | None, config: Any, kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Rows and length of the static cache for prompts [B, T]; `None` where none is asked for, or for beams."""
        setting = _settings(config, kwargs)
        if prompt is None or kwargs.get("cache_implementation") != "static" or setting("use_cache") is False:
            return None
        if (setting("num_beams") or 1) > 1 or setting("prompt_lookup_num_tokens") or setting("assistant_model"):
            return None
        length = setting("max_length") or 0
        if (new_tokens := setting("max_new_tokens")) or not length:
            length = prompt.shape[1] + (new_tokens or DEFAULT_NEW_TOKENS)
        rows = len(prompt) * (setting("num_return_sequences") or 1)
        return next_size(rows), next_size(max(length, prompt.shape[1] + 1), SHORTEST)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """The compiled `__call__`; of a padded batch only the given `rows` are returned."""
        compiled = super().get_compiled_call(compile_config)

        def call(rows: int | None = None, **inputs: Any) -> ModelOutput:
            outputs = compiled(**inputs)
            return outputs if rows is None else keep_rows(outputs, rows)

        return call

    def _choose(
        self,
        prompt: torch.Tensor,
        generation_config: Any,
        num_candidates: int,
        processor: Any,
        chunk: int | None,
        streamer: Any = None,
        candidate_weights: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What `generate` returns, of the best among candidates."""
        config = generation_config if generation_config is not None else self.generation_config
        setting = _settings(config, kwargs)
        kept, weights = setting("num_return_sequences") or 1, candidate_weights
        if weights is None:
            weights = setting("candidate_weights") or {}
        if processor is None:
            raise ValueError(
                f"The best of num_candidates={num_candidates} replies is chosen by what it says: pass processor=, the "
                "model's own, or num_candidates=1 for a reply without choice."
            )
        if kept > num_candidates:
            raise ValueError(f"num_return_sequences={kept} are to be chosen from num_candidates={num_candidates}.")
        if refused := [name for name in ("output_attentions", "output_hidden_states") if setting(name)]:
            raise ValueError(f"{' and '.join(refused)}: candidates have no place for these; pass num_candidates=1.")
        ends = [id_ for name in ("eos_token_id", "pad_token_id") if (id_ := setting(name)) is not None]
        ends = torch.cat([torch.tensor(id_).flatten() for id_ in ends]).to(prompt.device)  # [E]
        several = {**kwargs, "num_return_sequences": num_candidates}
        if (cache := self._read_prompt_once(prompt, config, several, chunk)) is not None:
            kwargs[CACHE] = cache
        kwargs |= {"weights": weights, "kept": kept, "generation_config": generation_config}
        outputs = generate_best(self, processor, prompt, num_candidates, ends, **kwargs)
        if streamer is not None:
            streamer.put(prompt.cpu())
            streamer.put(outputs["sequences"][0, prompt.shape[1] :].cpu())
            streamer.end()
        return outputs if setting("return_dict_in_generate") else outputs["sequences"]

    def _read_prompt_once(
        self, input_ids: torch.Tensor | None, config: Any, kwargs: dict[str, Any], chunk: int | None
    ) -> Cache | None:
        """
        The LLM's cache of prompts [B, T] without their last token, copied for the beams or replies of each row.

        Otherwise every copy would read the prompt. `None` where there is one copy, and it is not read in chunks of so
        many tokens, or the caller plans for the cache.
        """
        setting = _settings(config, kwargs)
        copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        planned = [name for name in PLANS if setting(name) not in (None, False)]  # an empty cache is one, too
        planned += ["use_cache=False"] * (setting("use_cache") is False)
        if chunk is not None:
            _check_chunks(chunk, input_ids, planned)
        if copies == 1 and chunk is None or input_ids is None or input_ids.shape[1] < 2 or planned:
            return None
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        positions, last = (mask.cumsum(1) - 1).clamp(min=0), input_ids.shape[1] - 1  # [B, T]
        embeds = self.embed_prompt(input_ids, kwargs.get("knowledge"), kwargs.get("image_mask"))  # [B, T, d_llm]
        cache = None
        for start in range(0, last, chunk or last):
            columns = slice(start, min(start + (chunk or last), last))
            outputs = self.language_model.base_model(
                inputs_embeds=embeds[:, columns],
                attention_mask=mask[:, : columns.stop],
                position_ids=positions[:, columns],
                use_cache=True,
                **{CACHE: cache},
            )
            cache = getattr(outputs, CACHE)
        cache.batch_repeat_interleave(copies)
        return cache

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching takes token ids alone and would ignore the knowledge without a word."""
        raise NotImplementedError(
            "Continuous batching would ignore the knowledge. Use generate(), which batches too; for the LLM without "
            "knowledge call model.language_model.generate_batch()."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def _check_chunks(chunk: int, input_ids: torch.Tensor | None, planned: list[str]) -> None:
    """Raises `ValueError` unless a prompt can be read in chunks of so many tokens."""
    if chunk < 1:
        raise ValueError(f"prefill_chunk_size is a number of tokens, at least 1; got {chunk}.")
    if input_ids is None:
        raise ValueError("prefill_chunk_size reads input_ids in chunks: pass them, or leave it unset.")
    if planned:
        raise ValueError(
            f"prefill_chunk_size reads the prompt into a cache of its own, which {', '.join(planned)} would not use: "
            "leave one of them out."
        )


def _settings(config: Any, kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """What `generate` goes by: the argument of a name, or that of the configuration, or `None`."""
    return lambda name: kwargs.get(name, getattr(config, name, None))


def _pop_candidates(config: Any, kwargs: dict[str, Any]) -> int:
    """
    How many replies are sampled to choose from, taken out of keyword arguments; 1 where nothing is chosen.

    Raises:
        ValueError: unless it is a positive number; if it is asked for and the decoding has no candidates.
    """
    setting, asked = _settings(config, kwargs), kwargs.pop("num_candidates", None)
    number = getattr(config, "num_candidates", None) or 1 if asked is None else asked
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"num_candidates must be a whole number from 1, not {number!r}.")
    searches = not setting("do_sample") or (setting("num_beams") or 1) > 1
    drafts = setting("assistant_model") is not None or setting("prompt_lookup_num_tokens")
    if number > 1 and (searches or drafts):
        if asked is not None:
            raise ValueError(
                f"num_candidates={number} replies are sampled, but the decoding is greedy, a beam search or assisted: "
                "pass do_sample=True, num_beams=1 and no assistant, or num_candidates=1."
            )
        return 1
    return number


def _text_generation_calls() -> bool:
    """
    Whether transformers' own pipeline is the caller.

    Only the frames tell: its arguments are those of a caller who wants the LLM alone, and its user was never asked.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), TextGenerationPipeline):
        frame = frame.f_back
    return frame is not None


class SuppressToken(LogitsProcessor):
    """Keeps one token out of what is generated; transformers' own processor for that costs 40 times as much."""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()  # [B, vocabulary]; the logits may be an output of the generation, too
        scores[:, self.token_id : self.token_id + 1] = -torch.inf  # nothing if the token lies outside
        return scores


__all__ = ["KnowledgeGenerationMixin"]
