"""The Implicit Query Transformer (IQ-Former): encoder states of a text or a picture -> n knowledge vectors.

It knows neither the encoders before it nor the LLM after it. One set of queries and weights serves both modalities:
K^T = IQ(Q; H^T), K^I = IQ(Q; H^I) (paper, section "Implicit Query Transformer").
"""

import copy

import torch
from torch import nn
from transformers import Blip2QFormerModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_vikdf import VikdfConfig


CLIP_LOGIT_SCALE = 2.6592


def whole_mask(mask: torch.Tensor, model: PreTrainedModel, dtype: torch.dtype, causal: bool = False) -> torch.Tensor:
    """
    A padding mask [B, S] as a model's attention takes it, [B, 1, 1 or S, S].

    Given the padding mask, transformers would look whether there is any padding, for which a GPU has to be waited for.

    Args:
        mask: 1 for states to attend to, 0 for padding, [B, S].
        model: whose attention it is for; others than "eager" and "sdpa" get the mask as it is.
        dtype: of the states.
        causal: whether states attend to those before them alone.
    """
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        return mask
    visible = mask[:, None, None].bool()
    if causal:
        visible = visible & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    if attention == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class VikdfInputProjection(nn.Module):
    """LayerNorm-Linear-LayerNorm from an encoder's width to the IQ-Former's."""

    def __init__(self, encoder_width: int, hidden_size: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(encoder_width)
        self.dense = nn.Linear(encoder_width, hidden_size)
        self.norm_out = nn.LayerNorm(hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, S, d_encoder] -> [B, S, h]."""
        return self.norm_out(self.dense(self.norm_in(states)))


class VikdfIQFormer(nn.Module):
    """
    n learnable queries that read an encoder's states: BLIP-2's Q-Former without its text branch.

    The queries attend to each other in every layer and to the states in every `cross_attention_frequency`-th layer.

    Parameters: `query_tokens` [1, n, h]; `qformer`; with `config.project_inputs` one input projection per modality;
    with `config.condition_queries` the `pooled_projection` of the first state and the states' mean, which is added to
    the queries.
    """

    def __init__(self, config: VikdfConfig):
        super().__init__()
        iqformer = config.iqformer_config
        if iqformer._attn_implementation not in ("eager", "sdpa"):
            iqformer._attn_implementation = "sdpa"  # kept in float32, which the flash kernels do not take
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_knowledge_tokens, iqformer.hidden_size))
        self.context_projection = self.vision_projection = nn.Identity()
        if config.project_inputs:
            self.context_projection = VikdfInputProjection(
                config.encoder_width("context_config"), iqformer.hidden_size
            )
            if config.vision_config is not None:
                self.vision_projection = VikdfInputProjection(
                    config.encoder_width("vision_config"), iqformer.hidden_size
                )
        if config.condition_queries:
            self.pooled_projection = nn.Linear(2 * iqformer.encoder_hidden_size, iqformer.hidden_size)
        self.state_dropout = config.state_dropout
        self.qformer = Blip2QFormerModel(iqformer)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Runs the queries over encoder states.

        Args:
            states: encoder states, already projected, [B, S, encoder_hidden_size].
            mask: 1 for states to attend to, 0 for padding, [B, S]; `None` attends to all.

        Returns:
            Knowledge vectors [B, n, h].
        """
        return self._run(self.qformer, states, mask).last_hidden_state  # [B, n, h]

    def _run(
        self, qformer: Blip2QFormerModel, states: torch.Tensor, mask: torch.Tensor | None, **kwargs: bool
    ) -> ModelOutput:
        queries = self.query_tokens.expand(states.shape[0], -1, -1)  # [B, n, h]
        if self.training and self.state_dropout:
            visible = torch.rand(states.shape[:2], device=states.device) >= self.state_dropout  # [B, S]
            visible[:, 0] = True
            mask = visible.long() if mask is None else mask * visible
        if hasattr(self, "pooled_projection"):
            weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)  # [B, S]
            mean = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)  # [B, d]
            pooled = torch.cat([states[:, 0], mean], dim=-1)  # [B, 2d]: most encoders' first state is a summary, too
            queries = queries + self.pooled_projection(pooled)[:, None]
        if mask is not None and torch.is_grad_enabled():
            mask = whole_mask(mask, qformer, queries.dtype)
        return qformer(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask, **kwargs)

    def text_knowledge(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """K^T [B, n, h] from token states H^T [B, T, d] and their padding mask [B, T]."""
        return self(self.context_projection(states.to(self.query_tokens.dtype)), mask)

    @torch.no_grad()
    def text_attention(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-attention [B, n, T] of the queries to token states H^T [B, T, d]; rows sum to 1."""
        tensors = {id(tensor): tensor for tensor in (*self.qformer.parameters(), *self.qformer.buffers())}
        # Only "eager" returns its weights. A copy (with the same tensors) is switched to it, because another thread
        # may be using the original.
        qformer = copy.deepcopy(self.qformer, tensors)
        qformer.set_attn_implementation("eager")
        states = self.context_projection(states.to(self.query_tokens.dtype))
        layers = self._run(qformer, states, mask, output_attentions=True).cross_attentions  # each [B, heads, n, T]
        return torch.stack(layers).mean(dim=(0, 2))  # [B, n, T]

    def image_knowledge(self, states: torch.Tensor) -> torch.Tensor:
        """K^I [B, n, h] from patch states H^I [B, P+1, d]."""
        return self(self.vision_projection(states.to(self.query_tokens.dtype)))


class VikdfMatchingHead(nn.Module):
    """
    Knowledge -> one normalised embedding in a space that texts and pictures share (paper, "Text-Image Matching").

    t = normalise(W_t pool(K^T)), v = normalise(W_v pool(K^I)), compared by exp(logit_scale) * t . v; `logit_scale` is
    a learnt scalar initialised as CLIP's, to ln(1 / 0.07). With pooling "each" nothing is pooled and W_t = W_v:
    t . v is the mean over i of the cosine between W k^T_i and W k^I_i.
    """

    def __init__(self, config: VikdfConfig):
        super().__init__()
        self.pooling = config.knowledge_pooling
        width = config.iqformer_config.hidden_size
        if self.pooling == "each":
            self.projection = nn.Linear(width, config.matching_dim)
        else:
            self.text_projection = nn.Linear(width, config.matching_dim)
            self.image_projection = nn.Linear(width, config.matching_dim)
        self.logit_scale = nn.Parameter(torch.tensor(CLIP_LOGIT_SCALE))

    def _embed(self, knowledge: torch.Tensor, projection: nn.Module) -> torch.Tensor:
        if self.pooling == "each":
            vectors = nn.functional.normalize(projection(knowledge), dim=-1)  # [B, n, matching_dim]
            return vectors.flatten(1) / vectors.shape[1] ** 0.5  # [B, n * matching_dim]
        pooled = knowledge[:, 0] if self.pooling == "first" else knowledge.mean(dim=1)  # [B, h]
        return nn.functional.normalize(projection(pooled), dim=-1)  # [B, matching_dim]

    def text(self, knowledge: torch.Tensor) -> torch.Tensor:
        """K^T [B, n, h] -> unit vectors [B, matching_dim], or [B, n * matching_dim] with pooling "each"."""
        return self._embed(knowledge, self.projection if self.pooling == "each" else self.text_projection)

    def image(self, knowledge: torch.Tensor) -> torch.Tensor:
        """K^I [B, n, h] -> unit vectors of the same shape as those of `text`."""
        return self._embed(knowledge, self.projection if self.pooling == "each" else self.image_projection)


@torch.no_grad()
def initialize_from_bert(iqformer: VikdfIQFormer, bert: PreTrainedModel) -> None:
    """
    Copies every encoder layer of a BERT-like model, feed-forward included, into the IQ-Former.

    BERT has no cross-attention and no queries: those keep their random initialisation.

    Args:
        iqformer: the module to fill; its layers must have the BERT model's sizes. A shallower IQ-Former takes the
            first layers.
        bert: a `BertModel`, or a model with the same module names.

    Raises:
        ValueError: if the sizes differ or the IQ-Former is deeper than the BERT model.
    """
    ours, theirs = iqformer.qformer.config, bert.config
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(
                f"Cannot initialise the IQ-Former from this BERT checkpoint: its {key} is {getattr(theirs, key)}, the "
                f"IQ-Former's is {getattr(ours, key)}. Give both the same sizes."
            )
    if ours.num_hidden_layers > theirs.num_hidden_layers:
        raise ValueError(
            f"The IQ-Former has {ours.num_hidden_layers} layers, the BERT checkpoint only {theirs.num_hidden_layers}."
        )
    iqformer.qformer.layernorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    for layer, source in zip(iqformer.qformer.encoder.layer, bert.encoder.layer, strict=False):
        for name in ("query", "key", "value"):
            getattr(layer.attention.attention, name).load_state_dict(getattr(source.attention.self, name).state_dict())
        layer.attention.output.load_state_dict(source.attention.output.state_dict())
        layer.intermediate_query.load_state_dict(source.intermediate.state_dict())
        layer.output_query.load_state_dict(source.output.state_dict())


__all__ = ["VikdfIQFormer", "VikdfMatchingHead", "initialize_from_bert"]
