"""Qwen-VL of the first generation (Bai et al., 2023, arXiv 2308.12966), written from the paper and its weights' shapes.

A vision transformer without class token, whose patches a resampler of one cross-attention brings to a fixed number of
features; they take the place of the embeddings between `<img>` and `</img>` in a Qwen2. Importing this registers the
classes with transformers, so that its Auto classes load such a directory.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call, misc"
# what torch's modules and transformers' classes give is untyped

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, Qwen2Model
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

EPS = 1e-6
HEAD_OF_RESAMPLER = 128
POSITIONS = 16
"""Rows and columns of `positional_embedding`, whatever the image's size."""


class QwenVLConfig(PreTrainedConfig):
    """`text_config` is a Qwen2's; `vision_config` has width, layers, heads, mlp_ratio, image_size, patch_size, queries;
    `image_start_id` is `<img>`, `</img>` and the padding between follow it.
    """

    model_type = "onward_qwen_vl"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    image_start_id: int = 151857
    image_token_id: int = 151859
    tie_word_embeddings: bool = False


def resized(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions [n², width] on a grid of another side, bicubic in fp32: [side², width]."""
    own = math.isqrt(positions.shape[0])
    if own == side:
        return positions
    grid = positions.float().reshape(1, own, own, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


class VisionAttention(nn.Module):
    """Self-attention without a mask; rows of `in_proj` lie as [head][q, k, v][size]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, width] → the same."""
        images, patches, width = x.shape
        mixed = self.in_proj(x).reshape(images, patches, self.heads, 3, width // self.heads)
        q, k, v = mixed.permute(3, 0, 2, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(seen.transpose(1, 2).reshape(images, patches, width))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x)))


class VisionBlock(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm, each added."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPS)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = VisionMLP(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionBlocks(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(width, heads, inner) for _ in range(layers))


class CrossAttention(nn.Module):
    """Rows of `in_proj_weight` are q, k, v in thirds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_OF_RESAMPLER
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [images, queries, width], key and value [images, patches, width] → [images, queries, width]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Learnt queries look at the patches. `pos_embed`, 2D sine and cosine, is a constant among the weights."""

    pos_embed: torch.Tensor

    def __init__(self, width: int, out: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, out) * 0.02)
        self.register_buffer("pos_embed", torch.zeros(queries, out))
        self.kv_proj = nn.Linear(width, out, bias=False) if width != out else nn.Identity()
        self.attn = CrossAttention(out)
        self.ln_q = nn.LayerNorm(out, eps=EPS)
        self.ln_kv = nn.LayerNorm(out, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, width] → [images, queries, out]."""
        source = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(query, source + resized(self.pos_embed, math.isqrt(x.shape[1])), source)


class QwenVLVision(nn.Module):
    """Images [n, 3, side, side] to features [n, queries, width of the language model]."""

    def __init__(self, vision: dict[str, Any], out: int) -> None:
        super().__init__()
        width, patch = vision["width"], vision["patch_size"]
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(POSITIONS**2, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=EPS)
        self.transformer = VisionBlocks(width, vision["heads"], int(width * vision["mlp_ratio"]), vision["layers"])
        self.attn_pool = Resampler(width, out, vision["queries"])
        self.ln_post = nn.LayerNorm(out, eps=EPS)
        self.proj = nn.Parameter(torch.randn(out, out) * out**-0.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels.to(self.conv1.weight.dtype))
        x = patches.flatten(2).transpose(1, 2)
        x = self.ln_pre(x + resized(self.positional_embedding, patches.shape[-1]))
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class QwenVLPreTrainedModel(PreTrainedModel):
    config_class = QwenVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "VisionBlock", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class QwenVLModel(QwenVLPreTrainedModel):
    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.visual = QwenVLVision(config.vision_config, config.text_config.hidden_size)
        self.language_model = Qwen2Model(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        """`pixel_values` [images, 3, side, side], in the order of their tags in the batch. ValueError where there are
        not as many places as images.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("images are placed by their tags: give input_ids, not inputs_embeds")
            features = self.visual(pixel_values)
            inside = between(input_ids, self.config.image_start_id)
            if int(inside.sum()) != features.shape[0] * features.shape[1]:
                places = int(inside.sum())
                raise ValueError(f"{places} places between image tags for {tuple(features.shape[:2])} features")
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(inside[..., None], features)
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **arguments)


def between(input_ids: torch.Tensor, start: int) -> torch.Tensor:
    """Which tokens stand strictly between `<img>` (`start`) and `</img>` (the next id), whatever they are."""
    begins, ends = (input_ids == start).long(), (input_ids == start + 1).long()
    open_before = begins.cumsum(-1) - begins - (ends.cumsum(-1) - ends)
    return (open_before > 0) & (ends == 0)


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.model = QwenVLModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, length, vocabulary] of `input_ids` [batch, length]; the loss too where `labels` are given."""
        out = self.model(input_ids, attention_mask, pixel_values, **arguments)
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration)
