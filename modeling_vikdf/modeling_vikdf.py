"""VIKDF's dialogue model: context -> knowledge -> frozen LLM -> reply.

Reads as the data flows: `get_text_knowledge` / `get_image_knowledge` (frozen encoder, IQ-Former), `project_knowledge`
(into the LLM's embedding space), `embed_prompt` (splice at the placeholders), `run_language_model`, `reply_loss`.

Separate files load and attach the frozen backbones (modeling_pretrained.py), leave them out of checkpoints
(modeling_saving.py), generate replies (modeling_generation.py), read the text before the knowledge once
(modeling_prefix.py), and do gradient checkpointing (modeling_checkpointing.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2QFormerConfig,
    Cache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig
from .modeling_checkpointing import ReadOnlyCache, checkpointed_layers, checkpointing, unwritten_cache
from .modeling_compilation import has_compiled_layers, selects_outputs
from .modeling_generation import KnowledgeGenerationMixin
from .modeling_iqformer import VikdfIQFormer, VikdfMatchingHead, initialize_from_bert, whole_mask
from .modeling_prefix import CACHE, pop_cache, pop_columns, read_prefix, read_prompts
from .modeling_pretrained import VikdfPreTrainedModel, find_backbone


logger = logging.get_logger(__name__)


def reply_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    count: torch.Tensor | float | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Negative log-likelihood of a text under the LLM, given the knowledge in its prompt.

    See the paper, "Bidirectional Variational Information Fusion", knowledge -> text.

    Args:
        logits: [B, k, vocabulary]; computed in float32 whatever their dtype.
        targets: token ids that the logits predict [B, k], int64; -100 is ignored.
        count: number of targets in the whole batch, if this is a part of it; default: those in `targets`.
        smoothing: share of each target's probability that is spread over the vocabulary (label smoothing).

    Returns:
        Scalar, float32, in nats per token; 0 without targets.
    """
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    count = (targets != -100).sum() if count is None else torch.as_tensor(count, device=logits.device)
    return loss / count.clamp(min=1)


@dataclass
class VikdfCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast` of the installed transformers, whatever it calls the cache, and the knowledge.

    loss: mean negative log-likelihood of the labels, in nats per token, scalar.
    logits: [B, T, vocabulary]; with `labels` only the positions that predict a label in any row, [B, k, vocabulary],
        and of a collated batch those of each row's own labels.
    knowledge: knowledge vectors [B, m, h], float32: n of the text, then n of the picture, whichever were given.
    """

    knowledge: torch.Tensor | None = None


class VikdfForConditionalGeneration(VikdfPreTrainedModel, KnowledgeGenerationMixin):
    """
    The dialogue model: a frozen LLM whose prompt carries knowledge vectors at placeholder tokens.

    P(reply | context) = P_LLM(reply | prompt, K), where K = IQ(Q; H^T) comes from the context's words; a picture adds
    IQ(Q; H^I). The vector spliced in at placeholder i is base_i + gate_i * (W k_i + b). Base 0 and gate 1 give the
    paper's linear projection; gate 0 silences the knowledge. Without placeholders the model is its LLM.
    """

    # a pre-training checkpoint also holds the heads of its objectives, which are called like this
    _keys_to_ignore_on_load_unexpected = [r"^\w+_(block|decoder|predictor)\.", r"^\w+_shift$"]

    def __init__(self, config: VikdfConfig):
        super().__init__(config)
        n, d_llm = config.num_knowledge_tokens, config.text_config.hidden_size
        # float32 whatever the model's dtype, see `_keep_in_fp32_modules_strict`
        self.iqformer = VikdfIQFormer(config).float()
        self.matching_head = VikdfMatchingHead(config).float()
        self.language_projection = nn.Linear(config.iqformer_config.hidden_size, d_llm, dtype=torch.float32)
        self.knowledge_base = nn.Parameter(torch.zeros(n, d_llm, dtype=torch.float32))
        self.knowledge_gate = nn.Parameter(torch.ones(n, dtype=torch.float32))
        if config.reward_layer is not None:  # a buffer, because it is fitted in closed form
            self.register_buffer("reward_weight", torch.zeros(d_llm, dtype=torch.float32))
        self.post_init()
        if config.reward_layer is not None:
            self._keep_in_fp32_modules_strict.add("reward_weight")

    @classmethod
    def from_backbones(
        cls,
        language_model: str,
        context_encoder: str,
        vision_encoder: str | None = None,
        *,
        processor: Any,
        revisions: dict[str, str] | None = None,
        iqformer_config: dict | None = None,
        bert: str | None = None,
        base_text: str | None = None,
        initial_gate: float = 0.0,
        dtype: str | torch.dtype = "auto",
        **config_kwargs: Any,
    ) -> "VikdfForConditionalGeneration":
        """
        Builds a new, untrained model around pretrained backbones.

        Args:
            language_model: folder, Hub id or known package of the LLM.
            context_encoder: the same for the text encoder; it and `vision_encoder` may name one two-tower repository
                (CLIP, SigLIP).
            vision_encoder: the same for the vision encoder; `None` for a model that takes no pictures.
            processor: the `VikdfProcessor` that writes the prompts; its `num_knowledge_tokens` and
                `knowledge_token_id` become the model's.
            revisions: role -> revision to pin, e.g. `{"language_model": "main"}`.
            iqformer_config: fields of `Blip2QFormerConfig` (layers, width, ...).
            bert: a BERT-like checkpoint whose layers, feed-forward included, initialise the IQ-Former, which takes
                its sizes unless `iqformer_config` overrides them.
            base_text: a neutral sentence whose embeddings, repeated or cut to n tokens, become the base vectors, with
                gates at `initial_gate`. `None`: base 0 and gate 1 as in the paper.
            initial_gate: gate with `base_text`; 0 silences the knowledge until the gate is trained.
            dtype: of the backbones; "auto" keeps each one's saved dtype.
            config_kwargs: further fields of `VikdfConfig`.

        Raises:
            OSError: if a backbone cannot be found.
            ValueError: if the parts do not fit together.
        """
        names = {
            "language_model": language_model,
            "context_encoder": context_encoder,
            "vision_encoder": vision_encoder,
        }
        backbones = {
            role: {"repo_id": name, "revision": (revisions or {}).get(role)} for role, name in names.items() if name
        }
        sub_configs = {}
        for role, source in backbones.items():
            path, revision = find_backbone(source["repo_id"], source["revision"])
            sub_configs[BACKBONE_CONFIGS[role]] = AutoConfig.from_pretrained(path, revision=revision)
        iqformer_config = dict(iqformer_config or {})
        if bert is not None:
            bert_path, bert_revision = find_backbone(bert, None)
            bert_model = AutoModel.from_pretrained(bert_path, revision=bert_revision, dtype=torch.float32)
            same = set(Blip2QFormerConfig().to_dict()) & set(bert_model.config.to_dict())
            same -= {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
            iqformer_config = {key: getattr(bert_model.config, key) for key in same} | iqformer_config
        config = cls.config_class(
            **sub_configs,
            iqformer_config=iqformer_config,
            backbones=backbones,
            num_knowledge_tokens=processor.num_knowledge_tokens,
            knowledge_token_id=processor.knowledge_token_id,
            **config_kwargs,
        )
        for role, source in backbones.items():
            getattr(config, BACKBONE_CONFIGS[role]).name_or_path = source["repo_id"]  # not this machine's folder
        model = cls(config)
        model.attach_backbones(dtype=dtype)
        if bert is not None:
            initialize_from_bert(model.iqformer, bert_model)
        model.generation_config = model.language_model.generation_config
        model._start_at_the_embeddings(processor, base_text, initial_gate)
        return model.eval()

    @torch.no_grad()
    def _start_at_the_embeddings(self, processor: Any, base_text: str | None, initial_gate: float) -> None:
        """Scales the projection to the LLM's embeddings and initialises the base vectors from a text."""
        embed = self.get_input_embeddings()  # called, not read: Gemma scales what it looks up
        device, step = embed.weight.device, max(1, embed.num_embeddings // 4096)
        # K leaves a LayerNorm, so |k| is about sqrt(h): let |W k| start at the token embeddings' mean norm
        norm = embed(torch.arange(0, embed.num_embeddings, step, device=device)).float().norm(dim=-1).mean()
        self.language_projection.weight.normal_(std=norm / self.language_projection.weight.numel() ** 0.5)
        if base_text is not None:
            n = self.config.num_knowledge_tokens
            ids = processor.tokenizer(base_text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            ids = ids.repeat(-(-n // len(ids)))[:n]  # [n]
            self.knowledge_base.copy_(embed(ids.to(device)))
            self.knowledge_gate.fill_(initial_gate)

    @torch.no_grad()
    def encode_context(self, context_input_ids: torch.Tensor, context_attention_mask: torch.Tensor) -> torch.Tensor:
        """Token states H^T [B, T, d] of the frozen text encoder; CLIP's are projected by CLIP's own projection."""
        self._require("context_encoder")
        longest = getattr(self.config.context_config, "max_position_embeddings", None)
        if longest is not None and context_input_ids.shape[1] > longest:
            raise ValueError(
                f"The context has {context_input_ids.shape[1]} tokens, but the text encoder reads at most {longest}: "
                "set the processor's max_context_length."
            )
        encoder, is_clip = self.context_encoder, self.config.context_config.model_type == "clip_text_model"
        if self.training and context_attention_mask is not None and (is_clip or encoder.config.model_type == "bert"):
            context_attention_mask = whole_mask(context_attention_mask, encoder, encoder.dtype, causal=is_clip)
        states = encoder(input_ids=context_input_ids, attention_mask=context_attention_mask).last_hidden_state
        return encoder.text_projection(states) if is_clip else states  # [B, T, d]

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch states H^I [B, P+1, d] of the frozen vision encoder; CLIP's are projected by CLIP's own projection."""
        self.attach_vision_encoder()
        encoder = self.vision_encoder
        states = encoder(pixel_values=pixel_values.to(encoder.dtype)).last_hidden_state  # [B, P+1, d_vision]
        if self.config.vision_config.model_type == "clip_vision_model":
            if self.config.vision_post_layernorm:
                states = encoder.vision_model.post_layernorm(states)
            states = encoder.visual_projection(states)
        return states

    def get_text_knowledge(
        self, context_input_ids: torch.Tensor, context_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        K^T [B, n, h], float32: the knowledge that a text evokes.

        Args:
            context_input_ids: ids of the text encoder's tokenizer [B, T].
            context_attention_mask: 1 for tokens, 0 for padding, [B, T]; default all 1.

        Raises:
            ValueError: if the text encoder is not attached, or T exceeds its maximum length.
        """
        if context_attention_mask is None:
            context_attention_mask = torch.ones_like(context_input_ids)
        states = self.encode_context(context_input_ids, context_attention_mask)
        return self.iqformer.text_knowledge(states, context_attention_mask)

    def get_text_attention(
        self, context_input_ids: torch.Tensor, context_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Which tokens the queries attend to: the IQ-Former's cross-attention, averaged over layers and heads.

        Args and Raises: as for `get_text_knowledge`.

        Returns:
            [B, n, T], float32; each query's weights sum to 1, those of padding are 0.
        """
        if context_attention_mask is None:
            context_attention_mask = torch.ones_like(context_input_ids)
        states = self.encode_context(context_input_ids, context_attention_mask)
        return self.iqformer.text_attention(states, context_attention_mask)

    def get_image_knowledge(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        K^I [B, n, h], float32: the knowledge that a picture shows.

        Args:
            pixel_values: preprocessed pictures [B, 3, H, W].

        Raises:
            OSError: if the vision encoder cannot be found.
            ValueError: if the model was built without one.
        """
        return self.iqformer.image_knowledge(self.encode_images(pixel_values))

    def get_text_embeddings(
        self, context_input_ids: torch.Tensor, context_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unit vectors [B, d] of texts [B, T]; their dot products with those of pictures are cosines."""
        return self.matching_head.text(self.get_text_knowledge(context_input_ids, context_attention_mask))

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, d] of pictures [B, 3, H, W]; d is `matching_dim`, or n times that with pooling "each"."""
        return self.matching_head.image(self.get_image_knowledge(pixel_values))

    def get_knowledge(
        self,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Knowledge of the text, then of the picture: [B, n, h] for one of them, [B, 2n, h] for both, or `None`."""
        parts = []
        if context_input_ids is not None:
            parts.append(self.get_text_knowledge(context_input_ids, context_attention_mask))
        if pixel_values is not None:
            parts.append(self.get_image_knowledge(pixel_values))
        return torch.cat(parts, dim=1) if parts else None

    def project_knowledge(self, knowledge: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """
        Knowledge [B, m, h] -> vectors for the LLM's prompt [B, m, d_llm]: base_i + gate_i * (W k_i + b).

        Args:
            knowledge: [B, m, h], m = n or 2n.
            base: base vectors [n, d_llm]; default the model's.

        Raises:
            ValueError: unless m is n or 2n and the width is h, and every value of given knowledge is finite.
        """
        n, width = self.config.num_knowledge_tokens, self.config.iqformer_config.hidden_size
        if knowledge.dim() != 3 or knowledge.shape[1] not in (n, 2 * n) or knowledge.shape[2] != width:
            raise ValueError(
                f"knowledge must have the shape [batch, {n}, {width}], or [batch, {2 * n}, {width}] for text and "
                f"picture together; got {list(knowledge.shape)}."
            )
        # what is being trained shows in the loss if it diverges, and to look here is to wait for the GPU
        if not knowledge.requires_grad and not torch.isfinite(knowledge).all():
            raise ValueError("knowledge holds NaN or infinite values; check what it was computed from.")
        sources = knowledge.shape[1] // n
        base = (self.knowledge_base if base is None else base).repeat(sources, 1)  # [m, d_llm]
        gate = self.knowledge_gate.repeat(sources)[:, None]  # [m, 1]
        return base + gate * self.language_projection(knowledge.to(self.language_projection.weight))

    @torch.no_grad()
    def shrink_knowledge(self, mean: torch.Tensor, share: float) -> None:
        """
        Shrinks knowledge towards its mean: from now on the LLM reads mean_i + share * (k_i - mean_i) for k_i.

        Folded into base and gate, so it costs nothing and is saved with them. Knowledge varies more between contexts
        than replies depend on it, so a share below 1, chosen on validation dialogues, can make replies likelier.

        Args:
            mean: [n, h], the mean knowledge over many contexts.
            share: fraction of the deviations from the mean that is kept; 1 changes nothing, 0 leaves only the mean.

        Raises:
            ValueError: unless the share is between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is the fraction of the deviations to keep, between 0 and 1; got {share}.")
        gate = self.knowledge_gate[:, None]  # [n, 1]
        self.knowledge_base += (1 - share) * gate * self.language_projection(mean)
        self.knowledge_gate *= share

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        knowledge: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Token embeddings [B, T, d_llm] with the placeholders replaced by the projected knowledge.

        Args:
            input_ids: prompt [B, T] with one placeholder for each knowledge vector.
            knowledge: [B, m, h], m = n or 2n (text, then picture).
            image_mask: rows that have a picture [B] (bool); in the others the last n vectors are unused.
            base: base vectors [n, d_llm]; default the model's.
            columns: those of the placeholders [B, m], if they are known, which saves looking for them.

        Raises:
            ValueError: if a row's placeholders and knowledge vectors differ in number.
        """
        token_id = self.config.knowledge_token_id
        placeholders = torch.eq(input_ids, -1 if token_id is None else token_id)  # [B, T]
        if knowledge is None:
            # a single token is a decoding step: its prompt has been checked before
            if input_ids.shape[1] > 1 and placeholders.any():
                raise ValueError(
                    f"The prompt holds {int(placeholders.sum())} knowledge placeholders but no knowledge was given. "
                    "Pass context_input_ids, pixel_values or knowledge, or write the prompt with use_knowledge=False."
                )
            return self.get_input_embeddings()(input_ids)
        if token_id is None:
            raise ValueError("config.knowledge_token_id is not set: it must be the id that the processor writes.")
        vectors = self.project_knowledge(knowledge, base)  # [B, m, d_llm]
        if columns is not None and columns.shape == vectors.shape[:2]:
            embeds = self.get_input_embeddings()(input_ids.scatter(1, columns, 0))  # [B, T, d_llm]
            return embeds.scatter(1, columns[..., None].expand_as(vectors), vectors.to(embeds.dtype))
        # the placeholder's own embedding is unused, so its id may lie outside the LLM's vocabulary
        embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))  # [B, T, d_llm]
        keep = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)  # [B, m]
        if image_mask is not None:
            keep[:, -self.config.num_knowledge_tokens :] = image_mask.to(keep.device)[:, None]
        counts, expected = placeholders.sum(1), keep.sum(1)
        if counts.shape != expected.shape or (counts != expected).any():
            hint = "Was the prompt written by this model's processor, and not truncated since?"
            if counts.shape == expected.shape and (counts - expected == self.config.num_knowledge_tokens).any():
                hint = (
                    "The prompt has placeholders for a text and a picture, but only one was given: pass both "
                    "context_input_ids and pixel_values, also with a cache that does not cover all placeholders."
                )
            raise ValueError(
                f"Each row needs one placeholder (id {token_id}) for each knowledge vector: "
                f"expected {expected.tolist()}, found {counts.tolist()}. {hint}"
            )
        return embeds.masked_scatter(placeholders[..., None], vectors[keep].to(embeds.dtype))

    @can_return_tuple
    @selects_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        knowledge: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> VikdfCausalLMOutputWithPast:
        """
        Runs encoders, IQ-Former, projection and LLM on one batch.

        Args:
            input_ids: prompt [B, T] with placeholders.
            attention_mask: 1 for tokens, 0 for padding, [B, T].
            position_ids: positions for the LLM [B, T]; default: as it counts them itself.
            past_key_values: the LLM's cache of the tokens before `input_ids`.
            cache: the same by its other name; pass one of them.
            inputs_embeds: spliced prompt [B, T, d_llm] instead of `input_ids`.
            context_input_ids: dialogue context for the text encoder [B, C].
            context_attention_mask: 1 for tokens, 0 for padding, [B, C]; default all 1.
            pixel_values: pictures [B, 3, H, W].
            image_mask: rows that have a picture [B] (bool).
            knowledge: precomputed knowledge [B, m, h]; then both encoders are skipped.
            base: base vectors [n, d_llm]; default the model's.
            labels: target ids [B, T]; -100 is ignored.
            logits_to_keep: as in transformers; with labels by default the positions that predict a label in any row.
            num_items_in_batch: number of labels over all accumulated batches, for an exact mean.
            smoothing: label smoothing of the loss; see `reply_loss`.
            kwargs: for the LLM; except `shift_labels` [B, T], the ids that each position predicts, -100 for none,
                which replaces `labels` in the loss; and where in `input_ids` what lies, as collators find it (see
                `locate_columns`). Then a loss waits for no GPU, and the logits are those of each row's own targets.
                What changes a batch's labels must leave `target_columns` out; `VikdfTrainer` finds them anew.

        Raises:
            ValueError: see `embed_prompt`, `project_knowledge` and `get_image_knowledge`.
        """
        cache = pop_cache({"past_key_values": past_key_values, "cache": cache})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        self._require("language_model")
        columns = pop_columns(kwargs, input_ids)
        # 1. the knowledge of context and picture
        if knowledge is None:
            knowledge = self.get_knowledge(context_input_ids, context_attention_mask, pixel_values)  # [B, m, h]
        # 2. projected, and spliced into the prompt
        if inputs_embeds is None:
            places = columns.get("knowledge_columns")
            inputs_embeds = self.embed_prompt(input_ids, knowledge, image_mask, base, places)  # [B, T, d_llm]
        elif knowledge is not None:
            raise ValueError("Knowledge cannot be spliced into inputs_embeds: pass input_ids with placeholders.")
        # 3. the frozen LLM; `shift_labels` is not a parameter, because Trainer requires every parameter with "label"
        # in its name in each batch
        llm = {"position_ids": position_ids, CACHE: cache, "logits_to_keep": logits_to_keep, **kwargs}
        outputs, targets = read_prompts(self, input_ids, inputs_embeds, attention_mask, labels, columns, **llm)
        # 4. how likely it finds the labels
        loss = None if targets is None else reply_loss(outputs.logits, targets, num_items_in_batch, smoothing)
        if input_ids is None and loss is None:
            return outputs  # of a step of `generate`, to which there is nothing to add
        return VikdfCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            knowledge=knowledge,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def returns_states(self, kwargs: dict[str, Any]) -> bool:
        """Whether hidden states or attentions are requested, by arguments or by the LLM's configuration."""
        flags = ((kwargs.get(name), name) for name in ("output_hidden_states", "output_attentions"))
        return any(getattr(self.language_model.config, name) if value is None else value for value, name in flags)

    def tokens_before_knowledge(self, input_ids: torch.Tensor) -> int:
        """Columns of prompts [B, T] before the first placeholder of any row; 0 if they are not to be read apart."""
        # each of the layers that are compiled would have a graph of its own for its part of the cache
        if self.config.knowledge_token_id is None or has_compiled_layers(self.language_model):
            return 0
        columns = (input_ids == self.config.knowledge_token_id).any(0).nonzero()
        return int(columns[0]) if len(columns) else 0

    def run_language_model(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prefix: int = 0,
        language_model: nn.Module | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Runs the LLM over spliced embeddings.

        In training the columns before the first knowledge vector depend on no trained weight, so they can be read
        without gradient, which is exact and saves their backward pass. With gradient checkpointing the layers keep
        only their input, without dropout and with the cache of these columns.

        Args:
            inputs_embeds: [B, T, d_llm].
            attention_mask: [B, T].
            prefix: number of columns before the first knowledge vector, if they are to be read apart.
            language_model: the LLM (default), or its decoder if no logits are needed.
            logits_to_keep: as in transformers, in columns of the whole sequence.
            kwargs: for the LLM.
        """
        logits = {} if language_model is not None else {"logits_to_keep": logits_to_keep}
        language_model = self.language_model if language_model is None else language_model
        if (
            prefix
            and logits
            and (isinstance(logits_to_keep, int) or (len(logits_to_keep) and int(logits_to_keep.min()) < prefix))
        ):
            prefix = 0  # the prefix's own logits are requested
        if logits and isinstance(logits_to_keep, int) and logits_to_keep > 0 and inputs_embeds.shape[1] > 1:
            # indices copy these columns: for a slice PyTorch on CPUs copies the frozen vocabulary head for every row
            columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            logits["logits_to_keep"] = columns[-logits_to_keep:]
        recomputes = self.training and torch.is_grad_enabled()
        checkpointed = checkpointed_layers(self.language_model) if recomputes else []
        if prefix and checkpointed and unwritten_cache(self.language_model) is None:
            prefix = 0
        # a trained LLM needs the gradient of the prefix, too
        if (
            prefix
            and torch.is_grad_enabled()
            and inputs_embeds.requires_grad
            and not any(parameter.requires_grad for parameter in self.language_model.parameters())
        ):
            if logits:
                logits["logits_to_keep"] = logits_to_keep - prefix
            if attention_mask is None:
                attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
            positions = kwargs.pop("position_ids", None)  # `None`: the LLM counts them its own way
            kwargs = {key: value for key, value in kwargs.items() if key not in (CACHE, "use_cache")}
            kwargs[CACHE] = self.read_prefix(inputs_embeds[:, :prefix], attention_mask, positions)
            kwargs |= {} if positions is None else {"position_ids": positions[:, prefix:]}
            inputs_embeds = inputs_embeds[:, prefix:]
        if not checkpointed:
            return language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **logits, **kwargs)
        if kwargs.get("use_cache"):
            logger.warning_once("Gradient checkpointing keeps no cache: use_cache=True is set to False.")
        kwargs["use_cache"] = False
        if (past := kwargs.get(CACHE)) is not None:
            kwargs[CACHE] = ReadOnlyCache(past.layers)
        with checkpointing(checkpointed):
            return language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **logits, **kwargs)

    def read_prefix(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None
    ) -> Cache:
        """The LLM's cache of the first P columns of prompts, `embeds` [B, P, d_llm]; see modeling_prefix.py."""
        return read_prefix(self.language_model, embeds, attention_mask, position_ids)


# Trainer's label smoothing shifts the labels of the classes listed here
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(VikdfConfig.model_type, VikdfForConditionalGeneration.__name__)

__all__ = ["VikdfCausalLMOutputWithPast", "VikdfForConditionalGeneration", "reply_loss"]
