"""Every piece of the CPU backend, each seen to redirect, in a process of its own."""

import importlib

import pytest
import torch

from torch_plugins.config import ConfigError

CUDA = torch.device("cuda", 0)
ORIGINAL = {
    (owner, name): getattr(owner, name)
    for owner, name in [(torch, "empty"), (torch.Tensor, "to"), (torch.cuda, "is_available")]
}


def check_devices() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    for device in ("cuda", "cuda:0", 0, CUDA, torch.cuda.current_device()):
        assert torch.zeros(2, device=device, pin_memory=True).device.type == "cpu"
        assert torch.ones(1).to(device).device.type == "cpu"
        assert torch.ones(1).new_empty((3,), device=device).device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
    assert torch.ones(1).to(torch.float64).dtype == torch.float64
    module = torch.nn.Linear(2, 2).cuda().to("cuda")
    assert module.weight.device.type == "cpu"
    assert torch.cuda.FloatTensor([1.0]).device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.int32).dtype == torch.int32
    loader = torch.utils.data.DataLoader([1, 2], pin_memory=True)
    assert [int(item) for item in loader] == [1, 2]
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0


def check_rng() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    with pytest.raises(ConfigError, match="--no-load-rng"):
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.add("test", 7)
    torch.manual_seed(5)
    with tracker.fork("test"):
        forked = torch.rand(3)
    assert torch.equal(torch.rand(3), first), "fork leaves the outer stream where it was"
    assert not torch.equal(forked, first)


def check_streams() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        end.record(torch.cuda.current_stream())
    assert start.elapsed_time(end) >= 0
    torch.ones(1).record_stream(torch.cuda.current_stream())


def check_distributed() -> None:
    import torch.distributed as dist

    dist.init_process_group("nccl", device_id=CUDA)
    assert dist.get_backend() == "gloo"
    group = dist.new_group([0], backend="nccl", device_id=CUDA)
    values = torch.tensor([3.0])
    dist.all_reduce(values, op=dist.ReduceOp.AVG, group=group)
    assert values == 3
    dist.all_to_all_single(
        torch.empty(2), torch.ones(2), torch.tensor([2]), torch.tensor([2]), group=group
    )
    dist.barrier(device_ids=[0])


def check_batched_p2p() -> None:
    from megatron.core.pipeline_parallel import p2p_communication

    nothing = dict.fromkeys(
        ("tensor_send_prev", "tensor_recv_prev", "tensor_send_next", "tensor_recv_next")
    )
    same = {"group": None, "prev_pipeline_rank": 1, "next_pipeline_rank": 1}
    tensor = torch.ones(1)
    for kind in ("send", "recv"):
        both = {f"tensor_{kind}_prev": tensor, f"tensor_{kind}_next": tensor}
        with pytest.raises(ConfigError, match="batch_p2p_comm"):
            p2p_communication._batched_p2p_ops(**{**nothing, **same, **both})


def check_modules() -> None:
    from megatron_plugins import cpu

    for name in cpu.MODULE_PATCHES:
        importlib.import_module(name)


def check_restore() -> None:
    from megatron_plugins.cpu import piece

    assert torch.empty is not ORIGINAL[torch, "empty"]
    piece.restore()
    for (owner, name), original in ORIGINAL.items():
        assert getattr(owner, name) is original


if __name__ == "__main__":
    from megatron_plugins import cpu

    cpu.install()
    check_devices()
    check_rng()
    check_streams()
    check_distributed()
    check_batched_p2p()
    check_modules()
    check_restore()
    print("PIECES ARE FINE")
