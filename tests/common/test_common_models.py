"""transformers' suites for models and for generation, on the dialogue model and on the one with the training heads."""

import copy
import inspect
import unittest

import torch
from overridden import DIALOGUE_MODEL, GENERATION, PRETRAINING_MODEL, overriding
from suites import suite
from tiny_models import prompt, tiny_config
from tiny_training import ALL, model_config, pairs, processor

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfForPreTraining
from modeling_vikdf.data.collators import PreTrainingCollator


modeling = suite("test_modeling_common")
generation = suite("generation.test_utils")


class ModelTester:
    """Sizes that the suites ask for, and what they run a model on."""

    batch_size, seq_length = 7, 20
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 48, 2, 4, 512
    is_training = True

    def __init__(self, llm: str, towers: str):
        self.llm, self.towers = llm, towers


class DialogueTester(ModelTester):
    def get_config(self) -> VikdfConfig:
        config = tiny_config(self.llm, self.towers)
        config.text_config.initializer_range = 0.02  # as large as in the models that the suites' tolerances are for
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[VikdfConfig, dict[str, torch.Tensor]]:
        """A batch of prompts with the knowledge of a text and of a picture each."""
        inputs = prompt([self.seq_length] * self.batch_size, sources=2)
        return self.get_config(), inputs | {"pixel_values": modeling.floats_tensor([self.batch_size, 3, 32, 32])}


class PreTrainingTester(ModelTester):
    objectives = ALL

    def get_config(self) -> VikdfConfig:
        config = model_config(self.llm, self.towers, loss_weights=self.objectives)
        config.text_config.initializer_range = 0.02
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[VikdfConfig, dict[str, torch.Tensor]]:
        """A batch of pictures with captions, for all objectives."""
        config = self.get_config()
        inputs = PreTrainingCollator(processor(self.llm, self.towers), config)(pairs(self.batch_size))
        self.seq_length = inputs["input_ids"].shape[1]
        return config, inputs


@overriding(DIALOGUE_MODEL, GENERATION)
class DialogueModelTest(modeling.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VikdfForConditionalGeneration,)
    additional_model_inputs = ["context_input_ids", "context_attention_mask", "pixel_values"]
    test_all_params_have_gradient = False  # the encoders are read without
    _is_composite = True
    backbones = ("llama", "separate")

    def setUp(self):
        self.model_tester = DialogueTester(*self.backbones)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        return inputs | {"labels": inputs["input_ids"].clone()} if return_labels else inputs


class TiedDialogueModelTest(DialogueModelTest):
    """An LLM whose vocabulary head is its embedding, and CLIP's towers."""

    backbones = ("qwen", "clip")


@overriding(PRETRAINING_MODEL)
class PreTrainingModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VikdfForPreTraining,)
    additional_model_inputs = list(inspect.signature(VikdfForPreTraining.forward).parameters)
    test_all_params_have_gradient = False
    _is_composite = True

    def setUp(self):
        self.model_tester = PreTrainingTester("qwen", "separate")

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return copy.deepcopy(inputs_dict)  # the labels are among them

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        # what stands in for a layer here knows of one run, so the LLM reads captions one way and not both
        self.model_tester.objectives = ALL | {"text_to_knowledge": 0.0}
        super().check_training_gradient_checkpointing(*args, **kwargs)
