"""Waiting queues: order of service, ties, preempted requests first, removal from the middle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.request import EngineCoreRequest, SamplingParams
from nybble.engine.sched.queue import FCFSRequestQueue, PriorityRequestQueue, create_request_queue
from nybble.engine.sched.request import Request

PARAMS = SamplingParams()


def make(seq: int, priority: int = 0, arrival: float = 0.0) -> Request:
    message = EngineCoreRequest(
        request_id=str(seq), prompt_token_ids=[1], params=PARAMS, seed=0, max_tokens=1, priority=priority,
        arrival_time=arrival,
    )  # fmt: skip
    return Request(message, seq=seq, max_num_tokens=2)


def drain(queue: FCFSRequestQueue | PriorityRequestQueue) -> list[int]:
    served = []
    while queue:
        assert queue.peek() is next(iter(queue))
        served.append(queue.pop().seq)
    return served


@pytest.mark.parametrize(("policy", "kind"), [("fcfs", FCFSRequestQueue), ("priority", PriorityRequestQueue)])
def test_a_policy_has_its_queue(policy, kind):
    assert type(create_request_queue(policy)) is kind


def test_fcfs_serves_preempted_requests_first_and_in_their_old_order():
    queue = FCFSRequestQueue()
    requests = [make(i) for i in range(4)]
    queue.add(requests[2])
    queue.add(requests[3])
    for victim in (requests[1], requests[0]):  # the last running is preempted first
        queue.prepend(victim)
    assert [r.seq for r in queue] == drain(queue) == [0, 1, 2, 3]


def test_priority_serves_low_numbers_then_early_arrivals_then_ties_in_order():
    queue = PriorityRequestQueue()
    for request in (make(0, 1, 5.0), make(1, 1, 2.0), make(2, 0, 9.0), make(3, 1, 2.0), make(4, -1, 9.0)):
        queue.add(request)
    assert drain(queue) == [4, 2, 1, 3, 0]


@given(st.data(), st.sampled_from([FCFSRequestQueue, PriorityRequestQueue]))
def test_removal_keeps_the_order_of_the_others(data, kind):
    requests = [make(i, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for i in range(8)]
    queue = kind()
    for request in requests[:7]:
        queue.add(request)
    gone = data.draw(st.sets(st.sampled_from(requests)))  # the last one was never queued
    expected = [r.seq for r in sorted(requests[:7], key=kind.urgency) if r not in gone]
    queue.remove(gone)
    assert len(queue) == len(expected)
    assert [r.seq for r in queue] == expected
    assert drain(queue) == expected
