"""What the model learns at each position besides the reference token: the options, and what is computed for them.

Most targets are a distribution of the next token, without a gradient: of another model under the mixed context
(``teacher``), or of the model itself, as it is now, under the reference (``teacher_forced``), or under the mixed
context after a prompt that has the reference in it (``privileged``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..correction import CorrectionCue
from ..data import IGNORE_INDEX
from .divergences import DIVERGENCES, Divergence

TARGETS = {"reference": 0.0, "dft": 1.0, "teacher_forced": 0.5, "teacher": 0.5, "privileged": 0.5}
"""Each target, and its weight by default."""
PRIVILEGED_CUE = "This answer is right. Give the answer to the same question once more."
REFERENCES = "reference_ids"
"""The column [B, L] of a batch that has the reference in place of the mixed context."""


@dataclass
class TargetOptions:
    """What is learned at each position besides the reference token."""

    _argument_group_name = "what is learned besides the reference"

    target: str = field(
        default="reference",
        metadata={
            "help": "What is learned at each position: reference (the reference token alone), dft (the same, weighted "
            "by the probability that the model gives to it), or besides it a distribution: that of the model under the "
            "reference (teacher_forced), of a frozen model under the mixed context (teacher), or of the model under "
            "the mixed context with the reference in its prompt (privileged)."
        },
    )
    target_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the target, in [0, 1]; the cross-entropy to the reference has what is left of 1. By "
            "default it is 1 for target=dft and 0.5 for the others."
        },
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Frozen model for target=teacher: a folder, or a name on the hub, with the same tokenizer. By "
            "default it is the model without its adapter, if it has one."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "How far the model is from a target p that is a distribution: forward_kl (KL(p || model), which "
            "covers all that p finds likely), reverse_kl (KL(model || p), which keeps to some of it), or jsd "
            "(generalised Jensen-Shannon, between the two)."
        },
    )
    divergence_beta: float = field(
        default=0.5,
        metadata={
            "help": "For divergence=jsd: the target's share of the mixture that both are compared with, in (0, 1). "
            "Near 0 its gradient is that of forward_kl, near 1 that of reverse_kl, scaled."
        },
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Compare only the target's most likely ids one by one, this many, at least 1, and all others as "
            "one. By default all ids are compared."
        },
    )
    teacher_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of a target that is a distribution, above 0: below 1 it is sharper, above 1 flatter. "
            "The model's own is always 1."
        },
    )
    privileged_cue: str = field(
        default=PRIVILEGED_CUE,
        metadata={
            "help": "For target=privileged: text that asks for the answer again, after the prompt and the reference: "
            "the user's next turn in the chat template, or a paragraph of its own if there is no template."
        },
    )

    @property
    def weight_of_target(self) -> float:
        """``target_weight``, or its default."""
        return TARGETS[self.target] if self.target_weight is None else self.target_weight

    @property
    def learned_target(self) -> str:
        """``target``, or the reference if it has no weight."""
        return self.target if self.weight_of_target else "reference"

    @property
    def compares(self) -> bool:
        """Whether the target is a distribution that the model is compared with."""
        return self.target not in ("reference", "dft")

    def divergence_over(self, ids: int | None) -> Divergence:
        """From the target; ``ids`` as in ``Divergence``."""
        return Divergence(self.divergence, self.divergence_beta, self.teacher_top_k, self.teacher_temperature, ids)

    def check_target(self) -> None:
        """Raise ValueError if an option is out of its range, or has no effect."""
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; accepted: {', '.join(TARGETS)}")
        if self.target_weight is not None and not 0.0 <= self.target_weight <= 1.0:
            raise ValueError(f"target_weight is {self.target_weight}; it must be from 0 to 1")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence is {self.divergence!r}; accepted: {', '.join(DIVERGENCES)}")
        if not 0.0 < self.divergence_beta < 1.0:
            raise ValueError(
                f"divergence_beta is {self.divergence_beta}; it must be between 0 and 1 (for its limits, give "
                "divergence=forward_kl or reverse_kl)"
            )
        k = self.teacher_top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
            raise ValueError(f"teacher_top_k is {k}; it must be a whole number, at least 1")
        if not 0.0 < self.teacher_temperature < float("inf"):
            raise ValueError(f"teacher_temperature is {self.teacher_temperature}; it must be a finite number > 0")
        if self.target == "reference" and self.target_weight is not None:
            raise ValueError(
                f"target_weight is {self.target_weight}, but target is reference, which is all that is learned: give "
                f"target ({', '.join(one for one in TARGETS if one != 'reference')}), or leave target_weight out"
            )
        if not self.compares:
            for name in ("divergence", "teacher_top_k", "teacher_temperature"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but target is {self.target}, which is no distribution: give "
                        f"target=teacher_forced, teacher or privileged, or leave {name} out"
                    )
        for name, goes_with, fits in (
            ("teacher_model", "target=teacher", self.target == "teacher"),
            ("privileged_cue", "target=privileged", self.target == "privileged"),
            ("divergence_beta", "divergence=jsd", self.divergence == "jsd"),
        ):
            if getattr(self, name) != _DEFAULTS[name] and not fits:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which goes with {goes_with}: give that, or leave {name} out"
                )


_DEFAULTS = {name: one.default for name, one in TargetOptions.__dataclass_fields__.items()}


def keep_references(batches: list[dict[str, Tensor]]) -> None:
    """Keep prompts and references before contexts are mixed, as labels may be taken away then."""
    for batch in batches:
        labels = batch["labels"]
        batch[REFERENCES] = torch.where(labels == IGNORE_INDEX, batch["input_ids"], labels)


def after_difference(batch: dict[str, Tensor]) -> Tensor:
    """Bool [B, L]: where a token up to there differs from the reference, so that the next one has another context."""
    return (batch["input_ids"] != batch[REFERENCES]).cumsum(1) > 0


def under_references(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The micro-batch under reference contexts."""
    return {**batch, "input_ids": batch[REFERENCES]}


class Privileged:
    """Rows whose prompt has the reference: the prompt, the reference, a cue, and the mixed context.

    ``longest`` is the most tokens that such a row may have. A longer one is not computed, and has no target.
    """

    def __init__(self, cue: CorrectionCue, pad_token_id: int, longest: int | None):
        self.cue, self.pad, self.longest = cue, pad_token_id, longest

    def rows(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs [B, M] of a micro-batch of such rows, and on the CPU how far contexts are moved, and which rows fit.

        In place of a row that does not fit stands the row as it is.
        """
        rows, moved, fits = [], [], []
        for index, (prompt, answer) in enumerate(
            zip(*(batch[f"{one}_length"].tolist() for one in _PARTS), strict=True)
        ):
            ids, reference = (batch[name][index, : prompt + answer] for name in ("input_ids", REFERENCES))
            before = self.cue.prompt(reference[:prompt].tolist(), reference[prompt:].tolist())
            fits.append(self.longest is None or len(before) + answer <= self.longest)
            rows.append(torch.cat([ids.new_tensor(before), ids[prompt:]]) if fits[-1] else ids)
            moved.append(len(before) - prompt if fits[-1] else 0)
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
        mask = (places < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask}, torch.tensor(moved), torch.tensor(fits)


_PARTS = ("prompt", "answer")


def moved_back(states: Tensor, moved: Tensor, length: int) -> Tensor:
    """States [B, L, D] at the places of the rows as they are, of those [B, M, D] whose contexts are ``moved`` [B]."""
    places = torch.arange(length, device=states.device) + moved.to(states.device)[:, None]  # [B, L]
    places = places.clamp(max=states.shape[1] - 1)
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
