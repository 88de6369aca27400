"""Where a run on a cluster keeps its books: which images are out, with whom, and who died of what.

One desk a run, an actor beside the driver; readers and labelers ask it, the driver tells it what is done
(`on_ray`). It holds the tasks between the oldest image that is not done and ``spread`` images further, so that neither the
desk, nor the driver, nor a manifest that waits for its next line grows with the folder. It knows nothing of Ray.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .stream import Task

SILENT = 30.0
"""Seconds after which the images of a labeler that does not ask whether to stop may go to others. They are not blamed: a
node may be lost, or the network."""
PATIENCE = 60.0
"""Seconds after which images that are out are dealt again to readers that would be idle; twice as many the next time."""


class Word(NamedTuple):
    """What a labeler is told of the images that it was brought."""

    stopped: bool
    """None of them: the run ends."""
    leave: list[int]
    """Not these: they are done, or another labeler has them."""
    deaths: dict[int, int]
    """So many labelers died with these in hand, as is known when others are in their places."""


@dataclass(slots=True)
class _Hand:
    """Tasks that are read together."""

    tasks: list[Task]
    left: set[int]
    """Numbers of those that are not done."""
    due: float = 0.0
    """When it is dealt once more if it is not done."""
    patience: float = PATIENCE
    taken: dict[tuple[int, int], list[Task]] = field(default_factory=dict)
    """What each slot was given: a reader that is sent again is given the same."""


@dataclass(slots=True)
class _Life:
    """One process of a labeler; started again, it is another one."""

    labeler: str
    host: str
    heard: float
    dead: bool = False
    seat: int = 0


@dataclass
class Desk:
    """The books of one run.

    Args:
        spread: no image is dealt out this far ahead of the oldest that is not done.
        patience, silent: seconds, see ``PATIENCE`` and ``SILENT``.
        clock: seconds.
    """

    spread: int
    patience: float = PATIENCE
    silent: float = SILENT
    clock: Callable[[], float] = time.monotonic
    _hands: dict[int, _Hand] = field(default_factory=dict)
    """By the number of their first task, ascending: all that are not done."""
    _hand_of: dict[int, int] = field(default_factory=dict)
    """By task."""
    _waiting: deque[int] = field(default_factory=deque)
    """Hands that nobody has read yet."""
    _slots: dict[tuple[int, int], int] = field(default_factory=dict)
    """The hand that each slot was given."""
    _lives: dict[str, _Life] = field(default_factory=dict)
    _holder: dict[int, str] = field(default_factory=dict)
    """The life that has an image in hand."""
    _deaths: Counter[int] = field(default_factory=Counter)
    _news: list[str] = field(default_factory=list)
    _ended: bool = False
    _stopped: bool = False

    # ---- the driver ----

    def put(self, tasks: Sequence[Task]) -> bool:
        """Takes the next tasks; False where that would be too far ahead: offer them again later."""
        first = tasks[0].number
        if self._hands and first >= min(next(iter(self._hands.values())).left) + self.spread:
            return False
        self._hands[first] = _Hand(list(tasks), {task.number for task in tasks}, patience=self.patience)
        self._hand_of.update(dict.fromkeys(self._hands[first].left, first))
        self._waiting.append(first)
        return True

    def end(self) -> None:
        """No tasks will follow."""
        self._ended = True

    def stop(self) -> None:
        """What is not in a labeler's hand is left."""
        self._stopped = True

    def start_round(self) -> None:
        """All readers and labelers so far are gone; what they had is dealt again."""
        self._waiting = deque(self._hands)
        for hand in self._hands.values():
            hand.taken.clear()
        self._slots.clear()
        self._lives.clear()
        self._holder.clear()

    def done(self, numbers: Sequence[int]) -> tuple[list[int], list[str], bool]:
        """Strikes out images whose receipts came.

        Returns:
            Those of them that were not done before, the news since, and whether all is done.
        """
        fresh = []
        for number in numbers:
            first = self._hand_of.pop(number, None)
            if first is None:
                continue
            fresh.append(number)
            self._holder.pop(number, None)
            self._deaths.pop(number, None)
            hand = self._hands[first]
            hand.left.discard(number)
            if not hand.left:
                del self._hands[first]
        news, self._news = self._news, []
        return fresh, news, self._ended and not self._hands

    def open(self) -> tuple[int, bool]:
        """How many tasks are not done, and whether more may come."""
        return len(self._hand_of), not self._ended

    # ---- readers ----

    def take(self, slot: tuple[int, int]) -> list[Task] | None:
        """The tasks that a reader is to read: empty, nothing is left for it; None, ask again in a while.

        Args:
            slot: (round, number) of the reader.
        """
        if slot in self._slots:
            again = self._hands.get(self._slots[slot])
            return again.taken[slot] if again else []
        if self._stopped or (self._ended and not self._hands):
            return []
        if self._waiting:
            hand = self._hands.get(first := self._waiting.popleft())
            if hand is None:  # read twice, and done meanwhile
                return self.take(slot)
        else:
            late = ((first, hand) for first, hand in self._hands.items() if self.clock() >= hand.due)
            first, hand = next(late, (-1, None))
            if hand is None:
                return None
            hand.patience *= 2
        hand.due = self.clock() + hand.patience
        self._slots[slot] = first
        hand.taken[slot] = [task for task in hand.tasks if task.number in hand.left]
        return hand.taken[slot]

    # ---- labelers ----

    def hello(self, labeler: str, life: str, host: str) -> int:
        """A labeler's process introduces itself. Gives its seat: the first of its host that is free."""
        for former in self._lives.values():
            if former.labeler == labeler and not former.dead:
                former.dead = True
                self._news.append(f"the labeler on {former.host} died; another one goes on with its images")
        taken = {other.seat for other in self._lives.values() if other.host == host and not other.dead}
        seat = next(number for number in itertools.count() if number not in taken)
        self._lives[life] = _Life(labeler, host, self.clock(), seat=seat)
        return seat

    def beat(self, life: str) -> bool:
        """Says that a labeler lives; tells it whether to stop."""
        if life in self._lives:
            self._lives[life].heard = self.clock()
        return self._stopped

    def begin(self, life: str, numbers: Sequence[int]) -> Word:
        """A labeler takes images in hand."""
        if self._stopped:
            return Word(True, [], {})
        leave, deaths = [], dict[int, int]()
        for number in numbers:
            holder = self._holder.get(number)
            if number not in self._hand_of or (holder not in (None, life) and self._lives_on(holder)):
                leave.append(number)
                continue
            if holder in self._lives and self._lives[holder].dead:
                self._deaths[number] += 1
            self._holder[number] = life
            if self._deaths[number]:
                deaths[number] = self._deaths[number]
        return Word(False, leave, deaths)

    def put_back(self, life: str, numbers: Sequence[int]) -> None:
        """A labeler has these images in hand no longer."""
        for number in numbers:
            if self._holder.get(number) == life:
                del self._holder[number]

    def _lives_on(self, life: str | None) -> bool:
        known = self._lives.get(life or "")
        return known is not None and not known.dead and self.clock() - known.heard < self.silent
