"""What the tests of training share: image-text pairs, dialogues, tiny models to train, and a Trainer on the CPU.

Importable by processes that the tests start, so nothing here is a fixture.
"""

import io
import random
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_models import speak_up, tiny_config, tower_configs
from tiny_tokenizers import clip_like_tokenizer, image_processor, llama_tokenizer, qwen_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfForPreTraining, VikdfProcessor
from modeling_vikdf.data.collators import DialogueCollator, PreTrainingCollator
from modeling_vikdf.data.preferences import PreferenceCollator
from modeling_vikdf.training.arguments import PreferenceTrainingArguments
from modeling_vikdf.training.preferences import PreferenceTrainer
from modeling_vikdf.training.trainer import VikdfTrainer, VikdfTrainingArguments


WORDS = "a dog runs on the beach two people walk with red umbrellas in rain under blue mountains".split()
PICTURE_SIZE = 64  # pixels: a grid of 8 x 8 patches, and of 2 x 2 cells to mask
ALL = {
    "text_image_matching": 0.5,
    "masked_image": 0.2,
    "masked_text": 0.2,
    "knowledge_to_text": 1.0,
    "text_to_knowledge": 0.5,
    "text_text_matching": 0.3,
}


def picture(seed: int, size: int = PICTURE_SIZE) -> Image.Image:
    """Coloured squares, so that neither resizing nor JPEG changes it much."""
    draw = random.Random(seed)
    small = Image.frombytes("RGB", (4, 4), bytes(draw.randrange(256) for _ in range(48)))
    return small.resize((size, size), Image.Resampling.NEAREST)


def pairs(count: int, captions: int = 3) -> list[dict[str, Any]]:
    """Pictures with captions of 3 to 8 words each."""
    draw = random.Random(0)
    return [
        {
            "key": f"pair/{i}",
            "image": picture(i),
            "captions": [" ".join(draw.sample(WORDS, draw.randrange(3, 9))) for _ in range(captions)],
        }
        for i in range(count)
    ]


def dialogues(count: int) -> list[dict[str, Any]]:
    """Dialogues of one to three exchanges, so that prompts and contexts differ much in length."""
    draw = random.Random(0)
    return [
        {
            "key": f"dialogue/{i}",
            "messages": [
                {"role": role, "content": " ".join(draw.sample(WORDS, draw.randrange(2, 9)))}
                for _ in range(draw.randrange(1, 4))
                for role in ("user", "assistant")
            ],
        }
        for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    """Dialogues with a rejected reply of another length; the chosen ones speak of rain."""
    examples = dialogues(count)
    for i, example in enumerate(examples):
        example["messages"][-1] = {"role": "assistant", "content": f"in rain {example['messages'][-1]['content']}"}
        example["rejected"] = f"a dog runs on the {WORDS[i % len(WORDS)]}"
    return examples


def mixed(count: int = 16) -> list[dict[str, Any]]:
    """Pairs of replies and, a few more, ordinary dialogues among them."""
    paired = preferences(count)
    return [paired[i] if i < 0.75 * count and i % 2 == 0 else plain for i, plain in enumerate(dialogues(count))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's way with a fixed vocabulary: trained ones differ from process to process, and so would the losses."""
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*names.values(), *letters, *WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


@cache
def processor(llm: str = "qwen", towers: str = "separate", size: int = PICTURE_SIZE, **settings) -> VikdfProcessor:
    return VikdfProcessor.from_backbones(
        {"qwen": qwen_tokenizer, "llama": llama_tokenizer}[llm](),
        word_tokenizer() if towers == "separate" else clip_like_tokenizer(),
        image_processor(size),
        vocab_size=512,
        num_knowledge_tokens=4,
        **settings,
    )


def model_config(
    llm: str = "qwen",
    towers: str = "separate",
    size: int = PICTURE_SIZE,
    patch: int = 8,
    dropout: float = 0.0,
    **kwargs,
) -> VikdfConfig:
    vision_config = tower_configs(towers)["vision_config"]
    vision_config.image_size, vision_config.patch_size = size, patch
    config = tiny_config(llm, towers, vision_config=vision_config, **{"knowledge_token_id": 400, **kwargs})
    config.iqformer_config.hidden_dropout_prob = config.iqformer_config.attention_probs_dropout_prob = dropout
    config.text_config.initializer_range = 0.1  # sharper, and rounding errors grow on their way through the LLM
    return config


def prepare(model: torch.nn.Module, dropout: float) -> torch.nn.Module:
    """Weights so large that pictures and texts differ, and the same dropout in all that is trained."""
    speak_up(model)
    with torch.no_grad():
        for part in (model.iqformer, model.matching_head):
            for parameter in part.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.15)
    frozen = ("language_model", "context_encoder", "vision_encoder")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.startswith(frozen):
            module.p = dropout
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = dropout
    return model.train()


def pretraining_model(loss_weights: dict[str, float], dropout: float = 0.0, seed: int = 0, **kwargs):
    config = model_config(loss_weights=loss_weights, dropout=dropout, **kwargs)
    torch.manual_seed(seed)
    return prepare(VikdfForPreTraining(config), dropout)


def dialogue_model(dropout: float = 0.0, seed: int = 0, **kwargs):
    config = model_config(dropout=dropout, **kwargs)
    torch.manual_seed(seed)
    return prepare(VikdfForConditionalGeneration(config), dropout)


def arguments(
    folder: str | Path, arguments_class: type[VikdfTrainingArguments] = VikdfTrainingArguments, **kwargs
) -> VikdfTrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return arguments_class(output_dir=str(folder), **{**defaults, **kwargs})


def make_trainer(
    folder: str | Path,
    objectives: dict[str, float] | str | None,
    *,
    dropout: float = 0.0,
    train: Any = None,
    evaluation: Any = None,
    collator: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **kwargs,
) -> VikdfTrainer:
    """A Trainer of the objectives on 16 pairs, or with `None` of 16 dialogues; "preferences": some of them paired."""
    logging.set_verbosity_error()
    reader, trainer_class, arguments_class = processor(), VikdfTrainer, VikdfTrainingArguments
    if objectives == "preferences":
        model, data, collate = dialogue_model(dropout), mixed(), PreferenceCollator(reader, **(collator or {}))
        trainer_class, arguments_class = PreferenceTrainer, PreferenceTrainingArguments
    elif objectives is None:
        model, data = dialogue_model(dropout), dialogues(16)
        collate = DialogueCollator(reader, **(collator or {}))
    else:
        model, data = pretraining_model(objectives, dropout), pairs(16)
        settings = {"image_knowledge_share": 0.5, "other_caption": True, **(collator or {})}
        collate = PreTrainingCollator(reader, model.config, **settings)
    return trainer_class(
        model=model,
        args=arguments(folder, arguments_class, log_level="error", **kwargs),
        train_dataset=data if train is None else train,
        eval_dataset=evaluation,
        data_collator=collate,
        processing_class=reader,
        callbacks=callbacks,
    )


def write_shard(path: Path, examples: list[dict[str, Any]]) -> Path:
    """A webdataset shard of PNGs and captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, example in enumerate(examples):
            image = io.BytesIO()
            example["image"].save(image, "PNG")
            for extension, data in (("png", image.getvalue()), ("txt", "\n".join(example["captions"]).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def logged_losses(trainer: VikdfTrainer) -> list[dict[str, float]]:
    """The losses of every logged step."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith("loss")} for entry in steps]


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, also of a model that is in shards."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name.removeprefix("module."): (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().clone()
        for name, value in weights.items()
    }
