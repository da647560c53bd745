"""Fits a reward head: which of an LLM's states go with replies that readers grade highly.

    graded replies -> reply_states: the LLM's mean states while it wrote each reply -> fit_reward -> the head's weights

Ridge regression of grades on states, both as differences from their mean over the replies to the same context: a head
chooses among these alone. Knows what `vikdf reward` computes and saves; how the head is used is in
modeling_candidates.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..data.dialogues import as_messages
from ..evaluation.statistics import bootstrap_interval, rank_correlation
from ..modeling_candidates import mean_states
from ..modeling_prefix import CACHE
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor


PENALTIES = (100.0, 300.0, 1000.0, 3000.0, 10_000.0)  # of the ridge, on standardised states
FOLDS = 5
FEWEST_CONTEXTS = 50  # to fit a head and to tell whether it is of use


def load_graded(path: str | Path) -> list[dict[str, Any]]:
    """
    Graded replies: JSON Lines, `{"turns": [text, ...], "replies": [text, ...], "grades": [number, ...]}`.

    The last of the turns is the user's. Contexts in which all grades are equal say nothing and are left out.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a line that is none of these, or too few contexts.
    """
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            turns, replies, grades = (record[name] for name in ("turns", "replies", "grades"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected turns, replies, grades; got {line[:80]!r}.") from error
        if len(replies) != len(grades):
            raise ValueError(f"{path}, line {number}: {len(replies)} replies have {len(grades)} grades.")
        if len(set(grades)) > 1:
            grades = [float(grade) for grade in grades]
            examples.append({"messages": as_messages(turns, "user"), "replies": replies, "grades": grades})
    if len(examples) < FEWEST_CONTEXTS:
        raise ValueError(
            f"{path} has {len(examples)} contexts with replies of different grades; a head needs {FEWEST_CONTEXTS}."
        )
    return examples


@torch.no_grad()
def reply_states(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: Sequence[dict[str, Any]],
    layer: int,
    use_knowledge: bool = True,
) -> list[torch.Tensor]:
    """
    The LLM's mean state over each reply's tokens, as the reward head reads it.

    Args:
        model: a dialogue model.
        processor: its processor.
        examples: from [`load_graded`].
        layer: index of the LLM's hidden states.
        use_knowledge: whether the prompts hold knowledge.

    Returns:
        For each example [replies, d_llm], float32 on the CPU.
    """
    tokenizer, device = processor.text_tokenizer, model.device
    states = []
    for example in tqdm(examples, desc="States", unit=" contexts"):
        inputs = processor([example["messages"]], use_knowledge=use_knowledge).to(device)
        knowledge = model.get_knowledge(inputs.get("context_input_ids"), inputs.get("context_attention_mask"))
        embeds = model.embed_prompt(inputs["input_ids"], knowledge)  # [1, P, d_llm]
        prompt = model.language_model.base_model(inputs_embeds=embeds, use_cache=True)
        rows = [torch.tensor(tokenizer(reply, add_special_tokens=False)["input_ids"]) for reply in example["replies"]]
        ids = pad_sequence(rows, batch_first=True).to(device)  # [R, T]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        cache = getattr(prompt, CACHE)
        cache.batch_repeat_interleave(len(rows))
        outputs = model.language_model.base_model(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=torch.cat([mask.new_ones(len(rows), embeds.shape[1]), mask], dim=1),
            output_hidden_states=True,
            **{CACHE: cache},
        )
        states.append(mean_states(outputs.hidden_states[layer].float(), mask).cpu())
    return states


def fit_reward(states: Sequence[torch.Tensor], grades: Sequence[Sequence[float]]) -> dict[str, Any]:
    """
    Fits a reward head, and tells by cross-validation over contexts what choosing by it is worth.

    Args:
        states: for each context [replies, d_llm].
        grades: for each context the grades of its replies.

    Returns:
        `weight` [d_llm]; `penalty`, the best of `PENALTIES`; and of held-out contexts `grade_of_best`, the mean grade
        of the reply with the highest reward, `grade_of_any`, of all replies, `gain` with its `gain_interval` (95 %,
        bootstrap over contexts), and `rank_correlation` of rewards and grades within contexts; `contexts`, `replies`.
    """
    targets = [torch.tensor(values, dtype=torch.float64) for values in grades]
    inputs = [rows.double() for rows in states]
    results = {}
    for penalty in PENALTIES:
        rewards = list(zip(cross_validate(states, targets, penalty), targets, strict=True))
        best = torch.stack([values[reward.argmax()] for reward, values in rewards])  # [N]
        results[penalty] = best, sum(rank_correlation(*pair) or 0.0 for pair in rewards) / len(rewards)
    penalty = max(results, key=lambda name: results[name][1])
    best, correlation = results[penalty]
    means = torch.stack([values.mean() for values in targets])  # [N]
    return {
        "weight": _ridge(list(zip(inputs, targets, strict=True)), penalty).float(),
        "penalty": penalty,
        "grade_of_best": best.mean().item(),
        "grade_of_any": means.mean().item(),
        "gain": (best - means).mean().item(),
        "gain_interval": list(bootstrap_interval(best - means)),
        "rank_correlation": correlation,
        "contexts": len(inputs),
        "replies": sum(map(len, targets)),
    }


def cross_validate(
    states: Sequence[torch.Tensor], grades: Sequence[torch.Tensor], penalty: float
) -> list[torch.Tensor]:
    """
    The rewards that replies get from heads which were fitted without their context, in `FOLDS` parts.

    Args:
        states: for each context [replies, d_llm].
        grades: for each context [replies], float64.
        penalty: of the ridge.

    Returns:
        For each context [replies], float64.
    """
    pairs = [(rows.double(), values) for rows, values in zip(states, grades, strict=True)]
    fold = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)) % FOLDS  # [N]
    heads = [
        _ridge([pair for pair, part in zip(pairs, fold, strict=True) if part != held_out], penalty)
        for held_out in range(FOLDS)
    ]
    return [rows @ heads[part] for (rows, _), part in zip(pairs, fold.tolist(), strict=True)]


def _ridge(pairs: list[tuple[torch.Tensor, torch.Tensor]], penalty: float) -> torch.Tensor:
    """The weights [d] of centred grades on centred states, which are standardised for the penalty."""
    x = torch.cat([rows - rows.mean(0) for rows, _ in pairs])  # [R, d]
    y = torch.cat([values - values.mean() for _, values in pairs])  # [R]
    scale = x.std(0).clamp(min=1e-6)
    x = x / scale
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y) / scale


def add_reward_head(model: VikdfForConditionalGeneration, weight: torch.Tensor, layer: int) -> None:
    """
    Gives a model a reward head, in place of one that it has.

    Args:
        model: a dialogue model.
        weight: [d_llm], float32.
        layer: index of the LLM's hidden states that it reads.
    """
    model.config.reward_layer = layer
    model.register_buffer("reward_weight", weight.to(model.device))


__all__ = ["add_reward_head", "cross_validate", "fit_reward", "load_graded", "reply_states"]
