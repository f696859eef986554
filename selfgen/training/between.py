"""What others may do to a model between making a step's contexts and the forwards that reuse their passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from transformers import Trainer, TrainerCallback

from ..context.changes import bits_of, make_of, settings_of
from ..context.sharding import shard_again
from .engines import Engine

_EVENTS = ("on_step_begin", "on_substep_end")
_METHODS = ("training_step", "compute_loss", "_prepare_inputs", "get_batch_samples")
_LIBRARIES = ("selfgen.", "transformers.", "trl.", "accelerate.", "deepspeed.", "torch.", "wandb.")
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # of a weight


class Between:
    """Notices that the model has changed since the contexts of a step were made.

    It is looked at where others' code runs in between: callbacks, methods of a subclass, hooks on gradients. Where
    weights are split, each process sees its own part, so all processes look, and come to the same.
    """

    def __init__(self, trainer: Trainer, engine: Engine):
        self._trainer, self._engine = trainer, engine
        self._agreed: bool | None = None
        self._model: object = None  # as it was when contexts were made, if it is looked at
        self._make: object = None  # as it was in the last step

    def begin(self) -> None:
        """When training begins; all processes call it."""
        self._agreed = self._engine.any(self._may_change) if self._engine.splits_weights else None

    def made_anew(self) -> bool:
        """Whether modules, hooks or settings are others than in the step before.

        Not where weights are split, as processes would have to agree on it in each step.
        """
        if self._engine.splits_weights:
            return False
        before, self._make = self._make, make_of(self._trainer.model)
        return before is not None and before != self._make

    @property
    def may_change(self) -> bool:
        """Whether others may change the model, in this process or, where weights are split, in one of them.

        Raises:
            RuntimeError: weights are split, and in this process alone it was found out when others had begun.
        """
        if self._agreed is None:
            return self._may_change
        if self._may_change and not self._agreed:
            raise RuntimeError(
                f"{next(self._others())} may change the model in the middle of a step, and came after training had "
                "begun with weights that are split over processes: add it before train()"
            )
        return self._agreed

    @property
    def _may_change(self) -> bool:
        return next(self._others(), None) is not None

    def _others(self) -> Iterator[str]:
        for callback in self._trainer.callback_handler.callbacks:
            for event in _EVENTS:
                own = getattr(type(callback), event, None)
                if event in vars(callback) or (
                    own is not getattr(TrainerCallback, event) and not type(callback).__module__.startswith(_LIBRARIES)
                ):
                    yield f"{event} of {type(callback).__name__}"
        for method in _METHODS:
            if method in vars(self._trainer):
                yield f"{method} of the trainer"
            for kind in type(self._trainer).__mro__:
                if method in vars(kind) and not kind.__module__.startswith(_LIBRARIES):
                    yield f"{method} of {kind.__name__}"
        model = self._trainer.model
        of_modules = ((name, (one._backward_hooks, one._backward_pre_hooks)) for name, one in model.named_modules())
        of_weights = ((name, [getattr(one, of, None) for of in _HOOKS]) for name, one in model.named_parameters())
        for name, found in chain(of_modules, of_weights):
            for hooks in filter(None, found):
                if any(not (getattr(hook, "__module__", None) or "").startswith(_LIBRARIES) for hook in hooks.values()):
                    yield f"a hook on the gradient of {name or type(model).__name__}"

    def look(self, *, reused: bool) -> None:
        """Contexts were made, with passes that are ``reused``, in this process; all processes call it alike."""
        self._model = self._now() if self.may_change and self._engine.any(reused) else None

    def changed(self) -> str | None:
        """Who may have changed the model since `look`, if it is another one now."""
        if self._model is None or not self._engine.any(self._model != self._now()):
            return None
        self._model = None
        return ", ".join(self._others()) or "another process"

    def _now(self) -> object:
        shard_again(self._trainer.model)  # what an evaluation has left whole
        return settings_of(self._trainer.model), bits_of(self._trainer.model)
