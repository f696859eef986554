"""What processes must agree on whose forwards are collectives."""

from __future__ import annotations

from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn


class Together:
    """The processes of ``group``, whose forwards wait for each other: they must run equally many.

    Every method is a collective. In a process that is `ALONE` none is, and each returns what it is given.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group, self.device = group, device

    @property
    def is_alone(self) -> bool:
        return False

    def most(self, number: float) -> float:
        """The largest ``number`` of all processes."""
        found = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return float(found)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in one of the processes."""
        return bool(self.most(flag))

    def told(self, message: str | None) -> dict[int, str]:
        """What the processes have to say, by their rank."""
        said: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(said, message, group=self.group)
        return {rank: one for rank, one in enumerate(said) if one is not None}


class _Alone(Together):
    def __init__(self) -> None:
        super().__init__(None, torch.device("cpu"))

    @property
    def is_alone(self) -> bool:
        return True

    def most(self, number: float) -> float:
        return number

    def told(self, message: str | None) -> dict[int, str]:
        return {} if message is None else {0: message}


ALONE = _Alone()
"""One process whose forwards wait for nobody."""

IN_STEP: WeakSet[nn.Module] = WeakSet()
"""Modules whose forwards processes run in step now; see ``context.lockstep``."""
