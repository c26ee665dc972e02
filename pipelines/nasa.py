"""NASA: negative prompts for students that know no guidance, by attention (Nguyen et al. 2024, arXiv 2412.02687)."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KNOWN = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)
"""The processors that do no more than attend, so that another may stand in their place."""


class NasaProcessor:
    """Cross-attention steered away from a negative prompt, in the place of a processor of ``KNOWN``.

    Z = Z_pos - scale Z_neg before the output projection, where Z = softmax(Q K^T / sqrt(d)) V: one query, and the
    layer's own K and V projections for both prompts (section 4.2; its alpha is ``scale``). Not norm-preserving: for
    a negative prompt equal to the prompt, Z is (1 - scale) Z_pos.
    """

    def __init__(self, negative: Tensor, scale: float) -> None:
        """negative: [1, L, D], encoded as the prompts are."""
        self.negative, self.scale = negative, scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: [B, N, C]; encoder_hidden_states: [B, L, D] -> [B, N, C].

        Raises ValueError where it is called otherwise than the cross-attention of a text-to-image U-Net is.
        """
        if encoder_hidden_states is None or attention_mask is not None or hidden_states.ndim != 3:
            raise ValueError("NASA steers cross-attention to unmasked text only; leave it out for this pipeline")
        rows = len(hidden_states)
        negative = self.negative.to(encoder_hidden_states).expand(rows, -1, -1)
        query = _heads(attn, attn.to_q(hidden_states))

        def attend(text: Tensor) -> Tensor:
            key, value = _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text))
            z = scaled_dot_product_attention(query, key, value, scale=attn.scale)
            return z.transpose(1, 2).flatten(2)

        z = attend(encoder_hidden_states) - self.scale * attend(negative)
        return attn.to_out[1](attn.to_out[0](z))


def _heads(attn: Any, projected: Tensor) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def plain(attn: Any) -> bool:
    """Whether a layer is a cross-attention of queries, keys and values alone, as in Stable Diffusion's U-Nets."""
    extras = (attn.norm_q, attn.norm_k, attn.norm_cross, attn.group_norm, attn.spatial_norm)
    return (
        isinstance(attn.processor, KNOWN)
        and not any(extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )
