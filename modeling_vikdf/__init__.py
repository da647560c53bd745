"""VIKDF: visual common sense for a frozen chat LLM, without images at dialogue time."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_vikdf import VikdfConfig
from .modeling_distillation import VikdfForPreTraining, VikdfPreTrainingOutput
from .modeling_iqformer import VikdfIQFormer, initialize_from_bert
from .modeling_pretrained import VikdfPreTrainedModel
from .modeling_vikdf import VikdfCausalLMOutputWithPast, VikdfForConditionalGeneration
from .pipeline_vikdf import VikdfDialoguePipeline, VikdfInputsError
from .processing_vikdf import VikdfProcessor


__version__ = "0.1.0"

DEFAULT_CHECKPOINT = Path(__file__).parent / "default_checkpoint"

AutoConfig.register(VikdfConfig.model_type, VikdfConfig)
AutoModel.register(VikdfConfig, VikdfForConditionalGeneration)
AutoModelForCausalLM.register(VikdfConfig, VikdfForConditionalGeneration)
AutoModelForPreTraining.register(VikdfConfig, VikdfForPreTraining)
AutoProcessor.register(VikdfConfig, VikdfProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "vikdf-dialogue",
    pipeline_class=VikdfDialoguePipeline,
    pt_model=AutoModelForCausalLM,
    default={"model": (str(DEFAULT_CHECKPOINT), "main")},
    type="text",
)

__all__ = [
    "DEFAULT_CHECKPOINT",
    "VikdfCausalLMOutputWithPast",
    "VikdfConfig",
    "VikdfDialoguePipeline",
    "VikdfForConditionalGeneration",
    "VikdfForPreTraining",
    "VikdfIQFormer",
    "VikdfInputsError",
    "VikdfPreTrainedModel",
    "VikdfPreTrainingOutput",
    "VikdfProcessor",
    "initialize_from_bert",
]
