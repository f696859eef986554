"""Answers in texts: what is read as a number, which of them answers, which are equal, and what math-verify says."""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from helpers.cli import ROOT
from hypothesis import given
from hypothesis import strategies as st

from selfgen.evaluation import compared, exact_match, extract_answer, symbolic, symbolic_match


def says(*rows):
    return pytest.mark.parametrize(("text", "answer"), rows)


@says(
    ("#### 1/7", "1/7"),
    ("#### 3/4", "0.75"),
    ("1 / 2", "0.5"),
    ("$1,000/3", "1000/3"),
    ("1.5/0.5", "3"),
    ("16/4=4", "4"),
    ("#### 1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("3 7/2", "3.5"),  # not mixed: two numbers
    ("½ cup", "0.5"),
    ("1½", "1.5"),
    ("2 ⅓", "7/3"),
    ("1⁄8", "0.125"),
    (r"#### \frac{1}{2}", "0.5"),
    (r"-\dfrac{7}{3}", "-7/3"),
    (r"2\frac34", "2.75"),
    (r"\frac{-3}{4}", "-0.75"),
    ("3/0", "3/0"),
    ("$5/hour", "5"),
    (r"\boxed{\frac{7}{2}}, see 3", "3.5"),
    (r"\boxed{\text{so } \boxed{4}} of 5", "4"),
)
def test_fractions(text, answer):
    assert extract_answer(text) == answer


@says(
    ("10^6", "1000000"),
    ("10^{-3}", "0.001"),
    ("2**10", "1024"),
    ("-2^2", "-4"),
    ("10⁶", "1000000"),
    ("10⁻³", "0.001"),
    ("#### 1.5e9", "1500000000"),
    ("2.5E-3.", "0.0025"),
    ("1.5 × 10^9", "1500000000"),
    (r"1.5 \times 10^{9}", "1500000000"),
    ("2.5·10⁻¹", "0.25"),
    ("0^-1", "0^-1"),
    ("12 m²", "12"),
    ("12 cm^2", "12"),
    ("12 m2", "12"),
    ("x^2", None),
    ("5 eggs", "5"),
    ("5 million", "5000000"),
    ("1.5 Billion euros", "1500000000"),
    ("1 1/2 thousand", "1500"),
    ("$5k and $7M", "7000000"),
    ("a 5k run", "5"),
    ("9^999999999", "9^999999999"),
    ("1e999999", "1e999999"),
)
def test_powers(text, answer):
    assert extract_answer(text) == answer


@says(
    ("x = - 5", "-5"),
    ("x = − 5", "-5"),
    ("#### - 5", "-5"),
    ("it is: –5", "-5"),
    ("the change is - $5", "-5"),
    ("it is minus 5", "-5"),
    ("negative 5", "-5"),
    ("Minus 5.", "-5"),
    ("So\n**minus $5**", "-5"),
    ("±5", "±5"),
    (r"x = \pm 5", "±5"),
    ("five dollars ($5)", "5"),
    ("10 minus 5", "5"),
    ("10 - 5", "5"),
    ("$x$ - 5", "5"),
    ("10–15", "15"),
    ("Fruit:\n- 4 pears\n- 5 apples", "5"),
)
def test_signs(text, answer):
    assert extract_answer(text) == answer


@says(
    ("答案是１８。", "18"),
    ("١٬٢٣٤٫٥", "1234.5"),
    ("१२३", "123"),
    ("－５", "-5"),
    ("£1 234", "1234"),
    ("1\u202f234\u202f567", "1234567"),
    ("1\u2009234.5", "1234.5"),
    ("1'234'567 and 1’234", "1234"),
    ("1.234.567", "1234567"),
    ("€1.234,50", "1234.5"),
    ("3,50 €", "3.5"),
    ("2,5 kg", "2.5"),
    ("2,5", "5"),
    ("12_000", "12000"),
    (r"\$1{,}234", "1234"),
    (r"1,\!234", "1234"),
    ("-₹1,23,456", "-123456"),
    ("in 2019 300 people", "300"),
    ("0 100", "100"),
    ("1 in 50%", "50"),
    ("\u200f5\u200e", "5"),
)
def test_digits_and_groups(text, answer):
    assert extract_answer(text) == answer


@says(
    ("at 3:30 pm", "3:30"),
    ("03:30", "3:30"),
    ("1:02:03", "1:02:03"),
    ("2 : 3", "2:3"),
    ("Answer: 5", "5"),
    ("2024-01-05", "2024-01-05"),
    ("12/25/2024", "12/25/2024"),
    ("1.2.3", "1.2.3"),
    ("January 5th, 2024", "2024-01-05"),
    ("on 5 Feb. 2024", "2024-02-05"),
    ("the 31st of december 1999", "1999-12-31"),
    ("in May 2024", "2024"),
    ("$101_2$", "101_2"),
    ("101_{12}", "101_12"),
    (r"2\sqrt{3}", "2√3"),
    (r"\sqrt{x + 1}", "√{x+1}"),
    ("√16 = 4", "4"),
    (r"5\pi/6", "5π/6"),
    ("5π", "5π"),
)
def test_what_is_compared_as_written(text, answer):
    assert extract_answer(text) == answer


@says(
    ("She has 18 eggs.\n\nQuestion: A man buys 7 hats", "18"),
    ("She has 18. Question: A man buys 7 hats", "18"),
    ("A: 18\n\n**Q:** A man buys 7 hats\nA: 7", "18"),
    ("18\n### Instruction:\nAdd 3 and 4.", "18"),
    ("Question: What are 9 and 9? Answer: 18\nQuestion: 3 and 4?", "18"),
    ("#### 5 apples, 3 pears", "5"),
    ("####\n**5**", "5"),
    (r"\boxed{5} for all 3", "5"),
    (r"\boxed{x = \frac{1}{2}\text{ m}}, see 3", "0.5"),
    (r"#### \boxed{5} of 7", "5"),
    ("The answer is 5 (five), see step 2", "5"),
    ("The answer is **5**, because she ate 3.", "5"),
    ("The answer is 4. No, the answer is 5: one of 3 stays.", "5"),
    ("The answer is 2 + 3 = 5", "5"),
    ("The answer is 4, as 2 + 3 = 5", "5"),
    ("Step 1: 3 + 4 = 7\nStep 2: Done", "7"),
    ("Week 2:300\nWeek 3:210 pages", "210"),
    ("Step 2", "2"),
    ("She is on step 5", "5"),
    ("1. She has 18.\n2. That is all.", "18"),
    ("1. 18\n2. 20", "20"),
    ("9 and 9 are\n18. That is all.", "18"),
    ("It is 5 by equation (3)", "5"),
)
def test_which_number_answers(text, answer):
    assert extract_answer(text) == answer


@given(
    st.fractions(max_denominator=10**6), st.sampled_from(["#### {}", "The answer is {}, see 2", "1: {}", "= ${}$\n"])
)
def test_any_fraction_is_equal_to_itself_alone(value, text):
    said = text.format(value)
    assert exact_match(said, f"#### {value}")
    assert not exact_match(said, f"#### {value + Fraction(1, 10**12)}")


@given(st.decimals(-(10**9), 10**9, places=6), st.integers(-20, 20))
def test_powers_of_ten_are_exact(number, exponent):
    value = Fraction(number) * Fraction(10) ** exponent
    reference = f"#### {value.numerator}/{value.denominator}"
    assert exact_match(f"{number:f}e{exponent}", reference)
    assert exact_match(f"{number:f} × 10^{{{exponent}}}", reference)


@given(st.text("0123456789.,:/^-+e '√π$#*{}()=\\\n²½１", max_size=40))
def test_any_text_is_read(text):
    """Nothing raises, and what was found is found again as it is written."""
    answer = extract_answer(text)
    assert answer is None or exact_match(text, text)


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "1,", "1/", "1:", "1^", "1e", "\n", "#", "*", " ", "= ", r"\frac{", "√", "("]
)
def test_endless_repetition_is_read_in_time(unit):
    """A model that repeats itself does not stop the evaluation."""
    started = time.perf_counter()
    extract_answer(unit * 10_000)
    assert time.perf_counter() - started < 5


BOTH = [  # an answer, a reference, and whether it is right
    ("#### 18", "#### 18", True),
    ("18.0", "#### 18", True),
    ("So the answer is 18.", "#### 18", True),
    ("She has 18 eggs.\n\nQuestion: A man buys 7 hats", "#### 18", True),
    ("She has 18 eggs.\n\nQuestion: A man buys 7 hats", "#### 7", False),
    ("#### 1/7", "#### 1/2", False),
    ("#### 3/5", "#### 3", False),
    ("The answer is 0.5", "#### 1/2", True),
    ("6/8", "#### 3/4", True),
    (r"$\frac{6}{8}$", r"$\frac{3}{4}$", True),
    (r"$\dfrac{1}{2}$", "#### 0.5", True),
    (r"-\frac{1}{2}", "#### -0.5", True),
    (r"$\frac{-1}{2}$", "#### -1/2", True),
    ("1/3", "0.333", False),
    (r"$2\frac{3}{4}$", "#### 2.75", True),
    (r"$1 \frac12$ cups", "#### 3/2", True),
    ("10^6", "#### 6", False),
    ("So $10^6$", "#### 1000000", True),
    ("2^10", "#### 1024", True),
    ("2**10", "#### 1024", True),
    ("$2^{10}$", "#### 1024", True),
    (r"$3 \times 10^8$", "#### 300000000", True),
    ("3 * 10^-2", "#### 0.03", True),
    ("It is 2.5e3", "#### 3", False),
    ("(5)", "#### -5", False),
    ("It costs £1 234", "#### 1234", True),
    ("$1,234.50", "#### 1234.5", True),
    ("3,50 €", "#### 3.5", True),
    ("¥5000", "#### 5000", True),
    ("50%", "#### 50", True),
    ("#### 50 percent", "#### 50%", True),
    ("5 km", "#### 5000 m", False),
    ("5 km", "#### 5 km", True),
    ("The answer is 5 km.", "#### 5", True),
    (r"$5 \text{ cm}$", "#### 5", True),
    (r"$\boxed{5\text{ cm}^2}$", "#### 5", True),
    (r"\boxed{12}", "#### 12", True),
    (r"\boxed{\frac{7}{2}}", "#### 3.5", True),
    (r"It is $\boxed{\frac{7}{2}}$.", "#### 3.5", True),
    (r"\boxed{\boxed{4}} after 3 steps", "#### 4", True),
    (r"\boxed{x^{2} + 1}", r"$\boxed{x^2+1}$", True),
    (r"\boxed{\frac{\sqrt{3}}{2}} of 9", r"$\frac{\sqrt{3}}{2}$", True),
    (r"$\boxed{\frac{\pi}{4}}$", r"$\boxed{\frac{\pi}{2}}$", False),
    ("#### 5\n#### 6", "#### 5", True),
    ("The answer is 5 (five), see step 2", "#### 5", True),
    ("The answer is: 5.", "#### 5", True),
    ("**Answer:** 5", "#### 5", True),
    ("Final Answer: 5 or 6", "#### 5", True),
    ("Answer: 5-7", "#### 5", False),
    ("5-7", "#### 5-7", True),
    ("5-7", "#### 6-7", False),
    ("(1, 2)", "$(3, 2)$", False),
    (r"$\{1, 2\}$", r"$\{2, 1\}$", True),
    (r"$\{1, 2\}$", r"$\{3, 2\}$", False),
    ("3:30 pm", "#### 3:30", True),
    ("03:30", "#### 3:30", True),
    ("no", "yes", False),
    ("The answer is no.", "yes", False),
    ("True", "yes", False),
    ("The answer is C", "B", False),
    ("I don't know", "B", False),
    ("2 + 3 = 5", "#### 5", True),
    ("The answer is 2 + 3 = 5", "#### 5", True),
    ("$x^2$", "$x^3$", False),
    ("12345678901234567890", "#### 12345678901234567891", False),
    ("-0", "#### 0", True),
    ("007", "#### 7", True),
    (".5", "#### 0.5", True),
    ("5.", "#### 5", True),
    ("Day 2: 300", "#### 300", True),
    ("", "#### 5", False),
    ("####", "#### 5", False),
    ("no number", "#### 5", False),
    ("90°", "#### 90", True),
    (r"$90^\circ$", "#### 90", True),
    ("5% of 20 is 1", "#### 1", True),
    ("±5", "#### 5", False),
    ("1,234", "#### 1234", True),
    ("1, 234", "#### 1234", False),
    ("1,2,3", "#### 1,2,3", True),
    ("1,2,3", "#### 4,5,3", False),
    ("101_2", "#### 5", False),
    ("$101_2$", "$101_2$", True),
    ("$101_2$", "$111_2$", False),
    ("on 5 Jan 2024", "2024-01-05", True),
    ("3/0", "#### 3/0", True),
    (r"\(y = 2x\)", r"\(2x\)", True),
    (r"so $\frac{a}{b}$", r"$\dfrac{a}{b}$", True),
    ("5 m/s", "#### 5", True),
]
OURS = [  # that math-verify 0.9 judges wrongly
    ("1/3", "0.33333333333", False),
    ("1 1/2", "#### 1.5", True),
    ("1½", "#### 1.5", True),
    ("10⁶", "#### 1000000", True),
    ("3 × 10^8", "#### 300000000", True),
    ("2.5e3", "#### 2500", True),
    ("1.5E-3", "#### 0.0015", True),
    ("#### 1.5e9", "#### 1.5", False),
    ("x = - 5", "#### -5", True),
    ("x = - 5", "#### 5", False),
    ("x = −5", "#### -5", True),
    ("minus 5", "#### -5", True),
    ("1.234,50 €", "#### 1234.5", True),
    ("1.000.000", "#### 1000000", True),
    ("1'234'567", "#### 1234567", True),
    ("1,00,000", "#### 100000", True),
    ("12_000", "#### 12000", True),
    ("答案是１８", "#### 18", True),
    ("答案是18。", "#### 18", True),
    ("الجواب ١٨", "#### 18", True),
    ("उत्तर १८", "#### 18", True),
    ("₹1,00,000", "#### 100000", True),
    ("$5 million", "#### 5000000", True),
    ("5 million", "#### 5", False),
    ("2.5 billion", "#### 2500000000", True),
    (r"\boxed{\text{The answer is } 7} in 3 steps", "#### 7", True),
    (r"First \boxed{3}, no, \boxed{4}.", "#### 4", True),
    (r"\fbox{4} of 3", "#### 4", True),
    ("5–7", "#### 5-7", True),
    ("5 to 7", "#### 4 to 7", False),
    ("[1, 2)", "$[1,2)$", True),
    ("(1, 2)", "$(1, 2)$", True),
    ("x = 1 or x = 2", "$1, 2$", True),
    ("3:30", "#### 3:45", False),
    ("2024-01-05", "#### 2024-01-06", False),
    ("January 5, 2024", "January 6, 2024", False),
    ("yes", "yes", True),
    ("Yes.", "yes", True),
    ("Yes, since 3 < 4.", "yes", True),
    ("The answer is no.", "no", True),
    ("(B)", "B", True),
    ("B", "B", True),
    ("The answer is (B).", "B", True),
    ("The answer is B", "(B)", True),
    ("Answer: B) 12", "B", True),
    ("A dog barks. The answer is (C).", "C", True),
    ("b", "B", True),
    ("2√3", "2√5", False),
    (r"$\pi$", "3.14159265", False),
    ("5π", r"$5\pi$", True),
    ("5π", "#### 5", False),
    ("∞", r"$\infty$", True),
    ("0.30000000000000004", "#### 0.3", False),
    ("+5", "#### 5", True),
    ("#### +5", "#### 5", True),
    ("#### 5 apples and 3 pears", "#### 5", True),
    ("Pay five dollars ($5).", "#### 5", True),
    ("$5M", "#### 5000000", True),
    ("$2.5bn", "#### 2500000000", True),
    ("5 million", "5,000,000", True),
    ("2 : 3", "#### 2:3", True),
    ("Between 3 and 9.", "#### 3-9", True),
    ("It is $x^2$, as 3 < 4", "$x^2$", True),
    ("1,234.5", "#### 1234,5", False),
    ("#### 5\u00a0000", "#### 5000", True),
]
THEIRS = [  # that exact_match judges wrongly, as it computes nothing and takes 3,5 for two numbers
    ("3,5", "#### 3.5", True),
    (r"\boxed{2\sqrt{16}}", r"$\boxed{8}$", True),
    (r"$\sqrt{12}$", r"$2\sqrt{3}$", True),
    (r"$\sqrt{16}$", "#### 4", True),
    ("2 + 3", "#### 5", True),
    ("$x^2 + 2x$", "$x(x+2)$", True),
    ("0.1 + 0.2", "#### 0.3", True),
    ("50%", "#### 0.5", True),
]
NEITHER = [  # that both judge wrongly
    ("5k", "#### 5000", True),
    ("eighteen", "#### 18", True),
    ("2:3", "#### 4:6", True),
    ("√12", "2√3", True),
]


def test_docs_count_the_table():
    rows, ours, theirs = (len({*lists}) for lists in (BOTH + OURS + THEIRS + NEITHER, THEIRS + NEITHER, OURS + NEITHER))
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"has {rows} pairs: `exact_match` is wrong in {ours} of them, math-verify in {theirs}." in page


@pytest.mark.parametrize(("answer", "reference", "right"), BOTH + OURS)
def test_exact_match_of_the_table(answer, reference, right):
    assert exact_match(answer, reference) is right


@pytest.mark.parametrize(("answer", "reference", "right"), BOTH + THEIRS)
def test_symbolic_match(answer, reference, right):
    pytest.importorskip("math_verify")
    assert symbolic_match(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right", "exact", "symbolic"),
    [(*row, row[2], not row[2]) for row in OURS]
    + [(*row, not row[2], row[2]) for row in THEIRS]
    + [(*row, not row[2], not row[2]) for row in NEITHER],
)
def test_where_they_are_wrong(answer, reference, right, exact, symbolic):
    """If this fails with another version of math-verify, the lists above are out of date."""
    pytest.importorskip("math_verify")
    assert exact_match(answer, reference) is exact
    assert symbolic_match(answer, reference) is symbolic


@pytest.mark.parametrize(
    ("answer", "reference", "found"),
    [
        ("They are 7 and 5.", "#### 5, 7", ("5, 7", "5, 7")),
        ("(1, 2]", "The answer is (1, 2).", ("(1, 2]", "(1, 2)")),
        ("The answer is 5, 7, as 2 + 3 = 5", r"\boxed{5, 7}", ("5, 7", "5, 7")),
        ("#### b", "(B)", ("B", "B")),
        ("It is a dog.", "A", (None, "A")),
        ("The answer is A dog.", "A", (None, "A")),
        ("The answer is A because of 3", "A", ("A", "A")),
        ("The correct option is D, not (C).", "D", ("C", "D")),
        ("The correct option is D.", "D", ("D", "D")),
        ("There is none.", "no", (None, "no")),
        ("The answer is no more than 5", "no", (None, "no")),
        ("The answer is no because 5 < 6", "no", ("no", "no")),
        ("So yes", "Yes", ("yes", "yes")),
        ("It is not true.", "true", (None, "true")),
        ("That isn't true.", "true", (None, "true")),
        ("Final answer:\n\nB", "B", ("B", "B")),
        ("The answer is:\n**(b)**", "B", ("B", "B")),
        (r"\(x^{2} + 1\)", "$x^2+1$", ("x^2+1", "x^2+1")),
        ("5 of 6", "#### 5 apples, 3 pears", ("6", "5")),
        ("5", "a text", (None, None)),
    ],
)
def test_what_is_compared(answer, reference, found):
    assert compared(answer, reference) == found


@pytest.mark.parametrize("unit", ["1, ", "1 and ", "(", "$", r"\(", "#### ", r"\boxed{", "}{", "(A) ", " ", "-", "x="])
def test_endless_repetition_is_compared_in_time(unit):
    text = unit * (10_000 // len(unit))
    for reference in ("#### 5", "1, 2", "B", "no", "$x + 1$", text):
        started = time.perf_counter()
        exact_match(text, reference)
        assert time.perf_counter() - started < 5


ENDLESS = {
    "powers": "$9^{9^9}$",
    "a tower of code": "9**9**9",
    "digits": "7" * 100_000,
    "digits in a box": rf"$\boxed{{{'7' * 19_000}}}$",
    "a factorial": "$9999999!$",
    "a sum": r"$\sum_{k=1}^{1000000} \frac{1}{k}$",
    "brackets": f"${'(' * 2000}1{')' * 2000}$",
    "fractions": "$" + r"\frac{1}{" * 200 + "1" + "}" * 200 + "$",
    "a set": rf"$\{{{', '.join(map(str, range(2000)))}\}}$",
    "an integral": r"$\int_0^1 e^{-x^2} \sin(x^3) dx$",
}


@pytest.mark.parametrize(
    "name", [*list(ENDLESS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(ENDLESS)[1:])]
)
def test_what_takes_long_to_compute_ends_within_a_second(name):
    """But for the start of another process, which the first pair waits for. The next pair is judged as ever."""
    pytest.importorskip("math_verify")
    assert symbolic_match("1", "1")
    started = time.perf_counter()
    assert symbolic_match(ENDLESS[name], "#### 5") is False
    assert time.perf_counter() - started < 1.0
    assert symbolic_match(r"$\frac{2}{4}$", "0.5") is True


def test_any_thread_may_ask():
    pytest.importorskip("math_verify")
    pairs = [("$2\\sqrt{3}$", r"$\sqrt{12}$"), ("1", "2")] * 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda pair: symbolic_match(*pair), pairs)) == [True, False] * 3


def test_a_process_that_was_killed_is_started_again():
    pytest.importorskip("math_verify")
    assert symbolic_match("1", "1")
    symbolic._PROCESS._running.kill()
    symbolic._PROCESS._running.wait()
    assert symbolic_match("1", "1") is True


def test_symbolic_match_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'selfgen[eval]'")):
        symbolic_match("1", "1")


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (r"\boxed{2+3}", r"\boxed{3}", False),
        (r"\boxed{2 + 3 = 5}", r"\boxed{5}", True),
        (r"\boxed{7x+3}", "#### 3", False),
        (r"\boxed{3x}", "#### 3", False),
        (r"\boxed{a_3}", "3", False),
        (r"\boxed{x<4}", "4", False),
        (r"\boxed{(1,4)}", r"\boxed{4}", False),
        (r"\boxed{5 \text{ or } 3}", r"\boxed{3}", False),
        (r"\boxed{\frac{x+1}{4}}", r"\boxed{4}", False),
        (r"\boxed{x+3}" + "\n#### 3", "#### 3", True),
        (r"\boxed{\textbf{(A)}\ 5}", "5", True),
        (r"\boxed{5 \text{ cm}^2}", "5", True),
        (r"\boxed{2}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", False),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
        (r"\boxed{\begin{pmatrix}3\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", False),
    ],
)
def test_a_box_with_more_than_a_number_is_not_its_last_number(answer, reference, same):
    assert exact_match(answer, reference) == same
