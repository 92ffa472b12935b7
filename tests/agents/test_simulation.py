"""The clock that jumps, beside plain arithmetic and asyncio's own loop."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from moonbase.agents.simulation import simulate


def test_hours_pass_in_no_time_and_in_order() -> None:
    async def program() -> list[tuple[float, int]]:
        done = []

        async def one(number: int) -> None:
            for _ in range(3):
                await asyncio.sleep(delays[number])
            done.append((asyncio.get_running_loop().time(), number))

        await asyncio.gather(*map(one, range(len(delays))))
        return done

    dice = random.Random(0)
    delays = [dice.choice([0.25, 0.5, 1, 60, 3600, 86_400, 10**7]) * dice.randint(1, 9) for _ in range(50)]
    began = time.process_time()
    done = simulate(program())
    assert time.process_time() - began < 5
    assert sorted(number for _, number in done) == list(range(50))
    assert [when for when, _ in done] == pytest.approx(sorted(3 * delay for delay in delays), rel=1e-12)
    assert all(when == pytest.approx(3 * delays[number], rel=1e-12) for when, number in done)
    assert simulate(program()) == done


def test_it_does_what_asyncio_does() -> None:
    """The same program on asyncio's own loop, with times that are far enough apart to be told apart; a machine that is
    busy just then may confuse them, and the less the further they are apart."""
    async def program(unit: float) -> list[str]:
        seen: list[str] = []

        async def worker(name: str, queue: asyncio.Queue[str], seconds: float) -> None:
            while True:
                item = await queue.get()
                await asyncio.sleep(seconds)
                seen.append(name + item)
                queue.task_done()

        queue: asyncio.Queue[str] = asyncio.Queue()
        workers = [asyncio.ensure_future(worker("x", queue, 20 * unit)),
                   asyncio.ensure_future(worker("y", queue, 35 * unit))]
        for item in "abcdef":
            queue.put_nowait(item)
        await queue.join()
        try:
            async with asyncio.timeout(30 * unit):
                await asyncio.sleep(1000 * unit)
        except TimeoutError:
            seen.append("late")
        for one in workers:
            one.cancel()
        seen += [type(result).__name__ for result in await asyncio.gather(*workers, return_exceptions=True)]
        return seen

    expected = simulate(program(0.001))
    assert any(asyncio.run(program(0.001 * 2**attempt)) == expected for attempt in range(9))


def test_a_timeout_inside_fires_at_its_time() -> None:
    async def program() -> tuple[float, str]:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 12.5)
        except TimeoutError:
            return asyncio.get_running_loop().time(), "late"
        return 0.0, "?"

    assert simulate(program()) == (12.5, "late")


def test_waiting_for_nothing_is_an_error_and_not_a_hang() -> None:
    async def program() -> None:
        await asyncio.sleep(3)
        await asyncio.gather(asyncio.Event().wait(), asyncio.Queue().get())

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        simulate(program())


def test_work_for_a_thread_is_done_at_once() -> None:
    async def program() -> tuple[float, bool]:
        where = await asyncio.to_thread(threading.current_thread)
        with pytest.raises(ValueError, match="no"):
            await asyncio.to_thread(int, "no")
        return asyncio.get_running_loop().time(), where is threading.current_thread()

    assert simulate(program()) == (0.0, True)


def test_errors_of_the_program_come_out() -> None:
    async def program() -> None:
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        simulate(program())
