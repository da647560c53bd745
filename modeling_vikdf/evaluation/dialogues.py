"""How good are the replies to text dialogues, and is it the knowledge that makes them so?

    dialogues -> prepare (prompts, candidate replies)          -> Example
              -> compute_knowledge, arm_knowledge              -> K [N, n, h]
              -> read_prefixes: the LLM reads each prompt, once for the next two
              -> score_candidates -> perplexity, ranking of the true reply among others
              -> generate_replies -> BLEU, ROUGE-L, Distinct, embedding similarity
              -> summarise (reports.py) -> metrics with 95 % intervals

All work is noted in a `Journal` as it is done, so that an evaluation that was interrupted goes on where it was. Arms
differ in the knowledge alone: a dialogue's own, another's, the mean of all, or none.
"""

import copy
import functools
import hashlib
import json
import logging
import os
import random
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Cache, GenerationConfig

from ..backbones import load_model
from ..data.collators import align_at_knowledge
from ..data.sources import SkipReport, load_dialogues
from ..modeling_backbones import CACHE
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import IGNORED, VikdfProcessor
from .reports import summarise, versions
from .statistics import bootstrap_interval, number_labels


KNOWLEDGE_ARMS = ("own", "shuffled", "mean", "none")
DISTRACTORS = 9  # replies of other dialogues that the true one is ranked among
DECODING = {"num_beams": 3, "no_repeat_ngram_size": 3, "max_new_tokens": 32, "do_sample": False}  # the paper's
END_OF_TURN = 8  # tokens, at most, that a chat template writes behind a reply
MEAN_OF = 1500  # dialogues
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the knowledge's differences from its mean, that remain when it is shrunk
FEWEST_TO_SHRINK = 100  # dialogues, to take the mean of and to choose a share by
WORKERS = 4  # batches at a time on a CPU; more would wait for each other to run their Python
ENCODER_BATCH = 64  # contexts that the text encoder reads at a time
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    knowledge: the arm, one of `KNOWLEDGE_ARMS`.
    system_prompt: replaces the processor's.
    limit: evaluate the first dialogues only; distractors come from all.
    all_references: the perplexity of every reference and not of the first alone.
    ranking, generation: whether to do these, beside the perplexity.
    visual_words: file with a word a line; its words' and the other tokens' likelihood is reported apart.
    word_vectors: file with `word v1 v2 ...` a line, as GloVe's; for the embedding metrics.
    batch_size: dialogues in a batch, and candidates in one.
    seed: of distractors, shuffled knowledge and resamples.
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
    A dialogue as token ids. A candidate is the true reply, another reference or a distractor, in this order.

    prompt: asks for the reply; context: what the text encoder reads; prefix: what the chats with each candidate begin
    with; candidates: what follows the prefix in each, up to the end of the turn; tokens: how many tokens at the end of
    each candidate are the reply's; visual: for each reference to score, which of these belong to visual words.
    """

    key: str
    references: list[str]
    prompt: list[int]
    context: list[int]
    prefix: list[int]
    candidates: list[list[int]]
    tokens: list[int]
    visual: list[list[bool]]


# ---- the whole ----


def evaluate_file(
    model_source: str | Path, data: str | Path, output: str | Path, settings: EvaluationSettings
) -> dict[str, Any]:
    """
    Evaluates a model on a file of dialogues and writes the report, whole or not at all. Finished work is kept in
    `OUTPUT.partial.jsonl` meanwhile; started again after an interruption it goes on from there.

    Args:
        model_source: folder or Hub id of a VIKDF model with its processor.
        data: JSONL of dialogues as [`load_dialogues`] reads them.
        output: JSON file to write.

    Returns:
        The report: what was evaluated (`model`, `data`, their hashes, the settings, `versions`) and what
        [`evaluate_dialogues`] returns.

    Raises:
        OSError: if something cannot be read or written.
        ValueError: if no dialogue is usable, or the unfinished work there is of another evaluation.
    """
    output, report = Path(output), SkipReport()
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name a file to write in it.")
    data_hash = _hash_file(data)
    dialogues = list(load_dialogues(str(data), report=report))
    if settings.limit is not None and settings.limit >= len(dialogues):
        settings = replace(settings, limit=None)  # it leaves nothing out: the same evaluation as without
    model, processor = load_model(model_source)
    files = {name: getattr(settings, name) for name in ("visual_words", "word_vectors")}
    files = {name: path for name, path in files.items() if path is not None}
    identity = {
        "model": "/".join(Path(model_source).parts[-2:]),  # a Hub id as it is; of a folder not where it happens to be
        "weights_sha256": _hash_weights(model),
        "data": Path(data).name,
        "data_sha256": data_hash,
        **asdict(settings),
        **{name: Path(path).name for name, path in files.items()},
        **{f"{name}_sha256": _hash_file(path) for name, path in files.items()},
        "versions": versions(),
    }
    partial = output.with_name(output.name + ".partial.jsonl")
    # word vectors measure replies that are there
    with Journal(partial, {name: value for name, value in identity.items() if "word_vectors" not in name}) as journal:
        figures = evaluate_dialogues(model, processor, dialogues, settings, journal, report)
    # of paths the name alone: where something lies on one machine is of no use on another
    command = ["vikdf", *(Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:])]
    result = {**identity, "command": shlex.join(command), **figures}
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
    journal: "Journal | None" = None,
    report: SkipReport | None = None,
) -> dict[str, Any]:
    """
    Evaluates a model on dialogues.

    Args:
        dialogues: `{"key", "messages", "references"}` as [`load_dialogues`] gives them.
        journal: remembers what is done; by default only as long as this call takes.
        report: gets to know which dialogues are skipped, and knows perhaps of malformed ones.

    Returns:
        `metrics` and `confidence_95`, see [`summarise`]; `num_dialogues`; `skipped`, reason -> number;
        `shortened_prompts` and `shortened_contexts`, how many lost their oldest turns; `dialogues`, the records.

    Raises:
        ValueError: if no dialogue is usable, or there are too few replies to rank among.
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

    def evaluate(batch: list[int]) -> list[dict[str, Any]]:
        some, theirs = [examples[i] for i in batch], None if knowledge is None else knowledge[batch]
        prefixes = read_prefixes(model, processor, some, theirs)
        scores = score_candidates(model, processor, some, settings.batch_size, prefixes)
        split = visual_words is not None
        records = [_likelihood_record(example, each, split) for example, each in zip(some, scores, strict=True)]
        if settings.generation:
            replies = generate_replies(model, processor, some, theirs, prefixes)
            records = [{**record, "reply": reply} for record, reply in zip(records, replies, strict=True)]
        return records

    # the longest first, so that what does not fit into memory fails at once
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
    keys = [example.key for example in examples]
    found = journal.run(functools.partial(work_through, model, evaluate), batches, keys)
    records = [{"key": key, **record} for key, record in zip(keys, found, strict=True)]
    summary = summarise(records, [example.references for example in examples], settings.word_vectors, settings.seed)
    return {**summary, "num_dialogues": len(examples), "skipped": report.counts(), **shortened, "dialogues": records}


def work_through(model: nn.Module, work: Callable[[Any], Any], batches: Sequence[Any]) -> Iterator[Any]:
    """
    What `work` does with the model for each batch, in their order. On a CPU several batches are worked on at a time,
    each by some of the cores, which wait less for each other than if all shared one.
    """
    threads = torch.get_num_threads()
    # an accelerator has its own way to do much at a time, and weights that are moved in and out serve one batch
    alone = model.device.type != "cpu" or hasattr(model, "hf_device_map")
    workers = 1 if alone else min(threads, WORKERS)
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, batches)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the other batches are not begun
        torch.set_num_threads(threads)  # threads that begin later have as many as this one again


class Journal:
    """
    Work that is done, a line of JSON for each dialogue, under a header that says whose work it is.

    Args:
        path: where to keep it; by default in memory alone.
        identity: all that the work depends on.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if it holds work of another identity.
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None):
        self._done: dict[str, dict[str, Any]] = {}
        self._file = None
        if path is None:
            return
        self._file = open(path, "a+b")
        self._file.seek(0)
        # the last line of a process that was killed may be broken off
        lines = [line for line in self._file if line.endswith(b"\n")]
        self._file.truncate(sum(map(len, lines)))
        identity = json.loads(json.dumps(identity))
        if lines:
            found = json.loads(lines[0])
            if changed := [name for name in identity if found.get(name) != identity[name]]:
                self._file.close()
                raise ValueError(
                    f"{path} holds the unfinished work of another evaluation, which differs in {', '.join(changed)}. "
                    "Repeat that one to finish it, delete the file, or choose another output."
                )
        else:
            self._write([identity])
        for line in lines[1:]:
            entry = json.loads(line)
            self._done[entry["key"]] = entry["record"]

    def run(
        self,
        work: Callable[[list[list[int]]], Iterator[list[dict[str, Any]]]],
        batches: list[list[int]],
        keys: list[str],
    ) -> list[dict[str, Any]]:
        """
        The record of each key. Batches that are not done are, whole ones: in another, rounding would be another.

        Args:
            work: batches of indices into keys -> the records of each batch, one after the other.
        """
        left = [batch for batch in batches if not all(keys[i] in self._done for i in batch)]
        done = len(keys) - sum(map(len, left))
        with tqdm(desc="Evaluating", unit=" dialogues", total=len(keys), initial=done) as bar:
            for batch, found in zip(left, work(left), strict=True):
                records = dict(zip([keys[i] for i in batch], found, strict=True))
                self._write([{"key": key, "record": record} for key, record in records.items()])
                self._done |= records
                bar.update(len(batch))
        return [self._done[key] for key in keys]

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()
            if any(error) and not self._done:  # refused before there was any work to go on with
                os.unlink(self._file.name)


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
    The usable dialogues as token ids, and how many prompts and contexts are shortened.

    Raises:
        ValueError: if no dialogue is usable, or there are too few replies to rank among.
    """
    pool = sorted({dialogue["references"][0] for dialogue in dialogues})
    window = getattr(model.config.text_config, "max_position_embeddings", None) or processor.tokenizer.model_max_length
    window = min(window, processor.tokenizer.model_max_length)
    examples, shortened = [], {"shortened_prompts": 0, "shortened_contexts": 0}
    log = logging.getLogger(VikdfProcessor.__module__)
    level = log.level
    log.setLevel(logging.ERROR)  # what is shortened is counted here instead of warned of each time
    try:
        for dialogue in tqdm(dialogues[: settings.limit], desc="Preparing", unit=" dialogues"):
            others = _draw_distractors(dialogue, pool, settings.seed) if settings.ranking else []
            try:
                example, dropped = _prepare(processor, dialogue, others, settings, visual_words, window)
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
    """Replies of other dialogues, drawn from the key alone, so that a limit or another arm changes nothing."""
    draw, own = random.Random(f"{seed}/{dialogue['key']}"), dialogue["references"]
    others = [text for text in draw.sample(pool, min(len(pool), DISTRACTORS + len(own))) if text not in own]
    if len(others) < DISTRACTORS:
        raise ValueError(
            f"Ranking needs {DISTRACTORS} different replies of other dialogues for each, and the data have only "
            f"{len(pool)} altogether. Take more dialogues, or leave the ranking out (--no-ranking)."
        )
    return others[:DISTRACTORS]


def _prepare(
    processor: VikdfProcessor,
    dialogue: dict[str, Any],
    distractors: list[str],
    settings: EvaluationSettings,
    visual_words: set[str] | None,
    window: int,
) -> tuple[Example, tuple[int, int]]:
    """An example, and how many turns its prompt and its context lost; a ValueError says why there is none."""
    messages, references = dialogue["messages"][:-1], dialogue["references"]
    if messages[-1]["role"] != "user":
        raise ValueError("the turn before the reply is not the user's")
    scored = references if settings.all_references else references[:1]
    texts = [*scored, *distractors]
    # room for the longest reply, so that all candidates, and what is generated, follow the same turns
    longest = max(map(len, processor.text_tokenizer(texts, add_special_tokens=False)["input_ids"]))
    room, use_knowledge = max(longest + END_OF_TURN, DECODING["max_new_tokens"]), settings.knowledge != "none"
    asked = processor(messages, use_knowledge=use_knowledge, max_length=window - room)
    head = int(messages[0]["role"] == "system")
    messages = messages[:head] + messages[head + asked.dropped_turns[0] :]
    chats = [[*messages, {"role": "assistant", "content": text}] for text in texts]
    answered = processor(chats, use_knowledge=use_knowledge, max_length=window, return_labels=True)

    whole, starts = [], []  # each chat's ids up to the end of the reply, and where the reply begins
    visual = []
    for row, chat in enumerate(chats):
        real = answered["attention_mask"][row] == 1
        ids, labels = answered["input_ids"][row][real].tolist(), answered["labels"][row][real]
        start, stop = _last_run(labels != IGNORED)
        whole.append(ids[:stop])
        starts.append(start)
        if row < len(scored):
            visual.append([False] * (stop - start))
            if visual_words:
                # without placeholders, and behind them the same tokens
                text, _, offsets = processor.locate_tokens(chat)
                earlier = len(ids) - len(offsets)
                visual[-1] = _touches(offsets[start - earlier : stop - earlier], text, visual_words)
    # a reply's first token is predicted by the one before it, which is therefore not in the prefix
    shared = min(len(os.path.commonprefix(whole)), min(starts) - 1)
    example = Example(
        key=dialogue["key"],
        references=references,
        prompt=asked["input_ids"][0].tolist(),
        context=asked["context_input_ids"][0].tolist() if use_knowledge else [],
        prefix=whole[0][:shared],
        candidates=[ids[shared:] for ids in whole],
        tokens=[len(ids) - start for ids, start in zip(whole, starts, strict=True)],
        visual=visual,
    )
    return example, (asked.dropped_turns[0], asked.dropped_context_turns[0])


def _last_run(labelled: torch.Tensor) -> tuple[int, int]:
    """Beginning and end of the last run of true values [T]: of the last reply, where earlier ones are labelled too."""
    positions = labelled.nonzero().squeeze(1)
    gaps = (positions.diff() > 1).nonzero().squeeze(1)
    return int(positions[gaps[-1] + 1 if len(gaps) else 0]), int(positions[-1]) + 1


def _touches(offsets: list[tuple[int, int]], text: str, words: set[str]) -> list[bool]:
    """Whether the tokens at the offsets share a character with one of the words in the text."""
    spans = [match.span() for match in WORD.finditer(text) if match[0].lower() in words]
    return [any(start < end and stop > begin for begin, end in spans) for start, stop in offsets]


# ---- knowledge ----


@torch.no_grad()
def compute_knowledge(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, contexts: list[list[int]]
) -> torch.Tensor:
    """The knowledge that contexts (ids of the text encoder's tokenizer) evoke, [N, n, h], float32 on the CPU."""
    tokenizer, device = processor.context_tokenizer, model.iqformer.query_tokens.device
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    parts = []
    for start in tqdm(range(0, len(order), ENCODER_BATCH), desc="Knowledge", unit=" batches"):
        rows = [contexts[i] for i in order[start : start + ENCODER_BATCH]]
        ids, mask = _pad(rows, tokenizer.pad_token_id, tokenizer.padding_side, device)  # [B, C]
        parts.append(model.get_text_knowledge(ids, mask).float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def arm_knowledge(
    knowledge: torch.Tensor, arm: str, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> torch.Tensor:
    """
    The knowledge that an arm of an experiment gives to each example.

    Args:
        knowledge: [N, n, h].
        arm: "own"; "shuffled", a derangement, so that each row's knowledge goes to exactly one other row; "mean", the
            mean over the rows for all. The arm "none" has prompts without knowledge (`use_knowledge=False`).
        seed: of the derangement.
        groups: N values; a row never gets the knowledge of a row of its own group (the same photograph, say).

    Returns:
        [N, n, h].

    Raises:
        ValueError: for another arm, or if no derangement exists, because one group has more than half of the rows.
    """
    if arm == "own":
        return knowledge
    if arm == "mean":
        return knowledge.mean(0, keepdim=True).expand_as(knowledge)
    if arm != "shuffled":
        why = "has no knowledge: write its prompts with use_knowledge=False" if arm == "none" else "is unknown"
        raise ValueError(f"The arm {arm!r} {why}; expected one of {', '.join(KNOWLEDGE_ARMS[:-1])}.")
    rows = len(knowledge)
    group = number_labels(range(rows) if groups is None else groups)  # [N]
    sizes = group.bincount()
    if 2 * int(sizes.max()) > rows:
        raise ValueError(f"Cannot shuffle {rows} rows of knowledge of which {int(sizes.max())} are of the same group.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    # groups side by side, in random order: as many places further as the largest has rows, it is another group's
    order = order[torch.randperm(len(sizes), generator=generator)[group[order]].argsort(stable=True)]  # [N]
    source = torch.empty_like(order)
    source[order] = order.roll(int(sizes.max()))
    return knowledge[source.to(knowledge.device)]


def mean_knowledge(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, dialogues: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """The mean [n, h] of the knowledge that the contexts of dialogues evoke, of at most `MEAN_OF` of them."""
    some = random.Random(0).sample(list(dialogues), min(len(dialogues), MEAN_OF))
    examples, _ = prepare(model, processor, some, LIKELIHOOD_ALONE, None, SkipReport())
    return compute_knowledge(model, processor, [example.context for example in examples]).mean(0).to(model.device)


def score_shares(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    dialogues: Sequence[dict[str, Any]],
    mean: torch.Tensor,
) -> dict[float, list[torch.Tensor]]:
    """
    Each share of the knowledge's differences from its mean [n, h] that may remain -> log-likelihoods of the tokens of
    each dialogue's reply, in nats, [tokens] each.
    """
    examples, _ = prepare(model, processor, dialogues, LIKELIHOOD_ALONE, None, SkipReport())
    examples.sort(key=lambda example: -len(example.prompt))
    mean, scores, size = mean.cpu(), {}, LIKELIHOOD_ALONE.batch_size
    own = compute_knowledge(model, processor, [example.context for example in examples])  # [N, n, h]
    for share in SHARES:
        knowledge = mean + share * (own - mean)
        scores[share] = score_replies(model, processor, examples, knowledge, size, f"Share {share}")
    return scores


def choose_share(scores: dict[float, list[torch.Tensor]]) -> dict[str, Any]:
    """
    The share of the knowledge's differences from its mean that should remain. Knowledge is given up only for a gain
    that is clear of zero: from 1 downwards, a share takes the place of a larger one if the 95 % interval of its gain,
    over dialogues, is above zero.

    Args:
        scores: what `score_shares` returns.

    Returns:
        `share`; `gain`, in nats a token over a share of 1, and its `gain_interval`; `nll_by_share`; `dialogues`.

    Raises:
        ValueError: for fewer dialogues than `FEWEST_TO_SHRINK`.
    """
    sums = {share: torch.stack([score.double().sum() for score in each]) for share, each in scores.items()}  # [N]
    tokens = torch.tensor([len(score) for score in scores[1.0]])  # [N]
    require_dialogues(len(tokens), "The validation data")

    def gain_interval(share: float, other: float) -> list[float]:
        return list(bootstrap_interval(sums[share] - sums[other], tokens))

    chosen = 1.0
    for share in sorted(sums, reverse=True):
        if gain_interval(share, chosen)[0] > 0:
            chosen = share
    nlls = {share: (-each.sum() / tokens.sum()).item() for share, each in sums.items()}
    return {
        "share": chosen,
        "gain": nlls[1.0] - nlls[chosen],
        "gain_interval": gain_interval(chosen, 1.0),
        "nll_by_share": nlls,
        "dialogues": len(tokens),
    }


def require_dialogues(count: int, source: str) -> None:
    """Raises a ValueError where a source has too few dialogues to shrink knowledge by."""
    if count < FEWEST_TO_SHRINK:
        raise ValueError(
            f"{source} has {count} usable dialogues, too few to shrink knowledge by: at least {FEWEST_TO_SHRINK} are "
            "needed."
        )


def save_shrunk(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    source: str | Path,
    output: Path,
    stage: dict[str, Any],
) -> None:
    """Saves a model whose knowledge was shrunk, with how it was trained: the recipes of its source, and this stage."""
    from ..cards.facts import write_history

    model.save_pretrained(output)
    processor.save_pretrained(output)
    if (state := Path(source, "trainer_state.json")).is_file():
        shutil.copyfile(state, output / state.name)
    write_history({"stage": "shrink", **stage}, output, source)


# ---- likelihood ----


@torch.no_grad()
def read_prefixes(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    knowledge: torch.Tensor | None,
) -> tuple[Cache, torch.Tensor]:
    """
    What each example's candidates begin with, and what a reply to it is generated from but for its last token.

    Args:
        knowledge: [B, n, h], or `None` for prompts without.

    Returns:
        The LLM's cache of it, and which of the columns are tokens, [B, P].
    """
    device, padding = model.get_input_embeddings().weight.device, processor.tokenizer.pad_token_id
    prefixes, mask = _pad([example.prefix for example in examples], padding, "left", device)  # [B, P]
    if knowledge is not None:
        aligned = align_at_knowledge({"input_ids": prefixes, "attention_mask": mask}, processor)
        prefixes, mask = aligned["input_ids"], aligned["attention_mask"]
    embeds, positions = model.embed_prompt(prefixes, knowledge), (mask.cumsum(1) - 1).clamp(min=0)
    cache, before = None, model.tokens_before_knowledge(prefixes)
    if before:  # what all rows begin with, a system prompt, is read in one of them
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
    Log-likelihoods of candidate replies, in nats. Candidates are read from copies of the cache of what they begin
    with, those of similar length together, which wastes little on padding.

    Args:
        batch_size: candidates at a time.
        prefixes: of the examples, from [`read_prefixes`].

    Returns:
        For each example and candidate those of the reply's tokens, its end of turn included, [tokens], float32.
    """
    (cache, mask), padding = prefixes, processor.tokenizer.pad_token_id  # mask [B, P]
    device = mask.device
    scores: list[list[Any]] = [[None] * len(example.candidates) for example in examples]
    rows = [(b, c) for b, example in enumerate(examples) for c in range(len(example.candidates))]
    rows.sort(key=lambda row: len(examples[row[0]].candidates[row[1]]))
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        candidates = [examples[b].candidates[c] for b, c in some]
        # the last token is predicted and need not be read
        ids, ids_mask = _pad([ids[:-1] for ids in candidates], padding, "right", device)  # [R, S]
        owners = torch.tensor([b for b, _ in some], device=device)
        past, past_mask = select_rows(cache, owners), mask[owners]  # [R, P]
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([past_mask, ids_mask], dim=1),
            position_ids=past_mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device),
            **{CACHE: past},
        ).logits  # [R, S, vocabulary]
        for (b, c), ids, predicted in zip(some, candidates, logits, strict=True):
            tokens = examples[b].tokens[c]
            targets = torch.tensor(ids[-tokens:], device=predicted.device)
            # row by row in float32, which of all rows at once would take much memory
            predicted = predicted[len(ids) - 1 - tokens : len(ids) - 1].float()  # [tokens, vocabulary]
            scores[b][c] = -nn.functional.cross_entropy(predicted, targets, reduction="none").cpu()
    return scores


def score_replies(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: list[Example],
    knowledge: torch.Tensor,
    batch_size: int,
    name: str,
) -> list[torch.Tensor]:
    """
    Log-likelihoods of the tokens of each example's only candidate, in nats, [tokens] each.

    Args:
        knowledge: [N, n, h].
        name: what the progress bar says.
    """

    def score(start: int) -> list[torch.Tensor]:
        some = slice(start, start + batch_size)
        prefixes = read_prefixes(model, processor, examples[some], knowledge[some])
        return [each for [each] in score_candidates(model, processor, examples[some], batch_size, prefixes)]

    starts = range(0, len(examples), batch_size)
    scored = tqdm(work_through(model, score, starts), desc=name, unit=" batches", total=len(starts))
    return [each for batch in scored for each in batch]


def select_rows(past: Cache, rows: torch.Tensor) -> Cache:
    """A cache of its own of some rows; selecting replaces each layer's tensors and leaves the old ones as they are."""
    selected = copy.copy(past)
    selected.layers = [copy.copy(layer) for layer in past.layers]
    selected.batch_select_indices(rows)
    return selected


def _likelihood_record(example: Example, scores: list[torch.Tensor], split: bool) -> dict[str, Any]:
    """Sums over an example's references, in nats and tokens, and the rank of the first among the distractors."""
    references = [-each.double() for each in scores[: len(example.visual)]]
    nll = torch.cat(references)
    record = {
        "nll": nll.sum().item(),
        "tokens": len(nll),
        "mean_nll": sum(each.mean().item() for each in references),
        "examples": len(references),
    }
    if split:
        visual = torch.tensor([token for each in example.visual for token in each])
        record["visual_nll"], record["visual_tokens"] = nll[visual].sum().item(), int(visual.sum())
        record["other_nll"], record["other_tokens"] = nll[~visual].sum().item(), int((~visual).sum())
    if distractors := scores[len(example.visual) :]:
        own = scores[0].double().mean()
        # a tie counts against the model
        record["rank"] = 1 + sum(not each.double().mean() < own for each in distractors)
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
    Replies by the paper's beam search (`DECODING`).

    Args:
        knowledge: [B, n, h], or `None` for prompts without.
        prefixes: of the examples, from [`read_prefixes`], if they have been read.
    """
    tokenizer, device = processor.tokenizer, model.get_input_embeddings().weight.device
    theirs = model.generation_config
    config = GenerationConfig(
        **DECODING,
        eos_token_id=theirs.eos_token_id,
        bos_token_id=theirs.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids, mask = _pad([example.prompt for example in examples], tokenizer.pad_token_id, "left", device)  # [B, T]
    read = {}
    # a template may ask for a reply otherwise than it writes one that is there
    if prefixes is not None and all(example.prompt[:-1] == example.prefix for example in examples):
        past, past_mask = prefixes
        beams = torch.arange(len(examples), device=device).repeat_interleave(DECODING["num_beams"])
        read[CACHE] = select_rows(past, beams)
        mask = nn.functional.pad(past_mask, (0, 1), value=1)  # [B, P + 1], as the cache has its columns
        ids = nn.functional.pad(ids, (mask.shape[1] - ids.shape[1], 0), value=tokenizer.pad_token_id)
    written = model.generate(input_ids=ids, attention_mask=mask, knowledge=knowledge, generation_config=config, **read)
    replies = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


# ---- helpers ----


def _pad(rows: list[list[int]], value: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one tensor [B, longest], and their mask [B, longest]."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, value, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    return ids.to(device), mask.to(device)


def _hash_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_weights(model: VikdfForConditionalGeneration) -> str:
    """Of what was trained, and the names of the backbones."""
    digest = hashlib.sha256(json.dumps(model.config.backbones, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = [
    "KNOWLEDGE_ARMS",
    "EvaluationSettings",
    "Journal",
    "arm_knowledge",
    "compute_knowledge",
    "evaluate_dialogues",
    "evaluate_file",
    "generate_replies",
    "mean_knowledge",
    "read_prefixes",
    "save_shrunk",
    "require_dialogues",
    "score_candidates",
    "score_shares",
    "score_replies",
    "work_through",
]
