"""Tensor parallelism on CPUs, for which Accelerate refuses its ParallelismConfig."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from selfgen.training import parallelism


def tensor_parallel_on_cpus() -> None:
    """From here on, Accelerate trains tensor parallel models on CPUs, too, in this process."""
    from accelerate import ParallelismConfig  # which old versions lack

    ParallelismConfig._validate_accelerator = lambda *_: None
    parallelism._NOT_SPLIT_ON = ()


def split_model(folder, **options) -> PreTrainedModel:
    """The model that ``folder`` holds, of which each process has a part; ``options`` are of a DistributedConfig."""
    from transformers.distributed import DistributedConfig  # which old versions lack

    split = DistributedConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=split, dtype="float32").eval()


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Afterwards, how many collectives of each kind this process has taken part in by gloo."""
    counted: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield counted
    counted.update(event.name for event in profile.events() if event.name.startswith("gloo:"))
