"""Learning from pairs of replies, a chosen and a rejected one: direct preference optimisation, Rafailov et al. 2023.

What is trained are the knowledge's parts; the LLM without knowledge is both the frozen LLM and the reference, so that
there is no second model. Its log-likelihoods are computed once, before training. Knows no recipes: `run_stage`
(stages.py) builds the parts.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length

from ..configuration_vikdf import VikdfConfig
from ..data.preferences import REFERENCE, PreferenceCollator
from ..evaluation.dialogues import Example, continue_prefix, prefill, score_candidates
from ..modeling_distillation import VikdfForPreTraining
from ..modeling_prefix import choose_targets
from ..processing_vikdf import IGNORED
from .arguments import UNUSABLE_IN_PREFERENCES, PreferenceTrainingArguments, refuse_unusable
from .checkpoints import unwrap_peft
from .trainer import VikdfTrainer


REWARDS = ("chosen", "rejected", "margins", "accuracies")  # logged as `rewards/...`, as TRL calls them


def preference_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """
    Negative log-likelihood of preferences, −mean log σ(β (r_w − r_l)).

    The log-ratios r = log P(y | x) − log P_ref(y | x) are those of the chosen reply y_w and of the rejected one y_l,
    each with the end of its turn. See Rafailov et al. 2023, "Direct Preference Optimization", equation 7.

    Args:
        chosen: r_w, log-ratios of whole replies, [P], float32.
        rejected: r_l, [P].
        beta: above 0.
        count: number of pairs in the whole batch, if this is a part of it; default P.

    Returns:
        Scalar, in nats per pair; 0 without pairs.
    """
    count = torch.as_tensor(len(chosen) if count is None else count, device=chosen.device)
    return -F.logsigmoid(beta * (chosen - rejected)).sum() / count.clamp(min=1)


class PreferenceTrainer(VikdfTrainer):
    """
    Trains `VikdfForConditionalGeneration` on pairs of replies, with ordinary dialogues among them.

    The loss is `preference_loss` + `rpo_alpha` · NLL of the chosen replies + `reply_weight` · NLL of the ordinary
    dialogues' replies, the first a mean over the step's pairs, the others over its tokens. Takes what `VikdfTrainer`
    takes; data are those of `load_preferences`, and get the columns `ref_chosen_logps` and `ref_rejected_logps` here.
    Logs each part of the loss, and `rewards/...` as TRL does.

    Raises:
        TypeError: if `args` are not `PreferenceTrainingArguments`, or the collator is no `PreferenceCollator`.
        ValueError: for data without a pair, a stream, or a setting that would do nothing or break.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: PreferenceTrainingArguments | None = None,
        data_collator: PreferenceCollator | None = None,
        **kwargs: Any,
    ):
        for name, value, expected in (
            ("args", args, PreferenceTrainingArguments),
            ("data_collator", data_collator, PreferenceCollator),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"{name} must be {expected.__name__}, got {type(value).__name__}.")
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self.train_dataset = self._with_reference(self.train_dataset)
        self._check_weight()
        self.eval_dataset = self._with_reference(self.eval_dataset)

    def _check_settings(self, config: VikdfConfig) -> None:
        if self.is_pretraining:
            raise ValueError(
                f"{VikdfForPreTraining.__name__} has objectives of its own: load the checkpoint with "
                "VikdfForConditionalGeneration to learn from preferences."
            )
        refuse_unusable({**vars(self.args), **self.others}, UNUSABLE_IN_PREFERENCES)
        super()._check_settings(config)

    def _check_weight(self) -> None:
        """Refuses dialogues that would be read for nothing."""
        if self.args.reply_weight:
            return
        dialogues = itertools.chain(self.train_dataset or (), self.data_collator.beside or ())
        ordinary = sum(example.get("rejected") is None for example in dialogues)
        if ordinary:
            raise ValueError(
                f"Nothing would be learnt from {ordinary} dialogues without a rejected reply, because reply_weight=0: "
                "leave them out, or give it a weight."
            )

    # ---- the reference ----

    def _with_reference(self, data: Any) -> Any:
        """Data, or several by name, with the reference's log-likelihoods of both replies, 0 where there are none."""
        if isinstance(data, dict):
            return {name: self._with_reference(dataset) for name, dataset in data.items()}
        if data is None or isinstance(data, str):  # the name of one of several
            return data
        if not has_length(data):
            raise ValueError("Pairs cannot be a stream: the reference's log-likelihoods are computed before training.")
        if not any(example.get("rejected") is not None for example in data):
            raise ValueError(f"The data ({len(data)} dialogues) hold no pair, a dialogue that has `rejected`, too.")
        if set(REFERENCE) <= set(data[0]):
            return data
        columns = dict(zip(REFERENCE, self._reference_log_likelihoods(data).T, strict=True))
        if not isinstance(data, datasets.Dataset):
            rows = zip(data, *columns.values(), strict=True)
            return [{**example, **dict(zip(REFERENCE, map(float, values), strict=True))} for example, *values in rows]
        for name, values in columns.items():
            data = data.add_column(name, values)
        return data

    @torch.no_grad()
    def _reference_log_likelihoods(self, data: Sequence[dict[str, Any]]) -> np.ndarray:
        """Of the chosen and of the rejected reply under the LLM without knowledge, [N, 2], float32."""
        model, processor, size = unwrap_peft(self.model), self.data_collator.processor, self.args.eval_batch_size
        if not hasattr(model, "hf_device_map"):
            model.language_model.to(self.args.device)  # under FSDP the Trainer places it later
        own = range(self.args.process_index, len(data), self.args.world_size)
        read = {i: self._reference_example(data[i]) for i in own if data[i].get("rejected") is not None}
        # the longest first, so that running out of memory happens at once
        order = sorted((i for i in read if read[i] is not None), key=lambda i: -len(read[i].prefix))
        found = torch.zeros(len(data), 2, device=self.args.device)
        training = model.training
        model.eval()
        for start in tqdm(range(0, len(order), size), "Reference", unit=" batches", disable=self.args.disable_tqdm):
            part = order[start : start + size]
            examples = [read[i] for i in part]
            with self.compute_loss_context_manager():
                scores = score_candidates(model, processor, examples, size, prefill(model, processor, examples, None))
            for i, replies in zip(part, scores, strict=True):
                found[i] = torch.stack([tokens.sum() for tokens in replies]).to(found.device)
        model.train(training)
        return self.accelerator.reduce(found, reduction="sum").cpu().numpy()

    def _reference_example(self, example: dict[str, Any]) -> Example | None:
        """
        A pair as the LLM alone reads it, the same turns without placeholders; `None` if it is unusable.

        What is scored of both replies are the tokens that are learnt.

        Raises:
            ValueError: if the LLM's plain prompt does not end in these tokens.
        """
        collator, key = self.data_collator, str(example.get("key", ""))
        chats = collator.pair(example)
        labels = collator([{"key": key, "messages": chat} for chat in chats])["labels"]  # [2, T]
        replies = [row[row != IGNORED].tolist() for row in labels]
        if not all(replies):
            return None
        plain = collator.processor(chats, use_knowledge=False, return_labels=True, max_length=collator.max_length)
        rows = []
        for ids, labelled, reply in zip(plain["input_ids"], plain["labels"] != IGNORED, replies, strict=True):
            stop, first = int(labelled.nonzero()[-1]) + 1, int(plain["attention_mask"][len(rows)].argmax())
            rows.append(ids[first:stop].tolist())
            if rows[-1][-len(reply) :] != reply:
                raise ValueError(
                    f"{key}: the reply's tokens differ between prompts with and without knowledge, so that their "
                    "likelihoods cannot be compared. Does the chat template change what it is given?"
                )
        starts = [len(row) - len(reply) for row, reply in zip(rows, replies, strict=True)]
        return Example(key, references=[], prompt=[], context=[], visual=[], **continue_prefix(rows, starts))

    # ---- the loss ----

    @property
    def loss_weights(self) -> dict[str, float]:
        """The parts of the loss and their weights."""
        return {"preference": 1.0, "chosen": self.args.rpo_alpha, "reply": self.args.reply_weight}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """As `VikdfTrainer`'s; each micro-batch knows how much the whole step scores."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, items
        counts = self._total_counts(batches)
        for batch in batches:
            batch["counts"] = counts
            self.sums["pairs"] -= len(batch["rejected"]) * self.args.world_size  # a pair is one, not two rows
        return batches, 1  # not None: the losses are already divided by the counts of the whole step

    def _counts(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a batch scores: its pairs, the tokens of their chosen replies, those of the ordinary dialogues'."""
        tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)  # [R]
        counts = {"preference": torch.tensor(len(batch["chosen"]))}
        counts |= {"chosen": tokens[batch["chosen"]].sum(), "reply": tokens[batch["ordinary"]].sum()}
        return {name: count.to(self.args.device, torch.float) for name, count in counts.items()}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses, and with `return_outputs` each of them and the rewards, by name."""
        counts = inputs["counts"] if "counts" in inputs else self._counts(inputs)  # the batch's own in an evaluation
        parts = self._parts(model, inputs, counts)
        loss = sum(weight * parts[f"loss_{name}"] for name, weight in self.loss_weights.items())
        parts = {name: value.detach() for name, value in parts.items()}
        if model.training:
            for name, value in parts.items():
                self.sums[name] += value
            loss = loss * self.args.world_size  # processes average their gradients, but each is a share of the whole
        return (loss, parts) if return_outputs else loss

    def _parts(
        self, model: nn.Module, inputs: dict[str, Any], counts: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Losses and rewards of a batch, as shares of the means over all that `counts` counts."""
        own = {"labels", "chosen", "rejected", "ordinary", "counts", "dropout_seed", *REFERENCE}  # not the model's
        targets, columns = choose_targets(inputs["labels"], None, 0)  # [R, k], [k]
        with self._dropout(inputs["dropout_seed"]) if "dropout_seed" in inputs else contextlib.nullcontext():
            arguments = {name: value for name, value in inputs.items() if name not in own}
            logits = model(**arguments, logits_to_keep=columns).logits  # [R, k, vocabulary]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        nll = nll.view(targets.shape).sum(1)  # [R], in nats a reply
        chosen, rejected = (
            -nll[inputs[name]] - inputs[reference]
            for name, reference in zip(("chosen", "rejected"), REFERENCE, strict=True)
        )  # log-ratios [P]
        beta, pairs = self.args.beta, counts["preference"]
        margins = beta * (chosen - rejected)
        values = (beta * chosen, beta * rejected, margins, (margins > 0).float())
        rewards = {f"rewards/{name}": value.sum() for name, value in zip(REWARDS, values, strict=True)}
        return {
            "loss_preference": preference_loss(chosen, rejected, beta, pairs),
            "loss_chosen": nll[inputs["chosen"]].sum() / counts["chosen"].clamp(min=1),
            "loss_reply": nll[inputs["ordinary"]].sum() / counts["reply"].clamp(min=1),
            **{name: value / pairs.clamp(min=1) for name, value in rewards.items()},
        }

    # ---- evaluation ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `VikdfTrainer.evaluate`; other data than the Trainer's get their reference first."""
        return super().evaluate(self._with_reference(eval_dataset), *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: pairs are no predictions."""
        raise ValueError("Learning from preferences makes no predictions: call evaluate() for losses and rewards.")

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """The loss of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        counts = inputs["counts"] = self._counts(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, parts = self.compute_loss(model, inputs, return_outputs=True)
        for name, value in parts.items():
            count = float(counts.get(name.removeprefix("loss_"), counts["preference"]))  # rewards are of pairs
            self.eval_sums[name] += float(value) * count
            self.eval_counts[name] += count
        return loss.detach(), None, None

    def _evaluation_metrics(self, num_samples: int) -> dict[str, float]:
        """`loss`, its parts `loss_<name>`, and the rewards; of what the data hold none of there is no metric."""
        losses = [f"loss_{name}" for name in self.loss_weights]
        means = self._evaluation_means([*losses, *(f"rewards/{name}" for name in REWARDS)])
        if "loss_preference" not in means:
            raise ValueError(f"The evaluation data ({num_samples} dialogues) hold no usable pair: are all too long?")
        total = sum(weight * means.get(f"loss_{name}", 0.0) for name, weight in self.loss_weights.items())
        return {"loss": total, **means}


__all__ = ["PreferenceTrainer", "preference_loss"]
