"""Power LR in real engines: rates against the closed form, and resumed runs against straight ones.

Started by test_power_lr.py on every number of ranks; writes what happened to the JSON file given.
"""

import json
import shutil
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist
from engines import build, config, groups, leave, model, parameters, rates, start, train

from torch_plugins.config import ConfigError, PowerLR
from torch_plugins.power_lr import Schedule

SEQUENCE = 512
STEPS, RAMP = 12, 8
"""Optimizer steps of a run, and the step before which the batch doubles."""
STOPS = (2, 6, 10)
"""Steps at which it is saved: in the warm-up, the power phase and the last phase. DeepSpeed counts
micro-batches since the process started to find the end of an accumulation, so the batch doubles at
an even number of them, and at a multiple of 4 where there are two a step."""


def scheduler(batch, **changes):
    """Warm-up over 3 batches of the start, last phase from the 9th to the 16th."""
    tokens = batch * SEQUENCE
    params = {
        "sequence_length": SEQUENCE,
        "warmup_max_lr": 0.02,
        "warmup_min_lr": 0.001,
        "warmup_num_steps": 3,
        "total_tokens": 16 * tokens,
        "decay_tokens": 7 * tokens,
        "decay_style": "linear",
        "min_lr": 1e-4,
    }
    return {"type": "PowerLR", "params": {**params, **changes}}


def closed_form(step, batch, ramp=True):
    """Rates of matrices and biases in step ``step``, from 0."""
    ramped = max(step - RAMP, 0) if ramp else 0
    now = 2 * batch if ramp and step >= RAMP else batch
    tokens = batch * SEQUENCE
    schedule = Schedule(
        PowerLR(decay_tokens=7 * tokens, decay_style="linear"),
        max_lr=0.02,
        warmup_tokens=3 * tokens,
        total_tokens=16 * tokens,
        min_lr=1e-4,
        init_lr=0.001,
    )
    n = (step + ramped) * tokens
    return [float(schedule.rate(n, now * SEQUENCE, ratio)) for ratio in (0.25, 1)]


def rates_by_step(stage, micro_batches, micro=False):
    """Rates in every step of a run whose batch doubles, and those of the closed form."""
    batch = 2 * micro_batches * dist.get_world_size()
    settings = config(stage, micro_batches, scheduler=scheduler(batch))
    engine = build(settings)
    seen = []
    for step in range(STEPS):
        if step == RAMP and micro:
            engine.set_train_micro_batch_size(4)
        elif step == RAMP:
            engine.set_train_batch_size(2 * batch)
        seen.append(rates(engine))
        train(engine, step)
    assert engine.get_lr() == rates(engine)
    return seen, [closed_form(step, batch) for step in range(STEPS)]


def resumed(stage, stops):
    """By step at which a run was saved: whether the resumed one ends as it did, to the bit."""
    batch = 2 * dist.get_world_size()
    settings = config(stage, scheduler=scheduler(batch))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)

    def go_on(engine, first):
        for step in range(first, STEPS):
            if step in stops and first == 0:
                engine.save_checkpoint(folder[0], tag=f"step{step}")
            if step == max(RAMP, first):
                engine.set_train_batch_size(2 * batch)
            assert rates(engine) == closed_form(step, batch)
            train(engine, step)
        return parameters(engine)

    straight = go_on(build(settings), 0)
    equal = {}
    for stop in stops:
        engine = build(settings, seed=8)
        engine.load_checkpoint(folder[0], tag=f"step{stop}")
        assert engine.lr_scheduler.batch_size == engine.train_batch_size()
        pairs = zip(straight, go_on(engine, stop), strict=True)
        equal[f"ZeRO {stage}, step {stop}"] = all(torch.equal(one, other) for one, other in pairs)
    shutil.rmtree(folder[0], ignore_errors=True)
    return equal


def pipeline():
    """Rates of a pipeline engine, which steps its scheduler by a path of its own."""
    stages = dist.get_world_size()
    layers = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)]
    net = deepspeed.pipe.PipelineModule(layers, num_stages=stages, loss_fn=torch.nn.MSELoss())
    settings = config(micro_batches=2, scheduler=scheduler(4))
    options = {"model_parameters": [p for p in net.parameters() if p.requires_grad]}
    engine = deepspeed.initialize(model=net, config=settings, **options)[0]
    seen = []
    data = iter([(torch.randn(2, 8), torch.randn(2, 1)) for _ in range(100)])
    for step in range(STEPS):
        if step == RAMP:
            engine.set_train_batch_size(8)
        seen.append(rates(engine))
        engine.train_batch(data_iter=data)
    return seen, [closed_form(step, 4)[1:] for step in range(STEPS)]


def overflow():
    """Optimizer steps that fp16 skipped, and tokens that the scheduler counted, in batches."""
    settings = config(1, scheduler=scheduler(2 * dist.get_world_size()))
    settings["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}
    engine = build(settings)
    for step in range(STEPS):
        train(engine, step)
    batch = 2 * dist.get_world_size() * SEQUENCE
    return [engine.skipped_steps, engine.lr_scheduler.tokens / batch]


def refused():
    """What stops an engine before it builds anything, by case."""
    batch = 2 * dist.get_world_size()
    good = scheduler(batch)
    own = torch.optim.lr_scheduler.ConstantLR
    cases = {
        "auto": (scheduler(batch, warmup_num_steps="auto"), {}),
        "overlap": (scheduler(batch, warmup_num_steps=12), {}),
        "two schedulers": (good, {"lr_scheduler": own}),
    }
    messages = {}
    for name, (section, options) in cases.items():
        try:
            build(config(scheduler=section), **options)
        except ConfigError as error:
            messages[name] = str(error)
    engine = build(config(scheduler=good))
    engine.backward(engine(torch.randn(2, 8)).sum())
    try:
        engine.step(lr_kwargs={"increment": 4})
    except ConfigError as error:
        messages["lr_kwargs"] = str(error)
    return messages


def clients():
    """Tokens, batch size and rates at the third step with schedulers that the script builds,
    torch's class as an object and as a callable, once the engine's batch size changed."""
    from torch_plugins.power_lr import PowerLR as TorchPowerLR

    def schedule(optimizer):
        return TorchPowerLR(optimizer, batch_size=4, sequence_length=SEQUENCE, a=0.8)

    seen = []
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    plain = config()
    del plain["optimizer"]
    options = {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}
    for engine in (
        deepspeed.initialize(model=net, config=plain, **options)[0],
        build(config(1), lr_scheduler=schedule),
    ):
        for step in range(2):
            train(engine, step)
        engine.set_train_batch_size(8 * dist.get_world_size())
        seen.append([engine.lr_scheduler.tokens, engine.lr_scheduler.batch_size, *rates(engine)])
    return seen


def main(record):
    start()
    result = {
        "rates": {
            f"ZeRO {stage}, {micro_batches} micro-batches": rates_by_step(stage, micro_batches)
            for stage in range(4)
            for micro_batches in (1, 2)
        },
    }
    result["rates"]["micro-batch"] = rates_by_step(1, 1, micro=True)
    if dist.get_world_size() == 2:
        result["resume"] = resumed(1, STOPS) | resumed(3, STOPS)
    result |= {"refused": refused(), "clients": clients()}
    if deepspeed.get_accelerator().is_fp16_supported():
        result["overflow"] = overflow()
    result["rates"]["pipeline"] = pipeline()
    if dist.get_rank() == 0:
        with open(record, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
