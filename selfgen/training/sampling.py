"""The order of training rows: it depends on the seed and the epoch alone, so a resumed run has an unbroken one's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededByEpoch(Sampler):
    """``sampler`` with an order for each epoch.

    transformers' draws from the global generator, whose state at the beginning of an epoch a resumed run does not have.
    """

    def __init__(self, sampler: LengthGroupedSampler | RandomSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch. Accelerate does not reach it where a resumed run skips rows in several processes."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler: Any = getattr(train_dataloader, "batch_sampler", None)
        for _ in range(4):  # a shard of a sampler of batches of a sampler, at most
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            inner = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
            if inner is None or isinstance(sampler, SeededByEpoch):
                break
            sampler = inner
