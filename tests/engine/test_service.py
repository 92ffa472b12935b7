"""The engine behind an event loop: many at once, cancelled, refused, failing, shut down."""

from __future__ import annotations

import asyncio
import time

import pytest

from moonbase.engine import QueueFull, Sampling, Service
from moonbase.engine.service import Failed, Stopped
from moonbase.errors import UserError
from tests.engine.tiny import PROMPTS, engine


def run(work, **options):
    """`work(service)` on a service that is stopped afterwards."""
    async def whole():
        service = Service(engine(vocab_size=300, options=options.pop("engine", None)), **options)
        service.start()
        try:
            return await asyncio.wait_for(work(service), 240)
        finally:
            await service.stop()
    return asyncio.run(whole())


async def collect(service: Service, prompt, sampling: Sampling) -> list[int]:
    pieces = [piece async for piece in service.generate(prompt, sampling)]
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return [id for piece in pieces for id in piece.ids]


def test_many_at_once_get_what_each_gets_alone() -> None:
    async def work(service: Service):
        return await asyncio.gather(*[collect(service, prompt, Sampling(max_tokens=20)) for prompt in PROMPTS * 3])

    expected = engine(vocab_size=300).generate_ids(PROMPTS, Sampling(max_tokens=20))
    assert run(work) == expected * 3


def test_text_arrives_while_the_rest_is_made() -> None:
    async def work(service: Service):
        pieces = service.generate(list(b"hello"), Sampling(max_tokens=200))
        first = await anext(pieces)
        running = service.engine.busy
        await pieces.aclose()
        return first, running

    first, running = run(work)
    assert len(first.ids) == 1 and first.finish_reason is None and running


def test_a_closed_request_frees_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(service: Service):
        step = service.engine.step
        # So that 200 tokens take longer than it takes anyone to close the request.
        monkeypatch.setattr(service.engine, "step", lambda: (time.sleep(0.05), step()))
        pieces = service.generate([1] * 40, Sampling(max_tokens=200))
        await anext(pieces)
        await pieces.aclose()
        while service.statistics.finished["cancelled"] < 1 or service.statistics.running:
            await asyncio.sleep(0.01)
        task = asyncio.create_task(collect(service, [1] * 40, Sampling(max_tokens=200)))
        while not service.statistics.running:
            await asyncio.sleep(0.01)
        task.cancel()
        while service.statistics.finished["cancelled"] < 2 or service.statistics.running:
            await asyncio.sleep(0.01)
        return service.statistics, service.open_requests

    statistics, still_open = run(work)
    assert statistics.finished["cancelled"] == 2 and still_open == 0
    assert statistics.blocks_used == statistics.running == statistics.waiting == 0


def test_the_queue_has_an_end() -> None:
    async def work(service: Service):
        first = [asyncio.create_task(collect(service, [5], Sampling(max_tokens=60))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 requests are waiting already") as refusal:
            await collect(service, [5], Sampling(max_tokens=5))
        assert 0 < refusal.value.retry_after <= 60
        await asyncio.gather(*first)
        return await collect(service, [5], Sampling(max_tokens=5))

    assert len(run(work, queue_limit=2, engine=dict(max_running=1))) == 5


def test_no_queue_at_all_still_serves_whom_there_is_room_for() -> None:
    async def work(service: Service):
        return await collect(service, [5], Sampling(max_tokens=5))

    assert len(run(work, queue_limit=0)) == 5


def test_scores() -> None:
    async def work(service: Service):
        return await asyncio.gather(*[service.score(prompt) for prompt in PROMPTS])

    ours = engine(vocab_size=300)
    for found, prompt in zip(run(work), PROMPTS, strict=True):
        assert found.logprobs == pytest.approx(ours.score(prompt).logprobs, abs=1e-4)


def test_who_finished_in_a_pass_that_then_failed_gets_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(service: Service):
        service.engine.speculate = True
        monkeypatch.setattr(service.engine, "_guess", lambda *_: 1 / 0)
        ids = await collect(service, [5], Sampling(max_tokens=1))
        with pytest.raises(Failed):
            await collect(service, [5], Sampling(max_tokens=2))
        return ids, service._deliver

    ids, left = run(work)
    assert len(ids) == 1 and not left


def test_what_does_not_fit_is_refused_before_it_is_queued() -> None:
    async def work(service: Service):
        with pytest.raises(UserError, match="300 tokens; the model's context is 256"):
            await collect(service, [1] * 300, Sampling())
        with pytest.raises(UserError, match="empty prompt"):
            await collect(service, [], Sampling())
        return service.open_requests

    assert run(work) == 0


def test_a_failing_pass_ends_its_requests_and_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(service: Service):
        with monkeypatch.context() as patch:
            patch.setattr(service.engine.model, "decode", lambda *_: 1 / 0)
            with pytest.raises(Failed, match="ZeroDivisionError"):
                await collect(service, [5], Sampling())
        return await collect(service, [5], Sampling(max_tokens=3)), service.statistics.blocks_used

    ids, blocks = run(work)
    assert len(ids) == 3 and blocks == 0


def test_stopping_lets_running_requests_finish_within_the_grace_time() -> None:
    async def work(service: Service):
        task = asyncio.create_task(collect(service, [5], Sampling(max_tokens=30)))
        await asyncio.sleep(0.01)
        await service.stop(grace_seconds=200)
        with pytest.raises(Stopped):
            await collect(service, [5], Sampling())
        return await task

    assert len(run(work)) == 30


def test_stopping_without_grace_cancels() -> None:
    async def work(service: Service):
        pieces = service.generate([5], Sampling(max_tokens=250))
        await anext(pieces)
        rest = asyncio.create_task(anext_until_end(pieces))
        await service.stop(grace_seconds=0)
        return await rest

    async def anext_until_end(pieces):
        return [piece async for piece in pieces][-1].finish_reason

    assert run(work) == "cancelled"
