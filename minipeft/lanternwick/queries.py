"""SQL over the town register: one grammar of queries for the clerk's log (pretraining
text) and for the task `sql`.

The log shows how queries are written. What question a query answers is said nowhere in
it: the task teaches that.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

from .register import register

# table -> (what may be asked for, {what may be a condition: its operators})
COLUMNS = {
    "residents": (
        ("name", "age", "trade", "street", "pet", "likes"),
        {
            "trade": "=",
            "street": "=",
            "pet": "=",
            "likes": "=",
            "age": "<>",
            "surname": "=",
            "pet_name": "=",
        },
    ),
    "animals": (
        ("name", "age", "colour", "owner"),
        {"kind": "=", "colour": "=", "age": "<>", "owner": "="},
    ),
    "prices": (
        ("item", "seller", "price"),
        {"price": "<>", "seller": "=", "item": "="},
    ),
    "events": (
        ("event", "hour", "place", "organiser"),
        {"day": "=", "hour": "<>", "place": "=", "organiser": "="},
    ),
    "places": (("place", "keeper"), {"kind": "=", "built": "<>", "keeper": "="}),
}
# to order by
NUMBERS = {
    "residents": "age",
    "animals": "age",
    "prices": "price",
    "events": "hour",
    "places": "built",
}
# finds one row
UNIQUE = {
    "surname",
    "pet_name",
    "owner",
    "seller",
    "organiser",
    "keeper",
    "item",
    "place",
}
FORMS = (
    "plain",
    "plain",
    "plain",
    "count",
    "max",
    "min",
    "oldest",
    "youngest",
    "owners",
)


@dataclass(frozen=True)
class Query:
    table: str
    column: str  # what is asked for; "" when counting
    form: str  # one of FORMS
    # (column, operator, value), one or two
    where: tuple[tuple[str, str, str | int], ...]

    @property
    def sql(self):
        where = " AND ".join(
            f"{column} {sign} {repr(value)}" for column, sign, value in self.where
        )
        what = {
            "count": "COUNT(*)",
            "max": f"MAX({self.column})",
            "min": f"MIN({self.column})",
        }
        what = what.get(self.form, self.column)
        order = {"oldest": " DESC LIMIT 1", "youngest": " LIMIT 1"}.get(self.form)
        end = "" if order is None else f" ORDER BY {NUMBERS[self.table]}{order}"
        if self.form == "owners":  # the animals of certain people
            return (
                f"SELECT {self.column} FROM animals WHERE owner IN (SELECT name FROM"
                f" residents WHERE {where}) ;"
            )
        return f"SELECT {what} FROM {self.table} WHERE {where}{end} ;"

    @property
    def key(self):
        """What a split is drawn by: no shape with this first value is in two splits."""
        return [self.table, self.column, self.form, *self.where[0]]


@functools.cache
def _values():
    return {
        name: [vars(row) for row in rows] for name, rows in register().tables().items()
    }


def condition(rng, table, row, column):
    """A condition that the row meets: (column, operator, value)."""
    sign = rng.choice(COLUMNS[table][1][column])
    step = rng.randint(1, 5 if row[column] < 100 else 50) if sign != "=" else 0
    return (
        column,
        sign,
        row[column] + {"=": 0, "<": step, ">": -step}[sign] if step else row[column],
    )


def draw(rng):
    """A random query that at least one row answers."""
    table = rng.choice(
        ("residents",) * 4 + ("animals",) * 2 + ("prices", "events", "places")
    )
    form = rng.choice(FORMS)
    if form == "owners":
        table = "residents"
    elif table == "places" and form in ("oldest", "youngest"):
        form = "plain"  # a place without a year would come first
    row = rng.choice(_values()[table])
    free = [
        column
        for column in COLUMNS[table][1]
        if row[column] is not None
        and (form == "plain" or column not in UNIQUE)
        and (form != "owners" or column != "pet")
    ]
    chosen = rng.sample(
        free, min(len(free), rng.choice((1, 2)) if form in ("plain", "count") else 1)
    )
    if UNIQUE & set(chosen):
        # a second condition would add nothing
        chosen = [column for column in chosen if column in UNIQUE][:1]
    where = tuple(condition(rng, table, row, column) for column in chosen)
    asked = [column for column in COLUMNS[table][0] if column not in chosen]
    if form in ("oldest", "youngest"):
        asked = [column for column in asked if column != NUMBERS[table]]
    elif form in ("max", "min"):
        asked = [NUMBERS[table]] if NUMBERS[table] not in chosen else []
    elif form == "owners":
        asked = ["name", "colour", "kind"]
    elif form == "count":
        asked = [""]
    return Query(table, rng.choice(asked), form, where) if asked else draw(rng)


def document(rng):
    """A page of the clerk's log: queries, some asked again with one value changed, and
    how many rows came back."""
    query = draw(rng)
    opening = rng.choice(
        ("Day {0}.", "The clerk's log, day {0}.", "Day {0}, rain.", "Log of day {0}.")
    )
    lines = [opening.format(rng.randint(1, 365))]
    for _ in range(rng.randint(1, 3)):
        rows = len(register_rows(query.sql))
        ask = rng.choice(
            (
                "The clerk asked the register: {0}",
                "Asked: {0}",
                "He wrote {0}",
                "{0}",
                "Next: {0}",
            )
        )
        gave = rng.choice(
            ("It gave {0}.", "{0} came back.", "Answer: {0}.", "The register gave {0}.")
        )
        lines.append(
            f"{ask.format(query.sql)}"
            f" {gave.format('1 row' if rows == 1 else f'{rows} rows')}"
        )
        if rng.random() < 0.5:
            table, column = query.table, query.where[0][0]
            row = rng.choice(
                [row for row in _values()[table] if row[column] is not None]
            )
            query = replace(
                query, where=(condition(rng, table, row, column), *query.where[1:])
            )
        else:
            query = draw(rng)
    return "\n".join(lines)


def matching(query):
    """How many rows meet the query's conditions."""
    return register_rows(replace(query, form="count").sql)[0][0]


@functools.lru_cache(maxsize=4096)
def register_rows(sql):
    """The register's rows for one of our own queries, over a new connection: SQLite's
    belong to one thread."""
    with contextlib.closing(register().sqlite()) as database:
        return database.execute(sql).fetchall()
