"""Where sums and rotations are computed late, what has them computed before, and models that they are not right for."""

from __future__ import annotations

import copy
import ctypes
import logging
import pickle

import numpy as np
import pytest
import torch
from helpers.contexts import assert_equal, batch
from helpers.graphs import recorded_passes
from models import CONFIGS, tiny_model
from torch import Tensor, nn

from selfgen import ContextGenerator
from selfgen.context import fused, late
from selfgen.context import graphs as engine
from selfgen.context.forward import Forward
from selfgen.context.late import ChangedError, Late, Residual, Rotation, computed_late, may_be_late, never_late
from selfgen.context.models import UnsupportedModelError
from selfgen_kernels import add_rms_norm, rms_norm, rotary


@pytest.fixture(autouse=True)
def recorder():
    with recorded_passes():
        yield


@pytest.fixture
def made(monkeypatch):
    """What is made of late tensors."""
    kinds, make = [], late._late
    monkeypatch.setattr(late, "_late", lambda cls, *how: kinds.append(cls.__name__) or make(cls, *how))
    return kinds


def contexts(generator, seed=7, **settings):
    prompts, references, sample_ids = batch(6, longest=20)
    return generator.contexts(prompts, references, 0.5, seed=seed, sample_ids=sample_ids, **settings)


def a_generator(model, records=True, **settings):
    generator = ContextGenerator(model, token_budget=100, balance=12.5, **settings)
    if not records:
        generator._passes = Forward(model)
    return generator


def test_a_pass_that_is_not_recorded_makes_no_late_tensor(made, monkeypatch):
    model = tiny_model("llama")
    contexts(a_generator(model))
    assert {*made} == {"Residual", "Turned"}
    eager = a_generator(model, records=False)
    contexts(eager)
    made.clear()
    contexts(eager)
    assert not made
    generator = a_generator(model)
    contexts(generator)
    made.clear()
    monkeypatch.setattr(engine, "TOKENS", (16,))  # larger passes are launched kernel by kernel
    mixed = contexts(generator, seed=8)
    assert mixed.stats.captured + mixed.stats.replayed < mixed.stats.passes
    assert len(made) <= 2 * 9 * mixed.stats.captured  # run once, then recorded: of two layers


def test_passes_that_are_recorded_from_now_on_are_tried(made):
    """As where the model has moved to a GPU."""
    model = tiny_model("llama")
    generator = a_generator(model, records=False)
    contexts(generator)
    assert all(what != "late" for what, _ in generator._verification._found)
    generator._passes = None  # a new one is made
    contexts(generator)
    assert any(what == "late" for what, _ in generator._verification._found)


def test_what_is_tried_of_a_model_is_what_runs(made):
    """So no late tensor is made to verify a model whose passes are not recorded, but by trying single layers."""
    model = tiny_model("llama")
    eager, generator = a_generator(model, records=False), a_generator(model)
    for one in (eager, generator):
        made.clear()
        with one.computing():
            one._verification.check_ragged(30)
        assert ("Turned" in made) == (one is generator)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_late_or_not_contexts_and_hidden_states_have_the_same_bits(family, made):
    model, keep = tiny_model(family, dtype=torch.bfloat16), family != "gpt2"  # which has dropout
    want = contexts(a_generator(model), keep_hidden_states=keep)
    assert made or family in ("gpt2", "gpt_neox")
    never_late(model)
    made.clear()
    got = contexts(a_generator(model), keep_hidden_states=keep)
    assert "Turned" not in made
    assert_equal(got, want)
    assert not keep or torch.equal(got.hidden_states.states, want.hidden_states.states)


def meddling(change):
    """A model that changes what enters an MLP, x, and may do something to what attention has added to it."""
    model = tiny_model("llama")
    attention, norm = model.model.layers[1].self_attn, model.model.layers[1].post_attention_layernorm
    added = []

    def attend(*args, **kwargs):
        added[:] = type(attention).forward(attention, *args, **kwargs)
        return tuple(added)

    attention.forward = attend
    norm.forward = lambda x: type(norm).forward(norm, change(x, added[0]))
    return model


UNFIT = {  # and the reason that is told
    "what was added": (lambda x, added: (x, added.mul_(2))[0], "ChangedError: a decoder layer has changed in place"),
    "its shape": (lambda x, added: x.squeeze_(0).unsqueeze_(0), "another shape or memory in place (aten.squeeze_.dim)"),
    "by its class": (lambda x, added: x if type(x) is Tensor else x.flip(-1), "computes something else over"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_can_not_have_late_tensors_runs_without_them(name, made, caplog, monkeypatch):
    change, reason = UNFIT[name]
    model, norms = meddling(change), []
    generator = a_generator(model)
    monkeypatch.setattr(fused, "rms_norm", lambda *args, **how: norms.append(args) or rms_norm(*args, **how))
    for seed in range(2):
        want = contexts(generator, seed, method="sequential")
        assert_equal(contexts(generator, seed), want)
    assert not may_be_late(model)
    (told,) = [record for record in caplog.records if "sums and rotations" in record.message]
    assert (told.levelno, told.name) == (logging.WARNING, "selfgen.context.verification")
    assert f"{type(model).__name__}: sums and rotations are computed by kernels of their own" in told.message
    assert reason in told.message
    for again in (generator, a_generator(model)):
        made.clear(), norms.clear()
        again.look_again()
        mixed = contexts(again, 2)
        assert "Turned" not in made
    assert norms  # other parts are single kernels
    assert mixed.stats.captured
    assert caplog.text.count("sums and rotations") == 1


def test_a_model_that_is_wrong_either_way_is_refused(caplog):
    """And nothing is said of sums and rotations, which are not why."""
    model = meddling(lambda x, added: x.flip(-1) if model.config._attn_implementation == "selfgen" else x)
    with pytest.raises(UnsupportedModelError, match="computes something else over the ragged cache"):
        contexts(a_generator(model))
    assert may_be_late(model)
    assert not caplog.text


def test_recordings_are_made_anew_without_late_tensors(made):
    """Where training has changed what the model does to its hidden states."""
    trouble = []
    model = meddling(lambda x, added: (x, added.mul_(2))[0] if trouble else x)
    generator = a_generator(model)
    for seed in range(2):
        contexts(generator, seed)
    trouble.append(1)
    generator.look_again()
    made.clear()
    mixed = contexts(generator, 1)
    assert mixed.stats.captured
    assert_equal(mixed, contexts(generator, 1, method="sequential"))


def a_sum():
    """Its terms [1, 4, 16], and the sum, late."""
    terms = torch.randn(2, 1, 4, 16, generator=torch.Generator().manual_seed(0)).unbind()
    return terms, Residual(terms[0]) + terms[1]


def a_rotation():
    """What is turned, and queries and keys [1, heads, 5, 8], late."""
    given = *(torch.randn(5, heads, 8) for heads in (4, 2)), *torch.randn(2, 5, 8)
    turned = Rotation(*given, False)
    return given, turned.query(), turned.key()


def kernel(x):
    """What a launch of a kernel does: it gets a pointer, and writes."""
    (ctypes.c_float * 3).from_address(x.data_ptr())[:] = [7.0, 8.0, 9.0]


others = torch.library.Library("others", "DEF")
others.define("kernel(Tensor x) -> ()")
others.impl("kernel", kernel, "CPU")

WRITES = {
    "a kernel": kernel,
    "an operator of others": lambda x: torch.ops.others.kernel(x),
    "an overload of it": lambda x: torch.ops.others.kernel.default(x),
    "data": lambda x: x.data.mul_(2),
    "numpy": lambda x: np.multiply(x.numpy(), 2, out=x.numpy()),
    "dlpack": lambda x: torch.from_dlpack(x).mul_(2),
    "numpy by dlpack": lambda x: kernel(torch.from_numpy(np.from_dlpack(x))),
    "storage": lambda x: x.untyped_storage().fill_(0),
    "typed storage": lambda x: x.storage().fill_(0),
    "by torch": lambda x: x.mul_(2),
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_unseen_is_not_in_what_was_to_be_computed_before(name):
    """What torch sees is an error, what it does not see comes after the sum."""
    for place in range(6):
        with torch.no_grad(), computed_late(nn.Module()):
            (given, x), (turned, query, key) = a_sum(), a_rotation()
            results = [x] if place < 2 else [query, key]
            at_once = [one.clone() for one in (*given, *turned)]
            want = [at_once[0] + at_once[1]] if place < 2 else Rotation(*at_once[2:], False)
            want = want if place < 2 else [want.result(0), want.result(1)]
            WRITES[name]((*given, *turned)[place])
            assert not torch.equal((*given, *turned)[place], at_once[place])
            if name == "by torch":
                with pytest.raises(ChangedError):
                    results[0] * 1
                continue
            for got, expected in zip(results, want, strict=True):
                assert torch.equal(got * 1, expected)


READS = {
    "pointer": lambda x: torch.tensor((ctypes.c_float * 8).from_address(x.data_ptr())),
    "operator": lambda x: (torch.ops.others.kernel(x), x * 1)[1],
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "array": lambda x: torch.from_numpy(np.asarray(x)),
    "list": lambda x: torch.tensor(x.tolist()),
    "dlpack": torch.from_dlpack,
    "numpy by dlpack": lambda x: torch.from_numpy(np.array(np.from_dlpack(x))),
    "data": lambda x: x.data,
    "data of another": lambda x: (plain := torch.zeros_like(x), setattr(plain, "data", x), plain * 1)[2],
    "storage": lambda x: torch.tensor(x.untyped_storage().tolist()),
    "typed storage": lambda x: torch.tensor(x.storage().tolist()),
    "copy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "shared": lambda x: x.share_memory_() * 1,
    "compiled": torch.compile(lambda x: (x * 2).relu().sum(1), backend="eager"),
    "compiled graph": torch.compile(lambda x: (x * 2).relu().sum(1), backend="aot_eager"),
    "branch": lambda x: x * 2 if x.sum() > 0 else x * 3,
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", READS)
def test_whatever_asks_for_memory_gets_the_numbers(name):
    with torch.no_grad(), computed_late(nn.Module()):
        terms, x = a_sum()
        want = terms[0] + terms[1]
        _, *turned = a_rotation()
        for one, plain in ((x, want), *((one, one * 1) for one in turned)):
            got = READS[name](one)
            assert type(got) is Tensor
            assert torch.equal(got, READS[name](plain))


def test_a_late_tensor_keeps_its_form():
    with torch.no_grad(), computed_late(nn.Module()):
        for change in (
            lambda x: x.squeeze_(),
            lambda x: x.t_(),
            lambda x: x.resize_(3),
            lambda x: x.set_(torch.ones(3)),
            lambda x: setattr(x, "data", torch.ones(3)),
        ):
            with pytest.raises(ChangedError, match="another shape or memory in place"):
                change(a_sum()[1])


def test_numbers_are_still_there_after_the_pass():
    with torch.no_grad():
        with computed_late(nn.Module()):
            terms, x = a_sum()
        assert isinstance(x, Late)
        assert torch.equal(x * 1, terms[0] + terms[1])


def test_keys_that_nobody_has_any_more_are_not_computed_for_a_kernel_of_others(monkeypatch):
    """The cache has them; the product after attention, say, may be such a kernel."""
    turned, cache = [], torch.zeros(5, 2, 8)
    monkeypatch.setattr(late, "rotary", lambda *args, **how: turned.append(args) or rotary(*args, **how))
    with torch.no_grad(), computed_late(nn.Module()):
        _, query, key = a_rotation()
        key.rotation.append(cache, cache.clone(), cache.clone(), torch.arange(5))
        del key
        torch.ops.others.kernel(torch.ones(3))
        assert query.sum() != 0
    assert not turned


def test_operators_of_this_project_may_ask_for_pointers(monkeypatch):
    """As those do whose kernels are Triton's: sums stay late."""
    together = []
    monkeypatch.setattr(late, "_KNOWN", (*late._KNOWN, "others"))
    monkeypatch.setattr(late, "add_rms_norm", lambda *args, **how: together.append(args) or add_rms_norm(*args, **how))
    with torch.no_grad(), computed_late(nn.Module()):
        x = a_sum()[1]
        torch.ops.others.kernel(torch.ones(3))
        torch.ops.others.kernel.default(torch.ones(3))
        x.normed(torch.ones(16), 1e-6, "llama")
    assert len(together) == 1


def test_a_kernel_of_others_gets_sums_and_rotations_that_are_computed(made, monkeypatch):
    """It may write to what was added, which nobody sees. All else is late as before."""
    model = meddling(lambda x, added: (x, torch.ops.others.kernel(added))[0])
    generator = a_generator(model)
    for seed in range(2):
        assert_equal(contexts(generator, seed), contexts(generator, seed, method="sequential"))
    assert may_be_late(model)
    assert {*made} == {"Residual", "Turned"}
