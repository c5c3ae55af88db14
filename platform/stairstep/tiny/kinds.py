"""What tinywiki's articles are about: six kinds of thing, the facts that each has, and the ways of asking for them.

A fact has a label (on a fact line), a sentence (in running text), plain questions, which use the words of the label or the sentence, and
paraphrases, which avoid them: what a paraphrase means has to be learned, best from the text pairs. The same holds for qualifiers and
their synonyms. Labels, sentences and names are kept short enough for a line of about sixteen characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FactKind:
    """One thing that an article can tell: its value is a year or a name; `{}` in the sentence stands for it, `{it}` for the article."""

    label: str
    value: Literal["year", "name"]
    sentence: str
    plain: tuple[str, ...]
    paraphrases: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of article; `{name}` and `{word}` (its qualifier) make the title; each qualifier comes with a synonym."""

    name: str
    title: str
    qualifiers: tuple[tuple[str, str], ...]
    facts: tuple[FactKind, ...]
    two_names: bool = False


def _year(label: str, sentence: str, plain: tuple[str, ...], paraphrases: tuple[str, ...]) -> FactKind:
    return FactKind(label, "year", sentence, plain, paraphrases)


def _name(label: str, sentence: str, plain: tuple[str, ...], paraphrases: tuple[str, ...]) -> FactKind:
    return FactKind(label, "name", sentence, plain, paraphrases)


_PERSON = Kind(
    "person",
    "{name} ({word})",
    (
        ("painter", "artist"),
        ("pilot", "aviator"),
        ("poet", "lyricist"),
        ("surgeon", "doctor"),
        ("chemist", "scientist"),
        ("sailor", "seafarer"),
        ("actor", "performer"),
        ("chef", "cook"),
        ("judge", "jurist"),
        ("spy", "secret agent"),
    ),
    (
        _year(
            "Born",
            "Born in {}.",
            ("In what year was {it} born?", "When was {it} born?"),
            ("When did {it} come into the world?", "Which year began the life of {it}?"),
        ),
        _year(
            "Died",
            "Died in {}.",
            ("In what year did {it} die?", "When did {it} die?"),
            ("When did {it} pass away?", "Which year ended the life of {it}?"),
        ),
        _year(
            "Married",
            "Married in {}.",
            ("When did {it} marry?", "In what year was {it} married?"),
            ("What year was the wedding of {it}?", "When did {it} become a spouse?"),
        ),
        _name(
            "Home",
            "Home was {}.",
            ("What was the home of {it}?", "Where was the home of {it}?"),
            ("Where did {it} live?", "In which place did {it} dwell?"),
        ),
        _name(
            "Teacher",
            "Taught by {}.",
            ("Who was the teacher of {it}?", "By whom was {it} taught?"),
            ("Whose pupil was {it}?", "From whom did {it} learn?"),
        ),
        _name(
            "Rival",
            "Rival of {}.",
            ("Who was the rival of {it}?", "What is the name of the rival of {it}?"),
            ("Who competed with {it}?", "Who was the opponent of {it}?"),
        ),
        _year(
            "Prize",
            "Won a prize in {}.",
            ("When did {it} win a prize?", "What was the prize year of {it}?"),
            ("Which year brought an award to {it}?", "When was {it} honoured?"),
        ),
    ),
    two_names=True,
)

_PLACE = Kind(
    "place",
    "{word} {name}",
    (
        ("River", "stream"),
        ("Lake", "water"),
        ("Mount", "peak"),
        ("Cape", "headland"),
        ("Isle", "island"),
        ("Port", "harbour"),
        ("Fort", "stronghold"),
        ("Vale", "valley"),
    ),
    (
        _name(
            "Region",
            "Lies in {}.",
            ("In which region does {it} lie?", "What is the region of {it}?"),
            ("Where can {it} be found?", "Which area holds {it}?"),
        ),
        _year(
            "Mapped",
            "Mapped in {}.",
            ("When was {it} mapped?", "In what year was {it} mapped?"),
            ("When was {it} first charted?", "Which year was {it} drawn by surveyors?"),
        ),
        _name(
            "Finder",
            "Found by {}.",
            ("Who was the finder of {it}?", "By whom was {it} found?"),
            ("Who discovered {it}?", "Which explorer came upon {it}?"),
        ),
        _name(
            "Town",
            "Next town is {}.",
            ("What is the town at {it}?", "What is the next town to {it}?"),
            ("Which settlement is closest to {it}?", "In which settlement do people near {it} live?"),
        ),
        _year(
            "Flood",
            "Had a flood in {}.",
            ("When was the flood at {it}?", "In what year did {it} have a flood?"),
            ("When did high water strike {it}?", "Which year was {it} under water?"),
        ),
        _year(
            "Park",
            "A park since {}.",
            ("Since when is {it} a park?", "In what year did {it} become a park?"),
            ("When did {it} get nature protection?", "Which year made {it} a reserve?"),
        ),
        _name(
            "Guard",
            "Guarded by {}.",
            ("Who is the guard of {it}?", "By whom is {it} guarded?"),
            ("Who watches over {it}?", "Who is the keeper of {it}?"),
        ),
    ),
)

_WORK = Kind(
    "work",
    "{name} ({word})",
    (
        ("opera", "music drama"),
        ("novel", "book"),
        ("film", "movie"),
        ("ballet", "dance piece"),
        ("poem", "verses"),
        ("hymn", "sacred song"),
        ("statue", "sculpture"),
        ("comic", "picture story"),
    ),
    (
        _name(
            "Author",
            "Author is {}.",
            ("Who is the author of {it}?", "What is the name of the author of {it}?"),
            ("Who created {it}?", "Whose work is {it}?"),
        ),
        _year(
            "Shown",
            "First shown in {}.",
            ("When was {it} first shown?", "In what year was {it} shown?"),
            ("When did the public meet {it}?", "Which year saw the premiere of {it}?"),
        ),
        _name(
            "Hero",
            "Hero is {}.",
            ("Who is the hero of {it}?", "What is the hero of {it} called?"),
            ("Who is the main figure in {it}?", "Which character leads {it}?"),
        ),
        _name(
            "Setting",
            "Set in {}.",
            ("What is the setting of {it}?", "Where is {it} set?"),
            ("In which place does {it} happen?", "Where does the story of {it} unfold?"),
        ),
        _year(
            "Revised",
            "Revised in {}.",
            ("When was {it} revised?", "In what year was {it} revised?"),
            ("When was {it} reworked?", "Which year brought a new version of {it}?"),
        ),
        _year(
            "Banned",
            "Banned in {}.",
            ("When was {it} banned?", "In what year was {it} banned?"),
            ("When did censors forbid {it}?", "Which year was {it} outlawed?"),
        ),
        _name(
            "Patron",
            "Paid by {}.",
            ("Who was the patron of {it}?", "By whom was {it} paid?"),
            ("Who financed {it}?", "Whose money made {it} possible?"),
        ),
    ),
)

_CRAFT = Kind(
    "craft",
    "{name} ({word})",
    (
        ("ship", "vessel"),
        ("yacht", "sailing boat"),
        ("train", "locomotive"),
        ("tram", "streetcar"),
        ("airship", "dirigible"),
        ("tug", "towing boat"),
        ("ferry", "passenger boat"),
        ("rocket", "space missile"),
    ),
    (
        _year(
            "Built",
            "Built in {}.",
            ("When was {it} built?", "In what year was {it} built?"),
            ("When was {it} constructed?", "Which year was {it} put together?"),
        ),
        _name(
            "Maker",
            "Made by {}.",
            ("Who was the maker of {it}?", "By whom was {it} made?"),
            ("Who manufactured {it}?", "Whose workshop produced {it}?"),
        ),
        _name(
            "Owner",
            "Owned by {}.",
            ("Who is the owner of {it}?", "By whom is {it} owned?"),
            ("To whom does {it} belong?", "Whose property is {it}?"),
        ),
        _name(
            "Base",
            "Based in {}.",
            ("What is the base of {it}?", "Where is {it} based?"),
            ("Where is {it} stationed?", "From which place does {it} operate?"),
        ),
        _year(
            "Refit",
            "Had a refit in {}.",
            ("When was the refit of {it}?", "In what year did {it} have a refit?"),
            ("When was {it} modernised?", "Which year was {it} overhauled?"),
        ),
        _year(
            "Lost",
            "Lost in {}.",
            ("When was {it} lost?", "In what year was {it} lost?"),
            ("When did {it} vanish?", "Which year was {it} wrecked?"),
        ),
        _name(
            "Captain",
            "Captain is {}.",
            ("Who is the captain of {it}?", "What is the name of the captain of {it}?"),
            ("Who commands {it}?", "Who is in charge aboard {it}?"),
        ),
    ),
)

_LAND = Kind(
    "land",
    "{name} ({word})",
    (
        ("kingdom", "monarchy"),
        ("republic", "free state"),
        ("duchy", "dukedom"),
        ("colony", "overseas territory"),
        ("county", "shire"),
        ("empire", "imperial realm"),
        ("canton", "district"),
    ),
    (
        _name(
            "Capital",
            "Capital is {}.",
            ("What is the capital of {it}?", "What is the name of the capital of {it}?"),
            ("From which city is {it} governed?", "Which city is the seat of {it}?"),
        ),
        _name(
            "Ruler",
            "Ruled by {}.",
            ("Who is the ruler of {it}?", "By whom is {it} ruled?"),
            ("Who governs {it}?", "Who holds power in {it}?"),
        ),
        _year(
            "Free",
            "Free since {}.",
            ("Since when is {it} free?", "In what year did {it} become free?"),
            ("When did {it} gain independence?", "Which year brought liberty to {it}?"),
        ),
        _name(
            "Coin",
            "Its coin is the {}.",
            ("What is the coin of {it}?", "What is the coin of {it} called?"),
            ("Which currency does {it} use?", "With what money do people pay in {it}?"),
        ),
        _year(
            "Census",
            "Census held in {}.",
            ("When was the census of {it}?", "In what year was the census of {it} held?"),
            ("When were the people of {it} counted?", "Which year were inhabitants of {it} recorded?"),
        ),
        _name(
            "Enemy",
            "Enemy of {}.",
            ("Who is the enemy of {it}?", "What is the name of the enemy of {it}?"),
            ("With whom is {it} at war?", "Against whom does {it} fight?"),
        ),
        _year(
            "Code",
            "Law code of {}.",
            ("What year is the law code of {it}?", "When did {it} get its law code?"),
            ("When were the statutes of {it} written?", "Which year is the legal text of {it} from?"),
        ),
    ),
)

_GROUP = Kind(
    "group",
    "{name} ({word})",
    (
        ("choir", "singing group"),
        ("bank", "lender"),
        ("school", "academy"),
        ("museum", "gallery"),
        ("brewery", "beer maker"),
        ("team", "sports club"),
        ("guild", "trade union"),
        ("circus", "big top"),
    ),
    (
        _year(
            "Founded",
            "Founded in {}.",
            ("When was {it} founded?", "In what year was {it} founded?"),
            ("When was {it} established?", "Which year saw the beginning of {it}?"),
        ),
        _name(
            "Leader",
            "Led by {}.",
            ("Who is the leader of {it}?", "By whom is {it} led?"),
            ("Who directs {it}?", "Who is the head of {it}?"),
        ),
        _name(
            "Seat",
            "Seat is in {}.",
            ("What is the seat of {it}?", "Where is the seat of {it}?"),
            ("Where is {it} located?", "In which city does {it} reside?"),
        ),
        _year(
            "Closed",
            "Closed in {}.",
            ("When was {it} closed?", "In what year was {it} closed?"),
            ("When did {it} shut down?", "Which year was the end of {it}?"),
        ),
        _year(
            "Fire",
            "Had a fire in {}.",
            ("When was the fire at {it}?", "In what year did {it} have a fire?"),
            ("When did {it} burn?", "Which year brought flames to {it}?"),
        ),
        _name(
            "Donor",
            "Donor is {}.",
            ("Who is the donor of {it}?", "What is the name of the donor of {it}?"),
            ("Who gave money to {it}?", "Which sponsor supports {it}?"),
        ),
        _name(
            "Mascot",
            "Mascot is {}.",
            ("What is the mascot of {it}?", "What is the mascot of {it} called?"),
            ("Which lucky animal stands for {it}?", "Which lucky figure does {it} have?"),
        ),
    ),
)

KINDS = (_PERSON, _PLACE, _WORK, _CRAFT, _LAND, _GROUP)

FILLERS = ("See notes.", "Sources differ.", "Little is known.", "More at the link.", "Not disputed.", "A stub page.")
