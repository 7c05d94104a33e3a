"""Numbers in English words, as the `num2words` package (0.5.14) spells them, which transformers uses."""

from __future__ import annotations

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LARGE = ((10**6, "million"), (10**3, "thousand"))


def spelled(number: int) -> str:
    """A number from 0 to 999,999,999 in words: `one thousand, two hundred and thirty-four`."""
    if not 0 <= number < 10**9:
        raise ValueError(f"{number} is not from 0 to 999,999,999")
    for size, name in LARGE:
        if number >= size:
            return _joined(f"{spelled(number // size)} {name}", number % size)
    if number >= 100:
        return _joined(f"{ONES[number // 100]} hundred", number % 100)
    if number < len(ONES):
        return ONES[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")


def _joined(large: str, rest: int) -> str:
    if not rest:
        return large
    return f"{large} and {spelled(rest)}" if rest < 100 else f"{large}, {spelled(rest)}"
