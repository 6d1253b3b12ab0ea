"""Cross-Layer Attention: neighbouring layers attend to one set of keys and values.

With ``p(l)`` the producer of layer ``l``, the nearest layer at or before it that has a key-value
projection,

    attention_l(x_l) = O_l softmax(rope(Q_l n_l(x_l)) rope(K_p m_p(x_p))^T * scale) V_p m_p(x_p)

where ``n`` is the norm of the queries and ``m`` that of keys and values. A consumer, ``p(l) != l``,
has only ``n_l``, ``Q_l`` and ``O_l``. What is shared are activations: keys are projected and
rotated once, in the producer, whose gradient is therefore the sum over its group. The key-value
cache has one entry per producer:

    bytes per token = 2 (keys and values) * producers * key-value heads * head dimension * bytes

``m`` is ``n`` by default (``kv_norm="shared"``), as in a stock checkpoint, which so can be loaded
into the producers as it is. The paper trains from scratch with ``m`` a norm of its own
(``"separate"``); a checkpoint without it starts well from a copy of ``n``, which is the same
function.

``python -m torch_plugins.cross_layer_attention table`` prints the cache sizes of the paper's models
from their configurations, beside the printed ones.

Paper: arXiv 2405.12981, sections 2 and 3. Which layers produce is
:meth:`torch_plugins.config.CrossLayerAttention.resolve`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from .config import CrossLayerAttention


def sharing_groups(producers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Layers by producer: ``(0, 1, 1, 3)`` gives ``((0,), (1, 2), (3,))``."""
    return tuple(
        tuple(layer for layer, producer in enumerate(producers) if producer == first)
        for first in sorted(set(producers))
    )


def kv_bytes_per_token(
    producers: Sequence[int], num_key_value_heads: int, head_dim: int, element_bytes: int = 2
) -> int:
    """Bytes that one token of one sequence occupies in a key-value cache.

    Args:
        producers: the producer of every layer; ``range(num_layers)`` without sharing.
        element_bytes: 2 for bf16 and fp16.
    """
    return 2 * len(set(producers)) * num_key_value_heads * head_dim * element_bytes


@dataclass(frozen=True)
class PaperModel:
    """A 1B-scale model of the paper's ablations: 20 layers, hidden size 2048, 16-bit cache."""

    name: str
    head_dim: int
    key_value_heads: int
    attention: CrossLayerAttention
    printed_bytes: int
    perplexity: float
    """On validation text, after 30 B tokens at one learning rate."""

    num_layers = 20

    @property
    def producers(self) -> tuple[int, ...]:
        return self.attention.resolve(self.num_layers)

    @property
    def bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.producers, self.key_value_heads, self.head_dim)


NONE, CLA2, CLA3, CLA4 = (CrossLayerAttention(factor) for factor in (1, 2, 3, 4))
KEEP_ENDS, DENSE_FRONT, DENSE_BACK = (
    CrossLayerAttention(pattern=name) for name in ("keep-ends", "dense-front", "dense-back")
)

PAPER_MODELS = (
    PaperModel("H128-MHA", 128, 16, NONE, 163840, 13.15),
    PaperModel("H128-GQA4", 128, 4, NONE, 40960, 13.36),
    PaperModel("H128-GQA2", 128, 2, NONE, 20480, 13.52),
    PaperModel("H128-MQA", 128, 1, NONE, 10240, 13.54),
    PaperModel("H64-MQA", 64, 1, NONE, 5120, 13.81),
    PaperModel("H46-MQA", 46, 1, NONE, 3680, 13.96),
    PaperModel("H32-MQA", 32, 1, NONE, 2560, 14.37),
    PaperModel("H512-MQA-CLA2", 512, 1, CLA2, 20480, 13.49),
    PaperModel("H256-MQA-CLA2", 256, 1, CLA2, 10240, 13.51),
    PaperModel("H128-MQA-CLA2", 128, 1, CLA2, 5120, 13.60),
    PaperModel("H90-MQA-CLA2", 90, 1, CLA2, 3600, 13.73),
    PaperModel("H64-MQA-CLA2", 64, 1, CLA2, 2560, 13.89),
    PaperModel("H256-GQA4-CLA2", 256, 4, CLA2, 40960, 13.38),
    PaperModel("H128-GQA4-CLA2", 128, 4, CLA2, 20480, 13.48),
    PaperModel("H128-GQA2-CLA2", 128, 2, CLA2, 10240, 13.59),
    PaperModel("H128-MQA-CLA3", 128, 1, CLA3, 3584, 13.77),
    PaperModel("H128-MQA-CLA4", 128, 1, CLA4, 2560, 13.95),
    PaperModel("MQA-CLA2-KeepEnds", 128, 1, KEEP_ENDS, 5632, 13.62),
    PaperModel("MQA-CLA2-DenseFront", 128, 1, DENSE_FRONT, 5632, 13.75),
    PaperModel("MQA-CLA2-DenseBack", 128, 1, DENSE_BACK, 5632, 14.03),
)
"""The ablations at 1B parameters. DenseBack's group is layers 1 to 10: the paper's text counts a
layer more, its figure of 5632 bytes does not."""


def table() -> str:
    """One line per model of the paper: producers, computed and printed bytes, perplexity."""
    header = f"{'model':<20} {'producers':>9} {'bytes/token':>11} {'in the paper':>12} {'ppl':>6}"
    return "\n".join(
        [header]
        + [
            f"{model.name:<20} {len(set(model.producers)):>9} {model.bytes_per_token:>11} "
            f"{model.printed_bytes:>12} {model.perplexity:>6.2f}"
            for model in PAPER_MODELS
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table"], help="the paper's models and their cache sizes")
    parser.parse_args()
    print(table())
