"""Whether a training step reuses the passes that made its contexts: what speaks against it, and a trial of it.

Some reasons are known before training. The others show in a step: the first one that reuses passes, and some later ones
(``ReuseTrial.look_again``), compare its loss with that of an ordinary forward, and try the backward of each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..context import ContextGenerator
from ..context.hidden_states import ReuseError, decoder_layers
from ..context.models import inference
from ..context.precision import full_precision
from ..context.sharding import whole_weights
from .batches import Step
from .config import BSSConfig
from .engines import Engine
from .reuse import reuse_passes

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module], Any]
"""Of a model: a loss, or a tuple that begins with one, of a micro-batch."""


class ReuseTrial:
    """Whether passes are reused, and the loss of a micro-batch with or without that.

    ``on`` tells whether this process makes contexts whose passes it means to reuse, and ``verified`` whether it has
    compared a step's loss since the last ``look_again`` that found it on.

    Args:
        args: of the trainer.
        generator: of the contexts.
        engine: what is around the model.
        whole_weights: the trainer's, with ``keep``: inside, each process runs as many forwards as it needs.
    """

    def __init__(
        self,
        args: BSSConfig,
        generator: ContextGenerator,
        engine: Engine,
        whole_weights: Callable[..., AbstractContextManager[None]],
    ):
        self.on = self.verified = False
        self._open = True  # in one of all processes
        self._args, self._generator, self._engine, self._whole_weights = args, generator, engine, whole_weights

    def may_begin(self) -> bool:
        """Whether to try to reuse passes; some reasons against it show only in a pass, later."""
        if not self._args.reuse_passes:
            return False
        reasons = {
            f"context_method is {self._args.context_method}": self._args.context_method != "fixed_point",
            "neftune_noise_alpha adds noise to embeddings": bool(self._args.neftune_noise_alpha),
            "torch_compile compiles the training pass": self._args.torch_compile,
            "several GPUs in one process split batches": self._args.n_gpu > 1,
        }
        try:
            decoder_layers(self._generator.model)
        except ReuseError as error:
            reasons[str(error)] = True
        for reason, holds in reasons.items():
            if holds:
                return self.off(reason)
        return True

    def off(self, reason: object) -> bool:
        """Reuse passes no more, and tell why; False."""
        logger.warning("passes are not reused, and the training step computes its own forward: %s", reason)
        self.on = False
        return False

    def look_again(self) -> None:
        """The next step that reuses passes tries it: what a model computes may have changed."""
        self.verified, self._open = not self.on and self.verified, True

    def agree(self, step: Step) -> bool:
        """Whether the passes of ``step`` are reused, in this process or, where they must, in all of them."""
        if self._engine.reuses_together and self._engine.together.any(step.passes is None):
            step.passes = None
        return step.passes is not None

    def loss(
        self,
        model: nn.Module,
        loss: Loss,
        step: Step,
        batch: dict[str, Tensor],
        *,
        tries: bool,
        unused: set[int] | None,
    ) -> Any:
        """``loss`` of ``model``, which is in training, over what the passes of ``step`` computed for ``batch``, if so.

        With ``tries``, which all processes give alike, that is tried before where it has to be. ``unused`` is of
        ``reuse_passes``.
        """
        passes = step.passes
        reusing: Callable[..., AbstractContextManager[list[int] | None]] = nullcontext
        if passes is not None:
            reuse = partial(reuse_passes, unused=unused, reenter=self._engine.reuses_together)
            reusing = partial(reuse, passes.hidden_states, passes.slots(batch))
        if tries and self._open:
            verify = None if passes is None or self.verified else partial(self._verify, model, loss, reusing)
            if not self._try(step, verify):
                reusing = nullcontext
        with reusing() as reused:
            found = loss(model)
        if reused is not None and not self._all_layers_in(reused):
            step.passes = None
            if self._engine.accelerator.num_processes > 1:  # the others have gone on
                raise ReuseError("a training forward has skipped decoder layers: give reuse_passes=False")
            found = loss(model)  # a layer that a training forward skips is none of the gradient's
        return found

    def _try(self, step: Step, verify: Callable[..., bool] | None) -> bool:
        """Whether passes are reused now; all processes call this as long as one of them has to ``verify`` it."""
        checks: dict[int, Callable[[], None]] = {}  # of layers
        stay = self._engine.stay_sharded
        with self._whole_weights(keep=True):
            fine = verify is None or verify(checks)
            fine = fine and (stay or self._layers_computed_again(checks))
        if stay:
            fine = self._layers_computed_again(checks if fine else {}) and fine
        if not fine:
            step.passes = None
        self._open = self._engine.together.any(self.on and not self.verified)
        return self.agree(step) and fine

    def _all_layers_in(self, reused: list[int]) -> bool:
        """Whether each decoder layer took what the passes computed, once; where not, passes are reused no more."""
        layers = len(decoder_layers(self._generator.model))
        if sorted(reused) == list(range(layers)):
            return True
        return self.off(f"only {len(set(reused))} of {layers} decoder layers took what the passes computed")

    def _verify(self, model: nn.Module, loss: Loss, reusing, checks: dict[int, Callable[[], None]]) -> bool:
        """Once: the loss over reused passes is the ordinary one, for what no look at a model can tell.

        ``checks`` get what tries the backward of each layer.
        """
        if reason := self._engine.why_no_reuse(decoder_layers(self._generator.model)):  # in all ranks, at once
            self.verified = True
            return self.off(reason)
        unwrapped = self._engine.accelerator.unwrap_model(model)  # ranks may end differently, so no collectives
        with torch.no_grad():
            ordinary = _first(loss(unwrapped))
        if not ordinary:
            return True  # a micro-batch with nothing to learn shows nothing; the next one will
        self.verified = True
        with self._engine.autocast():
            full = full_precision(self._generator.model)
        try:
            with reusing(bound=1e-3 if full else 0.1, checks=checks, reenter=False) as reused:
                found = _first(loss(unwrapped))  # with gradients: only these show what the layers must have one of
        except ReuseError as reason:
            return self.off(reason)
        if not self._all_layers_in(reused):  # equal losses would show nothing
            return False
        difference = float((found.detach() - ordinary).abs() / ordinary.abs())
        if not difference <= (1e-4 if full else 2e-2):  # NaN is a difference, too
            return self.off(f"the loss would be off by {difference:.1e} of its value in an ordinary forward")
        with inference(unwrapped):
            in_inference = _first(loss(unwrapped))
        difference = float((in_inference - ordinary).abs() / ordinary.abs())
        if not difference <= 1e-4:  # in any precision, as rounding is the same
            return self.off(f"training and inference differ, their losses by {difference:.1e} of the value")
        self._generator.touch()  # what a layer reads of an earlier one must not be that of just this forward
        return True

    def _layers_computed_again(self, checks: dict[int, Callable[[], None]]) -> bool:
        """Whether all is well with the ``checks`` of layers; where weights stay sharded, all processes call this."""
        stay = self._engine.stay_sharded
        if not (self._engine.together.any(bool(checks)) if stay else checks):
            return True
        reason: object = None
        for index, layer in reversed([*enumerate(decoder_layers(self._generator.model))]):
            with whole_weights(layer, keep=not stay):
                try:
                    if reason is None and index in checks:
                        checks[index]()
                except ReuseError as error:
                    reason = error
                except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    reason = f"decoder layers can't be computed one by one ({type(error).__name__}: {error})"
        return reason is None or self.off(reason)


def _first(loss: Any) -> Tensor:
    """The loss, without the outputs that may come with it."""
    return loss[0] if isinstance(loss, tuple) else loss
