"""Training with several processes, started by torchrun; a single process is the case of one rank."""

import os
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn

from models.standardization import SharedBatchNorm2d
from utils.device import pick_device
from utils.errors import UserError

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

    def from_main(self, value):
        """The main rank's value, a plain object, on all ranks. Collective: every rank must call it."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

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

    Raises UserError if the device is absent or there are fewer GPUs than processes.
    """
    size = int(environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    if size == 1:
        return World(device)
    local_rank = int(environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{size} processes, but this machine has {torch.cuda.device_count()} GPU(s)")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {device_name}: several processes need cuda or cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(device, dist.get_rank(), size)


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
