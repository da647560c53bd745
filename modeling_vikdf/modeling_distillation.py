"""Training VIKDF on image-text pairs: the three objectives of knowledge distillation and the two of BVIF.

Reads from top to bottom: the paper's equations as functions of tensors; what each objective takes from the model and
the batch; `OBJECTIVE_TABLE`, with one entry for each; `VikdfForPreTraining`, which weighs their losses. What else must
know about an objective (collator, trainer, recipes) reads it off the table. So any subset with any weights is a
configuration: the five jointly as the authors' code trains them, or distillation first and integration second as the
paper presents them.

Every objective is a sum over what it scores (pairs, pixels, tokens, components) divided by a count, over a batch the
mean. A trainer that splits a batch over micro-batches or processes passes the whole batch's counts, and the parts add
up to the mean over the whole.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_vikdf import OBJECTIVES, VikdfConfig
from .modeling_objectives import (
    LLM_STATES,
    SOURCES,
    Count,
    Objective,
    VikdfPreTrainingOutput,
    VikdfReconstructionBlock,
    add_shared,
    cells_to_pixels,
    count_labels,
    count_masked_pixels,
    read_captions_and_draws,
    read_draws,
    refuse_unusable,
    scored_patches,
    take_found_columns,
    to_patches,
)
from .modeling_prefix import chosen_columns, predict_tokens, shift, take_columns
from .modeling_vikdf import VikdfForConditionalGeneration, reply_loss


# ---- the equations ----


def matching_loss(
    text: torch.Tensor,
    image: torch.Tensor,
    logit_scale: torch.Tensor,
    other_text: torch.Tensor | None = None,
    other_image: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """
    Symmetric InfoNCE over a whole batch, of texts and images, or of texts and other texts about the same images.

    Paper, "Text-Image Matching"; Radford et al. 2021, CLIP, figure 3. Of a batch that is computed in `parts`
    (micro-batches, processes), each part passes the embeddings of all others without gradient. The values that the
    parts return add up to the loss of the whole batch, and so do the gradients.

    Args:
        text: unit vectors of the texts of the part's pairs [B, d].
        image: those of their images, or of the other texts, [B, d].
        logit_scale: logarithm of the inverse temperature, scalar.
        other_text: unit vectors of the other parts' texts [R, d].
        other_image: those of the other parts' images [R, d].
        parts: in how many parts the batch is computed.

    Returns:
        Scalar, in nats a pair: `1 / parts` of the whole batch's loss.
    """
    text, image = text.float(), image.float()
    if other_text is not None:
        text, image = torch.cat([text, other_text]), torch.cat([image, other_image])  # [N, d], N = B + R
    # every part sees the whole gradient of the temperature, so each may take its share only
    logit_scale = logit_scale.detach() + (logit_scale - logit_scale.detach()) / parts
    # logits of up to 100 have no decimals left in the half precision that autocast would choose
    with torch.autocast(text.device.type, enabled=False):
        logits = logit_scale.float().exp() * (text @ image.T)  # [N, N]
    targets = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    # the loss of the whole, of which only this part's embeddings carry a gradient: a share of the value, all of that
    return loss.detach() / parts + (loss - loss.detach())


def masked_image_loss(
    predicted: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, count: Count = None
) -> torch.Tensor:
    """
    Mean absolute error on masked pixels (paper, "Text-Assisted Masked Image Modelling"; Xie et al. 2022, SimMIM).

    Args:
        predicted: [B, 3, H, W].
        pixels: [B, 3, H, W].
        mask: 1 for the pixels to score, [B, H, W].
        count: number of scored pixels in the whole batch; default those of `mask`.

    Returns:
        Scalar; 0 when nothing is masked.
    """
    error = (predicted - pixels).abs().sum(1) * mask  # [B, H, W]
    return error.sum() / (_count(mask.sum(), count) * pixels.shape[1])


def masked_text_loss(
    logits: torch.Tensor, targets: torch.Tensor, count: Count = None, smoothing: float = 0.0
) -> torch.Tensor:
    """
    Cross-entropy of the chosen tokens (paper, "Image-Assisted Masked Text Modelling"; Devlin et al. 2019, BERT).

    Args:
        logits: of the chosen tokens [K, vocabulary].
        targets: their true ids [K]; -100 for one that is not chosen.
        count: number of chosen tokens in the whole batch; default those of `targets`.
        smoothing: share of each target's probability that is spread over the vocabulary (label smoothing).

    Returns:
        Scalar, in nats a token; 0 when no token was chosen.
    """
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    return loss / _count((targets != -100).sum(), count)


def text_to_knowledge_loss(predicted: torch.Tensor, knowledge: torch.Tensor, count: Count = None) -> torch.Tensor:
    """
    Negative log-likelihood of knowledge under a Gaussian of unit variance: up to constants the mean squared error.

    Paper, "Bidirectional Variational Information Fusion"; Barber & Agakov 2003 for the bound.

    Args:
        predicted: [B, n, h].
        knowledge: [B, n, h].
        count: number of rows in the whole batch; default B.

    Returns:
        Scalar, mean over rows, vectors and components.
    """
    error = (predicted.float() - knowledge.float()).square().sum()
    return error / (_count(error.new_full((), len(predicted)), count) * predicted[0].numel())


def _count(own: torch.Tensor, whole: Count) -> torch.Tensor:
    """The divisor: the whole batch's count if known, and never 0."""
    return torch.clamp(torch.as_tensor(own if whole is None else whole, device=own.device), min=1)


# ---- the objectives: what each takes from the model and the batch ----


def text_image_matching(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """Texts find their pictures, and pictures their texts, among all pairs of the batch."""
    pairs, others = (batch.text_embeddings, batch.image_embeddings), (batch.other_text, batch.other_image)
    return matching_loss(*pairs, model.matching_head.logit_scale, *others, batch.parts)


def text_text_matching(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """Captions find another caption of their picture; not in the paper."""
    pairs, others = (batch.text_embeddings, batch.partner_embeddings), (batch.other_text, batch.other_partner)
    return matching_loss(*pairs, model.matching_head.logit_scale, *others, batch.parts)


def masked_image(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """The first M pictures are completed with the help of K^T."""
    cells, pictures = batch.masked_cells, batch.pixel_values[: len(batch.masked_cells)]
    settings = (batch.hidden_cells, batch.text_knowledge, count, batch.scored_patches)
    return model.masked_image_modelling(pictures, cells, *settings)


def masked_text(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """The first M captions are completed with the help of K^I."""
    ids, mask, labels = batch.masked_input_ids, batch.context_attention_mask, batch.masked_labels
    settings = (batch.image_knowledge, count, batch.smoothing, batch.masked_columns)
    return model.masked_text_modelling(ids, mask, labels, *settings)


def knowledge_to_text(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """The LLM, asked for a caption, finds it likely (paper, BVIF, knowledge -> text; see `reply_loss`)."""
    if batch.caption_states is not None:
        targets = take_columns(shift(batch.labels), batch.columns["target_columns"])  # [B, k]
        return reply_loss(predict_tokens(model.language_model, batch.caption_states), targets, count, batch.smoothing)
    states = {name: getattr(batch, name) for name in LLM_STATES if getattr(batch, name) is not None}
    batch.llm_output = VikdfForConditionalGeneration.forward(
        model,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        knowledge=batch.llm_knowledge,
        base=model.caption_base(),
        labels=batch.labels,
        num_items_in_batch=count,
        smoothing=batch.smoothing,
        return_dict=True,
        **batch.columns,
        **states,  # what is not asked for is as the LLM's own configuration says
    )
    return batch.llm_output.loss


def text_to_knowledge(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """The LLM, having read a caption, predicts its knowledge (paper, BVIF, text -> knowledge)."""
    prompts = (batch.draw_input_ids, batch.draw_attention_mask, batch.llm_knowledge, batch.draw_position_ids)
    return model.text_to_knowledge(*prompts, count, batch.draw_columns, batch.draw_states)


def reply(model: "VikdfForPreTraining", batch: SimpleNamespace, count: Count) -> torch.Tensor:
    """Replies of text dialogues, as `VikdfForConditionalGeneration` learns them."""
    settings = {"num_items_in_batch": count, "smoothing": batch.smoothing, "return_dict": True}
    return VikdfForConditionalGeneration.forward(model, **batch.dialogues, **settings).loss


# ---- their heads ----


def masked_image_heads(config: VikdfConfig) -> dict[str, nn.Module]:
    """The block that asks K^T, and the decoder of each patch's state to its pixels."""
    if config.vision_config is None:
        raise ValueError("masked_image needs a vision encoder, and config.vision_config is None.")
    width, h = config.iqformer_config.encoder_hidden_size, config.iqformer_config.hidden_size
    pixels = 3 * config.vision_config.patch_size**2
    return {
        "masked_image_block": VikdfReconstructionBlock(width, h).float(),
        "pixel_decoder": nn.Linear(width, pixels, dtype=torch.float32),
    }


def masked_text_heads(config: VikdfConfig) -> dict[str, nn.Module]:
    """The block that asks K^I, and the decoder of each token's state to the text encoder's vocabulary."""
    width, h = config.iqformer_config.encoder_hidden_size, config.iqformer_config.hidden_size
    return {
        "masked_text_block": VikdfReconstructionBlock(width, h).float(),
        "token_decoder": nn.Linear(width, config.context_config.vocab_size, dtype=torch.float32),
    }


def knowledge_to_text_heads(config: VikdfConfig) -> dict[str, nn.Parameter]:
    """
    A shift of the base vectors in prompts of captions.

    What makes the LLM write captions is of no use in a dialogue. Learnt beside the base vectors, which then are the
    replies' alone, it stays behind with the other heads. Frozen, it leaves the base to both.
    """
    size = (config.num_knowledge_tokens, config.text_config.hidden_size)
    return {"caption_shift": nn.Parameter(torch.zeros(size, dtype=torch.float32))}


def text_to_knowledge_heads(config: VikdfConfig) -> dict[str, nn.Module]:
    """The predictor of a knowledge vector from the LLM's state before it."""
    d_llm, h = config.text_config.hidden_size, config.iqformer_config.hidden_size
    return {"knowledge_predictor": nn.Linear(d_llm, h, dtype=torch.float32)}


# ---- the table ----

INTO_THE_LLM = ("language_projection", "knowledge_gate")

# Default weights are in `OBJECTIVES` (configuration_vikdf.py). In this order the losses are computed and summed.
OBJECTIVE_TABLE = {
    "text_image_matching": Objective(
        stage="distill",
        loss=text_image_matching,
        needs=("text_embeddings", "image_embeddings"),
        trains=("matching_head",),
    ),
    "text_text_matching": Objective(
        loss=text_text_matching,
        needs=("text_embeddings", "partner_embeddings"),
        trains=("matching_head.text_projection", "matching_head.projection", "matching_head.logit_scale"),
    ),
    "masked_image": Objective(
        stage="distill",
        loss=masked_image,
        needs=("text_knowledge", "pixel_values", "masked_cells"),
        heads=masked_image_heads,
        count=count_masked_pixels,
        masked=True,
    ),
    "masked_text": Objective(
        stage="distill",
        loss=masked_text,
        needs=("image_knowledge", "masked_input_ids", "masked_labels"),
        heads=masked_text_heads,
        count=lambda inputs, config: (inputs["masked_labels"] != -100).sum(),
        predicts_tokens=True,
        masked=True,
    ),
    "knowledge_to_text": Objective(
        stage="integrate",
        loss=knowledge_to_text,
        needs=("llm_knowledge", "input_ids", "labels"),
        trains=INTO_THE_LLM,
        heads=knowledge_to_text_heads,
        count=count_labels,
        predicts_tokens=True,
    ),
    "text_to_knowledge": Objective(
        stage="integrate",
        loss=text_to_knowledge,
        needs=("llm_knowledge", "draw_input_ids"),
        trains=INTO_THE_LLM,
        heads=text_to_knowledge_heads,
    ),
    "reply": Objective(
        loss=reply,
        needs=("dialogues",),
        trains=(*INTO_THE_LLM, "knowledge_base"),
        count=lambda inputs, config: count_labels(inputs["dialogues"], config),
        predicts_tokens=True,
    ),
}


def add_objective(name: str, objective: Objective, weight: float = 0.0) -> None:
    """
    Makes an objective known: from now on configurations, models, collators, trainers and recipes take its name.

    Args:
        name: of the objective.
        objective: what it is.
        weight: its weight in configurations that name no weights.

    Raises:
        ValueError: if there is an objective of this name.
    """
    if name in OBJECTIVES:
        raise ValueError(f"There is an objective {name!r} already; choose another name than {list(OBJECTIVES)}.")
    OBJECTIVE_TABLE[name], OBJECTIVES[name] = objective, weight


def active_objectives(config: VikdfConfig) -> dict[str, Objective]:
    """The objectives that have a weight in `config.loss_weights`, in the order of the table; ValueError for others."""
    weighed = {name for name, weight in config.loss_weights.items() if weight}
    if unknown := sorted(weighed - OBJECTIVE_TABLE.keys()):
        raise ValueError(f"config.loss_weights gives {unknown} a weight, but no entry of OBJECTIVE_TABLE computes it.")
    return {name: objective for name, objective in OBJECTIVE_TABLE.items() if name in weighed}


def needs_of(config: VikdfConfig) -> set[str]:
    """What the active objectives need, some of it from `SOURCES`."""
    return {need for objective in active_objectives(config).values() for need in objective.needs}


# ---- the model ----


class VikdfForPreTraining(VikdfForConditionalGeneration):
    """
    A dialogue model with the heads of the objectives that have a weight in `config.loss_weights`.

    Objectives of weight 0 are not computed and need no inputs. `VikdfForConditionalGeneration` loads its checkpoints
    and leaves the heads out.
    """

    main_input_name = "context_input_ids"
    # a checkpoint that was trained with other objectives has other heads: new ones start fresh, old ones are left
    _keys_to_ignore_on_load_missing = VikdfForConditionalGeneration._keys_to_ignore_on_load_unexpected
    accepts_loss_kwargs = True  # for Trainer: losses are divided by counts over all accumulated batches

    def __init__(self, config: VikdfConfig):
        super().__init__(config)
        for objective in active_objectives(config).values():
            for name, head in objective.heads(config).items():
                if hasattr(self, name):
                    raise ValueError(f"The model has a part {name!r} already: call the objective's head otherwise.")
                setattr(self, name, head)
                self._keep_in_fp32_modules_strict.add(name)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "caption_shift"):
            init.zeros_(module.caption_shift)
        if isinstance(module, nn.MultiheadAttention):
            for name, parameter in module.named_parameters(recurse=False):
                init.zeros_(parameter) if "bias" in name else init.xavier_uniform_(parameter)

    @can_return_tuple
    def forward(
        self,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        context_states: torch.Tensor | None = None,
        vision_states: torch.Tensor | None = None,
        masked_cells: torch.Tensor | None = None,
        hidden_cells: torch.Tensor | None = None,
        masked_input_ids: torch.Tensor | None = None,
        masked_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        draw_input_ids: torch.Tensor | None = None,
        draw_attention_mask: torch.Tensor | None = None,
        draw_position_ids: torch.Tensor | None = None,
        use_image_knowledge: torch.Tensor | None = None,
        partner_input_ids: torch.Tensor | None = None,
        partner_attention_mask: torch.Tensor | None = None,
        partner_states: torch.Tensor | None = None,
        other_text: torch.Tensor | None = None,
        other_image: torch.Tensor | None = None,
        other_partner: torch.Tensor | None = None,
        parts: int = 1,
        counts: dict[str, torch.Tensor | float] | None = None,
        smoothing: float = 0.0,
        embed_only: bool = False,
        dialogues: dict[str, torch.Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> VikdfPreTrainingOutput:
        """
        Computes the objectives of positive weight and adds them up; a batch holds the inputs that these need.

        Args:
            context_input_ids: captions for the text encoder [B, T].
            context_attention_mask: 1 for tokens, 0 for padding, [B, T].
            pixel_values: pictures [B, 3, H, W]; beside `vision_states` those of the first M rows.
            context_states: the text encoder's states of the captions, if they are cached, [B, T, d].
            vision_states: the vision encoder's states of the pictures, if they are cached, [B, S, d].
            masked_cells: cells of a square grid over the first M <= B pictures to score [M, cells] (bool).
            hidden_cells: those of them to hide from the encoder [M, cells] (bool); default all.
            masked_input_ids: the first M captions with tokens replaced [M, T].
            masked_labels: the true ids, -100 elsewhere, [M, T].
            input_ids: prompts with placeholders, the captions behind (knowledge -> text) [B, U].
            attention_mask: 1 for tokens, 0 for padding, [B, U].
            position_ids: of the prompts [B, U]; default, as the LLM counts.
            labels: the ids of the captions, -100 elsewhere, [B, U].
            draw_input_ids: captions with placeholders behind them (text -> knowledge) [B, V].
            draw_attention_mask: 1 for tokens, 0 for padding, [B, V].
            draw_position_ids: [B, V]; default, as the LLM counts.
            use_image_knowledge: rows in which BVIF's knowledge is the picture's [B] (bool); default: the text's.
            partner_input_ids: another caption of each picture (text-text matching) [B, W].
            partner_attention_mask: 1 for tokens, 0 for padding, [B, W].
            partner_states: the text encoder's states of these captions, if they are cached, [B, W, d].
            other_text: what other parts of the batch embedded, see `matching_loss`, [R, d].
            other_image: the same of their pictures.
            other_partner: the same of their pictures' other captions.
            parts: in how many parts the batch is computed.
            counts: objective -> count over the whole batch; see the loss functions.
            smoothing: label smoothing of the objectives that predict tokens.
            embed_only: whether to stop at the matching embeddings.
            dialogues: text dialogues with labels, as inputs of `VikdfForConditionalGeneration.forward` (reply).
            output_hidden_states: whether to return those of the LLM that reads the captions.
            output_attentions: whether to return those of the LLM that reads the captions.
            others: inputs that an objective from outside the package needs; and where in the batch what lies, as
                `PreTrainingCollator` finds it (see `locate_columns`), so that a step need not wait for the GPU.

        Raises:
            TypeError: for an input that is none of these, and that no objective needs.
            ValueError: if an objective lacks an input, or none has a weight; if states are asked for that no objective
                computes.
        """
        batch = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})
        return self._weigh_objectives(batch)

    def _weigh_objectives(self, batch: SimpleNamespace) -> VikdfPreTrainingOutput:
        """The active objectives of the table, and the sum of their losses by weight: L = sum of weight * loss."""
        active, needs = active_objectives(self.config), needs_of(self.config)
        take_found_columns(batch)
        refuse_unusable(batch, active, OBJECTIVE_TABLE)
        vars(batch).update(batch.others, llm_output=ModelOutput())
        add_shared(self, batch, needs)
        for name, objective in active.items():
            if objective.contrasts or not batch.embed_only:
                objective.require_inputs(name, batch)
        embeddings = {name: getattr(batch, name) for name in SOURCES if name.endswith("_embeddings")}
        if batch.embed_only:
            states = {name: getattr(batch, name) for name in ("context_states", "vision_states", "partner_states")}
            return VikdfPreTrainingOutput(**embeddings, **states)
        read_captions_and_draws(self, batch, active.keys())
        counts = batch.counts or {}
        losses = {name: objective.loss(self, batch, counts.get(name)) for name, objective in active.items()}
        return VikdfPreTrainingOutput(
            loss=sum(self.config.loss_weights[name] * loss for name, loss in losses.items()),
            losses={name: loss.detach() for name, loss in losses.items()},
            text_knowledge=batch.text_knowledge,
            image_knowledge=batch.image_knowledge,
            **embeddings,
            hidden_states=batch.llm_output.get("hidden_states"),
            attentions=batch.llm_output.get("attentions"),
        )

    @classmethod
    def can_generate(cls) -> bool:
        """No: replies come from the dialogue model, which loads the same checkpoint."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: replies come from the dialogue model, which loads the same checkpoint."""
        raise NotImplementedError("Load the checkpoint with VikdfForConditionalGeneration to generate replies.")

    def caption_base(self) -> torch.Tensor:
        """Base vectors [n, d_llm] of captions."""
        alone = self.caption_shift.requires_grad
        return (self.knowledge_base.detach() if alone else self.knowledge_base) + self.caption_shift

    def masked_image_modelling(
        self,
        pixel_values: torch.Tensor,
        masked_cells: torch.Tensor,
        hidden_cells: torch.Tensor | None,
        text_knowledge: torch.Tensor,
        count: Count = None,
        scored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden cells are zeroed, the states of patches to score ask K^T, pixels come from these states alone."""
        rows, _, height, width = pixel_values.shape
        hidden = cells_to_pixels(masked_cells if hidden_cells is None else hidden_cells, height, width)  # [M, H, W]
        states = self.encode_images(pixel_values * (1 - hidden[:, None]))  # [M, S, d]
        states = self.iqformer.vision_projection(states.to(text_knowledge.dtype))
        patch = self.config.vision_config.patch_size
        grid = (height // patch, width // patch)
        states = states[:, states.shape[1] - grid[0] * grid[1] :]  # [M, patches, d]: without class and register states
        mask = to_patches(cells_to_pixels(masked_cells, height, width, patch)[:, None], patch)  # [M, patches, patch^2]
        pixels = to_patches(pixel_values[..., : grid[0] * patch, : grid[1] * patch], patch)  # [M, patches, 3 patch^2]
        scored = scored_patches(mask) if scored is None else scored  # [M, k]
        mask, states, pixels = (take_columns(patches, scored) for patches in (mask, states, pixels))  # [M, k, ...]
        predicted = self.pixel_decoder(self.masked_image_block(states, text_knowledge[:rows]))  # [M, k, 3 * patch^2]
        predicted, pixels = (patches.unflatten(-1, (3, -1)).transpose(1, 2) for patches in (predicted, pixels))
        return masked_image_loss(predicted, pixels, mask, count)  # of [M, 3, k, patch^2]

    def masked_text_modelling(
        self,
        masked_input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        image_knowledge: torch.Tensor,
        count: Count = None,
        smoothing: float = 0.0,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The encoder reads the caption with tokens replaced; the chosen ones' states ask K^I for the true ids."""
        rows = len(masked_input_ids)
        mask = None if attention_mask is None else attention_mask[:rows]
        states = self.encode_context(masked_input_ids, mask)  # [M, T, d]
        states = self.iqformer.context_projection(states.to(image_knowledge.dtype))
        states = self.masked_text_block(states, image_knowledge[:rows])  # [M, T, d]
        columns = chosen_columns(labels != -100) if columns is None else columns  # [M, k]
        states, targets = (take_columns(tensor, columns).flatten(0, 1) for tensor in (states, labels))
        return masked_text_loss(self.token_decoder(states), targets, count, smoothing)

    def text_to_knowledge(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        knowledge: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        count: Count = None,
        columns: dict[str, torch.Tensor] | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The LLM's last hidden state before knowledge vector i predicts vector i, with the vectors before it as input.

        Args:
            input_ids: captions with n placeholders behind them, padded so that each row ends in its last placeholder
                [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T].
            knowledge: [B, n, h]; as the target it is detached unless the configuration says otherwise, or knowledge
                would become easy to predict instead of predictable.
            position_ids: [B, T]; default, as the LLM counts.
            count: number of rows in the whole batch; default B.
            columns: what `locate_columns` found in `input_ids`.
            states: the hidden states [B, n, d_llm], if the LLM has read the captions already.
        """
        if states is None:
            states = read_draws(self, input_ids, attention_mask, knowledge, position_ids, columns or {})
        predicted = self.knowledge_predictor(states.to(self.knowledge_predictor.weight.dtype))
        target = knowledge.detach() if self.config.detach_knowledge_target else knowledge
        return text_to_knowledge_loss(predicted, target, count)


__all__ = [
    "OBJECTIVE_TABLE",
    "Objective",
    "VikdfForPreTraining",
    "VikdfPreTrainingOutput",
    "VikdfReconstructionBlock",
    "active_objectives",
    "add_objective",
    "cells_to_pixels",
    "masked_image_loss",
    "masked_text_loss",
    "matching_loss",
    "needs_of",
    "text_to_knowledge_loss",
]
