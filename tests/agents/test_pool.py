"""The line in front of a model, on a clock that jumps: fairness, retries, refusals, and no slot that is ever lost."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from moonbase.agents.models.base import CallOptions, Completion, ModelError, Price, Usage
from moonbase.agents.models.pool import Pool

OPTIONS = CallOptions()


class JumpingLoop(asyncio.SelectorEventLoop):
    """Time is what the next timer says: nothing waits. Independent of the one that the package has."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        waiting = [timer.when() for timer in self._scheduled if not timer.cancelled()]
        if not self._ready and waiting:
            self.now = max(self.now, min(waiting))
        super()._run_once()


def play(work: Coroutine[Any, Any, Any]) -> Any:
    loop = JumpingLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class Server:
    """A model that takes `seconds` a call; `say(number of the call)` may raise. Knows who is inside, and when it was
    asked by whom."""

    name, price, context_tokens = "fake", Price(), None

    def __init__(self, seconds: float = 1.0, say: Callable[[int], None] = lambda number: None) -> None:
        self.seconds, self.say = seconds, say
        self.inside = self.most_inside = 0
        self.asked: list[tuple[float, str]] = []

    async def complete(self, messages: Any, tools: Any, options: Any) -> Completion:
        self.asked.append((asyncio.get_running_loop().time(), messages[0]["content"]))
        self.say(len(self.asked))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await asyncio.sleep(self.time_of_call())
        finally:
            self.inside -= 1
        return Completion({"role": "assistant", "content": messages[0]["content"]}, "stop", Usage(), "fake")

    def time_of_call(self) -> float:
        return self.seconds


class Limited(Server):
    """A provider that lets in 5 at once, and 20 a second by a sliding window or by a bucket that fills."""

    def __init__(self, seconds: float, retry_after: float | None, kind: str) -> None:
        super().__init__(seconds, self.check)
        self.retry_after, self.kind, self.random = retry_after, kind, random.Random(1)
        self.let_in: list[float] = []
        self.tokens, self.filled, self.refused = 20.0, 0.0, 0

    def check(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        self.tokens, self.filled = min(20.0, self.tokens + 20 * (now - self.filled)), now
        recent = sum(moment > now - 1 for moment in self.let_in[-20:])
        if self.inside >= 5 or (recent >= 20 if self.kind == "window" else self.tokens < 1):
            self.refused += 1
            raise ModelError("rate_limit", "slow down", 429, self.retry_after)
        self.let_in.append(now)
        self.tokens -= 1

    def time_of_call(self) -> float:
        return self.seconds * (0.5 + self.random.random())


def ask(pool: Pool, who: object = "x") -> Coroutine[Any, Any, Completion]:
    return pool.complete([{"role": "user", "content": str(who)}], [], OPTIONS)


async def ask_many(pool: Pool, count: int) -> list[Completion]:
    return await asyncio.gather(*(ask(pool, number) for number in range(count)))


def failing(kinds: list[str], retry_after: float | None = None) -> Callable[[int], None]:
    """The first calls fail, each in its way."""

    def say(number: int) -> None:
        if number <= len(kinds):
            raise ModelError(kinds[number - 1], "no", retry_after=retry_after)

    return say


# --- a storm of refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["window", "bucket"])
@pytest.mark.parametrize("retry_after", [None, 1.0])
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 1.0, 5.0])
def test_a_storm(kind: str, retry_after: float | None, seconds: float) -> None:
    """A thousand calls at once: none fails, at least 80% of what the provider allows, hardly a refusal."""

    async def storm() -> tuple[Limited, list[Completion], float]:
        server = Limited(seconds, retry_after, kind)
        replies = await ask_many(Pool(server), 1000)
        return server, replies, asyncio.get_running_loop().time()

    server, replies, took = play(storm())
    assert [reply.message["content"] for reply in replies] == [str(number) for number in range(1000)]
    allowed = 1000 / min(20.0, 5 / seconds)
    assert allowed / took >= 0.8
    assert server.refused <= 30 and max(reply.attempts for reply in replies) <= 5
    assert sum(reply.attempts - 1 for reply in replies) == server.refused


def test_a_storm_is_the_same_every_time() -> None:
    async def storm(seed: int) -> list[tuple[float, str]]:
        server = Limited(0.2, None, "window")
        await ask_many(Pool(server, seed=seed), 200)
        return server.asked

    assert play(storm(3)) == play(storm(3)) != play(storm(4))


def test_more_room_is_found_and_less_is_noticed() -> None:
    """64 at once where all is well; a third of it when the provider lets in no more, and again more later."""

    class Changing(Server):
        room = 1000

        def __init__(self) -> None:
            super().__init__(1.0, self.check)

        def check(self, number: int) -> None:
            if self.inside >= self.room:
                raise ModelError("overloaded", "busy", 529)

    async def phases() -> list[float]:
        server = Changing()
        pool, found = Pool(server), []
        for server.room, count in ((1000, 2500), (20, 2500), (1000, 8000)):
            await ask_many(pool, count)
            found.append(pool.allowed)
        assert pool.refusals < 60
        return found

    wide, narrow, again = play(phases())
    assert wide == 64 and 15 <= narrow <= 22 and again > 40


def test_the_room_halves_and_grows() -> None:
    async def rounds() -> tuple[list[float], Server]:
        server = Server(1.0, lambda number: failing(["rate_limit"])(number - 8 if number > 8 else 9))
        pool, seen = Pool(server, concurrency=8), []
        await ask_many(pool, 7)
        seen.append(pool.allowed)
        await ask_many(pool, 1)
        seen.append(pool.allowed)
        await ask_many(pool, 1)
        seen.append(pool.allowed)
        return seen, server

    (before, same, after), _ = play(rounds())
    assert before == same == 8, "seven of eight tell nothing about nine"
    assert after == 4


# --- the line ---------------------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    async def line() -> Server:
        server = Server(1.0)
        pool = Pool(server, concurrency=3, most=3)
        calls = [asyncio.create_task(ask(pool, number)) for number in range(30)]
        await asyncio.sleep(0.5)
        assert (pool.running, pool.waiting) == (3, 27)
        await asyncio.gather(*calls)
        assert (pool.running, pool.waiting) == (0, 0)
        return server

    server = play(line())
    assert [who for _, who in server.asked] == [str(number) for number in range(30)]
    assert server.most_inside == 3
    assert [moment for moment, _ in server.asked] == [float(number // 3) for number in range(30)]


def test_who_is_tried_again_keeps_its_place() -> None:
    async def line() -> list[str]:
        server = Server(1.0, failing(["rate_limit"], retry_after=2.0))
        await ask_many(Pool(server, concurrency=1), 5)
        return [who for _, who in server.asked]

    assert play(line()) == ["0", "0", "1", "2", "3", "4"]


def test_cancelled_calls_leave_nothing_behind() -> None:
    """Callers give up at random moments: in line, while running, between attempts, in the very moment of their turn."""

    async def chaos(seed: int) -> None:
        chance = random.Random(seed)

        def say(number: int) -> None:
            if chance.random() < 0.3:
                raise ModelError(chance.choice(["rate_limit", "server", "timeout", "overloaded", "bad_request"]), "no")

        server = Server(1.0, say)
        pool = Pool(server, concurrency=3, most=5, base_delay=0.5, seed=seed)
        calls = [asyncio.create_task(ask(pool, number)) for number in range(40)]
        for _ in range(30):
            await asyncio.sleep(chance.choice([0.0, 0.0, 0.25, 0.5, 1.0]))
            chance.choice(calls).cancel()
        # Those that are let in now are cancelled before they have run.
        pool._move()
        for call in calls[::3]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, Completion | ModelError | asyncio.CancelledError) for result in results)
        assert (pool.running, pool.waiting, server.inside) == (0, 0, 0)
        server.say = lambda number: None
        assert len(await ask_many(pool, 20)) == 20
        assert (pool.running, pool.waiting) == (0, 0)

    for seed in range(100):
        play(chaos(seed))


def test_cancelled_in_the_moment_of_its_turn() -> None:
    async def moment() -> None:
        server = Server(1.0)
        pool = Pool(server, concurrency=1, most=1)
        first, second, third = (asyncio.create_task(ask(pool, number)) for number in range(3))
        await asyncio.sleep(0.5)
        # The first leaves, the second is let in and leaves before it has noticed.
        first.cancel()
        await asyncio.sleep(0)
        second.cancel()
        assert (await third).message["content"] == "2"
        assert pool.running == 0 and [who for _, who in server.asked] == ["0", "2"]

    play(moment())


def test_an_error_of_another_kind_leaves_nothing_behind() -> None:
    async def broken() -> None:
        def say(number: int) -> None:
            raise ZeroDivisionError

        pool = Pool(Server(1.0, say), concurrency=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await ask(pool)
        assert (pool.running, pool.waiting) == (0, 0)

    play(broken())


def test_a_pool_outlives_its_event_loop() -> None:
    server = Server(1.0)
    pool = Pool(server, concurrency=2)

    async def abandoned() -> None:
        calls = [asyncio.ensure_future(ask(pool, number)) for number in range(5)]
        await asyncio.sleep(0.1)
        assert len(calls) == 5

    asyncio.run(abandoned())
    assert len(play(ask_many(pool, 5))) == 5


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["context_length", "auth", "bad_request", "refused"])
def test_what_no_retry_mends_is_raised_at_once(kind: str) -> None:
    async def once() -> tuple[float, int]:
        server = Server(1.0, failing([kind]))
        with pytest.raises(ModelError) as raised:
            await ask(Pool(server))
        assert raised.value.kind == kind and raised.value.attempts == 1
        return asyncio.get_running_loop().time(), len(server.asked)

    assert play(once()) == (0.0, 1)


def test_retries_wait_longer_each_time_and_are_told() -> None:
    async def twice(seed: int) -> tuple[Completion, Pool, list[float]]:
        server = Server(1.0, failing(["server", "timeout", "connection"]))
        pool = Pool(server, seed=seed)
        return await ask(pool), pool, [moment for moment, _ in server.asked]

    waits = set()
    for seed in range(20):
        reply, pool, moments = play(twice(seed))
        assert reply.attempts == 4 and pool.retries == 3 and reply.waited == moments[-1]
        gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
        assert all(0.5 * 2**number <= gap <= 2**number for number, gap in enumerate(gaps))
        waits.add(gaps[0])
    assert len(waits) == 20, "calls that failed together must not come back together"


@pytest.mark.parametrize("kind", ["server", "rate_limit", "overloaded", "timeout"])
def test_the_last_attempt_is_the_last(kind: str) -> None:
    """Also where a provider turns everybody away for ever: nobody hangs."""

    async def never(count: int) -> tuple[Server, float]:
        server = Server(1.0, failing([kind] * 100_000))
        results = await asyncio.gather(*(ask(pool, number) for pool in [Pool(server, attempts=4)]
                                         for number in range(count)), return_exceptions=True)
        assert all(isinstance(result, ModelError) and result.kind == kind for result in results)
        assert all(result.attempts == 4 for result in results)
        return server, asyncio.get_running_loop().time()

    server, took = play(never(1))
    assert len(server.asked) == 4 and 3.5 <= took <= 15
    server, _ = play(never(10))
    assert len(server.asked) == 40


def test_while_others_get_in_nobody_fails_for_being_busy() -> None:
    """One call is turned away five times in a row, three times while others get an answer; with three attempts."""

    class Unlucky(Server):
        refusals = 0

        async def complete(self, messages: Any, tools: Any, options: Any) -> Completion:
            if messages[0]["content"] == "unlucky" and self.refusals < 5:
                self.refusals += 1
                await asyncio.sleep(3)
                raise ModelError("rate_limit", "no", 429, 0.0)
            return await super().complete(messages, tools, options)

    async def together() -> Completion:
        pool = Pool(Unlucky(1.0), attempts=3)
        others = asyncio.create_task(ask_many(pool, 200))
        reply = await ask(pool, "unlucky")
        await others
        return reply

    assert play(together()).attempts == 6


def test_nobody_starts_before_the_provider_said() -> None:
    async def told() -> list[float]:
        server = Server(1.0, failing(["rate_limit"], retry_after=7.0))
        await ask_many(Pool(server, concurrency=4), 40)
        return [moment for moment, _ in server.asked]

    moments = play(told())
    assert len(moments) == 41 and all(moment == 0.0 or moment >= 7.0 for moment in moments)
    assert sum(moment == 0.0 for moment in moments) <= 4


def test_a_server_error_may_say_when_too() -> None:
    async def told() -> list[float]:
        server = Server(1.0, failing(["server"], retry_after=30.0))
        await ask(Pool(server))
        return [moment for moment, _ in server.asked]

    assert play(told()) == [0.0, 30.0]


def test_the_line_is_quick() -> None:
    """Ten thousand calls that take no time: the line costs well under a tenth of a millisecond each."""

    class Instant(Server):
        async def complete(self, messages: Any, tools: Any, options: Any) -> Completion:
            return Completion({"role": "assistant", "content": ""}, "stop", Usage(), "fake")

    start = time.process_time()
    play(ask_many(Pool(Instant()), 10_000))
    assert time.process_time() - start < 5
