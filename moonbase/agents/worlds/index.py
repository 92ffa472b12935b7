"""Full-text search over short pages, held in memory: exact BM25 in some tens of microseconds.

BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", eq. 3.15) with k1 = 1.2, b = 0.75 and the
idf that is never negative. With f the number of times that a term stands on a page, n pages of which d have the term:

    idf(term) = ln(1 + (n − d + 0.5) / (d + 0.5))
    norm(page) = k1 · (1 − b + b · length / mean length)
    impact(term, page) = round(1000 · idf · f · (k1 + 1) / (f + norm))
    score(query, page) = Σ impact over the different terms of the query

An impact depends on page and term alone, so it is computed when the index is built. Impacts are whole numbers: a sum
of them is the same in every order and on every machine, and ties are broken by page number, so that rankings are too.

What makes it quick: pages that have one of the query's rare words are few and are scored one and all; the best pages
for the query's common words alone are found once for each combination of common words and remembered. The answer is
the best of both: a page without any rare word that is among the best k is among the best k for the common words. And
where the k-th best page with a rare word beats whatever common words can add up to, these are not looked at at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from moonbase.agents.words import words

K1, B = 1.2, 0.75
SCALE = 1000
COMMON = 512
"""A word on more pages than this is common: its impacts are a dense row."""
MOST_RESULTS = 50
QUERY_CHARACTERS = 4096
QUERY_TERMS = 64
"""Different words of a query that count; the rest of a longer one is left out."""
STRIPES = 64
"""Pages in a group of which only the best score is looked at first."""
REMEMBERED = 4096
"""Combinations of common words whose best pages are kept."""
STOP_WORDS = frozenset((
    "a an and are as at be by did do does for from has have he her his how i in is it its me my of on or she that the "
    "their them they this to was we were what when where which who whom whose why will with you").split())
"""Neither indexed nor looked for."""
_PAGE_BITS = 24
_LINK = re.compile(r"<https?://[^<>]*>")


def terms_of(text: str) -> list[str]:
    """What is indexed and looked for: words, without stop words and without addresses in angle brackets."""
    found = words(_LINK.sub(" ", text) if "<" in text else text)
    return [word for word in found if word not in STOP_WORDS]


class Index:
    """BM25 over texts; page numbers are positions in `texts`."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises ValueError for 2^24 pages or more."""
        vocabulary: dict[str, int] = {}
        term_parts: list[np.ndarray] = []
        lengths: list[int] = []
        for text in texts:
            found = terms_of(text)
            lengths.append(len(found))
            term_parts.append(np.fromiter(
                (vocabulary.setdefault(word, len(vocabulary)) for word in found), np.int64, len(found)))
        if len(lengths) >= 1 << _PAGE_BITS:
            raise ValueError(f"{len(lengths)} pages; an index holds fewer than {1 << _PAGE_BITS}")
        self.num_pages = len(lengths)
        self._vocabulary = vocabulary
        self._build(term_parts, np.array(lengths, np.int64))
        self._scratch_P = np.zeros(self.num_pages, np.int64)
        self._best_common: dict[tuple[int, ...], np.ndarray] = {}

    def _build(self, term_parts: list[np.ndarray], lengths_P: np.ndarray) -> None:
        """Postings by term; within a term by page. P pages, O postings, V words."""
        num_pages = self.num_pages
        pages = np.repeat(np.arange(num_pages, dtype=np.int64), lengths_P)
        terms = np.concatenate(term_parts) if term_parts else np.empty(0, np.int64)
        keys_O, frequency_O = np.unique(terms * max(num_pages, 1) + pages, return_counts=True)
        term_O, page_O = keys_O // max(num_pages, 1), keys_O % max(num_pages, 1)
        document_frequency_V = np.bincount(term_O, minlength=len(self._vocabulary))
        idf_V = np.log(1 + (num_pages - document_frequency_V + 0.5) / (document_frequency_V + 0.5))
        norm_P = K1 * (1 - B + B * lengths_P / max(float(lengths_P.mean()) if num_pages else 1.0, 1e-9))
        impact_O = np.rint(SCALE * idf_V[term_O] * frequency_O * (K1 + 1) / (frequency_O + norm_P[page_O]))
        self._starts = np.concatenate([[0], np.cumsum(document_frequency_V)]).tolist()
        # Positions of 64 bits are what numpy takes without a copy.
        self._page_O, self._impact_O = page_O, impact_O.astype(np.int32)
        self._order_P = (1 << _PAGE_BITS) - 1 - np.arange(num_pages, dtype=np.int64)
        self._dense: dict[int, np.ndarray] = {}
        self._most: dict[int, int] = {}
        for term in np.flatnonzero(document_frequency_V > COMMON).tolist():
            row_P = np.zeros(-(-num_pages // STRIPES) * STRIPES, np.uint16)
            span = slice(self._starts[term], self._starts[term + 1])
            row_P[self._page_O[span]] = self._impact_O[span]
            self._dense[term] = row_P
            self._most[term] = int(row_P.max())

    @property
    def num_bytes(self) -> int:
        """Bytes of postings and dense rows; the vocabulary's strings come on top."""
        return self._page_O.nbytes + self._impact_O.nbytes + sum(row.nbytes for row in self._dense.values())

    def search(self, query: str, k: int = 10) -> list[tuple[int, int]]:
        """(page, score) of the best k pages, best first; fewer where fewer have a word of the query."""
        k = max(0, min(k, MOST_RESULTS))
        found = dict.fromkeys(self._vocabulary.get(word) for word in terms_of(query[:QUERY_CHARACTERS]))
        terms = [term for term in found if term is not None][:QUERY_TERMS]
        if not terms or not k:
            return []
        dense = self._dense
        rare = [term for term in terms if term not in dense]
        common = sorted(term for term in terms if term in dense) if len(rare) < len(terms) else []
        keys = sorted(self._score_rare(rare, common, k), reverse=True) if rare else []
        if common:
            highest = sum(self._most[term] for term in common)
            # A page stands in `keys` once for every rare word that it has.
            last = k * len(rare) - 1
            if not keys or len(keys) <= last or keys[last] >> _PAGE_BITS <= highest:
                keys += self._score_common(tuple(common))[:k].tolist()
                keys.sort(reverse=True)
        mask = (1 << _PAGE_BITS) - 1
        answer: dict[int, int] = {}
        for key in keys:
            page = mask - (key & mask)
            # A page's larger key comes first and has its whole score.
            if page not in answer and key > mask:
                answer[page] = key >> _PAGE_BITS
                if len(answer) == k:
                    break
        return list(answer.items())

    def _score_rare(self, rare: list[int], common: list[int], k: int) -> list[int]:
        """Keys of the best pages with at least one rare word, some of them several times.

        A key has the score above and 2^24 − 1 − page below, so that the order of keys is the order of results.
        """
        starts = self._starts
        spans = [(self._page_O[starts[term] : starts[term + 1]], self._impact_O[starts[term] : starts[term + 1]])
                 for term in rare]
        if len(spans) == 1:
            pages, impacts = spans[0]
            scores = impacts.astype(np.int64)
        else:
            scratch_P = self._scratch_P
            for pages, impacts in spans:
                scratch_P[pages] += impacts
            pages = np.concatenate([pages for pages, _ in spans])
            scores = scratch_P.take(pages)
            scratch_P[pages] = 0
        for term in common:
            scores += self._dense[term].take(pages)
        scores <<= _PAGE_BITS
        scores += self._order_P.take(pages)
        most = k * len(spans)
        if len(scores) > 2 * most:
            scores.partition(len(scores) - most)
            scores = scores[len(scores) - most :]
        return scores.tolist()

    def _score_common(self, common: tuple[int, ...]) -> np.ndarray:
        """Keys of the best pages by these words alone, best first."""
        known = self._best_common.get(common)
        if known is not None:
            return known
        wide = np.uint16 if sum(self._most[term] for term in common) < 1 << 16 else np.uint32
        scores_P = self._dense[common[0]].astype(wide)
        for term in common[1:]:
            scores_P += self._dense[term]
        most = min(MOST_RESULTS, self.num_pages)
        pages = _best_pages(scores_P, most)
        pages = pages[pages < self.num_pages]
        keys = (scores_P.take(pages).astype(np.int64) << _PAGE_BITS) + self._order_P.take(pages)
        best = np.sort(keys)[::-1][:most].copy()
        if len(self._best_common) >= REMEMBERED:
            self._best_common.pop(next(iter(self._best_common)))
        self._best_common[common] = best
        return best


def _best_pages(scores_P: np.ndarray, most: int) -> np.ndarray:
    """Pages among which are the `most` best, ties going to lower numbers; a few times as many at the most.

    `most` stripes whose best page has some score or more hold `most` pages of that score or more: what is below it need
    not be looked at.
    """
    highest = scores_P.reshape(STRIPES, -1).max(axis=0)
    if len(highest) <= most:
        return np.arange(len(scores_P))
    bound = np.partition(highest, len(highest) - most)[len(highest) - most]
    enough = scores_P >= bound
    # Eight at a time: most are not.
    eights = np.flatnonzero(enough.view(np.uint64))
    rows, places = enough.reshape(-1, 8).take(eights, axis=0).nonzero()
    pages = eights.take(rows) * 8 + places
    if len(pages) <= 8 * most:
        return pages
    scores = scores_P.take(pages)
    above, equal = pages[scores > bound], pages[scores == bound]
    return np.concatenate([above, equal[: max(0, most - len(above))]])
