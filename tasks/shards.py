"""FSDP2 where Accelerate 1.15 has gaps: on CPUs, and in keeping a place that each process can come back to.

Its own way saves and loads the whole optimizer through the first process, which waits for ever on gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


@contextmanager
def accelerate_takes_ddp_for_fsdp_on_cpus() -> Iterator[None]:
    """Accelerate knows FSDP for every kind of device but CPUs, where it shards nothing without a word."""
    init = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The tensor, laid out over the processes as `like` is."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def save(optimizer: Any, file: Path) -> None:
    """This process's part of the optimizer's state."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()
    torch.save(state | {"state": tree_map_only(DTensor, DTensor.to_local, state["state"])}, file)


def load(optimizer: Any, file: Path) -> None:
    """What `save` wrote in this process."""
    state = torch.load(file, weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in state["state"].items():
        like = parameters[index]
        if isinstance(like, DTensor):
            # Adam's moments have the parameter's shape; its step is one number.
            kept |= {name: _spread(tensor, like) for name, tensor in kept.items() if name != "step"}
    optimizer.load_state_dict(state)


def _spread(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
