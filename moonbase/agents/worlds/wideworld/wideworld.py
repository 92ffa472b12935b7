"""make_world: a WideWorld from a seed."""

from __future__ import annotations

from moonbase.agents.worlds.wideworld.facts import Entity, Group, Shares, make_entities, make_groups
from moonbase.agents.worlds.wideworld.names import GRAMMARS
from moonbase.agents.worlds.wideworld.pages import PageWriter
from moonbase.agents.worlds.world import Page, PagedWorld
from moonbase.errors import UserError

FEWEST_PAGES = 2000
_NOT_ENTITIES = 0.14
"""Share of the pages that is left for lists, categories and bulletins."""


class WideWorld(PagedWorld):
    """A procedural web: what is true in it (`entities`, `groups`) and the pages that tell of it."""

    def __init__(
        self, seed: int, grammar: str, entities: list[Entity], groups: list[Group], writer: PageWriter
    ) -> None:
        super().__init__(f"wideworld-{grammar}-{seed}-{len(writer.pages)}", writer.pages)
        self.seed, self.grammar, self.entities, self.groups = seed, grammar, entities, groups
        self._writer = writer

    def page_of(self, entity: Entity, source: str = "gazetteer") -> Page:
        """The page on which a source makes its claim of an entity. Raises KeyError where it makes none."""
        return self.pages[self._writer.of_claim[entity.number, source]]

    def claim_pages(self, entity: Entity) -> list[Page]:
        """Every page that states facts of an entity, the gazetteer's first."""
        return [self.page_of(entity, claim.source) for claim in entity.claims]

    def group_pages(self, group: Group) -> list[Page]:
        """The list of a group's members, part by part."""
        return [self.pages[number] for number in self._writer.of_group[group.number]]


def make_world(seed: int, pages: int = 5000, grammar: str = "train", shares: Shares = Shares()) -> WideWorld:
    """The same world for the same arguments, in every process and on every machine.

    `pages`: exactly so many, from 2,000; `grammar`: "train" or "test", whose names have no syllable in common;
    `shares`: how many entities have conflicting, stale and dead pages or a namesake. Raises UserError.
    """
    if grammar not in GRAMMARS:
        raise UserError(f"grammar={grammar!r}: must be one of {', '.join(GRAMMARS)}")
    if pages < FEWEST_PAGES:
        raise UserError(f"pages={pages}: a world has at least {FEWEST_PAGES} pages, enough for its longest lists")
    per_entity = 1 + shares.registry + shares.news + shares.archive + shares.dead
    entities = make_entities(int(pages * (1 - _NOT_ENTITIES) / per_entity * 0.98), grammar, seed, shares)
    groups = make_groups(entities, 16 * max(1, pages // 1500), grammar, seed)
    writer = PageWriter(entities, groups)
    writer.write(pages, seed)
    return WideWorld(seed, grammar, entities, groups, writer)
