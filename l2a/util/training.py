"""What every training needs: seeds, devices, precision, several processes, AdamW and its schedule."""

import atexit
import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch.optim.lr_scheduler import LambdaLR

from l2a.util import Advance, Checkpoint, process_count

CPU = torch.device("cpu")
Tensors = Mapping[str, torch.Tensor]
Groups = Sequence[tuple[Sequence[torch.nn.Parameter], float]]
Number = TypeVar("Number", bound=np.generic)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch on the CPU and every GPU, and put its generators back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and back into the mode that it came in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, where the C library is glibc.

    By default glibc returns large blocks at once, and an update of a teacher of base size on a CPU then waits a fifth
    of its time for 200,000 pages that it just gave back.
    """
    trim_threshold, mmap_threshold = -1, -3  # older versions refuse more than 32 MB of the second
    with suppress(AttributeError, OSError, TypeError):
        for option, size in ((mmap_threshold, 2**25), (mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(option, size)


def best_device() -> torch.device:
    """Return the device that models are trained on: a GPU where there is one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if uses_gpu() else CPU


def uses_gpu() -> bool:
    """Tell whether there is a GPU that ``accelerate launch --cpu`` has not ruled out."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 products are much faster: on GPUs and CPUs with instructions for them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def arithmetic(device: torch.device) -> str:
    """Name what ``mixed_precision`` computes with on a device, for the keys of what is cached."""
    return f"{device.type} {'bfloat16' if has_fast_bfloat16(device) else 'float32'}"


def mixed_precision(device: torch.device, width: int | None = None) -> torch.autocast:
    """Run matrix products in bfloat16 where that pays; weights, sums and losses stay float32.

    ``width`` is that of the model's states where it may be narrow: on CPUs, matrices below 256 do not gain.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16_pays(device, width))


def _bfloat16_pays(device: torch.device, width: int | None) -> bool:
    return has_fast_bfloat16(device) and (device.type != "cpu" or width is None or width >= 256)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Let a model of transformers attend by plain products while it trains in bfloat16 on a CPU.

    There the backward pass of torch's fused attention takes four times as long on short texts as both passes do so.
    """
    device, used = next(model.parameters()).device, model.config._attn_implementation
    is_slow = used == "sdpa" and device.type == "cpu" and _bfloat16_pays(device, model.config.hidden_size)
    model.set_attn_implementation("eager" if is_slow else used)
    try:
        yield
    finally:
        model.set_attn_implementation(used)


def join_processes() -> None:
    """Connect the processes of one launch; without a launcher nothing happens."""
    if process_count() > 1:
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            atexit.register(torch.distributed.destroy_process_group)  # a thread of its own could abort the exit
        PartialState(cpu=not uses_gpu())


def broadcast_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors on the training device by those of the first process, which have the same shapes."""
    if process_count() > 1:
        join_processes()
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)


def broadcast(values: NDArray[Number]) -> NDArray[Number]:
    """Take the first process's numbers in all: kernels of GPUs may differ in the last digits."""
    sent = torch.from_numpy(values.copy()).to(best_device())
    broadcast_weights([sent])
    return np.asarray(sent.cpu())


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes in one message; parameters come in the same order in each."""
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = torch.nn.utils.parameters_to_vector(gradients)
    torch.distributed.all_reduce(summed)
    torch.nn.utils.vector_to_parameters(summed, gradients)


def adamw(groups: Groups, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """Build bias-corrected AdamW, fused, without decay on biases and norms.

    Each group of parameters has its peak learning rate; the decay is decoupled (Loshchilov and Hutter, 2019).
    """
    options = [
        {"params": [p for p in parameters if p.requires_grad and (p.ndim > 1) == decayed], "lr": rate,
         "weight_decay": weight_decay if decayed else 0.0}
        for parameters, rate in groups
        for decayed in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW([option for option in options if option["params"]], betas=(0.9, 0.98), fused=True)


def linear_schedule(optimizer: torch.optim.Optimizer, total_steps: int, warmup_share: float = 0.1) -> LambdaLR:
    """Warm up for a share of the steps, then decay to 0, both linearly; the scheduler is to step after each update."""
    warmup = max(1, round(total_steps * warmup_share))

    def scale(step: int) -> float:
        return (step + 1) / warmup if step < warmup else max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    return LambdaLR(optimizer, scale)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """List what an optimizer updates, over all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def carry_second_moments(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Give an AdamW another's second moments and number of steps, but no momentum.

    Both train parameters of the same shapes in the same order; from one without steps nothing is carried.
    """
    for old, new in zip(trained_parameters(source), trained_parameters(target), strict=True):
        if state := source.state.get(old):
            carried = {name: value.clone() for name, value in state.items()}
            target.state[new] = carried | {"exp_avg": torch.zeros_like(state["exp_avg"])}


def remembered(checkpoint: Checkpoint | None, key: str, measure: Callable[[], NDArray[Number]]) -> NDArray[Number]:
    """Measure something that takes long, or take it from a checkpoint, where it stays until the run is finished."""
    if checkpoint is not None and (data := checkpoint.load(key)) is not None:
        return np.asarray(load(data)["values"])
    values = measure()
    if checkpoint is not None and checkpoint.is_due(is_last=True):
        checkpoint.save(key, save({"values": torch.from_numpy(values)}))
    return values


class Loop:
    """The updates of one stage of training; a checkpoint, where there is one, lets them go on where they were.

    It keeps parameters, moments, rates and torch's generator on the CPU, and whatever else the stage asks it to keep.
    The order of the batches is not kept: a stage draws it again, and ``left`` leaves out those that are done.

    Attributes:
        done: Updates of the stage so far.
        tensors: What the stage kept beside, by name; empty at a fresh start.
        facts: Likewise, as JSON holds it.
    """

    def __init__(self, checkpoint: Checkpoint | None, key: str, schedule: LambdaLR, steps: int) -> None:
        """Start the stage, or restore it; to be called where torch's generator is seeded for the stage.

        Args:
            checkpoint: Where the state is kept; None for nowhere.
            key: Names the stage, by everything that decides it.
            schedule: Of an AdamW over all that is trained.
            steps: Updates of the stage.
        """
        self.done, self.tensors, self.facts = 0, dict[str, torch.Tensor](), dict[str, Any]()
        self._checkpoint, self._key, self._schedule, self._steps = checkpoint, key, schedule, steps
        self._optimizer = schedule.optimizer
        if checkpoint is None or (data := checkpoint.load(key)) is None:
            return
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as safetensors lays it out
        self.facts, self.tensors = json.loads(header["__metadata__"]["facts"]), load(data)
        self.done, self._schedule.last_epoch = self.facts["done"], self.facts["scheduled"]
        torch.set_rng_state(self.tensors["generator"])
        for number, parameter in enumerate(trained_parameters(self._optimizer)):
            start = f"optimizer/{number}/"
            found = {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
            parameter.detach().copy_(found.pop("value"))
            self._optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in found.items()}
        for group, rate in zip(self._optimizer.param_groups, self.facts["rates"], strict=True):
            group["lr"] = rate

    def left(self, batches: Iterable[NDArray[np.int64]], advance: Advance) -> Iterator[NDArray[np.int64]]:
        """Give the stage's batches without those that are done, and advance a bar by each."""
        advance(self.done)
        for step, batch in zip(range(self._steps), batches, strict=False):
            if step >= self.done:
                yield batch
                advance(1)

    def update(self, loss: torch.Tensor, clipped: Iterable[torch.nn.Parameter]) -> None:
        """Go one step down a loss, with the gradients of some parameters clipped to a norm of 1, and count it."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([parameter for parameter in clipped if parameter.grad is not None], 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.update_done()

    def update_done(self, beside: Callable[[], tuple[Tensors, Mapping[str, Any]]] = lambda: ({}, {})) -> None:
        """Count an update and, when it is time, keep the state and what ``beside`` gives: tensors, and facts for JSON.

        Raises:
            RunError: If it cannot be written.
        """
        self.done += 1
        if self._checkpoint is None or not self._checkpoint.is_due(self.done == self._steps):
            return
        others, facts = beside()
        tensors = {"generator": torch.get_rng_state(), **others}
        for number, parameter in enumerate(trained_parameters(self._optimizer)):
            state = {"value": parameter.detach(), **self._optimizer.state[parameter]}
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        facts = {"done": self.done, "scheduled": self._schedule.last_epoch, "rates": rates, **facts}
        copies = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        self._checkpoint.save(self._key, save(copies, {"facts": json.dumps(facts)}))
