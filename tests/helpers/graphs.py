"""What stands in for CUDA graphs on the CPU: a replay of the operators that a recorded pass has called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfgen.context import generator
from selfgen.context import graphs as engine
from selfgen.context.late import Late


class Calls(TorchDispatchMode):
    """The operators called inside, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(one, Late) for one in types):  # which calls the operators that a device runs
            return NotImplemented
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result


class Launches(TorchDispatchMode):
    """What the host launches between two replays inside: a list of operators for each pair of them."""

    def __init__(self):
        super().__init__()
        self.between = []
        self._replays = False

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        replay = Recorder.replay

        def noted(recorder, calls):
            self._replays = True
            replay(recorder, calls)
            self._replays = False
            self.between.append([])

        self._patch.setattr(Recorder, "replay", noted)
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        self.between.pop()  # after the last one
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(one, Late) for one in types):
            return NotImplemented
        result = operator(*args, **(kwargs or {}))
        if self.between and not self._replays and self.count([(operator, args, kwargs or {}, result)]):
            self.between[-1].append(operator)
        return result

    @staticmethod
    def count(calls):
        """How many of the ``calls`` a device computes: no views, and no memory without values."""
        found = 0
        for operator, args, kwargs, results in calls:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            made = [one for one in tree_leaves(results) if isinstance(one, torch.Tensor)]
            storages = {one.untyped_storage().data_ptr() for one in given}
            is_view = bool(made) and all(one.untyped_storage().data_ptr() in storages for one in made)
            found += operator._schema.is_mutable or not (is_view or "empty" in operator._schema.name)
        return found


class Recorder(engine.GraphedForward):
    """A replay calls the operators of the recording on its memory again; as in a graph, no Python of the model runs."""

    def __init__(self, model, share=0.125, invariant=None):
        super().__init__(model, share, invariant)
        self.records = self.replays = 0

    def _record(self, run):
        self.records += 1
        with engine.fresh_casts(self.model), Calls() as recorded:
            run()

        def replay():
            self.replay(recorded.calls)

        replay.calls = recorded.calls
        return replay

    def replay(self, calls):
        self.replays += 1
        for operator, args, kwargs, results in calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _recorder_of(model, cuda_graphs, graph_memory=0.125, invariant=None):
    return Recorder(model, graph_memory, invariant)


@contextmanager
def recorded_passes() -> Iterator[None]:
    """Inside, generators that are made record their passes, and replay them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "not_waiting", nullcontext)
        patch.setattr("selfgen.context.forward.packed_linears", nullcontext)  # a CPU's, whose weights are copies
        patch.setattr("selfgen.context.fused.saves_time", lambda device: True)
        patch.setattr(engine, "_memory_of", lambda device: 2**34)
        for module in (engine, generator):
            patch.setattr(module, "forward_of", _recorder_of)
        yield
