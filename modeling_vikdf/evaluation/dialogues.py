"""Evaluates replies to text dialogues, with the dialogue's own knowledge or that of a control arm.

    dialogues -> prepare (prompts, candidate replies)          -> Example
              -> compute_knowledge, arm_knowledge              -> K [N, n, h]
              -> prefill: the LLM reads each prompt, once for the next two steps
              -> score_candidates -> perplexity, ranking of the true reply among others
              -> generate_replies -> BLEU, ROUGE-L, Distinct, embedding similarity
              -> summarise (reports.py) -> metrics with 95 % intervals

Finished work is recorded in a `Journal` (journal.py), so that an interrupted evaluation resumes where it stopped. Arms
(arms.py) differ only in knowledge: a dialogue's own, another's, the mean of all, or none. This module computes each
dialogue's sums and ranks; reports.py turns them into metrics.
"""

import copy
import functools
import json
import logging
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, GenerationConfig

from ..building import load_model
from ..data.collators import align_at_knowledge
from ..data.dialogues import load_dialogues
from ..data.sources import SkipReport
from ..modeling_prefix import CACHE, select_rows
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import IGNORED, VikdfProcessor
from .arms import KNOWLEDGE_ARMS, arm_knowledge, compute_knowledge, pad_rows
from .journal import Journal, hash_file, identify
from .reports import REPORT_VERSION, summarise


DISTRACTORS = 9  # replies of other dialogues among which the true one is ranked
DECODING = {"num_beams": 3, "no_repeat_ngram_size": 3, "max_new_tokens": 32, "do_sample": False}  # the paper's
REPLY_TOKENS = 12  # of a usual reply, by which batches of candidates are measured
END_OF_TURN = 8  # maximum number of tokens that a chat template writes after a reply
WORKERS = 4  # batches at a time on a CPU; more would contend for the interpreter
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    Settings of an evaluation.

    Args:
        knowledge: the arm, one of `KNOWLEDGE_ARMS`.
        system_prompt: replaces the processor's.
        limit: number of dialogues to evaluate, from the first; distractors are drawn from all.
        all_references: whether perplexity covers every reference instead of only the first.
        ranking: whether to rank the true reply among distractors.
        generation: whether to generate replies.
        visual_words: file with one word per line; the likelihoods of these words and of the other tokens are reported
            separately.
        word_vectors: file with `word v1 v2 ...` per line, like GloVe's; for the embedding metrics.
        batch_size: dialogues per batch, and candidates of usual length per batch.
        seed: of distractors, shuffled knowledge and resamples.

    Raises:
        ValueError: for an unknown arm, or a limit or batch size below 1.
    """

    knowledge: str = "own"
    system_prompt: str | None = None
    limit: int | None = None
    all_references: bool = False
    ranking: bool = True
    generation: bool = True
    visual_words: str | None = None
    word_vectors: str | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.knowledge not in KNOWLEDGE_ARMS:
            raise ValueError(f"knowledge must be one of {', '.join(KNOWLEDGE_ARMS)}, not {self.knowledge!r}.")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")


LIKELIHOOD_ALONE = EvaluationSettings(ranking=False, generation=False)


@dataclass
class Example:
    """
    A dialogue as token ids. Candidates are the true reply, further references and distractors, in this order.

    prompt: up to the reply to generate; context: the text encoder's input; prefix: common beginning of the chats with
    each candidate; candidates: continuation of the prefix in each, up to the end of the turn; tokens: number of
    tokens at the end of each candidate that are the reply's; visual: for each scored reference, which of these belong
    to visual words.
    """

    key: str
    references: list[str]
    prompt: list[int]
    context: list[int]
    prefix: list[int]
    candidates: list[list[int]]
    tokens: list[int]
    visual: list[list[bool]]


# ---- evaluation ----


def evaluate_file(
    model_source: str | Path, data: str | Path, output: str | Path, settings: EvaluationSettings
) -> dict[str, Any]:
    """
    Evaluates a model on a file of dialogues and writes the report atomically.

    Until then finished work is kept in `OUTPUT.partial.jsonl`, from which a run after an interruption resumes.

    Args:
        model_source: folder or Hub id of a VIKDF model with its processor.
        data: JSON Lines of dialogues as [`load_dialogues`] reads them.
        output: JSON file to write.
        settings: what to evaluate, and how.

    Returns:
        The report: its `kind`, "dialogues", and `version`; its identity (`model`, `data`, their hashes, the settings,
        `versions`); the `command`; and the result of [`evaluate_dialogues`].

    Raises:
        OSError: if something cannot be read or written.
        ValueError: if no dialogue is usable, or the unfinished work belongs to another evaluation.
    """
    output, report = Path(output), SkipReport()
    if output.is_dir():
        raise IsADirectoryError(f"Expected a file to write, but {output} is a folder.")
    data_hash = hash_file(data)
    dialogues = list(load_dialogues(str(data), report=report))
    if settings.limit is not None and settings.limit >= len(dialogues):
        settings = replace(settings, limit=None)  # it excludes nothing: the same evaluation as without
    model, processor = load_model(model_source)
    identity = identify(model_source, model, data, data_hash, asdict(settings))
    partial = output.with_name(output.name + ".partial.jsonl")
    # word vectors only affect metrics of finished replies
    with Journal(partial, {name: value for name, value in identity.items() if "word_vectors" not in name}) as journal:
        figures = evaluate_dialogues(model, processor, dialogues, settings, journal, report)
    # file names without folders, which mean nothing on another machine
    command = ["vikdf", *(Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:])]
    result = {"kind": "dialogues", "version": REPORT_VERSION, **identity, "command": shlex.join(command), **figures}
    unfinished = output.with_name(output.name + ".tmp")
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, output)
    partial.unlink()
    return result


def evaluate_dialogues(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    dialogues: Sequence[dict[str, Any]],
    settings: EvaluationSettings | None = None,
    journal: Journal | None = None,
    report: SkipReport | None = None,
) -> dict[str, Any]:
    """
    Evaluates a model on dialogues.

    Args:
        model: the dialogue model.
        processor: its processor.
        dialogues: `{"key", "messages", "references"}` as from [`load_dialogues`].
        settings: what to evaluate, and how.
        journal: records finished work; by default in memory, for this call only.
        report: records skipped dialogues; may already contain malformed ones.

    Returns:
        `metrics` and `confidence_95`, see [`summarise`]; `num_dialogues`; `skipped`, reason -> number;
        `shortened_prompts` and `shortened_contexts`, the numbers that lost their oldest turns; `dialogues`, the
        records.

    Raises:
        ValueError: if no dialogue is usable, or there are too few distractors.
    """
    settings, journal, report = settings or EvaluationSettings(), journal or Journal(), report or SkipReport()
    visual_words = None
    if settings.visual_words is not None:
        visual_words = set(Path(settings.visual_words).read_text(encoding="utf-8").lower().split())
    processor = copy.copy(processor)
    if settings.system_prompt is not None:
        processor.system_prompt = settings.system_prompt
    model.eval()
    examples, shortened = prepare(model, processor, dialogues, settings, visual_words, report)

    knowledge = None
    if settings.knowledge != "none":
        knowledge = compute_knowledge(model, processor, [example.context for example in examples])  # [N, n, h]
        # the same context evokes the same knowledge
        groups = [tuple(example.context) for example in examples]
        knowledge = arm_knowledge(knowledge, settings.knowledge, settings.seed, groups)

    def evaluate(indices: list[int]) -> list[dict[str, Any]]:
        batch, vectors = [examples[i] for i in indices], None if knowledge is None else knowledge[indices]
        prefixes = prefill(model, processor, batch, vectors)
        scores = score_candidates(model, processor, batch, settings.batch_size, prefixes)
        split = visual_words is not None
        records = [_likelihood_record(example, row, split) for example, row in zip(batch, scores, strict=True)]
        if settings.generation:
            replies = generate_replies(model, processor, batch, vectors, prefixes)
            records = [{**record, "reply": reply} for record, reply in zip(records, replies, strict=True)]
        return records

    # the longest first, so that running out of memory happens at once
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
    keys = [example.key for example in examples]
    finished = journal.run(functools.partial(map_batches, model, evaluate), batches, keys)
    records = [{"key": key, **record} for key, record in zip(keys, finished, strict=True)]
    summary = summarise(records, [example.references for example in examples], settings.word_vectors, settings.seed)
    return {**summary, "num_dialogues": len(examples), "skipped": report.counts(), **shortened, "dialogues": records}


def map_batches(model: nn.Module, work: Callable[[Any], Any], batches: Sequence[Any]) -> Iterator[Any]:
    """
    Yields `work(batch)` for each batch, in order.

    On a CPU several batches run concurrently, each on a share of the cores, which is faster than all cores on one
    batch.
    """
    threads = torch.get_num_threads()
    # an accelerator is already parallel, and offloaded weights serve one batch at a time
    sequential = model.device.type != "cpu" or hasattr(model, "hf_device_map")
    workers = 1 if sequential else min(threads, WORKERS)
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, batches)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error no further batch starts
        torch.set_num_threads(threads)  # later threads inherit the full number again


# ---- dialogues -> examples ----


def prepare(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    dialogues: Sequence[dict[str, Any]],
    settings: EvaluationSettings,
    visual_words: set[str] | None,
    report: SkipReport,
) -> tuple[list[Example], dict[str, int]]:
    """
    Tokenizes the usable dialogues.

    Args:
        model: its LLM's window limits the prompts.
        processor: tokenizes prompts, contexts and candidates.
        dialogues: `{"key", "messages", "references"}`.
        settings: what will be evaluated.
        visual_words: lower-case words to mark in the references, or `None`.
        report: records unusable dialogues.

    Returns:
        The examples, and the numbers `shortened_prompts` and `shortened_contexts`.

    Raises:
        ValueError: if no dialogue is usable, or there are too few distractors.
    """
    pool = sorted({dialogue["references"][0] for dialogue in dialogues})
    window = getattr(model.config.text_config, "max_position_embeddings", None) or processor.tokenizer.model_max_length
    window = min(window, processor.tokenizer.model_max_length)
    examples, shortened = [], {"shortened_prompts": 0, "shortened_contexts": 0}
    log = logging.getLogger(VikdfProcessor.__module__)
    level = log.level
    log.setLevel(logging.ERROR)  # shortened prompts are counted here instead of warned about one by one
    try:
        for dialogue in tqdm(dialogues[: settings.limit], desc="Preparing", unit=" dialogues"):
            others = _draw_distractors(dialogue, pool, settings.seed) if settings.ranking else []
            try:
                example, dropped = _prepare_example(processor, dialogue, others, settings, visual_words, window)
            except ValueError as error:
                report.add("unusable dialogue", dialogue["key"], str(error))
            else:
                examples.append(example)
                for name, turns in zip(shortened, dropped, strict=True):
                    shortened[name] += turns > 0
    finally:
        log.setLevel(level)
    if not examples:
        raise ValueError(f"None of {len(dialogues)} dialogues is usable. {report.summary()}")
    return examples, shortened


def _draw_distractors(dialogue: dict[str, Any], pool: list[str], seed: int) -> list[str]:
    """Replies of other dialogues; they depend on the key and the seed only, not on the limit or the arm."""
    rng, own = random.Random(f"{seed}/{dialogue['key']}"), dialogue["references"]
    others = [text for text in rng.sample(pool, min(len(pool), DISTRACTORS + len(own))) if text not in own]
    if len(others) < DISTRACTORS:
        raise ValueError(
            f"Ranking needs {DISTRACTORS} different replies of other dialogues for each dialogue, but the data have "
            f"only {len(pool)} in all. Use more dialogues, or skip the ranking (--no-ranking)."
        )
    return others[:DISTRACTORS]


def _prepare_example(
    processor: VikdfProcessor,
    dialogue: dict[str, Any],
    distractors: list[str],
    settings: EvaluationSettings,
    visual_words: set[str] | None,
    window: int,
) -> tuple[Example, tuple[int, int]]:
    """An example, and the numbers of turns dropped from prompt and context; a ValueError if it is unusable."""
    messages, references = dialogue["messages"][:-1], dialogue["references"]
    if messages[-1]["role"] != "user":
        raise ValueError("the turn before the reply is not the user's")
    scored = references if settings.all_references else references[:1]
    texts = [*scored, *distractors]
    # room for the longest reply, so that all candidates, and the generated reply, follow the same turns
    longest = max(map(len, processor.text_tokenizer(texts, add_special_tokens=False)["input_ids"]))
    room, use_knowledge = max(longest + END_OF_TURN, DECODING["max_new_tokens"]), settings.knowledge != "none"
    prompt = processor(messages, use_knowledge=use_knowledge, max_length=window - room)
    head = int(messages[0]["role"] == "system")
    messages = messages[:head] + messages[head + prompt.dropped_turns[0] :]
    chats = [[*messages, {"role": "assistant", "content": text}] for text in texts]
    answered = processor(chats, use_knowledge=use_knowledge, max_length=window, return_labels=True)

    rows, starts, visual = [], [], []  # each chat's ids up to the end of the reply, and the reply's position in them
    for row, chat in enumerate(chats):
        real = answered["attention_mask"][row] == 1
        ids, labels = answered["input_ids"][row][real].tolist(), answered["labels"][row][real]
        start, stop = _last_run(labels != IGNORED)
        rows.append(ids[:stop])
        starts.append(start)
        if row < len(scored):
            visual.append([False] * (stop - start))
            if visual_words:
                # located without placeholders; the tokens after these are the same
                text, _, offsets = processor.locate_tokens(chat)
                earlier = len(ids) - len(offsets)
                visual[-1] = _touches(offsets[start - earlier : stop - earlier], text, visual_words)
    example = Example(
        key=dialogue["key"],
        references=references,
        prompt=prompt["input_ids"][0].tolist(),
        context=prompt["context_input_ids"][0].tolist() if use_knowledge else [],
        visual=visual,
        **continue_prefix(rows, starts),
    )
    return example, (prompt.dropped_turns[0], prompt.dropped_context_turns[0])


def continue_prefix(rows: list[list[int]], starts: list[int]) -> dict[str, Any]:
    """What an [`Example`] says of chats, given as ids up to the end of a reply, and of where the replies start."""
    # the token before a reply predicts its first one, so it is not part of the prefix
    shared = min(len(os.path.commonprefix(rows)), min(starts) - 1)
    return {
        "prefix": rows[0][:shared],
        "candidates": [ids[shared:] for ids in rows],
        "tokens": [len(ids) - start for ids, start in zip(rows, starts, strict=True)],
    }


def _last_run(labelled: torch.Tensor) -> tuple[int, int]:
    """Start and end of the last run of true values [T]: the last reply, if earlier ones are labelled, too."""
    positions = labelled.nonzero().squeeze(1)
    gaps = (positions.diff() > 1).nonzero().squeeze(1)
    return int(positions[gaps[-1] + 1 if len(gaps) else 0]), int(positions[-1]) + 1


def _touches(offsets: list[tuple[int, int]], text: str, words: set[str]) -> list[bool]:
    """For each token's span in the text, whether it overlaps an occurrence of one of the words."""
    spans = [match.span() for match in WORD.finditer(text) if match[0].lower() in words]
    return [any(start < end and stop > begin for begin, end in spans) for start, stop in offsets]


# ---- likelihood ----


@torch.no_grad()
def prefill(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    knowledge: torch.Tensor | None,
) -> tuple[Cache, torch.Tensor]:
    """
    Reads the prefix that each example's candidates share: usually all but the last token of its prompt.

    Args:
        model: the dialogue model.
        processor: its processor.
        examples: B examples.
        knowledge: [B, n, h], or `None` for prompts without knowledge.

    Returns:
        The LLM's cache, and the mask of its columns, [B, P].
    """
    device, padding = model.get_input_embeddings().weight.device, processor.tokenizer.pad_token_id
    prefixes, mask = pad_rows([example.prefix for example in examples], padding, "left", device)  # [B, P]
    if knowledge is not None:
        aligned = align_at_knowledge({"input_ids": prefixes, "attention_mask": mask}, processor)
        prefixes, mask = aligned["input_ids"], aligned["attention_mask"]
    embeds, positions = model.embed_prompt(prefixes, knowledge), (mask.cumsum(1) - 1).clamp(min=0)
    cache, before = None, model.tokens_before_knowledge(prefixes)
    if before:  # a beginning that all rows share, such as a system prompt, is read once
        cache = model.read_prefix(embeds[:, :before], mask, positions)
    outputs = model.language_model.base_model(
        inputs_embeds=embeds[:, before:],
        attention_mask=mask,
        position_ids=positions[:, before:],
        use_cache=True,
        **{CACHE: cache},
    )
    return getattr(outputs, CACHE), mask


@torch.no_grad()
def score_candidates(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    batch_size: int,
    prefixes: tuple[Cache, torch.Tensor],
) -> list[list[torch.Tensor]]:
    """
    Log-likelihoods of candidate replies, in nats.

    Candidates continue copies of their prefix's cache, in batches of like lengths with little padding.

    Args:
        model: the dialogue model.
        processor: its processor.
        examples: B examples.
        batch_size: candidates of usual length per batch; of longer ones there are fewer, of shorter ones more.
        prefixes: the examples' prefixes, from [`prefill`].

    Returns:
        For each example and candidate the log-likelihoods of the reply's tokens, end of turn included: [tokens],
        float32 on the CPU.
    """
    (cache, mask), padding = prefixes, processor.tokenizer.pad_token_id  # mask [B, P]
    device = mask.device
    scores: list[list[Any]] = [[None] * len(example.candidates) for example in examples]
    rows = [(b, c) for b, example in enumerate(examples) for c in range(len(example.candidates))]
    lengths = [len(examples[b].candidates[c]) for b, c in rows]
    for indices in batch_by_tokens(lengths, batch_size * REPLY_TOKENS):
        batch = [rows[i] for i in indices]
        candidates = [examples[b].candidates[c] for b, c in batch]
        # the last token is only predicted
        ids, ids_mask = pad_rows([ids[:-1] for ids in candidates], padding, "right", device)  # [R, S]
        owners = torch.tensor([b for b, _ in batch], device=device)
        past, past_mask = select_rows(cache, owners), mask[owners]  # [R, P]
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([past_mask, ids_mask], dim=1),
            position_ids=past_mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device),
            **{CACHE: past},
        ).logits  # [R, S, vocabulary]
        for (b, c), ids, predicted in zip(batch, candidates, logits, strict=True):
            tokens = examples[b].tokens[c]
            targets = torch.tensor(ids[-tokens:], device=predicted.device)
            # converted to float32 row by row to save memory
            predicted = predicted[len(ids) - 1 - tokens : len(ids) - 1].float()  # [tokens, vocabulary]
            scores[b][c] = -nn.functional.cross_entropy(predicted, targets, reduction="none").cpu()
    return scores


def batch_by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yields indices of rows in batches of like lengths, the longest first; padded, each has at most `tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // max(1, lengths[order[0]]))  # a row that is longer than that is alone
        yield order[:size]
        order = order[size:]


def score_replies(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    knowledge: torch.Tensor,
    batch_size: int,
    name: str,
) -> list[torch.Tensor]:
    """
    Log-likelihoods of each example's only candidate, in nats.

    Args:
        model: the dialogue model.
        processor: its processor.
        examples: N examples with one candidate each.
        knowledge: [N, n, h].
        batch_size: examples per batch.
        name: label of the progress bar.

    Returns:
        For each example the log-likelihoods of the reply's tokens [tokens], float32 on the CPU.
    """

    def score(start: int) -> list[torch.Tensor]:
        rows = slice(start, start + batch_size)
        prefixes = prefill(model, processor, examples[rows], knowledge[rows])
        return [scores for [scores] in score_candidates(model, processor, examples[rows], batch_size, prefixes)]

    starts = range(0, len(examples), batch_size)
    scored = tqdm(map_batches(model, score, starts), desc=name, unit=" batches", total=len(starts))
    return [scores for batch in scored for scores in batch]


def _likelihood_record(example: Example, scores: list[torch.Tensor], split: bool) -> dict[str, Any]:
    """Sums over an example's references, in nats and tokens, and the first one's rank among the distractors."""
    references = [-reference.double() for reference in scores[: len(example.visual)]]
    nll = torch.cat(references)
    record = {
        "nll": nll.sum().item(),
        "tokens": len(nll),
        "mean_nll": sum(reference.mean().item() for reference in references),
        "examples": len(references),
    }
    if split:
        visual = torch.tensor([token for reference in example.visual for token in reference])
        record["visual_nll"], record["visual_tokens"] = nll[visual].sum().item(), int(visual.sum())
        record["other_nll"], record["other_tokens"] = nll[~visual].sum().item(), int((~visual).sum())
    if distractors := scores[len(example.visual) :]:
        own = scores[0].double().mean()
        # a tie counts against the model
        record["rank"] = 1 + sum(not other.double().mean() < own for other in distractors)
        record["hits_at_1"], record["mrr"] = float(record["rank"] == 1), 1 / record["rank"]
    return record


# ---- generation ----


def generate_replies(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    knowledge: torch.Tensor | None,
    prefixes: tuple[Cache, torch.Tensor] | None = None,
) -> list[str]:
    """
    Generates a reply to each prompt by the paper's beam search (`DECODING`).

    Args:
        model: the dialogue model.
        processor: its processor.
        examples: B examples.
        knowledge: [B, n, h], or `None` for prompts without knowledge.
        prefixes: the examples' prefixes from [`prefill`], if already read.
    """
    tokenizer, device = processor.tokenizer, model.get_input_embeddings().weight.device
    defaults = model.generation_config
    config = GenerationConfig(
        **DECODING,
        eos_token_id=defaults.eos_token_id,
        bos_token_id=defaults.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids, mask = pad_rows([example.prompt for example in examples], tokenizer.pad_token_id, "left", device)  # [B, T]
    read = {}
    # a template may render a generation prompt differently from the beginning of a reply
    if prefixes is not None and all(example.prompt[:-1] == example.prefix for example in examples):
        past, past_mask = prefixes
        beams = torch.arange(len(examples), device=device).repeat_interleave(DECODING["num_beams"])
        read[CACHE] = select_rows(past, beams)
        mask = nn.functional.pad(past_mask, (0, 1), value=1)  # [B, P + 1], aligned with the cache
        ids = nn.functional.pad(ids, (mask.shape[1] - ids.shape[1], 0), value=tokenizer.pad_token_id)
    written = model.generate(input_ids=ids, attention_mask=mask, knowledge=knowledge, generation_config=config, **read)
    replies = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


__all__ = [
    "EvaluationSettings",
    "evaluate_dialogues",
    "evaluate_file",
    "generate_replies",
    "prefill",
    "score_candidates",
    "score_replies",
    "map_batches",
]
