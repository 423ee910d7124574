"""What a node starter knows of all ranks of the job: its own by their marks, the others through the wire."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict
from typing import Any

from harness.formats.outcome import Outcome
from harness.heartbeat import Beat
from harness.launch.job import Node
from harness.launch.silence import SilenceWatch
from harness.launch.verdict import End
from harness.launch.wire import HEARD_S, Wire
from harness.log import say

_NEVER = Beat(0.0, 0, "start", 0)


class Peers:
    """Watches the ranks of all hosts from the first, and hears on the others what the first has found.

    Args:
        node: this host's part of the job.
        host: its name.

    Raises:
        Failure: when the first host cannot listen for the others.
    """

    def __init__(self, node: Node, host: str):
        self.node, self.host = node, host
        self._watch = SilenceWatch(node.silence_s)
        self._beats: dict[int, dict[int, Beat]] = {}
        self._stopped: dict[int, set[int]] = {}
        self._hosts: dict[int, str] = {}
        self._wire: Wire | None = None
        self._requests: list[int] = []
        if len(node.job.slots) > 1:
            self._wire = Wire(node.number, node.job)

    def tell(self, end: End) -> None:
        """How the first rank of this host ended badly."""
        if self._wire is not None:
            self._wire.send({"kind": "ended", "end": end.as_message()})

    def heard(self) -> End | None:
        """How a rank of another host ended badly, when one did."""
        found = None
        for node, message in self._wire.receive() if self._wire is not None else ():
            if message.get("kind") == "beats":
                self._take(node, message)
            elif message.get("kind") == "request":
                self._requests.append(int(message["number"]))
                if self.node.number == 0 and self._wire is not None:
                    self._wire.send(message, besides=node)
            elif message.get("kind") == "ended":
                found = found or End.from_message(message["end"])
                if self.node.number == 0 and self._wire is not None:
                    self._wire.send({"kind": "ended", "end": message["end"]}, besides=node)
        return found

    def requests(self) -> list[int]:
        """Signals that what launched the job has passed on since the last call."""
        asked, self._requests = self._requests, []
        return asked

    def look(self, beats: dict[int, Beat], stopped: set[int]) -> End | None:
        """Tell where this host's ranks are, once a second, and find a rank or a host that is silent.

        Args:
            beats: last mark of each rank of this host that runs.
            stopped: ranks that stand still.
        """
        now_s = time.monotonic()
        if self._wire is not None:
            ages = {str(rank): asdict(beat) | {"at_s": now_s - beat.at_s} for rank, beat in beats.items()}
            self._wire.send({"kind": "beats", "host": self.host, "ages": ages, "stopped": sorted(stopped)})
            for node in self._wire.lost():
                if node < len(self.node.job.slots):
                    return self._lost(node)
                self._wire.forget(node)
                self._requests.append(signal.SIGTERM)
                say("What launched this job has fallen silent; stopping.")
        if self.node.number != 0:
            return None
        self._beats[0], self._stopped[0], self._hosts[0] = beats, stopped, self.host
        if len(self._beats) < len(self.node.job.slots):
            return None
        together = {rank: beat for own in self._beats.values() for rank, beat in own.items()}
        silent = self._watch.judge(together, set().union(*self._stopped.values()), now_s=now_s)
        if silent is None:
            return None
        place = next(node for node, own in self._beats.items() if silent.rank in own)
        return End(silent.rank, -9, silent.beat, self._hosts[place], silent)

    def close(self, outcome: Outcome) -> None:
        """Say goodbye to the others, and from the first host how the job ended, to what launched it: it may not see the run's folder."""
        if self._wire is not None:
            self._wire.receive()  # what is left unread would cut the connection before the last words have gone
            if self.node.number == 0:
                self._wire.send({"kind": "outcome", "outcome": asdict(outcome)})
            self._wire.close()

    def _take(self, node: int, message: dict[str, Any]) -> None:
        now_s = time.monotonic()
        self._hosts[node] = message["host"]
        self._beats[node] = {int(rank): Beat(**told | {"at_s": now_s - told["at_s"]}) for rank, told in message["ages"].items()}
        self._stopped[node] = set(message["stopped"])

    def _lost(self, node: int) -> End:
        first = sum(self.node.job.slots[:node])
        ranks = f"ranks {first} to {first + self.node.job.slots[node] - 1}" if self.node.job.slots[node] > 1 else f"rank {first}"
        name = self._hosts.get(node, self.node.job.master if node == 0 else f"number {node}")
        beat = self._beats.get(node, {}).get(first, _NEVER)
        return End(first, -9, beat, name, lost=f"Host {name} ({ranks}) is lost: nothing was heard of its starter for {HEARD_S:.0f} s.")
