"""Pairs of replies -> batches, with ordinary dialogues beside them in the same pass of the LLM.

Knows how rows of a batch belong together, and no loss. Where pairs are read from is in dialogues.py, what is made of
them in training/preferences.py.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_vikdf import IGNORED, VikdfProcessor
from .collators import DialogueCollator, _make_rng
from .sources import SkipReport


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls the reference model's log-likelihoods


class PreferenceCollator(DialogueCollator):
    """
    Dialogues, some with a rejected reply, `{"messages": [...], "rejected": str | None}` -> both replies of each pair.

    If either reply is unusable, both rows of a pair stay without labels, and the pair is no part of `chosen` and
    `rejected`. Both follow the same turns: what one of them loses to `max_length`, the other one loses, too, and so
    does the context.

    Args:
        processor, max_length, seed, report: see `DialogueCollator`.
        beside: ordinary dialogues; each pair gets a random one, another in every epoch. None in evaluation.
    """

    def __init__(
        self,
        processor: VikdfProcessor,
        *,
        max_length: int | None = None,
        beside: Sequence[dict[str, Any]] | None = None,
        seed: int = 0,
        report: SkipReport | None = None,
    ):
        super().__init__(processor, max_length=max_length, seed=seed, report=report)
        self.beside = beside

    def for_evaluation(self) -> "PreferenceCollator":
        """A copy of this collator that stays in epoch 0 and reads the pairs alone."""
        collator = super().for_evaluation()
        collator.beside = None
        return collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Examples, P of them pairs -> R rows: the examples, then of each pair the rejected reply and what is beside it.

        Returns:
            What `DialogueCollator` makes of the R rows. Which rows belong together: `chosen`, `rejected` [P'], of the
            P' usable pairs, and `ordinary` [R - 2P], of all others. The log-likelihoods of the pairs' replies under
            the LLM without knowledge: `ref_chosen_logps`, `ref_rejected_logps` [P'], float32.

        Raises:
            ValueError: for a pair without these two.
        """
        rows, pairs = [*map(dict, examples)], []
        for number, example in enumerate(examples):
            if example.get("rejected") is None:
                continue
            if not set(REFERENCE) <= set(example):
                raise ValueError(f"A pair lacks {' and '.join(REFERENCE)}: PreferenceTrainer adds them to its data.")
            rows[number]["messages"], other = self.pair(example)
            pairs.append((number, len(rows)))
            rows.append({**example, "messages": other})
            if self.beside:
                rng = _make_rng(self.seed, self.epoch, f"{example.get('key', '')}/beside")
                rows.append(self.beside[rng.randrange(len(self.beside))])
        batch = super().__call__(rows)
        numbers = torch.tensor(pairs, dtype=torch.long).view(-1, 2)  # [P, 2]
        whole = (batch["labels"] != IGNORED).any(1)[numbers].all(1)  # [P]
        batch["labels"][numbers[~whole].flatten()] = IGNORED
        batch["chosen"], batch["rejected"] = numbers[whole].T
        ordinary = torch.ones(len(rows), dtype=torch.bool)
        ordinary[numbers.flatten()] = False
        batch["ordinary"] = ordinary.nonzero().squeeze(1)
        for name in REFERENCE:
            values = torch.tensor([rows[chosen][name] for chosen, _ in pairs], dtype=torch.float32)  # [P]
            batch[name] = values[whole]
        return batch

    def pair(self, example: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The chat with the chosen reply and that with the rejected one, without the turns that either would lose."""
        chosen = example["messages"]
        chats = [chosen, [*chosen[:-1], {"role": "assistant", "content": example["rejected"]}]]
        try:
            dropped = max(self._read(chats).dropped_turns)
        except (TypeError, ValueError):
            return chats  # of which at least one is unusable
        head = int(chosen[0]["role"] == "system")
        return [chat[:head] + chat[head + dropped :] for chat in chats]


__all__ = ["REFERENCE", "PreferenceCollator"]
