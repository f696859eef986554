"""Every name of torch that is not documented and that this package uses, each with what is done where it is missing.

Such names may go in any release of torch. Then the package still imports and computes the same: what cannot be known is
taken for the case that asks for care, so that calls take longer or are checked less.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _len_torch_dispatch_stack
    from torch._C._functorch import is_functorch_wrapped_tensor

    _PRE_DISPATCH = DispatchKey.PreDispatch
except (ImportError, AttributeError):  # then every call counts as traced: values are not looked at

    def is_traced(*tensors: Tensor) -> bool:
        """Whether a call is recorded, faked or mapped, which cannot be told here."""
        return True

else:

    def is_traced(*tensors: Tensor) -> bool:
        """Whether a call is recorded, faked or mapped, so that some of `tensors` may have no memory of their own.

        On the path of every call, so made of tests that cost less than `tensor.device` does. So is any call under a
        dispatch mode: a tracer's cannot be told from others as cheaply, and makes fake or recorded what real tensors
        give.
        """
        if (
            torch.compiler.is_compiling()
            or _len_torch_dispatch_stack()
            or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)  # make_fx(pre_dispatch=True)
        ):
            return True
        for tensor in tensors:
            plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # else fake, or functional
            if not plain or is_functorch_wrapped_tensor(tensor):
                return True
        return False


try:
    from torch._C._functorch import is_batchedtensor
except ImportError:  # then torch refuses what is asked about, in its own words

    def is_batchedtensor(tensor: Tensor) -> bool:
        return False


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode derivatives flow through `tensor`."""
    # Outside of a level no tensor has one, and asking each costs more.
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def storage_of(tensor: Tensor) -> int:
    """The same number for tensors of one storage."""
    storage = tensor.untyped_storage()
    number = getattr(storage, "_cdata", None)  # the address of a pointer that is at hand
    return storage.data_ptr() if number is None else number


_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia") if torch.amp.is_autocast_available(device)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """To what torch.autocast casts on such devices now, or None."""
    # torch 2.11 cannot compile is_autocast_available.
    compiling = torch.compiler.is_compiling()
    known = device_type in _AUTOCAST if compiling else torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None
