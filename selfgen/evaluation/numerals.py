"""Numbers in texts: where they stand, what they are worth exactly, and how each value is written in one way."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import truediv

_MOST_BITS = 1000  # of a value that is computed; what may be longer is compared as it is written
_MOST_DECIMALS = 1000  # that are written


class _Characters(dict[int, str]):
    """What a character is read as: "１" and "١" as "1", "₹" as "$", "½" as "1/2", any space as " "."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Nd":
            read = str(unicodedata.decimal(character))
        elif category == "No" and "⁄" in (fraction := unicodedata.normalize("NFKC", character)):
            read = fraction.replace("⁄", "/")
        else:
            read = {"Sc": "$", "Zs": " ", "Cf": ""}.get(category, character)
        self[code] = read
        return read


_CHARACTERS = _Characters(
    {ord(one): read for one, read in zip("−－‑–٫．٬，：／⁄∕×⋅·’＇％٪", "----..,,:///***''%%", strict=True)}
)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_REWRITTEN = [  # in this order
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|mathrm|mathbf|textbf|mbox) ?\{([^{}]*)\}", r"\1"),
        (r"\\(?:left|right|!)|\\(?=[$%])", ""),
        (r"\{,\}", ","),
        (r"\\sqrt ?\{([0-9.]+)\}|\\sqrt ?(?=[\[{0-9])", r"√\1"),
        (r"\\pi\b", "π"),
        (r"\\[,:; ]", " "),
        (r"\\(?:times|cdot)\b", "*"),
        (r"(?<=[0-9])\*\*(?=[0-9])", "^"),
        (r"\\pm\b", "±"),
        (r"\^ ?[{(] ?([-+]?[0-9]+) ?[)}]", r"^\1"),
        (r"(?<![0-9 ])\^[-+]?[0-9]+", ""),  # x^2 and m²: no numbers of their own
        (r"\b([kcdm]?m)[23]\b", r"\1"),  # m2
        (r"(?im)^([^\w\n]*(?:step|part|day|week|month|year) [0-9]+):(?=[0-9])", r"\1: "),  # no ratio
        (r"(?<=[0-9]) ?(?=\\[cdt]?frac)", " "),
        (r"\\[cdt]?frac ?(?:\{ ?(-?[0-9.,]+) ?\}|([0-9])) ?(?:\{ ?([0-9.,]+) ?\}|([0-9]))", r"\1\2/\3\4"),
    )
]
# Groups of three digits, or of two before the last, are one number: 1,234 and 1,00,000 and 1 234 and 1'234.
_GROUPS = re.compile(
    r"(?<![0-9])(?<![0-9][.,'])(?:"
    r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])"
    r"|[1-9][0-9]{0,2}(?:(?: [0-9]{3})+|(?:'[0-9]{3})+)(?![0-9]| ?/)"
    r"|[0-9]{1,3}(?:\.[0-9]{3}){2,}(?![0-9.])"
    r"|(?<!\w)[0-9]{1,3}(?:_[0-9]{3})+(?!\w))"
)
_COMMA_AFTER_DOTS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:\.[0-9]{3})+),([0-9]{1,2})(?![0-9,])")  # 1.234,50
_COMMA_BEFORE_UNIT = re.compile(  # 3,50 € and 2,5 kg, but 3,5 may be two numbers
    r"(?<![0-9.,(\[{$])([0-9]{1,3}),([0-9]{1,2})(?= ?(?:[$%]|(?:[kcm]?m|[km]?g|[cdm]?l|kWh|h|s|min)\b))"
)
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
           "november", "december")  # fmt: skip
_MONTH = f"(?P<month>(?:{'|'.join(rf'{name[:3]}(?:{name[3:]}|[.])?' for name in _MONTHS)})) "
_DAY, _YEAR = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?", r"(?P<year>[0-9]{4})(?![0-9])"
_DATES = [
    re.compile(rf"\b{first}{then},? {_YEAR}", re.IGNORECASE)
    for first, then in ((_MONTH, _DAY), (_DAY + r" (?:of )?", _MONTH.rstrip()))
]


def plain(text: str) -> str:
    """``text`` as numbers are found in it: "$1000" for "₹１，０００", "1/2" for LaTeX's fraction, "10^6" for "10⁶"."""
    text = plain_powers(text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text).translate(_CHARACTERS)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = _COMMA_AFTER_DOTS.sub(lambda found: found[1].replace(".", "") + "." + found[2], text)
    text = _COMMA_BEFORE_UNIT.sub(r"\1.\2", text)
    for date in _DATES:
        text = date.sub(_in_digits, text)
    return _GROUPS.sub(lambda found: re.sub("[^0-9]", "", found[0]), text)


def plain_powers(text: str) -> str:
    """``text`` with "^2" for "²"."""
    return _SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]).replace("−", "-"), text)


def _in_digits(date: re.Match[str]) -> str:
    month = next(place for place, name in enumerate(_MONTHS, 1) if name[:3] == date["month"][:3].lower())
    return f"{date['year']}-{month:02}-{int(date['day']):02}"


# A minus after a letter, a digit, a bracket or a percent sign subtracts. With a space after it, it is a sign only where
# a value is expected: elsewhere it subtracts, or begins a line of a list. The whole part may be missing, as in ".5",
# but dots in a row are an ellipsis.
_START = re.compile(
    r"(?P<minus>(?<![\w)\]}%])-(?:\$ ?)?"
    r"|(?:[=:#({<>≈~] *|\b(?:is|are|equals) +)(?:-|minus\b)[ $]*"
    r"|^[^\w\n]*minus +\$?"
    r"|\bnegative +\$?)?(?P<both>±[ $]*)?(?=[0-9√]|(?<![\w.])\.[0-9])",
    re.IGNORECASE | re.MULTILINE,
)
# What is compared as it is written: times and ratios, dates and versions, numbers to a base, multiples of roots and π.
_PARTS = re.compile(
    r"[0-9]+(?:\.[0-9]+)?(?:(?::| : )[0-9]+(?:\.[0-9]+)?)+"
    r"|(?:[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}-[0-9]{1,2}-[0-9]{4})(?![0-9])"
    r"|[0-9]+(?:(?:/[0-9]+){2,}|(?:\.[0-9]+){2,})"
    r"|[0-9]+_(?:[0-9]+|\{[0-9]+\})(?![0-9])"
    r"|(?:[0-9]*(?:\.[0-9]+)? ?(?:√(?:[0-9.]*[0-9]|[\[{][^\]}\n]*[\]}])|π)|√)(?: ?/ ?[0-9]+)?"
)
_MIXED = re.compile(r"([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9]|\.[0-9])")
_INTEGER = r"([-+]?[0-9]+)(?![0-9]*\.?[0-9])"
_TERM = re.compile(  # 12.5, 1.5e9, 10^6, 2 * 10^6
    rf"([0-9]*(?:\.[0-9]+)?)(?:[eE]{_INTEGER}(?!\w))?(?: ?\^ ?{_INTEGER})?(?: ?[*x] ?10 ?\^ ?{_INTEGER})?"
)
_BAR = re.compile(r" ?/ ?(?=\.?[0-9])")
_SCALE = re.compile(r" ?(thousand|million|billion|trillion)\b", re.IGNORECASE)
_SCALE_OF_MONEY = re.compile(r"([kmb]|bn)\b", re.IGNORECASE)  # directly after "$5"
_ZEROS = {"k": 3, "thousand": 3, "m": 6, "million": 6, "b": 9, "bn": 9, "billion": 9, "trillion": 12}


@dataclass(frozen=True)
class Number:
    """A number from index ``begin`` of a text, without its sign, to ``end``; equal values are ``written`` alike."""

    begin: int
    end: int
    written: str


def numbers(text: str) -> Iterator[Number]:
    """The numbers of a text that is `plain`, in order.

    Example:
        >>> [number.written for number in numbers("-3 of 6/4, 1 1/3 and 2.5e3")]
        ['-3', '1.5', '4/3', '2500']
    """
    end = 0
    while start := _START.search(text, end):
        begin = start.end()
        value, end = _value(text, begin)
        scale = _SCALE.match(text, end) or (
            _SCALE_OF_MONEY.match(text, end) if text[begin - 1 : begin] == "$" else None
        )
        if value is not None and scale:
            value, end = value * 10 ** _ZEROS[scale[1].lower()], scale.end()
        written = _as_told(text[begin:end]) if value is None else _written(value)
        sign = "±" if start["both"] else "-" if start["minus"] else ""
        yield Number(begin, end, written if written == "0" else sign + written)


def _value(text: str, begin: int) -> tuple[Fraction | None, int]:
    """What the number that begins there is worth, None if that is not computed; and where it ends."""
    if parts := _PARTS.match(text, begin):
        return None, parts.end()
    if (mixed := _MIXED.match(text, begin)) and len(mixed[0]) < _MOST_BITS:
        whole, above, below = map(int, mixed.groups())
        if above < below:
            return whole + Fraction(above, below), mixed.end()
    terms = [_term(text, begin)]
    if bar := _BAR.match(text, terms[0].end()):
        terms.append(_term(text, bar.end()))
    end = terms[-1].end()
    try:
        return reduce(truediv, map(_worth, terms)), end
    except (OverflowError, ZeroDivisionError):
        return None, end


def _term(text: str, begin: int) -> re.Match[str]:
    term = _TERM.match(text, begin)
    assert term is not None  # all of it is optional
    return term


def _worth(term: re.Match[str]) -> Fraction:
    """The value of a term; OverflowError if it may have more than _MOST_BITS."""
    digits, *exponents = term.groups()
    if any(len(exponent or "") > 5 for exponent in exponents):
        raise OverflowError
    tens, power, more_tens = (int(exponent or standard) for exponent, standard in zip(exponents, "010", strict=True))
    if 4 * ((len(digits) + abs(tens)) * max(1, abs(power)) + abs(more_tens)) > _MOST_BITS:
        raise OverflowError
    ten = Fraction(10)
    return (Fraction(digits) * ten**tens) ** power * ten**more_tens


def _as_told(number: str) -> str:
    return re.sub(r"^0+(?=[0-9])", "", re.sub(r"_\{([0-9]+)\}", r"_\1", number.replace(" ", "")))


def _written(value: Fraction) -> str:
    """As a decimal fraction if it ends, as "0.125"; else with a bar, as "1/3"."""
    below = value.denominator
    most = min(below.bit_length(), _MOST_DECIMALS)
    if pow(10, most, below):
        return f"{value.numerator}/{below}"
    decimals = next(count for count in range(most + 1) if not pow(10, count, below))
    if not decimals:
        return str(value.numerator)
    digits = str(value.numerator * 10**decimals // below).rjust(decimals + 1, "0")
    return f"{digits[:-decimals]}.{digits[-decimals:]}"
