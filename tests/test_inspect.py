"""What happens in a few rows: the pass in which each token settles, probabilities, and pages that show them."""

from __future__ import annotations

import pytest
import torch
from helpers.contexts import batch
from helpers.data import make_byte_tokenizer, make_sentencepiece_tokenizer
from models import tiny_model

import selfgen_kernels as kernels
from selfgen import ContextGenerator, answer
from selfgen.context import fixed_point
from selfgen.context.masks import Masks
from selfgen.evaluation.inspection import TokenText, TokenTexts, first_slip, inspect_rows
from selfgen.evaluation.inspection.token_texts import visible

# ---------------------------------------------------------------------------------------------------------------------
# The pass in which each token settles


def settled_by_full_forwards(model, prompt, reference, candidates, seed: int, sample_id: int):
    """(settled, passes) of one row by the plainest iteration: each pass is a forward over the whole guess."""
    context, settled, passes, first = reference.clone(), torch.zeros_like(reference), 0, len(prompt)
    places = candidates.nonzero().flatten().tolist()
    final = 0  # candidates that are
    while final < len(places):
        passes += 1
        with torch.no_grad():
            logits = model(torch.cat([prompt, context])[None]).logits[0, first - 1 : -1]
        ids, positions = torch.full_like(reference, sample_id), torch.arange(len(reference))
        guess, _ = kernels.sample_mix(
            logits, reference, candidates.double(), seed=seed, sample_ids=ids, positions=positions
        )
        right = [bool(guess[place] == context[place]) for place in places[final:]]
        final += right.index(False) + 1 if False in right else len(right)
        still_open = places[final] if final < len(places) else len(reference)
        settled[places[0] : still_open][settled[places[0] : still_open] == 0] = passes
        context = guess
    return settled, passes


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_settle_as_in_full_forwards(family):
    """With room for everything, a pass computes all that is left: the iteration in its plainest form."""
    model = tiny_model(family)
    generator = ContextGenerator(model, token_budget=10_000, balance=1e12)
    prompts, references, ids = batch(6)
    draw = Masks().draw(5, torch.tensor(ids), [len(row) for row in references], torch.full((6,), 0.4).double())
    for prompt, reference, one, candidates in zip(prompts, references, ids, draw, strict=True):
        mixed = generator.contexts([prompt], [reference], 0.4, seed=5, sample_ids=[one], record_settling=True)
        want, passes = settled_by_full_forwards(model, prompt, reference, candidates, 5, one)
        assert mixed.settled is not None
        assert mixed.settled[0].tolist() == want.tolist()
        assert mixed.stats.passes == passes


@pytest.mark.parametrize("masks", [Masks(), Masks("span"), Masks(min_reference_prob=0.01)], ids=str)
@pytest.mark.parametrize("budget", [{"token_budget": 5, "balance": 2.0}, {"token_budget": 300, "balance": 50.0}])
def test_what_has_settled_stays(budget, masks, monkeypatch):
    """After each pass, what is said to have settled is the final context."""
    guesses, commit = [], fixed_point.FixedPoint.commit

    def noting(state, *arguments):
        commit(state, *arguments)
        guesses.append(state.contexts)

    monkeypatch.setattr(fixed_point.FixedPoint, "commit", noting)
    generator = ContextGenerator(tiny_model("llama"), masks=masks, **budget)
    prompts, references, ids = batch()
    how = {"seed": 3, "sample_ids": ids}
    mixed = generator.contexts(prompts, references, 0.5, record_settling=True, **how)
    assert len(guesses) == mixed.stats.passes
    assert max(int(row.max()) for row in mixed.settled) == mixed.stats.passes
    for row, (context, settled) in enumerate(zip(mixed.tokens, mixed.settled, strict=True)):
        assert settled.shape == context.shape
        assert (settled.diff() >= 0).all()  # so what has settled after any pass is a prefix, which grows
        for number, guess in enumerate([references, *guesses]):
            assert torch.equal(guess[row][settled <= number], context[settled <= number])
    assert generator.contexts(prompts, references, 0.5, **how).settled is None  # off by default


def test_settling_without_candidates_and_with_hidden_states():
    generator = ContextGenerator(tiny_model("llama"), token_budget=64, balance=8.0)
    prompts, references, ids = batch(3)
    plain = generator.contexts(prompts, references, 0.0, seed=0, sample_ids=ids, record_settling=True)
    assert [row.tolist() for row in plain.settled] == [[0] * len(row) for row in references]
    how = {"seed": 0, "sample_ids": ids, "record_settling": True}
    kept, alone = (
        generator.contexts(prompts, references, 0.5, keep_hidden_states=keep, **how) for keep in (True, False)
    )
    for settled, context in zip(kept.settled, alone.tokens, strict=True):
        assert settled.shape == context.shape
        assert int(settled.max()) <= kept.stats.passes
    assert generator.contexts([], [], 0.5, seed=0, sample_ids=[], record_settling=True).settled == []


def test_settling_is_of_passes():
    generator = ContextGenerator(tiny_model("llama"))
    with pytest.raises(ValueError, match="record_settling goes with method"):
        generator.contexts([[1]], [[2]], 0.5, seed=0, sample_ids=[0], method="sequential", record_settling=True)


# ---------------------------------------------------------------------------------------------------------------------
# Records of rows


def rows_of(prompts, references, ids) -> list[dict]:
    columns = {"prompt_ids": prompts, "answer_ids": references}
    return [
        {"sample_id": one, **{name: rows[place].tolist() for name, rows in columns.items()}}
        for place, one in enumerate(ids)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_numbers_are_those_of_the_model(temperature):
    model = tiny_model("llama")
    generator = ContextGenerator(model, temperature=temperature, token_budget=64, balance=8.0, vocab_size=100)
    prompts, references, ids = batch(4)
    prompts, references = ([row % 100 for row in rows] for rows in (prompts, references))
    found = inspect_rows(generator, rows_of(prompts, references, ids), 0.5, seed=3, batch_size=3, max_new_tokens=9)
    mixed = generator.contexts(prompts, references, 0.5, seed=3, sample_ids=ids)
    assert [row.sample_id for row in found] == ids
    assert any(place.differs for row in found for place in row.places)
    for row, prompt, reference, context, is_self in zip(
        found, prompts, references, mixed.tokens, mixed.is_self, strict=True
    ):
        assert row.prompt == prompt.tolist()
        assert row.reference == reference.tolist()
        assert [place.token for place in row.places] == context.tolist()
        assert [place.is_self for place in row.places] == is_self.tolist()
        (alone,) = generator.contexts([prompt], [reference], 0.5, seed=3, sample_ids=[row.sample_id]).tokens
        assert torch.equal(alone, context)
        after = {}
        for name, given in (("mixed", context), ("reference", reference)):
            with torch.no_grad():
                logits = model(torch.cat([prompt, given])[None]).logits[0, len(prompt) - 1 : -1, :100]
            after[name] = logits
        probs, places = after["mixed"].softmax(-1), torch.arange(len(reference))
        chances = (
            (after["mixed"] / temperature).softmax(-1) if temperature else (probs == probs.max(-1, True)[0]).float()
        )
        for name, want in {
            "reference_prob": probs[places, reference],
            "token_prob": probs[places, context],
            "reference_chance": chances[places, reference],
            "token_chance": chances[places, context],
            "likeliest_prob": probs.max(-1).values,
            "loss": -probs[places, reference].log(),
            "reference_loss": -after["reference"].softmax(-1)[places, reference].log(),
        }.items():
            got = torch.tensor([getattr(place, name) for place in row.places])
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
        assert [place.likeliest for place in row.places] == probs.argmax(-1).tolist()
        assert (row.self_tokens, row.steps) == (int(is_self.sum()), len(reference))
        assert row.differing == int((context != reference).sum())
        assert row.loss == pytest.approx(float(-probs[places, reference].log().mean()), rel=1e-5)


def test_answers_are_greedy_and_the_first_slip_is_found():
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=64, balance=8.0)
    prompts, references, ids = batch(4)
    free = answer(model, prompts, max_new_tokens=6, sample_ids=ids)
    references[0] = free.tokens[0].clone()  # no slip
    references[1] = torch.cat([free.tokens[1][:2], (free.tokens[1][2:3] + 1) % 131, references[1]])
    rows = inspect_rows(generator, rows_of(prompts, references, ids), 0.0, max_new_tokens=6)
    assert [row.answer for row in rows] == [tokens.tolist() for tokens in free.tokens]
    assert [row.finished for row in rows] == free.finished
    assert [row.first_slip for row in rows[:2]] == [None, 2]
    assert [row.passes for row in rows] == [0] * 4


@pytest.mark.parametrize(
    ("own", "reference", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2], [1, 2, 3], None), ([1, 2, 3], [1], None), ([4, 2], [1, 2], 0),
     ([1, 9, 9], [1, 2, 9], 1)],
)  # fmt: skip
def test_the_first_slip_is_the_first_other_token(own, reference, place):
    assert first_slip(own, reference) == place


def test_passes_are_those_of_contexts_and_none_token_by_token():
    generator = ContextGenerator(tiny_model("llama"), token_budget=64, balance=8.0)
    batch_of = prompts, references, ids = batch(4)
    mixed = generator.contexts(prompts, references, 0.5, seed=0, sample_ids=ids, record_settling=True)
    rows = inspect_rows(generator, rows_of(*batch_of), 0.5, max_new_tokens=1)
    assert [[place.settled for place in row.places] for row in rows] == [row.tolist() for row in mixed.settled]
    assert max(row.passes for row in rows) == mixed.stats.passes
    loop = inspect_rows(generator, rows_of(*batch_of), 0.5, max_new_tokens=1, method="sequential")
    assert {row.passes for row in loop} == {None}
    assert [[place.token for place in row.places] for row in loop] == [
        [place.token for place in row.places] for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as text


def bytewise(make, added=()) -> TokenTexts:
    return TokenTexts(make(special=["<s>", "</s>"], eos="</s>", bos="<s>", added=added))


@pytest.mark.parametrize("make", [make_byte_tokenizer, make_sentencepiece_tokenizer])
def test_every_token_can_be_seen(make):
    texts = bytewise(make)
    tokenizer = texts._tokenizer
    shown = [texts.of(token) for token in range(len(tokenizer))]
    for one in shown:
        assert one.text.strip()
        assert "\ufffd" not in one.text
        assert one.text.isprintable()
    assert texts.of(tokenizer.eos_token_id) == TokenText("</s>", "special")
    assert texts.of(len(tokenizer) + 5) == TokenText(f"⟨id {len(tokenizer) + 5}⟩", "none")


@pytest.mark.parametrize("make", [make_byte_tokenizer, make_sentencepiece_tokenizer])
def test_a_character_of_several_tokens_is_bytes(make):
    texts = bytewise(make)
    ids = texts._tokenizer("a é", add_special_tokens=False).input_ids
    assert [texts.of(token).text for token in ids if texts.of(token).kind == "bytes"] == ["C3", "A9"]
    assert texts.passage(ids).strip() == "a é"


def test_line_breaks_and_spaces_are_marked():
    texts = bytewise(make_byte_tokenizer)
    ids = texts._tokenizer("\n \t\x1b", add_special_tokens=False).input_ids
    assert [texts.of(token) for token in ids] == [
        TokenText("↵", breaks=True), TokenText("␣"), TokenText("⇥"), TokenText("␛"),
    ]  # fmt: skip


def test_a_space_before_a_word_stays():
    texts = bytewise(make_sentencepiece_tokenizer)
    assert texts.of(texts._tokenizer.convert_tokens_to_ids("▁a")).text == " a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("  ", "␣␣"),
        ("\u202eabc", "⟨U+202E⟩abc"),  # text from the right
        ("\u2066\u200b\u00ad", "⟨U+2066⟩⟨U+200B⟩⟨U+00AD⟩"),
        ("\u0301", "◌\u0301"),
        ("a\u2028b\u00a0", "a⟨U+2028⟩b⟨U+00A0⟩"),
        ("\x1b[31m", "␛[31m"),
        ("</script>", "</script>"),
    ],
)
def test_nothing_unseen_stays(text, shown):
    assert visible(text) == shown
