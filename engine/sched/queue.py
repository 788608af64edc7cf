"""Waiting requests, first come first served or by priority, and the order each policy puts requests in."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator

from .request import Request

Urgency = tuple[float, ...]
"""Sort key of a request: smaller is served first and preempted last. Never equal for two requests."""


class RequestQueue(ABC):
    """Requests that wait to run. Iteration is in the order of service."""

    @staticmethod
    @abstractmethod
    def urgency(request: Request) -> Urgency:
        """The policy: the total order that running requests are kept in."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a newcomer."""

    @abstractmethod
    def prepend(self, request: Request) -> None:
        """Queue a preempted request: before everyone that its policy does not put first."""

    @abstractmethod
    def peek(self) -> Request:
        """The next request to serve; IndexError when empty."""

    @abstractmethod
    def pop(self) -> Request:
        """Remove and return the next request to serve."""

    @abstractmethod
    def remove(self, requests: Collection[Request]) -> None:
        """Remove requests, wherever they are, in one pass; those not queued are ignored."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Request]: ...


class FCFSRequestQueue(RequestQueue):
    """First come, first served."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()

    @staticmethod
    def urgency(request: Request) -> Urgency:
        return (request.seq,)

    def add(self, request: Request) -> None:
        self._queue.append(request)

    def prepend(self, request: Request) -> None:
        self._queue.appendleft(request)

    def peek(self) -> Request:
        return self._queue[0]

    def pop(self) -> Request:
        return self._queue.popleft()

    def remove(self, requests: Collection[Request]) -> None:
        self._queue = deque(r for r in self._queue if r not in requests)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)


class PriorityRequestQueue(RequestQueue):
    """Lowest `priority` number first, then by arrival time, then in the order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[Urgency, Request]] = []

    @staticmethod
    def urgency(request: Request) -> Urgency:
        return (request.message.priority, request.message.arrival_time, request.seq)

    def add(self, request: Request) -> None:
        heapq.heappush(self._heap, (self.urgency(request), request))

    def prepend(self, request: Request) -> None:
        self.add(request)

    def peek(self) -> Request:
        return self._heap[0][1]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[1]

    def remove(self, requests: Collection[Request]) -> None:
        self._heap = [entry for entry in self._heap if entry[1] not in requests]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in sorted(self._heap))


def create_request_queue(policy: str) -> RequestQueue:
    """The queue of a `scheduling_policy`: "fcfs" or "priority"."""
    return {"fcfs": FCFSRequestQueue, "priority": PriorityRequestQueue}[policy]()
