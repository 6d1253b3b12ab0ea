"""A checkpoint as the naive reference reads it.

Written apart from ``mapping``, head by head and from Megatron's arguments alone, so that an error
in one of them shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_plugins.arguments import features_of
from torch_plugins.config import CrossLayerAttention, DenseMoE

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch_plugins.hf import PluginDecoderConfig


class ReferenceTensors(Mapping[str, Tensor]):
    """The checkpoint under Hugging Face names, in fp32 after rounding to ``dtype``."""

    def __init__(
        self, checkpoint: Checkpoint, config: PluginDecoderConfig, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.args, self.dtype = checkpoint, checkpoint.args, dtype
        self.vocab_size = config.vocab_size
        sharing = features_of(self.args).get(CrossLayerAttention.key())
        layers = self.args.num_layers
        self.producers = sharing.resolve(layers) if sharing else tuple(range(layers))
        self.separate = sharing is not None and sharing.kv_norm == "separate"
        experts = features_of(self.args).get(DenseMoE.key())
        self.experts: int = experts.num_experts if experts else 0
        self.names = {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "model.embed_positions.weight": "embedding.position_embeddings.weight",
            "lm_head.weight": "output_layer.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
            "model.norm.bias": "decoder.final_layernorm.bias",
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name)
        if tensor is None:
            raise KeyError(name)
        if self.args.layernorm_zero_centered_gamma and name.endswith("norm.weight"):
            tensor = tensor + 1
        return tensor.to(self.dtype or tensor.dtype).float()

    def _read(self, name: str) -> Tensor | None:
        if name in self.names:
            tensor = self._global(self.names[name])
            cut = name in ("model.embed_tokens.weight", "lm_head.weight")
            return tensor[: self.vocab_size] if cut and tensor is not None else tensor
        _, _, layer, module, *rest = name.split(".")
        index = int(layer)
        end = rest[-1]
        if module == "input_layernorm":
            return self._norm(index, "self_attention.linear_qkv", "input_layernorm", end)
        if module == "post_attention_layernorm":
            return self._norm(index, "mlp.linear_fc1", "pre_mlp_layernorm", end)
        projection = rest[0]
        if "input_quantizer" in rest:
            return self._layer(index, f"{self._linear(projection)}.input_quantizer.{end}")
        if projection == "router":
            block = "mlp" if module == "mlp" else "self_attention"
            return self._layer(index, ".".join((block, *rest)))
        if module == "mlp" and self.experts:
            return self._experts(index, projection) if end == "weight" else None
        if projection == "o_proj":
            return self._layer(index, f"self_attention.linear_proj.{end}")
        if projection == "down_proj":
            return self._layer(index, f"mlp.linear_fc2.{end}")
        if module == "mlp":
            return self._mlp_in(self._layer(index, f"mlp.linear_fc1.{end}"), projection)
        if projection == "kv_norm":
            return self._norm(index, "self_attention.linear_kv", "self_attention.kv_norm", end)
        if projection.endswith("_norm"):
            norm = self._layer(index, f"self_attention.{projection[0]}_layernorm.{end}")
            return norm if norm is None else norm[self._turned()]
        return self._heads(index, projection[0], end)

    def _linear(self, projection: str) -> str:
        """Megatron's linear that computes a projection."""
        if projection in ("k_proj", "v_proj") and self.separate:
            return "self_attention.linear_kv"
        return {
            "o_proj": "self_attention.linear_proj",
            "gate_proj": "mlp.linear_fc1",
            "up_proj": "mlp.linear_fc1",
            "down_proj": "mlp.linear_fc2",
        }.get(projection, "self_attention.linear_qkv")

    def _global(self, key: str) -> Tensor | None:
        return self.checkpoint.read(key) if key in self.checkpoint.tensors else None

    def _layer(self, index: int, name: str) -> Tensor | None:
        if f"decoder.layers.{name}" in self.checkpoint.tensors:
            return self.checkpoint.read(f"decoder.layers.{name}", index)
        return self._global(f"decoder.layers.{index}.{name}")

    def _norm(self, index: int, linear: str, apart: str, end: str) -> Tensor | None:
        fused = self._layer(index, f"{linear}.layer_norm_{end}")
        return self._layer(index, f"{apart}.{end}") if fused is None else fused

    def _experts(self, index: int, projection: str) -> Tensor | None:
        """One matrix of all experts, taken expert by expert out of the stack."""
        name = "linear_fc2" if projection == "down_proj" else "linear_fc1"
        stack = self._layer(index, f"mlp.experts.experts.{name}.weight")
        if stack is None:
            return None
        each = [stack[i] for i in range(self.experts)]
        if projection == "down_proj":
            return torch.cat(each, dim=1)
        parts = [self._mlp_in(one, projection) for one in each]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found else None

    def _mlp_in(self, tensor: Tensor | None, projection: str) -> Tensor | None:
        if tensor is None or not self.args.swiglu:
            return tensor if projection == "up_proj" else None
        width = tensor.shape[0] // 2
        return tensor[:width] if projection == "gate_proj" else tensor[width : 2 * width]

    def _heads(self, index: int, which: str, end: str) -> Tensor | None:
        """Rows of one of q, k, v, head by head."""
        consumes = self.producers[index] != index
        if consumes and which != "q":
            return None
        name = "linear_kv" if self.separate and which != "q" else "linear_qkv"
        tensor = self._layer(index, f"self_attention.{name}.{end}")
        if tensor is None:
            return None
        args = self.args
        heads, head_dim = args.num_attention_heads, args.kv_channels
        groups = args.num_query_groups if args.group_query_attention else heads
        per_group = 0 if name == "linear_kv" else heads // groups
        blocks_per_group = (
            per_group if consumes or (self.separate and which == "q") else per_group + 2
        )
        if which == "q":
            blocks = [h // per_group * blocks_per_group + h % per_group for h in range(heads)]
        else:
            last = 2 if which == "k" else 1
            blocks = [(g + 1) * blocks_per_group - last for g in range(groups)]
        within = list(range(head_dim)) if which == "v" else self._turned()
        return tensor[[block * head_dim + row for block in blocks for row in within]]

    def _turned(self) -> list[int]:
        """Features of a query or key head, so that RoPE turns the first half with the second."""
        args, head_dim = self.args, self.args.kv_channels
        if args.position_embedding_type != "rope" or not args.rotary_interleaved:
            return list(range(head_dim))
        turned = int(head_dim * args.rotary_percent)
        return [*range(0, turned, 2), *range(1, turned, 2), *range(turned, head_dim)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._read(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
