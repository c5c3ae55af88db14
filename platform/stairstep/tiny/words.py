"""Invented words: the names that fill tinywiki, and another kind of word for the tiny models' own pretraining.

The two differ in their syllables, so that a model pretrained on the one has to spell the other, not to remember it.
All randomness comes from the `random.Random` that is handed in.
"""

from __future__ import annotations

import random

_ONSETS = ("b", "d", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kr", "tr", "st", "th", "vl")
_VOWELS = "aeiou"
_CODAS = ("", "", "l", "m", "n", "r", "s", "t", "ld", "nd", "rn", "sk", "th", "x")

_OTHER_CONSONANTS = (*"bcdfghjklmnpqrstvwxyz", "ch", "cl", "fl", "gw", "ph", "sh", "sp", "wh")
_OTHER_VOWELS = ("a", "e", "i", "o", "u", "y", "ai", "ea", "oo", "ou")

_LETTERS = "etaoinshrdlucmfwygpbvkjxqz"
_WEIGHTS = (12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1)

FIRST_YEAR, LAST_YEAR = 1500, 1999


def world_name(rng: random.Random, longest: int = 7) -> str:
    """A capitalised name of tinywiki of 4 to `longest` letters, such as `Torvel`."""
    while True:
        middle = rng.choice(_ONSETS) if rng.random() < 0.9 else rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS)
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + middle + rng.choice(_VOWELS) + rng.choice(_CODAS)
        if 4 <= len(word) <= longest:
            return word.capitalize()


def respelled(rng: random.Random, name: str, longest: int = 8) -> str:
    """A name that differs from `name` by one letter: one vowel changed, or one letter more at its end."""
    places = [index for index, letter in enumerate(name) if index > 0 and letter in _VOWELS]
    if not places or (len(name) < longest and rng.random() < 0.5):
        return name + rng.choice("nrs" if name[-1] in _VOWELS else "aeo")
    place = rng.choice(places)
    return name[:place] + rng.choice([vowel for vowel in _VOWELS if vowel != name[place]]) + name[place + 1 :]


def year(rng: random.Random) -> str:
    """A year of tinywiki, four digits."""
    return str(rng.randint(FIRST_YEAR, LAST_YEAR))


def pretraining_name(rng: random.Random, longest: int = 7) -> str:
    """A capitalised name of the pretraining articles of 4 to `longest` letters: all letters, other syllables than a world's."""
    while True:
        parts = [rng.choice(_OTHER_CONSONANTS) + rng.choice(_OTHER_VOWELS) for _ in range(rng.randint(2, 3))]
        word = "".join(parts) + rng.choice(_OTHER_CONSONANTS)
        word = word[rng.randrange(2) :]
        if 4 <= len(word) <= longest:
            return word.capitalize()


def pretraining_word(rng: random.Random, longest: int = 9) -> str:
    """A word of the pretraining text: letters by frequency in no syllable order, now and then capitals or digits."""
    length = rng.randint(2, longest)
    kind = rng.random()
    if kind < 0.15:
        return "".join(rng.choice("0123456789") for _ in range(min(length, 5)))
    word = "".join(rng.choices(_LETTERS, weights=_WEIGHTS, k=length))
    if kind < 0.55:
        return word.capitalize()
    return word.upper() if kind < 0.6 else word
