"""zs3_dist: the distributed mode of zs3. The same S3 API on every node; needs `blake3`.

Bytes named by their hash need no vote, since one good copy proves itself; what needs a quorum is
the record that maps bucket and key to hashes. A write cuts the body into blocks, stores each on
three nodes (6), and changes the key's register at a majority of the bucket's owners (7). A read
asks a majority for the record, then streams verified blocks from local disk or peers (8). The path
of a peer's request: `DistributedStore.internal` (8) -> seal (4) -> fields checked (3) ->
`Node.answer` (7), which never calls a peer. Background jobs (9, 10) are started by
`DistributedStore.start`.

Sections:

     1 Limits
     2 Ids and routing table
     3 Messages
     4 Peer connections
     5 Lookups and providers
     6 Blocks
     7 Records and quorums
     8 DistributedStore
     9 Repair, tombstones, garbage
    10 Joining and discovery
    11 Opening

On disk:

    data/.node_id                160-bit identity of this disk, hex
    data/.cas/ab/ab12...ef.blob  a block, named by the BLAKE3 of its bytes
    data/.cas/bad/               blocks that did not match their name, set aside
    data/.index/registers.db     what this node promised and accepted, and its views
    data/.index/lock             held while a process uses the folder

The registers are rows of one SQLite file, where a file per key would do: it gives a sorted scan
from any key without an index in memory, a record and its block references in one transaction, a
change log for catching up, and keys that no file name can spell. It costs half the time of a file
written and renamed.

Refused: more than MAX_OBJECT_BLOCKS blocks in one object (128 GiB); peers without the cluster's
secret.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import hmac
import itertools
import json
import math
import os
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zs3
from zs3 import LOG, UPLOADS, BucketInfo, Condition, ObjectInfo, S3Error, T, sync

try:
    from blake3 import blake3
except ImportError as error:
    raise ImportError(
        "distributed mode needs the package blake3: python -m pip install blake3"
    ) from error

# ===== 1 Limits =====

ID_BITS = 160  # node ids and targets (Kademlia, section 2)
CONTACTS_PER_BUCKET = 20  # k (Kademlia, 2.2)
CONTACTS_PER_ANSWER = 40  # 2 k: with k, dead ones could crowd out the last of the k live ones
LOOKUP_WIDTH = 3  # alpha (Kademlia, 2.3)
REFRESH_SECONDS = 3600.0  # a k-bucket not heard from is looked up (Kademlia, 2.3)
PROVIDER_SECONDS = 86400.0  # a provider record lives so long (Kademlia, 2.5)
REPUBLISH_SECONDS = 3600.0  # and is announced anew so often: nodes come and go (Kademlia, 2.5)
MAX_PROVIDED = 10_000  # blocks whose provider records are kept; those not announced lately go

BLOCK_BYTES = 1 << 20  # small, so that dozens of clients' blocks in flight fit in 80 MB
INLINE_BYTES = 4096  # a body up to this travels in its record
MAX_OBJECT_BLOCKS = 131_072  # 128 GiB; their hashes make a record of 8 MB
STORE_BEHIND = 2  # blocks of a body on their way to their holders while the next is received
READ_AHEAD = 2  # blocks fetched and verified while one is being sent
MESSAGE_BYTES = 12 << 20  # JSON of one message; a record of MAX_OBJECT_BLOCKS fits
BATCH = 1000  # hashes or keys in one message
PAGE_BYTES = 1 << 20  # answers of many entries stop after this much
MAX_MEMBERS = 1000  # nodes in a view
MAX_KNOWN_BUCKETS = 10_000  # whose owners are remembered, under names that may be made up

CONNECT_SECONDS = 2.0  # also how long one small answer may take
BLOCK_SECONDS = 10.0  # how long storing or fetching one block may take
COPY_SECONDS = 2.0  # a third copy is waited for so long after two are there
EAGER_SECONDS = 0.0003  # an answer that comes so soon is not slept for: to wake up takes as long
HEDGE_SECONDS = 0.05  # a small answer later than this makes us ask one more peer
SKIP_SECONDS = 10.0  # a peer that did not answer is asked last for so long, unless it is heard from
JOIN_WAIT_SECONDS = 8.0  # a client's request waits so long for this node to join its cluster
SILENCE_SECONDS = 1.5  # a change that lacks owners is tried for so long, and three times
OPERATION_SECONDS = 12.0  # a change or read that is not settled by then is 503
LATE_SECONDS = 30.0  # no message arrives later than this after its sender gave up
BURIAL_SECONDS = 6 * CONNECT_SECONDS  # twice as long as an answer waits for another: `_ask_others`
BACKOFF_SECONDS = 0.004  # first random pause of writers that duel; doubles 8 times
LOCK_SECONDS = 25.0  # a folder in use is waited for so long: zs3.SHUTDOWN_SECONDS and some more
IDLE_LINKS = 16  # kept-alive connections to one peer
IDLE_SECONDS = zs3.SOCKET_SECONDS / 2  # one that rested longer is not used: the peer may end it

TEND_REST = 4  # a walk over the blocks rests so many times as long as it works,
REST_SECONDS = 1.0  # but no longer after each BATCH: it may have worked on repairs, or waited
SCRUB_BYTES_PER_SECOND = 8 << 20  # how fast blocks are read to see whether they are still good
PULL_SECONDS = 2.0  # between two looks at the other owners' change logs
MERGE_SECONDS = 0.5  # by then a lone node has answered what it was asked before
FORGET_ROUNDS = 10  # gossip intervals: a majority misses a member for so long when it is forgotten
CLOSING_SECONDS = 1.0  # a deletion of a bucket that takes longer may be undone by a PUT
SCRUB_ROUNDS = 40  # gossip intervals between two readings of all blocks
DISCOVERY_GROUP = ("239.255.90.83", 9083)  # UDP multicast, site-local (RFC 2365)
DISCOVERY_SECONDS = 2.0  # between announcements; also how long a fresh node listens before founding

# ===== 2 Ids and routing table =====


class Contact(NamedTuple):
    """Where a node is: its id (0 to 2**ID_BITS - 1) and "host:port" of its HTTP server."""

    node: int
    address: str

    def as_json(self) -> list[str]:
        """[40 hex digits, "host:port"], as on the wire and on disk."""
        return [node_hex(self.node), self.address]


def node_hex(node: int) -> str:
    """40 hex digits."""
    return f"{node:040x}"


def target_of(name: bytes) -> int:
    """The point of the id space that belongs to a name: the first 160 bits of its BLAKE3."""
    return int.from_bytes(blake3(name).digest(ID_BITS // 8), "big")


def block_target(block: str) -> int:
    """The point of the id space that belongs to a block: the first 160 bits of its name."""
    return int(block[: ID_BITS // 4], 16)


def nearest(contacts: Iterable[Contact], target: int, count: int) -> list[Contact]:
    """The `count` contacts with the smallest XOR distance to `target`, nearest first."""
    return sorted(contacts, key=lambda contact: contact.node ^ target)[:count]


def bucket_index(own: int, other: int) -> int:
    """Which k-bucket of `own` holds `other`: the highest bit in which they differ, below ID_BITS.
    The ids must differ. (Kademlia, 2.2)"""
    return (own ^ other).bit_length() - 1


class RoutingTable:
    """k-buckets of contacts, least recently seen first; the clock is an argument. Old contacts that
    still answer are kept and new ones wait, since a node that was up for long is likely to stay up,
    and a flood of new ids cannot push the real peers out. (Kademlia, 2.2)"""

    def __init__(self, own: int) -> None:
        self.own = own
        self._lock = threading.Lock()  # guards the fields below
        self.buckets: list[dict[int, Contact]] = [{} for _ in range(ID_BITS)]
        self.waiting: list[dict[int, Contact]] = [{} for _ in range(ID_BITS)]
        self.heard = [0.0] * ID_BITS

    def seen(self, contact: Contact, now: float) -> Contact | None:
        """`contact` spoke to us. Returns whom to ping before `contact` can have his place."""
        if contact.node == self.own:
            return None
        index = bucket_index(self.own, contact.node)
        with self._lock:
            bucket, self.heard[index] = self.buckets[index], now
            if bucket.pop(contact.node, None) is not None or len(bucket) < CONTACTS_PER_BUCKET:
                bucket[contact.node] = contact
                return None
            waiting = self.waiting[index]
            waiting.pop(contact.node, None)
            if len(waiting) < CONTACTS_PER_BUCKET:
                waiting[contact.node] = contact
            return next(iter(bucket.values()))

    def failed(self, contact: Contact) -> None:
        """`contact` did not answer: the most recently seen waiting contact takes its place. With
        nobody waiting it stays, so that a cut network cable does not empty the table."""
        index = bucket_index(self.own, contact.node)
        with self._lock:
            if contact.node in self.buckets[index] and self.waiting[index]:
                del self.buckets[index][contact.node]
                node, heir = self.waiting[index].popitem()
                self.buckets[index][node] = heir

    def contacts(self) -> list[Contact]:
        """Everybody in the table."""
        with self._lock:
            return [contact for bucket in self.buckets for contact in bucket.values()]

    def closest(self, target: int) -> list[Contact]:
        """The CONTACTS_PER_ANSWER known contacts nearest to `target`, nearest first."""
        return nearest(self.contacts(), target, CONTACTS_PER_ANSWER)

    def stale(self, now: float, pick: random.Random) -> list[int]:
        """A random id in each used k-bucket that nobody in was heard from for REFRESH_SECONDS."""
        with self._lock:
            return [
                self.own ^ (1 << index) ^ pick.getrandbits(index)
                for index, bucket in enumerate(self.buckets)
                if bucket and now - self.heard[index] > REFRESH_SECONDS
            ]


# ===== 3 Messages =====

# A ballot is 36 hex digits that compare as text: epoch of the view (8), counter (12), proposer
# (16). "" stands below all of them. The epoch leads, so no straggler of an older view outranks a
# newer one.
BALLOT = re.compile(r"[0-9a-f]{36}")
NODE = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{64}")
BLOB = re.compile(r"[0-9a-f]{64}\.blob")
HASHES = re.compile(r"(?:[0-9a-f]{64})*")
ADDRESS = re.compile(r"[0-9A-Za-z_.\-]{1,253}:[0-9]{1,5}|\[[0-9A-Fa-f:.%]{2,60}\]:[0-9]{1,5}")
WRITE_ID = re.compile(r"[0-9a-f]{16}")
BUCKET = re.compile(r"[a-z0-9.\-]{1,63}")
CHECKSUM = re.compile(r".{0,200}")  # of a part, in base64
MAX_COUNTER = 1 << 62
MAX_REGISTER_BYTES = 1200  # of a register's key: S3's 1,024 and the prefix of an upload's parts

Value = dict[str, Any]  # what a register holds: see `value_field`
Message = dict[str, Any]
Check = Callable[[Any], Any]  # returns the value as the handler wants it; ValueError refuses it


def need(condition: object, what: str) -> None:
    """ValueError unless `condition`: a field of a peer's message is not what it must be."""
    if not condition:
        raise ValueError(f"bad {what}")


def field_that(holds: Callable[[Any], object], what: str) -> Check:
    """A check for what `holds`, which is taken as it is."""

    def check(raw: Any) -> Any:
        need(holds(raw), what)
        return raw

    return check


def text_field(pattern: re.Pattern[str], empty: bool = False) -> Check:
    """A check for text that matches `pattern` whole, or is "" where that is allowed."""
    return field_that(
        lambda raw: isinstance(raw, str) and ((empty and not raw) or pattern.fullmatch(raw)), "text"
    )


def list_field(check: Check, limit: int = BATCH) -> Check:
    """A check for a list of at most `limit` things that each pass `check`."""

    def checked(raw: Any) -> list[Any]:
        need(isinstance(raw, list) and len(raw) <= limit, "list")
        return [check(one) for one in raw]

    return checked


def tuple_field(*checks: Check) -> Check:
    """A check for a list with one thing for each of `checks`."""

    def checked(raw: Any) -> tuple[Any, ...]:
        need(isinstance(raw, list) and len(raw) == len(checks), "tuple")
        return tuple(check(one) for check, one in zip(checks, raw, strict=True))

    return checked


def fields_field(checks: Mapping[str, Check]) -> Check:
    """A check for an object with exactly these fields, each as its check wants it."""

    def checked(raw: Any) -> Message:
        need(isinstance(raw, dict) and raw.keys() == checks.keys(), "fields")
        return {name: check(raw[name]) for name, check in checks.items()}

    return checked


def optional_field(check: Check) -> Check:
    """A check for null or what passes `check`."""
    return lambda raw: None if raw is None else check(raw)


def number_up_to(limit: int, least: int = 0) -> Check:
    """A check for an integer from `least` to `limit`."""
    return field_that(lambda raw: type(raw) is int and least <= raw <= limit, "number")


def key_up_to(limit: int) -> Check:
    """A check for text of at most `limit` bytes of UTF-8."""
    return field_that(lambda raw: isinstance(raw, str) and len(raw.encode()) <= limit, "key")


number_field = number_up_to(MAX_COUNTER)
flag_field = field_that(lambda raw: isinstance(raw, bool), "flag")
ballot_field = text_field(BALLOT)
hashes_field = list_field(text_field(HASH))
bucket_field = text_field(BUCKET)
key_field = key_up_to(MAX_REGISTER_BYTES)  # "" is the bucket's own register
asked_field = key_up_to(zs3.MAX_HEAD_BYTES)  # what a client asks a listing for, of any length


def address_field(raw: Any) -> str:
    """HOST:PORT."""
    address = text_field(ADDRESS)(raw)
    need(0 < int(address.rpartition(":")[2]) < 65536, "port")
    return cast(str, address)


def contact_field(raw: Any) -> Contact:
    """[node id, address]."""
    node, address = tuple_field(text_field(NODE), address_field)(raw)
    return Contact(int(node, 16), address)


@functools.lru_cache(maxsize=MAX_MEMBERS)
def parse_contact(text: str) -> Contact:
    """The inverse of `" ".join(contact.as_json())`. ValueError."""
    return contact_field(text.split(" "))


def members_field(raw: Any) -> tuple[Contact, ...]:
    """Contacts with distinct ids, sorted by id."""
    contacts = list_field(contact_field, MAX_MEMBERS)(raw)
    need(len({contact.node for contact in contacts}) == len(contacts), "members")
    return tuple(sorted(contacts))


def blocks_field(raw: Any) -> Any:
    """[[bytes, hashes joined], ...]: in a segment, each block but the last has BLOCK_BYTES."""
    need(isinstance(raw, list) and len(raw) <= MAX_OBJECT_BLOCKS, "blocks")
    for size, hashes in map(tuple_field(number_field, text_field(HASHES)), raw):
        need(len(hashes) == 64 * -(-size // BLOCK_BYTES), "block count")
    return raw


def info_field(raw: Any) -> Any:
    """ObjectInfo.record()."""
    need(isinstance(raw, dict), "record")
    try:
        ObjectInfo.from_record("", raw)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError("bad record") from problem
    return raw


view_field = fields_field({
    "cluster": text_field(WRITE_ID), "epoch": number_field,
    "replicas": number_up_to(CONTACTS_PER_BUCKET, least=1),
    "members": members_field, "previous": members_field,
})
bucket_record_field = fields_field({
    "created": field_that(lambda raw: isinstance(raw, (int, float)), "time"),  # seconds
    "state": field_that(lambda raw: raw in ("open", "deleting"), "state"),
})
VALUE_FIELDS: dict[str, Check] = {
    "id": text_field(WRITE_ID),  # which write made it; with nothing but a base, a tombstone
    "base": text_field(BALLOT, empty=True),  # what it replaced was accepted there, or below
    "info": info_field,  # an object: ObjectInfo.record()
    "parts": list_field(  # ObjectInfo.parts, which a listing does not show: size and checksum
        tuple_field(number_field, text_field(CHECKSUM)), zs3.MAX_PART_NUMBER
    ),
    "blocks": blocks_field,
    "inline": field_that(  # its bytes in base64, when they are few
        lambda raw: isinstance(raw, str)
        and len(base64.b64decode(raw, validate=True)) <= INLINE_BYTES, "inline",
    ),
    "bucket": bucket_record_field,  # a bucket
    "view": view_field,  # the members of the next view
}


def value_field(raw: Any) -> Any:
    """A register's value: {"id"} and, unless it is a tombstone, an object, a bucket or a view."""
    need(isinstance(raw, dict) and "id" in raw and set(raw) <= set(VALUE_FIELDS), "value")
    for name, one in raw.items():
        VALUE_FIELDS[name](one)
    return raw


EPOCH: dict[str, Check] = {"epoch": number_field}
PLACE: dict[str, Check] = {**EPOCH, "bucket": bucket_field, "key": key_field}
MESSAGES: dict[str, dict[str, Check]] = {
    # message: its fields, each with its check. A field more or less is refused.
    "hello": EPOCH,
    "views": {"views": list_field(view_field)},
    "find": {"target": text_field(NODE)},
    "find_providers": {"hash": text_field(HASH)},
    "provide": {"hashes": hashes_field},
    "prepare": {**PLACE, "ballot": ballot_field},
    "accept": {
        **PLACE, "ballot": ballot_field, "value": value_field,
        "chosen": flag_field,  # true: with this acceptance it is
        "basis": optional_field(tuple_field(ballot_field, flag_field, value_field)),
    },
    "learn": {**PLACE, "ballot": ballot_field},
    "read": {**PLACE, "brief": flag_field},  # true: no value, but a tombstone
    "page": {
        **EPOCH, "bucket": bucket_field,
        "prefix": asked_field, "start": asked_field, "delimiter": asked_field,
        "whole": flag_field,  # true: with the blocks, not only what a listing shows
        "mark": text_field(WRITE_ID, empty=True),  # only if that wrote the bucket's record
    },
    "buckets": EPOCH,
    "changes": {**EPOCH, "since": number_field},
    "values": {**EPOCH, "places": list_field(tuple_field(bucket_field, key_field))},
    "buried": {**EPOCH, "graves": list_field(tuple_field(bucket_field, key_field, ballot_field))},
    "used": {**EPOCH, "hashes": hashes_field},
    "have": {"hashes": hashes_field, "touch": flag_field},
}


def parse_message(name: str, body: bytes | bytearray) -> Message:
    """The checked fields of message `name`. ValueError when the body is not exactly that."""
    return cast(Message, fields_field(MESSAGES[name])(json.loads(body.decode())))


JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def pack(message: object) -> bytes:
    """JSON as it goes over the wire."""
    return JSON.encode(message).encode()


# ===== 4 Peer connections =====

NOBODY = "0" * 40  # the receiver's id in a request to an address whose node is not known


class Reply(NamedTuple):
    """A peer's answer. `status` 0 means that none came."""

    status: int
    body: bytes = b""
    proof: str = ""

    def json(self) -> Message:
        """The fields of a good answer; {"failed": true} without one."""
        return json.loads(self.body.decode()) if self.status == 200 else {"failed": True}


class Question(NamedTuple):
    """One request to one peer. `path` is below /_zs3/: a message, or store/HASH or fetch/HASH."""

    to: Contact
    path: str
    body: bytes

    @property
    def of_block(self) -> bool:
        """Whether it moves a block, which the seal covers by the hash in the path."""
        return "/" in self.path


class Seal:
    """Seals requests to peers and checks theirs: `x-zs3-seal: SENDER ADDRESS RECEIVER NONCE PAYLOAD
    MAC`, the last by BLAKE3 under the cluster key, of the path and the rest. No date, as a node
    whose clock is a day off is still a member: the receiver is named, so that no request but hello
    can be replayed to another node, and to replay one to the same node changes nothing that a
    delayed duplicate could not (ballots order everything). It is answered, though, as is all here
    without encryption: who overhears peers can read what they read. Answers carry a proof, too."""

    def __init__(self, own: Contact, secret: str) -> None:
        self.own = own
        self.misled: set[str] = set()  # addresses of peers that look for another node, or for us
        self._key = blake3(secret.encode(), derive_key_context="zs3 cluster").digest()
        self._from = " ".join(own.as_json())
        self._nonces = itertools.count(secrets.randbits(63))

    def request(self, question: Question) -> tuple[bytes, str]:
        """Head of the HTTP request, and the MAC that the answer must prove to have seen."""
        to, path = question.to, "/_zs3/" + question.path
        payload = "-" if question.of_block else blake3(question.body).hexdigest()
        said = f"{self._from} {node_hex(to.node)} {next(self._nonces):x} {payload}"
        mac = self._mac(path, said)
        head = (
            # No name of ours: with --domain it might be that of a bucket.
            f"POST {path} HTTP/1.1\r\nhost: zs3\r\nx-zs3-seal: {said} {mac}\r\n"
            f"content-length: {len(question.body)}\r\n\r\n"
        )
        return head.encode(), mac

    def _mac(self, path: str, said: str) -> str:
        return self.mark(f"{path} {said}".encode("latin-1")).hex()

    def check(self, request: zs3.Request) -> tuple[Contact, str, str]:
        """Who sealed this for us, the BLAKE3 in hex that its body must have ("-": any), and the
        MAC. S3Error or ValueError when no peer did."""
        said, _, mac = request.header("x-zs3-seal").rpartition(" ")
        if not hmac.compare_digest(self._mac(request.path, said).encode(), mac.encode("latin-1")):
            raise S3Error("AccessDenied", "This request is not sealed by a node of this cluster.")
        node, address, to, _nonce, payload = said.split(" ")
        sender = parse_contact(f"{node} {address}")
        if to not in (node_hex(self.own.node), NOBODY):
            self.misled.add(sender.address)
            raise S3Error("AccessDenied", "This request was meant for another node.")
        return sender, payload, mac

    def mark(self, data: bytes) -> bytes:
        """32 bytes that only a holder of the cluster key can say of `data`: its keyed BLAKE3."""
        return blake3(data, key=self._key).digest()

    def proof(self, mac: str, status: int, body: bytes) -> str:
        """What only a holder of the cluster key can say about this answer to that request."""
        return self.mark(b"%s %d %s" % (mac.encode(), status, body)).hex()


class Link:
    """One non-blocking connection to a peer: connecting, then sending a request, then receiving."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        # IPv4 first: "localhost" is often ::1 too, where nobody listens.
        family, kind, protocol, _, target = min(found, key=lambda one: one[0] != socket.AF_INET)
        self.socket = socket.socket(family, kind, protocol)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.fresh = True  # no request was answered over it yet
        self.begun = 0.0  # monotonic; when its last request was
        self.outgoing: list[memoryview] = []
        self.incoming = bytearray()
        with contextlib.suppress(BlockingIOError):  # in progress: the first write waits for it
            self.socket.connect(target)

    def begin(self, *parts: bytes) -> None:
        """Start sending a request."""
        self.begun = time.monotonic()
        self.outgoing = [memoryview(part) for part in parts if part]
        self.incoming = bytearray()

    def events(self) -> int:
        """What to poll for."""
        return select.POLLOUT if self.outgoing else select.POLLIN

    def pump(self) -> Reply | None:
        """Send or receive what can be without waiting. The answer, once it is whole. OSError when
        the connection is of no use any more."""
        try:
            if self.outgoing:
                self._send()
                return None
            some = self.socket.recv(1 << 18)
        except BlockingIOError:
            return None
        if not some:
            raise ConnectionResetError("closed by the peer")
        self.incoming += some
        if len(self.incoming) > MESSAGE_BYTES + 65536:
            raise ConnectionAbortedError("answer too large")
        reply = parse_reply(self.incoming)
        self.fresh = self.fresh and reply is None
        return reply

    def _send(self) -> None:
        while self.outgoing:
            sent = self.socket.sendmsg(self.outgoing)
            while self.outgoing and sent >= len(self.outgoing[0]):
                sent -= len(self.outgoing.pop(0))
            if sent:
                self.outgoing[0] = self.outgoing[0][sent:]

    def close(self) -> None:
        """Drop the connection."""
        self.socket.close()


REPLY_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
REPLY_LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r\n", re.IGNORECASE)
REPLY_PROOF = re.compile(rb"\r\nx-zs3-proof: *([0-9a-f]{64})\r\n", re.IGNORECASE)


def parse_reply(data: bytearray) -> Reply | None:
    """The HTTP answer in `data`, which has a Content-Length; None while it is not whole."""
    end = data.find(b"\r\n\r\n", 0, 65536)
    if end < 0:
        return None
    length = REPLY_LENGTH.search(data, 0, end + 2)
    status = REPLY_STATUS.match(data)
    if length is None or status is None:
        raise ConnectionAbortedError("no answer of a peer")
    if len(data) < end + 4 + int(length.group(1)):
        return None
    proof = REPLY_PROOF.search(data, 0, end + 2)
    body = bytes(data[end + 4 :])
    return Reply(int(status.group(1)), body, proof.group(1).decode() if proof else "")


class Call:
    """One question on its way over one link. A link may have many calls, one after the other."""

    def __init__(self, question: Question, link: Link, seal: Seal, deadline: float) -> None:
        self.question, self.link, self.seal, self.deadline = question, link, seal, deadline
        self.to = question.to
        head, self.mac = seal.request(question)
        link.begin(head, question.body)

    def good(self, reply: Reply) -> bool:
        """Did the answer come from a holder of the cluster key? A block proves itself."""
        if self.question.path.startswith("fetch/") and reply.status == 200:
            return True
        proof = self.seal.proof(self.mac, reply.status, reply.body)
        return hmac.compare_digest(proof, reply.proof)


Enough = Callable[[Mapping[int, Reply]], bool]


class Peers:
    """Asks peers in parallel over kept-alive connections, from the calling thread. A peer that does
    not answer in time is asked last for SKIP_SECONDS, unless it is heard from."""

    def __init__(self, seal: Seal) -> None:
        self.seal = seal
        self._lock = threading.Lock()  # guards _idle, _owed, _skipped, _slow
        self._idle: dict[str, list[Link]] = {}
        self._owed: dict[str, list[Call]] = {}  # whose answers nobody waits for; by address, too
        self.moved: dict[Contact, Contact] = {}  # as the view has it -> where it last spoke from
        self._skipped: dict[int, float] = {}  # node -> monotonic time until which
        self._slow: dict[int, float] = {}  # the same
        self.under_way: set[Exchange] = set()
        self.closed = False

    def skipped(self, node: int) -> bool:
        """Did it fail to answer lately?"""
        return self._skipped.get(node, 0.0) > time.monotonic()

    def fail(self, contact: Contact) -> None:
        """It did not answer in time."""
        with self._lock:
            is_news = contact.node and contact.node not in self._skipped
            self._skipped[contact.node] = time.monotonic() + SKIP_SECONDS
        if is_news:
            LOG.warning("node %s at %s does not answer", node_hex(contact.node), contact.address)

    def heard(self, contact: Contact) -> None:
        """It spoke: ask it again at once."""
        if contact.node in self._skipped:
            with self._lock:
                is_news = self._skipped.pop(contact.node, None)
            if is_news and contact.node:
                LOG.info("node %s at %s answers again", node_hex(contact.node), contact.address)

    def slow(self, node: int) -> bool:
        """Is it not worth to be lingered for?"""
        return self.skipped(node) or self._slow.get(node, 0.0) > time.monotonic()

    def mark_slow(self, nodes: Iterable[int]) -> None:
        """They were lingered for in vain. Who is slow is heard from all the same."""
        with self._lock:
            self._slow.update(dict.fromkeys(nodes, time.monotonic() + SKIP_SECONDS))

    def ask(
        self, questions: Sequence[Question], enough: Enough, first: int, seconds: float,
        linger: float = 0, meanwhile: Callable[[], None] | None = None,
    ) -> dict[int, Reply]:
        """Answers by node id; those that failed have status 0, those not waited for are missing.
        `first` questions are asked at once; once they are on their way, `meanwhile` is called. One
        more is asked for each that fails or takes HEDGE_SECONDS. It ends when `enough` says so (and
        up to `linger` seconds later, until `first` are good), or all answered or timed out."""
        if self.moved:
            questions = [each._replace(to=self.moved.get(each.to, each.to)) for each in questions]
        exchange = Exchange(self, questions, seconds)
        self.under_way.add(exchange)
        try:
            return exchange.run(enough, first, linger, meanwhile)
        finally:
            self.under_way.remove(exchange)

    def take(self, address: str) -> Link:
        """A connection to `address`, kept alive or new. OSError when there can be none."""
        with self._lock:
            owed = self._owed.pop(address, ())
        for call in owed:
            if not self._finished(call):
                self.later(call)
        with self._lock:
            idle = self._idle.get(address, [])
            while idle:
                link = idle.pop()  # the last one used; if that is too old, all are
                if time.monotonic() - link.begun < IDLE_SECONDS:
                    return link
                link.close()
        return Link(address)

    def give(self, address: str, link: Link) -> None:
        """Keep a connection whose answer was read."""
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < IDLE_LINKS and not self.closed:
                idle.append(link)
                return
        link.close()

    def later(self, call: Call) -> None:
        """Keep the connection of a call whose answer nobody waits for: who next wants one to the
        same address looks whether the answer has come, and the connection can be used again."""
        with self._lock:
            owed = self._owed.setdefault(call.to.address, [])
            owed.append(call)
            if len(owed) > IDLE_LINKS:  # else one that hangs would take as many as are begun
                owed.pop(0).link.close()

    def _finished(self, call: Call) -> bool:
        """Move one late call on, without waiting; True when it is over."""
        poller = select.poll()
        poller.register(call.link.socket, call.link.events())
        try:
            if poller.poll(0):
                reply = call.link.pump()
                if reply is None:
                    call.deadline = time.monotonic() + CONNECT_SECONDS  # nobody looked before
                    return False
                self.give(call.to.address, call.link)
                if call.good(reply):
                    self.heard(call.to)
                return True
        except OSError:
            call.link.close()  # the peer went away; whoever needs it next will notice
            return True
        if time.monotonic() < call.deadline:
            return False
        call.link.close()
        self.fail(call.to)
        return True

    def keep(self, addresses: Collection[str]) -> None:
        """Close the kept-alive connections to all other addresses."""
        with self._lock:
            idle = [self._idle.pop(other) for other in self._idle.keys() - addresses]
            owed = [self._owed.pop(other) for other in self._owed.keys() - addresses]
        for link in itertools.chain(*idle, (call.link for calls in owed for call in calls)):
            link.close()

    def close(self) -> None:
        """Close all kept-alive connections."""
        self.closed = True
        self.keep(())


class Exchange:
    """One `Peers.ask`: questions on their way and the answers so far."""

    def __init__(self, peers: Peers, questions: Sequence[Question], seconds: float) -> None:
        self.peers, self.queue, self.seconds = peers, collections.deque(questions), seconds
        self.deadline = time.monotonic() + seconds
        # A block may take longer than a message before one more peer is asked.
        self.patience = HEDGE_SECONDS * seconds / CONNECT_SECONDS
        self.hedge = 0.0  # monotonic; when one more is asked
        self.looked = 0.0  # monotonic; when it was last seen, in time, what has come
        self.calls: dict[int, Call] = {}  # by file descriptor
        self.answers: dict[int, Reply] = {}
        self.poller = select.poll()

    def run(
        self, enough: Enough, first: int, linger: float, meanwhile: Callable[[], None] | None
    ) -> dict[int, Reply]:
        """See `Peers.ask`."""
        first = min(first, len(self.queue))
        for _ in range(first):
            self._start()
        if meanwhile:
            meanwhile()
            now = time.monotonic()  # it took no time of the peers'
            self.deadline, self.hedge = now + self.seconds, now + self.patience
        while (self.calls or self.queue) and not enough(self.answers):
            self._step(self.deadline)
        stop = min(self.deadline, time.monotonic() + linger)
        while linger and self.calls and self._good() < first and time.monotonic() < stop:
            self._step(stop)
        if linger and self._good() < first:
            self.peers.mark_slow(call.to.node for call in self.calls.values())
        self._leave()
        return self.answers

    def _good(self) -> int:
        return sum(reply.status == 200 for reply in self.answers.values())

    def _leave(self) -> None:
        """The others may be answered late, but for blocks: one not even sent, and one on its way
        here, is dropped."""
        for call in self.calls.values():
            unsent = call.question.of_block and call.link.outgoing
            if unsent or call.question.path.startswith("fetch/"):
                call.link.close()
            else:
                self.peers.later(call)
            if unsent and call.link.begun + self.patience < time.monotonic():
                self.peers.fail(call.to)

    def _step(self, stop: float) -> None:
        now = time.monotonic()
        late = now >= self.deadline
        if late:
            self.queue.clear()
        elif not self.calls or (self.queue and now >= self.hedge):
            self._start()
        until = min(stop, self.hedge) if self.queue else stop
        for fd, _ in self._wait(max(0.001, until - now)) if self.calls else ():
            if fd in self.calls:
                self._pump(self.calls[fd])
        if not late:
            self.looked = time.monotonic()
            return
        for call in list(self.calls.values()):
            # Where this thread was held up, by a slow name service or another, it had no time.
            self._fail(call, blamed=call.link.begun + self.patience < self.looked)

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        """Which connections have something for us by then; eagerly, if no other request of this
        node is under way."""
        eager = EAGER_SECONDS if len(self.peers.under_way) == 1 else 0.0
        return zs3.eagerly(lambda left: self.poller.poll(left * 1000), seconds, eager)

    def _start(self) -> None:
        """Ask the next in the queue to whom there is a connection."""
        while self.queue:
            question = self.queue.popleft()
            self.hedge = time.monotonic() + self.patience
            if self._open(question, self.peers.take):
                return

    def _open(self, question: Question, take: Callable[[str], Link]) -> bool:
        try:
            link = take(question.to.address)
        except (OSError, UnicodeError):  # no name of a host can be like that
            self._lost(question.to)
            return False
        call = Call(question, link, self.peers.seal, self.deadline)
        self.calls[link.socket.fileno()] = call
        self._pump(call)
        return True

    def _lost(self, to: Contact, blamed: bool = True) -> None:
        self.answers[to.node] = Reply(0)
        if blamed:
            self.peers.fail(to)

    def _pump(self, call: Call) -> None:
        try:
            reply = call.link.pump()
        except OSError:
            return self._broken(call)
        if reply is None:
            self.poller.register(call.link.socket, call.link.events())  # for the next step
            return
        self._drop(call)
        self.peers.give(call.to.address, call.link)
        if not call.good(reply):
            reply = Reply(0)
        self.answers[call.to.node] = reply
        if reply.status:
            self.peers.heard(call.to)
        if reply.status != 200:
            self._start()

    def _broken(self, call: Call) -> None:
        """Ask again over a new connection if a kept-alive one broke: messages are idempotent. But
        an accept may be done, and more promised since: the next one's refusal proves nothing."""
        if call.link.fresh or call.question.path == "accept":
            return self._fail(call)
        self._drop(call)
        call.link.close()
        if not self._open(call.question, Link):
            self._start()

    def _fail(self, call: Call, blamed: bool = True) -> None:
        self._drop(call)
        call.link.close()
        self._lost(call.to, blamed)
        if time.monotonic() < self.deadline:
            self._start()

    def _drop(self, call: Call) -> None:
        del self.calls[call.link.socket.fileno()]
        with contextlib.suppress(KeyError):  # it broke before it was waited for
            self.poller.unregister(call.link.socket)


# ===== 5 Lookups and providers =====

Lookup = Generator[list[Contact], Mapping[int, list[Contact]], list[Contact]]


def lookup(target: int, start: Iterable[Contact], own: int) -> Lookup:
    """Find the k live nodes nearest to `target`, nearest first. (Kademlia, 2.3) A generator: yields
    the contacts to ask in a round, is sent {node: contacts it knows} of those that answered,
    returns the result. LOOKUP_WIDTH are asked in a round; once a round brought nobody nearer, all
    of the nearest that were not asked yet."""
    known = {contact.node: contact for contact in start if contact.node != own}
    asked: set[int] = set()
    width = LOOKUP_WIDTH
    while True:
        best = nearest(known.values(), target, CONTACTS_PER_BUCKET)
        todo = [contact for contact in best if contact.node not in asked][:width]
        if not todo:
            return best
        asked |= {contact.node for contact in todo}
        answers = yield todo
        for contact in todo:
            if contact.node not in answers:
                del known[contact.node]
        for contact in itertools.chain.from_iterable(answers.values()):
            if contact.node != own and contact.node not in asked:
                known.setdefault(contact.node, contact)
        after = nearest(known.values(), target, 1)
        width = LOOKUP_WIDTH if after[:1] != best[:1] else CONTACTS_PER_BUCKET


class Providers:
    """Who said that it holds which block, and when. The clock is an argument."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _records
        # By block, the one announced longest ago first, and node.
        self._records: dict[str, dict[int, tuple[Contact, float]]] = {}

    def add(self, block: str, holder: Contact, now: float) -> None:
        """`holder` announced `block`."""
        with self._lock:
            known = self._records.pop(block, {}).items()
            lately = {node: one for node, one in known if now - one[1] < PROVIDER_SECONDS}
            self._records[block] = {**lately, holder.node: (holder, now)}
            if len(self._records) > MAX_PROVIDED:
                del self._records[next(iter(self._records))]

    def get(self, block: str, now: float) -> list[Contact]:
        """Holders of `block` announced within PROVIDER_SECONDS."""
        with self._lock:
            records = self._records.get(block, {}).values()
        return [holder for holder, since in records if now - since < PROVIDER_SECONDS]


# ===== 6 Blocks =====


def block_hash(data: bytes | bytearray | memoryview) -> str:
    """The name of a block: BLAKE3, 256 bits, hex."""
    return blake3(data).hexdigest()


class Blocks:
    """Blocks on this node's disk, each in a file named by its hash, made visible by one rename. The
    file's mtime is when it was last touched: garbage collection leaves alone what was lately."""

    def __init__(self, root: Path, fsync: bool = False) -> None:
        self.root, self.fsync = root, fsync
        self.bad = root / "bad"
        self.bad.mkdir(parents=True, exist_ok=True)
        self._locks = [threading.Lock() for _ in range(64)]  # each guards 1/64 of the blocks' files
        self._count_lock = threading.Lock()  # guards count and total_bytes
        self.count = self.total_bytes = 0
        for orphan in root.glob("*.tmp"):  # a write that was cut off
            orphan.unlink(missing_ok=True)

    def path(self, block: str) -> Path:
        """data/.cas/ab/ab12...ef.blob"""
        return self.root / block[:2] / f"{block}.blob"

    def _lock(self, block: str) -> threading.Lock:
        return self._locks[int(block[:2], 16) % 64]

    def _counted(self, blocks: int, size: int) -> None:
        with self._count_lock:
            self.count += blocks
            self.total_bytes += size

    def put(self, block: str, data: bytes | bytearray) -> None:
        """Store `data`, whose hash the caller has computed; what is there is touched. OSError."""
        path = self.path(block)
        if self.touch(block):
            with contextlib.suppress(OSError):  # set aside just now, or rotten: written anew
                if path.read_bytes() == data:
                    if self.fsync:  # who wrote it may not have come so far yet
                        sync(path, path.parent, self.root)
                    return
        temporary = self.root / f"{block}.{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "wb", buffering=0) as file:
                zs3.write_all(file.fileno(), memoryview(data))
            if self.fsync:
                sync(temporary)
            path.parent.mkdir(exist_ok=True)
            with self._lock(block):
                new = not path.exists()
                temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if self.fsync:
            sync(path.parent, self.root)
        if new:
            self._counted(1, len(data))

    def get(self, block: str) -> bytes | None:
        """The block's bytes, verified; None when it is not here. A bad one is set aside first."""
        try:
            data = self.path(block).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as problem:  # a sector that cannot be read is as good as absent
            LOG.warning("block %s cannot be read: %s", block, problem)
            if problem.errno == errno.EIO:
                self._set_aside(block)
            return None
        if block_hash(data) == block:
            return data
        self._set_aside(block, data)
        return None

    def _set_aside(self, block: str, bad: bytes | None = None) -> None:
        """Out of the way, unless it is not `bad` any more; None: it cannot be read."""
        path = self.path(block)
        with self._lock(block), contextlib.suppress(OSError):  # another reader did, or nobody can
            if bad is None or path.read_bytes() == bad:  # else it was healed meanwhile
                LOG.warning("block %s does not match its name: set aside", block)
                size = path.stat().st_size
                path.replace(self.bad / block)
                self._counted(-1, -size)

    def touch(self, block: str) -> bool:
        """Mark the block as wanted now. False when it is not here."""
        with self._lock(block), contextlib.suppress(FileNotFoundError):  # it is not here
            os.utime(self.path(block))
            return True
        return False

    def has(self, block: str) -> bool:
        """Is there a file of that name?"""
        return self.path(block).exists()

    def touched(self, block: str) -> float | None:
        """When it was last touched, wall clock of this disk; None when it is not here."""
        with contextlib.suppress(FileNotFoundError):  # it is not here
            return self.path(block).stat().st_mtime
        return None

    def remove(self, block: str, touched: float | None) -> int:
        """Remove the block unless something touched it since `touched`. Returns the bytes freed.
        The last look and the unlink are under the hash's lock, as is the touch in `put`: a PUT that
        met the block either touched it before, and it stays, or finds it gone, and writes it."""
        path = self.path(block)
        with self._lock(block), contextlib.suppress(FileNotFoundError):  # it is not here
            status = path.stat()
            if status.st_mtime == touched:
                path.unlink()
                self._counted(-1, -status.st_size)
                return status.st_size
        return 0

    def walk(self) -> Iterator[tuple[str, int]]:
        """(hash, bytes) of every block, sorted."""
        for folder in sorted(path for path in self.root.iterdir() if len(path.name) == 2):
            for name in sorted(filter(BLOB.fullmatch, os.listdir(folder))):
                with contextlib.suppress(FileNotFoundError):  # removed while we walk
                    yield name[:64], (folder / name).stat().st_size

    def recount(self) -> None:
        """Set the counts from what is on the disk."""
        count = size = 0
        for _, one in self.walk():
            count, size = count + 1, size + one
        with self._count_lock:
            self.count, self.total_bytes = count, size


class Pins:
    """Blocks in use here, so that nobody collects them: by a PUT whose record is not written yet, a
    copy, a GET that is still sending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _counts
        self._counts: collections.Counter[str] = collections.Counter()
        self._late: collections.deque[tuple[float, Collection[str]]] = collections.deque()

    def __contains__(self, block: str) -> bool:
        return block in self._counts

    def add(self, blocks: Iterable[str]) -> None:
        """Use these blocks; each call wants one `drop`."""
        with self._lock:
            self._counts.update(blocks)

    def list(self) -> list[str]:
        """All that are in use. Asked now and then, which is when `drop_later` ends."""
        while self._late and self._late[0][0] < time.monotonic():
            self.drop(self._late.popleft()[1])
        with self._lock:
            return [*self._counts]

    def drop_later(self, blocks: Collection[str]) -> None:
        """Drop them when no message that was sent by now can arrive any more."""
        self._late.append((time.monotonic() + LATE_SECONDS, blocks))

    def drop(self, blocks: Iterable[str]) -> None:
        """They are not used any more by one that added them."""
        with self._lock:
            for block in blocks:
                self._counts[block] -= 1
                if self._counts[block] <= 0:
                    del self._counts[block]


# ===== 7 Records and quorums =====

# Why an acknowledged change cannot be lost, nor a deleted key come back.
#
# Within one view this is CASPaxos (Rystsov, 2018): a register per key, its acceptors the owners of
# the bucket. A ballot is used by one proposer for one value (`Ballots`). An acceptor keeps on disk
# what it promised and accepted before it answers; two majorities meet; so once a value is chosen,
# every later prepare finds it or something that followed it.
#
# Between views. View e+1 is itself chosen by a register, whose acceptors are all members of view e,
# so there is one history of views. A node in view e refuses messages of another epoch, under the
# lock that also guards the change of its view (`Node.answer`). A change of members first makes
# a *joint* view with `previous` set: each quorum then needs its number among the owners under
# `members` and among the owners under `previous`. Take a value chosen in view e and a later view f:
#   f is joint and e is its last stable view or a joint view after it: the quorum among the previous
#       owners meets the one that chose the value.
#   f is stable, the end of a joint view: it was proposed only when, but for fewer than a read
# quorum, all members had pulled every register from all, but for fewer than a read quorum, of the
# previous owners, each of which had entered the joint view before it answered (section 9). So for
# any bucket each read quorum of f has a member that pulled from somebody who had the value; or who
#       had not, and was fenced, so that the value can never have been chosen.
# A straggler of view e that still gets something accepted somewhere does so with a ballot of epoch
# e, which every ballot of a later view outranks. What is pulled is accepted under the same rule as
# an accept message (not below the promise), of which it is a duplicate; or it is known to be
# chosen. A new owner never made the promises that the previous owners did, so what it pulled is no
# vote: until it has seen it at a change quorum of them, or a round of the joint view has decided
# (`doubts`), it does not say that it has all. In f it votes, so it must have said so: the few
# that may be late are only such as own in f nothing that they did not own before (`settle`).
#
# A node with a new disk has a new id: it is a new member and does not vote with another's amnesia.
# So has one whose registers hold no view: they promised nothing, or were lost (`node_id`).
# Of a disk and its copy one votes: the other, once it has met it, answers nobody (`_is_elsewhere`),
# and begins nothing where not it but the first answers at its own address (`_reach`).
# One that was forgotten by the others finds itself outside the view, drops its registers and joins
# anew. A tombstone is dropped once all who are asked about its bucket have it or nothing (`bury`).
# Who is not asked in a view, a joint one too, drops the bucket's registers as it enters that view:
# no quorum above counts it, and it may be asked again in a later one.

VIEWS = ".views"  # the bucket of the registers that decide views; its key is the epoch

Group = tuple[Contact, ...]
Groups = tuple[Group, ...]


def change_quorum(owners: int) -> int:
    """How many of so many owners must accept: a majority."""
    return owners // 2 + 1


def read_quorum(owners: int) -> int:
    """How many answers meet every change quorum: a majority of three, either of two."""
    return owners - change_quorum(owners) + 1


def ids(contacts: Iterable[Contact]) -> set[int]:
    """Their node ids."""
    return {contact.node for contact in contacts}


def everyone(groups: Groups) -> list[Contact]:
    """All that are in some group, each once: at its newest address, that of the first group."""
    return list({c.node: c for group in reversed(groups) for c in group}.values())


def only(groups: Groups, keeps: Callable[[Contact], bool]) -> Groups:
    """The groups of those contacts that it `keeps`; empty ones are left out."""
    return tuple(filter(None, (tuple(filter(keeps, group)) for group in groups)))


def covers(groups: Groups, nodes: Collection[int], quorum: Callable[[int], int]) -> bool:
    """Do `nodes` have a quorum in each of the groups?"""
    return all(sum(c.node in nodes for c in group) >= quorum(len(group)) for group in groups)


@dataclass(frozen=True)
class View:
    """The members of the cluster, and while owners change, also who they were before."""

    cluster: str  # 16 hex digits, drawn by the founder: two clusters never mix
    epoch: int
    replicas: int  # owners of a bucket and holders of a block
    members: Group
    previous: Group = ()
    _groups: dict[str, Groups] = field(default_factory=dict, compare=False, repr=False, init=False)

    def groups(self, bucket: str) -> Groups:
        """Who must be asked about the keys of `bucket`: its owners, and in a joint view also its
        previous owners. For VIEWS, all members."""
        groups = self._groups.get(bucket)
        if groups is None:
            if len(self._groups) >= MAX_KNOWN_BUCKETS:  # of names that clients make up
                self._groups.clear()
            target = target_of(bucket.encode())
            count = MAX_MEMBERS if bucket == VIEWS else self.replicas
            both = filter(None, (self.members, self.previous))
            groups = tuple(tuple(nearest(nodes, target, count)) for nodes in both)
            self._groups[bucket] = groups
        return groups

    def owns(self, node: int, bucket: str) -> bool:
        """Is `node` one of the owners of `bucket` (not: was it)?"""
        return node in ids(self.groups(bucket)[0])

    def asks(self, node: int, bucket: str) -> bool:
        """Is `node` an owner of `bucket`, or while owners change, was it?"""
        return any(node in ids(group) for group in self.groups(bucket))

    def member(self, node: int) -> Contact | None:
        """The member of that id."""
        return next((contact for contact in self.members if contact.node == node), None)

    def everybody(self) -> list[Contact]:
        """Members, and previous ones that are no longer."""
        return everyone((self.members, self.previous))

    def with_members(self, members: Iterable[Contact]) -> View:
        """The view that should follow: joint, unless only addresses changed."""
        after = tuple(sorted(members))
        same = ids(after) == ids(self.members)
        previous = self.previous if same or self.previous else self.members
        return replace(self, epoch=self.epoch + 1, members=after, previous=previous)

    def as_json(self) -> Value:
        """As on the wire and on disk."""
        return {
            "cluster": self.cluster, "epoch": self.epoch, "replicas": self.replicas,
            "members": [contact.as_json() for contact in self.members],
            "previous": [contact.as_json() for contact in self.previous],
        }

    @classmethod
    def from_json(cls, raw: Any) -> View:
        """ValueError unless it is `as_json` of some view."""
        return cls(**view_field(raw))


NO_VIEW = View("", 0, 1, ())  # of a node that has not found its cluster yet


class Ballots:
    """Makes ballots that nobody else makes, of a Lamport counter and a name drawn at start."""

    def __init__(self, node: int) -> None:
        self._lock = threading.Lock()  # guards _counter
        self._counter = 0
        self.proposer = node_hex(node)[:8] + secrets.token_hex(4)

    def next(self, epoch: int) -> str:
        """Above all that was seen in this epoch."""
        with self._lock:
            self._counter += 1
            return f"{epoch:08x}{self._counter:012x}{self.proposer}"

    def observe(self, ballot: str) -> None:
        """Somebody uses `ballot`."""
        counter = int(ballot[8:20], 16)
        if counter > self._counter:
            with self._lock:
                self._counter = max(self._counter, counter)


def live(value: Value | None) -> Value | None:
    """The value, or None when it is a tombstone."""
    return None if value is None or value.keys() <= {"id", "base"} else value


def head_and_tail(value: Value) -> tuple[str, str | None]:
    """JSON of what listings show of a value, and of the rest; a tombstone has none."""
    head = json.dumps({name: one for name, one in value.items() if name not in TAIL})
    rest = {name: value[name] for name in TAIL if name in value}
    return head, json.dumps(rest) if live(value) else None


def whole_value(head: str, tail: str | None) -> Value:
    """The inverse of `head_and_tail`."""
    return {**json.loads(head), **(json.loads(tail) if tail else {})}


def tombstone() -> Value:
    """The value of a key that was deleted."""
    return {"id": secrets.token_hex(8)}


def blocks_of(value: Value | None) -> list[str]:
    """The hashes of an object's blocks, in order."""
    segments = value.get("blocks", ()) if value else ()
    return [joined[i : i + 64] for _, joined in segments for i in range(0, len(joined), 64)]


Grave = tuple[str, str, str]  # bucket, key and ballot of a tombstone


class Slot(NamedTuple):
    """What one owner knows of one register."""

    promised: str = ""
    accepted: str = ""
    chosen: bool = False  # known to have been accepted by a change quorum
    value: Value | None = None


SCHEMA = """
CREATE TABLE IF NOT EXISTS registers (
    bucket TEXT NOT NULL, key BLOB NOT NULL,   -- key is UTF-8: its order is S3's
    promised TEXT NOT NULL, accepted TEXT NOT NULL, chosen INTEGER NOT NULL,
    live INTEGER NOT NULL,                     -- 0: a tombstone, or nothing accepted
    head TEXT, tail TEXT,                      -- JSON of the value: what listings show, the rest
    seq INTEGER, since REAL,                   -- place in the change log; when, wall clock
    PRIMARY KEY (bucket, key));
CREATE INDEX IF NOT EXISTS changes ON registers (seq) WHERE seq IS NOT NULL;
CREATE INDEX IF NOT EXISTS graves ON registers (since) WHERE live = 0 AND accepted != '';
CREATE INDEX IF NOT EXISTS buckets ON registers (bucket) WHERE key = x'';
CREATE TABLE IF NOT EXISTS refs (              -- which keys' accepted values name a block
    hash BLOB NOT NULL, bucket TEXT NOT NULL, key BLOB NOT NULL,
    PRIMARY KEY (hash, bucket, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS promises ON registers (since) WHERE accepted = '';
CREATE TABLE IF NOT EXISTS floors (            -- a key without a row promised this
    bucket TEXT PRIMARY KEY, ballot TEXT NOT NULL, seq INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS raised ON floors (seq);
CREATE TABLE IF NOT EXISTS doubts (            -- pulled, and which nodes are known to have it
    bucket TEXT NOT NULL, key BLOB NOT NULL, accepted TEXT NOT NULL, node TEXT NOT NULL,
    PRIMARY KEY (bucket, key, accepted, node)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS views (             -- every view of the cluster, up to the one we are in
    epoch INTEGER PRIMARY KEY, view TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
WRITE = """
INSERT INTO registers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (bucket, key) DO UPDATE SET
    promised = excluded.promised, accepted = excluded.accepted, chosen = excluded.chosen,
    live = excluded.live, head = excluded.head, tail = excluded.tail,
    seq = excluded.seq, since = excluded.since
"""
SLOT = """
SELECT promised, accepted, chosen, head, tail FROM registers WHERE bucket = ? AND key = ?
"""
# A floor takes the place in the change log of the rows that it stands for, so that no place is ever
# given twice: the peers remember up to which they have seen it.
LAST_SEQ = "SELECT MAX(seq) FROM (SELECT seq FROM registers UNION ALL SELECT seq FROM floors)"
CHANGES = """
SELECT seq, bucket, key, accepted, chosen FROM registers WHERE seq > ?
UNION ALL SELECT seq, bucket, NULL, ballot, 0 FROM floors WHERE seq > ? ORDER BY seq LIMIT ?
"""
PAGE = """
SELECT key, accepted, live, head, tail, chosen FROM registers
WHERE bucket = ? AND key >= ? AND key < ? AND key != x'' AND accepted != '' ORDER BY key
"""
TAIL = ("parts", "blocks", "inline")  # fields of a value that a listing does not need
BEYOND = "~"  # above every ballot


class StaleView(Exception):
    """The view changed under something that was only meant for the old one."""


def of_disk(method: Callable[..., T]) -> Callable[..., T]:
    """`method`, whose errors of the disk, full or rotten, are OSError, as for any other file."""

    @functools.wraps(method)
    def run(*given: Any, **named: Any) -> T:
        try:
            return method(*given, **named)
        except sqlite3.ProgrammingError:
            raise  # the file was closed
        except sqlite3.DatabaseError as error:
            raise OSError(errno.ENOSPC, f"registers: {error}") from error

    return run


class Database(sqlite3.Connection):
    """SQLite whose errors of the disk are OSError."""

    execute = of_disk(sqlite3.Connection.execute)
    executemany = of_disk(sqlite3.Connection.executemany)


class Registers:
    """The registers on this node's disk, and its view. What a method changes is on the disk when it
    returns. Those named like messages are for `Node.answer`, which lets no other view in meanwhile.
    """

    def __init__(self, own: int, path: str, fsync: bool = False) -> None:
        self.own = own
        self.lock = threading.RLock()  # guards the database and the fields below
        self._bases: dict[str, list[Any]] = {}  # `basis` of buckets, remembered
        self._db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, factory=Database
        )
        self._db.execute("PRAGMA journal_mode=WAL")
        # OFF survives the death of the process; FULL that of the machine.
        self._db.execute(f"PRAGMA synchronous={'FULL' if fsync else 'OFF'}")
        self._db.executescript(SCHEMA)
        self._seq = self._one(LAST_SEQ) or 0
        self._count()
        last = self._one("SELECT view FROM views ORDER BY epoch DESC LIMIT 1")
        self.view = View.from_json(json.loads(last)) if last else NO_VIEW
        self.synced = int(self.meta("synced") or 0)  # the epoch for which all was pulled

    def _count(self) -> None:
        self.objects = self._one(
            "SELECT COUNT(*) FROM registers WHERE live = 1 AND key != x'' AND bucket NOT LIKE '.%'"
        )

    @of_disk
    def _all(self, query: str, *values: object) -> list[Any]:
        with self.lock:
            return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> Any:
        """The first value of the first row, or None."""
        rows = self._all(query, *values)
        return rows[0][0] if rows else None

    def meta(self, name: str) -> str:
        """A setting kept beside the registers; "" when there is none."""
        return self._one("SELECT value FROM meta WHERE name = ?", name) or ""

    def set_meta(self, name: str, value: str) -> None:
        """Keep a setting."""
        with self.lock:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def adopt(self, views: Iterable[View]) -> bool:
        """Enter those of `views`, oldest first, that follow ours one by one. True if there was one.
        None is left out: with each, the registers that this node is not asked about any more are
        dropped. It might own them again later, when their tombstones are long forgotten. ValueError
        when they are another cluster's."""
        entered = False
        with self.lock:
            for view in views:
                need(self.view is NO_VIEW or view.cluster == self.view.cluster, "cluster")
                if self.view is not NO_VIEW and view.epoch == self.view.epoch + 1:
                    self._enter([view])
                    entered = True
        return entered

    def install(self, views: Sequence[View]) -> None:
        """Begin anew with the history of a cluster that this node is not a member of: it takes the
        others' word, and keeps no register."""
        with self.lock:
            self._enter(views, anew=True)
            self.synced = 0

    def _enter(self, views: Sequence[View], anew: bool = False) -> None:
        with self._transaction():
            for table in ("meta", "views") if anew else ():
                self._db.execute(f"DELETE FROM {table}")
            rows = [(view.epoch, json.dumps(view.as_json())) for view in views]
            self._db.executemany("INSERT OR REPLACE INTO views VALUES (?, ?)", rows)
            known = self._all("SELECT bucket FROM registers UNION SELECT bucket FROM floors")
            gone = [row for row in known if anew or not views[-1].asks(self.own, *row)]
            for table in ("registers", "floors", "doubts"):
                self._db.executemany(f"DELETE FROM {table} WHERE bucket = ?", gone)
            if gone:  # in one walk: they are sorted by hash
                kept = "SELECT bucket FROM registers"
                self._db.execute(f"DELETE FROM refs WHERE bucket NOT IN ({kept})")
        self._bases.clear()
        self.view = views[-1]
        self._count()

    def views_after(self, epoch: int) -> list[Value]:
        """The first of the views after `epoch`, oldest first: no more than a message holds."""
        query = "SELECT view FROM views WHERE epoch > ? ORDER BY epoch LIMIT ?"
        rows = [view for (view,) in self._all(query, epoch, BATCH)]
        sizes = list(itertools.accumulate(map(len, rows)))
        count = max(1, bisect.bisect(sizes, PAGE_BYTES))
        return list(map(json.loads, rows[:count]))

    def member_since(self, epoch: int) -> bool:
        """Was this node a member in every view from that of `epoch` to the present one?"""
        if self.view.epoch == epoch:
            return self.view.member(self.own) is not None
        views = self._all("SELECT view FROM views WHERE epoch >= ?", epoch)
        return all(node_hex(self.own) in dict(json.loads(view)["members"]) for (view,) in views)

    def set_synced(self, epoch: int) -> None:
        """All that previous owners knew before `epoch` has been pulled, and nothing is in doubt."""
        with self.lock, self._transaction():
            self.set_meta("synced", str(epoch))
            self._db.execute("DELETE FROM doubts")
        self.synced = epoch

    def fence(self, epoch: int) -> Message | None:
        """The refusal of a message of another epoch than ours; None when it is the same."""
        if self.view is NO_VIEW or epoch > self.view.epoch:
            return {"behind": self.view.epoch}
        return {"views": self.views_after(epoch)} if epoch < self.view.epoch else None

    def slot(self, bucket: str, key: str, brief: bool = False) -> Slot:
        """What is known here of one register; if `brief`, without the value, but a tombstone."""
        with self.lock:
            rows = self._all(SLOT, bucket, key.encode())
            if not rows:
                return Slot(promised=self.floor(bucket))
        promised, accepted, chosen, head, tail = rows[0]
        if not accepted:  # as `buried` counts on: for such a key the floor is what is known
            promised = max(promised, self.floor(bucket))
        value = whole_value(head, tail) if head and not (brief and tail) else None
        return Slot(promised, accepted, bool(chosen), value)

    def floor(self, bucket: str) -> str:
        """What keys of `bucket` that have no row promised: tombstones up to there were dropped."""
        return self._one("SELECT ballot FROM floors WHERE bucket = ?", bucket) or ""

    def raise_floor(self, bucket: str, ballot: str) -> None:
        """Promise at least `ballot` for all keys of `bucket` that have no row."""
        with self.lock:
            if ballot > self.floor(bucket):
                self._set_floor(bucket, ballot)

    def _set_floor(self, bucket: str, ballot: str) -> None:
        self._seq += 1
        row = (bucket, max(ballot, self.floor(bucket)), self._seq)
        self._db.execute("INSERT OR REPLACE INTO floors VALUES (?, ?, ?)", row)

    def _drop_row(self, bucket: str, key: str, promised: str) -> None:
        """In a transaction. The floor keeps what the row promised."""
        self._set_floor(bucket, promised)
        row = (bucket, key.encode())
        self._db.execute("DELETE FROM registers WHERE bucket = ? AND key = ?", row)

    def drop_promises(self, before: float) -> bool:
        """Drop rows that only promise, since before `before` (wall clock): of what was never there.
        BATCH at most; True if there may be more."""
        query = (
            "SELECT bucket, key, promised FROM registers"
            " WHERE accepted = '' AND since < ? AND bucket != ? LIMIT ?"
        )
        with self.lock, self._transaction():
            rows = self._all(query, before, VIEWS, BATCH)
            for bucket, key, promised in rows:
                self._drop_row(bucket, key.decode(), promised)
        return len(rows) == BATCH

    def basis(self, bucket: str, key: str) -> list[Any] | None:
        """[accepted, chosen, value] of the bucket's own register, if there is one to look at."""
        if not key or bucket in (UPLOADS, VIEWS):
            return None
        with self.lock:
            if bucket not in self._bases:
                if len(self._bases) >= MAX_KNOWN_BUCKETS:  # of names that clients make up
                    self._bases.clear()
                _promised, *self._bases[bucket] = self.slot(bucket, "")
            return self._bases[bucket]

    def read(self, bucket: str, key: str, brief: bool) -> Message:
        """What is accepted here; about the bucket, too, if there is no object."""
        with self.lock:
            slot = self.slot(bucket, key, brief)
            left_out = brief and slot.accepted and slot.value is None
            there = left_out or live(slot.value)
            return told(slot, None if there else self.basis(bucket, key))

    def prepare(self, bucket: str, key: str, ballot: str) -> Message:
        """Promise to accept nothing below `ballot`, and tell what is accepted; or refuse."""
        with self.lock:
            slot = self.slot(bucket, key)
            if ballot <= slot.promised:
                return {"refused": slot.promised}
            self._db.execute(
                "INSERT INTO registers VALUES (?, ?, ?, '', 0, 0, NULL, NULL, NULL, ?)"
                " ON CONFLICT (bucket, key) DO UPDATE SET promised = excluded.promised",
                (bucket, key.encode(), ballot, time.time()),
            )
            floor = "" if slot.accepted else self.floor(bucket)  # it says nothing of what is there
            return {**told(slot, self.basis(bucket, key)), "floor": floor}

    def accept(
        self, bucket: str, key: str, ballot: str, value: Value, chosen: bool,
        basis: tuple[str, bool, Value] | None,
    ) -> Message:
        """Accept `value`, unless more was promised, or its bucket is not open for objects."""
        with self.lock:
            slot = self.slot(bucket, key)
            if ballot < slot.promised:
                return {"refused": slot.promised}
            if basis:
                self._take_over(bucket, "", *basis)
            if live(value) and (known := self.basis(bucket, key)) and not is_open(known[2]):
                return {"closed": True}
            chosen = chosen or (slot.chosen and slot.accepted == ballot)  # the message came twice
            self._write(bucket, key, slot, ballot, chosen, value)
            return {"done": True}

    def learn(self, bucket: str, key: str, ballot: str) -> Message:
        """What was accepted at `ballot` has been chosen."""
        self.mark_chosen([(bucket, key, ballot)])
        return {"done": True}

    def offer(
        self, epoch: int, bucket: str, key: str, accepted: str, chosen: bool, value: Value | None
    ) -> bool:
        """Another owner accepted this: do so too, as if its accept message had come here late.
        False when only a round of the register can tell: something higher was promised and this is
        not known to be chosen, or a tombstone may have followed it that was dropped, or its bucket
        is gone, or marked for deletion and this is not known to be chosen."""
        with self.lock:
            if self.fence(epoch):
                raise StaleView  # the bucket may not be ours any more
            return self._take_over(bucket, key, accepted, chosen, value)

    def _take_over(
        self, bucket: str, key: str, accepted: str, chosen: bool, value: Value | None
    ) -> bool:
        slot = self.slot(bucket, key)
        if accepted <= slot.accepted or value is None:
            return True
        if not slot.accepted and accepted <= self.floor(bucket):
            return False  # also a tombstone: the floor may be that of other keys, and it be missing
        basis = self.basis(bucket, key)
        if live(value) and basis and basis[0]:
            # A mark need not keep out what is chosen: its quorum had no mark, so the deletion,
            # which asks a quorum that has it, meets one that shows this, or what came after.
            takes = live if chosen else is_open
            if not takes(basis[2]):
                return False
        if accepted < slot.promised and not chosen:
            return False
        self._write(bucket, key, slot, accepted, chosen, value)
        return True

    def _write(
        self, bucket: str, key: str, old: Slot, accepted: str, chosen: bool, value: Value
    ) -> None:
        raw, is_live = key.encode(), live(value) is not None
        promised = max(accepted, old.promised)
        head, tail = head_and_tail(value)
        self._seq += 1
        row = (bucket, raw, promised, accepted, chosen, is_live, head, tail, self._seq, time.time())
        refs = {bytes.fromhex(block) for block in blocks_of(value)}
        old_refs = {bytes.fromhex(block) for block in blocks_of(old.value)}
        # A single statement needs no transaction.
        with self._transaction() if refs or old_refs else contextlib.nullcontext():
            self._db.execute(WRITE, row)
            self._db.executemany(
                "DELETE FROM refs WHERE hash = ? AND bucket = ? AND key = ?",
                ((block, bucket, raw) for block in old_refs - refs),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO refs VALUES (?, ?, ?)",
                ((block, bucket, raw) for block in refs - old_refs),
            )
        if not key:
            self._bases.pop(bucket, None)
        elif bucket[0] != ".":
            self.objects += is_live - (live(old.value) is not None)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Several statements as one."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # after some errors SQLite has done so itself
                self._db.execute("ROLLBACK")
            raise

    @of_disk
    def page(self, bucket: str, prefix: str, start: str, delimiter: str, whole: bool) -> Message:
        """Entries [key, accepted, head, tail, chosen] in key order, head "" for a tombstone; tail
        if `whole`. With a delimiter, what shares the part up to it with a live key listed is
        skipped. "more" says that there is more after the last entry."""
        entries: list[list[Any]] = []
        size, more = 0, False
        position: bytes | None = max(prefix, start).encode()
        end = (zs3.successor(prefix) or "").encode() or b"\xff"  # which no UTF-8 has
        with self.lock:
            while position is not None and not more:
                rows = self._db.execute(PAGE, (bucket, position, end))
                position = None
                for raw, accepted, is_live, head, tail, chosen in rows:
                    key = raw.decode()
                    if len(entries) >= BATCH or size > PAGE_BYTES:
                        more = True
                        break
                    shown = [head, tail if whole else ""] if is_live else ["", ""]
                    entries.append([key, accepted, *shown, bool(chosen)])
                    size += len(raw) + len(shown[0]) + len(shown[1] or "") + 40
                    common = zs3.common_prefix(key, prefix, delimiter) if is_live else ""
                    if common:
                        position = (zs3.successor(common) or "").encode() or None
                        break
        return {"entries": entries, "more": more}

    def buckets(self) -> list[list[Any]]:
        """[name, accepted, chosen, value] of the buckets' own registers."""
        query = (
            "SELECT bucket, accepted, chosen, head FROM registers"
            " WHERE key = x'' AND accepted != ''"
        )
        rows = self._all(query)
        return [[b, accepted, bool(c), json.loads(head)] for b, accepted, c, head in rows]

    def changes(self, since: int, wanted: Callable[[str], bool]) -> Message:
        """Of the buckets `wanted`, "entries" [bucket, key, accepted, chosen] of what was accepted
        after `since`, and "floors" that were raised, {bucket: ballot}."""
        if since > self._seq:  # places will be given twice: who asks must look at all again
            LOG.error("others saw more here: an old copy of a disk, or power lost without --fsync")
            since = 0
        rows = self._all(CHANGES, since, since, BATCH)
        entries = [
            [bucket, key.decode(), accepted, bool(chosen)]
            for _, bucket, key, accepted, chosen in rows if key is not None and wanted(bucket)
        ]
        floors = {row[1]: row[3] for row in rows if row[2] is None and wanted(row[1])}
        upto = rows[-1][0] if rows else since
        return {"entries": entries, "floors": floors, "upto": upto, "more": len(rows) == BATCH}

    def live_keys(self, bucket: str) -> list[str]:
        """Some keys of live objects in `bucket`, at most BATCH."""
        query = "SELECT key FROM registers WHERE bucket = ? AND key != x'' AND live = 1 LIMIT ?"
        return [key.decode() for (key,) in self._all(query, bucket, BATCH)]

    def mark_chosen(self, places: Collection[tuple[str, str, str]]) -> None:
        """(bucket, key, accepted) which others have accepted too, enough of them."""
        if not places:
            return
        rows = [(bucket, key.encode(), accepted) for bucket, key, accepted in places]
        this_one = "bucket = ? AND key = ? AND accepted = ?"
        with self.lock, self._transaction():
            self._bases.clear()
            self._db.executemany(f"UPDATE registers SET chosen = 1 WHERE {this_one}", rows)
            self._db.executemany(f"DELETE FROM doubts WHERE {this_one}", rows)

    def doubt(self, bucket: str, key: str, accepted: str, node: int) -> set[int]:
        """`node` has what was pulled here. Returns all that are known to have it."""
        place = (bucket, key.encode(), accepted)
        with self.lock:
            row = (*place, node_hex(node))
            self._db.execute("INSERT OR IGNORE INTO doubts VALUES (?, ?, ?, ?)", row)
            query = "SELECT node FROM doubts WHERE bucket = ? AND key = ? AND accepted = ?"
            return {int(known, 16) for (known,) in self._all(query, *place)}

    def doubts(self) -> list[tuple[str, str]]:
        """Registers, at most BATCH, of which what is accepted here was pulled and is in doubt."""
        query = (
            "SELECT DISTINCT bucket, key FROM doubts JOIN registers USING (bucket, key, accepted)"
            " WHERE chosen = 0 LIMIT ?"
        )
        return [(bucket, key.decode()) for bucket, key in self._all(query, BATCH)]

    def trust(self, bucket: str, key: str) -> None:
        """End the doubt about a register."""
        with self.lock:
            row = (bucket, key.encode())
            self._db.execute("DELETE FROM doubts WHERE bucket = ? AND key = ?", row)

    def restamp(self) -> None:
        """What is stamped with a time yet to come is of a clock that was ahead: it is new now."""
        now = time.time()
        with self.lock:
            for which in ("accepted = ''", "live = 0 AND accepted != ''"):
                stamp = f"UPDATE registers SET since = ? WHERE {which} AND since > ?"
                self._db.execute(stamp, (now, now))

    def graves(self, before: float) -> Iterator[list[Grave]]:
        """Tombstones older than `before` (wall clock), the oldest first, BATCH at a time."""
        query = (
            "SELECT bucket, key, accepted, since, rowid FROM registers WHERE live = 0"
            " AND accepted != '' AND (since, rowid) > (?, ?) AND since < ? AND bucket != ?"
            " ORDER BY since, rowid LIMIT ?"
        )
        after = (0.0, 0)
        while rows := self._all(query, *after, before, VIEWS, BATCH):
            after = rows[-1][3:]
            yield [(bucket, key.decode(), accepted) for bucket, key, accepted, *_ in rows]

    def buried(self, bucket: str, key: str, ballot: str) -> bool:
        """Is the tombstone of that ballot here, or something later, or nothing any more?"""
        with self.lock:
            slot = self.slot(bucket, key)
            if not slot.accepted:
                return self.floor(bucket) >= ballot
            # Somebody may hold an answer that was given here before this came, and wait for others.
            row, now = (bucket, key.encode()), time.time()
            since = self._one("SELECT since FROM registers WHERE bucket = ? AND key = ?", *row)
            if since > now:  # the clock was ahead
                stamp = "UPDATE registers SET since = ? WHERE bucket = ? AND key = ?"
                self._db.execute(stamp, (now, *row))
            return slot.accepted >= ballot and since < now - BURIAL_SECONDS

    def bury(self, bucket: str, key: str, ballot: str) -> bool:
        """Drop the tombstone, if it is still that one."""
        with self.lock:
            slot = self.slot(bucket, key)
            if slot.accepted != ballot or live(slot.value) or (not key and self.live_keys(bucket)):
                return False
            with self._transaction():
                self._drop_row(bucket, key, slot.promised)
            self._bases.pop(bucket, None)
            return True

    def used(self, block: str) -> bool:
        """Does any accepted value here name this block?"""
        return bool(self._one("SELECT 1 FROM refs WHERE hash = ? LIMIT 1", bytes.fromhex(block)))

    def close(self) -> None:
        """Close the file."""
        with self.lock:
            self._db.close()


def told(slot: Slot, basis: list[Any] | None) -> Message:
    """An owner's answer to a question about a register."""
    return {"accepted": slot.accepted, "chosen": slot.chosen, "value": slot.value, "basis": basis}


def is_open(value: Value | None) -> bool:
    """Is this, from a bucket's own register, a bucket that takes objects: there and not marked?"""
    value = live(value)
    return value is not None and value["bucket"]["state"] == "open"


# What a round asks for is yielded, the answers are sent in: who drives it owns network and clock.


class Ask(NamedTuple):
    """Ask the owners in `groups`: at first as many as `quorum` says; when `wide`, all but those
    that did not answer lately."""

    name: str
    message: Message
    groups: Groups
    enough: Callable[[Mapping[int, Message]], bool]
    quorum: Callable[[int], int] = change_quorum
    wide: bool = False


class Pause(NamedTuple):
    """Wait so many seconds: somebody else is changing the register."""

    seconds: float


Answers = Mapping[int, Message]  # {"failed": true} from a node that gave none
Steps = Generator["Ask | Pause", Answers, T]


class Top(NamedTuple):
    """What answers say of a register: the highest accepted, and whether that is surely chosen."""

    accepted: str
    value: Value | None
    settled: bool


def weigh(groups: Groups, told: Mapping[int, Sequence[Any]]) -> Top:
    """`told` is {node: (accepted, chosen, value)}, a read quorum of each group at least. It is
    settled when a change quorum of each group has it, or an owner knows that it was chosen, or
    nobody has anything: a change quorum would meet one of these answers."""
    accepted = max(one[0] for one in told.values())
    with_it = {node: one for node, one in told.items() if one[0] == accepted}
    value = next((one[2] for one in with_it.values() if one[2] is not None), None)
    sure = not accepted or any(one[1] for one in with_it.values())
    return Top(accepted, value, sure or covers(groups, with_it, change_quorum))


def told_of(answers: Answers) -> dict[int, Sequence[Any]]:
    """The answers that tell a register: {node: (accepted, chosen, value)}."""
    return {
        node: (answer["accepted"], answer["chosen"], answer["value"])
        for node, answer in answers.items()
        if "accepted" in answer
    }


def settled(groups: Groups, answers: Answers) -> bool:
    """Are these answers a read quorum that leaves no doubt?"""
    told = told_of(answers)
    return covers(groups, told, read_quorum) and weigh(groups, told).settled


def told_of_bucket(answers: Answers) -> dict[int, Sequence[Any]]:
    """The same as `told_of` for the bucket's own register, which comes along."""
    return {node: answer["basis"] for node, answer in answers.items() if answer.get("basis")}


# live value -> new value, None to leave it, or S3Error
Decide = Callable[["Value | None"], "Value | None"]
Voters = Callable[[View], Groups]
Proviso = Callable[[], Steps[S3Error | None]]  # why not to change anything, if so


class Rounds:
    """Reads and changes of registers, as steps. `view` tells this node's view at any time."""

    def __init__(
        self, own: int, view: Callable[[], View], clock: Callable[[], float], pick: random.Random
    ) -> None:
        self.own, self.view, self.clock, self.pick = own, view, clock, pick
        self.ballots = Ballots(own)

    def gather(
        self, name: str, bucket: str, fields: Message, has: str, quorum: Callable[[int], int],
        content: Callable[[Groups, Answers], bool] = lambda groups, having: True,
    ) -> Steps[tuple[View, Answers]]:
        """The answers that have the field `has`, from a quorum of those who are asked about
        `bucket`, and the view that they are of; more than a quorum while it is not `content`.
        SlowDown without a quorum."""
        started = self.clock()
        while True:
            view = self.view()
            groups = view.groups(bucket)

            def enough(answers: Answers, groups: Groups = groups) -> bool:
                having = {node: one for node, one in answers.items() if has in one}
                return covers(groups, having, quorum) and content(groups, having)

            answers = yield Ask(name, {"epoch": view.epoch, **fields}, groups, enough, quorum)
            having = {node: answer for node, answer in answers.items() if has in answer}
            if covers(groups, having, quorum):
                return view, having
            if self.view().epoch == view.epoch or self.clock() - started > OPERATION_SECONDS:
                asked = everyone(groups)
                silent = [c for c in asked if "failed" in answers.get(c.node, ("failed",))]
                raise slow_down(groups, silent or asked, "read")

    def read(self, bucket: str, key: str) -> Steps[tuple[Value | None, Top | None]]:
        """The live value of a register, and what is known of its bucket. One round trip when a
        change quorum agrees; otherwise it finishes the change it found. SlowDown."""
        place = {"bucket": bucket, "key": key, "brief": False}
        steps = self.gather("read", bucket, place, "accepted", read_quorum, settled)
        view, answers = yield from steps
        groups = view.groups(bucket)
        top = weigh(groups, told_of(answers))
        if not top.settled:
            return live((yield from self.change(bucket, key, lambda value: None))), None
        basis = told_of_bucket(answers)
        enough = covers(groups, basis, read_quorum)
        return live(top.value), weigh(groups, basis) if enough else None

    def bucket(self, bucket: str, known: Top | None = None) -> Steps[Value | None]:
        """The bucket's own record, whatever its state; `known` is what came with something else."""
        if known is not None and known.settled:
            return live(known.value)
        value, _ = yield from self.read(bucket, "")
        return value

    def repair(self, bucket: str, key: str) -> Steps[Value | None]:
        """Have all owners that answer accept what a majority has; nothing if the bucket is gone."""
        return Change(self, bucket, key, lambda value: None, rewrites=True).steps()

    def reopen(self, bucket: str, mark: str) -> Steps[Value | None]:
        """Take back the mark that a deletion left."""
        again = secrets.token_hex(8)

        def decide(current: Value | None) -> Value | None:
            if current is None or current["id"] != mark:
                return None
            return {"id": again, "bucket": {**current["bucket"], "state": "open"}}

        return self.change(bucket, "", decide)

    def change(
        self, bucket: str, key: str, decide: Decide, voters: Voters | None = None,
        proviso: Proviso | None = None,
    ) -> Steps[Value | None]:
        """Put what `decide` makes of the register's live value in its place; returns what is there
        then. Raises what `decide` raises, NoSuchBucket, and SlowDown when it is not known what
        happened. `proviso` is asked about something else while the register cannot change."""
        return Change(self, bucket, key, decide, voters, proviso=proviso).steps()


class Change:
    """One change of one register: rounds of prepare and accept until one gets through."""

    def __init__(
        self, rounds: Rounds, bucket: str, key: str, decide: Decide,
        voters: Voters | None = None, rewrites: bool = False, proviso: Proviso | None = None,
    ) -> None:
        self.rounds, self.bucket, self.key, self.decide = rounds, bucket, key, decide
        self.voters = voters or (lambda view: view.groups(bucket))
        self.rewrites = rewrites  # accept once more even what is settled
        self.proviso = proviso
        self.tried = ""  # the first ballot at which some owner may have accepted our value
        self.mine: Value | None = None  # that value
        self.base = ""  # where what our value is to replace had been accepted
        self.missing: list[Contact] = []  # owners that did not answer the last question
        self.bucket_value: Value | None = {"bucket": {"state": "open"}}  # unless we are told else

    def steps(self) -> Steps[Value | None]:
        """Rounds with random pauses between, until OPERATION_SECONDS are over."""
        began = self.rounds.clock()
        for attempt in itertools.count():
            epoch = self.rounds.view().epoch
            done = yield from self.round()
            if done is not None:
                return done[0]
            elapsed = self.rounds.clock() - began
            silent = self.missing and attempt >= 2
            if elapsed > (SILENCE_SECONDS if silent else OPERATION_SECONDS):
                break
            if self.rounds.view().epoch == epoch:
                widest = BACKOFF_SECONDS * 2 ** min(attempt, 8)
                yield Pause(self.rounds.pick.uniform(0, widest))
                yield from self._look()
        raise slow_down(self.voters(self.rounds.view()), self.missing, "change")

    def _look(self) -> Steps[None]:
        """Raise what `decide` raises of the value that is there now: who has lost a race learns it
        without a ballot that would disturb those still running."""
        if self.tried:
            return
        view = self.rounds.view()
        groups = self.voters(view)
        message = {"epoch": view.epoch, "bucket": self.bucket, "key": self.key, "brief": False}
        enough = functools.partial(settled, groups)
        answers = yield Ask("read", message, groups, enough, read_quorum)
        if settled(groups, answers):
            value = live(weigh(groups, told_of(answers)).value)
            if value is not None:
                self.decide(value)

    def round(self) -> Steps[tuple[Value | None] | None]:
        """Prepare, decide, accept: (what the register holds now,), or None: try again."""
        view = self.rounds.view()
        groups = self.voters(view)
        ballot = self.rounds.ballots.next(view.epoch)
        place = {"epoch": view.epoch, "bucket": self.bucket, "key": self.key, "ballot": ballot}
        answers = yield Ask(
            "prepare", place, groups,
            lambda answers: covers(groups, told_of(answers), change_quorum) or refused(answers),
        )
        self._note(groups, answers)
        told = told_of(answers)
        if not covers(groups, told, change_quorum):
            return None
        top = weigh(groups, told)
        # Where nothing is, all may have been dropped that was accepted up to the floor.
        self.base = top.accepted or max(answers[node].get("floor", "") for node in told)
        basis = yield from self._basis(groups, answers)
        # Our accept fails if anything was chosen since the prepare: what holds now, holds then.
        reason = (yield from self.proviso()) if self.proviso else None
        value, error = self._decided(top, reason)
        if value is None:
            if top.settled and not self.tried and not self.rewrites:
                return self._answer(top.value, error)
            # What we saw or tried may be with a minority: settle it before anybody is told of it.
            grave = {**tombstone(), "base": self.base}
            value = top.value or grave
            if self.bucket_value is None and error:  # nothing can be in a bucket that is gone
                value = grave
                error = None if self.rewrites else error
        if live(value) and self.bucket_value and not is_open(self.bucket_value):
            # Its owners take no object. Somebody is deleting it, or died while doing so: after a
            # while, take the mark back.
            yield Pause(CLOSING_SECONDS)
            yield from self.rounds.reopen(self.bucket, self.bucket_value["id"])
            return None
        accepted = yield from self._accept(groups, place, value, basis)
        return self._answer(value, error) if accepted else None

    def _answer(self, value: Value | None, error: S3Error | None) -> tuple[Value | None]:
        if error is not None:
            raise error
        return (value,)

    def _note(self, groups: Groups, answers: Answers) -> None:
        for answer in answers.values():
            ballot = answer.get("refused") or answer.get("accepted")
            if ballot:
                self.rounds.ballots.observe(ballot)
        silent = {node for node, answer in answers.items() if answer.get("failed")}
        self.missing = sorted(c for c in everyone(groups) if c.node in silent)

    def _basis(self, groups: Groups, answers: Answers) -> Steps[tuple[str, bool, Value] | None]:
        """The bucket's register, to go along with an accept to owners that may not have it; None
        when all that answered have it, or the key is of a bucket that always exists."""
        told = told_of_bucket(answers)
        if not told:
            return None
        top = weigh(groups, told)
        self.bucket_value = live(top.value)
        if not top.settled:
            self.bucket_value = yield from self.rounds.bucket(self.bucket)
            return None
        return (top.accepted, True, top.value) if top.value else None

    def _decided(self, top: Top, reason: S3Error | None) -> tuple[Value | None, S3Error | None]:
        """(value to write or None to leave it, error to raise once that is settled)."""
        if self.mine is not None and top.value and top.value["id"] == self.mine["id"]:
            return (None if top.settled else top.value), None
        # Had our value been chosen, or taken for it by somebody, at `tried` or later, then what has
        # a higher ballot would be based on that or on something later. If it is not, our value did
        # not count, and will not once this round is through. If it is, others may have gone on from
        # ours, or it never counted: nobody can say.
        if self.tried and (top.value.get("base", "") if top.value else self.base) >= self.tried:
            raise S3Error("SlowDown", "The outcome is not known: others changed the key too.")
        try:
            if self.bucket_value is None:
                raise S3Error("NoSuchBucket", BucketName=self.bucket)
            if reason is not None:
                raise reason
            value = self.decide(live(top.value))
        except S3Error as error:
            return None, error
        value = value and {**value, "base": self.base}
        self.mine = value or self.mine
        return value, None

    def _accept(
        self, groups: Groups, place: Message, value: Value, basis: tuple[str, bool, Value] | None
    ) -> Steps[bool]:
        """Have the value accepted by a change quorum of each group."""
        message = {**place, "value": value, "chosen": False, "basis": basis}
        last = self._last(groups)
        first = only(groups, lambda contact: contact != last)
        done: set[int] = set()
        if first:
            # All others are asked, and those with `last` must be enough.
            def enough(answers: Answers) -> bool:
                accepted = {node for node, answer in answers.items() if answer.get("done")}
                return covers(groups, accepted | ({last.node} if last else set()), change_quorum)

            answers = yield Ask("accept", message, first, enough, wide=True)
            done = self._accepted(groups, first, message["ballot"], answers)
            if not enough(answers):
                return False
        if last is None:
            return True
        ours: Groups = ((last,),)
        answers = yield Ask("accept", {**message, "chosen": True}, ours, bool)
        if not self._accepted(groups, ours, message["ballot"], answers):
            return False
        if told := only(first, lambda contact: contact.node in done):
            yield Ask("learn", place, told, lambda answers: done <= set(answers), wide=True)
        return True

    def _last(self, groups: Groups) -> Contact | None:
        """Where one or two owners must be able to speak alone (`weigh`), the one that accepts last,
        and so knows that the value is chosen; the others are told. Not this node, so that it costs
        nothing."""
        small = min(groups, key=len)
        if len(small) > 2:
            return None
        return next((contact for contact in small if contact.node != self.rounds.own), small[0])

    def _accepted(self, groups: Groups, asked: Groups, ballot: str, answers: Answers) -> set[int]:
        self._note(groups, answers)
        done = {node for node, answer in answers.items() if answer.get("done")}
        unknown = {node for node, answer in answers.items() if answer.get("failed")}
        sure_not = answers.keys() - done - unknown
        if self.mine is not None and any(c.node not in sure_not for c in everyone(asked)):
            self.tried = self.tried or ballot
        return done


def refused(answers: Answers) -> bool:
    """Did somebody promise more to another, or know another view? Then this round is lost."""
    return any("refused" in answer or "views" in answer for answer in answers.values())


def slow_down(groups: Groups, missing: Iterable[Contact], what: str) -> S3Error:
    """503: too few owners answered, or writers got in each other's way for too long."""
    names = ", ".join(f"{contact.address} ({node_hex(contact.node)})" for contact in missing)
    if not names:
        return S3Error("SlowDown", "Too many changes of this key at once.")
    message = f"Not enough nodes answer for this {what}. Missing: {names}."
    if min(map(len, groups)) <= 2:
        message += " Start it again, or restart another node with --forget and its id."
    return S3Error("SlowDown", message)


class Node:
    """This node's part of the protocol: it answers from what it has, and never asks a peer."""

    def __init__(
        self, own: Contact, registers: Registers, blocks: Blocks, clock: Callable[[], float]
    ) -> None:
        self.own, self.registers, self.blocks, self.clock = own, registers, blocks, clock
        self.instance = secrets.token_hex(8)  # tells this process from that of a copied disk
        self.is_copy = False  # of another node's disk, which is in use: it has no vote
        self.pins = Pins()
        self.providers = Providers()
        self.table = RoutingTable(own.node)
        self.to_ping: dict[int, Contact] = {}  # contacts whose place somebody wants
        self.heard: dict[int, float] = {}  # node -> when it last spoke or answered
        self.patience = math.inf  # seconds; hello says who was not heard for longer
        # Each takes its message's fields but the epoch; two want the sender, too.
        self.handlers: dict[str, Callable[..., Message]] = {
            "views": self.on_views, "find": self.on_find,
            "find_providers": self.on_find_providers, "provide": self.on_provide,
            "prepare": registers.prepare, "accept": registers.accept, "learn": registers.learn,
            "read": registers.read, "page": self.on_page, "buckets": self.on_buckets,
            "changes": self.on_changes, "values": self.on_values, "buried": self.on_buried,
            "used": self.on_used, "have": self.on_have,
        }

    def saw(self, contact: Contact) -> None:
        """`contact` sent an authenticated message or answer."""
        self.heard[contact.node] = self.clock()
        oldest = self.table.seen(contact, self.clock())
        if oldest is not None:
            self.to_ping[oldest.node] = oldest

    def answer(self, name: str, message: Message, sender: Contact) -> Message:
        """Do what a checked message asks. ValueError when it makes no sense here. That it is of our
        epoch, and what is answered, are one step: meanwhile no other view is entered, and no
        register dropped."""
        need(not self.is_copy, "disk: it was copied")
        if name == "hello":  # of any epoch
            return self.on_hello(**message)
        fields = {field: one for field, one in message.items() if field != "epoch"}
        if name in ("provide", "changes"):
            fields["sender"] = sender
        if "epoch" not in message:
            return self.handlers[name](**fields)
        epoch = message["epoch"]
        need("ballot" not in message or int(message["ballot"][:8], 16) == epoch, "ballot")
        with self.registers.lock:
            return self.registers.fence(epoch) or self.handlers[name](**fields)

    def idle(self) -> bool:
        """Is this a cluster of one node without a bucket, which may give itself up for another?"""
        return len(self.registers.view.members) == 1 and not self.registers.buckets()

    def silent(self, least: float) -> list[str]:
        """Members that this node has not heard for longer than `least` seconds, in hex."""
        now, others = self.clock(), ids(self.registers.view.members) - {self.own.node}
        silences = {node: now - self.heard.setdefault(node, now) for node in others}
        return [node_hex(node) for node, seconds in silences.items() if seconds > least]

    def on_hello(self, epoch: int) -> Message:
        """Who are you, and what views do you know after that epoch?"""
        view = self.registers.view
        return {
            "contact": self.own.as_json(), "instance": self.instance, "idle": self.idle(),
            "cluster": view.cluster, "epoch": view.epoch, "synced": self.registers.synced,
            "views": self.registers.views_after(epoch), "silent": self.silent(self.patience),
        }

    def on_views(self, views: list[Message]) -> Message:
        """Newer views were decided."""
        self.registers.adopt(View(**fields) for fields in views)
        return {"done": True}

    def on_find(self, target: str) -> Message:
        """Kademlia's FIND_NODE."""
        found = self.table.closest(int(target, 16))
        return {"contacts": [contact.as_json() for contact in found]}

    def on_find_providers(self, hash: str) -> Message:
        """Kademlia's FIND_VALUE: who holds the block, and who may know more."""
        holders = self.providers.get(hash, self.clock())
        if self.blocks.has(hash):
            holders = [self.own, *holders]
        nearer = self.on_find(node_hex(block_target(hash)))
        return {"providers": [contact.as_json() for contact in holders], **nearer}

    def on_provide(self, hashes: list[str], sender: Contact) -> Message:
        """The sender holds these blocks."""
        for block in hashes:
            self.providers.add(block, sender, self.clock())
        return {"done": True}

    def on_page(self, mark: str, bucket: str, **fields: Any) -> Message:
        """A page of a bucket's keys."""
        if mark and (self.registers.slot(bucket, "").value or {}).get("id") != mark:
            return {"unmarked": True}
        return self.registers.page(bucket, **fields)

    def on_buckets(self) -> Message:
        """All buckets known here."""
        return {"buckets": self.registers.buckets()}

    def on_changes(self, since: int, sender: Contact) -> Message:
        """What was accepted here since, of the buckets that the sender owns."""
        view = self.registers.view
        return self.registers.changes(
            since, lambda bucket: bucket != VIEWS and view.owns(sender.node, bucket)
        )

    def on_values(self, places: list[tuple[str, str]]) -> Message:
        """[accepted, chosen, value] of registers; fewer than asked for when they are large."""
        slots: list[list[Any]] = []
        size = 0
        for bucket, key in places:
            if size > PAGE_BYTES:
                break
            _promised, *told = self.registers.slot(bucket, key)
            slots.append(told)
            size += len(pack(told))
        return {"slots": slots}

    def on_buried(self, graves: list[Grave]) -> Message:
        """Which of these tombstones have reached this owner?"""
        return {"buried": [self.registers.buried(*grave) for grave in graves]}

    def on_used(self, hashes: list[str]) -> Message:
        """Which of these blocks does a record or an operation here need?"""
        return {"used": [block in self.pins or self.registers.used(block) for block in hashes]}

    def on_have(self, hashes: list[str], touch: bool) -> Message:
        """Which of these blocks are here? Touched, they stay for the grace."""
        look = self.blocks.touch if touch else self.blocks.has
        return {"have": [look(block) for block in hashes]}


class Cluster:
    """Drives rounds, lookups and transfers over real connections, for one node."""

    def __init__(self, node: Node, peers: Peers) -> None:
        self.node, self.peers = node, peers
        self.own = node.own
        self.rounds = Rounds(self.own.node, self.known_view, time.monotonic, random.Random())
        self.joined = threading.Event()  # set once this node is a member
        self.displaced = False  # does another process answer at our address?
        self.young_until = time.monotonic() + 2 * DISCOVERY_SECONDS

    def known_view(self) -> View:
        """The newest view known, whether or not this node is a member. SlowDown if none is."""
        view = self.node.registers.view
        if view is NO_VIEW:
            raise S3Error("SlowDown", "This node has not found its cluster yet.")
        return view

    def view(self) -> View:
        """The newest view, once this node is a member. SlowDown when it does not become one."""
        if not (self.joined.is_set() or self.joined.wait(JOIN_WAIT_SECONDS)):
            raise S3Error("SlowDown", "This node has not joined its cluster yet.")
        return self.known_view()

    def adopt(self, raw: Iterable[Any]) -> None:
        """Enter the views that a peer told us, if they are newer."""
        try:
            if self.node.registers.adopt(map(View.from_json, raw)):
                self.check_membership()
        except OSError as error:  # a full disk: until it has room, the others refuse what we ask
            LOG.error("views: %s", error)

    def spoke(self, contact: Contact, hello: bool = False) -> None:
        """It sent something sealed: that is where it is, whatever the view says. Not if it is or
        answers a hello: a copied disk says that, too, before it knows that it is one."""
        self.node.saw(contact)
        self.peers.heard(contact)
        member = self.node.registers.view.member(contact.node)
        if member == contact:
            self.peers.moved.pop(contact, None)
        elif member and not hello:
            self.peers.moved[member] = contact

    def check_membership(self) -> None:
        """Note whether this node is a member, and not a copy of its disk at another address, or
        one that says that it is at the same."""
        if self.node.registers.view.member(self.own.node) == self.own and not self.displaced:
            if not self.joined.is_set():
                LOG.info("node %s is a member, at %s", node_hex(self.own.node), self.own.address)
            self.joined.set()
        else:
            self.joined.clear()

    def run(self, steps: Steps[T]) -> T:
        """Drive the steps of a round to their end."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                step = steps.send({} if isinstance(step, Pause) else self.ask(step))
        except StopIteration as end:
            return cast(T, end.value)

    def ask(self, ask: Ask) -> Answers:
        """Ask the others over the network, and this node by a function call: first, where it may be
        enough alone, else while they are at it. Who is asked to read leaves out the value then,
        which this node is likely to have as well."""
        contacts = everyone(ask.groups)
        others = self._order([contact for contact in contacts if contact.node != self.own.node])
        answers: dict[int, Message] = {}

        def look() -> None:
            answers[self.own.node] = self._answer_here(ask.name, ask.message)

        if len(others) == len(contacts):
            self._ask_others(ask, others, answers)
        elif covers(ask.groups, {self.own.node}, ask.quorum):
            look()
            if others and not ask.enough(answers):
                self._ask_others(ask, others, answers)
        else:
            brief = {"brief": True} if "brief" in ask.message else {}
            self._ask_others(ask._replace(message=ask.message | brief), others, answers, look)
            newest = max(answer.get("accepted", "") for answer in answers.values())
            if brief and newest > answers[self.own.node].get("accepted", ""):  # we missed a change
                answers.clear()  # not to be mixed: a tombstone may have been dropped meanwhile
                self._ask_others(ask, self._order(others), answers, look)
        return answers

    def _answer_here(self, name: str, message: Message) -> Message:
        try:
            return self.node.answer(name, message, self.own)
        except (OSError, ValueError) as error:  # a full or rotten disk; others may do without us
            LOG.error("%s: %s", name, error)
            return {"failed": True}

    def _order(self, contacts: list[Contact]) -> list[Contact]:
        """Those that answered last time first, otherwise shuffled, to spread the load."""
        self.rounds.pick.shuffle(contacts)
        return sorted(contacts, key=lambda contact: self.peers.skipped(contact.node))

    def _ask_others(
        self, ask: Ask, others: list[Contact], answers: dict[int, Message],
        look: Callable[[], None] | None = None,
    ) -> None:
        """Add their answers to `answers`. `look` will add this node's; it is called meanwhile. What
        is weighed together was told within three CONNECT_SECONDS: asked, told of views, asked."""

        def take(raw: Mapping[int, Reply]) -> None:
            for node in raw.keys() - answers.keys():
                answers[node] = raw[node].json()

        def enough(raw: Mapping[int, Reply]) -> bool:
            take(raw)
            return ask.enough(answers)

        here = {self.own.node} if look else answers.keys()
        quorums = (  # how many of the others make one with those
            count for count in range(1, len(others))
            if covers(ask.groups, {*here, *ids(others[:count])}, ask.quorum)
        )
        first = next(quorums, len(others))
        if ask.wide:
            first = max(first, sum(not self.peers.skipped(contact.node) for contact in others))
        take(self.tell(ask.name, ask.message, others, enough, first, look))
        if any("views" in answer or "behind" in answer for answer in answers.values()):
            # Settle whose view is the newest; then ask those that were behind again.
            asked = [] if ask.enough(answers) else everyone(ask.groups)
            replies = self.tell(ask.name, ask.message, self.share_views(answers, asked))
            answers.update((node, reply.json()) for node, reply in replies.items())

    def share_views(self, answers: Mapping[int, Message], asked: Iterable[Contact]) -> Group:
        """Enter newer views that came back; tell ours to those that are behind. Returns these."""
        for answer in list(answers.values()):
            if "views" in answer:
                self.adopt(answer["views"])
        behind = tuple(c for c in asked if "behind" in answers.get(c.node, ()) and c != self.own)
        if behind:
            since = min(answers[contact.node]["behind"] for contact in behind)
            self.tell("views", {"views": self.node.registers.views_after(since)}, behind)
        return behind

    def tell(
        self, name: str, message: Message, contacts: Sequence[Contact],
        enough: Enough = lambda raw: False, first: int = MAX_MEMBERS,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[int, Reply]:
        """Send one message to peers; their replies by node id."""
        body = pack(message)
        # Who is silent comes last: it may take long to find out where that is.
        asked = sorted(dict.fromkeys(contacts), key=lambda c: self.peers.skipped(c.node))
        questions = [Question(contact, name, body) for contact in asked]
        replies = self.peers.ask(questions, enough, first, CONNECT_SECONDS, meanwhile=meanwhile)
        for contact in contacts:
            if contact.node and contact.node in replies:
                if replies[contact.node].status:
                    self.node.saw(contact)
                else:
                    self.node.table.failed(contact)
        return replies

    def call_all(
        self, name: str, message: Message, contacts: Iterable[Contact]
    ) -> dict[int, Message]:
        """Ask several at once, this node too if it is among them; the good answers by node id."""
        nodes = {contact.node: contact for contact in contacts}
        here = nodes.pop(self.own.node, None)
        replies = self.tell(name, message, list(nodes.values()))
        answers = {node: reply.json() for node, reply in replies.items()}
        if here:
            answers[self.own.node] = self._answer_here(name, message)
        return {node: one for node, one in answers.items() if "failed" not in one}

    def call(self, name: str, message: Message, contact: Contact) -> Message | None:
        """Ask one peer, or this node itself; None when no good answer came."""
        return self.call_all(name, message, [contact]).get(contact.node)

    # Lookups.

    def find(self, target: int) -> None:
        """Kademlia lookup of the live nodes nearest to `target`: the table learns of them."""
        self._lookup(target, "find", {"target": node_hex(target)})

    def find_providers(self, block: str) -> list[Contact]:
        """Who holds `block`, by a Kademlia lookup that ends with the first that know."""
        local = self.node.providers.get(block, time.monotonic())
        return local or self._lookup(block_target(block), "find_providers", {"hash": block})

    def _lookup(self, target: int, name: str, message: Message) -> list[Contact]:
        """The providers, once somebody names them, which ends it."""
        steps = lookup(target, self.node.table.closest(target), self.own.node)
        try:
            todo = next(steps)
            while True:
                answers = self.call_all(name, message, todo)
                said = [raw for one in answers.values() for raw in one.get("providers", ())]
                if said:
                    return list(map(contact_field, said))
                known = {c: list(map(contact_field, one["contacts"])) for c, one in answers.items()}
                todo = steps.send(known)
        except StopIteration:
            return []

    # Blocks between nodes.

    def holders(self, block: str) -> list[Contact]:
        """All members, nearest to the block's hash first: the first `replicas` should hold it."""
        return nearest(self.view().members, block_target(block), MAX_MEMBERS)

    def store(self, block: str, data: bytes) -> None:
        """Have two nodes or more hold the block (all, in a smaller cluster). SlowDown otherwise, or
        InsufficientStorage where all have answered."""
        view = self.view()
        order = sorted(self.holders(block), key=lambda contact: self.peers.slow(contact.node))
        wanted = min(view.replicas, len(order))
        least = min(2, wanted)
        held = int(self.own in order[:wanted] and self._store_here(block, data))
        others = [contact for contact in order if contact != self.own]
        said = self.store_out(block, data, others, wanted - held, least - held)
        stored = [contact for contact, status in said.items() if status == 200]
        if held + len(stored) < least:
            if missing := [contact for contact in others if said.get(contact) not in (200, 503)]:
                raise slow_down((tuple(order),), missing, "write")
            raise S3Error("InsufficientStorage", "Too few nodes have room: see their logs.")
        for contact in stored:
            self.node.providers.add(block, contact, self.node.clock())

    def _store_here(self, block: str, data: bytes) -> bool:
        try:
            self.node.blocks.put(block, data)
        except OSError as problem:  # a full disk here is no reason to fail: others have room
            LOG.warning("block %s cannot be stored here: %s", block, problem)
            return False
        return True

    def store_out(
        self, block: str, data: bytes, others: Sequence[Contact], wanted: int, least: int
    ) -> dict[Contact, int]:
        """Ask `wanted` of the others at once, and more for those that fail, in order. Once `least`
        of them have the block, the rest get COPY_SECONDS. Returns the status of each answer: 200
        from those that have it, 503 from those whose disk takes none."""

        def enough(replies: Mapping[int, Reply]) -> bool:
            return sum(reply.status == 200 for reply in replies.values()) >= least

        answering = sum(not self.peers.slow(contact.node) for contact in others)
        first = max(least, min(wanted, answering))  # repair will see to those that are slow
        questions = [Question(contact, f"store/{block}", data) for contact in others]
        replies = self.peers.ask(questions, enough, first, BLOCK_SECONDS, COPY_SECONDS)
        return {c: replies[c.node].status for c in others if c.node in replies}

    def fetch(self, block: str) -> bytes:
        """The block's bytes, verified: from this disk, else from who should hold it, else from who
        says that he does. SlowDown when nobody gives it."""
        data = self.node.blocks.get(block)
        if data is not None:
            return data
        view = self.view()
        order = self._order([c for c in self.holders(block) if c != self.own][: view.replicas])
        data = self._fetch_from(block, order)
        if data is None:
            rest = {*self.find_providers(block), *view.everybody()} - {self.own, *order}
            data = self._fetch_from(block, self._order(sorted(rest)))
        if data is None:
            raise S3Error("SlowDown", "A block of this object cannot be reached now.")
        if self.own in self.holders(block)[: view.replicas]:
            self._store_here(block, data)
        return data

    def _fetch_from(self, block: str, contacts: list[Contact]) -> bytes | None:
        questions = [Question(contact, f"fetch/{block}", b"") for contact in contacts]

        def good(reply: Reply) -> bool:
            return reply.status == 200 and block_hash(reply.body) == block

        # A good answer ends it, so the hash is computed twice only for the one that is used.
        replies = self.peers.ask(
            questions, lambda replies: any(map(good, replies.values())), 1, BLOCK_SECONDS
        )
        return next((reply.body for reply in replies.values() if good(reply)), None)

    def touch(self, blocks: Sequence[str]) -> list[str]:
        """Touch blocks where they should be. Returns those that too few nodes have."""
        view = self.view()
        least = min(2, view.replicas, len(view.members))
        lacking: list[str] = []
        for start in range(0, len(blocks), BATCH):
            holders, _ = self.have(blocks[start : start + BATCH], touch=True)
            lacking += [block for block, nodes in holders.items() if len(nodes) < least]
        return lacking

    def have(self, blocks: Iterable[str], touch: bool) -> tuple[dict[str, set[int]], set[int]]:
        """Which members hold each of these blocks (at most BATCH), and which members answered."""
        holders: dict[str, set[int]] = {block: set() for block in blocks}
        message = {"hashes": list(holders), "touch": touch}
        answers = self.call_all("have", message, self.view().members)
        for node, answer in answers.items():
            for nodes, there in zip(holders.values(), answer["have"], strict=True):
                if there:
                    nodes.add(node)
        return holders, set(answers)


# ===== 8 DistributedStore =====


def info_of(key: str, value: Value) -> ObjectInfo:
    """What S3 tells of an object."""
    return ObjectInfo.from_record(key, {**value["info"], "parts": value.get("parts", ())})


def inline_bytes(value: Value) -> bytes:
    """The bytes that travel in an object's record. InternalError if they rotted there."""
    data, etag = base64.b64decode(value["inline"]), value["info"]["etag"]
    if "-" not in etag and hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
        raise S3Error("InternalError", "What this node has of the object is damaged.")
    return data


def slices(
    segments: Iterable[Sequence[Any]], start: int, length: int
) -> list[tuple[str, int, int]]:
    """(hash, from, to) of the pieces of blocks that make the bytes [start, start + length)."""
    pieces: list[tuple[str, int, int]] = []
    position = 0
    for size, hashes in segments:
        low, high = max(start - position, 0), min(start + length - position, size)
        for index in range(low // BLOCK_BYTES, -(-high // BLOCK_BYTES)) if low < high else ():
            begin = index * BLOCK_BYTES
            block = hashes[index * 64 : index * 64 + 64]
            pieces.append((block, max(low - begin, 0), min(high - begin, BLOCK_BYTES)))
        position += size
    return pieces


class StoredContent:
    """An object's bytes on their way out, as its record was; the blocks are pinned until close."""

    def __init__(self, cluster: Cluster, value: Value) -> None:
        self.cluster, self.value = cluster, value
        self._inline = inline_bytes(value) if "inline" in value else None
        self._blocks = blocks_of(value)
        cluster.node.pins.add(self._blocks)

    def chunks(self, start: int, length: int) -> Iterator[bytes | memoryview]:
        """The bytes [start, start + length), each block verified before any of it is given."""
        if self._inline is not None:
            yield self._inline[start : start + length]
            return
        pieces = slices(self.value["blocks"], start, length)
        fetched = ahead(self.cluster.fetch, [block for block, _, _ in pieces])
        with contextlib.closing(fetched):
            for (_, first, last), data in zip(pieces, fetched, strict=True):
                yield memoryview(data)[first:last]

    def close(self) -> None:
        """Its blocks may go."""
        self.cluster.node.pins.drop(self._blocks)
        self._blocks = []


def ahead(fetch: Callable[[str], bytes], blocks: Sequence[str]) -> Generator[bytes, None, None]:
    """fetch(block) of each, in order, up to READ_AHEAD of them before they are asked for."""
    if len(blocks) <= 1:
        yield from map(fetch, blocks)
        return
    todo = iter(blocks)
    pool = ThreadPoolExecutor(1)
    try:
        first = itertools.islice(todo, READ_AHEAD)
        under_way = collections.deque(pool.submit(fetch, block) for block in first)
        while under_way:
            data = under_way.popleft().result()
            under_way.extend(pool.submit(fetch, block) for block in itertools.islice(todo, 1))
            yield data
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def whole_blocks(body: Iterable[memoryview]) -> Iterator[bytes]:
    """The body cut into pieces of BLOCK_BYTES, the last one shorter; none if it is empty."""
    rest = b""
    for piece in body:
        data = rest + piece if rest else bytes(piece)
        for start in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]
        rest = data[len(data) // BLOCK_BYTES * BLOCK_BYTES :]
    if rest:
        yield rest


Entry = tuple[str, str, str]  # key, head and tail of a live object


def common_end(pages: Iterable[Message]) -> str | None:
    """The key up to which all pages are complete; None for the end of the bucket."""
    return min((page["entries"][-1][0] for page in pages if page["more"]), default=None)


def doubtful(groups: Groups, pages: Mapping[int, Message]) -> list[str]:
    """Keys of which these pages, a read quorum or more, do not settle what is chosen (`weigh`). The
    highest accepted may be one owner's alone: a change that lost its race, and was answered that it
    did not happen."""
    limit = common_end(pages.values())
    told: dict[str, dict[int, tuple[str, bool, None]]] = {}
    agreed: set[tuple[str, str]] = set()
    if covers(groups, pages, change_quorum):  # the usual case, and the fast one
        places = ({(one[0], one[1]) for one in page["entries"]} for page in pages.values())
        agreed = set.intersection(*places)
    for node, page in pages.items():
        for key, accepted, _, _, chosen in page["entries"]:
            if (key, accepted) not in agreed and (limit is None or key <= limit):
                told.setdefault(key, {})[node] = (accepted, chosen, None)
    return [key for key, one in told.items() if not weigh(groups, one).settled]


def merge_pages(
    pages: Sequence[Message], prefix: str, delimiter: str
) -> tuple[list[Entry], str | None]:
    """The live entries of owners' pages that began at the same key, and where to go on; None at the
    end. For each key the highest accepted ballot wins. A page is complete up to its last entry,
    except that with a delimiter an owner skips what shares a common prefix with a live key that it
    lists. If that key is dead after all, nothing behind it is known, and the next page begins
    there."""
    limit = common_end(pages)
    best: dict[str, tuple[str, str, str]] = {}
    claimed: set[str] = set()
    for page in pages:
        for key, accepted, head, tail, *_ in page["entries"]:
            best[key] = max(best.get(key, ("", "", "")), (accepted, head, tail))
            if head:
                claimed.add(key)
    found: list[Entry] = []
    group = ""
    for key in sorted(best):
        if limit is not None and key > limit:
            break
        if group and key.startswith(group):
            continue
        _, head, tail = best[key]
        group = zs3.common_prefix(key, prefix, delimiter)
        if head:
            found.append((key, head, tail))
        elif group and key in claimed:
            return found, key + "\0"
        else:
            group = ""
    if limit is None:
        return found, None
    return found, zs3.successor(group) if group and limit.startswith(group) else limit + "\0"


class Pin(NamedTuple):
    """Keeps blocks, by `blocks(hashes)`, until an operation ends that began in the view `epoch`."""

    epoch: int
    blocks: Callable[[Collection[str]], None]


class DistributedStore:
    """`zs3.Store` over a cluster: every operation works the same on every node."""

    waits = True

    def __init__(self, cluster: Cluster, lock: IO[str] | None = None) -> None:
        self.cluster, self.seal = cluster, cluster.peers.seal
        self.lock = lock  # of the data folder
        self.node, self.rounds = cluster.node, cluster.rounds
        # Steps of background jobs (9, 10), and the seconds between two runs of each.
        self.jobs: list[tuple[Callable[[], None], float]] = []
        self.closing = threading.Event()
        self.strangers: set[tuple[str, str]] = set()  # clients that were refused as peers, and why
        # What the background jobs did, for ping.
        self.counts = collections.Counter(repairs=0, healed=0, collected=0, buried=0, pulled=0)

    def start(self) -> None:
        for job in self.jobs:
            name = f"zs3-{job[0].__name__}"
            threading.Thread(target=self._repeat, args=job, name=name, daemon=True).start()

    def _repeat(self, step: Callable[[], None], interval: float) -> None:
        """A background job: the step, again and again, until the store is closed."""
        while not self.closing.is_set():
            try:
                step()
            except (S3Error, StaleView) as error:
                LOG.debug("%s: %s", step.__name__, error)  # too few peers: next time, then
            except OSError as error:
                LOG.warning("%s: %s", step.__name__, error)  # a full disk: next time, then
            except Exception:
                if self.closing.is_set():
                    return  # the registers were closed under it
                LOG.exception("%s", step.__name__)
            self.closing.wait(min(interval, threading.TIMEOUT_MAX))

    def close(self) -> None:
        self.closing.set()
        self.cluster.peers.close()
        self.node.registers.close()
        if self.lock:
            self.lock.close()

    def _run(self, steps: Steps[T]) -> T:
        """Only members work: others' pins are not asked for. A cluster of one node without a bucket
        waits, at its start, for another that it must give itself up for (`Membership._found`)."""
        until = self.cluster.young_until
        while self.cluster.view() and time.monotonic() < until and self.node.idle():
            time.sleep(0.1)
        return self.cluster.run(steps)

    # --- Buckets ---

    def list_buckets(self) -> list[BucketInfo]:
        """So many of all members must answer that every bucket's read quorum is among them."""
        replicas = self.cluster.view().replicas
        steps = self.rounds.gather(
            "buckets", VIEWS, {}, "buckets",
            lambda members: members - change_quorum(min(replicas, members)) + 1,
        )
        view, answers = self._run(steps)
        told: dict[str, dict[int, Sequence[Any]]] = {}
        for node, answer in answers.items():
            for name, *one in answer["buckets"]:
                told.setdefault(name, {})[node] = one
        found = []
        for name in sorted(told):
            value = self._run(self.rounds.bucket(name, weigh(view.groups(name), told[name])))
            if value is not None:
                found.append(BucketInfo(name, value["bucket"]["created"]))
        return found

    def stat_bucket(self, bucket: str, known: Top | None = None) -> BucketInfo:
        if bucket == UPLOADS:
            return BucketInfo(bucket, 0.0)
        value = self._run(self.rounds.bucket(bucket, known))
        if value is None:
            raise S3Error("NoSuchBucket", BucketName=bucket)
        return BucketInfo(bucket, value["bucket"]["created"])

    def create_bucket(self, bucket: str) -> None:
        ours = {"id": secrets.token_hex(8), "bucket": {"created": time.time(), "state": "open"}}
        self._run(self.rounds.change(bucket, "", lambda current: None if current else ours))

    def delete_bucket(self, bucket: str) -> None:
        """First the bucket is marked: its owners then refuse new objects. An object that was
        acknowledged before was accepted by a majority, none of which had the mark; so the owners
        that have it, also a majority, show at least one that holds it. The mark is removed if there
        is one; and if this node dies on the way, by who next wants to write an object there. Only
        while the mark is ours does the tombstone replace it."""
        mark = secrets.token_hex(8)

        def close(current: Value | None) -> Value | None:
            if current is None:
                raise S3Error("NoSuchBucket", BucketName=bucket)
            return {"id": mark, "bucket": {**current["bucket"], "state": "deleting"}}

        self._run(self.rounds.change(bucket, "", close))
        empty = False
        try:
            empty = next(self._entries(bucket, "", "", "/", False, mark), None) is None
        finally:
            if not empty:
                self._run(self.rounds.reopen(bucket, mark))
        if not empty:
            raise S3Error("BucketNotEmpty", BucketName=bucket)
        grave = tombstone()

        def bury(current: Value | None) -> Value | None:
            if current is None or current["id"] != mark:
                raise S3Error("SlowDown", "Somebody else is changing the bucket.")
            return grave

        self._run(self.rounds.change(bucket, "", bury))

    # --- Objects ---

    def _current(self, bucket: str, key: str) -> Value | None:
        value, basis = self._run(self.rounds.read(bucket, key))
        if value is None:
            self.stat_bucket(bucket, basis)
        return value

    def _read(self, bucket: str, key: str) -> Value:
        value = self._current(bucket, key)
        if value is None:
            raise S3Error("NoSuchKey", Key=key)
        return value

    def stat_object(self, bucket: str, key: str) -> ObjectInfo:
        return info_of(key, self._read(bucket, key))

    def open_object(self, bucket: str, key: str) -> tuple[ObjectInfo, StoredContent]:
        value = self._read(bucket, key)
        return info_of(key, value), StoredContent(self.cluster, value)

    def put_object(
        self, bucket: str, key: str, body: zs3.Body, headers: dict[str, str], condition: Condition
    ) -> ObjectInfo:
        """What can be refused is refused before the body is read, unless it is small."""
        if body.size is None or body.size > INLINE_BYTES or condition != zs3.NO_CONDITION:
            self._check(bucket, key, condition)
        with self._pinned() as pin:
            stored = self._store_body(body, pin)
            kind = "FULL_OBJECT" if body.checksums else ""
            info = ObjectInfo(key, body.length, body.md5, 0.0, headers, body.checksums, kind)
            return self._commit(bucket, info, stored, condition, pin)

    def _check(self, bucket: str, key: str, condition: Condition) -> None:
        """NoSuchBucket, or what the condition raises now: who lost a race learns it so, without
        disturbing the winner."""
        if condition == zs3.NO_CONDITION:
            self.stat_bucket(bucket)
        else:
            current = self._current(bucket, key)
            condition.check(info_of(key, current) if current else None)

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[Pin]:
        """What pins blocks until the end of the `with`."""
        epoch = self.cluster.view().epoch
        pinned: list[str] = []

        def pin(blocks: Collection[str]) -> None:
            self.node.pins.add(blocks)
            pinned.extend(blocks)

        drop: Callable[[list[str]], None] = self.node.pins.drop
        try:
            yield Pin(epoch, pin)
        except S3Error as error:
            if error.status == 503:  # it may happen all the same, by a message still on its way
                drop = self.node.pins.drop_later
            raise
        finally:
            drop(pinned)

    def _store_body(self, body: Iterable[memoryview], pin: Pin) -> Value:
        """The fields of a value that say where the body's bytes are. Raises what the body does."""
        hashes: list[str] = []
        size = 0
        with ThreadPoolExecutor(STORE_BEHIND) as pool:
            under_way: collections.deque[Future[None]] = collections.deque()
            for data in whole_blocks(body):
                size += len(data)
                if not hashes and len(data) <= INLINE_BYTES:
                    return {"inline": base64.b64encode(data).decode()}
                if len(hashes) >= MAX_OBJECT_BLOCKS:
                    raise S3Error("EntityTooLarge")
                hashes.append(block_hash(data))
                pin.blocks(hashes[-1:])
                if len(under_way) >= STORE_BEHIND:
                    under_way.popleft().result()
                under_way.append(pool.submit(self.cluster.store, hashes[-1], data))
            for one in under_way:
                one.result()
        return {"blocks": [[size, "".join(hashes)]]} if hashes else {"inline": ""}

    def _commit(
        self, bucket: str, info: ObjectInfo, stored: Value, condition: Condition, pin: Pin,
        proviso: Proviso | None = None,
    ) -> ObjectInfo:
        """Make the record of bytes that are stored the key's. While this node was no member, nobody
        asked for its pins: then some of the bytes may be gone."""
        record = {**info.record(), "modified": time.time()}
        value = {"id": secrets.token_hex(8), "info": record, **stored}
        if "parts" in record:
            value["parts"] = record.pop("parts")

        def decide(current: Value | None) -> Value | None:
            condition.check(info_of(info.key, current) if current else None)
            if not self.node.registers.member_since(pin.epoch):
                raise S3Error("SlowDown", "This node was forgotten meanwhile. Send it again.")
            return value

        written = self._run(self.rounds.change(bucket, info.key, decide, proviso=proviso))
        return info_of(info.key, cast(Value, written))

    def copy_object(
        self, info: ObjectInfo, content: zs3.Content, bucket: str, condition: Condition
    ) -> ObjectInfo:
        """Moves no bytes."""
        assert isinstance(content, StoredContent)
        stored = {name: one for name, one in content.value.items() if name in ("blocks", "inline")}
        with self._pinned() as pin:
            self._keep(blocks_of(content.value), pin)
            return self._commit(bucket, info, stored, condition, pin)

    def _keep(self, blocks: Sequence[str], pin: Pin) -> None:
        """Have blocks where they should be, even if their last record went meanwhile; pin them."""
        pin.blocks(blocks)
        for block in self.cluster.touch(blocks):
            self.cluster.store(block, self.cluster.fetch(block))

    def delete_object(self, bucket: str, key: str, condition: Condition) -> None:
        grave = tombstone()

        def decide(current: Value | None) -> Value | None:
            condition.check(info_of(key, current) if current else None)
            return grave if current else None

        self._run(self.rounds.change(bucket, key, decide))

    def scan(self, bucket: str, prefix: str, start: str, delimiter: str) -> Iterator[ObjectInfo]:
        empty = True
        for key, head, _ in self._entries(bucket, prefix, start, delimiter, False):
            empty = False
            yield info_of(key, json.loads(head))
        if empty:
            self.stat_bucket(bucket)

    def _entries(
        self, bucket: str, prefix: str, start: str, delimiter: str, whole: bool, mark: str = ""
    ) -> Iterator[Entry]:
        """Live entries in key order; with their tails if `whole`. With a `mark`, only owners that
        have accepted that as the bucket's record are asked."""
        position: str | None = start
        while position is not None:
            fields = {
                "bucket": bucket, "prefix": prefix, "start": position, "delimiter": delimiter,
                "whole": whole, "mark": mark,
            }
            quorum = change_quorum if mark else read_quorum
            pages = self._settled_pages(bucket, fields, quorum)
            found, position = merge_pages(pages, prefix, delimiter)
            yield from found

    def _settled_pages(
        self, bucket: str, fields: Message, quorum: Callable[[int], int]
    ) -> list[Message]:
        """Pages of a quorum, and one that overrules them: what they leave in doubt, read."""
        steps = self.rounds.gather(
            "page", bucket, fields, "entries", quorum, lambda *said: not doubtful(*said)
        )
        view, answers = self._run(steps)
        read: list[list[Any]] = []
        for key in doubtful(view.groups(bucket), answers):
            value, _ = self._run(self.rounds.read(bucket, key))
            shown = head_and_tail(value) if value else ("", "")
            read.append([key, BEYOND, *shown])
        return [*answers.values(), {"entries": read, "more": False}]

    def concatenate(
        self, bucket: str, parts: Sequence[ObjectInfo], info: ObjectInfo, condition: Condition
    ) -> ObjectInfo:
        """Moves no bytes, but those of parts so small that they are inline."""
        self._check(bucket, info.key, condition)

        def proviso() -> Steps[S3Error | None]:
            # Without its first part the upload was completed or aborted meanwhile, and answered.
            value, _ = yield from self.rounds.read(UPLOADS, parts[0].key)
            return None if value else S3Error("InvalidPart")

        with self._pinned() as pin:
            stored = self._join(parts, pin)
            return self._commit(bucket, info, stored, condition, pin, proviso)

    def hold(self, bucket: str, key: str) -> contextlib.AbstractContextManager[None]:
        """Nothing: the proviso of concatenate decides, but for an Abort beside it."""
        return contextlib.nullcontext()

    def _join(self, parts: Sequence[ObjectInfo], pin: Pin) -> Value:
        """The fields of a value that say where the parts' bytes are."""
        wanted = {part.key: part.etag for part in parts}
        values: dict[str, Value] = {}
        prefix = parts[0].key.rpartition("/")[0] + "/"
        for part_key, head, tail in self._entries(UPLOADS, prefix, min(wanted), "", True):
            value = whole_value(head, tail)
            if value["info"]["etag"] == wanted.get(part_key):
                values[part_key] = value
        if len(values) < len(wanted):
            raise S3Error("InvalidPart")
        segments: list[Any] = []
        for part in parts:
            value = values[part.key]
            if value.get("inline"):
                data = inline_bytes(value)
                block = block_hash(data)
                pin.blocks([block])
                self.cluster.store(block, data)
                segments.append([len(data), block])
            segments += value.get("blocks", [])
        hashes = blocks_of({"blocks": segments})
        if len(hashes) > MAX_OBJECT_BLOCKS:
            raise S3Error("EntityTooLarge")
        self._keep(hashes, pin)
        return {"blocks": segments} if segments else {"inline": ""}

    # --- Peers' requests ---

    def internal(self, request: zs3.Request) -> zs3.Response:
        """GET of `ping`, `peers` and `providers/HASH` is for anyone; all else is for peers."""
        name, _, argument = request.path.removeprefix("/_zs3/").partition("/")
        if request.method in ("GET", "HEAD"):
            return self._open_page(name, argument)
        if request.method != "POST" or (name not in MESSAGES and name not in ("store", "fetch")):
            return json_response(404, {"error": "no such message"})
        try:
            sender, payload, mac = self.seal.check(request)
        except (S3Error, ValueError) as error:
            self._note_stranger(request.client, str(error))
            return json_response(403, {"error": str(error)})
        self.cluster.spoke(sender, name == "hello")
        if name == "hello" and self._may_be_lost(sender):
            self.seal.misled.add(sender.address)
        status, body = self._answer(name, argument, request, sender, payload)
        proves_itself = name == "fetch" and status == 200
        proof = "" if proves_itself else self.seal.proof(mac, status, body)
        return zs3.Response(status, {"x-zs3-proof": proof} if proof else {}, body)

    def _note_stranger(self, client: str, why: str) -> None:
        """Tell the operator, once, who was refused as a peer: it may have another secret."""
        if (client, why) not in self.strangers and len(self.strangers) < MAX_MEMBERS:
            self.strangers.add((client, why))
            LOG.warning("a request of %s was refused: %s", client, why)

    def _may_be_lost(self, sender: Contact) -> bool:
        """Is one of us to be looked for where it says that it is: this node, if it may give itself
        up for the sender's cluster, or the sender, if the view has it elsewhere?"""
        known = self.node.registers.view.member(sender.node)
        return known != sender if known else self.node.idle()

    def _answer(
        self, name: str, argument: str, request: zs3.Request, sender: Contact, payload: str
    ) -> tuple[int, bytes]:
        try:
            if name == "fetch":
                stored = self.node.blocks.get(text_field(HASH)(argument))
                return (404, b"") if stored is None else (200, stored)
            if name == "store":
                data = read_body(request, BLOCK_BYTES)
                need(block_hash(data) == argument, "block: it does not match its name")
                self.node.blocks.put(argument, data)
                return 200, b"{}"
            data = read_body(request, MESSAGE_BYTES)
            need(blake3(data).hexdigest() == payload, "payload hash")
            message = parse_message(name, data)
            return 200, pack(self.node.answer(name, message, sender))
        except (ValueError, RecursionError) as error:
            return 400, pack({"error": str(error)})
        except OSError as error:
            # A full or broken disk: what was asked did not happen here, the sender has other nodes.
            LOG.error("%s for %s: %s", name, sender.address, error)
            return 503, pack({"error": str(error)})

    def _open_page(self, name: str, argument: str) -> zs3.Response:
        """What anyone may see, with curl."""
        if name == "ping" and not argument:
            return json_response(200, self.status())
        if name == "peers" and not argument:
            return json_response(200, {"peers": list(map(self._peer, self.node.table.contacts()))})
        if name == "providers" and HASH.fullmatch(argument):
            return json_response(200, {"hash": argument, "providers": self._holders(argument)})
        return json_response(404, {"error": "no such page"})

    def _holders(self, block: str) -> list[list[str]]:
        """Who holds a block: members say so themselves, others have announced it."""
        found = {*self.cluster.find_providers(block)} - {self.node.own}
        if self.cluster.joined.is_set():
            there, _ = self.cluster.have([block], touch=False)
            members = self.cluster.known_view().members
            found = found.difference(members) | {c for c in members if c.node in there[block]}
        return [contact.as_json() for contact in sorted(found)]

    def _peer(self, contact: Contact) -> Message:
        member = self.node.registers.view.member(contact.node) is not None
        silent = self.cluster.peers.skipped(contact.node)
        node = node_hex(contact.node)
        return {"node": node, "address": contact.address, "member": member, "silent": silent}

    def status(self) -> Message:
        """What this node is and has done."""
        view = self.node.registers.view
        return {
            "node": node_hex(self.node.own.node), "address": self.node.own.address,
            "joined": self.cluster.joined.is_set(), "epoch": view.epoch,
            "members": len(view.members), "joining": bool(view.previous),
            "objects": self.node.registers.objects, "blocks": self.node.blocks.count,
            "bytes": self.node.blocks.total_bytes, "peers": len(self.node.table.contacts()),
            **self.counts,
        }


def json_response(status: int, body: Message) -> zs3.Response:
    """A page for curl, or a refusal."""
    return zs3.Response(status, {"Content-Type": "application/json"}, pack(body) + b"\n")


def read_body(request: zs3.Request, limit: int) -> bytearray:
    """The whole body of a peer's request. ValueError unless it has a length within `limit`."""
    declared = request.header("content-length")
    need(declared.isdecimal() and int(declared) <= limit, "length")
    data = bytearray(int(declared))
    view = memoryview(data)
    while view:
        got = request.wire.readinto(view)
        need(got, "length")
        view = view[got:]
    return data


# ===== 9 Repair, tombstones, garbage =====


class Housekeeping:
    """The jobs of one node that keep what is stored as it should be: each method without arguments
    is one bounded step of a job."""

    def __init__(self, store: DistributedStore, grace: float, tombstone_grace: float) -> None:
        self.store, self.cluster, self.node = store, store.cluster, store.node
        self.registers, self.blocks = store.node.registers, store.node.blocks
        self.grace, self.tombstone_grace = grace, tombstone_grace
        self._suspects: dict[tuple[str, float], float] = {}  # (unused block, touch time) -> since
        self._published = -REPUBLISH_SECONDS

    # --- Catching up ---

    def pull(self) -> None:
        """Take over what other owners accepted. In a joint view, note when all of it has come."""
        view = self.cluster.view()
        reached = {self.node.own.node}
        for contact in view.everybody():
            with contextlib.suppress(S3Error):  # a register cannot be decided now: next time
                if contact != self.node.own and self._pull_from(view, contact):
                    reached.add(contact.node)
        if view.previous and self.registers.synced < view.epoch:
            unreached = sum(contact.node not in reached for contact in view.previous)
            # See "Between views" in section 7. Who was not reached is fewer than any quorum, also
            # than one to read by in the view before, of whose end they may not know.
            if unreached < read_quorum(min(view.replicas, len(view.previous))):
                self._end_doubts()
                self.registers.set_synced(view.epoch)

    def _pull_from(self, view: View, contact: Contact) -> bool:
        """True when everything that `contact` has, in this view, has been seen."""
        if self.cluster.peers.skipped(contact.node):
            return False
        # A node looks at all again in a new view, since it may own other buckets.
        place = f"pulled {node_hex(contact.node)}"
        epoch, since = map(int, (self.registers.meta(place) or "0 0").split())
        since = since if epoch == view.epoch else 0
        while True:
            answer = self.cluster.call("changes", {"epoch": view.epoch, "since": since}, contact)
            if answer is None or "entries" not in answer:
                self.cluster.share_views({contact.node: answer or {}}, [contact])
                return False
            if not self._take(view, contact, answer["entries"]):
                return False
            for bucket, floor in answer["floors"].items():
                self.registers.raise_floor(bucket, floor)
            if since != answer["upto"]:
                since = answer["upto"]
                self.registers.set_meta(place, f"{view.epoch} {since}")
            if not answer["more"]:
                return True

    def _take(self, view: View, contact: Contact, entries: Sequence[Sequence[Any]]) -> bool:
        lacking: list[tuple[str, str]] = []
        agreed: list[tuple[str, str, str]] = []
        for bucket, key, accepted, chosen in entries:
            slot = self.registers.slot(bucket, key)
            if accepted > slot.accepted:
                lacking.append((bucket, key))
            elif accepted == slot.accepted and not slot.chosen:
                groups = view.groups(bucket)
                both = {contact.node, self.node.own.node}
                small = min(map(len, groups)) <= 2  # where one may have to speak alone
                if chosen or (small and covers(groups, both, change_quorum)):
                    agreed.append((bucket, key, accepted))
                elif self._is_new_owner(view, bucket):
                    known = self.registers.doubt(bucket, key, accepted, contact.node)
                    if covers(groups[1:], known, change_quorum):
                        agreed.append((bucket, key, accepted))
        self.registers.mark_chosen(agreed)
        while lacking:
            taken = self._take_values(view, contact, lacking[:BATCH])
            if not taken:
                return False
            lacking = lacking[taken:]
        return True

    def _take_values(self, view: View, contact: Contact, places: list[tuple[str, str]]) -> int:
        """Take over some registers from `contact`. Returns how many of `places` are done."""
        answer = self.cluster.call("values", {"epoch": view.epoch, "places": places}, contact)
        slots = answer.get("slots", []) if answer else []
        for place, slot in zip(places, slots, strict=False):
            if not self.registers.offer(view.epoch, *place, *slot):
                self.cluster.run(self.cluster.rounds.repair(*place))
            elif self._is_new_owner(view, place[0]):
                self.registers.doubt(*place, slot[0], contact.node)
            self.store.counts["pulled"] += 1
        return len(slots)

    def _is_new_owner(self, view: View, bucket: str) -> bool:
        """Was this node no owner of the bucket before? Then what it pulls is no vote: it made none
        of the promises by which an owner may have refused the same."""
        before = view.groups(bucket)[1:]
        return any(self.node.own.node not in ids(group) for group in before)

    def _end_doubts(self) -> None:
        """Have a round decide what was pulled and is not with a change quorum of its owners: it may
        be a change that failed, and another, unreached one be above it."""
        while places := self.registers.doubts():
            for place in places:
                self.cluster.run(self.cluster.rounds.repair(*place))
                self.registers.trust(*place)

    # --- Tombstones ---

    def bury(self) -> None:
        """Drop tombstones that are older than the grace and that every owner has. The clock only
        says when to ask. What keeps a deleted key from coming back is that no owner has anything
        older than the tombstone any more, and that all promise not to accept it (`floors`)."""
        view = self.cluster.view()
        before = time.time() - self.tombstone_grace
        self.registers.restamp()
        while self.registers.drop_promises(before) and not self.store.closing.is_set():
            pass
        for graves in self.registers.graves(before):
            if self.store.closing.is_set():
                return
            for bucket, key, _ in graves:
                if not key:
                    with contextlib.suppress(S3Error):  # no quorum: it is not buried this time
                        self._clear_out(bucket)
            everywhere = self._everywhere(view, graves)
            done = sum(self.registers.bury(*grave) for grave in everywhere)
            self.store.counts["buried"] += done

    def _clear_out(self, bucket: str) -> None:
        """Remove what is left in a bucket that is gone: puts whose outcome nobody knew."""
        for key in self.registers.live_keys(bucket):
            if self.cluster.run(self.cluster.rounds.bucket(bucket)) is None:
                self.cluster.run(self.cluster.rounds.repair(bucket, key))

    def _everywhere(self, view: View, graves: list[Grave]) -> list[Grave]:
        """Those of `graves` that all owners have."""
        lacking: set[Grave] = set()
        owners: dict[Contact, list[Grave]] = {}
        for grave in graves:
            contacts = everyone(view.groups(grave[0]))
            if any(self.cluster.peers.skipped(contact.node) for contact in contacts):
                lacking.add(grave)
                continue
            for contact in contacts:
                owners.setdefault(contact, []).append(grave)
        for contact, asked in owners.items():
            answer = self.cluster.call("buried", {"epoch": view.epoch, "graves": asked}, contact)
            said = answer.get("buried", []) if answer else []
            lacking.update(grave for grave, one in itertools.zip_longest(asked, said) if not one)
        return [grave for grave in graves if grave not in lacking]

    # --- Blocks ---

    def tend(self) -> None:
        """One walk over the blocks here: collect garbage, restore replicas, announce the rest."""
        announce = self.node.clock() - self._published > REPUBLISH_SECONDS
        walk = (block for block, _ in self.blocks.walk())
        suspects: dict[tuple[str, float], float] = {}
        freed = 0
        while batch := list(itertools.islice(walk, BATCH)):
            began = self.node.clock()
            unused = self._unused(batch)
            freed += self._collect(sorted(unused), suspects)
            used = [block for block in batch if block not in unused]
            if used:
                self._replicate(used)
            if announce:
                self._announce(used)
            worked = self.node.clock() - began
            if self.store.closing.wait(min(TEND_REST * worked, REST_SECONDS)):
                return
        self._suspects = suspects
        if announce:
            self._published = self.node.clock()
        if freed:
            LOG.info("garbage collection freed %d bytes", freed)

    def _unused(self, blocks: Sequence[str]) -> set[str]:
        """Which of the blocks no record or operation needs; none unless every node has answered. A
        quorum would do for what was acknowledged. But one silent owner may have accepted a change
        whose outcome nobody knows; the next reader that meets it there would finish it."""
        view = self.cluster.view()
        everybody = view.everybody()
        message = {"epoch": view.epoch, "hashes": blocks}
        answers = self.cluster.call_all("used", message, everybody)
        said = [answer.get("used") for answer in answers.values()]
        if len(said) < len(everybody) or None in said:
            return set()
        used = map(any, zip(*said, strict=True))
        return {block for block, needed in zip(blocks, used, strict=True) if not needed}

    def _collect(self, unused: Iterable[str], suspects: dict[tuple[str, float], float]) -> int:
        """Remove what was unused and untouched for the grace; the rest stay suspects. In bytes."""
        freed, now = 0, self.node.clock()
        for block in unused:
            touched = self.blocks.touched(block)
            if touched is None:
                continue
            since = self._suspects.get((block, touched), now)
            suspects[block, touched] = since
            if now - since > self.grace:  # if there is none, not at the first look
                size = self.blocks.remove(block, touched)
                self.store.counts["collected"] += bool(size)
                freed += size
        return freed

    def _replicate(self, blocks: list[str]) -> None:
        """Have each block on the live members nearest to it; drop a copy that is no use here."""
        view, own = self.cluster.view(), self.node.own
        touched = {block: self.blocks.touched(block) for block in blocks}  # before others are asked
        there, answered = self.cluster.have(blocks, touch=False)
        for block in blocks:
            order = self.cluster.holders(block)
            wanted = [contact for contact in order if contact.node in answered][: view.replicas]
            holding = [contact for contact in order if contact.node in there[block]]
            if holding[:1] == [own]:
                self._push(block, [contact for contact in wanted if contact not in holding])
            regular = order[: view.replicas]
            if own not in regular and all(contact in holding for contact in regular):
                self.blocks.remove(block, touched[block])

    def _push(self, block: str, contacts: Sequence[Contact]) -> None:
        data = self.blocks.get(block) if contacts else None
        if data is not None:
            count = len(contacts)
            said = self.cluster.store_out(block, data, contacts, count, count)
            self.store.counts["repairs"] += list(said.values()).count(200)

    def _announce(self, blocks: Sequence[str]) -> None:
        """Tell the nodes nearest to each block that this node holds it. (Kademlia, 2.5)"""
        wanted: dict[Contact, list[str]] = {}
        contacts = self.node.table.contacts()
        for block in blocks:
            for contact in nearest(contacts, block_target(block), CONTACTS_PER_BUCKET):
                wanted.setdefault(contact, []).append(block)
        for contact, hashes in wanted.items():
            self.cluster.call("provide", {"hashes": hashes}, contact)

    def touch_pinned(self) -> None:
        """Touch the blocks of operations under way, in case nobody can ask about our pins."""
        self.cluster.touch(self.node.pins.list())

    def scrub(self) -> None:
        """Read every block once, slowly; one that went bad is set aside and fetched anew."""
        for block, size in self.blocks.walk():
            if self.blocks.get(block) is None and not self.blocks.has(block):
                self._heal(block)
            if self.store.closing.wait(size / SCRUB_BYTES_PER_SECOND):
                return

    def _heal(self, block: str) -> None:
        try:
            self.cluster.fetch(block)
            self.store.counts["healed"] += 1
            LOG.info("block %s was healed", block)
        except S3Error as error:
            LOG.warning("block %s could not be healed: %s", block, error)


# ===== 10 Joining and discovery =====


class Membership:
    """How this node becomes and stays a member, and learns of others."""

    def __init__(
        self, store: DistributedStore, bootstrap: Iterable[str], replicas: int,
        forget_after: float = math.inf, discovering: bool = False, ordered: int | None = None,
    ) -> None:
        self.store, self.cluster, self.node = store, store.cluster, store.node
        self.registers = store.node.registers
        self.bootstrap, self.replicas, self.discovering = set(bootstrap), replicas, discovering
        self.forget_after = forget_after  # seconds of silence
        self.ordered = ordered  # whom the operator orders to forget
        self.obeyed = False
        self.reached = False  # see `_reach`
        self.discovered: set[str] = set()  # addresses, from multicast
        self.waiting = False  # it was said that no cluster can be found yet
        self.told: set[str] = set()  # addresses of which it was said that they are none of ours

    # --- Becoming a member ---

    def join(self) -> None:
        """One try to become a member, if this node is not one; or to tell a new address."""
        view = self.registers.view
        if self.node.is_copy:
            return None
        if view is NO_VIEW:
            return self._find_cluster()
        member = view.member(self.node.own.node)
        if member is None:
            self.cluster.joined.clear()  # a peer may have told it
        elif member != self.node.own and self._is_elsewhere(member.address):
            return self.cluster.joined.clear()
        if len(view.members) > 1 and not self._reach() and self.cluster.displaced:
            return self.cluster.joined.clear()
        if not self.cluster.joined.is_set() and len(view.members) > 1:
            self._look_around(view)
        if member != self.node.own or not self.cluster.joined.is_set():
            answers = self._hello_all(view)  # it may have been forgotten: first ask, then answer
            clusters = {answer["cluster"] for answer in answers.values()}
            if member is None and clusters and view.cluster not in clusters:
                # Whom it was to join has joined others meanwhile: begin anew, and meet them.
                self.cluster.young_until = time.monotonic() + 2 * DISCOVERY_SECONDS
                return self._found()
        if member != self.node.own:
            return self._enter()
        self.cluster.check_membership()
        if len(view.members) == 1:
            self._merge(view)
        else:
            self._ask_misled()

    def _is_elsewhere(self, address: str) -> bool:
        """Does a node with our id answer at `address`, where the view has it, and say that it is
        there? Then the disk was copied, and this node stays out of the cluster until it is started
        again, though the other may fall silent: two of one identity would vote twice. Who just
        moved finds nobody, somebody else, or itself."""
        answer = self._ask(address, MAX_COUNTER)  # without the views
        if answer is None or contact_field(answer["contact"]).node != self.node.own.node:
            return False
        if answer["instance"] == self.node.instance:
            return False
        advice = "Remove .node_id from one of them, and start this one again"
        self._tell(address, f"has our id: a disk was copied. {advice}")
        self.node.is_copy = True
        return True

    def _reach(self) -> bool:
        """Did this process ever answer at its own address, where the others will ask it?"""
        if not self.reached:
            answer = self._ask(self.node.own.address, MAX_COUNTER)
            self.reached = answer is not None and answer["instance"] == self.node.instance
            self.cluster.displaced = answer is not None and not self.reached
            if not self.reached:
                what = "it is another" if answer else "no answer"
                self._tell(self.node.own.address, f"should be this one (see --advertise): {what}")
        return self.reached

    def _tell(self, address: str, what: str) -> None:
        """Tell the operator, once, why a node and this one cannot be in one cluster."""
        if address not in self.told:
            self.told.add(address)
            LOG.error("the node at %s %s", address, what)

    def _look_around(self, view: View) -> None:
        """Ask at the addresses we were given, too: those in our view may be of long ago."""
        for address in self._addresses():
            answer = self._ask(address, view.epoch)
            if answer and answer["cluster"] == view.cluster:
                self._note_place(view, contact_field(answer["contact"]))
                self.cluster.adopt(answer["views"])

    def _note_place(self, view: View, found: Contact) -> None:
        """Look for a member where it was found, unless it answers where the view has it: then what
        was found is a copy of its disk, and must not vote for it."""
        member = view.member(found.node)
        if member and member != found:
            answer = self._ask(member.address, MAX_COUNTER)
            if answer is None or contact_field(answer["contact"]) != member:
                self.cluster.spoke(found)

    def _ask_misled(self) -> None:
        """Who looks for another node here may be of another cluster: `_ask` says so."""
        misled = self.store.seal.misled
        for address in list(misled):
            misled.discard(address)  # it will look again
            self._ask(address, MAX_COUNTER)

    def _addresses(self) -> list[str]:
        found = self.bootstrap | self.discovered | self.store.seal.misled
        return sorted(found - self.told - {self.node.own.address})

    def _ask(self, address: str, epoch: int = 0) -> Message | None:
        """hello to an address whose node is not known; the answer, with all views after `epoch`.
        None when no peer of ours is there."""
        answer = self.cluster.call("hello", {"epoch": epoch}, Contact(0, address))
        if answer is None:
            return None
        self.cluster.spoke(contact_field(answer["contact"]), hello=True)
        view = self.registers.view
        foreign = view.cluster and answer["cluster"] not in ("", view.cluster)
        if foreign and not answer["idle"] and not self.node.idle():
            self._tell(address, "is of another cluster with our secret: both are in use")
        views = answer["views"]
        while views and views[-1]["epoch"] < answer["epoch"]:
            after = {"epoch": views[-1]["epoch"]}
            more = self.cluster.call("hello", after, Contact(0, address))
            if not (more and more["views"]):
                return None
            views += more["views"]
        return answer

    def _find_cluster(self) -> None:
        """A fresh node: enter the cluster that others are in; found one if there is none."""
        own, fresh, silent = self.node.own, {self.node.own.node}, False
        listed = self.discovering or own.address in self.bootstrap  # do the others know this node?
        for address in self._addresses():
            answer = self._ask(address)
            if answer is None:
                silent = silent or address in self.bootstrap
            elif answer["epoch"]:
                self._install(answer)
                return self._enter()
            else:
                node = contact_field(answer["contact"]).node
                listed = listed or node == own.node  # by another name of this address
                fresh.add(node)
        if not (self.bootstrap or self.discovering):
            return self._found()  # nobody said that there are others
        # Where all are fresh, the first by id founds it: of those in the list that all were given,
        # once it has heard all of them.
        waited = time.monotonic() > self.cluster.young_until
        if listed and waited and own.node == min(fresh) and not silent:
            return self._found()
        if not self.waiting:
            where = ", ".join(self._addresses()) or "the multicast group"
            text = "waiting for a node of this cluster (with the same secret) at %s; %s"
            LOG.info(text, where, "the first of a new one is started without --bootstrap")
        self.waiting = True

    def _found(self) -> None:
        """At once, so that nobody who joins has to wait: also by a founder that lost its disk, when
        started by the same command. Members of its cluster will soon ask for the old node here
        (`Seal.misled`), and it gives itself up (`_merge`); until then it makes no bucket (`_run`).
        But if somebody joined it before, there are two clusters, and it says so (`_ask`)."""
        # No two clusters are at one epoch: by that, who was in one refuses what another says.
        epoch = 1 + secrets.randbelow(1 << 30)
        view = View(secrets.token_hex(8), epoch, self.replicas, (self.node.own,))
        self.registers.install([view])
        LOG.info("founded a cluster")
        self.cluster.check_membership()

    def _install(self, answer: Message) -> None:
        views = [View.from_json(raw) for raw in answer["views"]]
        self.registers.install(views)
        if views[-1].replicas != self.replicas:
            text = "this cluster has --replicas=%d, as it was founded: our %d counts for nothing"
            LOG.warning(text, views[-1].replicas, self.replicas)

    def _enter(self) -> None:
        """Have a view decided of which this node is a member, at its present address. Who was a
        member at this address before, under another id, lost its disk: it is replaced."""
        own = self.node.own
        if not self._reach():
            return

        def make(view: View) -> View | None:
            if view.member(own.node) == own:
                return None
            others = (c for c in view.members if c.node != own.node and c.address != own.address)
            return view.with_members([*others, own])

        self.propose(make)
        self.cluster.check_membership()

    def _merge(self, view: View) -> None:
        """A cluster of one node without a bucket gives itself up for another that it meets."""
        for address in self._addresses():
            answer = self._ask(address)
            if answer is None or answer["cluster"] in ("", view.cluster):
                newer = answer and answer["epoch"] >= view.epoch
                if answer and newer and view.as_json() not in answer["views"]:
                    self._tell(address, "and this one forgot each other: empty the folder of one")
                continue
            first = contact_field(answer["contact"]).node < self.node.own.node
            if (answer["idle"] and not first) or not self.node.idle():
                continue
            self.cluster.joined.clear()  # nothing begins now, and what has begun is soon over:
            self.store.closing.wait(MERGE_SECONDS)  # its messages may be of the others' epoch
            answer = self._ask(address)  # it may have given itself up meanwhile
            if answer is None or answer["cluster"] in ("", view.cluster):
                return self.cluster.check_membership()
            with self.registers.lock:  # a bucket may just have been made
                gives_up = self.node.idle()
                if gives_up:
                    self._install(answer)
            return self._enter() if gives_up else self.cluster.check_membership()

    # --- Views ---

    def propose(self, make: Callable[[View], View | None]) -> None:
        """Have the view decided that `make` makes of the present one, until it says None."""
        while True:
            view = self.cluster.known_view()
            after = make(view)
            if after is None:
                return
            with contextlib.suppress(StaleView):  # another view was decided meanwhile
                self._decide(view, after)
            if self.cluster.known_view().epoch == view.epoch:  # a full disk: it cannot be entered
                raise S3Error("SlowDown")

    def _decide(self, view: View, after: View) -> None:
        """Decide the view that follows `view`: `after`, or what somebody else decided already."""
        value = {"id": secrets.token_hex(8), "view": after.as_json()}
        steps = self.cluster.rounds.change(
            VIEWS, f"{after.epoch:08x}", lambda current: None if current else value,
            functools.partial(self._voters, after),
        )
        decided = cast(Value, self.cluster.run(steps))["view"]
        self.cluster.adopt([decided])
        everybody = {*view.everybody(), *View.from_json(decided).everybody()} - {self.node.own}
        views = self.registers.views_after(view.epoch - 10)
        self.cluster.tell("views", {"views": views}, sorted(everybody))

    def _voters(self, after: View, now: View) -> Groups:
        """All members; but the last of two may go on without the other when its operator orders it
        to forget that one (`--forget`): what was acknowledged, both had accepted. StaleView once
        the view is another than the one that `after` was to follow."""
        if after.epoch != now.epoch + 1:
            raise StaleView
        alone = self._left_alone(now.members) and self._is_complete(now)
        if alone and after.members == (self.node.own,):
            return ((self.node.own,),)
        groups = now.groups(VIEWS)
        if self._left_alone(now.previous) and after.member(cast(int, self.ordered)) is None:
            return only(groups, lambda contact: contact.node != self.ordered)
        return groups

    def _is_complete(self, view: View) -> bool:
        """Does this node have all that was known before this view?"""
        return not view.previous or self.registers.synced == view.epoch

    def _left_alone(self, pair: Group) -> bool:
        """Are these two this node and the one that the operator orders to forget?"""
        return len(pair) == 2 and ids(pair) == {self.node.own.node, self.ordered}

    def settle(self) -> None:
        """End a joint view when enough members have all that was known before it (section 7)."""
        view = self.cluster.view()
        if not view.previous:
            return
        asked = [c for c in view.members if not self.cluster.peers.skipped(c.node)]
        answers = self.cluster.call_all("hello", {"epoch": view.epoch}, asked)
        synced = {node for node, answer in answers.items() if answer["synced"] >= view.epoch}
        before, now = ids(view.previous), ids(view.members)
        # Where one left, others may own what they did not, unless each owned everything.
        may_be_late = before if before <= now or len(before) <= view.replicas else set()
        late, least = now - synced, read_quorum(min(view.replicas, len(now)))
        if late <= may_be_late and len(late) < least:
            stable = replace(view, epoch=view.epoch + 1, previous=())
            self.propose(lambda now: stable if now.epoch == view.epoch else None)

    def forget(self, node: int) -> None:
        """Have a view decided without `node`."""
        own = self.node.own

        def make(view: View) -> View | None:
            if view.member(node) is None:
                return None
            moved = (own if c.node == own.node else c for c in view.members)  # we may have
            after = view.with_members(c for c in moved if c.node != node)
            if node != self.ordered:
                return after
            if self._left_alone(view.members) and self._is_complete(view):  # it is gone for good
                return replace(after, previous=())
            return replace(after, previous=(own,)) if self._left_alone(view.previous) else after

        self.propose(make)
        alone = self.cluster.known_view().members == (own,)  # it may not hear of that, and serve
        advice = ": empty its folder before it is started again" if alone else ""
        LOG.warning("node %s was forgotten%s", node_hex(node), advice)

    def obey(self) -> None:
        """Forget whom the operator orders to forget, once, as a member that knows the newest view.
        Only the last of two, when it has a new address, becomes a member by this."""
        if self.ordered is None or self.obeyed:
            return
        self._hello_all(self.cluster.known_view())  # the other may be there all the same
        view = self.cluster.known_view()
        pair = ids(view.previous)
        if len(pair) == 2 and self.ordered in pair and self.node.own.node not in pair:
            other = next(c.address for c in view.previous if c.node != self.ordered)
            LOG.error("--forget: only %s can do that now: start it with this option", other)
            self.obeyed = True
            return
        before, alone = view.member(self.node.own.node), self._left_alone(view.members)
        moved = before if alone and before != self.node.own else None
        if moved is None or self._is_elsewhere(moved.address):
            view = self.cluster.view()
        if view.member(self.ordered):
            self.forget(self.ordered)
        else:
            LOG.error("--forget: no member of this cluster is %s", node_hex(self.ordered))
        self.obeyed = True

    # --- Staying one ---

    def gossip(self) -> None:
        """hello to every member: spreads views, notes who is silent, and for how long."""
        view = self.cluster.view()
        self.cluster.peers.keep({contact.address for contact in view.everybody()})
        answers = self._hello_all(view)
        # To one member alone it may be a broken link: a majority has to miss it now.
        said = [answer["silent"] for node, answer in answers.items() if view.member(node)]
        for node in self.node.silent(self.forget_after):
            if 1 + sum(node in silent for silent in said) >= change_quorum(len(view.members)):
                with contextlib.suppress(S3Error):  # no majority of the members is with us: later
                    self.forget(int(node, 16))
        self._refresh(view)

    def _hello_all(self, view: View) -> dict[int, Message]:
        contacts = [contact for contact in view.everybody() if contact.node != self.node.own.node]
        answers = self.cluster.call_all("hello", {"epoch": view.epoch}, contacts)
        for answer in answers.values():
            if answer["cluster"] == view.cluster:
                self.cluster.adopt(answer["views"])
        return answers

    def _refresh(self, view: View) -> None:
        """Keep the routing table: ping who may be gone, look up ids in silent k-buckets."""
        doubted, self.node.to_ping = self.node.to_ping, {}
        # Who does not answer is noted in the table.
        self.cluster.tell("hello", {"epoch": view.epoch}, list(doubted.values()))
        for target in self.node.table.stale(self.node.clock(), self.cluster.rounds.pick):
            self.cluster.find(target)

    def probe(self) -> None:
        """hello to members that did not answer lately, so that no client's request finds out."""
        view = self.cluster.view()
        silent = [c for c in view.everybody() if self.cluster.peers.skipped(c.node)]
        self.cluster.tell("hello", {"epoch": view.epoch}, silent)

    # --- Discovery on the local network ---

    def discover(self) -> None:
        """Tell the multicast group where this node is, with proof that it is of this cluster, and
        hear the others say so, until the store is closed."""
        text = pack(self.node.own.as_json())
        packet = self.store.seal.mark(text) + text
        due = 0.0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as group:
            join_group(group, interface_of(self.node.own.address.rpartition(":")[0]))
            group.settimeout(DISCOVERY_SECONDS / 2)
            while not self.store.closing.is_set():
                if time.monotonic() >= due:
                    due = time.monotonic() + DISCOVERY_SECONDS
                    try:
                        group.sendto(packet, DISCOVERY_GROUP)
                    except OSError as error:  # it can hear the others all the same
                        LOG.warning("this node cannot be announced: %s", error)
                # Nothing was heard, or no packet of ours.
                with contextlib.suppress(TimeoutError, ValueError):
                    self._heard_packet(group.recv(1024))

    def _heard_packet(self, packet: bytes) -> None:
        if hmac.compare_digest(self.store.seal.mark(packet[32:]), packet[:32]):
            contact = contact_field(json.loads(packet[32:]))
            if contact.node != self.node.own.node and len(self.discovered) < MAX_MEMBERS:
                self.discovered.add(contact.address)


def interface_of(host: str) -> str:
    """The IPv4 address of the interface of a host; 0.0.0.0, by which the kernel chooses, where it
    is none of this machine's: what is advertised may be a router's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):  # it is not here
            probe.bind((host, 0))
        return cast(str, probe.getsockname()[0])


def join_group(one: socket.socket, interface: str) -> None:
    """Send to the multicast group, and hear it, by that interface; on this machine, too."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
    one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    one.bind(("", DISCOVERY_GROUP[1]))
    both = socket.inet_aton(DISCOVERY_GROUP[0]) + socket.inet_aton(interface)
    one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, both)


# ===== 11 Opening =====


def lock_folder(data: Path) -> IO[str]:
    """A file whose lock keeps other processes from the data folder until it is closed: two with one
    identity would vote twice. The one that was here before may still be ending: wait for it."""
    lock = open(data / ".index" / "lock", "w", encoding="utf-8")  # noqa: SIM115 - see above
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):  # somebody has it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        if signal.sigpending() or time.monotonic() > deadline:
            advice = "give this one its own, by --data-dir"
            raise SystemExit(f"zs3: another node uses the folder {data}: {advice}")
        LOG.info("another node uses the folder %s: waiting for its end", data)
        time.sleep(LOCK_SECONDS / 10)


def has_view(registers: Path) -> bool:
    """Does this file hold a view, or something that cannot be read?"""
    try:
        with contextlib.closing(sqlite3.connect(registers)) as db:
            made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'views'").fetchone()
            return bool(made and db.execute("SELECT 1 FROM views").fetchone())
    except sqlite3.DatabaseError:  # who opens it next will say so
        return True


def node_id(data: Path) -> int:
    """This disk's identity. A new one when there is none, or when the registers that it promised by
    are gone: a node must not vote with another's amnesia."""
    path = data / ".node_id"
    if path.exists() and has_view(data / ".index" / "registers.db"):
        try:
            return int(text_field(NODE)(path.read_text().strip()), 16)
        except ValueError:
            advice = "if other nodes have what this one had, remove it, and it joins anew"
            raise SystemExit(f"zs3: no node's 40 hex digits in {path}: {advice}") from None
    node = secrets.randbits(ID_BITS)
    temporary = path.with_suffix(".new")
    temporary.write_text(node_hex(node) + "\n")
    sync(temporary)
    for old in (data / ".index").glob("registers.db*"):
        old.unlink()
    temporary.replace(path)
    return node


def option(name: str, text: str, check: Check, form: str) -> Any:
    """What an option of the command line says, checked; the end of this process if it is wrong."""
    try:
        return check(text)
    except ValueError:
        raise SystemExit(f"zs3: --{name} wants {form}, not {text}") from None


def advertised(args: argparse.Namespace) -> str:
    """The address that peers are told: --advertise, or that of the interface that we listen on."""
    if args.advertise:
        return cast(str, option("advertise", args.advertise, address_field, "HOST:PORT"))
    host = str(args.host)
    if host in ("", "0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(DISCOVERY_GROUP)  # sends nothing: asks which interface it would be
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
                LOG.warning("no network: nodes on other machines need an --advertise of this one")
    return f"[{host}]:{args.port}" if ":" in host else f"{host}:{args.port}"


def cluster_secret(args: argparse.Namespace) -> str:
    """--cluster-secret, or access key and secret of the admin who sorts first: nodes with the same
    --acl make one cluster."""
    if args.cluster_secret:
        return cast(str, args.cluster_secret)
    admins = sorted(c for c in args.credentials.values() if c.role == "admin")
    if not admins:
        raise SystemExit("zs3: distributed mode needs --cluster-secret, or an admin in --acl")
    return f"{admins[0].access}\0{admins[0].secret}"


def open_store(args: argparse.Namespace) -> DistributedStore:
    """The store of a node of a cluster, as the command line asks for it."""
    for address in args.bootstrap:
        option("bootstrap", address, address_field, "HOST:PORT")
    data = Path(args.data_dir)
    (data / ".index").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(data)
    own = Contact(node_id(data), advertised(args))
    path = data / ".index" / "registers.db"
    try:
        registers = Registers(own.node, str(path), args.fsync)
    except OSError as error:
        advice = f"if other nodes have what this one had, remove {path}*, and it joins anew"
        raise SystemExit(f"zs3: {error.strerror}: {advice}") from None
    node = Node(own, registers, Blocks(data / ".cas", args.fsync), time.monotonic)
    seal = Seal(own, cluster_secret(args))
    store = DistributedStore(Cluster(node, Peers(seal)), lock)
    add_jobs(store, args)
    return store


def add_jobs(store: DistributedStore, args: argparse.Namespace) -> None:
    """What runs in the background, and how often, which follows from --gossip-interval-ms."""
    gossip = args.gossip_interval_ms / 1000
    keep = Housekeeping(store, args.gc_grace, args.tombstone_grace)
    store.node.patience = FORGET_ROUNDS * gossip
    gone = args.forget and option("forget", args.forget, text_field(NODE), "a node's 40 hex digits")
    member = Membership(
        store, args.bootstrap, args.replicas, max(store.node.patience, args.tombstone_grace),
        args.discover, int(gone, 16) if gone else None,
    )
    store.jobs = [
        (store.node.blocks.recount, math.inf),
        (member.join, 0.5),
        (member.settle, 0.3),
        (member.gossip, gossip),
        (member.probe, 1.0),
        (keep.pull, min(PULL_SECONDS, gossip)),
        (keep.bury, min(gossip, max(args.tombstone_grace / 2, 0.2))),
        (keep.tend, min(2 * gossip, max(args.gc_grace / 2, 0.2))),
        (keep.touch_pinned, max(args.gc_grace / 3, 0.2)),
        (keep.scrub, SCRUB_ROUNDS * gossip),
    ]
    if args.discover:
        store.jobs.append((member.discover, 1.0))
    if args.forget:
        store.jobs.append((member.obey, 1.0))
