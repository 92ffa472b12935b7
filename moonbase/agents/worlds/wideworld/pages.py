"""The pages of a WideWorld. They read like pages, and one rule reads them all: a fact is a line `Label: value`.

An address stands in angle brackets behind the value that it belongs to. Every page that states facts of an entity
says in its lines `Name`, `Kind`, `Source` (gazetteer, registry, news or archive) and `As of` what, whence and of when.
"""

from __future__ import annotations

import random
import re

from moonbase.agents.worlds.wideworld.facts import KINDS, MONTHS, Attribute, Claim, Entity, Group
from moonbase.agents.worlds.world import Page

MEMBERS_PER_PAGE = 20
GROUPS_PER_PAGE = 50
_LINK = re.compile(r"<(https?://[^<>]*)>")
_LEAD = {
    "region": "{name} is a region with a {climate} climate, established in {established:year}.",
    "town": "{name} is a town in {region} that lives by {trade}. It was founded in {founded:year}.",
    "person": "{name}, {occupation}, was born in {birthplace} and works for {employer}.",
    "company": "{name} is a company in {industry}, run from {headquarters}. It was founded by {founder}.",
    "institute": "{name} is an institute in {seat}, best known for {field}.",
    "vessel": "{name} is a {type} that {builder} built; she sails from {port}.",
    "book": "{name} is a work of {genre} by {author}, brought out by {publisher}.",
}
_REPORT = ("New figures for {name} have been given out.", "{name} has published figures again.",
           "Figures for {name} were read to the council.", "A reporter asked after {name} and was shown the books.")
_CHATTER = ("{a} and {b} held a joint exhibition.", "A delegation from {a} visited {b}.",
            "Rain delayed a meeting at {a}.",
            "A portrait of {a} was sold by auction.", "{a} thanked {b} for a gift of books.",
            "Readers remember {a} in a letter.", "A street was named after {a}.", "{a} denied a rumour about {b}.")


def slug(name: str) -> str:
    """As it stands in an address."""
    return name.lower().replace(" ", "-")


def with_unit(attribute: Attribute, value: str) -> str:
    """12.5 → 12.5 m."""
    return f"{value} {attribute.unit}" if attribute.unit else value


class PageWriter:
    """Writes all pages of a world, in order; `pages` grows."""

    def __init__(self, entities: list[Entity], groups: list[Group]) -> None:
        self.entities, self.groups = entities, groups
        self.pages: list[Page] = []
        self.of_claim: dict[tuple[int, str], int] = {}
        """The page that makes a claim, by entity number and source."""
        self.of_group: dict[int, list[int]] = {}
        """The list pages of a group."""

    def url(self, entity: Entity, source: str = "gazetteer") -> str:
        """Where a source writes of an entity."""
        place = f"{entity.kind.name}/{slug(entity.name)}"
        if source == "news":
            place = f"{entity.claims[0].as_of[:4]}/{place}"
        return f"https://{source}.example/{place}"

    def group_url(self, group: Group, part: int = 1) -> str:
        """The address of a part of a group's list."""
        return f"https://lists.example/{group.kind.group}/{slug(group.name)}/{part}"

    def write(self, count: int, seed: int) -> list[Page]:
        """`count` pages. Raises ValueError where the entities and groups need more."""
        for entity in self.entities:
            self._write_entity(entity)
        for group in self.groups:
            self._write_group(group)
        self._write_categories()
        if len(self.pages) > count:
            raise ValueError(f"the entities and lists fill {len(self.pages)} pages, more than {count}")
        self._write_bulletins(count - len(self.pages), random.Random(f"wideworld/{seed}/bulletins"))
        return self.pages

    def _add(self, title: str, url: str, body: list[str], dead: bool = False) -> int:
        text = "\n".join([title, "", *body])
        links = tuple(dict.fromkeys(_LINK.findall(text)))
        self.pages.append(Page(len(self.pages), title, url, text, links, dead))
        return len(self.pages) - 1

    def _link(self, number: int) -> str:
        other = self.entities[number]
        return f"{other.name} <{self.url(other)}>"

    def _head(self, entity: Entity, claim: Claim) -> list[str]:
        return [f"Name: {entity.name}", f"Kind: {entity.kind.name}", f"Source: {claim.source}", f"As of: {claim.as_of}"]

    def _write_entity(self, entity: Entity) -> None:
        kind = entity.kind
        known = {key: _Text(value) for key, value in entity.values.items()}
        known |= {key: _Text(self.entities[number].name) for key, number in entity.related.items()}
        home = f"https://home.example/{kind.name}/{slug(entity.name)}"
        body = [_LEAD[kind.name].format(name=entity.name, **known), "", *self._head(entity, entity.claims[0])]
        body += [f"{one.label}: {with_unit(one, entity.values[one.key])}" for one in kind.attributes]
        body += [f"{one.label}: {self._link(entity.related[one.key])}"
                 for one in kind.relations if one.key in entity.related]
        body += [f"Member of: the {self.groups[number].name} {kind.group} <{self.group_url(self.groups[number])}>"
                 for number in entity.groups]
        if entity.claim("registry"):
            body.append(f"Registry record: <{self.url(entity, 'registry')}>")
        if entity.claim("archive"):
            body.append(f"Earlier edition: <{self.url(entity, 'archive')}>")
        if entity.gone:
            body.append(f"Home page: <{home}>")
        self.of_claim[entity.number, "gazetteer"] = self._add(entity.name, self.url(entity), body)
        for claim in entity.claims[1:]:
            self._write_claim(entity, claim)
        if entity.gone:
            body = [f"The page of {entity.name} itself, with all figures."]
            self._add(f"{entity.name} at home", home, body, dead=True)

    def _write_claim(self, entity: Entity, claim: Claim) -> None:
        attribute = entity.kind.reported
        line = f"{attribute.label}: {with_unit(attribute, claim.value)}"
        if claim.source == "registry":
            title = f"{entity.name}: registry record"
            body = [f"Entered in the registry under the name of {entity.name}.", "", *self._head(entity, claim), line]
        elif claim.source == "news":
            title = f"{entity.name}: new {attribute.noun}"
            lead = _REPORT[entity.number % len(_REPORT)].format(name=entity.name)
            body = [lead, "", *self._head(entity, claim), line, f"Background: {self._link(entity.number)}"]
        else:
            title = f"{entity.name} (edition of {claim.as_of[:4]})"
            body = ["This is an earlier edition, kept for reference.", "", *self._head(entity, claim)]
            body += [line if one is attribute else f"{one.label}: {with_unit(one, entity.values[one.key])}"
                     for one in entity.kind.attributes]
            body.append(f"Current edition: <{self.url(entity)}>")
        self.of_claim[entity.number, claim.source] = self._add(title, self.url(entity, claim.source), body)

    def _write_group(self, group: Group) -> None:
        """Members in parts, by number and name; to learn more of one, one has to look for it."""
        parts = -(-len(group.members) // MEMBERS_PER_PAGE)
        noun = group.kind.plural if len(group.members) > 1 else group.kind.name
        for part in range(1, parts + 1):
            first = (part - 1) * MEMBERS_PER_PAGE
            members = group.members[first : first + MEMBERS_PER_PAGE]
            body = [f"The {group.name} {group.kind.group} has {len(group.members)} {noun} as members. "
                    f"This is page {part} of {parts}.", ""]
            body += [f"{place}. {self.entities[number].name}" for place, number in enumerate(members, first + 1)]
            body += [""] * (parts > 1)
            body += [f"Previous page: <{self.group_url(group, part - 1)}>"] * (part > 1)
            body += [f"Next page: <{self.group_url(group, part + 1)}>"] * (part < parts)
            page = self._add(f"Members of the {group.name} {group.kind.group}, page {part} of {parts}",
                             self.group_url(group, part), body)
            self.of_group.setdefault(group.number, []).append(page)

    def _write_categories(self) -> None:
        """For each kind the groups that there are of it, in parts."""
        for kind in KINDS.values():
            groups = [group for group in self.groups if group.kind is kind]
            parts = -(-len(groups) // GROUPS_PER_PAGE)
            for part in range(1, parts + 1):
                here = groups[(part - 1) * GROUPS_PER_PAGE : part * GROUPS_PER_PAGE]
                body = [f"Every {kind.group} of {kind.plural} on file. This is page {part} of {parts}.", ""]
                body += [f"The {group.name} {kind.group} ({len(group.members)}): <{self.group_url(group)}>"
                         for group in here]
                body += [f"Next page: <https://lists.example/{kind.group}/index/{part + 1}>"] * (part < parts)
                self._add(f"Category: {kind.group} of {kind.plural}, page {part} of {parts}",
                          f"https://lists.example/{kind.group}/index/{part}", body)

    def _write_bulletins(self, count: int, draw: random.Random) -> None:
        """News that states no fact: names in passing."""
        for number in range(1, count + 1):
            named = [self.entities[draw.randrange(len(self.entities))] for _ in range(4)]
            month, year = draw.choice(MONTHS), draw.randint(2001, 2023)
            body = [draw.choice(_CHATTER).format(a=named[0].name, b=named[1].name),
                    draw.choice(_CHATTER).format(a=named[2].name, b=named[3].name)]
            if number > 1:
                body.append(f"Previous bulletin: <https://news.example/bulletin/{number - 1}>")
            self._add(f"Bulletin {number}, {month} {year}", f"https://news.example/bulletin/{number}", body)


class _Text(str):
    """A value whose format `:year` is the last word of a date."""

    def __format__(self, how: str) -> str:
        return self.split(" ")[-1] if how == "year" else str(self)
