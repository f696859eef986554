"""``ContextGenerator``: the public door to mixed contexts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .batch import Answers, Batch, ContextStats, MixedContext, TokenRow, check_sample_ids, check_token_rows
from .budget import PassBudget, measure_budget
from .changes import make_of
from .exclusive import logits_alone, taking_turns
from .fallback import Fallback
from .fixed_point import fixed_point
from .forward import Coverage, Forward
from .free_running import Prompts, free_running
from .graphs import GraphedForward, forward_of
from .hidden_states import ReuseError
from .invariant import DependsOnBatchError, Invariant
from .masks import Masks
from .models import (
    active_adapters,
    check_here,
    check_whole,
    eos_token_ids_of,
    inference,
    own_logits,
    room_for_answers,
    text_positions,
    transformers_model,
    vocab_size_of,
)
from .packed import packed_linears
from .precision import autocast_dtype, autocast_inside, precision_of
from .ragged import UnsupportedModelError
from .sequential import ALONE, SequentialResult, one_by_one, sequential
from .sharding import IN_STEP, Together, agreed, check_splits, together_of
from .support import Support, inspect_model
from .verification import LooksAheadError, Verification

logger = logging.getLogger(__name__)

Method = Literal["fixed_point", "sequential"]
METHODS = ("fixed_point", "sequential")
Precision = Literal["model", "invariant"]
PRECISIONS = ("model", "invariant")


class ContextGenerator:
    """Mixed contexts for batch-scheduled sampling (arXiv 2410.14655), made with the model's current weights.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is left as it was; while
            contexts are made it is in eval mode (no dropout) and without gradients.
        temperature: of self tokens; 0 is greedy. At least 0.
        token_budget: most tokens computed in one pass of ``method="fixed_point"``, at least 1: a cap on memory.
        balance: how many tokens cost as much as a pass by itself, above 0; it decides how many guesses are computed
            ahead. If one of these two is not given, it is measured on the model's device, once. They change the cost,
            and the tokens only where rounding in a low precision turns a near tie (docs/exactness.md).
        masks: how the positions of self tokens are drawn; single tokens by default.
        cuda_graphs: on an NVIDIA GPU, replay passes as CUDA graphs. Until `release` they keep the K/V of a generation
            and its hidden states if these are asked for (see ``graph_memory``), what a pass computes in between and,
            under autocast, the weights in its dtype (if they take at most an eighth of the memory). Python code in the
            model, such as a hook that counts, does not run in a replay.
        graph_memory: most of the GPU's memory, as a share in [0, 1], that graphs may keep as K/V and hidden states. A
            generation that needs more runs kernel by kernel, and frees them.
        vocab_size: how many ids there are: only those below it are sampled, in contexts and in answers, and counted in
            any probability. Give ``len(tokenizer)`` where the embedding has more rows, which are padding. Holes, ids
            below it that no token has, are sampled. None: all rows of the embedding.
        precision: "invariant" computes a row's bits from that row alone, by products and activations of selfgen's own,
            so that contexts and answers in bf16 or fp16 are equal at any budget, in any batch, in any order and by both
            methods. It takes longer, and models that have operations without such a guarantee are refused
            (docs/exactness.md). "model": with the products of the model's own forward.

    Generators of one model may be used in several threads: they take turns. Nobody may train the model meanwhile.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: ``temperature``, ``token_budget``, ``balance``, ``graph_memory``, ``vocab_size`` or ``precision``
            out of range, or the model is split over processes or offloaded.

    Example:
        >>> generator = ContextGenerator(model)
        >>> mixed = generator.contexts([[1, 2, 3]], [[4, 5, 6]], 0.25, seed=0, sample_ids=[17])
        >>> mixed.tokens[0], mixed.is_self[0], mixed.stats.passes
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        token_budget: int | None = None,
        balance: float | None = None,
        masks: Masks | None = None,
        cuda_graphs: bool = True,
        graph_memory: float = 0.125,
        vocab_size: int | None = None,
        precision: Precision = "model",
    ):
        self.model = transformers_model(model)
        self._given: torch.nn.Module = model
        self._prepared: Callable[[], AbstractContextManager] | None = None
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, int | float)
            or not 0.0 <= temperature < float("inf")
        ):
            raise ValueError(f"temperature is {temperature!r}; it must be a finite number >= 0 (0 is greedy)")
        if token_budget is not None and (type(token_budget) is not int or token_budget < 1):
            raise ValueError(f"token_budget is {token_budget!r}; it must be an integer >= 1, or None to measure it")
        if balance is not None and not (type(balance) in (int, float) and 0.0 < balance < float("inf")):
            raise ValueError(f"balance is {balance!r}; it must be a finite number > 0, or None to measure it")
        if isinstance(graph_memory, bool) or not isinstance(graph_memory, int | float) or not 0 <= graph_memory <= 1:
            raise ValueError(f"graph_memory is {graph_memory!r}; it must be a share of the memory, from 0 to 1")
        if precision not in PRECISIONS:
            raise ValueError(f'precision is {precision!r}; it must be "model" or "invariant"')
        if vocab_size is not None:
            rows = vocab_size_of(self.model)
            if type(vocab_size) is not int or not 1 <= vocab_size <= rows:
                raise ValueError(
                    f"vocab_size is {vocab_size!r}; it must be an integer from 1 to {rows}, the number of rows of the "
                    "model's embedding, or None for all of them"
                )
        self.temperature = float(temperature)
        self.vocab_size = vocab_size
        self.masks = masks or Masks()
        self._token_budget, self._balance = token_budget, balance
        self._budget: PassBudget | None = None
        self._make: object = None
        self._verified: dict[torch.dtype | None, Verification] = {}  # by what autocast computes in
        self._cuda_graphs, self._graph_memory = cuda_graphs, float(graph_memory)
        self._invariant = Invariant(self.model) if precision == "invariant" else None
        self._passes: Forward | None = None
        self._together = together_of(self.model)  # whose forwards wait for each other
        self._fallback = Fallback(self.model, self._together)
        check_splits(self.model)
        check_here(self.model)
        head = getattr(self.model.get_output_embeddings(), "weight", None)
        if vocab_size is None and head is not None and head.shape[0] > vocab_size_of(self.model):
            self.vocab_size = vocab_size_of(self.model)  # the embedding does not have the head's other ids

    @property
    def budget(self) -> PassBudget:
        """How large passes may be, and the balance; what was not given is measured at the first use."""
        if self._budget is None:
            tokens, balance, curve = self._token_budget, self._balance, dict[int, float]()
            if tokens is None or balance is None:
                measured = self._measured()
                logger.info("measured on the device: token budget %d, balance %.1f", measured.tokens, measured.balance)
                tokens, balance, curve = tokens or measured.tokens, balance or measured.balance, measured.curve
            self._budget = PassBudget(tokens, balance, curve)
        return self._budget

    def take_budget(self, tokens: int, balance: float) -> None:
        """Use the budget that another process has measured, in what was not given here."""
        self._budget = PassBudget(self._token_budget or tokens, self._balance or balance)

    def agree_on_budget(self, together: Together) -> None:
        """Use the largest budget of all processes, each of which knows its own; all call this."""
        budget = self.budget
        self._budget = PassBudget(int(together.most(budget.tokens)), together.most(budget.balance))

    @property
    def precision(self) -> Precision:
        """ "invariant", if a row's bits depend on that row alone, otherwise "model"."""
        return "model" if self._invariant is None else "invariant"

    def _measured(self) -> PassBudget:
        forward = self._forward()
        with self.computing():
            verification = self._verification
            verification.check_dtypes()
        with self.computing():
            if not isinstance(forward, GraphedForward) and self._invariant is None:
                with packed_linears(self.model):
                    return measure_budget(self.model, together=self._together)
            verification.check_ragged(0)
            # A pass takes another time than a forward.
            measured = measure_budget(self.model, forward=forward, together=self._together)
            forward.release()  # a generation's passes have other sizes
            return measured

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Eval mode, no gradients, and the precision of the model's own forward; one thread at a time.

        Accelerate puts autocast inside the forward of a model that it prepares for mixed precision. Of a PEFT model
        that is the outer forward, which generation does not call.
        """
        check_whole(self.model)
        device = self.model.device.type
        with taking_turns(self.model), logits_alone(self.model), text_positions(self.model), inference(self.model):
            if torch.is_autocast_enabled(device) or not hasattr(self._given, "_original_forward"):
                yield
                return
            if self._prepared is None:
                dtype = autocast_inside(self._given, self.model)
                self._prepared = nullcontext if dtype is None else partial(torch.autocast, device, dtype)
            with self._prepared():
                yield

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that matrix products are computed in; the least precise one where weights have several."""
        with self.computing():
            return precision_of(self.model)

    def contexts(
        self,
        prompts: Sequence[TokenRow],
        references: Sequence[TokenRow],
        self_prob: float | Sequence[float] | Tensor,
        *,
        seed: int,
        sample_ids: Tensor | Sequence[int],
        method: Method = "fixed_point",
        may_be_self: Sequence[Tensor | Sequence[bool]] | None = None,
        keep_hidden_states: bool = False,
        record_settling: bool = False,
    ) -> MixedContext:
        """Make the mixed context of every row.

        Both methods give the same tokens and masks; a row gives the same ones alone, in any batch and in any order.

        Args:
            prompts: R rows of token ids, [P_i] int64/int32 tensors or lists, each at least one token.
            references: R rows of reference answers, [T_i], likewise.
            self_prob: probability of a self token, in [0, 1]; one number, or one per row. What it is a
                probability of (tokens, spans or answers) is set by ``masks``.
            seed: any 64-bit integer. With the sample id and the position it fixes all randomness.
            sample_ids: [R] int64/int32, unique: the identity of each row.
            method: "fixed_point" (few parallel passes) or "sequential" (token by token, works with every model that
                does not look ahead).
            may_be_self: R rows of bool, [T_i]: where it is false, the context has the reference token. By default a
                self token may be anywhere.
            keep_hidden_states: with "fixed_point", keep what the passes computed as `MixedContext.hidden_states`, so
                that a training step can reuse it.
            record_settling: with "fixed_point", note the pass in which each token settled, as `MixedContext.settled`.

        Returns:
            MixedContext, on the model's device.

        Raises:
            ValueError: values out of range, empty rows, lengths that don't match or exceed the model's positions;
                ``record_settling`` with another method.
            TypeError: wrong types or dtypes.
            UnsupportedModelError: (a ValueError) the model has a feature, which is named, that "fixed_point" does not
                support, or it sees tokens that come later.
            ReuseError: (a ValueError) ``keep_hidden_states`` is given, but the model's passes can't be reused.
        """
        if method not in METHODS:
            raise ValueError(f'method is {method!r}; it must be "fixed_point" or "sequential"')
        if keep_hidden_states and method != "fixed_point":
            raise ReuseError(f'keep_hidden_states goes with method="fixed_point", but method is {method!r}')
        if record_settling and method != "fixed_point":
            raise ValueError(
                f'record_settling goes with method="fixed_point", but method is {method!r}, in which step i settles '
                "token i: leave it out"
            )
        started = time.perf_counter()

        def checked() -> Batch:
            return Batch.of(
                prompts,
                references,
                self_prob,
                seed=seed,
                sample_ids=sample_ids,
                model=self.model,
                temperature=self.temperature,
                masks=self.masks,
                vocab_size=self.vocab_size,
                may_be_self=may_be_self,
            )

        asked = [method, keep_hidden_states, self._token_budget, self._balance]
        batch = agreed(self._together, checked, lambda batch: [*asked, *vars(batch).values()])
        if not batch.prompts:
            return MixedContext([], [], ContextStats.untouched([], []), settled=[] if record_settling else None)
        support = inspect_model(self.model, max(batch.lengths))

        if method == "fixed_point" or self._invariant is not None:
            with self.computing():
                self._check_ragged(support, max(batch.lengths))
        if method == "fixed_point":
            budget = self.budget
            with self.computing():
                forward = self._forward()
                finals: list[Tensor] | None = [] if record_settling else None
                state = fixed_point(forward, batch, budget, keep_hidden_states=keep_hidden_states, finals=finals)
                # Before another thread has its turn: its generation may take place in the same memory.
                tokens, is_self, invalid = state.contexts, state.masks, int(state.status)
                settled = None if finals is None else state.settled(finals)
                coverage = forward.coverage
            hidden_states = state.hidden_states
            passes, tokens_computed = state.passes, state.tokens_computed
        else:
            with self.computing():
                result = self._sequential(batch, support)
            tokens, is_self, invalid = result.tokens, result.is_self, result.invalid
            passes, tokens_computed, hidden_states = result.passes, result.tokens_computed, None
            coverage, settled = result.coverage, None

        agreed(self._together, lambda: tokens, lambda tokens: [tokens])
        if invalid:
            logger.warning("%d self tokens kept the reference, as their logits were not finite (NaN or inf)", invalid)
        mask, context, reference = torch.cat(is_self), torch.cat(tokens), torch.cat(batch.references)
        self_tokens = int(mask.sum())
        agreeing = int((mask & (context == reference)).sum())
        stats = ContextStats(
            rows=len(batch.prompts),
            passes=passes,
            tokens_computed=tokens_computed,
            context_tokens=sum(batch.lengths),
            answer_tokens=sum(batch.answer_lengths),
            self_tokens=self_tokens,
            agreement=agreeing / self_tokens if self_tokens else 1.0,
            invalid=invalid,
            seconds=time.perf_counter() - started,
            **vars(coverage),
        )
        return MixedContext(tokens, is_self, stats, hidden_states, settled)

    def _check_ragged(self, support: Support, longest_row: int) -> None:
        """Raise UnsupportedModelError unless passes over the ragged cache are right for rows of this length."""
        verification = self._verification
        verification.check_dtypes()
        try:
            if support.missing:
                verification.check_causal(longest_row)  # says more
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} uses {'; '.join(support.missing)}: the ragged path of "
                    'method="fixed_point" does not support it. Use method="sequential" (--context-method sequential).'
                )
            verification.check_ragged(longest_row)
        except (DependsOnBatchError, LooksAheadError):
            raise
        except UnsupportedModelError as error:
            if self._invariant is None:
                raise
            raise UnsupportedModelError(
                'precision="invariant" computes everything over the ragged cache, whatever the method, which is not '
                f'possible: use precision="model" (--context-precision model), with which holds: {error}'
            ) from error

    def _sequential(self, batch: Batch, support: Support) -> SequentialResult:
        if self._invariant is not None:
            return one_by_one(self._forward(), batch)
        verification = self._verification
        verification.check_dtypes()
        verification.check_causal(max(batch.lengths))
        verification.check_adapter()
        return sequential(self.model, batch, ALONE) if support.isolate_rows else verification.sequential(batch)

    def answer(
        self,
        prompts: Sequence[TokenRow],
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_ids: Sequence[int] | None = None,
        batch_size: int = 32,
        progress: bool | Callable[[], object] = False,
    ) -> Answers:
        """Let the model answer by itself: a context with p = 1 that ends where the model ends it.

        Rows are decoded together; when one has ended, the next prompt takes its place. (Models that the ragged path
        does not support run by transformers' ``generate``.) A row's answer depends on its prompt, its sample id and the
        seed alone.

        Args:
            prompts: R rows of token ids, [P_i] int64/int32 tensors or lists, each at least one token.
            max_new_tokens: most tokens of an answer, at least 1; answers also end where the model's positions do.
            seed: any 64-bit integer.
            sample_ids: [R] int64/int32, unique; the numbers of the rows by default.
            top_k, top_p, min_p: filters, as in ``selfgen_kernels.sample_mix``.
            eos_token_ids: an answer ends with the first of these; by default those of the model's generation
                configuration.
            batch_size: most rows at a time, at least 1.
            progress: show a bar with the time left; or what is called whenever a row has its answer.

        Raises:
            ValueError: values out of range, empty rows, prompts that leave no position for an answer.
            TypeError: wrong types or dtypes.
        """
        started = time.perf_counter()

        def checked() -> tuple[list[Tensor], Tensor, list[int]]:
            for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name} is {value!r}; it must be an integer >= 1")
            ids_known = self.vocab_size or vocab_size_of(self.model)
            rows = check_token_rows("prompts", prompts, ids_known, self.model.device)
            ids = check_sample_ids(range(len(rows)) if sample_ids is None else sample_ids, len(rows), self.model.device)
            return rows, ids, [min(max_new_tokens, room) for room in room_for_answers(self.model, rows)]

        asked = [seed, self.temperature, self.vocab_size, top_k, top_p, min_p, eos_token_ids, batch_size]
        rows, ids, limits = agreed(self._together, checked, lambda checked: [*checked, *asked])
        if not rows:
            return Answers([], [], 0, 0, 0, 0.0)
        stop_ids = torch.tensor(
            self.eos_token_ids if eos_token_ids is None else list(eos_token_ids),
            dtype=torch.int64,
            device=self.model.device,
        )
        status = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        sampling = {
            "seed": seed, "temperature": self.temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "vocab_size": self.vocab_size, "status": status,
        }  # fmt: skip
        answers: list[Tensor] = [ids[:0]] * len(rows)
        longest = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
        support = inspect_model(self.model, longest)
        with (
            self.computing(),
            tqdm(total=len(rows), desc="Answers", disable=None if progress is True else True, leave=False) as bar,
        ):
            tell = progress if callable(progress) else bar.update

            def finish(row: int, answer: Tensor) -> None:
                answers[row] = answer
                tell()

            what = Prompts(rows, ids, limits, stop_ids)
            verification = self._verification
            verification.check_dtypes()
            verification.check_adapter()
            if self._invariant is not None:
                self._check_ragged(support, longest)
            if support.missing or not self._runs_ragged(longest):
                work = self._fallback(what, sampling, batch_size, finish, recompute=support.recompute)
            else:
                work = free_running(self._forward(), what, sampling, batch_size, finish)
        agreed(self._together, lambda: answers, lambda answers: [answers])
        ended = [bool(torch.isin(answer[-1], stop_ids)) for answer in answers]
        if status:
            logger.warning(
                "%d tokens of answers are arbitrary, as their logits were not finite (NaN or inf)", int(status)
            )
        seconds = time.perf_counter() - started
        coverage = vars(work.coverage or Coverage())
        return Answers(answers, ended, work.passes, work.tokens_computed, int(status), seconds, **coverage)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end the model's answers, by its generation configuration, else by its own configuration."""
        return eos_token_ids_of(self.model)

    def release(self) -> None:
        """Free what CUDA graphs keep on the GPU; the next generation makes it anew.

        A generation in another thread is waited for.

        Raises:
            RuntimeError: this generator is at work, and calls this from inside a pass.
        """
        with taking_turns(self.model):
            if self._passes is not None:
                self._passes.release()

    def __getstate__(self):
        return {**vars(self), "_passes": None}  # CUDA graphs can't be copied

    def _forward(self) -> Forward:
        """What runs the passes, where the model is now."""
        in_step = self.model in IN_STEP  # so that a pass gathers weights, which no graph does
        moved = self._passes is None or self._passes.device != self.model.device
        if moved or (in_step and isinstance(self._passes, GraphedForward)):
            self._passes = forward_of(
                self.model,
                cuda_graphs=self._cuda_graphs and not in_step,
                graph_memory=self._graph_memory,
                invariant=self._invariant,
            )
        assert self._passes is not None
        return self._passes

    @property
    def _verification(self) -> Verification:
        """What is known of the model as it is made now, in the precision that is asked for."""
        precision, records = autocast_dtype(self.model.device), isinstance(self._forward(), GraphedForward)
        make = active_adapters(self._given), make_of(self.model), self.model.device, records
        if make != self._make and not (self._passes and self._passes.is_busy):  # its own changes are no others
            transformers_model(self._given)  # refuses some adapters
            self._make, self._verified, self._fallback = make, {}, Fallback(self.model, self._together)
        if precision not in self._verified:
            self._verified[precision] = Verification(self.model, self._given, self._together, self._invariant, records)
        return self._verified[precision]

    def look_again(self) -> None:
        """Find out anew what the model computes, as its weights have changed: a part of it may have begun at zero."""
        for verification in self._verified.values():
            verification.look_again()

    def touch(self) -> None:
        """Run the model on two tokens, so that whatever it keeps from its last forward is that of another one."""
        with self.computing():
            row = torch.zeros(2, dtype=torch.int64, device=self.model.device)
            own_logits(self.model, row, row[:1])

    def check_causal(self, longest_row: int = 0, *, in_training: bool = False) -> None:
        """Raise UnsupportedModelError if the model sees tokens that come later, or can't be run on tokens alone.

        Rows of up to ``longest_row`` tokens may be beyond a window or a chunk, where a model computes something else.
        With ``in_training``, training mode is tried, too.
        """
        with self.computing():
            verification = self._verification
            verification.check_dtypes()
            verification.check_causal(longest_row, in_training=in_training)

    def check_method(self, method: Method, longest_row: int) -> None:
        """Raise UnsupportedModelError if ``method`` can't make contexts of rows of up to ``longest_row`` tokens."""
        if method == "sequential" and self._invariant is None:
            self.check_causal(longest_row)
            return
        support = inspect_model(self.model, longest_row)
        with self.computing():
            self._check_ragged(support, longest_row)

    def _runs_ragged(self, longest_row: int = 0) -> bool:
        try:
            self._verification.check_ragged(longest_row)
        except UnsupportedModelError:
            return False
        return True
