"""Controls of the study: collators that show captions in place of pictures, or let the knowledge read the reply.

Steps of configs/study.yaml name them under `collators`; `run_stage` trains with them.
"""

import random
from typing import Any

import torch

from modeling_vikdf.data.collators import DialogueCollator, PreTrainingCollator


class CaptionsAsPictures(PreTrainingCollator):
    """
    A control without pictures: another caption of each picture is shown in its place.

    The picture's states are replaced by the cached states of that caption, resampled to the same number. Needs a
    feature cache, encoders of equal width and at least two captions of every picture.
    """

    def choose_pictures(
        self, examples: list[dict[str, Any]], chosen: list[int], rngs: list[random.Random]
    ) -> list[dict[str, Any]]:
        """
        The examples with the states of a caption other than the chosen one as those of their picture.

        Raises:
            ValueError: if there are no cached states, or there is no other caption.
        """
        return [_show_caption(*row) for row in zip(examples, chosen, rngs, strict=True)]


def _show_caption(example: dict[str, Any], chosen: int, rng: random.Random) -> dict[str, Any]:
    captions = range(len(example["captions"]))
    if "context_states" not in example or len(captions) < 2:
        raise ValueError("CaptionsAsPictures needs a feature cache and at least two captions of every picture.")
    states = example["context_states"][rng.choice([i for i in captions if i != chosen])]  # [T, d]
    rows = torch.linspace(0, len(states) - 1, len(example["vision_states"])).round().long()  # [S]
    return {**example, "vision_states": states[rows]}


class PosteriorDialogues(DialogueCollator):
    """
    A control whose knowledge has sometimes read the reply.

    Knowledge of the reply is the posterior that the prior, knowledge of the context alone, approximates.

    Args:
        posterior_share: share of the dialogues, chosen anew in every epoch, whose knowledge has read the reply, too.
            0 in evaluation.
        args, settings: of `DialogueCollator`.
    """

    def __init__(self, *args: Any, posterior_share: float = 0.3, **settings: Any):
        super().__init__(*args, **settings)
        if not 0 <= posterior_share <= 1:
            raise ValueError(f"posterior_share must be between 0 and 1, got {posterior_share}.")
        self.posterior_share = posterior_share

    def for_evaluation(self) -> "PosteriorDialogues":
        """A copy of this collator that stays in epoch 0, hides nothing and whose knowledge never reads the reply."""
        collator = super().for_evaluation()
        collator.posterior_share = 0.0
        return collator

    def choose_contexts(
        self, chats: list[list[dict[str, Any]]], rngs: list[random.Random]
    ) -> list[list[dict[str, Any]]]:
        """The chats, a share of them with the reply at the end of the context."""
        posterior = [rng.random() < self.posterior_share for rng in rngs]
        return [_with_reply(chat) if reads else chat for chat, reads in zip(chats, posterior, strict=True)]


def _with_reply(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with everything after the last user turn also appended to that turn, where a context ends."""
    last = max(index for index, message in enumerate(chat) if message["role"] == "user")
    said = "\n".join(message["content"] for message in chat[last:])
    return [*chat[:last], {**chat[last], "content": said}, *chat[last + 1 :]]
