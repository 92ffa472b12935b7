"""Many agents, one model: calls wait in line, as many run as the model bears, and refusals cost time instead of work.

How many run together follows what the model says, as congestion control has it since Jacobson (1988). Every success
makes room for one more, a refusal for being busy halves the room and stops the line for as long as it asks. What ran
well when the refusal came is remembered: up to there the room grows back at once, beyond it by small steps that become
rarer with every step that failed. Providers limit calls per second too; how fast calls got in is remembered alike, and
the line moves no faster.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import deque
from typing import Any

from moonbase.agents.models.base import CallOptions, ChatModel, Completion, Message, ModelError

BUSY = frozenset({"rate_limit", "overloaded"})
MOST_DELAY = 60.0
"""Seconds between two attempts, where nobody asks for more."""
MOST_PATIENCE = 32.0
"""A failed step costs about two rounds of calls: so many rounds apart, that is little."""
_IMPATIENCE = 4.0
"""How much rarer steps become with each that failed."""
_RATE_WINDOW = 1.0
"""Seconds over which the rate of calls that got in is measured, at least; providers' shortest limits are per second."""
_RATE_SHARE = 0.95
"""Of the rate at which calls got in before a refusal: a little less is below the limit."""
_RATE_SECONDS = 20.0
"""In which the rate doubles where no step has failed yet: slowly first, as the limit is near, then faster."""
_REFUSALS = 10
"""So many times `attempts` a call may be turned away while others get in."""


class Pool:
    """A chat model in front of which calls queue. First come, first served, a call that is tried again included."""

    def __init__(
        self, model: ChatModel, *, concurrency: float = 8, most: float = 64, attempts: int = 6, base_delay: float = 1.0,
        seed: int = 0,
    ) -> None:
        """`concurrency`: calls at once in the beginning; `most`: ever. `attempts`: of one call that fails; to be turned
        away for being busy counts as a failure only while nobody gets in. `base_delay`: seconds before the second
        attempt, about; each later one waits twice as long. `seed`: of the jitter."""
        assert 1 <= concurrency and 1 <= most and attempts >= 1
        self.model, self.most, self.attempts, self.base_delay = model, most, attempts, base_delay
        self.allowed = min(float(concurrency), float(most))
        """How many may run now; the whole part counts."""
        self.running = 0
        self.retries = 0
        """Attempts beyond the first, of all calls."""
        self.refusals = 0
        """Attempts that were turned away for being busy."""
        self._random = random.Random(seed)
        self._queue: list[tuple[int, asyncio.Future[None]]] = []
        self._arrivals = 0
        self._successes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget_times()
        self._ceiling = self._rate = math.inf
        self._patience = self._rate_patience = 1.0
        self._proven = 0.0

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def price(self) -> Any:
        """The model's."""
        return self.model.price

    @property
    def context_tokens(self) -> int | None:
        """The model's."""
        return self.model.context_tokens

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return sum(not future.done() for _, future in self._queue)

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """The model's."""
        return self.model.count_tokens(messages, tools)

    async def close(self) -> None:
        """Close the model."""
        await self.model.close()

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """One reply, however long the line is. Raises ModelError: one that no retry mends at once, any other after the
        last attempt; its `attempts` says how many there were. Whatever is raised has `waited`, as of a completion."""
        loop = self._enter()
        came, self._arrivals = loop.time(), self._arrivals + 1
        place = self._arrivals
        tries = failures = turned_away = 0
        while True:
            await self._take_slot(place, came)
            began, together, seen, tries = loop.time(), self.running, self._successes, tries + 1
            try:
                completion = await self.model.complete(messages, tools, options)
            except ModelError as error:
                self.running -= 1
                error.attempts, error.waited = tries, began - came
                busy = error.kind in BUSY
                if busy:
                    turned_away += 1
                    # While others get in there is hope.
                    failures = failures + 1 if self._successes == seen else 0
                    self._turned_away(began, failures, error.retry_after)
                else:
                    failures += 1
                self._move()
                if not error.retryable or failures >= self.attempts or turned_away >= _REFUSALS * self.attempts:
                    raise
                self.retries += 1
                if not busy:
                    try:
                        await asyncio.sleep(max(self._delay(failures), error.retry_after or 0.0))
                    except asyncio.CancelledError as cancelled:
                        cancelled.waited = loop.time() - came
                        raise
            except BaseException as error:
                error.waited = began - came
                self.running -= 1
                self._move()
                raise
            else:
                self._got_in(began, together)
                self.running -= 1
                self._move()
                completion.attempts, completion.waited = tries, began - came
                return completion

    # --- the line -----------------------------------------------------------------------------------------------------

    def _enter(self) -> asyncio.AbstractEventLoop:
        """The running loop. Another than before has another clock, and whoever waited in the old one is gone."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._queue, self.running = loop, [], 0
            self._forget_times()
        return loop

    def _forget_times(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._closed_until = self._next_start = self._cut = -math.inf
        self._rate_time = 0.0
        self._begun: deque[float] = deque(maxlen=4096)
        self._seconds = 0.0

    async def _take_slot(self, place: int, came: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (place, future))
        self._move()
        try:
            await future
        except asyncio.CancelledError as error:
            # Whoever hears that the call was broken off hears that it was in line until then.
            error.waited = self._loop.time() - came
            if not future.cancelled():
                # The slot was given in the same moment.
                self.running -= 1
                self._move()
            raise

    def _move(self) -> None:
        """Let in whoever may start now; come back when the next one may."""
        loop = self._loop
        while self._queue and self.running < int(self.allowed):
            if self._queue[0][1].done():
                heapq.heappop(self._queue)
                continue
            now, opens = loop.time(), max(self._closed_until, self._next_start)
            if now < opens:
                if self._timer is None or self._timer.cancelled() or self._timer.when() != opens:
                    if self._timer is not None:
                        self._timer.cancel()
                    self._timer = loop.call_at(opens, self._ring)
                return
            _, future = heapq.heappop(self._queue)
            self.running += 1
            self._begun.append(now)
            self._next_start = max(now, self._next_start) + 1 / self._rate_at(now)
            future.set_result(None)

    def _ring(self) -> None:
        self._timer = None
        self._move()

    # --- how many, and how fast ---------------------------------------------------------------------------------------

    def _got_in(self, began: float, together: int) -> None:
        """A call that began then, as one of so many, was answered."""
        now = self._loop.time()
        self._successes += 1
        self._seconds += (now - began - self._seconds) / min(self._successes, 16)
        if began < self._cut:
            return
        self._proven = max(self._proven, float(together))
        if together > self._ceiling:
            # More than the model bore before: there is no ceiling any more.
            self._ceiling, self._patience = math.inf, 1.0
        if self.running < int(self.allowed):
            # What runs below the room tells nothing about it.
            return
        if self.allowed < self._ceiling:
            self.allowed = min(self.allowed + 1, self._ceiling)
        else:
            self.allowed += 1 / (self.allowed * self._patience)
        self.allowed = min(self.allowed, float(self.most))

    def _turned_away(self, began: float, failures: int, asked: float | None) -> None:
        """A call that began then was refused for being busy; it does not count among the running ones any more."""
        self.refusals += 1
        if began in self._begun:
            self._begun.remove(began)
        now = self._loop.time()
        # So many have run together before, and well: it is not how many, it is how fast.
        too_fast = self.running + 1 <= self._proven
        if began >= self._cut:
            # Those that began before the last cut say nothing new.
            self._cut = math.nextafter(now, math.inf)
            self.allowed = max(1.0, self.allowed / 2)
            if too_fast:
                self._slow_down(now)
            else:
                self._patience = min(MOST_PATIENCE, self._patience * _IMPATIENCE)
                self._ceiling = math.inf
        if not too_fast:
            self._ceiling = min(self._ceiling, max(1.0, float(self.running)))
        pause = self._delay(max(1, failures)) if asked is None else asked
        self._closed_until = max(self._closed_until, now + pause)

    def _slow_down(self, now: float) -> None:
        """From here on calls begin a little slower than they got in during the last moments."""
        window = max(_RATE_WINDOW, 2 * self._seconds)
        got_in = max(1, sum(now - moment <= window for moment in self._begun))
        self._rate, self._rate_time = got_in / window * _RATE_SHARE, now
        self._rate_patience = min(MOST_PATIENCE, self._rate_patience * _IMPATIENCE)
        # Or else it was how many after all, because the model bears less than it did; then this comes down to it.
        self._proven *= 0.8

    def _rate_at(self, now: float) -> float:
        """Calls that may begin in a second."""
        passed = max(0.0, now - max(self._rate_time, self._closed_until))
        return self._rate * (1 + (passed / (_RATE_SECONDS * self._rate_patience)) ** 2)

    def _delay(self, failures: int) -> float:
        """Seconds before the next attempt: twice as long each time, half of it by chance."""
        longest = min(MOST_DELAY, self.base_delay * 2 ** (failures - 1))
        return longest * (0.5 + 0.5 * self._random.random())
