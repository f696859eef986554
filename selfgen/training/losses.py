"""The loss of a training step: cross-entropy to the reference answers, smoothed, weighted, and what else is asked for.

Other terms are divergences from distributions that have no gradient: those of a frozen model, or of the target that is
learned besides the reference. Their states are computed before, and their logits chunk by chunk, as the model's are.

transformers' models compute logits [B, L, V] of every position, prompts and padding included, and hand them to their
``loss_function``. Inside ``AnswerLoss.inside`` a model's LM head hands its input on as it is, and the loss function
multiplies by the head at the answers' positions only, chunk by chunk, so that logits are never in memory as a whole
(``linear_loss``; where there are more terms than the cross-entropy, by checkpointed chunks). It all happens in the
model's own forward, so neither DDP nor the reuse of passes sees anything unusual. A model that does more to its logits
than multiply (a soft-cap, a scale) keeps its head and its logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..context.models import arguments_of, inference, text_inputs
from ..context.precision import is_linear, is_plain
from ..context.sharding import is_sharded_now, keep_after_forward, sharding_of
from ..data import IGNORE_INDEX
from .divergences import Divergence
from .linear_loss import linear_cross_entropy

logger = logging.getLogger(__name__)

_OWN = "_selfgen_own_forward"  # of a head, while another one is in its place
_NEAR, _FROM_TARGET = Divergence("reverse_kl"), Divergence()
_CHUNK_BYTES = 2**27  # of fp32 logits in memory at a time; much smaller chunks read the head's weights too often
_CHUNK_SHARE = 1 / 64  # of a GPU's memory, if that is more: as it computes faster than it reads weights


@dataclass(frozen=True)
class Compared:
    """What the loss of a micro-batch takes besides the states of its forward.

    States are what a model's head gets [B, L, D], or its logits [B, L, V] (`AnswerLoss.states_of`).
    """

    row_weights: Tensor | None = None  # [B]
    frozen: Tensor | None = None  # states of the model to stay near
    target: Tensor | None = None  # states of the target
    has_target: Tensor | None = None  # bool [B, L]: the positions whose states the target has; None is all of them


@dataclass(frozen=True)
class _Term:
    """A divergence, from the logits that ``head`` makes of ``states`` [N, D]; those are logits [N, V] without one."""

    weight: float
    divergence: Divergence
    states: Tensor
    head: nn.Linear | None


class AnswerLoss:
    """Sum over the answers' positions of weighted losses, over ``num_items_in_batch``.

    At each position it is (1 - ``target_weight``) times the cross-entropy to the reference, plus ``target_weight``
    times what ``target`` names. Where a micro-batch has no such target, the cross-entropy has its full weight.

    Args:
        model: a transformers causal language model.
        label_smoothing: share of the reference that is spread evenly over the vocabulary, in [0, 1].
        kl_weight: the weight of ``near`` at each position, added to the loss.
        frozen: the model to stay near; it may be ``model`` itself, if the caller switches its adapters off meanwhile.
        near: the divergence of ``model`` from ``frozen`` under the same context, KL(model || frozen) by default.
        target: "reference" for none; "dft" for the cross-entropy times the probability of the reference, which has no
            gradient; "divergence" for that from states which `inside` gets.
        target_weight: in [0, 1].
        teacher: the model whose head makes logits of the states of the target, ``model`` by default.
        divergence: of ``model`` from the target.
        lean: never have all logits in memory, if the model allows it; ``not_lean`` says why it does not. Those of
            another model never are where that allows it.
        outside: compute it of the logits that the model returns (`of_outputs`), not in place of the model's loss.
        for_target_alone: without a target, the loss would be the Trainer's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        label_smoothing: float = 0.0,
        kl_weight: float = 0.0,
        frozen: PreTrainedModel | None = None,
        near: Divergence = _NEAR,
        target: str = "reference",
        target_weight: float = 0.0,
        teacher: PreTrainedModel | None = None,
        divergence: Divergence = _FROM_TARGET,
        lean: bool = True,
        outside: bool = False,
        for_target_alone: bool = False,
    ):
        self.model, self.label_smoothing, self.kl_weight, self.frozen = model, label_smoothing, kl_weight, frozen
        self.near, self.target, self.target_weight, self.divergence = near, target, target_weight, divergence
        self.teacher = model if teacher is None else teacher
        self.outside, self.for_target_alone = outside, for_target_alone
        self._given: Compared | None = None
        self.not_lean: str | None = None
        self.lean = lean and not outside
        others = {id(one): one for one in (frozen, teacher) if one is not None and one is not model}
        self._lean_others = {number: why_not_lean(one) is None for number, one in others.items()}
        self.look_again()

    def look_again(self) -> bool:
        """Whether the loss has been lean and can't be any more: training may change what a model does to its logits."""
        if not self.lean:
            return False
        self.not_lean = why_not_lean(self.model)
        self.lean = self.not_lean is None
        return not self.lean

    @contextmanager
    def inside(self, row_weights: Tensor | None = None, compared: Compared | None = None) -> Iterator[None]:
        """Inside, the model's own loss is this one.

        ``row_weights`` [B] weigh the rows of the batch, where ``compared`` is not given, which has them, too.
        """
        given = compared or Compared(row_weights)
        if self.outside:
            self._given = given
            try:
                yield
            finally:
                self._given = None
            return
        called = []
        if self.lean:
            keep_after_forward(self.model.get_output_embeddings())

        def loss_function(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
            called.append(True)
            return self._loss(logits, labels, num_items_in_batch, given)

        with _loss_of(self.model, loss_function), _head_left_out(self.model) if self.lean else nullcontext():
            yield
        if not called:
            raise ValueError(
                f"{type(self.model).__name__} does not compute its loss through transformers' loss_function, which "
                "lean_loss, target, kl_weight and direct_weight need; set lean_loss to False, target to reference, and "
                "the weights to 0"
            )

    def of_outputs(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """The loss of what the model returned without labels, as ``compute_loss_func`` of the Trainer."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return self._loss(logits, labels, num_items_in_batch, self._given)

    def states_of(self, model: PreTrainedModel, inputs: dict[str, Tensor], through: nn.Module | None = None) -> Tensor:
        """What the head of ``model`` gets [B, L, D], or its logits [B, L, V] where it does not allow a lean loss.

        ``through`` is what is called: the PEFT model around it, which FSDP2 may shard as a whole.
        """
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        called = model if through is None else through  # a compiled one has no truth value
        with inference(model), _head_left_out(model) if self._is_lean(model) else nullcontext():
            return called(**arguments_of(model, **given, use_cache=False)).logits

    def _loss(self, states, labels, num_items_in_batch, given: Compared | None) -> Tensor:
        """``states`` are [B, L, D], or logits [B, L, V]; ``labels`` [B, L] are not shifted yet.

        Without ``given`` it is the cross-entropy to the reference, as in evaluation.
        """
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(states.device)  # [B, L]
        learned = targets != IGNORE_INDEX
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for weight, rows in _groups(None if given is None else given.row_weights, learned):
            here = learned & rows[:, None]
            total = total + weight * self._sum(states, targets, here, given)
        items = learned.sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(items, device=total.device).clamp(min=1)

    def _sum(self, states: Tensor, targets: Tensor, here: Tensor, given: Compared | None) -> Tensor:
        """Over the positions ``here``, bool [B, L]."""
        if given is None:
            return self._cross_entropy(states[here], targets[here])
        near: list[tuple[float, Divergence, Tensor, PreTrainedModel]] = []
        if given.frozen is not None and self.frozen is not None:
            near.append((self.kl_weight, self.near, given.frozen, self.frozen))
        dft = self.target_weight if self.target == "dft" else 0.0
        parts = [(here, 1.0 - dft, near)]
        if self.target == "divergence" and given.target is not None:
            weight = self.target_weight
            has_target = here if given.has_target is None else here & given.has_target
            with_target = (has_target, 1.0 - weight, [*near, (weight, self.divergence, given.target, self.teacher)])
            parts = [with_target] if given.has_target is None else [with_target, (here & ~has_target, 1.0, near)]
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for where, weight, compared in parts:
            if weight == 1.0 and dft == 0.0 and not compared:
                total = total + self._cross_entropy(states[where], targets[where])
            else:
                terms = [
                    _Term(one, divergence, other[where], self._head(model))
                    for one, divergence, other, model in compared
                ]
                total = total + self._weighted(states[where], targets[where], weight, dft, terms)
        return total

    def _is_lean(self, model: PreTrainedModel) -> bool:
        return self.lean if model is self.model else self._lean_others[id(model)]

    def _head(self, model: PreTrainedModel) -> nn.Linear | None:
        """What makes logits of its states; None where these are logits already."""
        if not self._is_lean(model):
            return None
        head = model.get_output_embeddings()
        if product_of(head) is None and is_sharded_now(head.weight):
            raise RuntimeError(
                "the weights of the head are sharded when the loss is computed: shard the head together with the "
                "model, or give lean_loss=False"
            )
        return head

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        """Sum over [N]."""
        smoothing = self.label_smoothing
        if not self.lean:
            return F.cross_entropy(states.float(), targets, reduction="sum", label_smoothing=smoothing)
        head = self._head(self.model)
        assert head is not None
        multiply = product_of(head)
        chunk = _chunk(head.out_features, states.device)
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        if multiply is None and dtype != torch.float16:
            return linear_cross_entropy(states, head.weight, head.bias, targets, smoothing=smoothing, chunk=chunk)
        total = states.new_zeros((), dtype=torch.float32)
        for part, part_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_smoothed, part, part_targets, head, smoothing, use_reentrant=False)
        return total

    def _weighted(
        self, states: Tensor, targets: Tensor, cross_entropy: float, dft: float, terms: list[_Term]
    ) -> Tensor:
        """Sum over [N] of all losses with their weights; a chunk's logits are computed once for all of them."""
        head = self._head(self.model)
        sources = [(states, head), *((term.states, term.head) for term in terms)]
        width = sum(part.shape[1] if one is None else one.out_features for part, one in sources)
        chunk = _chunk(width, states.device)
        weights = cross_entropy, dft, self.label_smoothing
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for first in range(0, max(1, len(states)), chunk):  # without positions all weights have a gradient, too: zeros
            part = slice(first, first + chunk)
            others = [replace(term, states=term.states[part]) for term in terms]
            total = total + checkpoint(
                _weighted, states[part], targets[part], head, weights, others, use_reentrant=False
            )
        return total


class TokenMean:
    """The mean over all tokens of what is known as means over some."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.counts: list[Tensor] = []
        self._first: list[int] = []  # ids of this process' first batch

    def without_repeated(
        self, batch: dict[str, Tensor], accelerator: Accelerator, row_share: tuple[int, int]
    ) -> dict[str, Tensor]:
        """``batch`` without labels in rows of several processes that fill up the last batches: those seen first.

        ``row_share`` is the number of this process' share of the rows, and of how many; processes may have the same.
        """
        share, shares = row_share
        if shares == 1 or "sample_id" not in batch:
            return batch
        ids = batch["sample_id"].tolist()
        is_first = not self.means
        self._first = ids if is_first else self._first
        if not accelerator.gradient_state.end_of_dataloader:
            return batch
        told: list[tuple[list[int], list[int]]] = gather_object([(self._first, ids)])
        told = told[:: accelerator.num_processes // shares]
        seen = set() if is_first else {row for first, _ in told for row in first}
        seen.update(row for _, last in told[:share] for row in last)
        repeated = []
        for row in ids:
            repeated.append(row in seen)
            seen.add(row)
        where = torch.tensor(repeated, device=batch["labels"].device)[:, None]
        return {**batch, "labels": batch["labels"].masked_fill(where, IGNORE_INDEX)}

    def add(self, mean: Tensor, count: Tensor) -> None:
        """A mean over ``count`` tokens; over none it may be anything."""
        self.means.append(mean.detach().float())
        self.counts.append(count)

    @property
    def not_finite(self) -> int:
        """How many of the means of this process are no numbers."""
        return sum(bool(count) and not mean.isfinite() for mean, count in zip(self.means, self.counts, strict=True))

    def over_all(self, accelerator: Accelerator) -> float:
        """Over the tokens of all processes; all must call it."""
        means, counts = (torch.stack(part).double().cpu() for part in (self.means, self.counts))
        total = torch.where(counts > 0, means * counts, 0.0).sum()
        sums = torch.stack([total, counts.sum()]).to(accelerator.device)
        total, count = accelerator.reduce(sums, reduction="sum").tolist()
        return total / count if count else float("nan")


def _chunk(width: int, device: torch.device) -> int:
    """Positions at a time, of ``width`` logits each."""
    most = _CHUNK_BYTES
    if device.type == "cuda":
        most = max(most, int(_CHUNK_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return max(64, most // (4 * width))


def _smoothed(states: Tensor, targets: Tensor, head: nn.Linear, smoothing: float) -> Tensor:
    logits = _product(states, head).float()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def _weighted(
    states: Tensor, targets: Tensor, head: nn.Linear | None, weights: tuple[float, float, float], terms: list[_Term]
) -> Tensor:
    cross_entropy, dft, smoothing = weights
    own = _logits(states, head).log_softmax(-1)
    of_reference = own.gather(1, targets[:, None])[:, 0]
    total = torch.zeros((), dtype=torch.float32, device=states.device)
    if cross_entropy:
        smoothed = smoothing * own.mean(1) if smoothing else 0.0
        total = total - cross_entropy * ((1 - smoothing) * of_reference + smoothed).sum()
    if dft:
        total = total - dft * (of_reference.detach().exp() * of_reference).sum()
    for term in terms:
        with torch.no_grad():
            target = _logits(term.states, term.head)
        total = total + term.weight * term.divergence(own, target).sum()
    return total


def _logits(states: Tensor, head: nn.Linear | None) -> Tensor:
    """In fp32; the states are logits without a head."""
    return (states if head is None else _product(states, head)).float()


def _product(states: Tensor, head: nn.Linear) -> Tensor:
    """The logits; the head's forward may be left out."""
    multiply = product_of(head)
    return F.linear(states, head.weight, head.bias) if multiply is None else multiply(states)


def product_of(head: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """The forward by which transformers multiplies by a ``head`` whose rows are split over processes.

    None for one that is whole. What comes out is whole, too: each process computes the logits of its rows of the head,
    and they are gathered. It may have been replaced, as `_head_replaced` does.
    """
    forward = vars(head).get(_OWN, vars(head).get("forward"))
    style = "TensorParallelLayer.install_forward.<locals>.tp_forward"
    return forward if getattr(forward, "__qualname__", None) == style else None


def _groups(row_weights: Tensor | None, learned: Tensor) -> list[tuple[float, Tensor]]:
    """(weight, bool [B]) for each weight that occurs."""
    if row_weights is None:
        return [(1.0, learned.new_ones(len(learned)))]
    groups = [(weight, row_weights == weight) for weight in sorted(set(row_weights.tolist())) if weight]
    return groups or [(0.0, learned.new_ones(len(learned)))]  # every weight must have a gradient


def why_not_lean(model: PreTrainedModel) -> str | None:
    """Why a lean loss can't be had, found out by running the model.

    None if its logits are nothing but the product of its head, and its loss can be replaced. For that, the model gets
    logits of all magnitudes in place of that product, as caps do not show in small ones. They must come out again, to
    the loss and to the caller, and no weight but the head's may have a part in what comes out.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if not is_linear(head) or ("forward" in vars(head) and product_of(head) is None):
        return f"the head of {name} is a {type(head).__name__} with a forward of its own (an adapter's, a hook's, ...)"
    if not is_plain(head.weight):
        return f"the head of {name} is quantized ({type(head.weight).__name__})"
    ids, planted, entered = _probe(model), [], []

    def plant(states: Tensor) -> Tensor:
        planted.append(_all_magnitudes(states, head).requires_grad_())
        return planted[-1]

    def leave_out(states: Tensor) -> Tensor:
        entered.append(states.dtype)
        return states

    try:
        with inference(model), _head_replaced(model, plant):
            free = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        with inference(model), torch.enable_grad(), _head_replaced(model, plant):
            given = _given_to_loss(model, ids)
        with inference(model), _head_replaced(model, leave_out):
            states = _given_to_loss(model, ids)
    except Exception as error:  # whatever a model does to what it takes for logits
        return f"{name} does not run without its head ({error})"
    if given is None or states is None:
        return f"{name} does not compute its loss through transformers' loss_function"
    if len(planted) != 2:
        return f"{name} runs its head {len(planted) - 1} times in a forward"
    for logits, product in zip((free, given), planted, strict=True):
        if logits.shape != product.shape or not torch.allclose(logits.float(), product.float(), rtol=1e-2, atol=0):
            return f"{name} does more to its logits than multiply by its head"
    if states.shape != (*ids.shape, head.in_features):
        return f"{name} changes what enters its head"
    if [states.dtype] != entered:
        return f"a hook on the head of {name} casts what leaves it to {states.dtype}"
    if part := _weights_in(given, model):
        return f"{name} does more to its logits than multiply by its head: {part} has a part in them"
    return None


def _probe(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 5, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]


def _all_magnitudes(states: Tensor, head: nn.Linear) -> Tensor:
    """[..., V] of both signs in the dtype of the head's product: other ones at each position."""
    shape = (*states.shape[:-1], head.out_features)
    largest = min(6.0, math.log10(torch.finfo(states.dtype).max) - 1)
    exponents = torch.linspace(-3.0, largest, math.prod(shape), dtype=torch.float32, device=states.device)
    signs = 1 - 2 * (torch.arange(len(exponents), device=states.device) % 2)
    order = torch.arange(len(exponents), device=states.device).view(-1, math.prod(shape[:-1])).T  # each has all
    return (signs * 10.0**exponents)[order].view(shape).to(states.dtype)


def _weights_in(logits: Tensor, model: nn.Module) -> str | None:
    """A trainable weight that ``logits`` depend on."""
    if not logits.requires_grad:
        return None
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    found = torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True) if parameters else ()
    return next((name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None), None)


def learned_weight(model: PreTrainedModel) -> str | None:
    """A trainable weight that the logits of ``model`` depend on, as it is now; None if there is none."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    ids = _probe(model)
    with inference(model), torch.enable_grad():
        inputs = arguments_of(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return _weights_in(model(**inputs).logits, model)


def calls_loss_function(model: PreTrainedModel) -> bool:
    """Whether the model computes its loss through transformers' ``loss_function``, which can be replaced."""
    with inference(model):
        return _given_to_loss(model, _probe(model)) is not None


def learns_its_input(model: PreTrainedModel) -> bool:
    """Whether the model's own loss compares each position with the token that is there, and not with the next one.

    So do decoders of encoder-decoder models (BART's, Marian's, ...), which take labels that are shifted already.
    """
    ids = _probe(model)
    try:
        with inference(model):
            more = text_inputs(model, ids)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False, **more)
        loss, logits = output.loss.float(), output.logits[0].float()
    except Exception:  # which the first step will meet, too
        logger.debug("%s does not run with labels", type(model).__name__, exc_info=True)
        return False
    if len(logits) != ids.shape[1]:
        return False
    same, following = F.cross_entropy(logits, ids[0]), F.cross_entropy(logits[:-1], ids[0, 1:])
    return bool((loss - same).abs() <= 1e-3 * same.abs() and (loss - following).abs() > (loss - same).abs())


def _given_to_loss(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """What the model hands to its loss function as logits; None if not that, or with other labels than it was given."""
    given: list[Tensor] = []

    def loss_function(logits, labels=None, *_, **__):
        if labels is not None and torch.equal(labels, ids) and logits.shape[:2] == ids.shape:
            given.append(logits)
        return logits.sum()

    with _loss_of(model, loss_function):
        more = text_inputs(model, ids)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False, **more)
    return given[0] if given else None


@contextmanager
def _loss_of(model: PreTrainedModel, loss_function: Callable) -> Iterator[None]:
    """Inside, the model computes its loss by ``loss_function``."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss_function
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def _head_left_out(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, what the model calls logits is what enters its head."""
    # FSDP2 warns of modules that return a view of something, as what enters a head often is.
    own = torch.clone if sharding_of(model) == "fsdp2" else lambda states: states
    return _head_replaced(model, own)


@contextmanager
def _head_replaced(model: PreTrainedModel, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head = model.get_output_embeddings()
    kept = {_OWN: vars(head)["forward"]} if "forward" in vars(head) and _OWN not in vars(head) else {}
    vars(head).update({**kept, "forward": forward})
    try:
        yield
    finally:
        vars(head).pop("forward", None)
        if kept:
            vars(head)["forward"] = vars(head).pop(_OWN)
