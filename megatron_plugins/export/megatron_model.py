"""Logits of a checkpoint through Megatron's own model; run by ``verify`` in a process of its own.

``python -m megatron_plugins.export.megatron_model REQUEST.json``. Uses the GPU where there is one,
else the CPU backend. Megatron builds its GPTModel (local spec, features included) from the
checkpoint's arguments and loads the weights through its own dist_checkpointing, in fp32 and without
parallelism, or in as many tensor-parallel processes as Desync Residual has ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_plugins  # noqa: F401  (arms the plugins)
from torch_plugins.config import DesyncResidual
from torch_plugins.w4a4.quantizer import Mode, quantizers_of, set_mode

PLAIN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "overlap_p2p_comm": False,
    "tp_comm_overlap": False,
    "bf16": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "cpu_offloading_num_layers": 0,
    "fine_grained_activation_offloading": False,
    "cuda_graph_impl": "none",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "transformer_impl": "local",
    "attention_softmax_in_fp32": True,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "use_te_activation_func": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "te_precision_config_file": None,
    "spec": None,
    "dsmoe_inference": "dense",
    "dsmoe_top_k": None,
    "dsmoe_attention_inference": "dense",
    "dsmoe_attention_top_k": None,
}
"""How the run was spread and fused does not change the function; this machine has one process.
What inference leaves out does, and all of it is compared."""


def ranks_of(saved: dict[str, Any]) -> int:
    """Tensor-parallel processes that the function of a checkpoint's model depends on."""
    return int(saved["desync_ranks"]) if saved.get(DesyncResidual.key()) else 1


def restored_arguments(saved: dict[str, Any]) -> Namespace:
    """Defaults of the installed Megatron, the checkpoint's arguments over them, then ``PLAIN``."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([])
    for name, value in (saved | PLAIN).items():
        if hasattr(args, name) or name in PLAIN:
            setattr(args, name, value)
    args.tensor_model_parallel_size = ranks_of(saved)
    args.params_dtype = torch.float32
    args.cpu_backend = False
    return args


def build(args: Namespace, padded_vocab_size: int) -> Any:
    """The model that Megatron's GPT builders make of these arguments."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization=args.normalization, qk_layernorm=args.qk_layernorm
        ),
        vocab_size=padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
    )


def load(model: Any, checkpoint: str) -> None:
    """Megatron's loader, for tensors alone: objects of a checkpoint would be unpickled freely.

    Checkpoints of TransformerEngine's spec may have a norm apart that the local spec counts to the
    linear behind it, and that key is asked for then.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from .mapping import UNFUSED_NORMS

    wanted = model.sharded_state_dict()
    wanted = {k: v for k, v in wanted.items() if not isinstance(v, ShardedObject)}
    stored = dist_checkpointing.load_tensors_metadata(checkpoint)
    for shard in wanted.values():
        for fused, apart in UNFUSED_NORMS.items():
            if shard.key not in stored and (key := shard.key.replace(fused, apart)) in stored:
                shard.key = key
    loaded = dist_checkpointing.load({"model": wanted}, checkpoint, validate_access_integrity=False)
    problems = model.load_state_dict(loaded["model"], strict=False)
    missing = [key for key in problems.missing_keys if not key.endswith("_extra_state")]
    if missing or problems.unexpected_keys:
        raise RuntimeError(f"missing {missing}, unexpected {problems.unexpected_keys}")


def start(store: Any = None, rank: int = 0, ranks: int = 1) -> str:
    """Bring up Megatron in this process, one of ``ranks``; returns what it runs on, for the
    report."""
    gpu = torch.cuda.is_available()
    if not gpu:
        from megatron_plugins import cpu

        cpu.install()
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = store or torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(0)
    release = megatron.core.__version__.partition("+")[0]  # the rest is about the current folder
    where = f"Megatron-Core {release} on the {'GPU' if gpu else 'CPU backend'}"
    return where if ranks == 1 else f"{where}, {ranks} processes"


def answer(request: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """fp32 logits ``[B, S, vocab]`` for one request, without the vocabulary's padding: with plain
    inputs of all linear layers, and with quantized ones where W4A4 has them."""
    model = build(restored_arguments(request["args"]), request["padded_vocab_size"]).cuda().eval()
    load(model, request["checkpoint"])
    if request["dtype"] is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, request["dtype"])).float()
    ids = torch.tensor(request["input_ids"], device="cuda")
    length = ids.shape[1]
    positions = torch.arange(length, device="cuda").expand_as(ids)
    future = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)[None, None]
    quantizers = quantizers_of(model).values()

    def logits(mode: Mode) -> Tensor:
        set_mode(quantizers, mode)
        with torch.no_grad():
            found: Tensor = model(ids, positions, future)
        return found[..., : request["vocab_size"]].float().cpu().contiguous()

    return logits(Mode.OFF), logits(Mode.QUANTIZE) if quantizers else None


def answer_all(rank: int, ranks: int, store_file: str, requests: list[dict[str, Any]]) -> None:
    """In one of ``ranks`` processes, which find each other through a file."""
    store = torch.distributed.FileStore(store_file, ranks) if ranks > 1 else None
    against = start(store, rank, ranks)
    for request in requests:
        logits, quantized = answer(request)
        found = {"logits": logits, "quantized": quantized, "against": against}
        if rank == 0:
            torch.save(found, request["logits"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(request_files: Sequence[str]) -> None:
    by_ranks: dict[int, list[dict[str, Any]]] = {}
    for file in request_files:
        request = json.loads(Path(file).read_text())
        by_ranks.setdefault(ranks_of(request["args"]), []).append(request)
    for ranks, requests in by_ranks.items():
        if ranks == 1:
            answer_all(0, 1, "", requests)
            continue
        with tempfile.TemporaryDirectory() as place:
            work = (ranks, str(Path(place) / "store"), requests)
            torch.multiprocessing.spawn(answer_all, work, nprocs=ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
