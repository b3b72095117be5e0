"""Turns, rests and trials of hosts; the directives of X-Robots-Tag."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.hosts import Hosts, RowQueue
from curation.robots import refusal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rest_trial_and_recovery():
    clock = Clock()
    hosts = Hosts(2, failures=3, rest_s=60, clock=clock)
    for _ in range(2):
        hosts.report("a", False)
    hosts.report("a", True)  # a success in between starts the count again
    for _ in range(3):
        assert hosts.admits("a")
        hosts.report("a", False)
    assert not hosts.admits("a")
    assert hosts.admits("b")
    clock.now = 60
    assert hosts.admits("a"), "one trial"
    assert not hosts.admits("a")
    hosts.report("a", False)
    assert not hosts.admits("a"), "a failed trial rests again"
    clock.now = 120
    assert hosts.admits("a")
    clock.now = 180
    assert hosts.admits("a"), "nothing was heard of the trial"
    hosts.report("a", True)
    assert hosts.admits("a")
    assert hosts.admits("a")


def test_hosts_without_connections_and_failures_are_forgotten():
    async def go():
        hosts = Hosts(1, failures=3, rest_s=60)
        for i in range(100):
            await hosts.enter(f"h{i}")
            hosts.report(f"h{i}", True)
            hosts.leave(f"h{i}")
        return len(hosts)

    assert asyncio.run(go()) == 0


def test_waiting_in_line_survives_cancellation():
    async def go():
        hosts = Hosts(1, failures=3, rest_s=60)
        await hosts.enter("a")
        waiting = [asyncio.create_task(hosts.enter("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while in line
        hosts.leave("a")  # hands the connection to the second
        waiting[1].cancel()  # after it was handed over
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        await waiting[2]
        assert not hosts.has_room("a")
        hosts.leave("a")
        assert hosts.has_room("a")
        return len(hosts)

    assert asyncio.run(asyncio.wait_for(go(), 5)) == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(1, 4), st.integers(1, 20))
def test_every_row_is_given_once_and_no_host_is_crowded(names, per_host, workers):
    async def go():
        hosts = Hosts(per_host, failures=3, rest_s=60)
        queue = RowQueue(((i, "" if name == "e" else name) for i, name in enumerate(names)), hosts)
        given_out, busy, most = [], Counter(), Counter()

        async def work():
            while (i := await queue.next()) is not None:
                given_out.append(i)
                host = names[i]
                if host != "e":
                    assert hosts.has_room(host), "a row is given only where there is room"
                    await hosts.enter(host)
                busy[host] += 1
                most[host] = max(most[host], busy[host])
                await asyncio.sleep(0)
                if i % 3 == 0:
                    await asyncio.sleep(0)
                busy[host] -= 1
                if host != "e":
                    hosts.leave(host)
                await asyncio.sleep(0)  # decoding, after the connection was given back

        await asyncio.gather(*[work() for _ in range(workers)])
        return given_out, most

    given_out, most = asyncio.run(asyncio.wait_for(go(), 10))
    assert sorted(given_out) == list(range(len(names)))
    assert all(count <= per_host for host, count in most.items() if host != "e")


def test_a_busy_host_keeps_no_worker_from_others():
    async def go():
        hosts = Hosts(1, failures=3, rest_s=60)
        queue = RowQueue([(0, "slow"), (1, "slow"), (2, "slow"), (3, "quick")], hosts)
        assert await queue.next() == 0
        await hosts.enter("slow")
        assert await queue.next() == 3
        stuck = asyncio.create_task(queue.next())
        await asyncio.sleep(0)
        assert queue.held_up == "slow"
        hosts.leave("slow")
        return await stuck

    assert asyncio.run(asyncio.wait_for(go(), 5)) == 1


def test_room_for_two_wakes_two():
    async def go():
        hosts = Hosts(2, failures=3, rest_s=60)
        queue = RowQueue(((i, "a") for i in range(4)), hosts)
        for _ in range(2):
            await queue.next()
            await hosts.enter("a")
        stuck = [asyncio.create_task(queue.next()) for _ in range(2)]
        await asyncio.sleep(0)
        hosts.leave("a")
        hosts.leave("a")  # nobody calls `next` again: its workers are still decoding
        return await asyncio.gather(*stuck)

    assert asyncio.run(asyncio.wait_for(go(), 5)) == [2, 3]


@pytest.mark.parametrize(
    ("values", "token"),
    [
        ([], None),
        (["noai"], "noai"),
        (["NoIndex, nofollow"], "noindex"),
        (["all", "noarchive, noimageai"], "noimageai"),
        (["none"], "none"),
        (["pairmill: noai"], "noai"),
        (["*: noimageindex"], "noimageindex"),
        (["otherbot: noai"], None),
        (["otherbot: noarchive, noai, noindex"], None),
        (["otherbot: noarchive", "noai"], "noai"),
        (["otherbot: nosnippet, pairmill: noindex"], "noindex"),
        (["unavailable_after: 25 Jun 2040 15:00:00 PST"], None),
        (["unavailable_after: Friday, 25-Jun-40 15:00:00 GMT, noai"], "noai"),
        (["max-image-preview: large, noindex"], "noindex"),
        (["max-snippet: 20"], None),
        (["noaindex, indexno, index"], None),
        (["", " , :"], None),
    ],
)
def test_robots_tag(values, token):
    assert refusal(values) == token
