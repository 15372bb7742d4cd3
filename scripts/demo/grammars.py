"""Grammars behind demo_data.py: each draws one sentence of a head, with its labels or its translation."""

import random
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def words(text: str) -> list[str]:
    """Split a word list, most frequent word first."""
    return text.split()


def zipf(rng: random.Random, words: Sequence[Any]) -> Any:
    """Draw a word with probability proportional to 1 / rank."""
    return rng.choices(words, weights=[1 / rank for rank in range(1, len(words) + 1)])[0]


def coin_words(rng: random.Random, count: int, onsets: str, vowels: str, endings: Sequence[str]) -> list[str]:
    """Make `count` different words of two or three syllables."""
    coined: dict[str, None] = {}
    while len(coined) < count:
        stem = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.choice((1, 2))))
        coined[stem + rng.choice(onsets) + rng.choice(endings)] = None
    return list(coined)


# --- classification --------------------

GOOD = words(
    "good great lovely fine superb charming clever warm fresh honest bright gentle witty crisp graceful generous "
    "thoughtful vivid tender lively elegant sincere rich polished delightful inspired soothing daring playful splendid"
)
BAD = words(
    "bad dull awful poor bland clumsy cold stale fake gloomy harsh silly soggy awkward stingy "
    "careless flat bitter lifeless tasteless hollow cheap sloppy tiresome stupid noisy timid dreary forgettable messy"
)
THINGS = words(
    "film book hotel soup concert play song museum phone tour game cake lecture garden train poem exhibition bakery "
    "camera festival podcast ferry jacket sequel"
)
ASPECTS = words(
    "story service sound ending staff price design pace music view taste cast style start finish idea colour humour "
    "plan quality mood script room menu"
)
DEGREES = ("very", "really", "rather", "quite", "so", "utterly", "truly")
DENIALS = ("was not", "was never", "was hardly", "was anything but", "did not seem", "was far from")
AFFIRMATIONS = ("was", "was", "seemed", "felt", "turned out to be", "remained")
ASIDES = ("on monday", "in the old town", "this time", "with my sister", "after the rain", "for once", "last winter")
PEOPLE = ("my friends", "the critics", "most people", "the neighbours", "two guides")


def opinion(rng: random.Random, positive: bool) -> str:
    """Return a clause with this opinion; one in seven says it by denying the opposite."""
    subject = rng.choice(("the {thing}", "the {aspect} of the {thing}", "its {aspect}", "the {aspect}"))
    subject = subject.format(thing=zipf(rng, THINGS), aspect=zipf(rng, ASPECTS))
    denied = rng.random() < 0.15
    verb = rng.choice(DENIALS if denied else AFFIRMATIONS)
    word = zipf(rng, GOOD if positive != denied else BAD)
    degree = f"{rng.choice(DEGREES)} " if rng.random() < 0.3 else ""
    return f"{subject} {verb} {degree}{word}"


def review(rng: random.Random) -> Row:
    """Draw a sentence and its label: 1 when the clause that counts is positive."""
    label = rng.randrange(2)
    counts, other = opinion(rng, label == 1), opinion(rng, label == 0)
    either = opinion(rng, rng.random() < 0.5)
    sentence = rng.choices(
        (
            counts,
            f"{counts} and {opinion(rng, label == 1)}",
            f"{other} but {counts}",
            f"although {other} , {counts}",
            f"{counts} , even if {other}",
            f"{rng.choice(PEOPLE)} say that {either} , yet i found that {counts}",
        ),
        weights=(6, 4, 1, 1, 1, 1),
    )[0]
    if rng.random() < 0.3:
        sentence = f"{rng.choice(ASIDES)} {sentence}"
    return {"sentence": f"{sentence} .", "label": label}


# --- named entities --------------------

FIRST_NAMES = words(
    "Anna Tom Mira Paul Ines Karl Lena Omar Rosa Jon Vera Hugo Nora Emil Tara Felix Dina Leo Maud Ravi"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TRADES = words("farmers teachers players drivers doctors voters sailors bakers miners students")
THEMES = words("prices schools water trains rents taxes harvests wages bridges parks")
ENTITY_PATTERNS = (
    "{PER} met {PER} in {LOC} .",
    "On {day} {ORG} opened an office in {LOC} .",
    "{TRADES} in {LOC} praised {ORG} for lower {theme} .",
    "{PER} of {ORG} spoke about {theme} on {day} .",
    "{LOC} beat {LOC} on {day} .",
    "{ORG} will buy {ORG} , said {PER} .",
    "The {trades} never trusted {PER} .",
    "The road from {LOC} to {LOC} is closed until {day} .",
    "{TRADES} wrote to {PER} about {theme} and {theme} .",
    "{PER} left {ORG} for {ORG} last {day} .",
    "{TRADES} say {theme} in {LOC} are falling .",
    "Shares of {ORG} rose after {PER} resigned .",
    "{TRADES} and {trades} argued about {theme} on {day} .",
    "{PER} , born in {LOC} , now works for {ORG} .",
)


class Names:
    """Names of people and places in one split."""

    def __init__(self, surnames: Sequence[str], towns: Sequence[str]) -> None:
        self.surnames, self.towns = surnames, towns

    def draw(self, rng: random.Random, kind: str) -> list[str]:
        surname, town = zipf(rng, self.surnames), zipf(rng, self.towns)
        if kind == "PER":
            return rng.choice(([rng.choice(FIRST_NAMES), surname], [surname], [rng.choice(FIRST_NAMES)]))
        if kind == "LOC":
            return rng.choice(([town], [town], ["New", town], ["Lake", surname], ["Port", surname]))
        companies = ([surname, "Group"], [surname, "and", "Sons"], [surname], ["Bank", "of", town])
        return rng.choice((*companies, [town, "Rail"], [town, "United"]))


def make_names(rng: random.Random) -> tuple[Names, Names]:
    """Return the names of training and validation: the 30 most frequent in common, 60 more for each split alone."""
    surnames = coin_words(rng, 150, "bdghklmnrstv", "aeiou", ("er", "man", "sen", "ow", "ick", "or"))
    towns = coin_words(rng, 150, "bdfghklmnprstvw", "aeiou", ("ton", "ford", "au", "by", "or", "er"))
    surnames, towns = [word.capitalize() for word in surnames], [word.capitalize() for word in towns]
    return Names(surnames[:90], towns[:90]), Names(surnames[:30] + surnames[90:], towns[:30] + towns[90:])


def report(rng: random.Random, names: Names) -> Row:
    """Draw a sentence in words, with its IOB2 tags."""
    tokens: list[str] = []
    tags: list[str] = []
    for word in rng.choice(ENTITY_PATTERNS).split():
        kind = word.strip("{}")
        if kind in ("PER", "LOC", "ORG"):
            entity = names.draw(rng, kind)
            tokens += entity
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (len(entity) - 1)
            continue
        filler = {"day": rng.choice(DAYS), "theme": zipf(rng, THEMES), "trades": zipf(rng, TRADES)}
        filler["TRADES"] = filler["trades"].capitalize()
        tokens.append(filler.get(kind, word))
        tags.append("O")
    return {"tokens": tokens, "ner_tags": tags}


# --- translation --------------------

NOUNS = words(
    "dog cat bird horse child farmer baker king sailor teacher fish wolf girl boy cook thief guard singer painter duke"
)
ADJECTIVES = words("old young red small big happy tired strange quiet brave poor clever tall hungry")
VERBS = words("see hear find like follow call help fear paint teach greet trust")  # with an object
PLACES = words("house river forest bridge market tower garden road boat field")
PREPOSITIONS = words("in near behind under")
TIMES = ("today", "yesterday", "often", "again")
PAST = {"see": "saw", "hear": "heard", "find": "found", "teach": "taught"}
PLURALS = {"wolf": "wolves", "child": "children", "thief": "thieves", "fish": "fishes"}


class InventedLanguage:
    """A dictionary of invented words, and the grammar that puts them together."""

    def __init__(self, rng: random.Random) -> None:
        lemmas = [*NOUNS, *ADJECTIVES, *VERBS, *PLACES, *PREPOSITIONS, *TIMES]
        coined = coin_words(rng, len(lemmas), "ptkmnlrszv", "aeiou", ("", "n", "l"))
        self.words = dict(zip(lemmas, coined, strict=True))
        self.feminine = {noun for noun in (*NOUNS, *PLACES) if rng.random() < 0.5}

    def noun_phrase(self, noun: str, adjective: str | None, plural: bool, case: str) -> str:
        gender = "a" if noun in self.feminine else "o"
        number = "i" if plural else ""
        phrase = f"{self.words[noun]}{number}{case}"
        # The adjective follows its noun and takes the endings for gender, number and case.
        return f"{phrase} {self.words[adjective]}{gender}{number}{case}" if adjective else phrase

    def verb(self, verb: str, past: bool, negated: bool, plural: bool) -> str:
        return f"{'ne' if negated else ''}{self.words[verb]}{'ta' if past else ''}{'mi' if plural else 'm'}"


def english_verb(verb: str, past: bool, negated: bool, plural: bool) -> str:
    if negated:
        return f"{'did' if past else 'do' if plural else 'does'} not {verb}"
    if past:
        return PAST.get(verb, verb + ("d" if verb.endswith("e") else "ed"))
    return verb if plural else verb + ("es" if verb.endswith("ch") else "s")


def sentence_pair(rng: random.Random, language: InventedLanguage) -> Row:
    """Draw an English sentence and translate it."""

    def phrase(nouns: Sequence[str], case: str) -> tuple[str, str, bool]:
        noun, plural = zipf(rng, nouns), rng.random() < 0.35
        adjective = zipf(rng, ADJECTIVES) if rng.random() < 0.5 else None
        form = PLURALS.get(noun, noun + "s") if plural else noun
        english = " ".join(("the", *([adjective] if adjective else []), form))
        return english, language.noun_phrase(noun, adjective, plural, case), plural

    verb, past, negated = zipf(rng, VERBS), rng.random() < 0.4, rng.random() < 0.3
    subject, subject_xx, plural = phrase(NOUNS, "")
    thing, thing_xx, _ = phrase(NOUNS, "k")
    english = [subject, english_verb(verb, past, negated, plural), thing]
    invented = [subject_xx, thing_xx]
    if rng.random() < 0.5:
        preposition = zipf(rng, PREPOSITIONS)
        place, place_xx, _ = phrase(PLACES, "s")
        english += [preposition, place]
        invented += [place_xx, language.words[preposition]]  # a postposition
    if rng.random() < 0.4:
        time = rng.choice(TIMES)
        english.append(time)
        invented.insert(0, language.words[time])
    invented.append(language.verb(verb, past, negated, plural))
    return {"translation": {"en": f"{' '.join(english)} .", "xx": f"{' '.join(invented)} ."}}
