"""Training checkpoints: unfinished ones (killed process, full disk) are never resumed; one file also under FSDP.

Knows how a training is saved, resumed and published, but neither objectives nor data.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from huggingface_hub import run_as_future
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..configuration_vikdf import BACKBONE_CONFIGS
from ..sharing import push_to_hub


logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest complete `checkpoint-N`; `None` if there is none.

    The Trainer writes its state last, so a checkpoint without a readable one is incomplete.
    """
    if not os.path.isdir(output_dir):
        return None
    finished = {}
    for name in os.listdir(output_dir):
        prefix, _, step = name.rpartition("-")
        state = os.path.join(output_dir, name, "trainer_state.json")
        if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() and os.path.isfile(state):
            try:
                with open(state, encoding="utf-8") as file:
                    json.load(file)
            except ValueError:
                continue
            finished[int(step)] = os.path.join(output_dir, name)
    return finished[max(finished)] if finished else None


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The VIKDF model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def align_special_tokens(model: nn.Module, processor: Any) -> None:
    """
    Writes the tokenizer's special tokens into the configurations, as the Trainer would, which warns of it.

    No token that ends a reply is lost.

    Args:
        model: the model, whose `generation_config` and LLM's configuration are changed in place.
        processor: its processor, or the LLM's tokenizer; without either nothing changes.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := getattr(tokenizer, name, None)) is None:
            continue
        setattr(model.config, name, token)  # where transformers 5.17 looks instead of the LLM's configuration
        for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
            known = getattr(config, name, None)
            known = known if isinstance(known, list) else [] if known is None else [known]
            if config is not None and token not in known:
                setattr(config, name, [token, *known] if name == "eos_token_id" and known else token)


class CheckpointingTrainer(Trainer):
    """A `Trainer` of VIKDF models whose checkpoints are complete or absent, also under FSDP."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        As the Trainer's, whose state file is written last and marks the checkpoint as finished.

        Raises:
            OSError: if it could not be written, on a full disk for example; earlier checkpoints are unchanged.
        """
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        state = os.path.join(folder, "trainer_state.json")
        if self.args.should_save and os.path.isfile(state):
            os.remove(state)  # from an earlier run; until the end this checkpoint is unfinished
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two are torch's and safetensors'
            last = last_checkpoint(self._get_output_dir(trial))
            if last == folder:
                raise  # it is finished; deleting an older one failed
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {folder} could not be written: {error}. Free disk space (or set save_total_limit) "
                f"and run the same command again: it resumes from "
                f"{last or 'the beginning, because there is no earlier checkpoint'}."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:
            scale = {key: value.view(()) for key, value in state_dict.items() if key.endswith(".logit_scale")}
            state_dict = {**state_dict, **scale}
        token, self.args.hub_token = self.args.hub_token, None  # the arguments are pickled beside the weights
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.hub_token = token

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that marks the checkpoint as finished comes after

    def _reshape_temperature(self, model: nn.Module) -> None:
        """Makes the temperature a tensor [1], because FSDP cannot shard a scalar; `_save` makes it a scalar again."""
        if self.is_fsdp_enabled:
            head = unwrap_peft(model).matching_head
            head.logit_scale = nn.Parameter(head.logit_scale.detach().view(1), head.logit_scale.requires_grad)

    @property
    def _saves_whole_tensors(self) -> bool:
        """Whether the model is under FSDP and its checkpoints hold the trained parts in one file."""
        if not self.is_fsdp_enabled or unwrap_peft(self.model) is not self.model:
            return False
        return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._saves_whole_tensors:
            return super()._save_optimizer_and_scheduler(output_dir)
        # the Trainer would also write the whole model, frozen backbones included, in FSDP's format
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._saves_whole_tensors:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = {}
        if self.args.process_index == 0:  # it sends the others their shards
            weights = load_file(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME))
            weights = {key: value.view(1) if key.endswith(".logit_scale") else value for key, value in weights.items()}
        set_model_state_dict(
            self.model if model is None else model,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
        )

    def _load_best_model(self) -> None:
        if not self._saves_whole_tensors:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Ignores frozen backbones, which are unchanged whether or not the checkpoint holds them."""
        trained = ([key for key in keys if not key.startswith((*BACKBONE_CONFIGS,))] for keys in load_result)
        super()._issue_warnings_after_load(type(load_result)(*trained))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves model and processor to `args.output_dir` and commits them to `args.hub_model_id`, in one commit.

        Args:
            commit_message: first line of the commit message.
            blocking: `False` uploads in the background and returns a future.
            token: default `args.hub_token`.
            revision: branch to commit to; default `args.hub_revision`.
            private: whether to create a private repository; default `args.hub_private_repo`.
            kwargs: `results`, `include_backbones`, `create_pr`; see `sharing.push_to_hub`.

        Returns:
            `CommitInfo` of the commit, or a future of it; `None` in all processes but the first.

        Raises:
            OSError, ValueError: as `sharing.push_to_hub`.
        """
        self.save_model(_internal_call=True)  # otherwise, with args.push_to_hub, it would push, too
        if not self.is_world_process_zero():
            return None
        push = functools.partial(
            push_to_hub,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            model=self.args.output_dir,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            **kwargs,
        )
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer's own uploads all of output_dir, including the pickled arguments.
        if self.args.hub_strategy == "end":
            return
        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except OSError as error:  # training continues
            logger.warning(str(error))


__all__ = ["CheckpointingTrainer", "align_special_tokens", "last_checkpoint"]
