"""Visual probes: does the knowledge say what things look like? Multiple choice by the likelihood of each choice.

    JSONL, templates -> items: questions, beginnings of replies, choices                       probe_items.py
                     -> log P of every choice under every arm of knowledge                     `choice_log_likelihoods`
                     -> scores `raw` and `pmi` -> accuracy and so on, one record per item      `probe`
                     -> means, intervals, own minus other knowledge; one model minus another   `compare_probes`

The user's turn holds the question, with the knowledge where the processor puts it; the assistant's reply begins with a
cloze ("The color of the banana is") or with nothing, followed by a choice. The question is the same in all arms, so
they differ only in knowledge.
"""

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling_prefix import CACHE, select_rows
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor, pad
from .arms import KNOWLEDGE_ARMS, arm_knowledge
from .probe_items import NEGATIVES, ProbeItem, Question
from .reports import REPORT_VERSION
from .statistics import bootstrap_interval, paired_randomisation, rank_correlation


SCORES = ("raw", "pmi")


# ---- likelihoods ----


@torch.no_grad()
def choice_log_likelihoods(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    questions: Sequence[Question],
    choices: Sequence[tuple[str, ...]],
    knowledge: Sequence[torch.Tensor | None],
    batch_size: int = 32,
    progress: bool = True,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Scores choices by log P(choice | question, knowledge, beginning of the reply), summed over the choice's tokens.

    Tokens after the choice, such as the end of the turn, are not scored.

    Args:
        model: the dialogue model.
        processor: its processor.
        questions: N questions, with b beginnings each.
        choices: c choices for each question; b and c may differ between questions.
        knowledge: knowledge [n, h] for each question; `None` for the bare LLM.
        batch_size: prompts, and then replies, per batch.
        progress: whether to show a progress bar.

    Returns:
        For each question the log-likelihoods in nats, float32, and the numbers of tokens, of its choices: [b, c] each.

    Raises:
        ValueError: if a question does not fit the processor, or its chat template begins a reply differently from how
            it asks for one.
    """
    encode = cache(lambda question, choices: _encode_replies(processor, question, choices))  # once for all arms

    @cache
    def prompt(chat: tuple[tuple[str, str], ...], use_knowledge: bool) -> torch.Tensor:
        return processor(Question(chat).messages, use_knowledge=use_knowledge)["input_ids"][0]  # [P]

    # Prompts of equal length need no padding; with and without knowledge they are batched apart.
    prompts = [
        prompt(question.chat, vectors is not None) for question, vectors in zip(questions, knowledge, strict=True)
    ]
    groups = defaultdict(list)
    for index, ids in enumerate(prompts):
        groups[len(ids), knowledge[index] is None].append(index)
    batches = [
        group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)
    ]
    results: list[Any] = [None] * len(prompts)
    training = model.training
    model.eval()  # without dropout
    with tqdm(total=len(prompts), unit=" prompts", desc="Scoring", disable=not progress) as bar:
        for batch in batches:
            replies = [encode(questions[index], tuple(choices[index])) for index in batch]
            vectors = None
            if knowledge[batch[0]] is not None:
                vectors = torch.stack([knowledge[index] for index in batch])  # [B, n, h]
            sums = _score(model, torch.stack([prompts[index] for index in batch]), vectors, replies, batch_size)
            sums_by_question = sums.split([len(question_replies) for question_replies in replies])
            for index, log_p, question_replies in zip(batch, sums_by_question, replies, strict=True):
                shape = len(questions[index].beginnings), len(choices[index])
                counts = torch.tensor([count for _, count in question_replies])
                results[index] = log_p.view(shape), counts.view(shape)
            bar.update(len(batch))
    model.train(training)
    return results


def _encode_replies(
    processor: VikdfProcessor, question: Question, choices: tuple[str, ...]
) -> list[tuple[tuple[int, ...], int]]:
    """For each beginning and choice the reply's ids, as in training, and the choice's number of tokens at its end."""
    prompt = processor(question.messages, use_knowledge=False)["input_ids"][0].tolist()
    pairs = itertools.product(question.beginnings, choices)
    endings = [(beginning, f" {choice}" if beginning else choice) for beginning, choice in pairs]
    chats = [
        [*question.messages, {"role": "assistant", "content": beginning + choice}] for beginning, choice in endings
    ]
    replies = []
    for chat, (beginning, choice) in zip(chats, endings, strict=True):
        text, ids, offsets = processor.locate_tokens(chat, continue_final_message=True)
        if ids[: len(prompt)] != prompt or not text.endswith(choice):
            raise ValueError(
                f"The chat template renders the reply {choice!r} differently from how it continues the prompt for it, "
                "so its tokens cannot be identified. Pass the processor another chat_template=."
            )
        start = len(text) - len(choice) if beginning else 0
        count = sum(end > start for _, end in offsets[len(prompt) :])
        replies.append((tuple(ids[len(prompt) :]), count))
    return replies


def _score(
    model: VikdfForConditionalGeneration,
    prompts: torch.Tensor,
    knowledge: torch.Tensor | None,
    replies: list[list[tuple[tuple[int, ...], int]]],
    batch_size: int,
) -> torch.Tensor:
    """
    Log-likelihoods of the choices in all replies to each prompt [B, P], concatenated.

    Each prompt is read once. A reply's last token is predicted but not read, so replies that differ only in it, or
    are a prefix of another, share a row.
    """
    embed = model.get_input_embeddings()
    device = embed.weight.device
    embeds = model.embed_prompt(prompts.to(device), knowledge)  # [B, P, d]
    past = model.read_prefix(embeds[:, :-1], torch.ones_like(prompts, device=device), None)
    rows: list[tuple[int, tuple[int, ...]]] = []  # (prompt, tokens to read after it)
    targets = defaultdict(list)  # row -> (column, token that the column predicts, reply)
    number = itertools.count()
    for index, prompt_replies in enumerate(replies):
        read = sorted({ids[:-1] for ids, _ in prompt_replies})
        read = [ids for i, ids in enumerate(read) if i + 1 == len(read) or read[i + 1][: len(ids)] != ids]
        for ids, count in prompt_replies:
            row, reply = len(rows) + bisect_left(read, ids[:-1]), next(number)
            # column 0 is the prompt's last token, so column t predicts the reply's token t
            targets[row] += [(t, ids[t], reply) for t in range(len(ids) - count, len(ids))]
        rows += [(index, ids) for ids in read]
    sums = torch.zeros(next(number), device=device)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        batch_targets = [(i, *target) for i, row in enumerate(batch) for target in targets[row]]
        i, column, token, reply = torch.tensor(batch_targets, device=device).T
        columns, column = column.unique(return_inverse=True)
        owner = torch.tensor([rows[row][0] for row in batch], device=device)
        read, _ = pad([torch.tensor(rows[row][1], dtype=torch.long) for row in batch])
        logits = model.language_model(
            # no scored token attends to the padding on the right
            inputs_embeds=torch.cat([embeds[owner, -1:], embed(read.to(device))], dim=1),  # [R, 1 + T, d]
            use_cache=True,
            logits_to_keep=columns,
            **{CACHE: select_rows(past, owner)},
        ).logits.float()  # [R, k, vocabulary]
        sums.index_add_(0, reply, logits[i, column, token] - logits.logsumexp(-1)[i, column])
    return sums.cpu()


# ---- the probe ----


@torch.no_grad()
def probe(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    items: list[ProbeItem],
    arms: Sequence[str] = KNOWLEDGE_ARMS,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Scores all items under each arm of knowledge.

    Scores of a choice, each the mean over questions and beginnings:
      * `raw`: log P(choice | question) in nats; for whole replies, which differ in length, nats per token;
      * `pmi`: `raw` minus the same after the question without its subject ("it", or "..." for a caption or a
        dialogue), the domain-conditional PMI of Holtzman et al. 2021 (Surface Form Competition). That question comes
        with the mean knowledge, or without knowledge in the arm "none".

    Measures, as fractions unless noted; ties count against the model:
      * `accuracy`: the correct choice has the highest score;
      * `spearman`, `kl` (tasks with `dist`): rank correlation of the scores with the shares in `dist`, and KL
        divergence in nats from these to the softmax of the scores;
      * `hits_at_1_*`, `mrr_*` (task "rank"): each positive reply is ranked among the random, or adversarial, ones.

    Args:
        model: the dialogue model.
        processor: its processor.
        items: items of one task, from `load_items`.
        arms: of `KNOWLEDGE_ARMS`; "shuffled" gives an item the knowledge of another photograph or subject.
        batch_size: prompts, and then replies, per batch.
        seed: of the shuffled knowledge and of the statistics.
        progress: whether to show a progress bar.

    Returns:
        A report: its `kind`, "probe", and `version`; `task`, `arms`; `subsets`: name -> `items` (their number),
        `majority` (accuracy of the most frequent correct choice) and `chance`, if items have an answer, `arms` (arm ->
        score -> measure -> `mean`, `confidence_95`) and `own_minus` (other arm -> score -> measure -> the same and
        `p_value`), by resampled clusters. `records`: each item's `id`, `cluster`, `subsets`, scores, measures.

    Raises:
        ValueError: for an unknown arm, or if knowledge cannot be shuffled.
    """
    if not arms or not set(arms) <= set(KNOWLEDGE_ARMS):
        raise ValueError(f"arms must be some of {', '.join(KNOWLEDGE_ARMS)}, not {list(arms)}.")
    knowledge: dict[str, Any] = {"none": [None] * len(items)}  # arm -> [N, n, h]
    if set(arms) != {"none"}:
        own = _evoke(model, processor, [item.evoking.messages for item in items], batch_size)
        groups = [item.cluster for item in items]
        knowledge |= {arm: arm_knowledge(own, arm, seed, groups) for arm in (*arms, "mean") if arm != "none"}

    queries: list[tuple[Question, tuple[str, ...], torch.Tensor | None]] = []
    for arm in arms:
        for item, evoked in zip(items, knowledge[arm], strict=True):
            queries += [(question, item.choices, evoked) for question in item.questions]
    # Questions without subject are few: each is scored once, with the choices of all items that share it.
    shared: dict[tuple[bool, Question], dict[str, None]] = defaultdict(dict)
    for arm, item in itertools.product(arms, items):
        for question in item.unconditional:
            shared[arm != "none", question] |= dict.fromkeys(item.choices)
    for (has_knowledge, question), choices in shared.items():
        queries.append((question, tuple(choices), knowledge["mean"][0] if has_knowledge else None))

    scored = iter(choice_log_likelihoods(model, processor, *zip(*queries, strict=True), batch_size, progress))

    def score() -> torch.Tensor:
        """The choices' scores for the next question [c], averaged over beginnings."""
        log_p, tokens = next(scored)  # [b, c]
        return (log_p / tokens if items[0].task == "rank" else log_p).mean(0)

    raw = {arm: [torch.stack([score() for _ in item.questions]).mean(0) for item in items] for arm in arms}
    unconditional = {key: dict(zip(choices, score().tolist(), strict=True)) for key, choices in shared.items()}
    records = [_record(item, {arm: raw[arm][i] for arm in arms}, unconditional) for i, item in enumerate(items)]
    return {
        "kind": "probe",
        "version": REPORT_VERSION,
        "task": items[0].task,
        "arms": list(arms),
        "subsets": _summarise(records, arms, seed),
        "records": records,
    }


def _record(
    item: ProbeItem,
    raw: dict[str, torch.Tensor],
    unconditional: dict[tuple[bool, Question], dict[str, float]],
) -> dict[str, Any]:
    """
    An item's record: its scores and measures under each arm.

    Args:
        item: the item.
        raw: arm -> scores of the choices [c].
        unconditional: (with knowledge, question without subject) -> choice -> score.
    """
    record = {"id": item.fields["id"], "cluster": item.cluster, "subsets": item.subsets}
    if item.task != "rank":
        record |= {"choices": list(item.choices), "answer": item.fields["answer"]}
    record |= {"scores": {}, "measures": {}}
    for arm, raw_scores in raw.items():
        bases = [unconditional[arm != "none", question] for question in item.unconditional]
        without = torch.tensor([[base[choice] for choice in item.choices] for base in bases]).mean(0)  # [c]
        scores = {"raw": raw_scores, "pmi": raw_scores - without}
        record["scores"][arm] = {name: values.tolist() for name, values in scores.items()}
        record["measures"][arm] = {name: _measures(item, values) for name, values in scores.items()}
    return record


def _evoke(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, chats: list[list[dict]], batch_size: int
) -> torch.Tensor:
    """The knowledge [N, n, h] of the words of each chat."""
    device, parts = model.iqformer.query_tokens.device, []
    training = model.training
    model.eval()
    for start in range(0, len(chats), batch_size):
        inputs = processor(chats[start : start + batch_size]).to(device)
        parts.append(model.get_text_knowledge(inputs["context_input_ids"], inputs["context_attention_mask"]))
    model.train(training)
    return torch.cat(parts)


def _measures(item: ProbeItem, scores: torch.Tensor) -> dict[str, float | None]:
    """Measures of one item with scores [c]; `None` for undefined ones."""
    if item.task == "rank":
        measures = {}
        positives, *negatives = scores.split([len(item.fields[key]) for key in ("positives", *NEGATIVES)])
        for name, others in zip(NEGATIVES, negatives, strict=True):
            ranks = 1 + (~(others < positives[:, None])).sum(1)  # [positives]
            measures[f"hits_at_1_{name}"] = (ranks == 1).double().mean().item() if len(others) else None
            measures[f"mrr_{name}"] = (1 / ranks).double().mean().item() if len(others) else None
        return measures
    measures = {"accuracy": float((~(scores < scores[item.fields["answer"]])).sum() == 1)}
    if item.task == "dist":
        shares = torch.tensor(item.fields["dist"], dtype=torch.double)
        shares = shares / shares.sum()
        measures["spearman"] = rank_correlation(scores.double(), shares)
        measures["kl"] = (torch.xlogy(shares, shares) - shares * scores.double().log_softmax(0)).sum().item()
    return measures


# ---- summaries of records ----


def compare_probes(a: dict[str, Any], b: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """
    Compares two models on the same items, each with its own knowledge.

    Args:
        a: the result of `probe` for one model, or of `average_probes` for several training runs of it.
        b: the same for the other.
        seed: of the statistics.

    Returns:
        Subset -> score -> measure -> `mean` of a minus b, its `confidence_95` and `p_value`.

    Raises:
        ValueError: if items or their choices differ, or one has no records or no arm "own".
    """
    pairs = [{**record, "measures": {"own": ours, "b": theirs}} for record, (ours, theirs) in _align([a, b], "own")]
    return {name: subset["own_minus"]["b"] for name, subset in _summarise(pairs, ("own", "b"), seed).items()}


def average_probes(probes: Sequence[dict[str, Any]], arm: str = "own", seed: int = 0) -> dict[str, Any]:
    """
    Averages several training runs of a model under one arm of knowledge, for `compare_probes`.

    Args:
        probes: the result of `probe` for each run.
        arm: which of their arms.
        seed: of the statistics.

    Returns:
        `task`, `arms`, `subsets`, `records` as of [`probe`], with each item's mean measures as the arm "own".

    Raises:
        ValueError: if items or their choices differ, or a result has no records or lacks the arm.
    """
    records = []
    for record, trainings in _align(probes, arm):
        mean = {}
        for score in SCORES:
            values = {name: [measures[score][name] for measures in trainings] for name in trainings[0][score]}
            mean[score] = {name: None if None in row else sum(row) / len(row) for name, row in values.items()}
        records.append({**record, "measures": {"own": mean}})
    return {
        "task": probes[0]["task"],
        "arms": ["own"],
        "subsets": _summarise(records, ("own",), seed),
        "records": records,
    }


def _align(probes: Sequence[dict[str, Any]], arm: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each item's record in the first probe, and its measures under the arm in each probe."""
    if not all(report.get("records") for report in probes):
        raise ValueError("There are no records to compare; `vikdf probe` writes them.")
    indexed = [{record["id"]: record for record in report["records"]} for report in probes]
    tasks = {report["task"] for report in probes}
    if any(records.keys() != indexed[0].keys() for records in indexed) or len(tasks) > 1:
        raise ValueError("The probes do not have the same items.")
    aligned = []
    for name, record in indexed[0].items():
        item_records = [records[name] for records in indexed]
        if not all(arm in item["measures"] for item in item_records):
            raise ValueError(f"Models are compared under one arm of knowledge: probe all with the arm {arm!r}.")
        if any(item.get(key) != record.get(key) for key in ("choices", "answer") for item in item_records):
            raise ValueError(f"The item {name!r} does not have the same choices and answer in all probes.")
        aligned.append((record, [item["measures"][arm] for item in item_records]))
    return aligned


def _summarise(records: list[dict[str, Any]], arms: Sequence[str], seed: int) -> dict[str, Any]:
    """Means, intervals and differences of each subset; subsets equal to "all" are omitted."""
    members = defaultdict(list)
    for record in records:
        for name in record["subsets"]:
            members[name].append(record)
    summary = {}
    for name, subset in sorted(members.items()):
        if name != "all" and len(subset) == len(records):
            continue
        summary[name] = {"items": len(subset)}
        if "answer" in subset[0]:
            answers = [record["choices"][record["answer"]] for record in subset]
            frequencies = Counter(answers)
            guesses = [max(record["choices"], key=frequencies.__getitem__) for record in subset]
            hits = sum(guess == answer for guess, answer in zip(guesses, answers, strict=True))
            summary[name]["majority"] = hits / len(subset)
            summary[name]["chance"] = sum(1 / len(record["choices"]) for record in subset) / len(subset)
        clusters = [record["cluster"] for record in subset]
        values = {arm: _table(subset, arm) for arm in arms}  # arm -> [N, scores, measures]
        measures = list(subset[0]["measures"][arms[0]]["raw"])
        summary[name]["arms"] = {arm: _estimate(table, clusters, measures, seed) for arm, table in values.items()}
        if "own" in arms:
            summary[name]["own_minus"] = {
                arm: _estimate(values["own"] - values[arm], clusters, measures, seed, paired=True)
                for arm in arms
                if arm != "own"
            }
    return summary


def _table(records: list[dict[str, Any]], arm: str) -> torch.Tensor:
    """The measures of an arm [N, scores, measures], float64, with NaN for undefined ones."""
    rows = [[list(record["measures"][arm][score].values()) for score in SCORES] for record in records]
    return torch.tensor([[[torch.nan if v is None else v for v in s] for s in row] for row in rows]).double()


def _estimate(
    values: torch.Tensor, clusters: list[str], measures: list[str], seed: int, paired: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Mean, interval and, if paired, p-value of mean 0, of values [N, scores, measures].

    Returns:
        Score -> measure -> estimates; measures that are undefined for all items are omitted.
    """
    flat = values.flatten(1)  # [N, k]
    low, high = bootstrap_interval(flat.nan_to_num(), ~flat.isnan(), clusters, seed=seed)
    means = flat.nanmean(0).tolist()
    estimates: dict[str, dict[str, dict[str, Any]]] = {score: {} for score in SCORES}
    for column, (score, measure) in enumerate(itertools.product(SCORES, measures)):
        if flat[:, column].isnan().all():
            continue
        estimate = {"mean": means[column], "confidence_95": [low[column], high[column]]}
        if paired:
            sums: dict[str, float] = defaultdict(float)
            for cluster, difference in zip(clusters, flat[:, column].nan_to_num().tolist(), strict=True):
                sums[cluster] += difference
            estimate["p_value"] = paired_randomisation(torch.tensor(list(sums.values())), seed=seed)
        estimates[score][measure] = estimate
    return estimates


__all__ = ["average_probes", "choice_log_likelihoods", "compare_probes", "probe"]
