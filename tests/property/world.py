"""A chain of operators in miniature: the real sender, receiver, codec and positions; the actor's bookkeeping, no loop.

    source ──▶ first ──▶ second ──▶ sink (with a journal)

Every step is one small thing that can happen: a frame moves, a message is worked off, a connection breaks at one of
its ends or at both, an operator is killed and started anew while its predecessor may still be alive, an
acknowledgement is late, a step of a move is done. The order of the steps is all that a test decides, so any history
can be repeated and shrunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from nomad.actor.progress import SOURCE_BITS, Chunk
from nomad.control import Role
from nomad.delivery.codec import Codec
from nomad.delivery.frames import NOWHERE, Ping, Places, Pong, Position, Resume, step, unpack
from nomad.delivery.receiver import ACK_DELAY, Batch, Receiver
from nomad.delivery.sender import Sender, Tail
from nomad.delivery.states import State
from nomad.errors import Fenced, ProtocolError
from nomad.transport.base import Frame

WINDOW_MESSAGES = 6
WINDOW_BYTES = 90
MOST_MESSAGES, MOST_BYTES = 8, 120
"""With what is granted to a new connection (see conftest.py)."""

Value = list[int]
"""What flows: the source's number, and what the operators on the way appended."""

Function = Callable[[Value], "list[Value | None]"]


def weight(value: Value, modulus: int) -> int:
    """A number below `modulus` that depends on the value alone, in no obvious way."""
    return sum((k + 3) * (v + 1) * 2654435761 for k, v in enumerate(value)) // 97 % modulus


def same(value: Value) -> list[Value | None]:
    return [value]


def drop(value: Value) -> list[Value | None]:
    return [None if weight(value, 3) == 0 else [*value, -1]]


def expand(value: Value) -> list[Value | None]:
    """Up to 8 of them, which is more than the window; some are None, as generators may yield."""
    count = weight(value, 5) * 2
    return [None if weight([*value, k], 6) == 0 else [*value, k] for k in range(count)]


def large(value: Value) -> list[Value | None]:
    """Some results are larger than the window."""
    return [[*value, *([1 << 40] * (12 if weight(value, 4) == 0 else 0))]]


FUNCTIONS: dict[str, Function] = {"same": same, "drop": drop, "expand": expand, "large": large}


class Disk:
    """What survives an operator's process: the journal, the messages set aside, the results of those run again."""

    def __init__(self) -> None:
        self.journal: dict[int, Position] = {}
        self.aside: dict[tuple[int, Position], Value] = {}
        self.known: set[tuple[int, Position]] = set()
        self.reruns: dict[int, list[Value]] = {}


class Instance:
    """One life of an operator: `number` 0 is the source."""

    def __init__(self, world: World, number: int, epoch: int, role: Role = Role.ACTIVE):
        self.world = world
        self.role = role
        self.successor = role is Role.STANDBY
        """It takes another instance's place, and isn't to be heard before it has caught up."""
        self.number = number
        self.epoch = epoch
        self.disk = world.disks[number]
        self.function = world.functions[number]
        self.coder = Codec()
        self.alive = True
        self.receiver: Receiver | None = None
        self.sender: Sender | None = None
        if number:
            self.receiver = Receiver(
                f"p:{number - 1}>{number}", epoch, window_messages=WINDOW_MESSAGES, window_bytes=WINDOW_BYTES,
                received=self.disk.journal,
            )  # fmt: skip
        if number < world.last:
            self.sender = Sender(f"p:{number}>{number + 1}", epoch, quiet=self.successor)
        self.batch: Batch | None = None
        self.left: Chunk | None = None
        self.pending: deque[tuple[Value, int, Position]] = deque()
        """What the function is to be called for next."""
        self.known: set[tuple[int, Position]] = set()
        """What was set aside when this instance became the one that does that."""
        self.on_the_way: deque[tuple[int, int]] = deque()
        self.newest_run = epoch << SOURCE_BITS
        self.resent = True
        self.incoming: Connection | None = None
        self.waiting: list[Connection] = []
        """Incoming, proven and not in use yet."""
        self.outgoing: Connection | None = None
        self.standby: Connection | None = None
        """To the next instance of the next operator."""
        self.tail: tuple[Tail, Connection] | None = None
        """To the instance before."""
        self.sent: list[tuple[int, Value]] = []
        """Lane and value of each message sent, by its number."""
        self.checked = 0
        """Messages numbered below this are settled, and rightly so."""
        self.next_epoch = 0
        """The newest epoch of the next operator that this instance knows of."""
        if role is Role.ACTIVE:
            self.activate()

    def activate(self) -> None:
        """What was set aside is this instance's."""
        self.role = Role.ACTIVE
        self.known = set(self.disk.known)
        self.resent = not self.disk.reruns

    def retire(self) -> None:
        """It isn't any more."""
        self.role = Role.RETIRED

    @property
    def numbered(self) -> int:
        return self.sender.numbered if self.sender else 0

    @property
    def settled(self) -> int:
        return self.sender.settled if self.sender else 0

    @property
    def room(self) -> int:
        return self.sender.room_for(20.0) if self.sender else 1000

    def emit(self, values: list[Value], places: Places) -> None:
        assert self.sender
        body, buffers = self.coder.encode(values)
        self.sender.submit(body, buffers, places, 0)
        self.sent += [(places.lane, value) for value in values]

    def work(self, count: int) -> bool:
        """Work off up to `count` messages; False when there was nothing to do."""
        assert self.receiver
        if self.role is Role.STANDBY:
            return False
        if not self.resent and self.may_rerun:
            return self.send_old()
        if self.room <= 0:
            return self.release()
        if self.pending:
            return self.go_on()
        if self.left is None:
            if self.batch is not None:
                self.batch.done(self.numbered)
                self.batch = None
                self.settle()
            if not self.receiver.inbox:
                self.settle()
                return self.receiver.caught_up and self.release(caught_up=True)
            self.batch = batch = self.receiver.inbox.popleft()
            values = self.coder.decode(batch.body, batch.buffers)
            assert len(values) == len(batch.places)
            self.left = Chunk(values, batch.places, 0).cut(batch.skip, len(values))
        size, count = min(count, self.room), len(self.left.values)
        chunk, self.left = self.left.cut(0, size), self.left.cut(size, count) if size < count else None
        self.pending += [(value, chunk.places.lane, chunk.places[k]) for k, value in enumerate(chunk.values)]
        self.go_on()
        return True

    def go_on(self) -> bool:
        """Call for what is pending; False when that is impossible now."""
        moved = False
        while self.pending and self.call(*self.pending[0]):
            self.pending.popleft()
            moved = True
        return moved

    def call(self, value: Value, lane: int, position: Position) -> bool:
        """False: this instance may set nothing aside, and waits."""
        key = lane, position
        if self.sender is None:
            self.world.arrived(value, lane)
            self.disk.journal[lane] = position
        elif key in self.known:
            pass
        elif self.world.raises(self.number, value):
            if self.role is not Role.ACTIVE:
                return False
            if key not in self.disk.known:
                self.disk.aside[key] = value
                self.disk.known.add(key)
        else:
            self.emit_all(self.function(value), lane, position)
        return True

    def release(self, *, caught_up: bool = False) -> bool:
        """It may be heard from now on; False if it might have been before."""
        if not self.successor or self.sender is None or self.receiver is None or self.receiver.first is None:
            return False
        self.successor = False
        self.sender.release(caught_up=caught_up)
        return True

    @property
    def may_rerun(self) -> bool:
        assert self.receiver
        return self.role is Role.ACTIVE and not (self.successor and self.receiver.first is None)

    def emit_all(self, results: list[Value | None], lane: int, position: Position) -> None:
        """In batches of two, so that the results of one message are spread over several."""
        many = self.function is expand
        made = [(r, position.path + step(k) if many else position.path) for k, r in enumerate(results) if r is not None]
        for start in range(0, len(made), 2):
            part = made[start : start + 2]
            paths = [path for _, path in part]
            origins = [position.origin] * len(part)
            self.emit([r for r, _ in part], Places(lane, origins, paths if any(paths) else None))

    def rerun(self) -> bool:
        """Run the oldest message that was set aside again, successfully."""
        if not self.disk.aside or not self.may_rerun or not self.resent or self.room <= 0:
            return False
        key = min(self.disk.aside)
        results = [r for r in self.function(self.disk.aside.pop(key)) if r is not None]
        if results:
            self.newest_run += 1
            self.disk.reruns[self.newest_run] = results
            self.send_run(self.newest_run)
        return True

    def send_old(self) -> bool:
        if self.room <= 0:
            return False
        mine = {number for _, number in self.on_the_way}
        for number in sorted(self.disk.reruns):
            self.newest_run = max(self.newest_run, number)
            if number not in mine:
                self.send_run(number)
        self.resent = True
        return True

    def send_run(self, number: int) -> None:
        results = self.disk.reruns[number]
        for start in range(0, len(results), 2):
            part = results[start : start + 2]
            paths = [step(start + k) for k in range(len(part))]
            self.emit(part, Places(self.number, [number] * len(part), paths))
        self.on_the_way.append((self.numbered, number))

    def settle(self) -> None:
        while self.role is Role.ACTIVE and self.on_the_way and self.on_the_way[0][0] <= self.settled:
            self.disk.reruns.pop(self.on_the_way.popleft()[1], None)
        if self.receiver is not None:
            self.receiver.settle(self.settled, self.world.now)

    # -- connections, as `nomad.delivery.inlink` and `outlink` treat them

    def take_over(self, connection: Connection) -> None:
        """A sender that waited is heard from now on, and none that came before it."""
        assert self.receiver
        self.receiver.admit(connection.dialer.epoch)
        epoch, older = connection.dialer.epoch, self.waiting[: self.waiting.index(connection)]
        before = [c for c in self.waiting if c.dialer.epoch < epoch or (c.dialer.epoch == epoch and c in older)]
        self.waiting = [c for c in self.waiting if c is not connection and c not in before]
        for other in before:
            other.end_listener()
        if self.incoming is not None:
            self.incoming.end_listener()
        self.incoming = connection
        self.receiver.opened(connection.dialer.epoch)

    def invite(self) -> None:
        """Nobody is heard: ask the newest that waits."""
        if self.incoming is None and self.waiting:
            max(self.waiting, key=lambda c: c.dialer.epoch).to_dialer.append(Ping().pack())

    def prefer(self) -> None:
        """The next operator's next instance is its instance now: send to that."""
        new, old = self.standby, self.outgoing
        assert self.sender
        if new is None or new.welcome is None or not new.agreed:
            for connection in (old, new):
                if connection is not None:
                    connection.end_dialer()
            return
        if old is not None and old.agreed:
            self.tail = self.sender.tail(), old
            self.sender.disconnected()
        elif old is not None:
            old.end_dialer()
        self.outgoing, self.standby = new, None
        self.sender.connected()
        self.sender.welcomed(new.welcome, self.world.now)
        self.next_epoch = new.listener.epoch


CONFIRM: Frame = (b"confirm",)


class Connection:
    """One connection between two instances, from the hello on. It ends at each end for itself."""

    def __init__(self, dialer: Instance, listener: Instance):
        self.dialer = dialer
        self.listener = listener
        self.to_listener: deque[Frame] = deque()
        self.to_dialer: deque[Frame] = deque()
        self.welcome: dict[str, Any] | None = None
        self.agreed = False
        self.ended = False

    def end_dialer(self) -> None:
        """The dialer finds it broken; what was on the way to it is lost."""
        if self.dialer.outgoing is self:
            self.dialer.outgoing = None
            assert self.dialer.sender
            self.dialer.sender.disconnected()
        if self.dialer.standby is self:
            self.dialer.standby = None
        if self.dialer.tail is not None and self.dialer.tail[1] is self:
            self.dialer.tail = None
        self.to_dialer.clear()

    def end_listener(self) -> None:
        """The listener finds it broken."""
        if self.listener.incoming is self:
            self.listener.incoming = None
            assert self.listener.receiver
            self.listener.receiver.disconnected()
        if self in self.listener.waiting:
            self.listener.waiting.remove(self)
        self.to_listener.clear()
        self.ended = True
        self.listener.invite()

    @property
    def read(self) -> bool:
        """Whether the dialer still reads it."""
        dialer = self.dialer
        own = self in (dialer.outgoing, dialer.standby) or (dialer.tail is not None and dialer.tail[1] is self)
        return own and dialer.alive

    @property
    def listening(self) -> bool:
        """Whether the listener still reads it: it does so until it knows better."""
        return self.listener.alive and not self.ended


class World:
    """The chain and all that can happen to it."""

    def __init__(self, first: str, second: str, *, failing: bool = False):
        self.functions = [same, FUNCTIONS[first], FUNCTIONS[second], same]
        self.last = len(self.functions) - 1
        self.failing = failing
        self.now = 0.0
        self.disks = [Disk() for _ in self.functions]
        self.epochs = [1] * len(self.functions)
        """Of the instances that the neighbours are told of."""
        self.newest = [1] * len(self.functions)
        """Of the instances that were started."""
        self.next: Instance | None = None
        """Takes the place of another one, while an operator moves."""
        self.moves = 0
        self.nodes = [Instance(self, number, 1) for number in range(len(self.functions))]
        self.zombies: list[Instance] = []
        """Instances that were replaced and are still alive, with the same folder."""
        self.connections: list[Connection] = []
        self.produced = 0
        self.got: list[Value] = []
        self.seen: set[tuple[int, ...]] = set()
        """What has arrived at the sink: whether in a lane of messages run again, and the value."""
        self.extras: list[Value] = []
        self.faults = 0
        self.refusals = 0

    # -- what the functions do

    def raises(self, number: int, value: Value) -> bool:
        return self.failing and weight([*value, number], 5) == 0

    def arrived(self, value: Value, lane: int) -> None:
        """The sink works on a message."""
        self.seen.add((bool(lane), *value))
        if lane:
            self.extras.append(value)
            return
        expected = self.expected()
        assert len(self.got) < len(expected), f"one too many: {value}"
        assert value == expected[len(self.got)], f"number {len(self.got)} is {value}, not {expected[len(self.got)]}"
        self.got.append(value)

    def rightly_settled(self, node: Instance) -> None:
        """All that came of what a sender takes for settled has arrived, or is set aside and kept by those after it."""
        while node.checked < node.settled:
            lane, value = node.sent[node.checked]
            node.checked += 1
            values = [value]
            for number in range(node.number + 1, self.last):
                values = [
                    result
                    for value in values
                    if not self.raises(number, value)
                    for result in self.functions[number](value)
                    if result is not None
                ]
            for result in values:
                assert (bool(lane), *result) in self.seen, f"{result} is settled at {node.number} and hasn't arrived"

    def expected(self) -> list[Value]:
        """What the sink must get from the source's messages, in order: those that aren't set aside on the way."""
        values: list[Value] = [[n] for n in range(self.produced)]
        for number in (1, 2):
            values = [
                result
                for value in values
                if not self.raises(number, value)
                for result in self.functions[number](value)
                if result is not None
            ]
        return values

    def expected_extras(self) -> list[Value]:
        """What must come of the messages that were set aside, once all have been run again; in any order."""
        found: list[Value] = []
        values: list[tuple[Value, bool]] = [([n], False) for n in range(self.produced)]
        for number in (1, 2):
            values = [
                (result, extra or self.raises(number, value))
                for value, extra in values
                for result in self.functions[number](value)
                if result is not None
            ]
        found += [value for value, extra in values if extra]
        return sorted(found)

    # -- what can happen

    def produce(self, count: int) -> bool:
        source = self.nodes[0]
        count = min(count, source.room)
        if count <= 0:
            return False
        numbers = range(self.produced, self.produced + count)
        first = (source.epoch << SOURCE_BITS) + numbers.start + 1
        self.produced += count
        source.emit([[n] for n in numbers], Places(0, range(first, first + count)))
        return True

    def dial(self, number: int, *, zombie: int | None = None) -> bool:
        """An operator, or an instance that it replaced, dials the next one; it may meet one that was replaced."""
        dialer = self.nodes[number]
        listener = self.nodes[number + 1]
        if zombie is not None:
            old = [z for z in self.zombies if z.alive and z.number in (number, number + 1)]
            if not old:
                return False
            chosen = old[zombie % len(old)]
            dialer, listener = (chosen, listener) if chosen.number == number else (dialer, chosen)
        if dialer.outgoing is not None:
            dialer.outgoing.end_dialer()
        assert dialer.sender
        assert listener.receiver
        connection = Connection(dialer, listener)
        dialer.outgoing = connection
        dialer.sender.connected()
        self.connections.append(connection)
        try:
            connection.welcome = listener.receiver.welcome(dialer.sender.hello())
        except Fenced:
            assert dialer.epoch < self.epochs[number]
            connection.end_dialer()
        return True

    # -- a move, step by step

    def prepare(self, number: int) -> bool:
        """The next instance of an operator is started."""
        if self.next is not None:
            return False
        self.newest[number] += 1
        self.next = Instance(self, number, self.newest[number], Role.STANDBY)
        return True

    def greet(self, *, before: bool) -> bool:
        """The operator before greets the next instance, or that one the operator behind."""
        new = self.next
        if new is None:
            return False
        dialer, listener = (self.nodes[new.number - 1], new) if before else (new, self.nodes[new.number + 1])
        previous = dialer.standby if before else dialer.outgoing
        if previous is not None:
            previous.end_dialer()
        assert dialer.sender
        assert listener.receiver
        connection = Connection(dialer, listener)
        self.connections.append(connection)
        connection.welcome = listener.receiver.welcome(dialer.sender.hello())
        if before:
            dialer.standby = connection
        else:
            dialer.outgoing = connection
            dialer.sender.connected()
        return True

    def hand_over(self) -> bool:
        """One of the two instances changes its role: first the old, then the new one."""
        if self.next is None or self.next.role is Role.ACTIVE:
            return False
        old = self.nodes[self.next.number]
        if old.role is Role.ACTIVE:
            old.retire()
        else:
            self.next.activate()
        return True

    def switch(self) -> bool:
        """From here it only goes forward. The operator before is told."""
        new = self.next
        if new is None or new.role is not Role.ACTIVE:
            return False
        old, self.next = self.nodes[new.number], None
        self.nodes[new.number] = new
        self.epochs[new.number] = new.epoch
        self.moves += 1
        if old.alive:
            self.zombies.append(old)
        before = self.nodes[new.number - 1]
        assert before.sender
        before.sender.expect(new.epoch)
        before.next_epoch = max(before.next_epoch, new.epoch)
        before.prefer()
        return True

    def roll_back(self) -> bool:
        """The next instance dies, or is ended."""
        new = self.next
        if new is None:
            return False
        self.next = None
        self.end(new)
        old = self.nodes[new.number]
        if old.role is Role.RETIRED:
            old.activate()
        return True

    def end_one(self, which: int) -> bool:
        """An instance that was replaced ends."""
        alive = [zombie for zombie in self.zombies if zombie.alive]
        if not alive:
            return False
        self.end(alive[which % len(alive)])
        return True

    def end(self, instance: Instance) -> None:
        """It is killed."""
        instance.alive = False
        for connection in self.connections:
            if instance in (connection.dialer, connection.listener):
                connection.end_dialer()
                connection.end_listener()

    # -- connections

    def agree(self, connection: Connection) -> bool:
        """The welcome arrives; the dialer proves itself and begins to send."""
        dialer = connection.dialer
        if not connection.welcome or connection.agreed or not dialer.alive:
            return False
        if dialer.standby is connection:
            connection.agreed = True
            connection.to_listener.append(CONFIRM)
            return True
        if dialer.outgoing is not connection:
            return False
        assert dialer.sender
        try:
            dialer.sender.welcomed(connection.welcome, self.now)
        except Fenced:
            assert connection.listener.epoch < self.epochs[connection.listener.number]
            connection.end_dialer()
            return True
        assert connection.listener.epoch >= dialer.next_epoch, "a fenced receiver is heard"
        dialer.next_epoch = connection.listener.epoch
        connection.agreed = True
        connection.to_listener.append(CONFIRM)
        return True

    def collect(self, connection: Connection, most: int) -> bool:
        """Both ends put on the wire what they may send."""
        moved = 0
        if connection.agreed and connection.dialer.outgoing is connection and connection.dialer.alive:
            assert connection.dialer.sender
            frames = connection.dialer.sender.take(self.now, most)
            if connection.listening:
                connection.to_listener += [tuple(map(bytes, f)) for f in frames]
            moved += len(frames)
        if (tail := connection.dialer.tail) is not None and tail[1] is connection and connection.dialer.alive:
            frames = tail[0].take()
            if connection.listening:
                connection.to_listener += [tuple(map(bytes, f)) for f in frames]
            moved += len(frames)
        if connection.listener.incoming is connection and connection.listener.alive:
            assert connection.listener.receiver
            frames = connection.listener.receiver.take(self.now)
            if connection.read:
                connection.to_dialer += [tuple(map(bytes, f)) for f in frames]
            moved += len(frames)
        return moved > 0

    def deliver(self, connection: Connection) -> bool:
        """The next frame arrives at the listener."""
        listener = connection.listener
        if not connection.to_listener or not connection.listening:
            return False
        frame = connection.to_listener.popleft()
        receiver = listener.receiver
        assert receiver
        if frame is CONFIRM:
            try:
                receiver.admit(connection.dialer.epoch)
            except Fenced:
                connection.end_listener()
                return True
            listener.waiting.append(connection)
            listener.invite()
            return True
        if connection in listener.waiting and not self.waited(connection, frame):
            return True
        assert connection.dialer.epoch >= receiver.peer_epoch, "a fenced sender is heard"
        assert listener.incoming is connection, "two are heard"
        try:
            receiver.receive(frame, self.now)
        except ProtocolError as exc:
            if "exceeds its credit" not in str(exc):
                raise
            self.refusals += 1  # what was granted to it has been taken by another one
            connection.end_listener()
            connection.end_dialer()
        listener.settle()
        messages, nbytes = receiver.unsettled
        assert messages <= MOST_MESSAGES
        assert nbytes <= MOST_BYTES or messages <= 2, "only one batch may be larger than the window, and then alone"
        return True

    def waited(self, connection: Connection, frame: Frame) -> bool:
        """A frame over a connection that waits. True when it takes the link over with it."""
        word = unpack(frame)
        if not isinstance(word, Resume):
            assert isinstance(word, Ping | Pong), "data before resume"
            return False
        try:
            connection.listener.take_over(connection)
        except Fenced:
            connection.end_listener()
            return False
        return True

    def acknowledge(self, connection: Connection) -> bool:
        """The next frame arrives at the dialer."""
        dialer = connection.dialer
        if not connection.to_dialer or not connection.read:
            return False
        assert dialer.sender
        frame = connection.to_dialer.popleft()
        if dialer.outgoing is not connection:
            return True
        assert connection.listener.epoch >= dialer.next_epoch, "a fenced receiver is heard"
        dialer.sender.receive(frame, self.now)
        self.rightly_settled(dialer)
        dialer.settle()
        return True

    def break_off(self, connection: Connection, *, dialer: bool, listener: bool) -> None:
        """The connection breaks; one end may find out later."""
        self.faults += 1
        if dialer:
            connection.end_dialer()
        if listener:
            connection.end_listener()

    def restart(self, numbers: list[int], *, zombies: bool, told: bool) -> None:
        """Kill operators and start them anew; with `zombies` the old ones go on. Neighbours are `told`, or find out."""
        self.faults += 1
        if self.next is not None and self.next.number in numbers:
            number = self.next.number
            if self.next.role is Role.ACTIVE:  # what is to be started is there already
                self.end(self.nodes[number])
                self.switch()
                numbers = [n for n in numbers if n != number]
            else:
                self.roll_back()
        for number in numbers:
            old = self.nodes[number]
            old.alive = zombies and number != self.last  # a sink that is believed dead and isn't would act twice
            if old.alive:
                self.zombies.append(old)
            else:
                self.end(old)
            self.newest[number] += 1
            self.epochs[number] = self.newest[number]
            self.nodes[number] = Instance(self, number, self.epochs[number])
        for number in numbers:
            if told:
                self.tell(number)
        self.forget()

    def tell(self, number: int) -> None:
        """The neighbours learn the epoch of an operator from the master."""
        for other in (number - 1, number + 1):
            if 0 <= other <= self.last:
                node = self.nodes[other]
                if other < number and node.sender:
                    stale = self.epochs[number] > node.sender.peer_epoch
                    node.sender.expect(self.epochs[number])
                    node.next_epoch = max(node.next_epoch, self.epochs[number])
                    if stale and node.outgoing is not None:
                        node.outgoing.end_dialer()
                elif other > number and node.receiver:
                    stale = self.epochs[number] > node.receiver.peer_epoch
                    node.receiver.expect(self.epochs[number])
                    for connection in [*node.waiting, *([node.incoming] if node.incoming else [])]:
                        if stale and connection.dialer.epoch < self.epochs[number]:
                            connection.end_listener()

    def forget(self) -> None:
        """Drop connections of which nothing is left."""
        self.connections = [
            c for c in self.connections
            if c.read or c.listener.incoming is c or c in c.listener.waiting or (c.to_listener and c.listening)
        ]  # fmt: skip

    # -- the end

    def heal(self) -> None:
        """No more faults: everything arrives, whatever has happened."""
        self.switch() or self.roll_back()
        for zombie in self.zombies:
            zombie.alive = False
        for connection in self.connections:
            connection.end_dialer()
            connection.end_listener()
        for number in range(1, self.last + 1):
            self.tell(number)
        self.connections.clear()
        for number in range(self.last):
            self.dial(number)
        for _ in range(10_000):
            self.now += ACK_DELAY
            moved = self.round()
            if moved or any(node.rerun() for node in self.nodes[1 : self.last]):
                continue
            if not any(node.release() for node in self.nodes[1 : self.last]):  # it has had time enough to catch up
                return
        raise AssertionError("it never comes to rest")

    def round(self) -> bool:
        """Let everything happen that can happen once."""
        moved = False
        for connection in list(self.connections):
            moved |= self.agree(connection)
            moved |= self.collect(connection, 1 << 20)
            while self.deliver(connection):
                moved = True
            while self.acknowledge(connection):
                moved = True
        for node in self.nodes[1:]:
            while node.work(3):
                moved = True
            node.settle()
        return moved

    def check(self) -> None:
        """What must hold when all has come to rest."""
        assert self.got == self.expected()
        assert sorted(self.extras) == self.expected_extras()
        for node in self.nodes:
            if node.sender:
                assert node.sender.unsettled == (0, 0)
            if node.receiver:
                assert node.receiver.machine.state is State.OPEN or (
                    node.waiting and not self.nodes[node.number - 1].numbered
                )
                assert node.receiver.unsettled == (0, 0)
                assert not node.receiver.inbox
            assert not node.disk.reruns
            assert not node.disk.aside
        assert all(p > NOWHERE for p in self.disks[self.last].journal.values())
