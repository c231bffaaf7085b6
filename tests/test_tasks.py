"""The six tasks: rebuilt byte by byte, disjoint, with fair floors; scorers that nothing
harms; known words."""

import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from itertools import islice

import pytest
from tolerance import printed

from minipeft.lanternwick import (
    HERE,
    documents,
    labels,
    phrases,
    queries,
    scoring,
    tasks,
    voices,
    words,
)
from minipeft.lanternwick.register import register
from minipeft.lanternwick.tasks import SIZES, TASKS, Example, load_task, make_task

ALL = {name: load_task(name) for name in TASKS}
every = pytest.mark.parametrize("name", TASKS)


class TestFiles:
    """Splits, sizes and forms."""

    @every
    def test_committed_file_is_what_the_seed_gives(self, name):
        committed = (HERE / "tasks" / f"{name}.jsonl").read_bytes()
        rebuilt = tasks.as_jsonl(make_task(name)).encode()
        assert (
            hashlib.sha256(committed).hexdigest() == hashlib.sha256(rebuilt).hexdigest()
        )

    @every
    def test_splits_are_disjoint_by_construction(self, name):
        task = ALL[name]
        splits = {split: getattr(task, split) for split in SIZES}
        keys = {
            split: {json.dumps(e.meta["key"]) for e in examples}
            for split, examples in splits.items()
        }
        assert (
            not keys["train"] & keys["valid"]
            and not keys["train"] & keys["test"]
            and not keys["valid"] & keys["test"]
        )
        prompts = [e.prompt for examples in splits.values() for e in examples]
        assert len(prompts) == len(set(prompts))
        # not luck: the key's hash decides, so no draw could have put it elsewhere
        if name != "newcomers":
            for split, examples in splits.items():
                assert {phrases.split_of(name, *e.meta["key"]) for e in examples} == {
                    split
                }

    @every
    def test_sizes_lengths_and_form(self, name):
        task = ALL[name]
        assert (
            len(task.train) >= 2400 and len(task.valid) == 200 and len(task.test) >= 300
        )
        for e in task.train + task.valid + task.test:
            assert (
                e.prompt == e.prompt.rstrip()
                and re.match(r" \S", e.completion)
                and e.completion.isascii()
            )
            assert len(re.findall(r"\w+|[^\w\s]+", e.prompt + e.completion)) <= 65


class TestScores:
    """Gold, nothing, and the best constant answer."""

    @every
    def test_gold_scores_full_and_nothing_scores_nothing(self, name):
        task = ALL[name]
        gold = task.score([e.completion for e in task.test], task.test)
        assert next(iter(gold)) == task.metric and set(gold.values()) == {100.0}
        for empty in ("", "\N{SNOWMAN} \x00 \ud800 '\"{[("):
            assert set(task.score([empty] * 20, task.test[:20]).values()) == {0.0}
        with pytest.raises(ValueError):
            task.score(["one too few"], task.test[:2])

    @every
    def test_floor_is_what_the_best_constant_answer_scores(self, name):
        task = ALL[name]
        assert task.floor <= (17 if name == "mood" else 5)
        common = [
            said for said, _ in Counter(e.completion for e in task.test).most_common(5)
        ]
        best = max(
            task.score([said] * len(task.test), task.test)[task.metric]
            for said in common
        )
        assert best <= task.floor + printed(2)
        if name in ("mood", "extract", "voice", "records"):
            assert best == pytest.approx(task.floor, abs=printed(2))

    def test_other_scorers_on_half_right_answers(self):
        gold = [Example("", f" {labels.label('Mara', 'grey lantern', 'quay')}", {})]
        assert (
            scoring.extract(
                ['{ "where": "quay",\n "who": "Mara", "what": "grey lantern" }'], gold
            )["json"]
            == 100
        )
        assert scoring.extract([labels.label("Mara", "grey lantern", "inn")], gold) == {
            "json": 0,
            "fields": 66.67,
        }
        for bad in (
            "[1]",
            "null",
            '"Mara"',
            "{",
            "[" * 100_000,
            labels.label("Mara", "grey lantern", "quay") + " and",
        ):
            assert scoring.extract([bad], gold) == {"json": 0, "fields": 0}
        gold = [Example("", " a baker.", {"value": "baker"})]
        assert scoring.newcomers(["baker"], gold) == {"recall": 100, "exact": 0}
        assert scoring.newcomers(["a bakery."], gold)["recall"] == 0
        # guessing all is no answer
        assert scoring.newcomers([" ".join(words.TRADES[::-1])], gold)["recall"] == 0
        gold = [
            Example(
                "", " Arr, me vessel be wet.", {"slots": ["me", "vessel", "be", "wet"]}
            )
        ]
        half = scoring.text(["Arr, my vessel is wet."], gold)
        assert half["exact"] == 0 and half["coverage"] == 50 and 0 < half["bleu"] < 100
        assert scoring.mood([" Glad. "], [Example("", " glad", {})]) == {
            "accuracy": 100
        }
        # several references, as E2E has
        assert scoring.bleu(["a b c d e"], [["x y", "a b c d e"]]) == 100


class TestContent:
    """What a task asks for."""

    def test_mood_labels_are_balanced_and_one_cue_is_not_enough(self):
        for split in SIZES:
            counts = Counter(e.completion.strip() for e in getattr(ALL["mood"], split))
            assert (
                set(counts) == set(words.MOODS)
                and max(counts.values()) - min(counts.values()) <= 4
            )
        # naive Bayes over single words stays far below what the task allows: it cannot
        # tell whose event came last
        seen = {mood: Counter() for mood in words.MOODS}
        for e in ALL["mood"].train:
            seen[e.completion.strip()].update(set(re.findall(r"\w+", e.prompt)))

        def odds(e, mood):
            return sum(
                math.log((seen[mood][w] + 1) / 402)
                for w in set(re.findall(r"\w+", e.prompt))
            )

        guesses = [
            max(words.MOODS, key=lambda mood: odds(e, mood)) for e in ALL["mood"].test
        ]
        assert ALL["mood"].score(guesses, ALL["mood"].test)["accuracy"] < 60

    def test_the_captain_the_clerk_and_the_parrot(self):
        assert (
            voices.captain("The boat is on the quay.")
            == "Arr, th' vessel be on th' quay."
        )
        assert (
            voices.captain("Mara, are you my friend?") == "Ahoy, Mara, be ye me matey?"
        )
        assert (
            voices.clerk("Your red hat is on the floor!") == "Noted: red hat on floor."
        )
        assert voices.parrot("My boat!") == "Awk! My boat!"
        rng = random.Random(1)
        for _ in range(500):
            sentence = voices.sentence(rng)[0]
            assert len(sentence.split()) <= 10 and voices.captain(sentence) != sentence
        used = Counter(
            word
            for e in ALL["voice"].train
            for word in re.findall(r"[\w']+", e.prompt.split(":")[1].lower())
        )
        assert all(used[word] >= 20 for word in voices.LEXICON)

    def test_the_log_and_the_labels_do_not_teach_the_tasks(self):
        rng = random.Random(2)
        for _ in range(300):
            assert "?" not in queries.document(rng)
            assert queries.register_rows(queries.draw(rng).sql) is not None
            for line in re.findall(r"\{.*?\}", labels.document(rng)):
                assert list(json.loads(line)) == ["who", "what", "where"]
        text = " ".join(doc.text for doc in islice(documents.stream(3), 2000))
        for mark in ("SQL:", "As data:", "Mood:", "Text:", "Told again:\\s", "Record:"):
            assert not re.search(rf"(?<!\w){mark}", text), mark

    def test_every_word_that_a_task_must_say_is_in_the_pretraining_text(self):
        def pieces(text):
            return re.findall(r"\w+|[^\w\s]+", text)

        rng = random.Random(4)
        texts = [doc.text for doc in islice(documents.stream(4), 5000)]
        texts += [
            make(rng)
            for make in (voices.document, queries.document, labels.document)
            for _ in range(2000)
        ]
        told = Counter(piece for text in texts for piece in pieces(text))
        lists = (
            words.GENDER,
            words.SURNAMES,
            words.THINGS,
            words.PLACES,
            words.PET_NAMES,
            *words.ADJECTIVES.values(),
        )
        listed = {word for group in lists for entry in group for word in entry.split()}
        for name, task in ALL.items():
            said = Counter(
                piece
                for e in task.train + task.valid + task.test
                for piece in pieces(e.completion)
            )
            missing = {
                piece
                for piece in said
                if not told[piece] and piece not in listed and not piece.isdigit()
            }
            assert not missing, (name, missing)

    def test_newcomers_are_strangers(self):
        for person, facts in tasks.newcomers().items():
            assert person.split()[0] not in register().by_name and len(facts) == 8
        assert len(tasks.newcomers()) == 40

    def test_unknown_task_is_named_with_the_nearest(self):
        with pytest.raises(ValueError, match="'voices'.*did you mean 'voice'"):
            load_task("voices")


HOSTILE = [
    "DROP TABLE residents",
    "DELETE FROM residents",
    "UPDATE residents SET age = 1",
    "INSERT INTO prices VALUES ('x', 1, 'y')",
    "CREATE TABLE t (a)",
    "ATTACH DATABASE 'stolen.db' AS s",
    "PRAGMA writable_schema = 1",
    "PRAGMA table_info(residents)",
    "VACUUM INTO 'copy.db'",
    "SELECT load_extension('x')",
    "SELECT name FROM residents; DROP TABLE residents",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "BEGIN; SELECT 1",
    "",
    ";",
    "-- nothing",
    (
        "SELECT COUNT(*) FROM residents a, residents b, residents c, residents d,"
        " residents e, residents f"
    ),
    "SELECT a.name FROM residents a, residents b, residents c",
    "SELECT zeroblob(1000000000)",
    "SELECT randomblob(100000000)",
    "SELECT " + "(" * 500 + "1" + ")" * 500,
    "SELECT '" + "x" * 100_000 + "'",
    "SELECT name FROM nowhere",
    "SELECT \x00 name",
    "SELECT CAST(x'ff' AS TEXT)",
    (
        "SELECT replace(hex(replace(hex(name), '3', name)), '4', name) FROM residents,"
        " animals, prices"
    ),
]


class TestSql:
    """Queries and their answers."""

    def test_sql_gold_answers_are_neither_empty_nor_trivial(self):
        answers = [scoring.answer(e.completion) for e in ALL["sql"].test]
        dull = [a for a in answers if not a or a[0][0] in (None, 0, 1) or a == [("",)]]
        assert len(dull) < 0.05 * len(answers)
        assert Counter(repr(sorted(a)) for a in answers).most_common(1)[0][
            1
        ] < 0.05 * len(answers)

    @pytest.mark.parametrize("sql", HOSTILE)
    def test_hostile_sql_scores_zero_and_harms_nothing(
        self, sql, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        before = hashlib.sha256((HERE / "register.sqlite").read_bytes()).hexdigest()
        gold = [Example("", " SELECT name FROM residents WHERE trade = 'baker' ;", {})]
        assert scoring.sql([sql], gold) == {"execution": 0.0, "exact": 0.0}
        assert not list(tmp_path.iterdir())
        assert (
            hashlib.sha256((HERE / "register.sqlite").read_bytes()).hexdigest()
            == before
        )
        assert scoring.sql([gold[0].completion], gold)["execution"] == 100.0

    def test_sql_is_judged_by_its_answer(self):
        same = scoring.same_answer
        gold = "SELECT name FROM residents WHERE trade = 'baker' ;"
        # any order will do
        assert same(
            "select name from residents where 'baker' = trade order by age desc", gold
        )
        assert not same("SELECT name, age FROM residents WHERE trade = 'baker'", gold)
        assert not same(gold.replace(";", f"UNION ALL {gold}"), gold)  # every row twice
        ordered = "SELECT age FROM residents ORDER BY age ;"
        assert same("SELECT age FROM residents ORDER BY 1", ordered)
        assert not same("SELECT age FROM residents ORDER BY age DESC", ordered)


class TestSqlLimits:
    """A query that a model wrote takes no more than its share of time and memory."""

    LONG = (
        "(SELECT group_concat(a.name) FROM residents a, (SELECT 1 FROM pets LIMIT 5))"
    )
    CROSS = "residents a, residents b, residents c, residents d, residents e"

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT printf('%.*c', 2147483000, 'x')",
            "SELECT length(PRINTF('%2147483000d', 1))",
            "SELECT format('%.*f', 2000000000, 1.5)",
            "SELECT hex(zeroblob(1000000000))",
            f"SELECT a.name FROM {CROSS} ORDER BY a.name || b.name || c.name || d.name",
            f"SELECT DISTINCT a.name || b.name || c.name || d.name FROM {CROSS}",
            f"SELECT count(*) FROM {CROSS}",
            f"SELECT group_concat(a.name) FROM {CROSS}",
            f"SELECT count(*) FROM {CROSS} WHERE {LONG} LIKE '%a%e%i%o%u%z%q'",
            f"SELECT replace({LONG}, 'a', {LONG})",
            f"SELECT {', '.join([LONG] * 40)} FROM residents",
            "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t)"
            " SELECT count(*) FROM t",
        ],
    )
    def test_what_never_ends_is_stopped(self, sql):
        started = time.process_time()
        assert scoring.answer(sql) is None
        assert time.process_time() - started < 1.0  # its 0.5 s, and what surrounds it

    def test_a_large_answer_is_refused(self):
        assert scoring.answer(f"SELECT name, {self.LONG} FROM residents") is None or (
            sum(len(str(row)) for row in scoring.answer(f"SELECT {self.LONG}")) < 10_100
        )

    @pytest.mark.parametrize(
        "sql, expected",
        [
            ("SELECT upper('a') || lower('B') || trim(' c ')", [("Abc",)]),
            ("SELECT coalesce(NULL, round(2.5), 1)", [(3.0,)]),
            ("SELECT substr('miller', 1, 4), length('miller')", [("mill", 6)]),
            ("SELECT 1 WHERE 'miller' LIKE 'mill%'", [(1,)]),
            ("SELECT CAST('9' AS INTEGER) + abs(-1)", [(10,)]),
        ],
    )
    def test_ordinary_functions_work(self, sql, expected):
        assert scoring.answer(sql) == expected
