"""Tasks over a WideWorld, in five families, each with its gold answer and the calls that suffice to find it.

- wide: a table of R rows by k columns over the members of a group that a list names.
- deep: one value at the end of a chain of 2 to 5 relations.
- mixed: a chain that ends in a group, and the table of its members.
- narrow: a table of one or two named things; more than one agent is a waste.
- distract: a table of named things that have namesakes and pages that disagree.

A prompt says what is wanted, never how the work is to be organised.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from moonbase.agents.worlds.wideworld.facts import KINDS, RULE, Attribute, Entity, Group, Relation
from moonbase.agents.worlds.wideworld.pages import MEMBERS_PER_PAGE
from moonbase.agents.worlds.wideworld.wideworld import WideWorld
from moonbase.agents.worlds.world import Call, Column, Page, Task
from moonbase.errors import UserError

FAMILIES = ("wide", "deep", "mixed", "narrow", "distract")
MOST_ROWS = 256
_RESULTS = 10
"""Results of a search in an oracle."""


@dataclass(frozen=True)
class Knobs:
    """How hard a task is; None draws a value for each task."""

    rows: int | None = None
    """Of the gold table, 1 to 256; narrow: 1 or 2."""
    columns: int | None = None
    """Beside the name, 1 to 6."""
    hops: int | None = None
    """Relations in a chain, 1 to 5 (mixed) or 2 to 5 (deep)."""
    contested: bool | None = None
    """One column (or the value asked for) is one on which pages may disagree."""
    second_page: bool | None = None
    """One column stands on the page of a related thing."""


@dataclass(frozen=True)
class Field:
    """Where the cells of a column come from: an attribute or the name of the thing, or of a related one."""

    column: Column
    relation: str | None = None
    attribute: str | None = None

    def value(self, world: WideWorld, entity: Entity) -> str:
        """The right cell."""
        if self.relation is not None:
            entity = world.entities[entity.related[self.relation]]
        return entity.settled(self.attribute) if self.attribute else entity.name


def make_tasks(
    world: WideWorld, family: str, count: int, seed: int, *, rows: int | None = None, columns: int | None = None,
    hops: int | None = None, contested: bool | None = None, second_page: bool | None = None,
) -> list[Task]:
    """`count` tasks; the same for the same arguments. The knobs are those of Knobs. Raises UserError."""
    knobs = Knobs(rows, columns, hops, contested, second_page)
    if family not in FAMILIES:
        raise UserError(f"family={family!r}: must be one of {', '.join(FAMILIES)}")
    _check(knobs, family)
    builder = _Builder(world)
    make: Callable[[random.Random, Knobs], Task] = getattr(builder, family)
    tasks = []
    for number in range(count):
        draw = random.Random(f"wideworld/{world.name}/{family}/{seed}/{number}")
        tasks.append(replace(make(draw, knobs), id=f"{world.name}/{family}-{seed}-{number}"))
    return tasks


def _check(knobs: Knobs, family: str) -> None:
    most_rows = {"narrow": 2, "distract": 32}.get(family, MOST_ROWS)
    fewest_hops = 1 if family == "mixed" else 2
    for name, value, low, high in (("rows", knobs.rows, 1, most_rows), ("columns", knobs.columns, 1, 6),
                                   ("hops", knobs.hops, fewest_hops, 5)):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}={value}: a {family} task takes {low} to {high}")


class _Builder:
    """Makes tasks of one world."""

    def __init__(self, world: WideWorld) -> None:
        self.world = world

    @functools.cached_property
    def incoming(self) -> dict[int, list[tuple[int, str]]]:
        """Which things (number, relation) point at a thing."""
        found: dict[int, list[tuple[int, str]]] = {}
        for entity in self.world.entities:
            for relation, number in entity.related.items():
                found.setdefault(number, []).append((entity.number, relation))
        return found

    def wide(self, draw: random.Random, knobs: Knobs) -> Task:
        group = draw.choice(self._groups(knobs.rows, self.world.groups))
        rows = knobs.rows or len(group.members)
        members = [self.world.entities[number] for number in group.members[:rows]]
        which = self._which(group, rows)
        plural = group.kind.plural if rows > 1 else group.kind.name
        start = draw.choice((f"I need an overview of {which} (all of them {plural})." if rows > 1
                             else f"I need the particulars of {which} (a {plural}).",
                             f"Please compile a table of {which}.", f"Make a complete list of {which}."))
        return self._table("wide", start, members, draw, knobs, self._discovery(group, rows), {"group": group.name})

    def narrow(self, draw: random.Random, knobs: Knobs) -> Task:
        rows = knobs.rows or draw.choice((1, 2))
        kind = draw.choice([kind for kind in KINDS.values() if kind.name not in ("region", "institute")])
        of_kind = [entity for entity in self.world.entities if entity.kind is kind]
        members = draw.sample(of_kind, rows)
        named = " and ".join(entity.name for entity in members)
        start = f"I would like to know more about the {kind.name if rows == 1 else kind.plural} {named}."
        return self._table("narrow", start, members, draw, knobs, (), {})

    def distract(self, draw: random.Random, knobs: Knobs) -> Task:
        rows = knobs.rows or draw.choice((3, 4, 6, 8))
        troubled = [entity for entity in self.world.entities
                    if entity.twin is not None and (len(entity.claims) > 1 or entity.gone)]
        kinds = [kind for kind in KINDS.values() if sum(entity.kind is kind for entity in troubled) >= rows]
        if not kinds:
            raise UserError(f"rows={rows}: world {self.world.name} has too few things with a namesake; take more pages")
        kind = draw.choice(kinds)
        members = draw.sample([entity for entity in troubled if entity.kind is kind], rows)
        named = ", ".join(entity.name for entity in members)
        start = (f"I need figures for {'these ' + kind.plural if rows > 1 else 'this ' + kind.name}: {named}. "
                 "Take care: there are others whose names differ by a few letters.")
        knobs = replace(knobs, contested=True if knobs.contested is None else knobs.contested)
        return self._table("distract", start, members, draw, knobs, (), {"namesakes": rows})

    def mixed(self, draw: random.Random, knobs: Knobs) -> Task:
        hops = knobs.hops or draw.choice((1, 2, 3))
        pointed_at = {relation.kind for kind in KINDS.values() for relation in kind.relations}
        groups = [group for group in self.world.groups if group.kind.name in pointed_at]
        if knobs.rows is not None:
            groups = [group for group in groups if len(group.members) >= knobs.rows]
        for attempt in range(400):
            # Lists of the very size come first; where none is the end of a chain, the beginning of a longer one is.
            group = draw.choice(self._groups(knobs.rows, groups) if attempt < 200 else groups)
            rows = knobs.rows or len(group.members)
            ends = [number for number in group.members if len(self.world.entities[number].groups) == 1
                    and number in self.incoming]
            chain = self._chain_back(draw.choice(ends), hops, draw) if ends else None
            if chain:
                break
        else:
            raise UserError(f"hops={hops}: no chain in world {self.world.name} ends in a fitting list; take more pages")
        numbers, relations = chain
        members = [self.world.entities[number] for number in group.members[:rows]]
        phrase = self._phrase(numbers, relations)
        some = "its members" if rows == len(group.members) else f"its first {rows} members, as its list numbers them"
        noun = group.kind.group
        start = (f"{phrase[0].upper()}{phrase[1:]} is a member of just one {noun}. "
                 f"Find out which {noun} that is and make a table of {some}.")
        calls = (*self._walk(numbers), *self._discovery(group, rows)[1:])
        return self._table("mixed", start, members, draw, knobs, calls, {"hops": hops, "group": group.name})

    def deep(self, draw: random.Random, knobs: Knobs) -> Task:
        hops = knobs.hops or draw.choice((2, 3, 4, 5))
        contested = draw.random() < 0.5 if knobs.contested is None else knobs.contested
        entities = self.world.entities
        while True:
            found = self._chain_back(draw.randrange(len(entities)), hops, draw)
            if found is None:
                continue
            last = entities[found[0][-1]]
            attributes = [one for one in last.kind.attributes if one.reported == contested]
            if attributes:
                break
        numbers, relations = found
        attribute = draw.choice(attributes)
        unit = f" (in {attribute.unit})" if attribute.unit else ""
        prompt = (f"What is the {attribute.noun}{unit} of {self._phrase(numbers, relations)}?\n\n{RULE}\n\n"
                  'End with one line "Answer: …" that holds the value alone.')
        calls = [*self._walk(numbers)]
        if attribute.reported and (page := self._deciding_page(last)) is not self.world.page_of(last):
            calls += [self._search(last, page), self._open(page, None)]
        column = Column(attribute.noun, attribute.type, attribute.unit)
        meta = {"hops": hops, "contested": contested, "chain": [entities[number].name for number in numbers],
                "relations": list(relations)}
        return Task("", "deep", prompt, (column,), last.settled(attribute.key), (), tuple(calls), meta)

    def _groups(self, rows: int | None, groups: list[Group]) -> list[Group]:
        """Those with exactly so many members, or else those whose first `rows` can be asked for."""
        if rows is None:
            return [group for group in groups if len(group.members) >= 3]
        exact = [group for group in groups if len(group.members) == rows]
        fitting = exact or [group for group in groups if len(group.members) > rows]
        if not fitting:
            raise UserError(f"rows={rows}: no list of world {self.world.name} is so long; take more pages")
        return fitting

    def _which(self, group: Group, rows: int) -> str:
        if rows == len(group.members):
            return f"the members of the {group.name} {group.kind.group}"
        first = f"first {rows} members" if rows > 1 else "first member"
        return f"the {first} of the {group.name} {group.kind.group}, as its list numbers them"

    def _fields(self, kind_name: str, draw: random.Random, knobs: Knobs) -> list[Field]:
        """Columns beside the name, in the order asked for."""
        kind = KINDS[kind_name]
        wanted = knobs.columns or draw.choice((2, 3, 4))
        contested = draw.random() < 0.5 if knobs.contested is None else knobs.contested
        second_page = draw.random() < 0.5 if knobs.second_page is None else knobs.second_page
        plain = [Field(_column(one.label, one), None, one.key) for one in kind.attributes if not one.reported]
        always = [one for one in kind.relations if one.share == 1.0]
        plain += [Field(Column(one.label, "text"), one.key) for one in always]
        draw.shuffle(plain)
        fields = []
        if contested and kind.reported is not None:
            fields.append(Field(_column(kind.reported.label, kind.reported), None, kind.reported.key))
        if second_page and always and len(fields) < wanted:
            fields.append(_hop_field(draw.choice(always), draw))
        fields += plain[: wanted - len(fields)]
        draw.shuffle(fields)
        return fields

    def _table(
        self, family: str, start: str, members: list[Entity], draw: random.Random, knobs: Knobs,
        discovery: tuple[Call, ...], meta: dict[str, object],
    ) -> Task:
        fields = self._fields(members[0].kind.name, draw, knobs)
        columns = (Column("Name", "text"), *(one.column for one in fields))
        rows = [{"Name": entity.name} | {one.column.name: one.value(self.world, entity) for one in fields}
                for entity in members]
        header = " | ".join(column.name for column in columns)
        prompt = (f"{start}\n\nAnswer with one Markdown table with these columns, one row each, no row twice: {header}"
                  f"\n\n{RULE}")
        calls = [*discovery]
        for row, entity in enumerate(members):
            calls += self._row_calls(entity, fields, row)
        contested = any(self._is_reported(one, members[0]) for one in fields)
        second_page = any(one.relation is not None and one.attribute is not None for one in fields)
        meta = {"rows": len(rows), "columns": len(fields), "contested": contested, "second_page": second_page, **meta}
        return Task("", family, prompt, columns, rows, ("Name",), tuple(calls), meta)

    def _is_reported(self, one: Field, entity: Entity) -> bool:
        return one.relation is None and one.attribute is not None and entity.kind.attribute(one.attribute).reported

    def _row_calls(self, entity: Entity, fields: list[Field], row: int) -> list[Call]:
        """Search it, open its page, and the pages of what is not said there."""
        wanted: list[Page] = []
        for one in fields:
            if self._is_reported(one, entity):
                wanted.append(self._deciding_page(entity))
            else:
                wanted.append(self.world.page_of(entity))
                if one.relation and one.attribute:
                    wanted.append(self.world.page_of(self.world.entities[entity.related[one.relation]]))
        own = self.world.page_of(entity)
        pages = sorted({page.id: page for page in wanted}.values(), key=lambda page: page is not own)
        found = next(page for page in pages if page is own or page in self.world.claim_pages(entity))
        calls = [self._search(entity, found)]
        for page in pages:
            calls.append(self._open(page, row))
        return [replace(call, row=row) for call in calls]

    def _deciding_page(self, entity: Entity) -> Page:
        """The page whose claim is right."""
        value = entity.settled(entity.kind.reported.key)
        source = next(claim.source for claim in entity.claims if claim.value == value)
        return self.world.page_of(entity, source)

    def _search(self, entity: Entity, page: Page) -> Call:
        """A search that finds a page of an entity; its name will do, or the page's title."""
        for query in (entity.name, f"{entity.name} {entity.kind.name}", page.title):
            if any(hit.id == page.id for hit in self.world.search(query, _RESULTS)):
                break
        return Call("search", {"query": query}, None, (page.id,))

    def _open(self, page: Page, row: int | None) -> Call:
        return Call("open", {"url": page.url}, row, (page.id,))

    def _discovery(self, group: Group, rows: int) -> tuple[Call, ...]:
        """Search the list of a group and open the parts that name its first `rows` members."""
        pages = self.world.group_pages(group)[: -(-rows // MEMBERS_PER_PAGE)]
        query = f"{group.name} {group.kind.group} members"
        return (Call("search", {"query": query}, None, (pages[0].id,)), *(self._open(page, None) for page in pages))

    def _walk(self, numbers: list[int]) -> tuple[Call, ...]:
        """Search the first of a chain and follow the links."""
        entities = [self.world.entities[number] for number in numbers]
        pages = [self.world.page_of(entity) for entity in entities]
        return (self._search(entities[0], pages[0]), *(self._open(page, None) for page in pages))

    def _phrase(self, numbers: list[int], relations: tuple[str, ...]) -> str:
        """the mayor of the birthplace of X (a person)"""
        entity = self.world.entities[numbers[0]]
        nouns = [self.world.entities[number].kind.relation(relation).noun
                 for number, relation in zip(numbers, relations, strict=False)]
        article = "an" if entity.kind.name[0] in "aeiou" else "a"
        chain = "".join(f"the {noun} of " for noun in reversed(nouns))
        return f"{chain}{entity.name} ({article} {entity.kind.name})"

    def _chain_back(self, end: int, hops: int, draw: random.Random) -> tuple[list[int], tuple[str, ...]] | None:
        """Entity numbers that lead to `end` and the relations between them, none visited twice; None at a dead end."""
        numbers, relations = [end], []
        for _ in range(hops):
            steps = [step for step in self.incoming.get(numbers[0], ()) if step[0] not in numbers]
            if not steps:
                return None
            number, relation = draw.choice(steps)
            numbers.insert(0, number)
            relations.insert(0, relation)
        return numbers, tuple(relations)


def _column(name: str, attribute: Attribute) -> Column:
    return Column(f"{name} ({attribute.unit})" if attribute.unit else name, attribute.type, attribute.unit)


def _hop_field(relation: Relation, draw: random.Random) -> Field:
    """A column on the related thing's page, one on which pages agree."""
    attribute = draw.choice([one for one in KINDS[relation.kind].attributes if not one.reported])
    name = f"{attribute.noun[0].upper()}{attribute.noun[1:]} of the {relation.noun}"
    return Field(_column(name, attribute), relation.key, attribute.key)
