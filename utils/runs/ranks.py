"""Training with several processes, started by torchrun; a single process is the case of one rank."""

import os
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn

from models.standardization import SharedBatchNorm2d
from utils.device import pick_device
from utils.errors import RunError, UserError, cause_of

LAST_TENSORS = 0.2  # seconds for the threads of a process group to free the tensors of its last sums


class World:
    """The processes of this training. `rank`: this one's number, `size`: how many; `device`: this one's."""

    def __init__(self, device, rank=0, size=1):
        self.device, self.rank, self.size = device, rank, size

    @property
    def is_main(self):
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, tensor):
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether the flag is set on any rank. Collective: every rank must call it."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def from_main(self, make):
        """What `make()` returns on the main rank, or its RunError, on all. Collective: every rank must call it."""
        if self.size == 1:
            return make()
        made = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except RunError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0, device=self.device)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def leave(self):
        """Ends the group of processes.

        gloo's threads may be the last to hold a tensor and need Python's lock to free it. Older versions of torch (2.4)
        hold that lock while they wait for the threads, and hang: sleep first so that the threads can release it.
        """
        if self.size > 1:
            time.sleep(LAST_TENSORS)
            dist.destroy_process_group()


def join(device_name, environ=os.environ):
    """The `World` of this process: of torchrun's processes if it is one of them, otherwise alone.

    Raises UserError if the device is absent, there are fewer GPUs than processes, or the processes cannot meet.
    """
    size, local_rank = _size_and_local_rank(environ)
    device = pick_device(device_name)
    if size == 1:
        return World(device)
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{size} processes, but this machine has {torch.cuda.device_count()} GPU(s)")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {device_name}: several processes need cuda or cpu")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size} processes do not meet: {cause_of(error)}") from error
    return World(device, dist.get_rank(), size)


def _size_and_local_rank(environ):
    """How many processes there are, and which of this machine's this one is. Raises UserError unless torchrun says all.

    A scheduler may set some of the variables for a task that is alone.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    found = {name: environ[name] for name in names if environ.get(name, "").strip()}
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    remedy = "start several processes with torchrun, and unset these variables for one"
    if not all(value.strip().isdecimal() for value in found.values()):
        raise UserError(f"{said}: should be integers; {remedy}")
    size, rank, local_rank = (int(found.get(name, default)) for name, default in zip(names, (1, 0, 0)))
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"{said}, but without {', '.join(missing)}: {remedy}")
    if not max(rank, local_rank) < size:
        raise UserError(f"{said}: there is no such process among {size}; {remedy}")
    return size, local_rank


def shared(network, world):
    """The network as all ranks train it together, with the gradients and batch norm statistics of the whole batch."""
    if world.size == 1:
        return network
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d
    # Gradients of complex weights are averaged here: some versions of torch's gloo know reals only.
    tensors = [*network.named_parameters(), *network.named_buffers()]
    names = [name for name, tensor in tensors if tensor.is_complex()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
    for parameter in network.parameters():
        if parameter.is_complex() and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for this argument
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def _average_gradient(parameter):
    gradient = torch.view_as_real(parameter.grad)
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()
