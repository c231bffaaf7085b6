"""How answers are judged, each task in its own way.

Pure functions: (predictions, examples) -> {metric: 0..100}, the task's metric first.
"""

import functools
import json
import re
import sqlite3
import time
from collections import Counter

from .register import register

# no write, ATTACH, PRAGMA, recursion
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
# Functions whose work is bounded by their arguments' lengths. printf, for one, counts
# to any number within a single step, where no time limit can stop it.
_FUNCTIONS = set(
    "abs avg coalesce concat concat_ws count date datetime glob group_concat ifnull iif"
    " instr julianday length like likelihood likely lower ltrim max min nullif"
    " quote replace round rtrim sign strftime string_agg substr substring sum time"
    " total trim typeof unicode unlikely upper".split()
)
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 5_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 50,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
}
_CHARACTERS = 1_000_000  # of a whole answer


def _may(action, first, second, *_):
    is_function = action == sqlite3.SQLITE_FUNCTION
    good = action in _ALLOWED and (not is_function or second.lower() in _FUNCTIONS)
    return sqlite3.SQLITE_OK if good else sqlite3.SQLITE_DENY


def answer(sql, seconds=0.5, rows=1000):
    """The rows that the register gives to one SELECT, or None: not SQL, not allowed,
    too slow or too long.

    The file is opened read-only, an authorizer lets only reading and bounded functions
    through, and a progress handler stops what takes more than `seconds` of processor
    time (a busy machine changes no score)."""
    database = register().sqlite()
    try:
        for limit, value in _LIMITS.items():
            database.setlimit(limit, value)
        database.set_authorizer(_may)
        end = time.thread_time() + seconds
        # a true value stops the query
        database.set_progress_handler(lambda: time.thread_time() > end, 1000)
        cursor = database.execute(sql)
        found = []
        characters = 0
        for row in cursor:
            found.append(row)
            characters += sum(len(v) for v in row if isinstance(v, (str, bytes)))
            if len(found) > rows or characters > _CHARACTERS:
                return None
        return found if cursor.description else None
    # Warning: two statements, in Python 3.11
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
        return None
    finally:
        database.close()


@functools.lru_cache(maxsize=4096)
def _gold_answer(sql):
    return answer(sql, seconds=10)


def same_answer(sql, gold):
    """Does `sql` give the rows of `gold`, in any order, or in gold's order where gold
    asks for one?"""
    ours, theirs = answer(sql), _gold_answer(gold)
    if ours is None or theirs is None:
        return False
    return ours == theirs if " ORDER BY " in gold else Counter(ours) == Counter(theirs)


def plain(text):
    """White space at the ends and between words does not count."""
    return " ".join(text.split())


def percent(hits):
    hits = [float(hit) for hit in hits]
    return round(100 * sum(hits) / max(len(hits), 1), 2)


def _exact(predictions, examples):
    return percent(
        plain(p) == plain(e.completion)
        for p, e in zip(predictions, examples, strict=True)
    )


def holds(text, phrase):
    """Does the phrase stand in the text as whole words?"""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", plain(text)) is not None


def bleu(predictions, references):
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, from 0 to 100. `references`: per
    prediction a text, or a list of texts."""
    return by_sacrebleu("corpus_bleu", predictions, references)


def chrf(predictions, references):
    """Corpus chrF (Popović 2015) by sacrebleu, from 0 to 100: an F-score of pieces of
    one to six letters. Arguments as in `bleu`."""
    return by_sacrebleu("corpus_chrf", predictions, references)


def by_sacrebleu(score, predictions, references):
    try:
        import sacrebleu  # two of six tasks need it
    except ImportError as error:
        raise ImportError(
            "BLEU needs sacrebleu: pip install 'minipeft[course]'"
        ) from error

    if not predictions:
        return 0.0
    references = [[r] if isinstance(r, str) else list(r) for r in references]
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    texts = [plain(p) for p in predictions]
    return round(getattr(sacrebleu, score)(texts, streams).score, 2)


def mood(predictions, examples):
    said = [plain(p).lower().rstrip(".") for p in predictions]
    return {
        "accuracy": percent(
            s == plain(e.completion) for s, e in zip(said, examples, strict=True)
        )
    }


def text(predictions, examples):
    """Exact match, the share of the slots (`meta["slots"]`) that are said, BLEU."""
    return {
        "exact": _exact(predictions, examples),
        "coverage": percent(
            holds(p, slot)
            for p, e in zip(predictions, examples)
            for slot in e.meta["slots"]
        ),
        "bleu": bleu(predictions, [plain(e.completion) for e in examples]),
    }


def sql(predictions, examples):
    pairs = zip(predictions, examples, strict=True)
    return {
        "execution": percent(
            same_answer(p.strip(), e.completion.strip()) for p, e in pairs
        ),
        "exact": _exact(predictions, examples),
    }


def _parsed(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def extract(predictions, examples):
    """Equal JSON, whatever its spacing and order; and the share of single fields that
    are right."""
    pairs = [
        (_parsed(p), json.loads(e.completion))
        for p, e in zip(predictions, examples, strict=True)
    ]
    return {
        "json": percent(ours == gold for ours, gold in pairs),
        "fields": percent(
            ours.get(key) == gold[key] for ours, gold in pairs for key in gold
        ),
    }


def newcomers(predictions, examples):
    """Recall: the fact (`meta["value"]`) is said in the first sentence, within ten
    words: guessing all is no answer."""
    first = [
        " ".join(re.split(r"[.\n]", p.strip())[0].split()[:10]) for p in predictions
    ]
    return {
        "recall": percent(
            holds(p, e.meta["value"]) for p, e in zip(first, examples, strict=True)
        ),
        "exact": _exact(predictions, examples),
    }
