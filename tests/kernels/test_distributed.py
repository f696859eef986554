"""The head over several processes (gloo): gathered by the caller from FSDP, or split by vocabulary."""

from multiprocessing import set_forkserver_preload

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from selfgen_kernels import combine_shards, linear_sample_mix, linear_sample_shard

WORLD = 3
N, D, V = 40, 16, 1000
REFERENCE = torch.arange(N) + V
SELF_PROB = 0.7
HOW = {"seed": 3, "sample_ids": torch.arange(N) // 7, "positions": torch.arange(N) % 7, "temperature": 0.8}


def network():
    """An embedding-like layer and a head, the same on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, V))


def inputs():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def single_rank(**filters):
    body, head = network()
    hidden = body(inputs())
    return linear_sample_mix(hidden, head.weight, REFERENCE, SELF_PROB, bias=head.bias, **HOW, **filters)


@torch.no_grad()
def check_fsdp():
    """A sharded head is refused, with what to do; gathered, it gives the tokens of the model that is not sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    body, head = network()
    for layer in (body, head):
        fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    hidden = body(inputs())
    with pytest.raises(TypeError, match=r"weight is a DTensor.*gather it first with weight.full_tensor\(\)"):
        linear_sample_mix(hidden, head.weight, REFERENCE, SELF_PROB, **HOW)
    weight, bias = head.weight.full_tensor(), head.bias.full_tensor()
    with pytest.raises(TypeError, match="bias is a DTensor"):
        linear_sample_mix(hidden, weight, REFERENCE, SELF_PROB, bias=head.bias, **HOW)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        got = linear_sample_mix(hidden, weight, REFERENCE, SELF_PROB, bias=bias, **HOW, **filters)
        for ours, wanted in zip(got, single_rank(**filters), strict=True):
            assert torch.equal(ours, wanted)


@torch.no_grad()
def check_vocabulary_parallel(rank):
    """Shards that cut groups, gathered: the token of one rank, on all ranks."""
    body, head = network()
    hidden = body(inputs())
    bounds = [0, 290, 700, V]
    begin, end = bounds[rank : rank + 2]
    shard = {"first_id": begin, "bias": head.bias[begin:end]}
    values, ids = linear_sample_shard(hidden, head.weight[begin:end], SELF_PROB, **shard, **HOW)
    gathered = [torch.empty(WORLD, *part.shape, dtype=part.dtype) for part in (values, ids)]
    for whole, part in zip(gathered, (values, ids), strict=True):
        dist.all_gather(list(whole), part)
    tokens, is_self = combine_shards(*gathered, REFERENCE, SELF_PROB, **HOW)
    want, want_self = single_rank()
    assert torch.equal(is_self, want_self)
    assert (tokens != want).sum() <= 1  # products of other shapes may round apart at a near tie
    everyone = torch.empty(WORLD, N, dtype=torch.int64)
    dist.all_gather(list(everyone), tokens)
    assert (everyone == tokens).all()


def worker(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    try:
        check_fsdp()
        check_vocabulary_parallel(rank)
    finally:
        dist.destroy_process_group()


def test_processes_agree_with_one(tmp_path):
    set_forkserver_preload([__name__, "torch.distributed.fsdp"])  # the ranks need not import torch each
    multiprocessing.start_processes(worker, (tmp_path / "rendezvous",), nprocs=WORLD, start_method="forkserver")
