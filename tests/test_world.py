"""Lanternwick: the same on every machine, consistent with itself, varied, and fair in
what it holds out."""

import itertools
import os
import random
import re
import sqlite3
import subprocess
import sys

import pytest

from minipeft.lanternwick import card, documents, grammar, register, words
from minipeft.lanternwick.documents import heldout_questions, leaks, sections, stream

STORIES = sections("stories")


@pytest.fixture(scope="module")
def sample():
    return list(itertools.islice(stream(11), 3000))


@pytest.fixture(scope="module")
def told():
    rng = random.Random(5)
    return [
        (skeleton, skeleton.render(rng, residents=i % 3 == 0))
        for skeleton in STORIES.values()
        for i in range(9)
    ]


class TestSeed:
    """The same bytes on every machine."""

    def test_hashes_are_those_of_the_card(self):
        assert card.hashes() == card.recorded()["sha256"], (
            "the world changed; if it was meant to: python -m"
            " minipeft.lanternwick.card, and commit the card"
        )

    def test_register_is_drawn_from_the_seed(self):
        assert register.draw() == register.register(), (
            "run python -m minipeft.lanternwick.register"
        )

    def test_stream_does_not_depend_on_hash_seed_or_locale(self):
        script = (
            "import itertools; from minipeft.lanternwick import card, documents as d;"
            "texts = (x.text for x in itertools.islice(d.stream(3), 200));"
            "print(card.sha(''.join(texts)))"
        )
        here = card.sha(
            "".join(document.text for document in itertools.islice(stream(3), 200))
        )
        env = {
            **os.environ,
            "PYTHONHASHSEED": "7",
            "LC_ALL": "C",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        out = subprocess.run(
            [sys.executable, "-c", script],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert out.strip() == here

    def test_streams_of_two_seeds_differ_and_do_not_repeat(self):
        first, second = (
            [d.text for d in itertools.islice(stream(seed), 300)] for seed in (1, 2)
        )
        assert not set(d for d in first if len(d) > 100) & set(second)
        assert len(set(first)) > 295


class TestRegister:
    """The town register."""

    def test_register_is_sound(self):
        town = register.register()
        assert (
            64
            == len(town.residents)
            == len(town.by_name)
            == len({person.pet_name for person in town.residents})
        )
        for person in town.residents:
            assert words.GENDER[person.name] == person.gender and (
                person.trade == "pupil"
            ) == (person.age < 15)
            assert (
                person.trade in (*words.TRADES, "pupil")
                and person.street in words.STREETS
                and person.pet in words.PETS
            )
        for table, column in (
            ("places", "keeper"),
            ("animals", "owner"),
            ("events", "organiser"),
            ("prices", "seller"),
        ):
            assert all(
                getattr(row, column) in town.by_name for row in town.tables()[table]
            )
        assert all(event.place in words.PLACES for event in town.events)

    def test_sqlite_holds_the_same_rows_and_cannot_be_written(self):
        town, connection = register.register(), register.register().sqlite()
        for name, rows in town.tables().items():
            assert connection.execute(f"SELECT * FROM {name}").fetchall() == [
                tuple(vars(row).values()) for row in rows
            ]
        connection.execute("PRAGMA query_only = OFF")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM residents")
        connection.close()

    def test_word_lists_do_not_overlap(self):
        names = [*words.WOMEN, *words.MEN, *words.SURNAMES, *words.PET_NAMES]
        assert len(names) == len(set(names)) and all(
            name.isascii() and name.isalpha() and name.istitle() for name in names
        )
        assert len(words.GENDER) >= 240 and len(words.SURNAMES) >= 150
        assert not {*words.TRADES} & {*words.PETS} and not {*words.THINGS} & {
            *words.PLACES
        }
        assert not {surname.lower() for surname in words.SURNAMES} & {*words.TRADES}


class TestStories:
    """Stories agree with themselves."""

    def test_skeletons_read_well(self, told):
        assert len(STORIES) >= 80
        bad = [
            f"{skeleton.where}: {message}"
            for skeleton, story in told
            for message in grammar.complaints(skeleton, story)
        ]
        assert not bad, bad[:5]

    def test_every_name_in_a_story_belongs_to_its_cast(self, told):
        for _, story in told:
            cast = {
                part
                for person in story.cast.values()
                for part in (person.name, person.surname)
            }
            streets = {word for street in words.STREETS for word in street.split()}
            names = set(re.findall(r"(?<=[a-z,] )[A-Z]\w+", story.text)) & set(
                words.GENDER
            )
            assert names <= cast | streets, (story.name, names - cast)

    def test_things_keep_their_adjective_and_everybody_appears(self, told):
        adjectives = {
            adjective for list_ in words.ADJECTIVES.values() for adjective in list_
        }
        for _, story in told:
            for adjective, noun in story.things.values():
                before = re.findall(rf"([a-z]+) {noun}\b", story.text)
                assert {word for word in before if word in adjectives} == {adjective}, (
                    story.name,
                    adjective,
                    noun,
                    before,
                )
            for person in story.cast.values():
                assert person.name in story.text, (story.name, person.name)
            assert all(
                story.text.index(phrase) < start for start, phrase in story.mentions()
            )

    def test_end_states_agree_with_the_answers(self, told):
        checked = 0
        for skeleton, story in told:
            moods = {(who, how) for who, what, how in story.end if what == "feels"}
            for question, answer in story.qa:
                if answer in words.MOODS:
                    asked = [
                        person.name
                        for person in story.cast.values()
                        if person.name in question
                    ]
                    assert any(
                        (who, answer) in moods for who in asked or dict(moods)
                    ), (skeleton.where, question, answer)
                    checked += 1
                if match := re.fullmatch(
                    r"Who has the (.+?) (?:now|at the end|in the end)\?", question
                ):
                    assert (match[1], "with", answer) in story.end, (
                        skeleton.where,
                        question,
                        answer,
                    )
                    checked += 1
        assert checked > 300

    def test_casts_come_from_the_register_or_are_strangers(self, told, sample):
        town = register.register().by_name
        stories = [story for _, story in told] + [
            d.meta["story"] for d in sample if d.kind in ("story", "questions")
        ]
        for story in stories:
            for person in story.cast.values():
                assert town.get(person.name, person) == person
        drawn = stories[len(told) :]
        residents = sum(story.cast["A"].name in town for story in drawn)
        # one story in five; four standard deviations
        assert abs(residents - len(drawn) / 5) < 4 * (0.2 * 0.8 * len(drawn)) ** 0.5
        assert not any(
            person.name in town
            for document in sample
            for person in document.meta.get("people", ())
        )


@pytest.fixture(scope="module")
def every_question():
    """All ways to ask for a resident's attributes: question -> (person, attribute,
    number of the phrasing)."""
    return {
        documents.question(None, person, attribute, number=number)[0]: (
            person,
            attribute,
            number,
        )
        for person in register.register().residents
        for attribute in documents.ATTRIBUTES
        for number in range(len(sections("facts")[attribute].questions))
    }


class TestDocuments:
    """Answers can be looked up, and facts are the register's."""

    def test_answers_stand_where_the_document_says(self, sample):
        for document in sample:
            for start, answer in document.meta.get("answers", ()):
                assert document.text[start : start + len(answer)] == answer

    def test_answers_about_strangers_can_be_looked_up(self, sample):
        asked = [
            (d, start, answer)
            for d in sample
            if d.kind in ("strangers", "notices", "dialogues", "roll")
            for start, answer in d.meta["answers"]
        ]

        def bare(answer):
            return re.sub(r"^((to|on|in|at|by) )?(the|an?) ", "", answer.lower())

        found = sum(
            bare(answer) in document.text[:start].lower()
            for document, start, answer in asked
        )
        assert found / len(asked) > 0.995 and len(asked) > 1500

    def test_facts_agree_with_the_register(self, sample, every_question):
        seen = 0
        for document in sample:
            for start, answer in (
                document.meta["answers"] if document.kind in ("facts", "quiz") else ()
            ):
                before = document.text[:start].rpartition("?")[0] + "?"
                for asked in (
                    before[word.start() :] for word in re.finditer(r"\b[A-Z]", before)
                ):
                    if asked in every_question:
                        person, attribute, _ = every_question[asked]
                        assert (
                            answer.lower() == str(getattr(person, attribute)).lower()
                        ), asked
                        seen += 1
        assert seen > 500

    def test_held_out_questions_never_occur_but_their_phrasings_do(
        self, sample, every_question
    ):
        rows = heldout_questions()
        assert len(rows) == 4 * 64 == len({row["question"] for row in rows})
        text = "\n".join(document.text for document in sample)
        assert not [row["question"] for row in rows if row["question"] in text]
        assert leaks(f"Ask: {rows[0]['question']} Say: ...") and not leaks(
            "Who is there?"
        )
        told = {
            (attribute, number)
            for asked, (_, attribute, number) in every_question.items()
            if asked in text
        }
        for row in rows:
            person, attribute, number = every_question[row["question"]]
            assert (attribute, number) in told, (
                f"nobody is ever asked {row['question']!r}"
            )
            assert row["answer"] == str(getattr(person, attribute))

    def test_text_is_varied(self):
        found, kept = card.diversity(4000), card.recorded()["diversity"]
        for measured in (found, kept):
            assert measured["commonest sentence frame, % of sentences"] < 1
            assert (
                measured["word types (names left out)"] >= 1500
                and measured["story skeletons"] >= 80
            )
        assert kept["story skeletons"] == found["story skeletons"]
        assert (
            found["distinct trigrams / trigrams"]
            > kept["distinct trigrams / trigrams"]
            > 0.1
        )

    def test_phases_name_known_kinds(self):
        for phase in documents.PHASES.values():
            assert phase.keys() <= documents.KINDS.keys()
        copying = documents.PHASES["copying"]
        assert (
            0.9
            < sum(copying[kind] for kind in documents.COPYING) / sum(copying.values())
            <= 0.97
        )


class TestGrammar:
    """Slips in a skeleton."""

    @pytest.mark.parametrize(
        "body, message",
        [
            ("- {A} sat down.", r"t\.txt:2: \{A\}: 'A' is not declared"),
            (
                "people: A\n- {A.hee} sat.",
                r"t\.txt:3: \{A\.hee\}: no form 'hee' \(did you mean 'he'\?\)",
            ),
            (
                "people: A(bakker)\n- {A} sat.",
                r"t\.txt:2: people: unknown 'bakker' \(did you mean 'baker'\?\)",
            ),
            ("people: A\n- {A} [sat|stood.", r"t\.txt:3: '\[' is never closed"),
            ("people: A\n- {A} sat] down.", r"t\.txt:3: a stray '\]'"),
            ("people: A B\n- {A} sat.", r"t\.txt:1: B is declared but not used"),
            (
                "people: A\nend: A merry\n- {A} sat.",
                r"t\.txt:3: end: cannot read 'A merry'",
            ),
            (
                "people: A\n- {A} sat.\n? Who sat",
                r"t\.txt:4: a question needs ' = answer'",
            ),
            ("people: A\n- {A} s\u00e4t.", r"t\.txt:3: not plain ASCII"),
            ("=== t\n", r"t\.txt:2: a second skeleton named 't'"),
        ],
    )
    def test_slips_in_a_skeleton_are_named(self, tmp_path, body, message):
        (tmp_path / "t.txt").write_text("=== t\n" + body, encoding="utf-8")
        with pytest.raises(grammar.GrammarError, match=message):
            grammar.parse(tmp_path / "t.txt")
