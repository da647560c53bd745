"""Choosing among replies: several are sampled to a prompt at once, and the one with the best score is given.

    prompt -> n rows sample replies: `LikelihoodRecorder` keeps log P(reply | context, K), if that has weight,
                                     `EnoughFinished` ends them when some have ended by themselves
           -> score_replies: + what the reward head says of the LLM's states while it wrote the reply
                             + log P(reply) of the LLM that has read an empty message
                             + how well what the reply evokes matches what the context evokes
           -> the best of those that ended by themselves

A likely reply is often one that fits everything ("I'm not sure."). Subtracting its likelihood without the context
leaves what the two have to do with each other (Li et al. 2016, "A Diversity-Promoting Objective Function for Neural
Conversation Models", MMI-antiLM). A reward head is a linear map of the LLM's states, knowledge included, to the grades
that readers gave to replies (a reward model as in Stiennon et al. 2020, "Learning to summarize from human feedback",
with everything below the head frozen); `vikdf reward` fits it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput


# What a score adds up, each times its weight:
#   reward      the grade that the reward head gives
#   likelihood  log P(reply | context, K), a token's mean in nats
#   alone       log P(reply) of the LLM that has read an empty message, without knowledge, a token's mean in nats
#   match       cosine of the matching embeddings of reply and context, and of its picture, their mean, if it has one
#   length      logarithm of the number of tokens: all means above favour short replies
TERMS = ("reward", "likelihood", "alone", "match", "length")
CHUNK = 16  # replies that the LLM reads at a time: logits of all would take much memory


class LikelihoodRecorder(LogitsProcessor):
    """Keeps the log-likelihood of every token that is sampled, before temperature and truncation change it."""

    def __init__(self):
        self.logits, self.steps = None, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the ids [R, T], the last of which the logits before led to, and the next logits [R, vocabulary]."""
        if self.logits is not None:
            self._add(input_ids[:, -1])
        self.logits = scores
        return scores

    def log_likelihoods(self, written: torch.Tensor) -> torch.Tensor:
        """Those of the tokens written [R, T], in nats, float32. The last of them no call may have seen."""
        if len(self.steps) < written.shape[1]:
            self._add(written[:, -1])
        return torch.stack(self.steps[: written.shape[1]], dim=1)  # [R, T]

    def _add(self, tokens: torch.Tensor) -> None:
        logits = self.logits.float()  # [R, vocabulary]
        self.steps.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1))


class EnoughFinished(StoppingCriteria):
    """
    Breaks off all rows of a prompt when enough of them have ended by themselves.

    Args:
        copies: rows of each prompt.
        enough: how many of them have to end.
        ends: ids of the tokens that end a reply [E].

    Attributes:
        runs: which rows are still being written [R]; `None` before the first token.
        cached: which rows the LLM's cache holds, as indices [r]; `None`: all.
        finished: which rows have ended by themselves [R].
        lengths: tokens of each row up to its end, or up to where it was broken off [R].
    """

    def __init__(self, copies: int, enough: int, ends: torch.Tensor):
        self.copies, self.enough, self.ends = copies, enough, ends
        self.runs = self.finished = self.lengths = self.cached = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether each row is over [R]."""
        newest = input_ids[:, -1]  # [R]
        if self.finished is None:
            self.finished, self.lengths = torch.zeros_like(newest, dtype=torch.bool), torch.zeros_like(newest)
            self.runs = torch.ones_like(self.finished)
        self.lengths += self.runs
        self.finished |= self.runs & torch.isin(newest, self.ends)
        enough = self.finished.view(-1, self.copies).sum(1) >= self.enough  # [B]
        over = self.finished | enough.repeat_interleave(self.copies)
        self.runs = ~over
        return over

    def select_rows(self, cache: Any) -> torch.Tensor | None:
        """
        The rows that are still being written [r], after all others have been taken out of the LLM's cache.

        What is sampled stays the same, for all rows are sampled from, and random numbers are drawn for all. `None`
        where no row has ended, or the cache has a fixed size.
        """
        if self.runs is None or self.runs.all() or not isinstance(cache, DynamicCache):
            return None
        rows = self.runs.nonzero()[:, 0]  # [r]
        if self.cached is None or len(rows) < len(self.cached):
            kept = rows if self.cached is None else torch.isin(self.cached, rows).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            self.cached = rows
        return rows


def count_ending(num_candidates: int) -> int:
    """How many of n candidates may end by themselves: the last eighth to end would make all others wait."""
    return num_candidates - num_candidates // 8


@torch.no_grad()
def generate_best(
    model: Any,
    processor: Any,
    prompt: torch.Tensor,
    num_candidates: int,
    ends: torch.Tensor,
    *,
    weights: Mapping[str, float],
    kept: int = 1,
    knowledge: torch.Tensor | None = None,
    **kwargs: Any,
) -> ModelOutput:
    """
    Samples candidates and keeps the best of those that end first, see `count_ending`; the others are broken off.

    Args:
        model: a `VikdfForConditionalGeneration`.
        processor: its own processor.
        prompt: ids [B, T].
        num_candidates: n, sampled to each prompt.
        ends: ids of the tokens that end a reply, and of padding [E].
        weights: term -> weight, see `TERMS`.
        kept: how many of them are returned, the best first.
        knowledge: of the contexts [B, m, h]; `None` for prompts without.
        kwargs: for `generate`.

    Returns:
        What `generate` returns with `return_dict_in_generate`, of the rows that are kept [B * kept].

    Raises:
        ValueError: for an unknown term of the score, or a reward from a model without a reward head.
    """
    _refuse_unknown(weights)
    recorder = LikelihoodRecorder() if weights.get("likelihood") else None
    enough = EnoughFinished(num_candidates, count_ending(num_candidates), ends)
    if recorder is not None:
        kwargs["logits_processor"] = LogitsProcessorList([recorder, *(kwargs.get("logits_processor") or ())])
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), enough])
    several = {"num_candidates": 1, "num_return_sequences": num_candidates, "return_dict_in_generate": True}
    if rewarded := bool(weights.get("reward")):
        several["output_hidden_states"] = [_reward_layer(model)]  # of all other layers `None` is kept
    if model.device.type == "cpu":  # where a row costs time: a third of all rows and steps is saved
        several["running"] = enough
    outputs = model.generate(prompt, knowledge=knowledge, **kwargs | several)
    written = outputs["sequences"][:, prompt.shape[1] :]  # [B * n, T]
    rows = (len(prompt), num_candidates)
    reward = _rewards(model, outputs["hidden_states"], enough.lengths).view(rows) if rewarded else None
    outputs.hidden_states = None
    mask = (torch.arange(written.shape[1], device=written.device) < enough.lengths[:, None]).long()  # [B * n, T]
    scores = score_replies(
        model,
        processor,
        written.unflatten(0, rows),
        mask.unflatten(0, rows),
        None if recorder is None else (recorder.log_likelihoods(written) * mask).sum(1).view(rows),
        weights,
        reward,
        knowledge,
        kwargs.get("image_mask"),
    )
    # what was broken off comes behind what ended by itself
    scores -= ~enough.finished.view(rows) * (scores.max() - scores.min() + 1)
    best = scores.topk(kept, dim=1).indices  # [B, kept]
    best = (best + torch.arange(0, len(written), num_candidates, device=best.device)[:, None]).flatten()  # [B * kept]
    steps = int(enough.lengths[best].max())
    outputs["sequences"] = outputs["sequences"][best, : prompt.shape[1] + steps]
    for name in ("scores", "logits"):
        if outputs.get(name) is not None:
            outputs[name] = tuple(step[best] for step in outputs[name][:steps])
    return outputs


@torch.no_grad()
def score_replies(
    model: Any,
    processor: Any,
    replies: torch.Tensor,
    mask: torch.Tensor,
    likelihood: torch.Tensor | None,
    weights: Mapping[str, float],
    reward: torch.Tensor | None = None,
    knowledge: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Scores of replies. What has no weight is not computed.

    Args:
        model: a `VikdfForConditionalGeneration`.
        processor: its own processor.
        replies: token ids [B, n, T].
        mask: 1 up to the end of the turn, inclusive, [B, n, T].
        likelihood: log P(reply | context, K) [B, n], in nats; `None` only if it has no weight.
        weights: term -> weight, see `TERMS`.
        reward: grades that the reward head gives [B, n].
        knowledge: of the contexts, text before picture [B, m, h]; without it `match` is 0.
        image_mask: rows that have a picture [B].

    Returns:
        [B, n], float32.

    Raises:
        ValueError: for an unknown term.
    """
    _refuse_unknown(weights)
    tokens = mask.sum(-1)  # [B, n]
    score = torch.zeros(tokens.shape, device=replies.device)
    if weight := weights.get("reward"):
        score += weight * reward
    if weight := weights.get("likelihood"):
        score += weight * likelihood / tokens
    if weight := weights.get("length"):
        score += weight * tokens.log()
    if weight := weights.get("alone"):
        score += weight * likelihood_alone(model, processor, replies, mask) / tokens
    if knowledge is not None and (weight := weights.get("match")):
        score += weight * match_context(model, processor, replies, knowledge, image_mask)
    return score


def _refuse_unknown(weights: Mapping[str, float]) -> None:
    if unknown := sorted(weights.keys() - {*TERMS}):
        raise ValueError(f"candidate_weights has unknown terms {unknown}; a score is made of {', '.join(TERMS)}.")


def _reward_layer(model: Any) -> int:
    if model.config.reward_layer is None:
        raise ValueError("candidate_weights name the reward, but this model has no reward head: see `vikdf reward`.")
    return model.config.reward_layer


def _rewards(model: Any, steps: tuple[tuple[torch.Tensor, ...], ...], lengths: torch.Tensor) -> torch.Tensor:
    """
    Grades of replies by the reward head: of the mean state of the tokens that the LLM has written and read.

    Args:
        model: one with a reward head.
        steps: for each decoding step the LLM's hidden states, a tuple of its layers', each [R, t, d_llm].
        lengths: tokens of each reply, its end included [R].

    Returns:
        [R], float32.
    """
    # step 0 reads the prompt, step i token i; the last token is not read
    states = [step[model.config.reward_layer][:, -1].float() for step in steps[1:]]  # T - 1 times [R, d_llm]
    if not states:
        return torch.zeros(len(lengths), device=lengths.device)
    mask = torch.arange(len(states), device=lengths.device) < lengths[:, None] - 1  # [R, T - 1]
    return mean_states(torch.stack(states, dim=1), mask) @ model.reward_weight.float()


def mean_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of states [R, T, d] where a mask [R, T] is true, [R, d]; 0 where it is nowhere."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def likelihood_alone(model: Any, processor: Any, replies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log P(reply) [B, n], in nats, of replies [B, n, T] in a chat in which the user has said nothing."""
    prompt = _empty_chat(processor).to(replies.device)  # [P]
    totals = []
    for ids, real in zip(replies.flatten(0, 1).split(CHUNK), mask.flatten(0, 1).split(CHUNK), strict=True):
        prompts = prompt.expand(len(ids), -1)  # [C, P]
        logits = model.language_model(
            input_ids=torch.cat([prompts, ids[:, :-1]], dim=1),  # [C, P + T - 1]: the last token need not be read
            attention_mask=torch.cat([torch.ones_like(prompts), real[:, :-1]], dim=1),
            logits_to_keep=ids.shape[1],
        ).logits  # [C, T, vocabulary]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")  # [C * T]
        totals.append(-(nll.view_as(ids) * real).sum(1))
    return torch.cat(totals).view(mask.shape[:2])


def _empty_chat(processor: Any) -> torch.Tensor:
    """The prompt [P] of a chat with an empty message, which is what the prompts of two different messages share."""
    chats = [[{"role": "user", "content": content}] for content in ("a", "b")]
    prompts = processor(chats, use_knowledge=False)
    one, other = (ids[mask.bool()] for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True))
    shortest = min(len(one), len(other))
    before = int((one[:shortest] == other[:shortest]).cumprod(0).sum())
    after = int((one[-shortest:] == other[-shortest:]).flip(0).cumprod(0).sum())
    return torch.cat([one[:before], one[len(one) - after :]])


def match_context(
    model: Any,
    processor: Any,
    replies: torch.Tensor,
    knowledge: torch.Tensor,
    image_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How well what replies [B, n, T] evoke matches the knowledge [B, m, h] of contexts, a cosine, [B, n]."""
    texts = processor.tokenizer.batch_decode(replies.flatten(0, 1), skip_special_tokens=True)
    # the text encoder has to read something
    read = processor([[{"role": "user", "content": text.strip() or "..."}] for text in texts]).to(replies.device)
    evoked = model.get_text_embeddings(read["context_input_ids"], read["context_attention_mask"])  # [B * n, d]
    evoked = evoked.unflatten(0, replies.shape[:2])  # [B, n, d]
    n = model.config.num_knowledge_tokens
    match = (evoked @ model.matching_head.text(knowledge[:, :n])[..., None])[..., 0]  # [B, n]
    if knowledge.shape[1] > n:
        shown = (evoked @ model.matching_head.image(knowledge[:, n:])[..., None])[..., 0]
        has_picture = True if image_mask is None else image_mask[:, None]
        match = torch.where(torch.as_tensor(has_picture, device=match.device), (match + shown) / 2, match)
    return match


__all__ = ["TERMS", "EnoughFinished", "LikelihoodRecorder", "generate_best", "mean_states", "score_replies"]
