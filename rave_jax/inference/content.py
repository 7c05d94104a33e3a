"""Which tokens of a prompt belong to words with a content of their own, as GIFT wants to know.

Its authors keep nouns, verbs, adjectives, adverbs, numbers and names, by a tagger. Ours, without one: every word but
those of a closed list of English articles, pronouns, prepositions, conjunctions, auxiliaries and question words. A word
is a run of letters and digits; of a language that is not in the list every word counts.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from rave_jax.inference.text import TokenBytes
from rave_jax.typing import Bool, Int, NpArray

LIST = """
a an the this that these those some any each every either neither no both all half such another other
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
they them their theirs themselves one ones who whom whose which what where when why how there here
of in on at by for with about against between into through during before after above below to from up down out off
over under near onto upon within without across along around behind beside beneath beyond toward towards via per
and or but nor so yet if because as while than though although whether unless until since
be is am are was were been being do does did done doing have has had having will would shall should can could may
might must not s t re ve ll d m
"""
FUNCTION_WORDS = frozenset(LIST.split())
BETWEEN = b"\xff"
"""Stands for a special token; no text has this byte."""
WORD = re.compile(rb"[A-Za-z0-9\x80-\xfe]+")


def content_tokens(tokenizer: Any, tokens: Int[NpArray, "T"]) -> Bool[NpArray, "T"]:
    """Which tokens spell a part of such a word.

    Args:
        tokenizer: as `TokenBytes` takes it.
        tokens: of a prompt.
    """
    bytes_of = TokenBytes(tokenizer)
    parts = [bytes_of(int(token)) or BETWEEN for token in tokens]
    ends = np.cumsum([len(part) for part in parts])
    found = np.zeros(len(parts), bool)
    for word in WORD.finditer(b"".join(parts)):
        if word.group().decode("utf-8", "replace").lower() not in FUNCTION_WORDS:
            first, last = np.searchsorted(ends, [word.start(), word.end() - 1], side="right")
            found[first : last + 1] = True
    return found
