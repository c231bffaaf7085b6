"""The town register: who lives in Lanternwick, with what animals, what happens when,
and what things cost.

`python -m minipeft.lanternwick.register` draws it from the seed and writes
register.json and register.sqlite.
"""

import functools
import json
import os
import random
import sqlite3
from dataclasses import asdict, dataclass, fields

from . import HERE, SEED, words

PUPILS, TRADE_HOLDERS = 8, 2  # 8 children, and two people of every trade: 64 residents
EVENTS = {
    "boat race": "river",
    "herring supper": "quay",
    "kite day": "hilltop",
    "barn dance": "hay barn",
    "pie contest": "bakery",
    "flower show": "rose garden",
    "lantern walk": "cliff path",
    "sea swim": "lagoon",
    "puppet play": "village green",
    "book sale": "library",
    "choir evening": "chapel",
    "chess match": "tea room",
    "harvest feast": "town hall",
    "donkey race": "beach",
    "story night": "inn",
    "knitting circle": "post office",
    "star watch": "harbour wall",
    "bell concert": "bell tower",
    "egg hunt": "apple orchard",
    "model ship show": "boathouse",
}
WARES = (
    "bread",
    "rope",
    "butter",
    "candles",
    "nails",
    "herring",
    "honey",
    "thread",
    "ink",
    "soap",
    "tea",
    "flour",
    "eggs",
    "glue",
    "tar",
    "wool",
    "salt",
    "paper",
    "cider",
    "jam",
    "onions",
    "potatoes",
    "paint",
    "buckets",
)


@dataclass(frozen=True)
class Person:
    # a given name; no two residents share one, and no stranger ever gets a resident's
    name: str
    surname: str
    gender: str  # "f" or "m"
    age: int
    trade: str  # "pupil" for children
    street: str
    pet: str  # the kind of animal
    pet_name: str
    likes: str  # a favourite food

    @property
    def full(self):
        return f"{self.name} {self.surname}"


@dataclass(frozen=True)
class Place:
    place: str
    kind: str  # outdoors, indoors or water
    built: int | None  # the year, for what was built
    keeper: str  # a resident's given name


@dataclass(frozen=True)
class Animal:
    name: str
    kind: str
    colour: str
    age: int
    owner: str  # a resident's given name


@dataclass(frozen=True)
class Event:
    event: str
    day: str
    hour: int
    place: str
    organiser: str  # a resident's given name


@dataclass(frozen=True)
class Price:
    item: str
    price: int  # pennies
    seller: str  # a resident's given name


@dataclass(frozen=True)
class Register:
    residents: tuple[Person, ...]
    places: tuple[Place, ...]
    animals: tuple[Animal, ...]
    events: tuple[Event, ...]
    prices: tuple[Price, ...]

    @functools.cached_property
    def by_name(self):
        return {person.name: person for person in self.residents}

    def tables(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def sqlite(self):
        """A read-only connection to the register: a hostile query cannot change the
        file."""
        return sqlite3.connect(
            f"{(HERE / 'register.sqlite').as_uri()}?mode=ro&immutable=1", uri=True
        )


def draw_residents(rng):
    """Everybody in town, with every street, pet and dish about equally often."""
    count = PUPILS + TRADE_HOLDERS * len(words.TRADES)
    women, men = (rng.sample(names, count // 2) for names in (words.WOMEN, words.MEN))
    names = [name for pair in zip(women, men) for name in pair]
    trades = rng.sample(words.TRADES * TRADE_HOLDERS + ("pupil",) * PUPILS, count)
    family = rng.sample(words.SURNAMES, count * 3 // 4)
    surnames = rng.sample(family + family[: count - len(family)], count)
    streets, pets, likes = (
        rng.sample(pool * (count // len(pool) + 1), count)
        for pool in (words.STREETS, words.PETS, words.FOODS)
    )
    pet_names = rng.sample(words.PET_NAMES, count)
    ages = [
        rng.randint(8, 14) if trade == "pupil" else rng.randint(18, 79)
        for trade in trades
    ]
    return tuple(
        Person(
            name, surname, words.GENDER[name], age, trade, street, pet, pet_name, food
        )
        for name, surname, age, trade, street, pet, pet_name, food in zip(
            names, surnames, ages, trades, streets, pets, pet_names, likes
        )
    )


def draw(seed=SEED):
    """The register, drawn again from the word lists."""
    rng = random.Random(f"register {seed}")
    residents = draw_residents(rng)
    grown = [person.name for person in residents if person.trade != "pupil"]
    keepers, organisers, sellers = (
        rng.sample(grown, n) for n in (len(words.PLACES), len(EVENTS), len(WARES))
    )
    return Register(
        residents,
        tuple(
            Place(
                place,
                kind,
                (
                    rng.randint(1702, 1899)
                    if kind == "indoors"
                    or place
                    in ("quay", "harbour wall", "stone bridge", "slipway", "old well")
                    else None
                ),
                keeper,
            )
            for (place, (_, kind)), keeper in zip(words.PLACES.items(), keepers)
        ),
        tuple(
            Animal(
                person.pet_name,
                person.pet,
                rng.choice(words.COLOURS),
                rng.randint(1, 14),
                person.name,
            )
            for person in residents
        ),
        tuple(
            Event(event, rng.choice(words.DAYS), rng.randint(1, 9), place, organiser)
            for (event, place), organiser in zip(EVENTS.items(), organisers)
        ),
        tuple(
            Price(item, price, seller)
            for item, price, seller in zip(
                WARES, rng.sample(range(2, 60), len(WARES)), sellers
            )
        ),
    )


@functools.cache
def register():
    """The committed register."""
    tables = json.loads((HERE / "register.json").read_text(encoding="utf-8"))
    return Register(
        **{
            name: tuple(row(**values) for values in tables[name])
            for name, row in ROWS.items()
        }
    )


ROWS = {
    "residents": Person,
    "places": Place,
    "animals": Animal,
    "events": Event,
    "prices": Price,
}


def strangers_names(gender):
    """The given names that no resident bears."""
    return tuple(
        name
        for name in (words.WOMEN if gender == "f" else words.MEN)
        if name not in register().by_name
    )


def write(town, folder=HERE):
    """register.json, one row a line, and the same tables as an SQLite file."""
    lines = {
        name: ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
        for name, rows in town.tables().items()
    }
    text = (
        "{\n"
        + ",\n".join(f' "{name}": [\n{rows}]' for name, rows in lines.items())
        + "\n}\n"
    )
    (folder / "register.json.part").write_text(text, encoding="utf-8")
    os.replace(folder / "register.json.part", folder / "register.json")
    part = folder / "register.sqlite.part"
    part.unlink(missing_ok=True)
    with sqlite3.connect(part) as database:
        for name, rows in town.tables().items():
            columns = [
                f"{field.name}"
                f" {'INTEGER' if field.type in (int, int | None) else 'TEXT'}"
                for field in fields(rows[0])
            ]
            database.execute(f"CREATE TABLE {name} ({', '.join(columns)})")
            database.executemany(
                f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})",
                [tuple(asdict(row).values()) for row in rows],
            )
    database.close()
    os.replace(part, folder / "register.sqlite")


if __name__ == "__main__":
    write(draw())
