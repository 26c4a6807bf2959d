"""The Decision Maker: which layer's English activation joins the target pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cc_ds.config import CCConfig
from cc_ds.ops import gated_fuse


class DecisionMaker(nn.Linear):
    """A linear map without bias from a decision vector (H) to one logit per layer (L); weight (L, H).

    It is an nn.Linear so that Hugging Face initialises it as one. Its forward is the whole fused gate: ZeRO-3 gathers a
    weight for the forward of the module that owns it, and for no other code.
    """

    def __init__(self, hidden_size: int, num_layers: int, cc_config: CCConfig) -> None:
        super().__init__(hidden_size, num_layers, bias=False)
        self.temperature = cc_config.temperature
        self.hard = cc_config.gate == "hard"

    def forward(
        self,
        ffn_output_BTH: Tensor,
        english_LBH: Tensor,
        embedding_BH: Tensor,
        noise: Tensor,
        anchors: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`cc_ds.ops.gated_fuse` with this weight."""
        return gated_fuse(
            ffn_output_BTH,
            english_LBH,
            embedding_BH,
            self.weight,
            noise,
            anchors,
            temperature=self.temperature,
            hard=self.hard,
            mask=mask,
        )


def gumbel_noise(batch: int, layers: int, device: torch.device | str = "cpu", generator=None) -> Tensor:
    """(B, L) float32 Gumbel(0, 1) noise, from torch's default generator unless one is given."""
    # -log(Exp(1)) is Gumbel; Exp(1) is drawn in (0, inf), so that no clamp is needed.
    return -torch.empty(batch, layers, device=device).exponential_(generator=generator).log()


def gumbel_noise_at(positions: Iterable[int], layers: int, seed: int) -> Tensor:
    """(B, L) float32 on the CPU: the noise of the rows at these positions of the data stream.

    A function of (seed, position) alone: the same on any number of ranks, with any accumulation, and after a resume.
    """
    generator = torch.Generator()
    rows = [gumbel_noise(1, layers, generator=generator.manual_seed(mix(seed, position))) for position in positions]
    return torch.cat(rows)


def uniform_at(positions: Iterable[int], seed: int) -> list[float]:
    """A number in [0, 1) for each position of the data stream, a function of (seed, position) alone."""
    return [mix(seed, position, 1) / 2**63 for position in positions]


def mix(*numbers: int) -> int:
    """A seed in [0, 2**63) from several numbers, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
