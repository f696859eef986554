"""What happens in a few rows: the pass in which each token settles, probabilities, and pages that show them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers as t
from helpers.cli import flags, refused, run
from helpers.contexts import batch
from helpers.data import ROWS, make_byte_tokenizer, make_sentencepiece_tokenizer, write_jsonl
from helpers.graphs import recorded_passes
from models import tiny_model
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import selfgen_kernels as kernels
from selfgen import ContextGenerator, answer
from selfgen.context import fixed_point
from selfgen.context.masks import Masks
from selfgen.evaluation.inspection import InspectedRow, Place, TokenText, TokenTexts, first_slip, inspect_rows
from selfgen.evaluation.inspection.page import page
from selfgen.evaluation.inspection.terminal import MOST_TOKENS, show
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
@pytest.mark.each_value
def test_what_has_settled_stays(budget, masks, monkeypatch):
    """After each pass, what is said to have settled is the final context."""
    guesses, commit = [], fixed_point.FixedPoint.commit

    def noting(state, *arguments):
        commit(state, *arguments)
        guesses.append(state.contexts)

    monkeypatch.setattr(fixed_point.FixedPoint, "commit", noting)
    generator = ContextGenerator(tiny_model("llama"), masks=masks, **budget)
    prompts, references, ids = batch(6)
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


def test_settling_in_recorded_passes():
    """As CUDA graphs are: with room for more rows, and in the tensors of the generation before."""
    model = tiny_model("llama")

    def settled(generator, count):
        prompts, references, ids = batch(count)
        mixed = generator.contexts(prompts, references, 0.5, seed=3, sample_ids=ids, record_settling=True)
        return mixed.settled, mixed.stats.replayed

    plain, counts = ContextGenerator(model, token_budget=30, balance=8.0), (12, 5, 9)
    wanted = [settled(plain, count) for count in counts]
    assert [replayed for _, replayed in wanted] == [0, 0, 0]
    with recorded_passes():
        generator = ContextGenerator(model, token_budget=30, balance=8.0)
        for (want, _), count in zip(wanted, counts, strict=True):
            got, replayed = settled(generator, count)
            assert replayed
            assert all(map(torch.equal, got, want))


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


def test_ids_may_have_holes():
    backend = Tokenizer(WordLevel({"a": 0, "b": 9, "<unk>": 4}, unk_token="<unk>"))
    texts = TokenTexts(t.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [texts.of(token).text for token in (0, 3, 9)] == ["a", "⟨id 3⟩", "b"]


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


# ---------------------------------------------------------------------------------------------------------------------
# The command, the terminal and the page

HOSTILE = ["</script>", "<b>x&y", "\u202e", "\u200b", "\x1b[31m", '"quoted"', "'", "<!--", "\n", "\u0301", "é"]


class Page(HTMLParser):
    """A page as a list of elements, and whether each that was opened was closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]


def place(**changes) -> Place:
    plain = Place(
        reference=4, token=4, is_self=False, settled=0, reference_prob=0.5, token_prob=0.5, reference_chance=0.5,
        token_chance=0.5, likeliest=4, likeliest_prob=0.5, loss=0.7, reference_loss=0.7,
    )  # fmt: skip
    return replace(plain, **changes)


def row_of(places, answer=(4, 5), **changes) -> InspectedRow:
    reference = [one.reference for one in places]
    slip = first_slip(answer, reference)
    plain = InspectedRow(sample_id=7, prompt=[4, 5], places=places, answer=list(answer), finished=True, first_slip=slip)
    return replace(plain, **changes)


def hostile_texts() -> TokenTexts:
    """Ids from 4 on are HOSTILE."""
    vocab = {text: number for number, text in enumerate(["<pad>", "<s>", "</s>", "<unk>", *HOSTILE])}
    return TokenTexts(t.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<unk>"))))


def printed(*arguments, width=100) -> str:
    console = Console(width=width, highlight=False, file=io.StringIO())
    show(*arguments, console=console)
    return console.file.getvalue()


def test_whatever_a_token_is_the_page_is_whole():
    texts = hostile_texts()
    ids = range(4, 4 + len(HOSTILE))
    places = [place(reference=one, token=9, likeliest=10, is_self=True, settled=one - 4) for one in ids]
    text = page([row_of(places, answer=list(reversed(ids)))], texts, {"model": "<m>\u202e&", "p": "0.5"}, ["<i>"])
    found = Page(text)
    assert found.open == []
    names = {tag for tag, _ in found.elements}
    assert {"b", "i", "m"} & names == set()
    assert [tag for tag, _ in found.elements].count("script") == 1
    for unseen in ("\u202e", "\u200b", "\x1b"):
        assert unseen not in text
    assert len(found.all("differ")) == len(HOSTILE)  # with the one of the legend, without that which agrees
    out = printed([row_of(places, answer=list(reversed(ids)))], texts, {"model": "\x1b[0m"})
    for unseen in ("\u202e", "\u200b", "\x1b"):
        assert unseen not in out


def test_nothing_is_fetched():
    found = Page(page([row_of([place()])], hostile_texts(), {"model": "m"}))
    for _, attributes in found.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    own = files("selfgen.evaluation.inspection")
    for name in ("page.css", "page.js"):
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp", own.joinpath(name).read_text())


def tips(text: str) -> list[dict[str, str]]:
    """What each token of the context says."""
    found = []
    for attributes in Page(text).all("t"):
        if re.fullmatch(r"r0-\d+", attributes.get("id", "")):
            title, *lines = attributes["data-tip"].split("\n")
            found.append(dict([("title", title), *(line.split("\t") for line in lines)]))
    return found


def test_a_token_tells_both_probabilities_its_pass_and_its_losses():
    numbers = {"reference_prob": 0.25, "token_prob": 0.125, "reference_chance": 0.3, "token_chance": 0.125}
    places = [
        place(),
        place(reference=13, token=9, is_self=True, settled=2, loss=1.386, reference_loss=0.1, likeliest=8, **numbers),
    ]
    plain, differs = tips(page([row_of(places)], hostile_texts(), {}))
    assert plain == {
        "title": "token 1 of 2", "kind": "reference token", "reference": "“</script>”  p 0.5  id 4",
        "settled": "before any pass", "loss": "0.7 nats; 0.7 after the reference",
    }  # fmt: skip
    assert differs == {
        "title": "token 2 of 2",
        "kind": "self token, differs",
        "self": '“"quoted"”  p 0.125  id 9',
        "reference": "“◌\u0301”  p 0.25, sampled with 0.3  id 13",
        "likeliest": "“␛[31m”  p 0.5  id 8",
        "settled": "in pass 2 of 2",
        "loss": "1.39 nats; 0.1 after the reference",
    }


def test_the_page_shows_passes_losses_and_the_slip():
    places = [place(settled=0), place(settled=1, is_self=True), place(settled=1), place(settled=3, loss=math.inf)]
    text = page([row_of(places, answer=[4, 5])], hostile_texts(), {})
    found = Page(text)
    assert [tag for tag, one in found.elements if one.get("id", "").endswith("-bar")] == ["rect"] * 4
    assert re.findall(r"</span>(\d)</span>", text) == ["0", "1", "3"]  # where passes begin
    assert re.findall(r'flex-grow:(\d)">(\d)', text) == [("1", "0"), ("2", "1"), ("1", "3")]
    assert "1 losses are not finite" in text
    assert "slips first at token 2: “&lt;b&gt;x&amp;y”, where the reference has “&lt;/script&gt;”" in text
    assert [one["id"] for one in found.all("slip")[1:]] == ["r0-reference-1", "r0-answer-1"]
    loop = page([row_of([place(settled=None)])], hostile_texts(), {})
    assert 'class="strip"' not in loop
    assert "settled\t" not in loop


def test_the_terminal_says_the_same_without_colours():
    places = [place(reference=14, token=14), place(reference=14, token=14, is_self=True, settled=1),
              place(reference=14, token=9, is_self=True, settled=2)]  # fmt: skip
    out = printed([row_of(places, answer=[14, 6])], hostile_texts(), {"p": "0.5"})
    assert '⁰é¹‹é›²‹"quoted"≠é›' in out
    assert "3 tokens, 2 self tokens, of which 1 differ (50%); 2 passes, where a loop takes 3 steps" in out
    assert "▸é◂" in out
    assert "▸⟨U+202E⟩◂" in out
    assert "is the reference, token by token" in printed(
        [row_of([place(settled=None)], answer=[4])], hostile_texts(), {}
    )


def test_colours_end_where_their_tokens_do():
    console = Console(width=100, highlight=False, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    places = [place(reference=14, token=14, is_self=True, settled=1), place(reference=14, token=14, settled=1)]
    show([row_of(places)], hostile_texts(), {"p": "0.5"}, console=console)
    out = console.file.getvalue()
    assert "\x1b[4;34m‹é›\x1b[0mé" in out
    assert "\x1b[4;34m‹token›\x1b[0m self token that agrees" in out


def test_long_rows_are_cut_in_the_terminal_alone_and_that_is_said():
    places = [place(reference=14, token=14)] * (MOST_TOKENS + 30)
    row = row_of(places, answer=[14] * 5)
    assert "(30 more tokens are not shown here, but in the page)" in printed([row], hostile_texts(), {})
    assert len(tips(page([row], hostile_texts(), {}))) == MOST_TOKENS + 30


@pytest.fixture
def command(arguments, tmp_path):
    """Arguments of ``selfgen inspect``."""
    small = {name: arguments[name] for name in ("max_length", "token_budget", "balance", "use_cpu")}
    small |= {"max_new_tokens": 5, "self_prob": 0.6, "output_file": tmp_path / "page.html"}
    return ["inspect", arguments["model"], arguments["dataset"], *flags(small)]


def test_the_command(command, tmp_path, capsys, caplog):
    code, out, err = run([*command, "--rows", "3"], capsys)
    assert code == 0, err
    assert "data: 3 rows: 3 kept" in caplog.text
    assert out.count("Row ") == 3
    assert f"the page is in {tmp_path / 'page.html'}" in out
    found = Page((tmp_path / "page.html").read_text())
    assert [tag for tag, _ in found.elements].count("section") == 3
    assert run(command, capsys)[0] == 0  # its own page is replaced


def test_rows_that_cannot_be_used_are_named(command, arguments, tmp_path, capsys, caplog):
    write_jsonl(Path(arguments["dataset"]), [*ROWS, {"prompt": "a", "completion": " "}, *ROWS])
    code, out, err = run(command, capsys)
    assert code == 0, err
    said = "4 rows: 3 kept, 1 dropped (1 empty answer: row 2)"
    assert said in caplog.text
    assert said in (tmp_path / "page.html").read_text()
    assert "rows 3 of 5" in out


def test_what_is_given_wrongly(command, arguments, tmp_path, capsys):
    model, data, *rest = command[1:]
    assert "begin with MODEL and DATA" in refused(["inspect", model, *rest], capsys)
    assert "arguments are required: --model" in refused(["inspect", *rest], capsys)
    assert "rows is 0; it must be at least 1" in refused([*command, "--rows", "0"], capsys)
    assert "self_prob is 2.0" in refused([*command, "--self-prob", "2"], capsys)
    assert "assistant_turns=all" in refused([*command, "--assistant-turns", "all"], capsys)
    (tmp_path / "page.html").write_text("a file of somebody else")
    assert "selfgen inspect did not write" in refused(command, capsys)
    assert (tmp_path / "page.html").read_text() == "a file of somebody else"
    config = tmp_path / "look.yaml"
    config.write_text(json.dumps({"model": model, "dataset": data, "output_file": str(tmp_path / "other.html")}))
    code, _, err = run(["inspect", str(config), *rest[:-2]], capsys)
    assert code == 0, err


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, PHONE = 1000, 360
LOOK = Path(__file__).parent / "helpers" / "look.js"


def shown_in_browser(text: str, folder: Path, picture: Path, *, dark: bool) -> dict:
    """What ``look.js`` finds of a page in a wide and in a narrow window, and a picture of both."""
    frames = "".join(
        f'<iframe width="{width}" height="1500" style="border:0" srcdoc="{escape(text)}"></iframe>'
        for width in (WIDE, PHONE)
    )
    file = folder / "look.html"
    file.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0;display:flex;gap:8px">{frames}'
        f'<pre hidden id="found"></pre><script>{LOOK.read_text()}</script>'
    )
    picture.parent.mkdir(exist_ok=True)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'user'}",
        f"--window-size={WIDE + PHONE + 8},1500", f"--screenshot={picture}", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre hidden="" id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def look():
    """(page, folder) -> what a browser finds of it, by the scheme of colours."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium), so nothing can be looked at")

    def both(text: str, folder: Path, name: str) -> dict[str, dict]:
        outputs = Path(__file__).parents[1] / "outputs"
        return {
            scheme: shown_in_browser(text, folder, outputs / f"{name}-{scheme}.png", dark=scheme == "dark")
            for scheme in ("light", "dark")
        }

    return both


def check_look(found: dict[str, dict], tokens: int) -> None:
    for scheme, both in found.items():
        assert both["dark"] == (scheme == "dark")
        for width, seen in zip((WIDE, PHONE), both["frames"], strict=True):
            assert seen["errors"] == []
            assert seen["width"] == width
            assert seen["scrolls_to"] <= width  # nothing is beyond the edge
            assert min(seen["contrasts"].values()) >= 4.5, seen["contrasts"]  # WCAG 2.2, AA
            assert seen["stops"] == [1, 1, 1]  # of the Tab key, per list of tokens
            assert seen["at_first"] == "token 1 of " + str(tokens)
            assert seen["after_right"] == "token 2 of " + str(tokens)
            assert seen["after_end"] == f"token {tokens} of {tokens}"
            assert seen["after_escape"] is None
            assert seen["after_tap"] == "token 2 of " + str(tokens)
            assert seen["after_hover"] == "token 1 of " + str(tokens)
            assert seen["after_chart"] == seen["after_resize"] == "token 1 of " + str(tokens)
            assert seen["described"]  # the token names the tip for screen readers
            assert seen["tip_inside"] == [True] * tokens
    light, dark = (found[scheme]["frames"][0]["brightness"] for scheme in ("light", "dark"))
    assert light > 0.8
    assert dark < 0.1


def test_a_browser_shows_the_page(look, tmp_path):
    texts, count = hostile_texts(), len(HOSTILE)
    places = [
        place(reference=4 + i, token=9 if i % 3 == 1 else 4 + i, is_self=i % 3 > 0, settled=i // 2, loss=0.1 + i % 4)
        for i in range(count)
    ]
    text = page([row_of(places, answer=[4, 5, 7])], texts, {"model": "m" * 200, "p": "0.5"}, ["w" * 300])
    check_look(look(text, tmp_path, "inspect"), count)


@pytest.mark.slow
def test_a_browser_shows_rows_of_a_real_model(look, smollm2_folder, tmp_path, capsys):
    from tools.real_parts import gsm_symbolic

    data = tmp_path / "rows.jsonl"
    write_jsonl(data, list(gsm_symbolic(1, seed=0)))
    file = tmp_path / "inspect.html"
    options = {"output_file": file, "max_new_tokens": 100, "use_cpu": True}
    code, out, err = run(["inspect", str(smollm2_folder), str(data), *flags(options)], capsys)
    assert code == 0, err
    text = file.read_text()
    tokens = len(tips(text))
    assert f"{tokens} tokens, " in out
    check_look(look(text, tmp_path, "inspect-smollm2"), tokens)
