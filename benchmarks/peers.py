"""Other methods of making mixed contexts, written for the comparison, with our noise, so that tokens can be compared.

The sequential loop over a KV cache is `selfgen`'s own (``method="sequential"``), TRL's generation is TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from selfgen_kernels import sample_mix


@dataclass(frozen=True)
class Rows:
    """Prompts and reference answers, token ids, and the identity of each row."""

    prompts: list[list[int]]
    references: list[list[int]]
    sample_ids: list[int]

    def shortened(self, rows: int, answer: int) -> Rows:
        """The first ``rows`` rows with at most ``answer`` answer tokens each."""
        answers = [reference[:answer] for reference in self.references[:rows]]
        return Rows(self.prompts[:rows], answers, self.sample_ids[:rows])

    def dataset(self) -> Dataset:
        """As `tokenize_rows` gives them."""
        columns = {"prompt_ids": self.prompts, "answer_ids": self.references, "sample_id": self.sample_ids}
        return Dataset.from_dict(columns)


class Grid:
    """Rows as a rectangle [R, P + T]: prompts padded on the left and answers on the right, which all begin at P."""

    def __init__(self, rows: Rows, device: torch.device):
        prompts, references = (
            [torch.tensor(row, device=device) for row in part] for part in (rows.prompts, rows.references)
        )
        self.lengths = torch.tensor([len(row) for row in references], device=device)  # [R]
        self.reference = pad_sequence(references, batch_first=True)  # [R, T]
        prompt = pad_sequence(prompts, batch_first=True, padding_side="left")  # [R, P]
        real = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left")
        self.start, self.width = prompt.shape[1], self.reference.shape[1]
        self.tokens = torch.cat([prompt, self.reference], 1)  # [R, P + T]
        self.mask = torch.cat([real, torch.ones_like(self.reference)], 1)  # [R, P + T]; nothing looks to the right
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # [R, P + T]
        self.sample_ids = torch.tensor(rows.sample_ids, device=device)  # [R]

    def draw(self, model: PreTrainedModel, first: int, stop: int, self_prob: float, seed: int) -> Tensor:
        """Mixed tokens [R, stop - first] of the answers' places, from one forward over what stands before ``stop``."""
        upto = slice(0, self.start + stop - 1)  # a token is predicted one place before it
        logits = model(
            input_ids=self.tokens[:, upto],
            attention_mask=self.mask[:, upto],
            position_ids=self.positions[:, upto],
            use_cache=False,
            logits_to_keep=stop - first,
        ).logits  # [R, N, V]
        places = torch.arange(first, stop, device=logits.device).expand(len(logits), -1)  # [R, N]
        mixed, _ = sample_mix(
            logits.flatten(0, 1),
            self.reference[:, first:stop].flatten(),
            (places < self.lengths[:, None]).flatten() * self_prob,  # padding samples nothing
            seed=seed,
            sample_ids=self.sample_ids.repeat_interleave(stop - first),
            positions=places.flatten(),
        )
        return mixed.unflatten(0, places.shape)

    def contexts(self) -> list[Tensor]:
        """The answers, [T_i] int64 each."""
        answers = self.tokens[:, self.start :]
        return [row[:length] for row, length in zip(answers, self.lengths.tolist(), strict=True)]


@torch.no_grad()
def full_recompute(model: PreTrainedModel, rows: Rows, self_prob: float, *, seed: int) -> list[Tensor]:
    """Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099) as Tensor2Tensor makes it: no cache.

    Every step computes all contexts again, for one more token of each row (``sequential_scheduled_sampling`` in
    tensor2tensor/utils/scheduled_sampling.py). There the padding after the step is computed, too; here it is not.
    """
    grid = Grid(rows, model.device)
    for step in range(grid.width):
        grid.tokens[:, grid.start + step] = grid.draw(model, step, step + 1, self_prob, seed)[:, 0]
    return grid.contexts()


@torch.no_grad()
def parallel_scheduled_sampling(
    model: PreTrainedModel, rows: Rows, self_prob: float, passes: int, *, seed: int
) -> list[Tensor]:
    """Parallel Scheduled Sampling (Duckworth et al. 2019, arXiv 1906.04331): a fixed number of teacher-forced forwards.

    Each pass draws all tokens under the contexts that the pass before it made, the first one under the references. The
    first ``passes`` self tokens of a row are those of the sequential loop, later ones are an approximation.
    """
    grid = Grid(rows, model.device)
    for _ in range(passes):
        grid.tokens[:, grid.start :] = grid.draw(model, 0, grid.width, self_prob, seed)
    return grid.contexts()


def differing(contexts: list[Tensor], exact: list[Tensor]) -> int:
    """How many tokens are not those of the exact contexts. Only self tokens can differ."""
    return sum(int((got != want).sum()) for got, want in zip(contexts, exact, strict=True))
