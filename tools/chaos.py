#!/usr/bin/env python3
"""Breaks a real zs3 cluster on purpose, and checks from outside that it kept its promises.

    python tools/chaos.py chaos --seeds 1-20 --seconds 60    everything at once, drawn from a seed
    python tools/chaos.py race                               If-None-Match from all sides at once
    python tools/chaos.py counter --seeds 1-3                If-Match under faults loses nothing
    python tools/chaos.py gc-race                            garbage collection against PUT
    python tools/chaos.py dedup                              equal bytes are stored once
    python tools/chaos.py heal                               a flipped bit does not matter
    python tools/chaos.py planted                            bugs put into a copy: is each caught?
    python tools/chaos.py selftest                           is the checker itself right?

A cluster is 3 to 7 processes on loopback. Each advertises the port of a proxy that belongs to this
tool, so that the tool can hold, slow and release what any node says to any other. Clients speak to
the nodes directly and write down when each operation was called and answered, and what was said:

    seed -> faults -> nodes and proxies <- clients -> history -> checker -> violations

A run is made of rounds. In a round faults come and go under load; those that destroy data strike
one victim, because what is promised is to survive the loss of any *one* node. Then all faults end,
and within SETTLE_SECONDS all has to be whole again: every node answers every key alike, every block
has its replicas, and what nobody refers to is gone. At last all nodes are killed at once, started
again and asked for everything once more.

1 Limits - 2 Histories - 3 Checker's own test - 4 Network - 5 Nodes - 6 Clients - 7 Workload -
8 Faults - 9 Whole again - 10 Runs - 11 Planted bugs - 12 Command line

Faults of the network and the disk need Linux; elsewhere the tool says so and goes without them.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from blake3 import blake3

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from signing import sign_headers  # noqa: E402  (found through the line above)

from zs3_dist import BLOCK_BYTES, INLINE_BYTES  # noqa: E402

# ==== 1 Limits ====

REPLICAS = 3
MAX_NODES = 7
CLIENTS = 10
REQUEST_SECONDS = (1.0, 6.0)  # after which a client gives up, some sooner than others
THINK_SECONDS = 0.02  # between two operations of a client, on average
START_SECONDS = 20.0  # a node that is not ready by then has failed
ROUND_SECONDS = 20.0  # of faults
SETTLE_SECONDS = 60.0  # after the last fault, all is whole again within this
FAULTS_AT_ONCE = 2
FAULT_SECONDS = (0.5, 5.0)  # how long one lasts
PAUSE_SECONDS = (0.2, 1.5)  # between two
GRACE_SECONDS = 8.0  # of tombstones: a node away for longer is no member any more
DAY_SECONDS = 86_400
MAX_POINTS = 2_000_000  # of one key's history
FLAGS = (
    "--gossip-interval-ms=500",
    "--gc-grace=3",
    f"--tombstone-grace={GRACE_SECONDS:.0f}",
    "--min-part-size=1",
)
ACCESS, SECRET = "minioadmin", "minioadmin"
BUCKETS = ("chaos-one", "chaos-two")  # two, so that not every key has the same owners
KEYS = tuple(f"{bucket}/{name}" for bucket in BUCKETS for name in ("a", "a/b", "d e"))

# ==== 2 Histories ====

Value = str | None  # an ETag; None: there is no such object
ANY, KEEP = "(any)", "(keep)"  # no ETag looks like these


class Op(NamedTuple):
    """An operation on one key as its client saw it: what must have been so at the one instant,
    between call and answer, at which it happened, and what was so from then on."""

    key: str
    what: str
    invoked: float  # seconds on one monotonic clock for all clients
    returned: float  # math.inf: unknown; it happened at some time after the call, or never
    needs: Value = ANY
    excludes: tuple[Value, ...] = ()
    writes: Value = KEEP

    def holds(self, value: Value) -> bool:
        """Can it happen while the key has this value?"""
        return self.needs in (ANY, value) and value not in self.excludes

    def after(self, value: Value) -> Value:
        """The key's value once it has happened."""
        return value if self.writes == KEEP else self.writes

    def __str__(self) -> str:
        """For people."""
        needs = "" if self.needs == ANY else f" sees {self.needs}"
        excludes = f" sees none of {self.excludes}" if self.excludes else ""
        writes = "" if self.writes == KEEP else f" writes {self.writes}"
        return f"{self.invoked:.3f}-{self.returned:.3f} {self.what}{needs}{excludes}{writes}"


class Listing(NamedTuple):
    """A LIST, of one page or several."""

    what: str
    invoked: float
    returned: float
    asked: tuple[str, ...]  # the keys that it shows if they exist
    shown: dict[str, Value]


class Point(NamedTuple):
    """How far an order of a history has got. Placed are the known operations before `first`, those
    after it where `mask` has a bit, and the unknown ones in `taken`. The key then has `value`."""

    first: int
    mask: int
    taken: int
    value: Value

    def place(self, index: int, value: Value) -> Point:
        """Known operation `index` is next, and the key has `value` after it."""
        first, mask = self.first, self.mask | 1 << (index - self.first)
        while mask & 1:
            first, mask = first + 1, mask >> 1
        return Point(first, mask, self.taken, value)


@dataclass(frozen=True)
class Register:
    """The operations of one key, in the order of their calls."""

    known: list[Op]
    unknown: list[Op]

    def ready(self, point: Point) -> tuple[list[int], float]:
        """Known operations that may be next: called before any other unplaced one was answered;
        and when that was."""
        found, limit = [], math.inf
        for index in range(point.first, len(self.known)):
            if self.known[index].invoked > limit:
                break
            if not point.mask >> (index - point.first) & 1:
                found.append(index)
                limit = min(limit, self.known[index].returned)
        return [index for index in found if self.known[index].invoked <= limit], limit

    def successors(self, point: Point) -> Iterator[Point]:
        """Where an order can go from here. Two short cuts lose nothing. What fits and changes
        nothing goes first, alone. And an operation of unknown outcome is supposed to have happened
        only directly before one that needs it: else it may as well have happened later or never."""
        ready, limit = self.ready(point)
        fitting = [index for index in ready if self.known[index].holds(point.value)]
        for index in fitting:
            if self.known[index].writes == KEEP:
                yield point.place(index, point.value)
                return
        for index in fitting:
            yield point.place(index, self.known[index].writes)
        tried = set()
        for number, op in enumerate(self.unknown):
            effect = op[4:]
            if op.invoked <= limit and not point.taken >> number & 1 and effect not in tried:
                tried.add(effect)  # of equal ones the earliest will do
                if op.holds(point.value):
                    yield from self.supposing(point, number, ready)

    def supposing(self, point: Point, number: int, ready: list[int]) -> Iterator[Point]:
        """Unknown operation `number` happened, for one that could not have been next before."""
        value, taken = self.unknown[number].writes, point.taken | 1 << number
        after = point._replace(taken=taken, value=value)
        for index in ready:
            op = self.known[index]
            if op.holds(value) and not op.holds(point.value):
                yield after.place(index, op.after(value))
        others = [op for rank, op in enumerate(self.unknown) if not taken >> rank & 1]
        if any(op.holds(value) and not op.holds(point.value) for op in others):
            yield after


def unexplained(history: Iterable[Op]) -> list[Op]:
    """[] when the history of one key is linearizable: some order of its operations, each at an
    instant between its call and its answer, explains every answer, starting with no object. (Wing
    and Gong 1993; Lowe 2017: no point twice.) Otherwise operations that no order got past, or none
    of the first MAX_POINTS."""
    ordered = sorted(history, key=lambda op: op.invoked)
    known = [op for op in ordered if op.returned < math.inf]
    unknown = [op for op in ordered if op.returned == math.inf and op.writes != KEEP]
    register = Register(known, unknown)
    start = furthest = Point(0, 0, 0, None)
    stack, seen = [start], {start}
    while stack and len(seen) < MAX_POINTS:
        point = stack.pop()
        if point.first == len(known):
            return []
        furthest = max(furthest, point, key=lambda point: point.first)
        fresh = [after for after in register.successors(point) if after not in seen]
        seen.update(fresh)
        stack += fresh
    return [known[index] for index in register.ready(furthest)[0]]


def possible(history: Iterable[Op], invoked: float, returned: float) -> set[Value]:
    """What a LIST between these times may show for a key: whatever was written by an operation that
    began before the LIST ended, and that no later one, answered before the LIST, has replaced."""
    writes = [Op("", "nothing at first", -1, -1, writes=None)]
    writes += [op for op in history if op.writes != KEEP]
    newest = max(op.invoked for op in writes if op.returned < invoked)
    return {op.writes for op in writes if op.invoked <= returned and op.returned >= newest}


def violations(history: Sequence[Op], listings: Sequence[Listing]) -> list[str]:
    """Each broken promise in a history of many keys, in words."""
    keys, found = defaultdict(list), []
    for op in sorted(history, key=lambda op: op.invoked):
        keys[op.key].append(op)
    for key, ops in sorted(keys.items()):
        if stuck := unexplained(ops):
            until = max(op.returned for op in stuck)
            found.append(f"{key} is not linearizable{story(ops, stuck[0].invoked, until, stuck)}")
    for listing in listings:
        for key in listing.asked:
            shown, (_, since, until, *_) = listing.shown.get(key), listing
            if shown not in (may := possible(keys[key], since, until)):
                what = f"{listing.what} {since:.3f}-{until:.3f} shows {key} as {shown}, not {may}"
                found.append(what + story(keys[key], since, until, ()))
    return found


def story(ops: Iterable[Op], since: float, until: float, stuck: Sequence[Op]) -> str:
    """What happened to a key between these times, and shortly before."""
    around = [op for op in ops if op.returned >= since - 3 and op.invoked <= until]
    return "".join(f"\n    {'>>' if op in stuck else '  '} {op}" for op in around)


# ==== 3 Checker's own test ====

# Histories of one key, good and bad. A word is an operation, its value and @call-answer: W write,
# R read, D delete, C1>2 change 1 to 2, N write if nothing is there, F refused: something is there.
HISTORIES = (
    (True, ""),
    (True, "W1@0-1 R1@2-3 D@4-5 R@6-7"),
    (False, "W1@0-1 R@2-3"),  # an acknowledged object is lost
    (False, "W1@0-1 D@2-3 R1@4-5"),  # something deleted returns
    (True, "W1@0-1 W2@2-9 R1@3-4 R2@5-6"),  # a read during a write sees either value,
    (False, "W1@0-1 W2@2-9 R2@3-4 R1@5-6"),  # but once it was new it stays new
    (True, "W1@0-1 W2@2- R1@3-4 R1@5-6 R2@90-91"),  # an unknown write arrives late,
    (True, "W1@0-1 W2@2- R1@3-4 R1@90-91"),  # or never,
    (False, "W1@0-1 W2@2- R2@3-4 R1@5-6"),  # but does not go away again,
    (False, "W1@0-1 R2@3-4 W2@5-"),  # nor come before it was sent
    (True, "W1@0-1 D@2- D@2.5- R@3-4 W2@5-6 R@7-8"),
    (False, "W1@0-1 D@2- R@3-4 W2@5-6 R@7-8"),  # one delete does not delete twice
    (True, "N1@0-5 F@1-6 R1@7-8"),
    (False, "N1@0-5 N2@1-6"),  # both created it
    (False, "N1@0-1 D@2-3 F@8-9"),  # refused, though nothing was there
    (True, "N1@0- F@1-2 R1@3-4"),
    (True, "W1@0-1 C1>2@2-5 R2@6-7"),
    (False, "W1@0-1 C1>2@2-5 C1>3@2-5"),  # an increment is lost
    (True, "W1@0-1 C1>2@2- C2>3@2- R3@6-7"),  # one unknown change upon the other
    (False, "W1@0-1 C2>3@2- R3@6-7"),
    (False, "W1@0-9 W2@0-9 R1@1-2 R2@3-4 R1@5-6"),
)
LISTS = (
    (1.5, 1.7, "1"),
    (3, 5, "1 2"),
    (4.5, 5, "2"),
    (6.5, 8, "2 -"),
    (8, 8.5, "-"),
    (10, 11, "- 3"),
)


def parse_op(word: str) -> Op:
    """An operation from its word, as in HISTORIES."""
    what, _, times = word.partition("@")
    call, _, answer = times.partition("-")
    op = Op("k", what, float(call), float(answer or "inf"))
    verb, old, new = what[0], what[1:].partition(">")[0] or None, what.rpartition(">")[2]
    if verb == "F":
        return op._replace(excludes=(None,))
    if verb == "R":
        return op._replace(needs=old)
    return op._replace(
        needs={"C": old, "N": None}.get(verb, ANY), writes=new if verb == "C" else old
    )


def explained_slowly(history: Sequence[Op]) -> bool:
    """The definition itself: try every order of all known and any of the unknown operations."""
    known = Counter(op for op in history if op.returned < math.inf)
    for count in range(len(known), len(history) + 1):
        for order in itertools.permutations(history, count):
            value: Value = None
            for place, op in enumerate(order):
                if not op.holds(value) or any(o.returned < op.invoked for o in order[place:]):
                    break
                value = op.after(value)
            else:
                if known <= Counter(order):
                    return True
    return False


def random_history(rng: random.Random) -> list[Op]:
    """Up to five operations that often have to do with each other."""
    words = []
    for _ in range(rng.randint(1, 5)):
        one, two, call = rng.randint(1, 2), rng.randint(1, 2), rng.randint(0, 9)
        what = rng.choice((f"W{one}", f"R{one}", "R", "D", f"C{one}>{two}", f"N{one}", "F"))
        words.append(f"{what}@{call}-{rng.choice(('', call + 0.5, call + rng.randint(1, 6)))}")
    return [parse_op(word) for word in words]


def selftest() -> list[str]:
    """What the checker gets wrong about HISTORIES, LISTS and 1,000 short random histories."""
    rng = random.Random(1)
    cases = [(good, [parse_op(word) for word in words.split()]) for good, words in HISTORIES]
    randoms = [random_history(rng) for _ in range(1000)]
    cases += [(explained_slowly(history), history) for history in randoms]
    wrong = [f"should be {good}: {ops}" for good, ops in cases if good == bool(unexplained(ops))]
    listed = [parse_op(word) for word in ("W1@0-1", "W2@2-4", "D@6-7", "W3@9-")]
    for start, end, names in LISTS:
        shown = {None if name == "-" else name for name in names.split()}
        if possible(listed, start, end) != shown:
            wrong.append(f"LIST {start}-{end} should possibly show {names}")
    return wrong


# ==== 4 Network ====

# Put on a node's PYTHONPATH. It then calls from a loopback address of its own, by which a proxy
# knows who calls; and its clock is wrong. (That of files is right: no node compares the two.)
SITECUSTOMIZE = """
import datetime, os, socket, time

SOURCE, SKEW = os.environ["CHAOS_SOURCE"], int(os.environ["CHAOS_SKEW"])


def connect(self, address, connect=socket.socket.connect):
    if self.family == socket.AF_INET and self.type & socket.SOCK_STREAM:
        try:
            self.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
            self.bind((SOURCE, 0))
        except OSError:
            pass  # bound already, or not Linux
    return connect(self, address)


def by_clock(function):
    return lambda seconds=None: function(time.time() if seconds is None else seconds)


class Now(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


socket.socket.connect = connect
if SKEW:
    time.time = lambda time=time.time: time() + SKEW
    time.time_ns = lambda time_ns=time.time_ns: time_ns() + SKEW * 10**9
    time.gmtime, time.localtime = by_clock(time.gmtime), by_clock(time.localtime)
    datetime.datetime = Now
"""

ACCEPT = b"POST /_zs3/accept "


@dataclass
class Link:
    """What one node may say to another. Held bytes wait, as in a cut network, and arrive late."""

    held: frozenset[str] = frozenset()  # of "requests", "responses"; and "accepts": those requests
    delay: float = 0.0  # seconds for each piece of at most 64 KiB

    def holds(self, what: str, data: bytes) -> bool:
        """Whether a piece of `what`, "requests" or "responses", has to wait."""
        return what in self.held or ("accepts" in self.held and ACCEPT in data)


Pairs = Iterable[tuple[int, int]]  # caller and callee


class Network:
    """A proxy before every node, for its peers only."""

    def __init__(self) -> None:
        self.links: dict[tuple[int, int], Link] = defaultdict(Link)
        self.changed = threading.Condition()  # guards what links hold
        self.closed = False
        self.listeners: list[socket.socket] = []

    def proxy(self, callee: int, port: int) -> int:
        """The port at which peers are to reach node `callee`, which is itself at `port`."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listeners.append(listener)
        background(self.accept, listener, callee, port)
        return int(listener.getsockname()[1])

    def accept(self, listener: socket.socket, callee: int, port: int) -> None:
        """Two pumps for each connection, until the network closes."""
        while not self.closed:
            with suppress(OSError):  # the network is closing
                near, (source, _) = listener.accept()
                with suppress_and_close(near):
                    far = socket.create_connection(("127.0.0.1", port))
                    for end in (near, far):
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    link = self.links[caller_at(source), callee]
                    background(self.pump, near, far, link, "requests")
                    background(self.pump, far, near, link, "responses")

    def pump(self, source: socket.socket, sink: socket.socket, link: Link, what: str) -> None:
        """Forward one direction of a connection, when and as the link allows."""
        with suppress_and_close(source, sink):
            while data := source.recv(65536):
                if link.delay:
                    time.sleep(link.delay)
                with self.changed:
                    while link.holds(what, data) and not self.closed:
                        self.changed.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def set(self, pairs: Pairs, held: Iterable[str] = (), delay: float = 0.0) -> None:
        """From now on; without more arguments: nothing is held, nothing is slow."""
        with self.changed:
            for pair in list(pairs):
                self.links[pair].held, self.links[pair].delay = frozenset(held), delay
            self.changed.notify_all()

    def close(self) -> None:
        """Let everything go."""
        self.closed = True
        self.set(self.links)
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextmanager
def suppress_and_close(*ends: socket.socket) -> Iterator[None]:
    """A connection that fails ends on both sides."""
    try:
        yield
    except OSError:
        for end in ends:
            end.close()


def source_of(index: int) -> str:
    """The loopback address from which node `index` calls."""
    return f"127.0.1.{index + 1}"


def caller_at(source: str) -> int:
    """Which node calls from there; -1 for anyone else."""
    return int(source.rpartition(".")[2]) - 1 if source.startswith("127.0.1.") else -1


def background(task: Callable[..., None], *arguments: object) -> None:
    """Run it in a thread that nobody waits for."""
    threading.Thread(target=task, args=arguments, daemon=True).start()


# ==== 5 Nodes ====


class ChaosError(Exception):
    """The run could not be made: the cluster did not even start, or a bug cannot be planted."""


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.1) -> bool:
    """Whether it came true within that time; `pause` seconds lie between two looks."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def free_port() -> int:
    """One below those that the system hands out, so that no connection of ours sits on it when a
    node comes back."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):  # taken: try another
            probe.bind(("127.0.0.1", port))
            return port


class Node:
    """One `python zs3.py --distributed`, its folder and its address for peers."""

    def __init__(self, index: int, cluster: Cluster) -> None:
        self.index, self.cluster = index, cluster
        self.folder = cluster.folder / f"node{index}"
        self.data, self.log = self.folder / "data", self.folder / "log"
        self.port = free_port()
        self.address = f"127.0.0.1:{cluster.network.proxy(index, self.port)}"
        self.process: subprocess.Popen[bytes] | None = None
        self.skew = 0  # seconds by which its clock is wrong
        self.flags = (*FLAGS, *cluster.flags)
        self.faulty = False
        self.data.mkdir(parents=True)

    def start(self) -> None:
        """Without waiting."""
        peers = [node.address for node in self.cluster.nodes if node is not self]
        command = [sys.executable, str(self.cluster.modules / "zs3.py"), "--distributed", "--quiet"]
        flags = [f"--port={self.port}", f"--data-dir={self.data}", f"--advertise={self.address}"]
        flags += [f"--bootstrap={','.join(peers)}"] * bool(peers) + [*self.flags]
        shim = {"PYTHONPATH": str(self.cluster.folder), "CHAOS_SOURCE": source_of(self.index)}
        environment = {**os.environ, **shim, "CHAOS_SKEW": str(self.skew)}
        self.process = subprocess.Popen(
            [*command, *flags],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        background(self.keep_log, self.process.stdout)

    def keep_log(self, pipe: IO[bytes]) -> None:
        """A pipe, and not the file, so that there is a log of a full disk."""
        with pipe, self.log.open("ab", buffering=0) as log:
            shutil.copyfileobj(pipe, log, 1)

    def signal(self, number: int) -> None:
        """Send it one."""
        if self.process:
            self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9. That it had ended by itself is a violation."""
        if self.process:
            if (status := self.process.poll()) is not None:
                story = f"node {self.index} ended by itself, status {status}: {self.tail()}"
                self.cluster.noted.append(story)
            self.process.kill()
            self.process.wait()
            self.process = None

    def wait_ready(self) -> None:
        """Until it answers; ChaosError if it does not."""
        client = Client(self)
        if not wait_until(lambda: client.call("GET", "/_zs3/health").status == 200, START_SECONDS):
            raise ChaosError(f"node {self.index} is not ready: {self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]

    def identity(self) -> int:
        """Its id, as a point of the id space."""
        return int((self.data / ".node_id").read_text(), 16)

    def records(self, bucket: str) -> list[tuple[bytes, str]]:
        """The keys of a bucket that exist, with the ballot at which that was accepted here."""
        query = "SELECT key, accepted FROM registers WHERE bucket = ? AND live AND key != x''"
        return self.ask_index(query, bucket)

    def references(self, block: str) -> list[tuple[str, bytes]]:
        """Bucket and key of whatever names a block here."""
        return self.ask_index("SELECT bucket, key FROM refs WHERE hash = ?", bytes.fromhex(block))

    def ask_index(self, query: str, value: object) -> list[Any]:
        """Sorted rows of its register file."""
        uri = f"file:{self.data}/.index/registers.db?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10)) as database:
            return sorted(database.execute(query, [value]))

    def blobs(self) -> list[Path]:
        """Its block files."""
        return sorted((self.data / ".cas").rglob("*.blob"))


class Cluster:
    """Nodes, their network and their folder; all of it is gone when the context ends."""

    def __init__(self, count: int, modules: Path = ROOT, flags: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zs3-chaos-"))
        self.modules, self.flags = modules, flags
        self.network = Network()
        self.nodes: list[Node] = []  # replaced, never changed: clients read it all the time
        self.noted: list[str] = []  # violations that are no matter of history
        self.numbers = itertools.count()
        self.count = count

    def __enter__(self) -> Cluster:
        """All nodes are members, and the buckets are there."""
        (self.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        try:
            for _ in range(self.count):
                self.add().wait_ready()
            if not wait_until(lambda: not self.unsettled(), START_SECONDS):
                raise ChaosError(self.unsettled())
            for bucket in BUCKETS:
                until_done(Client(self.nodes[0]), "PUT", f"/{bucket}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left but what was noted."""
        for node in self.nodes:
            node.kill()
        self.network.close()
        self.noted += self.tracebacks()
        shutil.rmtree(self.folder, ignore_errors=True)

    def unsettled(self) -> str:
        """A node that does not take exactly the nodes for members, and what it says; or ""."""
        for node in self.nodes:
            answer = Client(node).call("GET", "/_zs3/ping")
            status = json.loads(answer.body) if answer.status == 200 else {}
            if status.get("members") != len(self.nodes) or status["joining"]:
                return f"node {node.index} of {len(self.nodes)} says {status}"
        return ""

    def add(self, *flags: str) -> Node:
        """One node more, on its way up."""
        node = Node(next(self.numbers), self)
        node.flags += flags
        self.nodes = [*self.nodes, node]
        node.start()
        return node

    def remove(self, node: Node) -> None:
        """For good."""
        node.kill()
        self.nodes = [other for other in self.nodes if other is not node]

    def tracebacks(self) -> list[str]:
        """An exception that nobody expected is a bug, whatever the client was told."""
        seen: Counter[str] = Counter()
        for log in self.folder.glob("*/log"):
            _, *traces = log.read_text(errors="replace").split("Traceback (most recent call last):")
            for trace in traces:
                _, *lines = trace.splitlines()
                frames = list(itertools.takewhile(lambda line: line.startswith("  "), lines))
                seen["\n    ".join([*frames[-6:], *lines[len(frames) : len(frames) + 1]])] += 1
        return [f"{count} times in the logs:\n    {trace}" for trace, count in seen.items()]


# ==== 6 Clients ====


class Answer(NamedTuple):
    """What came back; `status` 0 stands for nothing whole, -1 for nobody there to ask."""

    status: int
    headers: dict[str, str]  # lower-case names
    body: bytes

    @property
    def etag(self) -> str:
        """Without quotes."""
        return self.headers.get("etag", "").strip('"')

    def texts(self, name: str) -> list[str]:
        """What the elements of this name hold, in the order of the document."""
        elements = ElementTree.fromstring(self.body).iter() if self.body else ()
        return [each.text or "" for each in elements if each.tag.rpartition("}")[2] == name]

    @property
    def code(self) -> str:
        """Of an error with a body."""
        return "".join(self.texts("Code")[:1]) if self.status >= 400 else ""


NO_ANSWER, NOT_SENT = Answer(0, {}, b""), Answer(-1, {}, b"")
UNKNOWN = (0, 500, 503, 507)  # after these a write may have happened, or happen later
FAILED = (*UNKNOWN, -1)


class Client:
    """A kept-alive connection of one thread to one node. It never sends anything twice."""

    def __init__(self, node: Node, seconds: float = REQUEST_SECONDS[1]) -> None:
        self.node, self.host = node, f"127.0.0.1:{node.port}"
        self.connection = http.client.HTTPConnection(self.host, timeout=seconds)

    def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
    ) -> Answer:
        """One request, signed by the clock of the node unless it is about the node itself."""
        target, parameters = quote(path), urlencode(query or {}, quote_via=quote)
        date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + self.node.skew))
        digest, named = hashlib.sha256(body).hexdigest(), {"host": self.host, **(headers or {})}
        if not path.startswith("/_zs3/"):
            named = sign_headers(method, target, parameters, named, digest, (ACCESS, SECRET), date)
        try:
            self.connection.request(method, f"{target}?{parameters}", body, named)
            response = self.connection.getresponse()
            got = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, got, response.read())
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            return NOT_SENT if isinstance(error, ConnectionRefusedError) else NO_ANSWER


def until_done(client: Client, method: str, path: str, body: bytes = b"") -> Answer:
    """The answer to a request that is repeated while it fails: for what is no matter of history."""
    answers: list[Answer] = []

    def attempt() -> bool:
        answers.append(client.call(method, path, body))
        return answers[-1].status not in FAILED

    if not wait_until(attempt, START_SECONDS):
        raise ChaosError(f"{method} {path} at node {client.node.index}: {answers[-1]}")
    return answers[-1]


def etag_of(body: bytes) -> str:
    """Of an object that was put at once."""
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


# ==== 7 Workload ====


class Recorder:
    """What all clients of a run saw. Appending to a list and setting an item are atomic."""

    def __init__(self, seed: int) -> None:
        self.ops: list[Op] = []
        self.listings: list[Listing] = []
        self.noted: list[str] = []  # violations that are no matter of history
        self.counts: Counter[str] = Counter()
        self.digests: dict[str, str] = {}  # ETag -> SHA-256 of what was put under it
        self.blocks: dict[str, set[str]] = {}  # ETag -> names of the blocks it is stored in
        self.seen: dict[str, str] = {}  # key -> an ETag it had lately, for conditions
        self.numbers = itertools.count()
        rng = random.Random(f"{seed} pool")
        self.pool = [rng.randbytes(20_000 + number) for number in range(3)]

    def body(self, rng: random.Random, *sizes: int) -> bytes:
        """Never seen before; or one of a few, so that objects have blocks in common."""
        if rng.random() < 0.2:
            return rng.choice(self.pool)
        return b"%d " % next(self.numbers) + rng.randbytes(rng.choice(sizes))

    def learn(self, etag: str, pieces: Sequence[bytes]) -> None:
        """An object of these pieces may be stored under this ETag from now on."""
        self.digests[etag] = hashlib.sha256(b"".join(pieces)).hexdigest()
        self.blocks[etag] = {
            blake3(piece[start : start + BLOCK_BYTES]).hexdigest()
            for piece in pieces
            if len(piece) > INLINE_BYTES
            for start in range(0, len(piece), BLOCK_BYTES)
        }

    def wrote(self, what: str, op: Op, answer: Answer) -> None:
        """`op` is what was asked for. The answer says: done, perhaps, or the condition failed."""
        op = op._replace(what=f"{what} {answer.status}", returned=time.monotonic())
        self.counts[f"{what.partition(' ')[0]}:{answer.status}"] += 1
        if answer.status in UNKNOWN:
            self.ops.append(op._replace(returned=math.inf))
        elif answer.status in (200, 204):
            self.ops.append(op)
        elif answer.status == 412 and op.needs != ANY:
            excludes = (None,) if op.needs is None else (op.needs, None)
            self.ops.append(op._replace(needs=ANY, excludes=excludes, writes=KEEP))
        elif answer.code == "NoSuchKey" and op.needs not in (ANY, None):
            self.ops.append(op._replace(needs=None, writes=KEEP))
        else:
            self.unexpected(op, answer)

    def read(self, what: str, key: str, invoked: float, answer: Answer) -> None:
        """A GET or HEAD: the value at one instant, and its bytes."""
        op = Op(key, f"{what} {answer.status}", invoked, time.monotonic(), answer.etag)
        self.counts[f"{what.partition(' ')[0]}:{answer.status}"] += 1
        head = what.startswith("HEAD")
        if answer.status == 200:
            self.ops.append(op)
            self.seen[key] = answer.etag
            digest = hashlib.sha256(answer.body).hexdigest()
            if not head and digest != self.digests.get(answer.etag):
                self.noted.append(f"{op}: {key} has bytes that were never put under this ETag")
        elif answer.status == 404 and (head or answer.code == "NoSuchKey"):
            self.ops.append(op._replace(needs=None))
        else:
            self.unexpected(op, answer)

    def unexpected(self, op: Op, answer: Answer) -> None:
        """No promise allows this answer, unless it only says that nothing was done."""
        if (
            answer.status not in FAILED and answer.code != "RequestTimeTooSkewed"
        ):  # its clock jumped
            self.noted.append(f"{op} of {op.key}: {answer.body[:300]!r}")


class Worker:
    """One client: it speaks to all nodes, to one of them more than to the others."""

    def __init__(self, number: int, cluster: Cluster, recorder: Recorder, seed: str) -> None:
        self.number, self.cluster, self.recorder = number, cluster, recorder
        self.rng = random.Random(f"{seed} worker {number}")
        self.clients: dict[Node, Client] = {}

    def run(self, stop: threading.Event) -> None:
        """Operations until told to stop."""
        while not stop.wait(self.rng.expovariate(1 / THINK_SECONDS)):
            operation = self.rng.choices([*OPERATIONS], [*OPERATIONS.values()])[0]
            operation(self, self.rng.choice(KEYS))

    def client(self) -> Client:
        """The connection for the next request."""
        nodes = self.cluster.nodes
        home = self.rng.random() < 0.5
        node = nodes[self.number % len(nodes)] if home else self.rng.choice(nodes)
        if node not in self.clients:
            self.clients[node] = Client(node, self.rng.uniform(*REQUEST_SECONDS))
        return self.clients[node]

    def condition(self, key: str) -> tuple[Value, dict[str, str]]:
        """What a write needs, and the header that says so; mostly nothing."""
        seen, chance = self.recorder.seen.get(key), self.rng.random()
        if chance < 0.15:
            return None, {"if-none-match": "*"}
        if chance < 0.4 and seen:
            return seen, {"if-match": f'"{seen}"'}
        return ANY, {}

    def put(self, key: str) -> None:
        """An object from nothing to three blocks, perhaps on a condition."""
        body = self.recorder.body(self.rng, 0, 100, 2000, 20_000, 200_000, 200_000, 2_500_000)
        etag, client = etag_of(body), self.client()
        self.recorder.learn(etag, [body])
        needs, headers = self.condition(key)
        op = Op(key, "", time.monotonic(), math.inf, needs, writes=etag)
        answer = client.call("PUT", f"/{key}", body, headers)
        self.recorder.wrote(f"PUT n{client.node.index} {' '.join(headers)}", op, answer)

    def delete(self, key: str) -> None:
        """Perhaps on the condition that it is still what it was."""
        needs, headers = self.condition(key)
        if needs is None:
            needs, headers = ANY, {}
        client = self.client()
        op = Op(key, "", time.monotonic(), math.inf, needs, writes=None)
        answer = client.call("DELETE", f"/{key}", headers=headers)
        self.recorder.wrote(f"DELETE n{client.node.index} {' '.join(headers)}", op, answer)

    def get(self, key: str, method: str = "GET") -> None:
        """The whole object, or its headers."""
        client, invoked = self.client(), time.monotonic()
        answer = client.call(method, f"/{key}")
        self.recorder.read(f"{method} n{client.node.index}", key, invoked, answer)

    def look_around(self, key: str) -> None:
        """HEAD again and again, everywhere: what one node has shown, the next must not forget."""
        for _ in self.cluster.nodes * 2:
            self.get(key, "HEAD")

    def copy(self, key: str) -> None:
        """Onto `key`, from another one that must still be what it was: so this reads that, too."""
        source = self.rng.choice(KEYS)
        etag, client = self.recorder.seen.get(source), self.client()
        if source == key or not etag:
            return
        headers = {"x-amz-copy-source": quote(source), "x-amz-copy-source-if-match": etag}
        op = Op(key, "", time.monotonic(), math.inf, writes=etag)
        answer = client.call("PUT", f"/{key}", headers=headers)
        if answer.status == 200:
            read = op._replace(key=source, what="COPY from", returned=time.monotonic())
            self.recorder.ops.append(read._replace(needs=etag, writes=KEEP))
        if answer.status != 412 and answer.code != "NoSuchKey":
            self.recorder.wrote(f"COPY n{client.node.index}", op, answer)

    def multipart(self, key: str) -> None:
        """Each step at some node. Only Complete changes the key; an upload that fails is left."""
        start = self.client().call("POST", f"/{key}", query={"uploads": ""})
        if start.status != 200:
            return
        upload, etags = {"uploadId": start.texts("UploadId")[0]}, []
        pieces = [self.recorder.body(self.rng, 20_000) for _ in range(self.rng.randint(1, 3))]
        for number, piece in enumerate(pieces, 1):
            query = {"partNumber": str(number), **upload}
            if self.client().call("PUT", f"/{key}", piece, query=query).status != 200:
                return
            etags.append(etag_of(piece))
        etag = f"{etag_of(b''.join(map(bytes.fromhex, etags)))}-{len(etags)}"
        self.recorder.learn(etag, pieces)
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{part}</ETag></Part>"
            for number, part in enumerate(etags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        client = self.client()
        op = Op(key, "", time.monotonic(), math.inf, writes=etag)
        answer = client.call("POST", f"/{key}", body, query=upload)
        self.recorder.wrote(f"COMPLETE n{client.node.index}", op, answer)

    def list(self, key: str) -> None:
        """A bucket or a prefix of it, in one page or a page for each key, each at any node."""
        bucket, prefix = key.partition("/")[0], self.rng.choice(("", "a"))
        query = {"list-type": "2", "prefix": prefix, "max-keys": self.rng.choice(("1000", "1"))}
        shown: dict[str, Value] = {}
        invoked, more = time.monotonic(), True
        while more:
            client = self.client()
            answer = client.call("GET", f"/{bucket}", query=query)
            self.recorder.counts[f"LIST:{answer.status}"] += 1
            what = f"LIST n{client.node.index} {answer.status}"
            if answer.status != 200:
                self.recorder.unexpected(Op(bucket, what, invoked, time.monotonic()), answer)
                return
            names = [f"{bucket}/{name}" for name in answer.texts("Key")]
            shown.update(
                zip(names, (etag.strip('"') for etag in answer.texts("ETag")), strict=True)
            )
            query["continuation-token"] = "".join(answer.texts("NextContinuationToken"))
            more = answer.texts("IsTruncated") == ["true"]
        asked = tuple(name for name in KEYS if name.startswith(f"{bucket}/{prefix}"))
        self.recorder.listings.append(Listing(what, invoked, time.monotonic(), asked, shown))


OPERATIONS: dict[Callable[[Worker, str], None], int] = {  # and their weights
    Worker.put: 30,
    Worker.get: 30,
    Worker.look_around: 10,
    Worker.delete: 10,
    Worker.copy: 5,
    Worker.multipart: 5,
    Worker.list: 12,
}

# ==== 8 Faults ====

Undo = Callable[[], object]


class Fault(NamedTuple):
    """`apply` does it and returns what ends it. One that `destroys` data strikes a round's victim
    only; one that changes who the members are (`rebuilds`) comes once a round."""

    apply: Callable[[Storm, Node], Undo]
    destroys: bool = False
    rebuilds: bool = False
    linux: bool = False
    seconds: tuple[float, float] = FAULT_SECONDS


class Storm:
    """The faults of one round: which, when and to whom is drawn from the seed."""

    def __init__(self, cluster: Cluster, kinds: Sequence[str], rng: random.Random) -> None:
        self.cluster, self.kinds, self.rng = cluster, kinds, rng
        self.victim = rng.choice(cluster.nodes)
        self.rebuilt = False
        self.pending: list[tuple[float, Node, Undo]] = []
        self.story: list[str] = []

    def rage(self, seconds: float) -> None:
        """New faults for so long. When this returns all have ended; what was destroyed still is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if len(self.pending) < FAULTS_AT_ONCE and self.kinds:
                self.strike(self.rng.choice(self.kinds))
            time.sleep(self.rng.uniform(*PAUSE_SECONDS))
            self.end_some()
        wait_until(self.end_some, math.inf)

    def strike(self, kind: str) -> None:
        """One fault, if a node is free for it."""
        fault = FAULTS[kind]
        idle = [node for node in self.cluster.nodes if not node.faulty]
        node = self.victim if fault.destroys else self.rng.choice(idle)
        if node in idle and not (fault.rebuilds and self.rebuilt):
            self.rebuilt |= fault.rebuilds
            node.faulty = True
            now, seconds = time.monotonic(), self.rng.uniform(*fault.seconds)
            self.story.append(f"{now:.3f}-{now + seconds:.3f} {kind} n{node.index}")
            self.pending.append((now + seconds, node, fault.apply(self, node)))

    def end_some(self) -> bool:
        """End those that have lasted; whether none is left."""
        for fault in [fault for fault in self.pending if fault[0] <= time.monotonic()]:
            _, node, undo = fault
            self.pending.remove(fault)
            node.faulty = False
            undo()
        return not self.pending

    def others(self, node: Node) -> list[int]:
        """Everybody else, by number."""
        return [other.index for other in self.cluster.nodes if other is not node]


def no_undo() -> None:
    """The damage is done, or the change is made."""


def kill(storm: Storm, node: Node) -> Undo:
    """kill -9, and a restart later."""
    node.kill()
    return node.start


def pause(storm: Storm, node: Node) -> Undo:
    """It hangs, with all its connections open."""
    node.signal(signal.SIGSTOP)
    return lambda: node.signal(signal.SIGCONT)


def partition(storm: Storm, node: Node) -> Undo:
    """This node and perhaps others on one side, the rest on the other."""
    others = storm.others(node)
    side = {node.index, *storm.rng.sample(others, storm.rng.randint(0, len(others) - 1))}
    everyone = itertools.permutations((node.index, *others), 2)
    pairs = [(one, two) for one, two in everyone if (one in side) != (two in side)]
    storm.cluster.network.set(pairs, ("requests", "responses"))
    return lambda: storm.cluster.network.set(pairs)


def one_way(storm: Storm, node: Node) -> Undo:
    """What this node asks some others is not heard; or it is, and the answers are not."""
    others = storm.others(node)
    some = storm.rng.sample(others, storm.rng.randint(1, len(others)))
    pairs = [(node.index, other) for other in some]
    storm.cluster.network.set(pairs, [storm.rng.choice(("requests", "responses"))])
    return lambda: storm.cluster.network.set(pairs)


def half_way(storm: Storm, node: Node) -> Undo:
    """Others have promised to take its changes, and are told of them much later: each is at a
    minority meanwhile, and nobody knows yet what becomes of it."""
    pairs = [(node.index, other) for other in storm.others(node)]
    storm.cluster.network.set(pairs, ["accepts"])
    return lambda: storm.cluster.network.set(pairs)


def slow(storm: Storm, node: Node) -> Undo:
    """The links from this node, or to it, take up to 0.3 s each for 64 KiB or less."""
    pairs = [(node.index, other) for other in storm.others(node)]
    if storm.rng.random() < 0.5:
        pairs = [(callee, caller) for caller, callee in pairs]
    for pair in pairs:
        storm.cluster.network.set([pair], delay=storm.rng.uniform(0.01, 0.3))
    return lambda: storm.cluster.network.set(pairs)


def full_disk(storm: Storm, node: Node) -> Undo:
    """No file of this node may grow beyond a few bytes: writes fail, some of them half-way."""
    node.wait_ready()  # with a full disk it may well not start
    process, unlimited = node.process, resource.RLIM_INFINITY

    def allow(limit: int) -> None:
        with suppress(ProcessLookupError):  # it has ended; that is noted elsewhere
            if process:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, unlimited))

    allow(storm.rng.choice((0, 100, 5000, 50_000)))
    return partial(allow, unlimited)


def clock(storm: Storm, node: Node) -> Undo:
    """It comes back a day early, a day late, or right."""
    node.kill()
    node.skew = storm.rng.choice((-DAY_SECONDS, DAY_SECONDS, 0))
    return node.start


def corrupt(storm: Storm, node: Node) -> Undo:
    """Half of its block files get a wrong byte, lose their end, or go."""
    for blob in node.blobs():
        how = storm.rng.choice((flip, flip, truncate, Path.unlink, None, None, None, None))
        with suppress(FileNotFoundError):  # collected meanwhile
            if how:
                how(blob)
    return no_undo


def flip(blob: Path) -> None:
    """One bit in the middle."""
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))


def truncate(blob: Path) -> None:
    """To half."""
    os.truncate(blob, blob.stat().st_size // 2)


def wipe(storm: Storm, node: Node) -> Undo:
    """Its disk is a new one, and empty."""
    node.kill()
    shutil.rmtree(node.data)
    node.data.mkdir()
    return node.start


def join(storm: Storm, node: Node) -> Undo:
    """One node more."""
    if len(storm.cluster.nodes) < MAX_NODES:
        storm.cluster.add()
    return no_undo


def replace(storm: Storm, node: Node) -> Undo:
    """It never comes back; another one comes, at another address, and is told so."""
    lost = (node.data / ".node_id").read_text().strip()
    storm.cluster.remove(node)
    storm.cluster.add(f"--forget={lost}")
    return no_undo


FAULTS = {
    "kill": Fault(kill),
    "pause": Fault(pause),
    "partition": Fault(partition, linux=True),
    "one-way": Fault(one_way, linux=True),
    "half-way": Fault(half_way, linux=True),
    "slow": Fault(slow, linux=True),
    "full-disk": Fault(full_disk, linux=True),
    "clock": Fault(clock),
    "corrupt": Fault(corrupt, destroys=True),
    "away": Fault(kill, destroys=True, rebuilds=True, seconds=(GRACE_SECONDS, GRACE_SECONDS + 5)),
    "wipe": Fault(wipe, destroys=True, rebuilds=True),
    "replace": Fault(replace, destroys=True, rebuilds=True),
    "join": Fault(join, rebuilds=True),
}

# ==== 9 Whole again ====


def wait_whole(cluster: Cluster, recorder: Recorder) -> list[str]:
    """[] as soon as nothing is missing, or what still is after SETTLE_SECONDS."""
    for node in cluster.nodes:
        node.wait_ready()
    clients = [Client(node) for node in cluster.nodes]
    missing: list[str] = []

    def whole() -> bool:
        missing[:] = filter(None, [cluster.unsettled()])
        if not missing:
            for bucket in BUCKETS:
                abort_uploads(clients[0], bucket)
            etags, differences = compare(clients, recorder)
            wanted = {name for etag in etags for name in recorder.blocks.get(etag, ())}
            missing[:] = differences or disputed(cluster) or misplaced(cluster, wanted)
        return not missing

    wait_until(whole, SETTLE_SECONDS, 1.0)
    return [f"{SETTLE_SECONDS:.0f} s after the faults {fact}" for fact in missing[:20]]


def abort_uploads(client: Client, bucket: str) -> None:
    """Their parts are blocks of no object."""
    answer = client.call("GET", f"/{bucket}", query={"uploads": ""})
    if answer.status == 200:
        for key, upload in zip(answer.texts("Key"), answer.texts("UploadId"), strict=True):
            client.call("DELETE", f"/{bucket}/{key}", query={"uploadId": upload})


def compare(clients: Sequence[Client], recorder: Recorder) -> tuple[set[str], list[str]]:
    """The ETags of the objects that exist, and where the nodes do not agree about one."""
    etags, differences = set(), []
    for key in KEYS:
        answers = {}
        for client in clients:
            invoked, answer = time.monotonic(), client.call("GET", f"/{key}")
            recorder.read(f"GET n{client.node.index} at rest", key, invoked, answer)
            answers[client.node.index] = answer.etag or str(answer.status)
            etags.add(answer.etag)
        if len(set(answers.values())) > 1 or answer.status not in (200, 404):
            differences.append(f"{key} is {answers}")
    return etags, differences


def disputed(cluster: Cluster) -> list[str]:
    """Buckets whose owners, the nodes nearest to its name, have not all accepted the same."""
    found = []
    for bucket in BUCKETS:
        target = int.from_bytes(blake3(bucket.encode()).digest(20), "big")
        owners = sorted(cluster.nodes, key=lambda node: node.identity() ^ target)[:REPLICAS]
        records = {node.index: node.records(bucket) for node in owners}
        if any(rows != records[owners[0].index] for rows in records.values()):
            found.append(f"the owners' records of {bucket} are {records}")
    return found


def misplaced(cluster: Cluster, wanted: set[str]) -> list[str]:
    """Blocks of objects without their replicas, block files that are wrong, and garbage."""
    copies: Counter[str] = Counter()
    wrong = []
    for node in cluster.nodes:
        for blob in node.blobs():
            if is_good(blob):
                copies[blob.stem] += 1
            elif blob.exists():
                wrong.append(f"node {node.index} has a wrong block {blob.stem[:8]}")
    enough = min(REPLICAS, len(cluster.nodes))
    for name in sorted(wanted):
        if copies[name] < enough:
            wrong.append(f"block {name[:8]} has {copies[name]} replicas")
    for name in sorted(set(copies) - wanted):
        named = {node.index: node.references(name) for node in cluster.nodes}
        if not any(bucket == ".uploads" for rows in named.values() for bucket, _ in rows):
            wrong.append(f"block {name[:8]} of no object is there; what names it: {named}")
    return wrong


def is_good(blob: Path) -> bool:
    """Whether it is there, and is what its name says."""
    with suppress(FileNotFoundError):  # it is not
        return blake3(blob.read_bytes()).hexdigest() == blob.stem
    return False


# ==== 10 Runs ====


@dataclass
class Report:
    """What a run did, and what it found wrong."""

    name: str
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    story: list[str] = field(default_factory=list)  # the faults
    seconds: float = 0.0

    def __str__(self) -> str:
        """For people; the faults are told only where something is wrong."""
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        faults = Counter(line.split()[1] for line in self.story)
        struck = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
        lines = [f"{self.name}, {self.seconds:.0f} s: {counts}; {struck}"]
        lines += [*self.story, *self.violations] if self.violations else ["no violation"]
        return "\n  ".join(lines)


@contextmanager
def running(report: Report, cluster: Cluster) -> Iterator[Report]:
    """The report of what is done with this cluster; what goes wrong with nodes is in it, too."""
    started = time.monotonic()
    with cluster:
        try:
            yield report
        except ChaosError as error:
            report.violations.append(str(error))
    report.violations += cluster.noted
    report.seconds = time.monotonic() - started


def together(
    count: int, task: Callable[[int, threading.Event], None], meanwhile: Callable[[], None]
) -> None:
    """Run task(0, stop), task(1, stop), ... at once; `stop` is set when `meanwhile` is over."""
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(task, number, stop) for number in range(count)]
        try:
            meanwhile()
        finally:
            stop.set()
    for each in tasks:
        each.result()


def chaos(
    seed: int, seconds: float, nodes: int, kinds: Sequence[str], modules: Path = ROOT
) -> Report:
    """Rounds of faults under load, all whole again after each; then a restart of everything."""
    rng, recorder = random.Random(f"{seed} faults"), Recorder(seed)
    cluster = Cluster(nodes or rng.randint(3, 5), modules)
    with running(Report(f"seed {seed}, {cluster.count} nodes"), cluster) as report:
        rounds = max(1, round(seconds / ROUND_SECONDS))
        for number in range(rounds):
            storm = Storm(cluster, kinds, rng)
            under_load(storm, recorder, f"{seed} {number}", seconds / rounds)
            report.story += storm.story
            report.violations += wait_whole(cluster, recorder)
            if report.violations:
                break
        else:
            for node in cluster.nodes:
                node.kill()
            for node in cluster.nodes:
                node.start()
            report.violations += wait_whole(cluster, recorder)
    report.counts += recorder.counts
    report.violations += recorder.noted + violations(recorder.ops, recorder.listings)
    return report


def under_load(storm: Storm, recorder: Recorder, seed: str, seconds: float) -> None:
    """The faults of one round while CLIENTS clients work."""
    workers = [Worker(number, storm.cluster, recorder, seed) for number in range(CLIENTS)]
    together(CLIENTS, lambda number, stop: workers[number].run(stop), lambda: storm.rage(seconds))


def short(seed: int = 1) -> list[str]:
    """Violations of about 20 s with three nodes and no long repair: what the test suite calls."""
    kinds = available(("kill", "pause", "partition", "one-way", "half-way", "slow"))
    return selftest() + chaos(seed, 8, 3, kinds).violations


def race(times: int, modules: Path = ROOT) -> Report:
    """`If-None-Match: *` on one key from 30 clients of 3 nodes at once: one 200, the rest 412."""
    clients, answers = 30, defaultdict[int, list[Answer]](list)
    barrier, cluster = threading.Barrier(clients), Cluster(3, modules)
    with running(Report(f"race, {times} times"), cluster) as report:
        path = f"/{BUCKETS[0]}/race-"

        def compete(number: int, _: threading.Event) -> None:
            client = Client(cluster.nodes[number % 3], 30)
            for turn in range(times):
                barrier.wait(60)
                body, headers = b"%d" % number, {"if-none-match": "*"}
                answers[number].append(client.call("PUT", f"{path}{turn}", body, headers))

        together(clients, compete, lambda: None)
        for turn in range(times):
            report.counts.update(str(answers[number][turn].status) for number in range(clients))
            winners = [number for number in range(clients) if answers[number][turn].status == 200]
            kept = until_done(Client(cluster.nodes[turn % 3]), "GET", f"{path}{turn}").body
            if [b"%d" % number for number in winners] != [kept]:
                report.violations.append(f"race {turn}: {winners} were told 200, {kept!r} was kept")
    return report


def counter(seed: int, seconds: float, kinds: Sequence[str], modules: Path = ROOT) -> Report:
    """All clients append lines to one object by If-Match: each acknowledged one is there, once."""
    cluster = Cluster(3, modules)
    lines: dict[str, int] = {}  # line -> status of the PUT that added it
    with running(Report(f"counter, seed {seed}"), cluster) as report:
        path = f"/{BUCKETS[0]}/counter"
        until_done(Client(cluster.nodes[0]), "PUT", path)

        def append(number: int, stop: threading.Event) -> None:
            clients, turns = [Client(node, 4) for node in cluster.nodes], itertools.count()
            while not stop.wait(THINK_SECONDS):
                turn = next(turns)
                client, line = clients[(number + turn) % len(clients)], f"{number}.{turn}"
                old = client.call("GET", path)
                if old.status == 200:
                    body, headers = old.body + f"{line}\n".encode(), {"if-match": f'"{old.etag}"'}
                    lines[line] = client.call("PUT", path, body, headers).status

        storm = Storm(cluster, kinds, random.Random(f"{seed} counter"))
        together(CLIENTS, append, lambda: storm.rage(seconds))
        report.story += storm.story
        found = Counter(until_done(Client(cluster.nodes[0]), "GET", path).body.decode().split())
        report.counts.update(str(status) for status in lines.values())
        for line, status in lines.items():
            if found[line] > 1 or found[line] != {200: 1, 412: 0}.get(status, found[line]):
                report.violations.append(f"{line}, answered {status}, is there {found[line]} times")
    return report


def gc_race(times: int, modules: Path = ROOT) -> Report:
    """The same bytes put again at just about the time when they may be collected."""
    clients, turns = 64, itertools.count()
    cluster = Cluster(3, modules, ["--gc-grace=1"])
    with running(Report(f"gc-race, {times} times"), cluster) as report:

        def take_turns(number: int, _: threading.Event) -> None:
            doors, rng = [*map(Client, cluster.nodes)], random.Random(f"gc-race {number}")
            body = rng.randbytes(INLINE_BYTES + 1000)
            while next(turns) < times:
                path = f"/{BUCKETS[0]}/gc-{number}-{rng.randrange(3)}"
                until_done(rng.choice(doors), "PUT", path, body)
                for seconds in (0, rng.uniform(0, 1.5)):
                    time.sleep(seconds)
                    answer = rng.choice(doors).call("GET", path)
                    report.counts[f"GET:{answer.status}"] += 1
                    if answer.body != body:
                        report.violations.append(f"{path}: {answer.status} {answer.body[:200]!r}")
                until_done(rng.choice(doors), "DELETE", path)
                time.sleep(rng.uniform(0.5, 2.5))

        together(clients, take_turns, lambda: None)
    return report


def dedup(megabytes: int, modules: Path = ROOT) -> Report:
    """Equal bytes under 5 keys cost REPLICAS copies in all; deleting the keys gives all back."""
    body, cluster = random.Random(1).randbytes(megabytes * 1_000_000), Cluster(3, modules)

    def stored() -> int:
        blobs = [blob for node in cluster.nodes for blob in node.blobs()]
        return sum(blob.stat().st_size for blob in blobs if blob.exists())

    with running(Report(f"dedup of {megabytes} MB"), cluster) as report:
        paths = [f"/{BUCKETS[0]}/same-{number}" for number in range(5)]
        for number, path in enumerate(paths):
            answer = Client(cluster.nodes[number % 3], 300).call("PUT", path, body)
            report.counts[f"PUT:{answer.status}"] += 1
        if not wait_until(lambda: stored() == REPLICAS * len(body), SETTLE_SECONDS):
            report.violations.append(f"{stored():,} bytes of blocks for {len(body):,} of objects")
        for path in paths:
            until_done(Client(cluster.nodes[0]), "DELETE", path)
        if not wait_until(lambda: not stored(), SETTLE_SECONDS):
            report.violations.append(f"{stored():,} bytes of blocks after all keys were deleted")
    return report


def heal(modules: Path = ROOT) -> Report:
    """A wrong bit in each block file in turn: the next GET is right, and the file is healed."""
    body, cluster = random.Random(1).randbytes(2 * BLOCK_BYTES + 100_000), Cluster(3, modules)
    with running(Report("heal"), cluster) as report:
        path = f"/{BUCKETS[0]}/heal"
        until_done(Client(cluster.nodes[0]), "PUT", path, body)
        for node, blob in [(each, blob) for each in cluster.nodes for blob in each.blobs()]:
            flip(blob)
            answer = Client(node).call("GET", path)
            report.counts[f"GET:{answer.status}"] += 1
            if answer.body != body:
                report.violations.append(f"GET with a wrong block: {answer.status}")
            if not wait_until(partial(is_good, blob), SETTLE_SECONDS):
                report.violations.append(f"node {node.index} did not heal {blob.name}")
    return report


# ==== 11 Planted bugs ====


class Planted(NamedTuple):
    """A bug: what to put for which texts of zs3_dist.py, and the run that is to catch it, given a
    number from 1 up and the folder of the broken modules."""

    what: str
    edits: dict[str, str]
    catch: Callable[[int, Path], Report]


PLANTED = (
    Planted(
        "an owner accepts without looking at what it promised",
        {"if ballot < slot.promised:\n                return": "if False:\n                return"},
        lambda number, modules: race(20, modules),
    ),
    Planted(
        "a read takes the newest of a majority, though a change is half-way",
        {
            '"accepted", read_quorum, settled)': '"accepted", read_quorum)',
            "if not top.settled:\n" + " " * 12 + "return": "if False:\n" + " " * 12 + "return",
        },
        lambda number, modules: chaos(number, 20, 3, ("half-way", "slow"), modules),
    ),
    Planted(
        "garbage collection does not look again",
        {
            "if not needed}": "if not needed or (block, 0.0) in self._suspects}",
            "self._suspects.get((block, touched), now)": "self._suspects.get((block, 0.0), now)",
            "suspects[block, touched] = since": "suspects[block, 0.0] = since",
            "if status.st_mtime == touched:": "if True:",
        },
        lambda number, modules: gc_race(300, modules),
    ),
)


def broken(bug: Planted) -> str:
    """zs3_dist.py with this bug."""
    source = (ROOT / "zs3_dist.py").read_text()
    for old, new in bug.edits.items():
        if source.count(old) != 1:
            raise ChaosError(f"{bug.what}: {old!r} is there {source.count(old)} times")
        source = source.replace(old, new)
    return source


def hunt(bug: Planted, tries: int) -> Report:
    """Up to so many runs against a copy with this bug. The violation is not to find one."""
    source = broken(bug)
    report = Report(f"planted: {bug.what}", [f"not caught in {tries} tries"])
    with tempfile.TemporaryDirectory(prefix="zs3-planted-") as folder:
        shutil.copy(ROOT / "zs3.py", folder)
        Path(folder, "zs3_dist.py").write_text(source)
        for number in range(1, tries + 1):
            attempt = bug.catch(number, Path(folder))
            report.seconds += attempt.seconds
            if attempt.violations:
                print(f"caught by {attempt.name}: {attempt.violations[0]}")
                report.violations.clear()
                break
    return report


def planted(tries: int) -> Report:
    """Each planted bug; the violations are those of this tool."""
    report = Report("planted")
    for bug in PLANTED:
        found = hunt(bug, tries)
        print(found, flush=True)
        report.violations += found.violations
        report.seconds += found.seconds
    return report


# ==== 12 Command line ====

RUNS: dict[str, Callable[[argparse.Namespace, int, list[str]], Report]] = {
    "chaos": lambda args, seed, kinds: chaos(seed, args.seconds, args.nodes, kinds),
    "counter": lambda args, seed, kinds: counter(seed, args.seconds, kinds),
    "race": lambda args, *_: race(args.times or 200),
    "gc-race": lambda args, *_: gc_race(args.times or 10_000),
    "dedup": lambda args, *_: dedup(args.megabytes),
    "heal": lambda *_: heal(),
    "planted": lambda args, *_: planted(args.times or 10),
    "selftest": lambda *_: Report("selftest", selftest()),
}


def available(kinds: Iterable[str]) -> list[str]:
    """Without those that this system cannot do."""
    kinds = list(kinds)
    skipped = [kind for kind in kinds if FAULTS[kind].linux and sys.platform != "linux"]
    if skipped:
        print(f"skipped, they need Linux: {', '.join(skipped)}")
    return [kind for kind in kinds if kind not in skipped]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", default="chaos", choices=RUNS)
    parser.add_argument("--seeds", default="1-3", metavar="A-B")
    parser.add_argument("--seconds", type=float, default=60, help="of faults, for each seed")
    parser.add_argument("--nodes", type=int, default=0, help="3 to 7; 0: drawn from the seed")
    parser.add_argument("--faults", default="", metavar="NAME,...", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=0, help="of a race, or tries to find a bug")
    parser.add_argument("--megabytes", type=int, default=100, help="for dedup")
    return parser.parse_args()


def main() -> int:
    """Each seed's report; 1 if any has a violation."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and not without ending the nodes
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    every = [kind for kind in FAULTS if args.run == "chaos" or not FAULTS[kind].rebuilds]
    kinds, broken = available(filter(None, args.faults.split(",")) if args.faults else every), 0
    for seed in seeds if args.run in ("chaos", "counter") else (1,):
        try:
            report = RUNS[args.run](args, seed, kinds)
        except ChaosError as error:
            report = Report(args.run, [str(error)])
        print(report, flush=True)
        broken += bool(report.violations)
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
