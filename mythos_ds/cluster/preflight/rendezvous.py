"""Processes meet at a store of rank 0 and tell each other plain values, so that one that is missing has a name."""

import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.parallel.rendezvous import listen, open_store, reach

POLL_S = 0.05


class MissingRank(Exception):
    """Ranks did not arrive in time; rank 0 raises it, with their names."""


class Meeting:
    """The calling process's end of the store. Rank 0 listens at the launcher's master address.

    Raises ParallelError where the address cannot be listened at, and MissingRank on a rank that does not reach it.
    """

    def __init__(self, environment: ProcessEnvironment, limit_s: float):
        self.environment, self._deadline = environment, time.monotonic() + limit_s
        self._names: dict[int, str] = {}
        listener = None
        if environment.rank == 0:
            environment, listener = listen(environment)
        try:
            if environment.rank:
                reach(environment, limit_s)
            self.store = open_store(environment, limit_s, listener)
        except ParallelError as error:
            if environment.rank == 0:
                raise
            where = f"{environment.master_addr}:{environment.master_port}"
            raise MissingRank(f"rank 0 at {where} was not reached: {error}") from None
        self.store.set(f"name/{environment.rank}", socket.gethostname())

    @property
    def left_s(self) -> float:
        """Seconds until the meeting's time is over."""
        return self._deadline - time.monotonic()

    def tell(self, stage: str, value: Any) -> None:
        """Leave this rank's value of `stage` for rank 0."""
        self.store.set(f"{stage}/{self.environment.rank}", json.dumps(value))

    def collect(self, stage: str) -> list[Any]:
        """Everybody's value, by rank; rank 0 only. Raises MissingRank with the names of those who gave none."""
        missing = set(range(self.environment.world_size))
        values: dict[int, Any] = {}
        while missing and self.left_s > 0:
            for rank in sorted(missing):
                if self.store.check([f"{stage}/{rank}"]):
                    values[rank] = json.loads(self.store.get(f"{stage}/{rank}"))
            missing -= set(values)
            time.sleep(POLL_S if missing else 0)
        if missing:
            raise MissingRank(
                f"no answer in '{stage}' from {', '.join(self.name(rank) for rank in sorted(missing)[:8])}"
            )
        return [values[rank] for rank in range(self.environment.world_size)]

    def announce(self, stage: str, value: Any) -> None:
        """Rank 0's value for all."""
        self.store.set(f"all/{stage}", json.dumps(value))

    def announced(self, stage: str) -> bool:
        """Whether `announce` was called for `stage`."""
        return self.store.check([f"all/{stage}"])

    def limit(self, seconds: float) -> None:
        """End the meeting in `seconds`, whatever time was left."""
        self._deadline = time.monotonic() + seconds

    def hear(self, stage: str) -> Any:
        """What rank 0 announced. Raises MissingRank where it says nothing in time."""
        key = f"all/{stage}"
        while self.left_s > 0:
            if self.store.check([key]):
                return json.loads(self.store.get(key))
            time.sleep(POLL_S)
        raise MissingRank(f"rank 0 said nothing about '{stage}' in time")

    def name(self, rank: int) -> str:
        """ "rank 3 (node7)", or that it never came."""
        if self.store.check([f"name/{rank}"]):
            return f"rank {rank} ({self.store.get(f'name/{rank}').decode()})"
        return f"rank {rank} (never reached rank 0)"


class Watchdog:
    """Calls `expire` in a thread if it is not stopped in time: a device or a collective may hang for good."""

    def __init__(self, limit_s: float, expire: Any):
        self._timer = threading.Timer(limit_s, expire)
        self._timer.daemon = True

    def __enter__(self) -> "Watchdog":
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


def nodes_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Ranks by host, in the order of ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    return nodes
