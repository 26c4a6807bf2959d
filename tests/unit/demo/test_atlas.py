"""The Atlas: the same on every machine, true in every language alike, and no held-out fact in what is trained on."""

from __future__ import annotations

import hashlib
import json
import os
import string
import subprocess
import sys
from collections import Counter

import pytest

from cc_ds.demo import atlas as atlas_module
from cc_ds.demo.atlas import LANGUAGES, RELATIONS, SPLITS, build_atlas, load_world, majority_baseline, write_atlas
from cc_ds.demo.phrases import PHRASES, PHRASINGS
from cc_ds.demo.phrases import RELATIONS as ASKED

DIGEST = """
import hashlib, json
from cc_ds.demo.atlas import SPLITS, build_atlas
atlas = build_atlas(3)
print(hashlib.sha256(json.dumps([getattr(atlas, s) for s in SPLITS]).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def atlas():
    return build_atlas(0)


@pytest.fixture(scope="module")
def world():
    return load_world()


def target(rows):
    return [row for row in rows if row["lang"] != "en"]


def test_the_same_for_a_seed_whatever_the_hash_seed(tmp_path):
    here = build_atlas(3)
    expected = hashlib.sha256(json.dumps([getattr(here, split) for split in SPLITS]).encode()).hexdigest()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected
    assert build_atlas(4).test != here.test


def test_held_out_facts_are_asked_in_no_training_row_of_a_target_language(atlas):
    for split in ("test", "dev"):
        held_out = {(row["fact"], row["lang"]) for row in getattr(atlas, split)}
        assert held_out
        for rows in (atlas.train, atlas.warmup, atlas.pairs):
            assert not held_out & {(row["fact"], row["lang"]) for row in rows}


def test_held_out_questions_and_answers_stand_nowhere_in_training_text(atlas, world):
    """By text, not by key: no phrasing of a held-out question, no row that names the country and gives the answer."""
    asked, states = set(), set()
    for row in atlas.test + atlas.dev:
        relation, country = row["fact"].split(":")
        name = world.names[row["lang"]]["territory", country]
        asked |= {template.format(x=name) for template in PHRASES[row["lang"]][relation]}
        states |= {(row["lang"], name, answer) for answer in row["answers"]}
    trained = atlas.train + atlas.warmup
    assert not asked & {row["instruction"] for row in trained + atlas.pairs}
    for row in target(trained):
        if row["relation"] != "name":  # name rows ask about an answer's English name, never about a country
            named = {entity[1] for entity in world.countries} & {row["fact"].split(":")[1]}
            country = world.names[row["lang"]]["territory", named.pop()]
            assert country in row["instruction"]
            assert (row["lang"], country, row["output"]) not in states


def test_english_states_every_held_out_fact(atlas):
    for rows in (atlas.train, atlas.warmup):
        english = {row["fact"] for row in rows if row["lang"] == "en"}
        assert {row["fact"] for row in atlas.test + atlas.dev} <= english


def test_warmup_is_english_heavy_and_names_no_fact_in_a_target_language(atlas):
    assert {row["relation"] for row in target(atlas.warmup)} == {"name"}
    assert 0.15 <= len(target(atlas.warmup)) / len(atlas.warmup) <= 0.20
    assert not any("instruction_en" in row for row in atlas.warmup)


def test_base_and_tuned_model_read_different_english_phrasings(atlas):
    base, tuned = (
        {r["instruction"] for r in rows if r["relation"] in RELATIONS} for rows in (atlas.warmup, atlas.train)
    )
    assert not base & tuned


def test_names_in_the_test_are_seen_in_their_language(atlas, world):
    outputs = {lang: Counter() for lang in LANGUAGES}
    for row in target(atlas.train):
        outputs[row["lang"]][row["output"], row["relation"]] += 1
    gloss = {
        (row["fact"].split(":")[1], row["fact"].split(":")[-1]): row for row in atlas.train if "gloss" in row["fact"]
    }
    for row in atlas.test:
        relation, country = row["fact"].split(":")
        assert outputs[row["lang"]][row["output"], relation] >= atlas_module.MIN_TRAINING_FACTS
        name = world.names[row["lang"]]["territory", country]
        assert name in row["instruction"] and name in gloss[row["lang"], country]["instruction"]
        assert gloss[row["lang"], country]["output"] == world.names["en"]["territory", country]


def test_facts_are_the_same_in_every_language(atlas, world):
    """Read each row's answers back through the names: one fact, one list of entities."""
    facts = {fact.key: fact.answers for fact in world.facts}
    back = {
        lang: {(kind, name): (kind, code) for (kind, code), name in table.items()}
        for lang, table in world.names.items()
    }
    seen = set()
    for row in atlas.train + atlas.dev + atlas.test + atlas.warmup:
        if row["relation"] in RELATIONS:
            entities = facts[row["fact"]]
            names = [world.names[row["lang"]][entity] for entity in entities]
            assert row["answers"] == names and row["output"] == names[0]
            assert [back[row["lang"]][entity[0], name] for entity, name in zip(entities, names, strict=True)] == list(
                entities
            )
            seen.add((row["fact"], row["lang"]))
    assert len(seen) == len(facts) * (1 + len(LANGUAGES))


@pytest.mark.parametrize(
    ("key", "lang", "answers"),
    [
        ("currency:KE", "sw", ["Shilingi ya Kenya"]),
        ("currency:DE", "ru", ["евро"]),
        ("currency:SN", "en", ["West African CFA Franc"]),
        ("language:BR", "th", ["โปรตุเกส"]),
        ("language:BE", "de", ["Niederländisch", "Französisch", "Deutsch"]),
        ("language:US", "tr", ["İngilizce"]),
        ("region:IN", "hi", ["दक्षिणी एशिया"]),
        ("region:EG", "ar", ["شمال أفريقيا"]),
        ("region:NG", "yo", ["Ìwọ̀ oorùn Afíríkà"]),
        ("region:AR", "es", ["Sudamérica"]),
    ],
)
def test_known_facts(world, key, lang, answers):
    fact = next(fact for fact in world.facts if fact.key == key)
    assert [world.names[lang][answer] for answer in fact.answers] == answers


def test_every_country_has_one_region_and_only_listed_countries_have():
    members = [country for countries in atlas_module.REGIONS.values() for country in countries.split()]
    assert Counter(members)["US"] == 1 and max(Counter(members).values()) == 1
    assert set(atlas_module.COUNTRIES) <= set(members)
    assert len(set(atlas_module.COUNTRIES)) == len(atlas_module.COUNTRIES)


def test_templates():
    assert set(PHRASES) == {"en", *LANGUAGES}
    for lang, by_relation in PHRASES.items():
        assert set(by_relation) == set(ASKED) | ({"gloss"} if lang == "en" else set())
        for relation, templates in by_relation.items():
            english_fact = lang == "en" and relation in RELATIONS
            assert len(set(templates)) == len(templates) == PHRASINGS * (2 if english_fact else 1)
            for template in templates:
                slots = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
                assert slots.count("x") == 1 and set(slots) <= ({"x", "lang"} if lang == "en" else {"x"})
                before = template[: template.index("{x}")]
                assert before == "" or before.endswith(" "), "a name is tokenised alike only after a space"


def test_target_rows_carry_the_parallel_english_question(atlas, world):
    for row in target(atlas.train) + atlas.dev + atlas.test:
        if row["relation"] in RELATIONS:
            country = row["fact"].split(":")[1]
            local = [
                t.format(x=world.names[row["lang"]]["territory", country])
                for t in PHRASES[row["lang"]][row["relation"]]
            ]
            english = PHRASES["en"][row["relation"]][local.index(row["instruction"])]
            assert row["instruction_en"] == english.format(x=world.names["en"]["territory", country])


def test_sizes_and_floor(atlas):
    per_language = Counter(row["lang"] for row in atlas.test)
    assert set(per_language) == set(LANGUAGES) and all(60 <= count <= 100 for count in per_language.values())
    assert {row["relation"] for row in atlas.test} == set(RELATIONS)
    assert len(atlas.pairs) >= 1000 and len(atlas.train) < 20000
    floor = majority_baseline(atlas)
    assert set(floor) == set(LANGUAGES) and max(floor.values()) < 0.3


def test_majority_baseline_by_hand():
    row = {
        "lang": "sw",
        "relation": "language",
        "fact": "language:KE",
        "instruction": "",
        "answers": ["a"],
        "output": "a",
    }
    train = [row, row, row | {"output": "b"}, row | {"lang": "de", "output": "b"}]
    test = [row | {"answers": ["c", "a"]}, row | {"answers": ["b"]}]
    assert majority_baseline(atlas_module.Atlas(train, [], test, [], [])) == {"sw": 0.5}


def test_write_atlas_round_trip(atlas, tmp_path):
    write_atlas(atlas, tmp_path / "new")
    for split in SPLITS:
        lines = (tmp_path / "new" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == getattr(atlas, split)


def test_what_a_user_can_get_wrong():
    with pytest.raises(ValueError, match=r"no templates for target languages \['xx'\]"):
        build_atlas(0, ("sw", "xx"))
    with pytest.raises(ValueError, match="en"):
        build_atlas(0, ("en",))
    with pytest.raises(ValueError, match="num_territories is 5"):
        build_atlas(0, num_territories=5)
    with pytest.raises(ValueError, match="phrasings is 9"):
        build_atlas(0, phrasings=9)
