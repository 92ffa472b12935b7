"""What there is in a WideWorld: entities of several kinds with attributes and relations, and who claims what of them.

Some attributes are reported anew over the years (a town's population). Several pages may then disagree; RULE says
which one is right, `Entity.settled` applies it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from moonbase.agents.worlds.wideworld.names import GRAMMARS, Names

RULE = ("Where pages disagree, the registry record is right whatever its date; without a registry record the page with "
        "the latest \"As of\" date is right.")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")


@dataclass(frozen=True)
class Attribute:
    """A value of an entity. Numbers are whole multiples of 10^-decimals, evenly spread between low and high."""

    key: str
    label: str
    noun: str
    type: str
    """number, date or text."""
    low: int = 0
    high: int = 0
    unit: str = ""
    decimals: int = 0
    choices: tuple[str, ...] = ()
    reported: bool = False
    """Pages of other dates and sources may say otherwise."""


@dataclass(frozen=True)
class Relation:
    """From an entity to one of another kind."""

    key: str
    label: str
    kind: str
    share: float = 1.0
    """Of the entities have it."""

    @property
    def noun(self) -> str:
        """As it stands in a sentence."""
        return self.label.lower()


@dataclass(frozen=True)
class Kind:
    """A kind of entity. `share`: of all entities; `group`: what a list of some of them is called."""

    name: str
    plural: str
    share: float
    group: str
    attributes: tuple[Attribute, ...]
    relations: tuple[Relation, ...] = ()

    def attribute(self, key: str) -> Attribute:
        return next(attribute for attribute in self.attributes if attribute.key == key)

    def relation(self, key: str) -> Relation:
        return next(relation for relation in self.relations if relation.key == key)

    @property
    def reported(self) -> Attribute | None:
        """The attribute on which pages may disagree."""
        return next((attribute for attribute in self.attributes if attribute.reported), None)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("region", "regions", 0.012, "assembly", (
        Attribute("area", "Area", "area", "number", 400, 90_000, "km²"),
        Attribute("established", "Established", "date of establishment", "date", 1200, 1890),
        Attribute("climate", "Climate", "climate", "text",
                  choices=("alpine", "arid", "coastal", "continental", "humid", "temperate")),
        Attribute("budget", "Budget", "budget", "number", 1_000, 99_999, "million marks", 1, reported=True))),
    Kind("town", "towns", 0.248, "league", (
        Attribute("population", "Population", "population", "number", 900, 980_000, reported=True),
        Attribute("elevation", "Elevation", "elevation", "number", 2, 2_400, "m"),
        Attribute("founded", "Founded", "date of foundation", "date", 1050, 1900),
        Attribute("trade", "Main trade", "main trade", "text",
                  choices=("brewing", "fishing", "glassmaking", "mining", "printing", "shipping", "timber",
                           "weaving"))),
         (Relation("region", "Region", "region"), Relation("mayor", "Mayor", "person"))),
    Kind("person", "people", 0.30, "circle", (
        Attribute("born", "Born", "date of birth", "date", 1921, 1998),
        Attribute("occupation", "Occupation", "occupation", "text",
                  choices=("architect", "botanist", "chemist", "composer", "engineer", "historian",
                           "painter", "surveyor")),
        Attribute("patents", "Patents", "number of patents", "number", 1, 480, reported=True),
        Attribute("height", "Height", "height", "number", 148, 204, "cm")),
         (Relation("birthplace", "Birthplace", "town"), Relation("employer", "Employer", "company"),
          Relation("school", "School", "institute"))),
    Kind("company", "companies", 0.20, "chamber", (
        Attribute("employees", "Employees", "number of employees", "number", 12, 64_000, reported=True),
        Attribute("revenue", "Revenue", "revenue", "number", 15, 99_999, "million marks", 1),
        Attribute("founded", "Founded", "date of foundation", "date", 1820, 2005),
        Attribute("industry", "Industry", "industry", "text",
                  choices=("ceramics", "insurance", "instruments", "machinery", "paper", "railways", "shipbuilding",
                           "textiles"))),
         (Relation("headquarters", "Headquarters", "town"), Relation("founder", "Founder", "person"),
          Relation("predecessor", "Predecessor", "company", 0.5))),
    Kind("institute", "institutes", 0.06, "union", (
        Attribute("students", "Students", "number of students", "number", 150, 48_000, reported=True),
        Attribute("endowment", "Endowment", "endowment", "number", 10, 40_000, "million marks", 1),
        Attribute("opened", "Opened", "opening date", "date", 1400, 1995),
        Attribute("field", "Main field", "main field", "text",
                  choices=("agriculture", "astronomy", "law", "linguistics", "medicine", "metallurgy"))),
         (Relation("seat", "Seat", "town"), Relation("rector", "Rector", "person"))),
    Kind("vessel", "vessels", 0.08, "fleet", (
        Attribute("length", "Length", "length", "number", 180, 3_900, "m", 1),
        Attribute("launched", "Launched", "launch date", "date", 1900, 2015),
        Attribute("crew", "Crew", "size of the crew", "number", 4, 1_900, reported=True),
        Attribute("type", "Type", "type", "text",
                  choices=("barge", "clipper", "ferry", "freighter", "icebreaker", "tanker", "trawler"))),
         (Relation("builder", "Builder", "company"), Relation("port", "Home port", "town"),
          Relation("captain", "Captain", "person"))),
    Kind("book", "books", 0.10, "library", (
        Attribute("pages", "Pages", "number of pages", "number", 48, 1_400),
        Attribute("published", "Published", "publication date", "date", 1930, 2014),
        Attribute("copies", "Copies sold", "number of copies sold", "number", 300, 900_000, reported=True),
        Attribute("genre", "Genre", "genre", "text",
                  choices=("biography", "drama", "essay", "novel", "poetry", "travelogue"))),
         (Relation("author", "Author", "person"), Relation("publisher", "Publisher", "company"))),
)}


@dataclass(frozen=True, slots=True)
class Claim:
    """One source's value of a reported attribute, as of a day (ISO)."""

    source: str
    """gazetteer, registry, news or archive."""
    as_of: str
    value: str


@dataclass(slots=True)
class Entity:
    """`values`: what the gazetteer prints, by attribute; `related`: entity numbers by relation."""

    number: int
    kind: Kind
    name: str
    values: dict[str, str] = field(default_factory=dict)
    related: dict[str, int] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    """Of the kind's reported attribute; the gazetteer's first."""
    gone: bool = False
    """Has a home page that is dead."""
    twin: int | None = None
    """The entity with almost the same name."""
    groups: list[int] = field(default_factory=list)

    def settled(self, key: str) -> str:
        """The right value by RULE."""
        if not self.kind.attribute(key).reported:
            return self.values[key]
        for claim in self.claims:
            if claim.source == "registry":
                return claim.value
        return max(self.claims, key=lambda claim: claim.as_of).value

    def claim(self, source: str) -> Claim | None:
        return next((claim for claim in self.claims if claim.source == source), None)


@dataclass(frozen=True)
class Group:
    """A named list of entities of one kind, by number."""

    number: int
    kind: Kind
    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Shares:
    """How much of the entities is troubled, and how."""

    registry: float = 0.09
    news: float = 0.09
    archive: float = 0.10
    dead: float = 0.05
    twins: float = 0.06


def show_value(attribute: Attribute, draw: random.Random) -> str:
    """A value as pages print it, without its unit: 12,430 or 31.5; 4 May 1712; weaving."""
    if attribute.type == "date":
        return f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(attribute.low, attribute.high)}"
    if attribute.type == "text":
        return draw.choice(attribute.choices)
    whole = draw.randint(attribute.low, attribute.high)
    if not attribute.decimals:
        return f"{whole:,}"
    one = 10 ** attribute.decimals
    return f"{whole // one:,}.{whole % one:0{attribute.decimals}d}"


def make_entities(count: int, grammar: str, seed: int, shares: Shares) -> list[Entity]:
    """About `count` entities of all kinds, related and with claims; the same for the same arguments, everywhere."""
    draw = random.Random(f"wideworld/{seed}/{grammar}/entities")
    names = Names(GRAMMARS[grammar], random.Random(f"wideworld/{seed}/{grammar}/names"))
    entities: list[Entity] = []
    of_kind: dict[str, list[int]] = {}
    for kind in KINDS.values():
        wanted = max(4, round(kind.share * count))
        for name in names.many(max(3, round(wanted * (1 - shares.twins)))):
            entities.append(Entity(len(entities), kind, name))
            if draw.random() < shares.twins and (twin := names.twin(name)):
                entities.append(Entity(len(entities), kind, twin, twin=len(entities) - 1))
                entities[-2].twin = len(entities) - 1
        of_kind[kind.name] = [entity.number for entity in entities if entity.kind is kind]
    for entity in entities:
        entity.values = {attribute.key: show_value(attribute, draw) for attribute in entity.kind.attributes}
        for relation in entity.kind.relations:
            if draw.random() < relation.share:
                entity.related[relation.key] = _other_than(entity.number, of_kind[relation.kind], draw)
        entity.gone = draw.random() < shares.dead
        _make_claims(entity, draw, shares)
    return entities


def _other_than(number: int, numbers: list[int], draw: random.Random) -> int:
    while (chosen := draw.choice(numbers)) == number:
        pass
    return chosen


def _make_claims(entity: Entity, draw: random.Random, shares: Shares) -> None:
    attribute = entity.kind.reported
    if attribute is None:
        return

    def day(first_year: int, last_year: int) -> str:
        return f"{draw.randint(first_year, last_year)}-{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}"

    taken = {entity.values[attribute.key]}

    def other_value() -> str:
        while (value := show_value(attribute, draw)) in taken:
            pass
        taken.add(value)
        return value

    entity.claims.append(Claim("gazetteer", day(2014, 2018), entity.values[attribute.key]))
    if draw.random() < shares.registry:
        entity.claims.append(Claim("registry", day(2010, 2022), other_value()))
    if draw.random() < shares.news:
        # Two in three report something newer than the gazetteer; the third is old news.
        years = (2019, 2023) if draw.random() < 2 / 3 else (2009, 2013)
        entity.claims.append(Claim("news", day(*years), other_value()))
    if draw.random() < shares.archive:
        entity.claims.append(Claim("archive", day(1996, 2008), other_value()))


GROUP_SIZES = (16, 4, 64, 2, 256, 8, 1, 32, 128, 12, 3, 48, 24, 6, 96, 192)


def make_groups(entities: list[Entity], count: int, grammar: str, seed: int) -> list[Group]:
    """`count` groups whose sizes go through GROUP_SIZES; each of a kind that has members enough."""
    draw = random.Random(f"wideworld/{seed}/{grammar}/groups")
    taken = (word for entity in entities for word in entity.name.split())
    names = Names(GRAMMARS[grammar], random.Random(f"wideworld/{seed}/{grammar}/group names"), taken).many(count)
    of_kind = {kind.name: [entity.number for entity in entities if entity.kind is kind] for kind in KINDS.values()}
    groups: list[Group] = []
    for number in range(count):
        size = GROUP_SIZES[number % len(GROUP_SIZES)]
        kinds = [kind for kind in KINDS.values() if len(of_kind[kind.name]) >= 1.05 * size and kind.name != "region"]
        if not kinds:
            kinds = [max(KINDS.values(), key=lambda kind: len(of_kind[kind.name]))]
        kind = draw.choice(kinds)
        members = tuple(draw.sample(of_kind[kind.name], min(size, len(of_kind[kind.name]))))
        groups.append(Group(number, kind, names[number], members))
        for member in members:
            entities[member].groups.append(number)
    return groups
