"""Answers in texts: what is read as a number, which of them answers, which are equal, and what math-verify says."""

from __future__ import annotations

import re
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfgen.evaluation import answers, exact_match, extract_answer, symbolic_match


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
    ("She has 18 eggs.\n\nQuestion: A man buys 7 hats", "#### 18", True),
    ("#### 1/7", "#### 1/2", False),
    ("#### 3/5", "#### 3", False),
    ("The answer is 0.5", "#### 1/2", True),
    (r"It is $\boxed{\frac{7}{2}}$.", "#### 3.5", True),
    ("It costs £1 234", "#### 1234", True),
    ("The answer is 5 (five), see step 2", "#### 5", True),
    ("#### 1,234.50", "#### 1234.5", True),
    ("So $10^6$", "#### 6", False),
    ("So $10^6$", "#### 1000000", True),
    ("1/3", "0.333", False),
]
OURS = [  # that math-verify 0.9 judges otherwise
    ("x = - 5", "#### -5", True),
    ("2.5e3", "#### 2500", True),
    ("答案是１８", "#### 18", True),
    ("1½", "#### 1.5", True),
    ("3:30", "#### 3:45", False),
]
THEIRS = [  # that exact_match judges otherwise
    (r"$2\sqrt{3}$", r"$\sqrt{12}$", True),
    (r"$\{1, 2\}$", r"$\{2, 1\}$", True),
    ("50%", "#### 0.5", True),
]


@pytest.mark.parametrize(("answer", "reference", "right"), BOTH + OURS)
def test_exact_match_of_the_table(answer, reference, right):
    assert exact_match(answer, reference) is right


@pytest.mark.parametrize(("answer", "reference", "right"), BOTH + THEIRS)
def test_symbolic_match(answer, reference, right):
    pytest.importorskip("math_verify")
    assert symbolic_match(answer, reference) is right


@pytest.mark.parametrize(("answer", "reference", "right"), OURS + THEIRS)
def test_where_they_differ(answer, reference, right):
    """If this fails with another version of math-verify, the lists above are out of date."""
    pytest.importorskip("math_verify")
    assert exact_match(answer, reference) is not symbolic_match(answer, reference)


def test_symbolic_match_says_what_to_install(monkeypatch):
    answers._math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'selfgen[eval]'")):
        symbolic_match("1", "1")
