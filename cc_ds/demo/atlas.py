"""The Atlas: real facts about countries, asked and answered in ten languages, and the splits that measure transfer.

    CLDR (through PyPI babel)
      -> World      entities with their names in every language, facts between entities
      -> Split      which facts a target language may see: train, dev or test (English sees all of them)
      -> Atlas      rows: train, dev, test, warmup, pairs

A fact is (relation, country) -> entity: the currency, the official language or the region of a country. It is the same
in every language; only the names differ. The test asks in each target language about facts that the training rows
state in English only, so a right answer has crossed from English. Nothing else about the answer is new: a fact is held
out only if at least two training facts have the same answer, and the dictionary has the country's name. Its `gloss`
rows (English rows: what is this foreign name in English?) cover the countries, its `name` rows (what is this English
name in your language?) the answers that facts share. `majority_baseline` is the floor that a guesser reaches; it is
highest for currency, since most countries have one of their own and the rest share only a few.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from babel import Locale
from babel.core import get_global

from cc_ds.demo.phrases import PHRASES, PHRASINGS

LANGUAGES = ("ar", "de", "es", "hi", "ru", "sw", "th", "tr", "yo")
RELATIONS = ("currency", "language", "region")
MIN_TRAINING_FACTS = 2  # with the same answer as a held-out fact
SPLITS = ("train", "dev", "test", "warmup", "pairs")

# The order decides what a smaller atlas holds. First come well-known countries that share a currency, a language or a
# region with several others, since only such facts can be held out; then the rest by population. Left out: small
# islands; Korea, whose two halves bear each other's names in CLDR's Yoruba; Bulgaria, whose currency changed after this
# CLDR; Norway, Sudan, Bosnia, Montenegro and Palestine, where CLDR counts variants of a language or ties two answers.
COUNTRIES = tuple(
    "US DE NG FR IN BR EG CI CM ES MX GB ET IT SN TZ AR TD PT RU BF KE CN NL ML DZ CO GA BE TR AO JP AT CG IQ PE NE "
    "ZA GR EC PK BJ SA ID IE TG CD CF FI MA MZ BD CA SV GQ SY TH CL SK GH AU GW IR VN UG TL YE VE NZ PH MM AF PL UZ "
    "UA MY NP MG LK RO MW KZ ZM GT KH SO ZW GN RW BI TN BO HT JO CU SS DO SE CZ HN AZ HU TJ IL BY AE PG CH SL LA RS "
    "KG LY PY NI SG DK LB LR MR OM CR KW PA HR GE ER UY MN JM AM QA AL LT LS GM NA MD BW SI LV MK TT BH EE MU SZ DJ "
    "FJ CY KM BT GY LU SR CV MT MV IS".split()
)

# The United Nations' M49 regions, by their CLDR codes. CLDR names them in every language; babel leaves out its table of
# members, so here it is, for COUNTRIES.
REGIONS = {
    "005": "BR CO AR PE VE CL EC BO PY UY GY SR",
    "011": "NG GH CI NE BF ML SN GN BJ TG SL LR MR GM GW CV",
    "013": "MX GT HN NI SV CR PA",
    "014": "ET TZ KE UG MZ MG MW ZM SO ZW RW BI SS ER MU DJ KM",
    "015": "EG DZ MA TN LY",
    "017": "CD AO CM TD CF CG GA GQ",
    "018": "ZA LS NA BW SZ",
    "021": "US CA",
    "029": "HT CU DO JM TT",
    "030": "CN JP MN",
    "034": "IN PK BD IR AF NP LK BT MV",
    "035": "ID PH VN TH MM MY KH LA SG TL",
    "039": "IT ES GR PT RS HR AL SI MK MT",
    "053": "AU NZ",
    "054": "PG FJ",
    "143": "UZ KZ TJ KG TM",
    "145": "TR IQ SA YE SY JO AZ IL AE LB OM KW GE AM QA BH CY",
    "151": "RU PL UA RO CZ HU BY SK MD",
    "154": "GB SE DK FI IE LT LV EE IS",
    "155": "DE FR NL BE AT CH LU",
}

Row = dict[str, object]
Entity = tuple[str, str]  # (kind, CLDR code): ("territory", "KE"), ("currency", "KES"), ("weekday", "0") ...


@dataclass(frozen=True)
class Fact:
    """`answers` are the entities that are true, the main one first; all are of one kind, the relation's."""

    relation: str
    country: str
    answers: tuple[Entity, ...]

    @property
    def key(self) -> str:
        """The same in every language."""
        return f"{self.relation}:{self.country}"


@dataclass(frozen=True)
class World:
    """`names[lang][entity]` for English and every target language; facts and entities in a fixed order."""

    names: dict[str, dict[Entity, str]]
    facts: tuple[Fact, ...]
    countries: tuple[Entity, ...]
    shared_answers: tuple[Entity, ...]  # main answers of more than one fact


@dataclass(frozen=True)
class Atlas:
    """Rows of each split: instruction, output, lang, relation, fact, answers, and instruction_en in target languages.

    `warmup` rows are without instruction_en, `pairs` rows are instruction, instruction_en, lang and fact alone.
    """

    train: list[Row]
    dev: list[Row]
    test: list[Row]
    warmup: list[Row]
    pairs: list[Row]


# ---------------------------------------------------------------------------------------------------------- the world


def _currencies(country: str) -> list[Entity]:
    """Legal tender of today. Where there are two, the country's own (its code opens with the country's) is the main."""
    spans = get_global("territory_currencies")[country]
    codes = [code for code, _, end, tender in spans if tender and end is None]
    return [("currency", code) for code in sorted(codes, key=lambda code: (not code.startswith(country), code))]


def _languages(country: str) -> list[Entity]:
    """National official languages, the most spoken first; a language in two scripts counts once."""
    share: dict[str, float] = {}
    for code, use in get_global("territory_languages")[country].items():
        if use["official_status"] in ("official", "de_facto_official"):
            base = code.split("_")[0]
            share[base] = max(share.get(base, 0.0), use["population_percent"])
    return [("language", code) for code in sorted(share, key=lambda code: (-share[code], code))]


def _regions(country: str) -> list[Entity]:
    return [("territory", region) for region, members in REGIONS.items() if country in members.split()]


def _names(lang: str) -> dict[Entity, str]:
    locale = Locale(lang)
    tables = {
        "territory": locale.territories,
        "currency": locale.currencies,
        "language": locale.languages,
    }
    return {
        (kind, code): unicodedata.normalize("NFC", name)
        for kind, table in tables.items()
        for code, name in table.items()
        if name != code
    }


def load_world(languages: tuple[str, ...] = LANGUAGES, num_territories: int = 64) -> World:
    """The first `num_territories` of COUNTRIES and what CLDR says about them.

    A fact is kept when its main answer has a name in every language; further answers without one are dropped.
    """
    unknown = sorted(set(languages) - set(PHRASES) | set(languages) & {"en"})
    if unknown or not languages:
        raise ValueError(f"atlas: no templates for target languages {unknown}; choose from {', '.join(LANGUAGES)}")
    if not 20 <= num_territories <= len(COUNTRIES):
        raise ValueError(f"atlas: num_territories is {num_territories}; it must be 20 to {len(COUNTRIES)}")
    names = {lang: _names(lang) for lang in ("en", *languages)}
    facts = []
    for country in COUNTRIES[:num_territories]:
        for relation, find in (("currency", _currencies), ("language", _languages), ("region", _regions)):
            found = find(country)
            named = tuple(answer for answer in found if all(answer in table for table in names.values()))
            if found and named[:1] == (found[0],):
                facts.append(Fact(relation, country, named))
    uses = Counter(fact.answers[0] for fact in facts)
    shared = sorted(answer for answer, count in uses.items() if count > 1)
    countries = [("territory", country) for country in COUNTRIES[:num_territories]]
    return World(names, tuple(facts), tuple(countries), tuple(shared))


# ------------------------------------------------------------------------------------------------------------- splits


def split_facts(
    facts: Iterable[Fact], rng: random.Random, test_share: float, dev_share: float, max_per_answer: int
) -> dict[str, str]:
    """Key of a fact -> "train", "dev" or "test": what the target languages may see of it.

    Of each relation `test_share` and `dev_share` of the facts, or fewer: in neither part is an entity a right answer to
    more than `max_per_answer` facts, or half the languages asked for would be English and French; and
    MIN_TRAINING_FACTS with the same answer stay in training.
    """
    facts = list(facts)
    split = {fact.key: "train" for fact in facts}
    for relation in RELATIONS:
        candidates = [fact for fact in facts if fact.relation == relation]
        left = Counter(fact.answers[0] for fact in candidates)
        rng.shuffle(candidates)
        for part, share in (("test", test_share), ("dev", dev_share)):
            quota = round(share * len(candidates))
            taken: Counter[Entity] = Counter()
            for fact in candidates:
                crowded = any(taken[answer] >= max_per_answer for answer in fact.answers)
                spare = left[fact.answers[0]] > MIN_TRAINING_FACTS
                if quota and spare and not crowded and split[fact.key] == "train":
                    quota -= 1
                    split[fact.key] = part
                    left[fact.answers[0]] -= 1
                    taken.update(fact.answers)
    return split


# --------------------------------------------------------------------------------------------------------------- rows


def fact_row(world: World, fact: Fact, lang: str, phrasing: int) -> Row:
    """The fact asked and answered in `lang` by template `phrasing`; in target languages with the English question."""
    names, country = world.names[lang], ("territory", fact.country)
    answers = [names[answer] for answer in fact.answers]
    row: Row = {
        "instruction": PHRASES[lang][fact.relation][phrasing].format(x=names[country]),
        "output": answers[0],
    }
    if lang != "en":
        row["instruction_en"] = PHRASES["en"][fact.relation][phrasing].format(x=world.names["en"][country])
    return row | {"lang": lang, "relation": fact.relation, "fact": fact.key, "answers": answers}


def name_row(world: World, entity: Entity, lang: str, phrasing: int) -> Row:
    """The dictionary, into `lang`: what is this English name called in your language?"""
    english, name = world.names["en"][entity], world.names[lang][entity]
    return {
        "instruction": PHRASES[lang]["name"][phrasing].format(x=english),
        "output": name,
        "instruction_en": PHRASES["en"]["name"][phrasing].format(x=english, lang=world.names["en"]["language", lang]),
        "lang": lang,
        "relation": "name",
        "fact": f"name:{entity[0]}:{entity[1]}",
        "answers": [name],
    }


def gloss_row(world: World, entity: Entity, lang: str, phrasing: int) -> Row:
    """The dictionary, out of `lang`: an English row, what is this foreign name in English?"""
    english, name = world.names["en"][entity], world.names[lang][entity]
    return {
        "instruction": PHRASES["en"]["gloss"][phrasing].format(x=name, lang=world.names["en"]["language", lang]),
        "output": english,
        "lang": "en",
        "relation": "gloss",
        "fact": f"gloss:{lang}:{entity[0]}:{entity[1]}",
        "answers": [english],
    }


def _turns(start: int, count: int) -> Iterator[int]:
    """`count` phrasings in rotation, so that every template meets every kind of fact."""
    return ((start + turn) % PHRASINGS for turn in range(count))


def build_atlas(
    seed: int,
    languages: tuple[str, ...] = LANGUAGES,
    *,
    num_territories: int = 64,
    test_share: float = 0.25,
    dev_share: float = 0.05,
    max_per_answer: int = 3,
    phrasings: int = 3,
    test_phrasings: int = 2,
    warmup_repeats: int = 3,
    num_pairs: int = 1200,
) -> Atlas:
    """All rows, the same on every machine for a seed (nothing here depends on hash order).

    train   English: every fact, held out or not, in all parallel phrasings, and the glosses. Target languages: the
            training facts, in `phrasings` of them, or in one if no other fact has the same answer; the dictionary.
    dev     the dev facts in every target language, one phrasing.
    test    the test facts in every target language, in `test_phrasings`.
    warmup  what makes the base model English-centric: all facts in the English phrasings that `train` does not use, and
            the glosses, `warmup_repeats` times; about a sixth of the rows is the dictionary.
    pairs   parallel prompts of training facts, for the Transform Matrix: instruction, instruction_en, lang, fact.
    """
    for name, value in (("phrasings", phrasings), ("test_phrasings", test_phrasings)):
        if not 1 <= value <= PHRASINGS:
            raise ValueError(f"atlas: {name} is {value}; it must be 1 to {PHRASINGS}")
    world = load_world(languages, num_territories)
    rng = random.Random(seed)
    split = split_facts(world.facts, rng, test_share, dev_share, max_per_answer)
    parts: dict[str, list[Row]] = defaultdict(list)
    every_pair: list[Row] = []
    for shift, lang in enumerate(languages):
        for f, fact in enumerate(world.facts):
            part = split[fact.key]
            shared = fact.answers[0] in world.shared_answers
            count = {"train": phrasings if shared else 1, "dev": 1, "test": test_phrasings}[part]
            parts[part] += [fact_row(world, fact, lang, turn) for turn in _turns(f + shift, count)]
            if part == "train":
                every_pair += [fact_row(world, fact, lang, turn) for turn in range(PHRASINGS)]
        for e, entity in enumerate(world.shared_answers):
            parts["name"] += [name_row(world, entity, lang, turn) for turn in _turns(e + shift, PHRASINGS)]
        for e, entity in enumerate(world.countries):
            parts["gloss"] += [gloss_row(world, entity, lang, turn) for turn in _turns(e + shift, 1)]
    english = [fact_row(world, fact, "en", turn) for fact in world.facts for turn in range(2 * PHRASINGS)]
    parallel = [row for i, row in enumerate(english) if i % (2 * PHRASINGS) < PHRASINGS]
    other = [row for i, row in enumerate(english) if i % (2 * PHRASINGS) >= PHRASINGS]
    train = parallel + parts["gloss"] + parts["train"] + parts["name"][::PHRASINGS]
    warmup = (other + parts["gloss"]) * warmup_repeats + parts["name"]
    for rows in (train, warmup, every_pair):
        rng.shuffle(rows)
    pairs = [{key: row[key] for key in ("instruction", "instruction_en", "lang", "fact")} for row in every_pair]
    plain = [{key: value for key, value in row.items() if key != "instruction_en"} for row in warmup]
    return Atlas(train, parts["dev"], parts["test"], plain, pairs[:num_pairs])


def majority_baseline(atlas: Atlas) -> dict[str, float]:
    """Exact match, per target language, of always giving a relation's most frequent training answer."""
    seen: dict[tuple[object, object], Counter[object]] = defaultdict(Counter)
    for row in atlas.train:
        seen[row["lang"], row["relation"]][row["output"]] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in atlas.test:
        counts = seen[row["lang"], row["relation"]]
        guess = min(counts, key=lambda name: (-counts[name], str(name)))
        hits[str(row["lang"])].append(guess in row["answers"])
    return {lang: sum(right) / len(right) for lang, right in hits.items()}


def write_atlas(atlas: Atlas, folder: str | Path) -> None:
    """One `<split>.jsonl` per split, UTF-8, one row a line."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(atlas, name)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
