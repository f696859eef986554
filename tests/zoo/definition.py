"""What a mixed context is, by the model's own forward over every prefix alone: the measure of both methods."""

from __future__ import annotations

import torch
from torch import Tensor

from selfgen import ContextGenerator
from selfgen_kernels import sample_mix

SEED = 3


def rows(lengths, vocab: int = 131, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """(prompts, references) of (prompt, answer) lengths."""
    tokens = torch.Generator().manual_seed(seed)

    def row(length):
        return torch.randint(3, vocab, (length,), generator=tokens)

    return [row(p) for p, _ in lengths], [row(t) for _, t in lengths]


def wrong_tokens(model, prompts, references, mixed, temperature: float = 1.0) -> int:
    """How many self tokens of ``mixed`` are not what the model's own forward over the prefix before them says."""
    wrong = 0
    for number, (prompt, reference, tokens, is_self) in enumerate(
        zip(prompts, references, mixed.tokens, mixed.is_self, strict=True)
    ):
        context = torch.cat([prompt, tokens])
        wrong += int((tokens != reference)[~is_self].sum())
        for place in is_self.nonzero().flatten().tolist():
            with torch.no_grad():
                logits = model(input_ids=context[None, : len(prompt) + place]).logits[:, -1]
            want, _ = sample_mix(
                logits.float(), reference[place : place + 1], 1.0, seed=SEED, sample_ids=torch.tensor([number]),
                positions=torch.tensor([place]), temperature=temperature,
            )  # fmt: skip
            wrong += int(want != tokens[place])
    return wrong


def contexts(model, prompts, references, self_prob=0.5, *, method="fixed_point", budget: int | None = 16):
    """Contexts with passes of at most ``budget`` tokens; None measures the budget."""
    generator = ContextGenerator(model, token_budget=budget, balance=budget and budget / 8)
    return generator.contexts(prompts, references, self_prob, seed=SEED, sample_ids=range(len(prompts)), method=method)
