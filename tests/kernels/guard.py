"""An out-of-bounds check for Triton kernels under the interpreter.

Inside `guarded()` every launch gets copies of its tensors. Around and between their elements lies poison (all bits
one: NaN, or -1), and every address that a kernel loads, stores or updates, unless masked off, must be the start of an
element of one of them: a row's padding, a neighbour's memory and a half element are all outside. What was written is
copied back, so results are as without the guard. Works by replacing the functions of the interpreter that touch memory,
which are the same in Triton 3.5 to 3.9.
"""

import contextlib
import copy

import numpy as np
import torch

MARGIN = 4096  # bytes of poison between two tensors
DISOWNED: list[torch.Tensor] = []  # views of tensors whose elements lie outside, too: see `disowned`


class OutOfBounds(Exception):
    """A kernel touched memory that none of its tensors owns."""


class Memory:
    """The tensors of one launch, each with a place of its own."""

    def __init__(self):
        self.copies = []  # (original, copy)
        self.starts, self.owned = [], []  # addresses; bool [bytes]: whether an element starts here
        self.itemsizes = []

    def place(self, argument):
        """`argument` with every tensor in it moved into poison."""
        if isinstance(argument, tuple):
            moved = [self.place(part) for part in argument]
            return type(argument)(*moved) if hasattr(argument, "_fields") else tuple(moved)
        if isinstance(getattr(argument, "base", None), torch.Tensor) and not isinstance(argument, torch.Tensor):
            moved = copy.copy(argument)  # a tensor descriptor
            moved.base = self.place(argument.base)
            return moved
        return self.move(argument) if isinstance(argument, torch.Tensor) else argument

    def move(self, tensor):
        for original, moved in self.copies:
            same = original.data_ptr() == tensor.data_ptr() and original.dtype == tensor.dtype
            if same and original.shape == tensor.shape and original.stride() == tensor.stride():
                return moved
        if tensor.numel() == 0:
            return tensor
        size = tensor.element_size()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        buffer = torch.full((extent * size + 2 * MARGIN + 64,), 0xFF, dtype=torch.uint8)
        first = MARGIN + (tensor.data_ptr() - buffer.data_ptr() - MARGIN) % 64  # aligned as the original is
        inside = buffer[first : first + extent * size]
        moved = torch.frombuffer(inside.numpy(), dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
        distinct = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
        moved[tuple(distinct)] = tensor[tuple(distinct)]
        owned = torch.zeros(extent * size, dtype=torch.bool)
        owned.as_strided(tensor.shape, [stride * size for stride in tensor.stride()]).fill_(True)
        for view in DISOWNED:
            offset = view.data_ptr() - tensor.data_ptr()
            if view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and 0 <= offset < len(owned):
                owned.as_strided(view.shape, [stride * size for stride in view.stride()], offset).fill_(False)
        self.copies.append((tensor, moved))
        self.starts.append(inside.data_ptr())
        self.owned.append(owned.numpy())
        self.itemsizes.append(size)
        return moved

    def restore(self):
        for original, moved in self.copies:
            if 0 not in original.stride():  # torch refuses to write to expanded tensors, and kernels only read them
                original.copy_(moved)

    def check(self, what, addresses, mask, itemsize):
        """Raise unless each of the `addresses` where `mask` begins an element of `itemsize` bytes."""
        addresses = np.broadcast_to(addresses, np.broadcast_shapes(np.shape(addresses), np.shape(mask)))
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.uint64)  # [A]
        fine = np.zeros(addresses.shape, dtype=bool)
        for start, owned, size in zip(self.starts, self.owned, self.itemsizes, strict=True):
            place = addresses - np.uint64(start)  # wraps to a large number below the start
            inside = place < len(owned)
            if size == itemsize:
                fine |= inside & owned[np.where(inside, place, 0).astype(np.int64)]
        if not fine.all():
            raise OutOfBounds(f"{what} of {(~fine).sum()} elements outside of every tensor of the launch")


class Watched:
    """The interpreter's memory functions with a check before each."""

    def __init__(self, functions, memory):
        self.functions, self.memory = functions, memory

    def __getattr__(self, name):
        return getattr(self.functions, name)

    def load(self, addresses, mask, other, dtype):
        self.memory().check("load", addresses, mask, np.dtype(dtype).itemsize)
        return self.functions.load(addresses, mask, other, dtype)

    def store(self, addresses, value, mask):
        self.memory().check("store", addresses, mask, value.dtype.itemsize)
        return self.functions.store(addresses, value, mask)

    def atomic_rmw(self, operation, addresses, value, mask, order):
        self.memory().check("atomic update", addresses, mask, value.dtype.itemsize)
        return self.functions.atomic_rmw(operation, addresses, value, mask, order)

    def atomic_cas(self, addresses, compare, value, order):
        self.memory().check("atomic exchange", addresses, True, value.dtype.itemsize)
        return self.functions.atomic_cas(addresses, compare, value, order)


@contextlib.contextmanager
def guarded():
    """Check every launch in the block; yields a list of (kernel's name, tensors), to see that it was watched.

    Tensors of a launch that overlap without being the same view are taken for separate ones.
    """
    from triton.runtime import interpreter

    launches, memory = [], None

    def place(self, args, kwargs):
        nonlocal memory
        memory = Memory()
        placed = [memory.place(arg) for arg in args], {name: memory.place(arg) for name, arg in kwargs.items()}
        launches.append((f"{self.fn.__module__}.{self.fn.__name__}", len(memory.copies)))
        return placed

    executor = interpreter.GridExecutor
    before = executor._init_args_hst, executor._restore_args_dev, interpreter._interpreter
    executor._init_args_hst = place
    executor._restore_args_dev = lambda self, *arguments: memory.restore()
    interpreter._interpreter = Watched(before[2], lambda: memory)
    try:
        yield launches
    finally:
        executor._init_args_hst, executor._restore_args_dev, interpreter._interpreter = before


@contextlib.contextmanager
def disowned(*views):
    """Inside `guarded()`: the elements of these views, such as some rows of a tensor, are nobody's, either."""
    DISOWNED.extend(views)
    try:
        yield
    finally:
        DISOWNED.clear()
