"""The contract of each op: its public function, its schema and its fake kernel. The maths is in `backends/`.

`OPS` is the table of them all. Schemas, vmap rules, the torch reference, the Triton kernels and what stands in for C++
kernels that were not built are registered by reading it.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, TypeVar

from selfgen_kernels.call import DRAW, HEAD, MASK, SAMPLING, Part, one

_Result = TypeVar("_Result")

SEED_TENSOR = "seed_tensor"
"""The overload of each op of a sampling call whose seed is int64 [1], read when the kernel runs."""


class Op(NamedTuple):
    """An operator of this library."""

    module: str  # of `ops`, `backends/reference` and `backends/triton`, where its contract and its kernels are
    arguments: tuple[Part, ...] = ()  # of a sampling call; the others' are in their contract
    kernels: tuple[str, ...] = ("cpu", "triton")  # the backends that have one, besides the reference, which has all

    @property
    def parameters(self) -> str:
        """Those of a sampling call, as in a schema."""
        return ", ".join(parameter for part in self.arguments for parameter in part.parameters)

    @property
    def overloads(self) -> tuple[str, ...]:
        """The operator with a seed that is a number; for a sampling call also the one with a seed in memory."""
        return ("default", SEED_TENSOR) if self.arguments else ("default",)


_LOGITS, _REFERENCE = one("Tensor logits"), one("Tensor reference")

OPS = {
    "gumbel_noise": Op("noise"),
    "self_mask": Op("noise"),
    "sample_mix": Op("sampling", (_LOGITS, _REFERENCE, SAMPLING)),
    "reference_log_prob": Op("sampling", (_LOGITS, _REFERENCE, MASK)),
    "linear_sample_mix": Op("head", (HEAD, _REFERENCE, SAMPLING)),
    "linear_sample_shard": Op("head", (HEAD, one("SymInt first_id"), DRAW)),
    "linear_reference_log_prob": Op("head", (HEAD, _REFERENCE, MASK)),
    "combine_shards": Op("head", (one("Tensor values"), one("Tensor ids"), _REFERENCE, DRAW), kernels=()),
    "invariant_linear": Op("linear"),
    "plan_pass": Op("passes"),
    "commit_pass": Op("passes"),
    "kv_append": Op("attention"),
    "ragged_attention": Op("attention"),
    "rms_norm": Op("norm"),
    "add_rms_norm": Op("norm"),
    "act_mul": Op("activation", kernels=("triton",)),
    "rotary": Op("rotary", kernels=("triton",)),
    "rotary_append": Op("rotary", kernels=("triton",)),
}
"""By the name of the operator."""


def in_records(kernel: Callable[..., _Result]) -> Callable[..., _Result]:
    """`kernel`, which takes the records of a sampling call, as the function of the operator's flat arguments."""
    parts = OPS[kernel.__name__].arguments

    @wraps(kernel)
    def flat(*args):
        given, begin = [], 0
        for part in parts:
            end = begin + len(part.parameters)
            given.append(part.make(*args[begin:end]))
            begin = end
        if len(args) > begin:
            raise TypeError(f"{kernel.__name__} takes {begin} arguments, got {len(args)}; pass those of its schema")
        return kernel(*given)

    return flat
