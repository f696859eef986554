"""Contexts and answers by their definition, one token after the other, each from the model's own forward over its row.

Nothing is kept from token to token, nothing is shared with ``selfgen``, and of the kernels only the reference's random
numbers are taken. Rounding may turn a near tie, so a token that was found is taken where it is one of two that tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfgen_kernels.backends.reference.philox import GROUP, MASK, TOKEN, gumbel_noise, random_words

NEAR = 1e-4
"""Scores that differ by less are a tie."""


@contextmanager
def in_eval(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Oracle:
    """``model`` is what is given to a generator, ``temperature``, ``masks`` and ``vocab_size`` are its settings."""

    model: torch.nn.Module
    temperature: float
    masks: Any
    vocab_size: int | None
    filters: dict[str, float] = field(default_factory=dict)
    ties: int = 0  # tokens that were taken as they were found

    def contexts(
        self,
        prompts: list[Tensor],
        references: list[Tensor],
        self_probs: list[float],
        seed: int,
        sample_ids: list[int],
        may_be_self: list[Tensor],
        found: list[Tensor],
        found_self: list[Tensor],
    ) -> list[tuple[list[int], list[bool]]]:
        """Tokens and mask of each row; ``found`` and ``found_self`` are those that are judged."""
        rows: list[tuple[list[int], list[bool]]] = [([], []) for _ in prompts]
        candidates = [
            [
                on and allowed
                for on, allowed in zip(self.candidates(len(may), prob, seed, one), may.tolist(), strict=True)
            ]
            for prob, one, may in zip(self_probs, sample_ids, may_be_self, strict=True)
        ]
        for position in range(max(map(len, references))):
            going_on = [row for row, reference in enumerate(references) if position < len(reference)]
            drawn = [row for row in going_on if candidates[row][position]]
            logits = self.logits([[*prompts[row].tolist(), *rows[row][0]] for row in drawn])
            for row in going_on:
                token, own = int(references[row][position]), row in drawn
                if own:
                    own = self.is_confident(logits[drawn.index(row)], token, bool(found_self[row][position]))
                if own:
                    key = seed, sample_ids[row], position
                    token = self.draw(logits[drawn.index(row)], *key, int(found[row][position]))
                rows[row][0].append(token)
                rows[row][1].append(own)
        return rows

    def answers(
        self,
        prompts: list[Tensor],
        limit: int,
        stop_ids: list[int],
        seed: int,
        sample_ids: list[int],
        found: list[Tensor],
    ) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        for position in range(limit):
            going_on = [row for row, tokens in enumerate(rows) if not (tokens and tokens[-1] in stop_ids)]
            logits = self.logits([[*prompts[row].tolist(), *rows[row]] for row in going_on])
            for row, of_row in zip(going_on, logits, strict=True):
                told = int(found[row][position]) if position < len(found[row]) else -1
                rows[row].append(self.draw(of_row, seed, sample_ids[row], position, told))
        return rows

    def logits(self, rows: list[list[int]]) -> Tensor:
        """[R, V]: what follows each row. Shorter rows have zeros after them, which a causal model does not see."""
        if not rows:
            return torch.empty(0)
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        with in_eval(self.model):
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        last = torch.tensor([len(tokens) - 1 for tokens in rows])
        return logits[torch.arange(len(rows)), last, : self.vocab_size].float()

    def candidates(self, length: int, self_prob: float, seed: int, sample_id: int) -> list[bool]:
        """By one uniform random number per position."""
        positions = torch.arange(length)
        words = random_words(seed, torch.full_like(positions, sample_id), positions, 1, MASK)[:, 0].tolist()
        masks, before, row = self.masks, 0.0, [False]
        for position in range(length):
            prob = self_prob
            if masks.curve in ("rising", "falling"):
                slope = 2 if masks.curve == "rising" else -2
                prob += min(prob, 1 - prob) * slope * ((position + 0.5) / length - 0.5)
            chance = prob
            if masks.granularity == "span" and position > 0:
                stay = max(prob, 1 - 1 / masks.span_length)
                stay = min(stay, prob / before if before > 0 else 1.0)
                enter = (prob - before * stay) / (1 - before) if before < 1 else stay
                chance = stay if row[-1] else max(0.0, min(enter, stay))
            word = words[0] if masks.granularity in ("prefix", "sequence") else words[position]
            row.append(word < round(min(max(chance, 0.0), 1.0) * 2**32))
            before = prob
        return row[1:]

    def is_confident(self, logits: Tensor, reference: int, found: bool) -> bool:
        if not self.masks.min_reference_prob:
            return True
        more = float(logits.log_softmax(0)[reference] - torch.tensor(self.masks.min_reference_prob).log())
        if abs(more) < NEAR:
            self.ties += found != (more >= 0)
            return found
        return more > 0

    def draw(self, logits: Tensor, seed: int, sample_id: int, position: int, found: int) -> int:
        """A group of 64 ids, and one of them, each by Gumbel-max."""
        if self.temperature == 0:
            return self._best(logits, found)
        z = self._filtered(logits / self.temperature)
        groups = z.split(64)
        key = seed, torch.tensor([sample_id]), torch.tensor([position])
        mass = torch.stack([group.logsumexp(0) for group in groups]) + gumbel_noise(*key, len(groups), GROUP)[0]
        group = self._best(mass, found // 64)
        inner = groups[group] + gumbel_noise(*key, 64, TOKEN)[0, : len(groups[group])]
        return 64 * group + self._best(inner, found - 64 * group)

    def _best(self, scores: Tensor, found: int) -> int:
        best = int(scores.argmax())
        if best != found and 0 <= found < len(scores) and scores[best] - scores[found] < NEAR:
            self.ties += 1
            return found
        return best

    def _filtered(self, z: Tensor) -> Tensor:
        if top_k := self.filters.get("top_k"):
            z = z.masked_fill(z < z.sort(descending=True).values[: int(top_k)][-1], -torch.inf)
        if top_p := self.filters.get("top_p"):
            best = z.sort(descending=True).values, z.double().softmax(0).sort(descending=True).values
            kept, total = -torch.inf, 0.0
            for value, prob in zip(*best, strict=True):
                if total >= top_p:
                    break
                kept, total = value, total + float(prob)
            z = z.masked_fill(z < kept, -torch.inf)
        if min_p := self.filters.get("min_p"):
            z = z.masked_fill(z < z.max() + torch.tensor(min_p).log(), -torch.inf)
        return z
