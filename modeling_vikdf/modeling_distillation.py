"""Training VIKDF on image-text pairs: the three objectives of knowledge distillation and the two of BVIF.

The objectives are functions of tensors (first half of the file); `VikdfForPreTraining` only computes the tensors and
weighs the results. So any subset with any weights is a configuration: the five jointly as the authors' code trains
them, or distillation first and integration second as the paper presents them.

Every objective is a sum over what it scores (pairs, pixels, tokens, components) divided by a count, over a batch the
mean. A trainer that splits a batch over micro-batches or processes passes the whole batch's counts, and the parts add
up to the mean over the whole.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_vikdf import VikdfConfig
from .modeling_vikdf import VikdfForConditionalGeneration


TOKENS = ("masked_text", "knowledge_to_text", "reply")  # the objectives that predict tokens
BVIF = ("knowledge_to_text", "text_to_knowledge")  # the objectives that take a pair's knowledge through the LLM
MATCHING = {"text_image_matching": "image", "text_text_matching": "partner"}  # and what each matches texts with


def matching_loss(
    text: torch.Tensor,
    image: torch.Tensor,
    logit_scale: torch.Tensor,
    other_text: torch.Tensor | None = None,
    other_image: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """
    Symmetric InfoNCE over a whole batch (paper, "Text-Image Matching"; Radford et al. 2021, CLIP, figure 3), of texts
    and images, or of texts and other texts about the same images.

    Of a batch that is computed in `parts` (micro-batches, processes), each part passes the embeddings of all others
    without gradient. The values that the parts return add up to the loss of the whole batch, and so do the gradients.

    Args:
        text, image: unit vectors of the part's pairs [B, d].
        logit_scale: logarithm of the inverse temperature, scalar.
        other_text, other_image: unit vectors of the other parts' pairs [R, d].
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
    predicted: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """
    Mean absolute error on masked pixels (paper, "Text-Assisted Masked Image Modelling"; Xie et al. 2022, SimMIM).

    Args:
        predicted, pixels: [B, 3, H, W].
        mask: 1 for the pixels to score, [B, H, W].
        count: number of scored pixels in the whole batch; default those of `mask`.

    Returns:
        Scalar; 0 when nothing is masked.
    """
    error = (predicted - pixels).abs().sum(1) * mask  # [B, H, W]
    return error.sum() / (_count(mask.sum(), count) * pixels.shape[1])


def masked_text_loss(
    logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | float | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """
    Cross-entropy of the chosen tokens (paper, "Image-Assisted Masked Text Modelling"; Devlin et al. 2019, BERT).

    Args:
        logits: of the chosen tokens alone [K, vocabulary].
        targets: their true ids [K].
        count: number of chosen tokens in the whole batch; default K.
        smoothing: share of each target's probability that is spread over the vocabulary (label smoothing).

    Returns:
        Scalar, in nats a token; 0 when no token was chosen.
    """
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    return loss / _count(torch.tensor(len(targets), device=logits.device), count)


def text_to_knowledge_loss(
    predicted: torch.Tensor, knowledge: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """
    Negative log-likelihood of knowledge under a Gaussian of unit variance, up to constants: the mean squared error
    (paper, "Bidirectional Variational Information Fusion"; Barber & Agakov 2003 for the bound).

    Args:
        predicted, knowledge: [B, n, h].
        count: number of rows in the whole batch; default B.

    Returns:
        Scalar, mean over rows, vectors and components.
    """
    rows = torch.tensor(len(predicted), device=predicted.device)
    error = (predicted.float() - knowledge.float()).square().sum()
    return error / (_count(rows, count) * predicted[0].numel())


def _count(own: torch.Tensor, whole: torch.Tensor | float | None) -> torch.Tensor:
    """The divisor: the whole batch's count if known, and never 0."""
    return torch.clamp(torch.as_tensor(own if whole is None else whole, device=own.device), min=1)


class VikdfReconstructionBlock(nn.Module):
    """
    The one-block transformer through which a masked modality asks the other one's knowledge: cross-attention, then a
    feed-forward, each with its residual and a LayerNorm behind it. There is no attention among the queries.
    """

    def __init__(self, width: int, knowledge_width: int, dropout: float = 0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            width, num_heads=4, dropout=dropout, kdim=knowledge_width, vdim=knowledge_width, batch_first=True
        )
        self.norm1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, knowledge: torch.Tensor) -> torch.Tensor:
        """States [B, S, width] that ask knowledge [B, n, h] -> [B, S, width]."""
        asked, _ = self.attention(states, knowledge, knowledge, need_weights=False)
        states = self.norm1(states + self.dropout(asked))
        return self.norm2(states + self.dropout(self.ffn(states)))


@dataclass
class VikdfPreTrainingOutput(ModelOutput):
    """
    loss: weighted sum of the objectives, scalar.
    losses: name of each objective -> its own value, unweighted and without gradient.
    text_knowledge, image_knowledge: K^T, K^I [B, n, h].
    text_embeddings, image_embeddings, partner_embeddings: what matching compares, unit vectors [B, d].
    context_states, vision_states, partner_states: what the frozen encoders say [B, T, d], [B, S, d], [B, U, d]; with
        `embed_only` alone.
    hidden_states, attentions: of the LLM that reads the captions (knowledge -> text), if asked for, as in
        `VikdfForConditionalGeneration`.

    What the objectives do not need is not computed and `None`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    text_knowledge: torch.Tensor | None = None
    image_knowledge: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    image_embeddings: torch.Tensor | None = None
    partner_embeddings: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    vision_states: torch.Tensor | None = None
    partner_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VikdfForPreTraining(VikdfForConditionalGeneration):
    """
    A dialogue model with the heads of the objectives. Objectives of weight 0 in `config.loss_weights` are not computed
    and need no inputs. `VikdfForConditionalGeneration` loads its checkpoints and leaves the heads out.
    """

    main_input_name = "context_input_ids"
    _keep_in_fp32_modules_strict = [
        *VikdfForConditionalGeneration._keep_in_fp32_modules_strict,
        "masked_image_block",
        "masked_text_block",
        "pixel_decoder",
        "token_decoder",
        "knowledge_predictor",
        "caption_shift",
    ]

    # a checkpoint that was trained with other objectives has other heads: new ones start fresh, old ones are left
    _keys_to_ignore_on_load_missing = VikdfForConditionalGeneration._keys_to_ignore_on_load_unexpected
    accepts_loss_kwargs = True  # for Trainer: losses are divided by counts over all accumulated batches

    def __init__(self, config: VikdfConfig):
        super().__init__(config)
        width, h = config.iqformer_config.encoder_hidden_size, config.iqformer_config.hidden_size
        if config.loss_weights["masked_image"]:
            if config.vision_config is None:
                raise ValueError("masked_image needs a vision encoder, and config.vision_config is None.")
            patch = config.vision_config.patch_size
            self.masked_image_block = VikdfReconstructionBlock(width, h).float()
            self.pixel_decoder = nn.Linear(width, 3 * patch**2, dtype=torch.float32)  # each patch state to its pixels
        if config.loss_weights["masked_text"]:
            self.masked_text_block = VikdfReconstructionBlock(width, h).float()
            self.token_decoder = nn.Linear(width, config.context_config.vocab_size, dtype=torch.float32)
        if config.loss_weights["text_to_knowledge"]:
            self.knowledge_predictor = nn.Linear(config.text_config.hidden_size, h, dtype=torch.float32)
        if config.loss_weights["knowledge_to_text"]:
            # What makes the LLM write captions is of no use in a dialogue. Learnt beside the base vectors, which then
            # are the replies' alone, it stays behind with the other heads. Frozen, it leaves the base to both.
            size = (config.num_knowledge_tokens, config.text_config.hidden_size)
            self.caption_shift = nn.Parameter(torch.zeros(size, dtype=torch.float32))
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
    ) -> VikdfPreTrainingOutput:
        """
        Args:
            context_input_ids, context_attention_mask: captions for the text encoder [B, T]; `context_states`
                [B, T, d] are their cached states.
            pixel_values: pictures [B, 3, H, W]; `vision_states` [B, S, d] are their cached states, and then only the
                pictures of the first M rows are needed, for masked modelling.
            masked_cells: cells of a square grid over the picture to score [M, cells] (bool); hidden_cells: those of
                them to hide from the encoder. M <= B: the first M rows take part.
            masked_input_ids: captions with tokens replaced [M, T]; masked_labels: the true ids, -100 elsewhere.
            input_ids, attention_mask, labels: prompts with placeholders, the captions behind (knowledge -> text).
            draw_input_ids, draw_attention_mask, draw_position_ids: captions with placeholders behind them (text ->
                knowledge).
            use_image_knowledge: rows in which BVIF's knowledge is the picture's [B] (bool); default: the text's.
            partner_input_ids, partner_attention_mask: another caption of each picture [B, U] (text-text matching);
                `partner_states` [B, U, d] are their cached states.
            other_text, other_image, other_partner, parts: what other parts of the batch embedded, and how many parts
                there are; see `matching_loss`.
            counts: objective -> count over the whole batch; see the loss functions.
            smoothing: label smoothing of the objectives that predict tokens (masked_text, knowledge_to_text, reply).
            embed_only: whether to stop at the matching embeddings.
            dialogues: text dialogues with labels, as inputs of `VikdfForConditionalGeneration.forward` (reply).
            output_hidden_states, output_attentions: whether to return those of the LLM that reads the captions.

        Raises:
            ValueError: if an objective of positive weight lacks an input, or none has a positive weight; if states are
                asked for that no objective computes.
        """
        weights = {name: weight for name, weight in self.config.loss_weights.items() if weight}
        states = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        states = {name: asked for name, asked in states.items() if asked is not None}  # else the LLM's own settings
        if any(states.values()) and (embed_only or "knowledge_to_text" not in weights):
            raise ValueError(
                f"{' and '.join(name for name, asked in states.items() if asked)}=True asks for what the LLM computes "
                "when it reads captions, but the objective knowledge_to_text is not computed here."
            )
        if not weights and not embed_only:
            raise ValueError("No objective has a positive weight in config.loss_weights.")
        counts = counts or {}
        sides = [MATCHING[name] for name in weights if name in MATCHING]  # what texts are matched with
        fusing = bool({*weights} & {*BVIF})
        text = image = partner = None
        if sides or fusing or "masked_image" in weights:
            context_states, text = self._read(context_input_ids, context_attention_mask, context_states)
        if "partner" in sides:
            partner_states, partner = self._read(partner_input_ids, partner_attention_mask, partner_states)
        if "image" in sides or (fusing and use_image_knowledge is not None) or "masked_text" in weights:
            if vision_states is None and pixel_values is not None:
                vision_states = self.encode_images(pixel_values)  # [B, S, d]
            if vision_states is not None:
                image = self.iqformer.image_knowledge(vision_states)  # K^I [B, n, h]

        losses, embeddings, read = {}, {}, ModelOutput()
        if "image" in sides:
            _require("text_image_matching", context_input_ids=text, pixel_values=image)
            embeddings["image_embeddings"] = self.matching_head.image(image)
        if "partner" in sides:
            _require("text_text_matching", context_input_ids=text, partner_input_ids=partner)
            embeddings["partner_embeddings"] = self.matching_head.text(partner)
        if sides:
            embeddings["text_embeddings"] = self.matching_head.text(text)
        if embed_only:
            return VikdfPreTrainingOutput(
                **embeddings, context_states=context_states, vision_states=vision_states, partner_states=partner_states
            )
        others = {"image": other_image, "partner": other_partner}
        for name, side in MATCHING.items():
            if name in weights:
                pair = embeddings["text_embeddings"], embeddings[f"{side}_embeddings"]
                losses[name] = matching_loss(*pair, self.matching_head.logit_scale, other_text, others[side], parts)
        if "masked_image" in weights:
            _require("masked_image", context_input_ids=text, pixel_values=pixel_values, masked_cells=masked_cells)
            losses["masked_image"] = self.masked_image_modelling(
                pixel_values[: len(masked_cells)], masked_cells, hidden_cells, text, counts.get("masked_image")
            )
        if "masked_text" in weights:
            _require("masked_text", pixel_values=image, masked_input_ids=masked_input_ids, masked_labels=masked_labels)
            losses["masked_text"] = self.masked_text_modelling(
                masked_input_ids, context_attention_mask, masked_labels, image, counts.get("masked_text"), smoothing
            )
        if fusing:
            knowledge = self._choose_knowledge(text, image, use_image_knowledge)
        if "knowledge_to_text" in weights:
            _require("knowledge_to_text", input_ids=input_ids, labels=labels)
            read = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                knowledge=knowledge,
                base=self._caption_base(),
                labels=labels,
                num_items_in_batch=counts.get("knowledge_to_text"),
                smoothing=smoothing,
                return_dict=True,
                **states,
            )
            losses["knowledge_to_text"] = read.loss
        if "text_to_knowledge" in weights:
            _require("text_to_knowledge", draw_input_ids=draw_input_ids)
            losses["text_to_knowledge"] = self.text_to_knowledge(
                draw_input_ids, draw_attention_mask, knowledge, draw_position_ids, counts.get("text_to_knowledge")
            )
        if "reply" in weights:
            _require("reply", dialogues=dialogues)
            given = {"num_items_in_batch": counts.get("reply"), "smoothing": smoothing, "return_dict": True}
            losses["reply"] = super().forward(**dialogues, **given).loss
        loss = sum(weights[name] * value for name, value in losses.items())
        return VikdfPreTrainingOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            text_knowledge=text,
            image_knowledge=image,
            **embeddings,
            hidden_states=read.get("hidden_states"),
            attentions=read.get("attentions"),
        )

    @classmethod
    def can_generate(cls) -> bool:
        """No: replies come from the dialogue model, which loads the same checkpoint."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: replies come from the dialogue model, which loads the same checkpoint."""
        raise NotImplementedError("Load the checkpoint with VikdfForConditionalGeneration to generate replies.")

    def _read(
        self, input_ids: torch.Tensor | None, mask: torch.Tensor | None, states: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """States [B, T, d] of texts, those given or the frozen encoder's, and their K^T [B, n, h], or twice `None`."""
        if states is None and input_ids is not None:
            states = self.encode_context(input_ids, mask)
        return states, None if states is None else self.iqformer.text_knowledge(states, mask)

    def _caption_base(self) -> torch.Tensor:
        """Base vectors [n, d_llm] of captions."""
        alone = self.caption_shift.requires_grad
        return (self.knowledge_base.detach() if alone else self.knowledge_base) + self.caption_shift

    def _choose_knowledge(
        self, text: torch.Tensor | None, image: torch.Tensor | None, use_image: torch.Tensor | None
    ) -> torch.Tensor:
        """BVIF's K [B, n, h]: the text's, the picture's, or either by row."""
        if use_image is None:
            _require(" and ".join(name for name in BVIF if self.config.loss_weights[name]), context_input_ids=text)
            return text
        if text is None and use_image.all():
            text = image
        if image is None and not use_image.any():
            image = text
        if text is None or image is None:
            raise ValueError(
                "use_image_knowledge asks for the knowledge of texts in some rows and of pictures in others, but the "
                f"batch lacks {'context_input_ids' if text is None else 'pixel_values'}."
            )
        return torch.where(use_image[:, None, None], image, text)

    def masked_image_modelling(
        self,
        pixel_values: torch.Tensor,
        masked_cells: torch.Tensor,
        hidden_cells: torch.Tensor | None,
        text_knowledge: torch.Tensor,
        count: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Hidden cells are zeroed, the states of patches to score ask K^T, pixels come from these states alone."""
        rows, _, height, width = pixel_values.shape
        hidden = cells_to_pixels(masked_cells if hidden_cells is None else hidden_cells, height, width)  # [M, H, W]
        states = self.encode_images(pixel_values * (1 - hidden[:, None]))  # [M, S, d]
        states = self.iqformer.vision_projection(states.to(text_knowledge.dtype))
        patch = self.config.vision_config.patch_size
        grid = (height // patch, width // patch)
        states = states[:, states.shape[1] - grid[0] * grid[1] :]  # [M, patches, d]: without class and register states
        mask = _patches(cells_to_pixels(masked_cells, height, width, patch)[:, None], patch)  # [M, patches, patch^2]
        pixels = _patches(pixel_values[..., : grid[0] * patch, : grid[1] * patch], patch)  # [M, patches, 3 * patch^2]
        # the patches with something to score, and at least one: what runs in a step must not depend on chance
        scored = mask.any(-1)  # [M, patches]
        most = max(int(scored.sum(1).max()), 1)
        chosen = scored.int().argsort(dim=1, descending=True)[:, :most, None]  # [M, k, 1]
        states, mask, pixels = (
            each.gather(1, chosen.expand(-1, -1, each.shape[-1])) for each in (states, mask, pixels)
        )
        predicted = self.pixel_decoder(self.masked_image_block(states, text_knowledge[:rows]))  # [M, k, 3 * patch^2]
        predicted, pixels = (each.unflatten(-1, (3, -1)).transpose(1, 2) for each in (predicted, pixels))
        return masked_image_loss(predicted, pixels, mask, count)  # of [M, 3, k, patch^2]

    def masked_text_modelling(
        self,
        masked_input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        image_knowledge: torch.Tensor,
        count: torch.Tensor | float | None = None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The encoder reads the caption with tokens replaced; the chosen ones' states ask K^I for the true ids."""
        rows = len(masked_input_ids)
        mask = None if attention_mask is None else attention_mask[:rows]
        states = self.encode_context(masked_input_ids, mask)  # [M, T, d]
        states = self.iqformer.context_projection(states.to(image_knowledge.dtype))
        chosen = labels != -100  # [M, T]
        states = self.masked_text_block(states, image_knowledge[:rows])[chosen]  # [K, d]
        return masked_text_loss(self.token_decoder(states), labels[chosen], count, smoothing)

    def text_to_knowledge(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        knowledge: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        count: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """
        The LLM's last hidden state before knowledge vector i predicts vector i, with the vectors before it as input.

        Args:
            input_ids: captions with n placeholders behind them, padded so that each row ends in its last placeholder
                [B, T].
            attention_mask: [B, T]; position_ids [B, T]: default, as the LLM counts.
            knowledge: [B, n, h]; as the target it is detached unless the configuration says otherwise, or knowledge
                would become easy to predict instead of predictable.
        """
        n = self.config.num_knowledge_tokens
        if not (input_ids[:, -n:] == self.config.knowledge_token_id).all():
            raise ValueError(f"draw_input_ids must end in {n} placeholders in every row: pad on the left.")
        embeds = self.embed_prompt(input_ids, knowledge)[:, :-1]  # [B, T - 1, d_llm]: nothing follows the last vector
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = {} if position_ids is None else {"position_ids": position_ids[:, :-1]}
        outputs = self.run_language_model(
            embeds,
            mask[:, :-1],
            **positions,
            prefix=input_ids.shape[1] - n - 1,  # the state of the token before the first vector is wanted
            language_model=self.language_model.base_model,
        )
        states = outputs.last_hidden_state[:, -n:]  # [B, n, d_llm]
        predicted = self.knowledge_predictor(states.to(self.knowledge_predictor.weight.dtype))
        target = knowledge.detach() if self.config.detach_knowledge_target else knowledge
        return text_to_knowledge_loss(predicted, target, count)


def cells_to_pixels(cells: torch.Tensor, height: int, width: int, patch: int = 1) -> torch.Tensor:
    """
    A square grid of cells [M, cells] over pictures of H x W pixels as a pixel mask of 0 and 1, [M, H', W']: H' and W'
    without what remains behind the last whole patch, which encoders do not see.
    """
    side = math.isqrt(cells.shape[1])
    if side**2 != cells.shape[1]:
        raise ValueError(f"masked_cells: expected a square grid in each row, got {cells.shape[1]} cells.")
    grid = cells.view(-1, 1, side, side).float()
    mask = F.interpolate(grid, size=(height, width), mode="nearest")[:, 0]  # [M, H, W]
    return mask[:, : height // patch * patch, : width // patch * patch]


def _patches(pictures: torch.Tensor, patch: int) -> torch.Tensor:
    """Pictures [M, C, H, W] -> their patches [M, patches, C * patch^2]."""
    return F.pixel_unshuffle(pictures, patch).flatten(2).transpose(1, 2)


def _require(objective: str, **inputs: Any) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(
            f"The objective {objective!r} has a positive weight in config.loss_weights but the batch lacks "
            f"{', '.join(missing)}. Add the inputs (or cached states in their place), or set the weight to 0."
        )


__all__ = [
    "VikdfForPreTraining",
    "VikdfPreTrainingOutput",
    "VikdfReconstructionBlock",
    "cells_to_pixels",
    "masked_image_loss",
    "masked_text_loss",
    "matching_loss",
    "text_to_knowledge_loss",
]
