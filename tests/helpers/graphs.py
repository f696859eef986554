"""What stands in for CUDA graphs on the CPU: a replay of the operators that a recorded pass has called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfgen.context import graphs as engine


class Calls(TorchDispatchMode):
    """The operators called inside, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result


class Recorder(engine.GraphedForward):
    """A replay calls the operators of the recording on its memory again; as in a graph, no Python of the model runs."""

    def __init__(self, model, invariant=None):
        super().__init__(model, invariant)
        self.records = self.replays = 0

    def _record(self, run):
        self.records += 1
        with engine.fresh_casts(self.model), Calls() as recorded:
            run()

        def replay():
            self.replays += 1
            for operator, args, kwargs, results in recorded.calls:
                again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        replay.calls = recorded.calls
        return replay


def _recorder_of(model, cuda_graphs, invariant=None):
    return Recorder(model, invariant)


@contextmanager
def recorded_passes() -> Iterator[None]:
    """Inside, generators that are made record their passes, and replay them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "not_waiting", nullcontext)
        patch.setattr("selfgen.context.forward.packed_linears", nullcontext)  # a CPU's, whose weights are copies
        patch.setattr("selfgen.context.fused.saves_time", lambda device: True)
        patch.setattr(engine, "_memory_of", lambda device: 2**34)
        patch.setattr(engine, "forward_of", lambda model, cuda_graphs, invariant=None: Recorder(model, invariant))
        patch.setattr(
            "selfgen.context.generator.forward_of",
            lambda model, cuda_graphs, invariant=None: Recorder(model, invariant),
        )
        yield
