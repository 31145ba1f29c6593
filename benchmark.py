#!/usr/bin/env python3
"""Measures zs3, and the S3 servers that a user would pick instead: table, ratios, JSON, picture.

    cell       one row ("GET 1KB c50") on one server. Its requests are signed beforehand, each with
               an invocation id of its own, so that no two are alike; then they are sent as fast as
               the replies come, over 1, 8 or 50 connections, for a bounded time. Every reply is
               checked. GET and HEAD go round objects that were each read once before, untimed: a
               kernel may have taken files that rested between two rounds out of memory. Before
               bodies of 1 MB and more are sent, memory is used and given back: to a virtual machine
               its host gives what rested for seconds anew, page by page, in ten times as long as
               a file is written there.
    generator  a forked process with plain sockets and epoll. Cells in which it was busy for nine
               tenths of the time carry a "*": there it may have been the limit, not the server.
    rounds     all servers run at once, and cells take turns: A B C, A B C, ... The tables show the
               median of the rounds, and half the way from the lowest to the highest in percent.
    limits     nginx serves the same files, without signatures and digests; bare-loop is Python with
               a thread for each connection that answers from memory. They are not S3 servers.

Rows are named OPERATION SIZE cCONNECTIONS, with "close" for a new connection each time. PUT signs
the SHA-256 of the body, as SDKs do over http; PUT-unsigned does not. LIST 1000of1M is pages of
1,000 of a bucket of 1,000,000 keys in one folder; FOLDERS 1000of1000x10 is the top level, with
delimiter, of 1,000 folders of 10 keys; -cold is the first request after a start. Buckets to list
are files made behind the server's back where files are objects; the others are filled by PUT for a
bounded time, and the report says how far. moto and the limits check no signatures. Linux only;
needs nothing beyond Python.

Sections: 1 Rows · 2 Requests · 3 Load generator · 4 Servers · 5 Cells · 6 Rounds · 7 Ratios
          8 Reports · 9 Command line
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import fnmatch
import gc
import hashlib
import hmac
import html
import itertools
import json
import mmap
import multiprocessing
import os
import platform
import pwd
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

# ---- 1 Rows --------------------------------------------------------------------------------------

KB, MB = 1024, 1024 * 1024
SIZES = {"1KB": KB, "64KB": 64 * KB, "1MB": MB, "64MB": 64 * MB, "256MB": 256 * MB}
STOCK = {"1KB": 2000, "64KB": 500, "1MB": 64, "64MB": 4}  # objects that GET and HEAD go round
LISTS = {  # buckets of LIST rows: folders, and keys in each; one folder is the bucket itself
    "10K": (1, 10_000), "100K": (1, 100_000), "1M": (1, 1_000_000),
    "1000x10": (1000, 10), "1000x1000": (1000, 1000),
}
MOST_BY_PUT = 100_000  # larger buckets are only listed where files are objects
PART_BYTES = 8 * MB
MOST_REQUESTS, MOST_BYTES = 15_000, 6_000 * MB  # prepared for each second: the highest rates seen
READY_BYTES = 768 * MB  # of memory, for each second of a PUT of 1 MB and more: the most seen
MOST_OPENED = 5_000  # connections that a cell opens one after the other: ports are finite
LARGE_CONNECTIONS = 8  # for 64 MB and more: fifty such bodies would be 3 GB in flight
REQUEST_SECONDS = 30  # a reply that takes longer is a failure, and the server is restarted
START_SECONDS = 60


@dataclass(frozen=True)
class Row:
    operation: str
    what: str  # of SIZES, or "<page>of<bucket>" with a bucket of LISTS
    connections: int = 1
    keep_alive: bool = True

    def __str__(self) -> str:
        name = f"{self.operation} {self.what} c{self.connections}"
        return name if self.keep_alive else f"{name} close"

    @property
    def listing(self) -> tuple[int, str] | None:
        """Page length and bucket, of a row that lists."""
        page, of, bucket = self.what.partition("of")
        return (int(page), bucket) if of else None

    @property
    def megabytes(self) -> bool:
        """Whether the rate is one of MB/s, not of requests/s."""
        moves = self.operation.startswith(("PUT", "GET", "MULTIPART"))
        return moves and SIZES[self.what] >= MB


def all_rows(connections: list[int]) -> list[Row]:
    few = [count for count in connections if count <= LARGE_CONNECTIONS]
    rows = [Row(operation, what, count)
            for what in STOCK for operation in ("PUT", "GET", "HEAD", "DELETE")
            for count in (few if what == "64MB" else connections)]
    rows += [Row("PUT-unsigned", "64MB"), *(Row("MULTIPART", "256MB", count) for count in few)]
    rows += [Row(operation, "1KB", count, keep_alive=False)
             for operation in ("PUT", "GET") for count in connections]
    rows += [Row("LIST", what, count) for count in connections for what in
             ("1000of10K", "100of100K", "1000of100K", "100of1M", "1000of1M")]
    rows += [Row(operation, what) for operation in ("FOLDERS", "FOLDERS-cold")
             for what in ("1000of1000x10", "1000of1000x1000")]
    return [*rows, Row("LIST-cold", "1000of1M")]


PRESETS = {  # patterns of row names
    "all": ["*"],
    "shows": [*(f"{operation} {size} c{count}" for operation in ("GET", "PUT", "DELETE")
                for size in ("1KB", "1MB") for count in (1, 50)),
              "GET 64MB c1", "PUT* 64MB c1", "LIST* 1000of* c1", "LIST 1000of100K c50", "FOLDERS*"],
    "quick": [*(f"{operation} 1KB c{count}" for operation in ("GET", "PUT", "DELETE")
                for count in (1, 50)),
              "GET 1MB c1", "PUT 1MB c1", "GET 64MB c1", "PUT* 64MB c1", "LIST 1000of10K c1"],
}


# ---- 2 Requests ----------------------------------------------------------------------------------

ACCESS, SECRET = f"GK{secrets.token_hex(12)}", secrets.token_hex(32)  # Garage insists on this form
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
SIGNED = "amz-sdk-invocation-id;host;x-amz-content-sha256;x-amz-date"

Request = list[bytes | memoryview]  # what to send, in order


class Endpoint(NamedTuple):
    addresses: list[tuple[str, int]]  # connections take turns among them: the nodes of a cluster
    access: str = ACCESS
    secret: str = SECRET


class Job(NamedTuple):
    """A request to be signed. `size` -1: no body. `hashed`: its SHA-256 is under the signature."""
    method: str
    target: str  # path and query in canonical form: percent-encoded, query sorted
    size: int = -1
    hashed: bool = True


class Signer:
    """Signature Version 4, in 6 us a request. One signer is good for 15 minutes."""

    def __init__(self, endpoint: Endpoint, keep_alive: bool = True) -> None:
        self.host = "{}:{}".format(*endpoint.addresses[0])
        self.date = f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%dT%H%M%SZ}"
        self.scope = f"{self.date[:8]}/us-east-1/s3/aws4_request"
        self.key = f"AWS4{endpoint.secret}".encode()
        for step in self.scope.split("/"):
            self.key = hmac.digest(self.key, step.encode(), "sha256")
        self.credential = f"{endpoint.access}/{self.scope}"
        self.connection = "keep-alive" if keep_alive else "close"
        self.serial = itertools.count(secrets.randbits(48))

    def head(self, job: Job, payload: str = EMPTY_SHA256) -> bytes:
        path, _, query = job.target.partition("?")
        serial = next(self.serial)
        canonical = (
            f"{job.method}\n{path}\n{query}\namz-sdk-invocation-id:{serial}\nhost:{self.host}\n"
            f"x-amz-content-sha256:{payload}\nx-amz-date:{self.date}\n\n{SIGNED}\n{payload}")
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{self.date}\n{self.scope}\n{digest}"
        signature = hmac.digest(self.key, text.encode(), "sha256").hex()
        length = f"Content-Length: {job.size}\r\n" if job.size >= 0 else ""
        return (
            f"{job.method} {job.target} HTTP/1.1\r\nHost: {self.host}\r\n"
            f"x-amz-date: {self.date}\r\nx-amz-content-sha256: {payload}\r\n"
            f"amz-sdk-invocation-id: {serial}\r\n"
            f"Authorization: AWS4-HMAC-SHA256 Credential={self.credential}, "
            f"SignedHeaders={SIGNED}, Signature={signature}\r\n"
            f"{length}Connection: {self.connection}\r\n\r\n").encode()

    def request(self, job: Job, body: bytes | memoryview = b"") -> Request:
        payload = hashlib.sha256(body).hexdigest() if job.hashed else "UNSIGNED-PAYLOAD"
        head = self.head(job, payload)
        return [head + body] if len(body) <= 64 * KB else [head, body]


class Bodies:
    """Random bodies, no two alike: windows into one pool, at odd distances, so that no server that
    stores equal blocks once has less to write."""

    def __init__(self) -> None:
        self.pool = memoryview(os.urandom(96 * MB))
        self.drawn = 0

    def draw(self, size: int) -> memoryview:
        self.drawn += 1
        start = self.drawn * 4099 % (len(self.pool) - size)
        return self.pool[start:start + max(0, size)]


# ---- 3 Load generator ----------------------------------------------------------------------------

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
CLOSING = re.compile(rb"\r\nconnection: *close|^HTTP/1\.0", re.I)
CHUNK_LINE = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")  # between chunks; no line of an XML reply is such
RECEIVED = memoryview(bytearray(256 * KB))  # scratch: bodies are counted, few are kept


class Wire:
    """One connection: sends a request, and knows when the reply has come whole."""

    def __init__(self, address: tuple[str, int], collect: bool, keep_alive: bool) -> None:
        self.address, self.collect, self.keep_alive = address, collect, keep_alive
        self.closing = True  # as long as it is not open

    def start(self, request: Request) -> None:
        self.began = time.perf_counter()
        if self.closing:
            self.sock = socket.socket()
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.setblocking(False)
            self.sock.connect_ex(self.address)
            self.closing = False
        self.bodiless = request[0][:5] == b"HEAD "
        self.unsent = list(request)
        self.text, self.missing = b"", 0  # missing: bytes of the body, once its length is known
        self.send()

    def send(self) -> None:
        """As much as goes; `unsent` is what is left."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                sent = self.sock.send(self.unsent[0])
                if sent == len(self.unsent[0]):
                    del self.unsent[0]
                else:
                    self.unsent[0] = memoryview(self.unsent[0])[sent:]

    def receive(self) -> bool:
        """Take what has come; True when the reply is complete."""
        count = self.sock.recv_into(RECEIVED)
        if not count:
            raise ConnectionError("closed before the reply was whole")
        if self.missing and not self.collect:
            self.missing -= count
            return self.missing == 0
        self.text += RECEIVED[:count]
        end = self.text.find(b"\r\n\r\n") + 4
        return end >= 4 and self.parse(self.text[:end], end)

    def parse(self, head: bytes, end: int) -> bool:
        self.status = head[9:12]
        self.closing = not self.keep_alive or CLOSING.search(head) is not None
        length = LENGTH.search(head)
        self.length = int(length[1]) if length else -1
        if self.bodiless or self.status == b"204":
            return True
        if length:
            self.missing = self.length - (len(self.text) - end)
            return self.missing == 0
        self.collect = True  # chunked, which only replies to LIST are, and errors
        whole = self.text.endswith(b"\r\n0\r\n\r\n")
        if whole:
            self.text = head + CHUNK_LINE.sub(b"", self.text[end - 2:])
        return whole


class Expect(NamedTuple):
    """What a good reply looks like: its length, or how often a tag stands in it."""
    length: int = -1
    tag: bytes = b""
    times: int = 0

    def fault(self, wire: Wire) -> str:
        if wire.status[:1] != b"2":
            code = re.search(rb"<Code>(\w+)", wire.text)
            return f"{wire.status.decode()} {code[1].decode() if code else ''}".strip()
        if self.length >= 0 and wire.length != self.length:
            return f"length {wire.length} instead of {self.length}"
        if self.tag and wire.text.count(self.tag) != self.times:
            return f"{wire.text.count(self.tag)} entries instead of {self.times}"
        return ""


@dataclass
class Sample:
    """What the generators saw of one cell."""
    latencies: list[float] = field(default_factory=list)  # seconds, of good replies
    elapsed: float = 0.0
    busy: float = 0.0  # share of the time in which the generator used its processor
    errors: int = 0
    fault: str = ""  # the first

    def add(self, other: Sample) -> None:
        self.latencies += other.latencies
        self.elapsed, self.busy = max(self.elapsed, other.elapsed), max(self.busy, other.busy)
        self.errors, self.fault = self.errors + other.errors, self.fault or other.fault


class Load:
    """Connections kept busy: each sends its next request when it has the reply to the last."""

    def __init__(self, endpoint: Endpoint, connections: int, expect: Expect,
                 keep_alive: bool) -> None:
        addresses = itertools.cycle(endpoint.addresses)
        self.expect = expect
        self.wires = [Wire(next(addresses), bool(expect.tag), keep_alive)
                      for _ in range(connections)]
        self.poll = select.epoll()
        self.by_number: dict[int, Wire] = {}

    def start(self, wire: Wire, request: Request) -> None:
        opening = wire.closing
        wire.start(request)
        if opening:
            self.by_number[wire.sock.fileno()] = wire
            self.poll.register(wire.sock, select.EPOLLIN)
        if wire.unsent:
            self.poll.modify(wire.sock, select.EPOLLIN | select.EPOLLOUT)

    def resume(self, wire: Wire) -> None:
        wire.send()
        if not wire.unsent:
            self.poll.modify(wire.sock, select.EPOLLIN)

    def finish(self, wire: Wire, sample: Sample) -> None:
        passed = time.perf_counter() - wire.began
        fault = self.expect.fault(wire)
        if fault:
            sample.errors, sample.fault = sample.errors + 1, sample.fault or fault
        else:
            sample.latencies.append(passed)
        if wire.closing:
            del self.by_number[wire.sock.fileno()]
            wire.sock.close()

    def run(self, requests: Iterator[Request], seconds: float) -> Sample:
        """All requests; those that have not begun after `seconds` are left out."""
        sample, waiting = Sample(), 0
        cpu, began = time.process_time(), time.perf_counter()
        for wire, request in zip(self.wires, requests, strict=False):
            self.start(wire, request)
            waiting += 1
        while waiting:
            events = self.poll.poll(REQUEST_SECONDS)
            if not events:
                raise TimeoutError("no reply")
            for number, event in events:
                wire = self.by_number[number]
                if event == select.EPOLLOUT:
                    self.resume(wire)
                elif wire.receive():
                    self.finish(wire, sample)
                    late = time.perf_counter() - began > seconds
                    following = None if late else next(requests, None)
                    if following is None:
                        waiting -= 1
                    else:
                        self.start(wire, following)
        sample.elapsed = time.perf_counter() - began
        sample.busy = (time.process_time() - cpu) / (sample.elapsed or 1)
        return sample


@dataclass(frozen=True)
class Plan:
    """A cell as its generators get it. The first `warm` jobs are not timed."""
    endpoint: Endpoint
    jobs: list[Job]
    expect: Expect
    connections: int
    seconds: float = 1e9
    keep_alive: bool = True
    warm: int = 0
    ready: int = 0  # bytes of memory to make ready


def make_ready(size: int, processes: int) -> None:
    """Use so much memory, but no more than a quarter of what is free, and give it back: the part of
    one of `processes`. In large pages: small ones would be those that were in use just now."""
    free = os.sysconf("SC_AVPHYS_PAGES") // 4 * mmap.PAGESIZE
    if pages := min(size, free) // processes // mmap.PAGESIZE:
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::mmap.PAGESIZE] = bytes(pages)
        memory.close()


def generate(plan: Plan, bodies: Bodies, share: slice, gate: Barrier, pipe: Connection) -> None:
    """A generator process: its share of the jobs, over its share of the connections."""
    gc.disable()
    try:
        signer = Signer(plan.endpoint, plan.keep_alive)
        bodies.drawn += share.start * len(plan.jobs)
        requests = [signer.request(job, bodies.draw(job.size)) for job in plan.jobs[share]]
        load = Load(plan.endpoint, len(range(plan.connections)[share]), plan.expect,
                    plan.keep_alive)
        warm = len(range(plan.warm)[share])
        load.run(iter(requests[:warm]), REQUEST_SECONDS)
        make_ready(plan.ready, share.step)
        gate.wait(REQUEST_SECONDS)
        pipe.send(load.run(iter(requests[warm:]), plan.seconds))
    except (OSError, threading.BrokenBarrierError) as error:
        gate.abort()
        pipe.send(Sample(errors=1, fault=str(error) or type(error).__name__))


def drive(plan: Plan, bodies: Bodies, generators: int = 1) -> Sample:
    """Run a plan in fresh processes, which inherit the pool of bodies."""
    shares = max(1, min(generators, plan.connections))
    fork = multiprocessing.get_context("fork")
    gate, started = fork.Barrier(shares), []
    for share in range(shares):
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=generate, daemon=True, args=(
            plan, bodies, slice(share, None, shares), gate, there))
        child.start()
        there.close()
        started.append((child, here))
    sample = Sample()
    for child, pipe in started:
        try:
            sample.add(pipe.recv())
        except EOFError:
            sample.add(Sample(errors=1, fault="the generator ended"))
        child.join()
    bodies.drawn += shares * len(plan.jobs)  # the children drew them
    return sample


def ask(endpoint: Endpoint, method: str, target: str, body: bytes = b"") -> tuple[int, str]:
    """One request outside the timing: status and body."""
    load = Load(endpoint, 1, Expect(tag=b"?"), keep_alive=False)
    job = Job(method, target, len(body))
    load.run(iter([Signer(endpoint, keep_alive=False).request(job, body)]), REQUEST_SECONDS)
    wire = load.wires[0]
    return int(wire.status), wire.text.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")


# ---- 4 Servers -----------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
CORES = os.cpu_count() or 1
SEAWEEDFS_CONFIG = json.dumps({"identities": [{
    "name": "benchmark", "credentials": [{"accessKey": "$access", "secretKey": "$secret"}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]})
GARAGE_CONFIG = """
metadata_dir = "$data/meta"
data_dir = "$data/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$free"
rpc_secret = "$secret"
[s3_api]
s3_region = "us-east-1"
api_bind_addr = "127.0.0.1:$port"
"""
NGINX_CONFIG = """
daemon off; worker_processes 1; user $user; pid $data/pid; error_log $data/error.log;
events { worker_connections 4096; }
http {
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  client_max_body_size 0; client_body_temp_path $files/.nginx;
  fastcgi_temp_path $data/1; proxy_temp_path $data/2;
  scgi_temp_path $data/3; uwsgi_temp_path $data/4;
  server {
    listen 127.0.0.1:$port; root $files;
    dav_methods PUT DELETE; create_full_put_path on;
  }
}
"""


@dataclass
class Program:
    """How a server is started. Filled in: $port; $data, a folder of its own; $files, the one that
    is shared; $config, a file with the text of `config`; $free, any free port, another each time;
    $node and $first, the node's number and the first node's port; $access, $secret, $user."""
    name: str
    executable: str
    arguments: str
    files: bool = False  # a file under $files is an object
    s3: bool = True  # has buckets and lists them
    nodes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    config: str = ""
    path: str = ""  # where it was found


ZS3 = "--host=127.0.0.1 --port=$port --acl=admin:$access:$secret --data-dir="
PROGRAMS = [
    Program("zs3", "zs3.py", f"{ZS3}$files --workers=1", files=True),
    Program(f"zs3-w{CORES}", "zs3.py", f"{ZS3}$files --workers={CORES}", files=True),
    Program("zs3-cluster", "zs3.py",
            f"{ZS3}$data/$node --distributed --bootstrap=127.0.0.1:$first", nodes=3),
    Program("rclone", "rclone", "serve s3 --addr 127.0.0.1:$port --auth-key $access,$secret $files",
            files=True),
    Program("seaweedfs", "weed",
            "-logdir=$data server -dir=$data -ip=127.0.0.1 -master.telemetry=false "
            "-master.port=$free -master.port.grpc=$free -volume.port=$free -volume.port.grpc=$free "
            "-filer -filer.port=$free -filer.port.grpc=$free "
            "-s3 -s3.port=$port -s3.port.grpc=$free "
            "-s3.localSocket=$data/s3.sock -s3.config=$config", config=SEAWEEDFS_CONFIG),
    Program("moto", "moto_server", "-H 127.0.0.1 -p $port"),
    Program("minio", "minio",
            "server --address 127.0.0.1:$port --console-address 127.0.0.1:$free $data/s3",
            environment={"MINIO_ROOT_USER": "$access", "MINIO_ROOT_PASSWORD": "$secret"}),
    Program("rustfs", "rustfs", "server --address 127.0.0.1:$port --access-key $access "
            "--secret-key $secret --console-address 127.0.0.1:$free $data/s3"),
    Program("garage", "garage", "-c $config server --single-node --default-access-key",
            config=GARAGE_CONFIG, environment={
                "GARAGE_DEFAULT_ACCESS_KEY": "$access", "GARAGE_DEFAULT_SECRET_KEY": "$secret"}),
    Program("zs3-zig", "zs3",  # without fsync, as all others here
            "--port=$port --data-dir=$data/s3 --acl=admin:$access:$secret --no-fsync"),
    Program("nginx", "nginx", "-c $config", files=True, s3=False, config=NGINX_CONFIG),
    Program("bare-loop", "benchmark.py", "--bare-loop=$port", s3=False),
]
LIMITS = ("nginx", "bare-loop")


def is_binary(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def locate(program: Program) -> str:
    """Beside this file, on the PATH, or beside this Python; "" when it is nowhere."""
    if program.executable.endswith(".py"):
        needed = [program.executable, *(["zs3_dist.py"] if program.nodes > 1 else [])]
        return str(HERE / needed[0]) if all((HERE / name).exists() for name in needed) else ""
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin"]
    found = shutil.which(program.executable, path=os.pathsep.join(folders)) or ""
    if program.name == "zs3-zig" and found and not is_binary(found):
        return ""  # ours, installed under its name
    return found


def process_tree(roots: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(roots)
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


class Usage(NamedTuple):
    """Of all processes of a server together; those that were forked share some of the memory."""
    cpu: float = 0.0  # seconds
    rss: int = 0  # KB, as all that follow but the last
    peak: int = 0
    threads: int = 0

    @classmethod
    def of(cls, roots: list[int]) -> Usage:
        total = cls()
        for pid in process_tree(roots):
            with contextlib.suppress(OSError):
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                status = Path(f"/proc/{pid}/status").read_text()
                cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
                rss, peak, threads = (
                    int(found[1]) if (found := re.search(rf"\n{name}:\s*(\d+)", status)) else 0
                    for name in ("VmRSS", "VmHWM", "Threads"))
                total = cls(total.cpu + cpu, total.rss + rss, total.peak + peak,
                            total.threads + threads)
        return total


class Server:
    """A server under measurement: one that we start and stop, or one that is running already."""

    def __init__(self, program: Program, folder: Path, endpoint: Endpoint | None = None) -> None:
        self.program, self.name = program, program.name
        self.endpoint = endpoint or Endpoint([])
        self.data, self.files = folder / program.name, folder / "files"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []  # all that were given to it
        self.stock: dict[str, list[str]] = {}  # size -> targets of the objects that are there
        self.listed: dict[str, int] = {}  # bucket of LISTS -> keys in it
        self.serial = itertools.count()  # of keys

    def free_port(self) -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.ports.append(int(sock.getsockname()[1]))
        return self.ports[-1]

    def command(self, node: int, ports: list[int]) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of one node."""
        names = {
            "port": ports[node], "first": ports[0], "node": node, "data": self.data,
            "files": self.files, "config": self.data / "config", "access": ACCESS,
            "secret": SECRET, "user": pwd.getpwuid(os.geteuid()).pw_name}

        def fill(text: str) -> str:
            text = re.sub(r"\$free\b", lambda _: str(self.free_port()), text)
            return string.Template(text).substitute(names)

        if self.program.config:
            (self.data / "config").write_text(fill(self.program.config))
        arguments = [fill(text) for text in self.program.arguments.split()
                     if node or "$first" not in text]  # the first node has nobody to join
        python = [sys.executable] if self.program.path.endswith(".py") else []
        environment = {name: fill(text) for name, text in self.program.environment.items()}
        environment["TMPDIR"] = str(self.data)
        return [*python, self.program.path, *arguments], {**os.environ, **environment}

    def start(self) -> float:
        """Seconds until every node has answered a request."""
        if not self.program.path:
            return 0.0
        self.data.mkdir(exist_ok=True)
        ports = [self.free_port() for _ in range(self.program.nodes)]
        self.endpoint = Endpoint([("127.0.0.1", port) for port in ports])
        began = time.perf_counter()
        for node in range(self.program.nodes):
            command, environment = self.command(node, ports)
            with open(self.data / "log", "ab") as log:
                self.processes.append(subprocess.Popen(
                    command, env=environment, cwd=self.data, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True))
        for address in self.endpoint.addresses:
            while not self.answers(Endpoint([address])):
                if time.perf_counter() - began > START_SECONDS or any(
                        process.poll() is not None for process in self.processes):
                    log_end = (self.data / "log").read_text(errors="replace")[-300:]
                    raise RuntimeError(f"{self.name} does not start: {log_end}")
                time.sleep(0.002)
        return time.perf_counter() - began

    def answers(self, endpoint: Endpoint) -> bool:
        with contextlib.suppress(OSError):
            return ask(endpoint, "GET", "/")[0] < 500
        return False

    def create_bucket(self, bucket: str) -> None:
        """Waits until the server can: some answer before they are able to store."""
        deadline = time.perf_counter() + START_SECONDS
        while self.program.s3:
            status, text = ask(self.endpoint, "PUT", f"/{bucket}")
            if status in (200, 409):
                return
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self.name} makes no bucket: {status} {text[:200]}")
            time.sleep(0.2)

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)  # it leads a session that was made for it
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        for port in self.ports:  # SeaweedFS leaves these, wherever TMPDIR points
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()
        self.processes, self.ports = [], []

    def restart(self) -> None:
        """After a failure, so that it does not disturb what follows."""
        self.stop()
        self.start()
        self.create_bucket("bench")
        self.stock.clear()  # some keep it in memory only

    def usage(self) -> Usage:
        return Usage.of([process.pid for process in self.processes])

    def forget_peak(self) -> None:
        """Let VmHWM begin anew (proc(5), clear_refs)."""
        for pid in process_tree([process.pid for process in self.processes]):
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def code(self) -> str:
        """How much of it there is: lines of zs3, megabytes of a binary."""
        path = Path(self.program.path)
        if path.name == "zs3.py":
            names = ["zs3.py", *(["zs3_dist.py"] if self.program.nodes > 1 else [])]
            lines = sum(path.with_name(name).read_bytes().count(b"\n") for name in names)
            return f"{lines:,} lines"
        if self.program.path and is_binary(self.program.path):
            return f"{path.stat().st_size / MB:.1f} MB"
        return "-"


def bare_loop(port: int) -> None:
    """The limit of sockets and threads in Python: no signature, no file, replies ready in memory.
    The third component of the path says how long the reply is."""
    empty = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    heads = {name.encode(): empty.replace(b"0\r", b"%d\r" % SIZES[name]) for name in STOCK}
    whole = {name: head + bytes(SIZES[name.decode()]) for name, head in heads.items()}

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        room = memoryview(bytearray(MB))
        while data := sock.recv(64 * KB):
            while (end := data.find(b"\r\n\r\n") + 4) < 4:
                data += sock.recv(64 * KB)
            length = LENGTH.search(data, 0, end)
            missing = int(length[1]) - (len(data) - end) if length else 0
            while missing > 0:
                missing -= sock.recv_into(room, min(missing, MB))
            replies = {b"GET ": whole, b"HEAD": heads}.get(data[:4], {})
            sock.sendall(replies.get(data.split(b"/", 4)[3], empty) if replies else empty)
            if CLOSING.search(data, 0, end):
                break
        sock.close()

    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


# ---- 5 Cells -------------------------------------------------------------------------------------

def list_key(bucket: str, number: int) -> str:
    """The number-th key, in order, of a bucket of LISTS."""
    folders, each = LISTS[bucket]
    return f"k{number:07}" if folders == 1 else f"d{number // each:04}/k{number % each:04}"


def list_bucket(bucket: str) -> str:
    return f"list-{bucket.lower()}"


def create_files(folder: Path, bucket: str) -> None:
    """A bucket of LISTS behind the server's back: empty files are objects."""
    folders, each = LISTS[bucket]
    top = folder / list_bucket(bucket)
    top.mkdir()
    for number in range(folders if folders > 1 else 0):
        (top / list_key(bucket, number * each)).parent.mkdir()
    here = os.open(top, os.O_RDONLY)
    for number in range(folders * each):
        os.mknod(list_key(bucket, number), dir_fd=here)
    os.close(here)


class Bench:
    """Measures cells, and keeps in stock the objects that they need."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seconds: float = options.seconds
        self.fill_seconds: float = options.fill_seconds
        self.generators: int = options.generators
        self.bodies = Bodies()

    def most(self, row: Row) -> int:
        """How many requests to prepare for one cell."""
        heavy = 6 if row.operation.startswith("PUT") else 1  # these are hashed beforehand
        limit = MOST_BYTES / heavy / SIZES[row.what] if row.operation != "HEAD" else MOST_REQUESTS
        return max(row.connections, int(self.seconds * min(MOST_REQUESTS, limit)))

    def puts(self, server: Server, row: Row, count: int) -> list[Job]:
        return [Job("PUT", f"/bench/{server.name}/{row.what}/{number % 97:02}/{number:07}",
                    SIZES[row.what], row.operation != "PUT-unsigned")
                for number in itertools.islice(server.serial, count)]

    def fill(self, server: Server, what: str, least: int, seconds: float) -> None:
        """PUT `least` objects, then as many as go in `seconds`."""
        row = Row("PUT", what, LARGE_CONNECTIONS)
        for count, limit in ((max(0, least), 1e9), (self.most(row) if seconds else 0, seconds)):
            jobs = self.puts(server, row, count)
            sample = drive(
                Plan(server.endpoint, jobs, Expect(), row.connections, limit), self.bodies)
            if sample.errors:
                raise RuntimeError(f"{row}: {sample.fault}")
            stored = jobs[:len(sample.latencies)]
            server.stock.setdefault(what, []).extend(job.target for job in stored)

    def take(self, server: Server, what: str, count: int) -> list[Job]:
        stock = server.stock[what]
        taken, stock[:] = stock[:count], stock[count:]
        return [Job("DELETE", target) for target in taken]

    def plan(self, server: Server, row: Row) -> Plan:
        """The cell's requests; the objects that they need are put in place."""
        keep, stock = STOCK[row.what], server.stock.setdefault(row.what, [])
        warm = (max(keep, row.connections) if row.operation in ("GET", "HEAD") else
                row.connections if SIZES[row.what] <= MB else 0)
        count = self.most(row) + warm
        if not row.keep_alive:
            count = min(count, MOST_OPENED)
        if row.operation.startswith("PUT"):
            jobs = self.puts(server, row, count)
        elif row.operation == "DELETE":
            self.fill(server, row.what, keep + row.connections + warm - len(stock), self.seconds)
            jobs = self.take(server, row.what, min(count, len(stock) - keep))
        else:
            self.fill(server, row.what, keep - len(stock), 0)
            jobs = [Job(row.operation, stock[number * 7919 % keep])
                    for number in range(count)]
        expect = Expect(SIZES[row.what] if row.operation in ("GET", "HEAD") else -1)
        large = row.operation.startswith("PUT") and SIZES[row.what] >= MB
        return Plan(server.endpoint, jobs, expect, row.connections, self.seconds,
                    row.keep_alive, warm, int(READY_BYTES * self.seconds) if large else 0)

    def listing_plan(self, server: Server, row: Row, page: int, bucket: str) -> Plan:
        """Pages that begin all over the bucket; or the one page after a start."""
        target, total = f"/{list_bucket(bucket)}?", server.listed[bucket]
        cold = row.operation.endswith("-cold")
        if cold:
            server.stop()
            server.start()
        count, tag = 1 if cold else int(4000 * self.seconds), b"<Key>"
        if row.operation.startswith("FOLDERS"):
            tag, total = b"<CommonPrefixes>", LISTS[bucket][0]
            queries = [f"delimiter=%2F&list-type=2&max-keys={page}"] * count
        else:
            starts = (list_key(bucket, number * 7919 % (total - page)) for number in range(count))
            queries = [f"list-type=2&max-keys={page}&start-after={start}" for start in starts]
        return Plan(server.endpoint, [Job("GET", target + query) for query in queries],
                    Expect(tag=tag, times=page), row.connections, self.seconds,
                    warm=0 if cold else row.connections)

    def fill_list(self, server: Server, bucket: str) -> None:
        """Note the files of a bucket of LISTS, or PUT its keys as long as the time for it lasts."""
        folders, each = LISTS[bucket]
        if server.program.files:
            server.listed[bucket] = folders * each
        elif folders == 1 and each <= MOST_BY_PUT:
            server.create_bucket(list_bucket(bucket))
            jobs = [Job("PUT", f"/{list_bucket(bucket)}/{list_key(bucket, number)}", 0)
                    for number in range(each)]
            sample = drive(Plan(server.endpoint, jobs, Expect(), LARGE_CONNECTIONS,
                                self.fill_seconds), self.bodies)
            server.listed[bucket] = len(sample.latencies)

    def multipart(self, server: Server, row: Row) -> Sample:
        """The time of the parts and of completing them, together."""
        target = f"/bench/{server.name}/multipart/{next(server.serial)}"
        endpoint = server.endpoint
        started = re.search("<UploadId>([^<]+)", ask(endpoint, "POST", f"{target}?uploads=")[1])
        if not started:
            return Sample(errors=1, fault="no upload id")
        upload = f"uploadId={started[1]}"
        parts = range(1, SIZES[row.what] // PART_BYTES + 1)
        jobs = [Job("PUT", f"{target}?partNumber={part}&{upload}", PART_BYTES) for part in parts]
        plan = Plan(endpoint, jobs, Expect(), row.connections, ready=READY_BYTES)
        sample = drive(plan, self.bodies)
        etags = re.findall("<ETag>([^<]+)", ask(endpoint, "GET", f"{target}?{upload}")[1])
        document = "".join(f"<Part><PartNumber>{part}</PartNumber><ETag>{etag}</ETag></Part>"
                           for part, etag in zip(parts, etags, strict=False))
        began = time.perf_counter()
        status, text = ask(endpoint, "POST", f"{target}?{upload}", (
            f"<CompleteMultipartUpload>{document}</CompleteMultipartUpload>").encode())
        elapsed = sample.elapsed + time.perf_counter() - began
        if sample.errors or status != 200 or "<Error>" in text:
            return Sample(errors=1, fault=sample.fault or f"complete: {status} {text[:100]}")
        ask(endpoint, "DELETE", target)
        return Sample([elapsed], elapsed, sample.busy)

    def cell(self, server: Server, row: Row) -> dict[str, Any] | None:
        """Measure; None when the server has no such row."""
        plan = None
        if row.listing:
            if row.listing[0] >= server.listed.get(row.listing[1], 0):
                return None
            plan = self.listing_plan(server, row, *row.listing)
        elif row.operation != "MULTIPART":
            plan = self.plan(server, row)
        elif not server.program.s3:
            return None
        os.sync()  # what others wrote must not be written out in this cell's time
        server.forget_peak()
        before = server.usage()
        sample = (drive(plan, self.bodies, self.generators) if plan
                  else self.multipart(server, row))
        after = server.usage()
        if plan and row.operation.startswith("PUT"):
            self.settle(server, row.what, plan, sample)
        if sample.errors and not sample.latencies:
            server.restart()
        return summary(row, sample, before, after, plan.warm if plan else 0)

    def settle(self, server: Server, what: str, plan: Plan, sample: Sample) -> None:
        """Take into stock what a PUT cell stored, and delete what is too much of it."""
        stock = server.stock.setdefault(what, [])
        if not sample.errors:
            stock += [job.target for job in plan.jobs[:plan.warm + len(sample.latencies)]]
        surplus = len(stock) - max(STOCK[what], 32 * MB // SIZES[what])
        if surplus > 0:
            jobs = self.take(server, what, surplus)
            drive(Plan(server.endpoint, jobs, Expect(), LARGE_CONNECTIONS), self.bodies)


def summary(row: Row, sample: Sample, before: Usage, after: Usage, warm: int) -> dict[str, Any]:
    """One cell as the JSON has it: times in ms, memory in MB."""
    ordered = sorted(sample.latencies)
    faults = {"errors": sample.errors, "fault": sample.fault}
    if not ordered:
        return faults
    count = len(ordered)
    scale = SIZES[row.what] / 1e6 if row.megabytes else 1
    usage = {"cpu": (after.cpu - before.cpu) / (count + warm) * 1000, "peak": after.peak / KB,
             "threads": after.threads}
    return {
        "rate": count * scale / sample.elapsed, "median": statistics.median(ordered) * 1000,
        "p99": ordered[min(count - 1, int(count * 0.99))] * 1000, "count": count,
        "busy": sample.busy, **faults, **(usage if after.threads else {})}


# ---- 6 Rounds ------------------------------------------------------------------------------------

class Progress:
    """A bar on stderr, when that is a terminal; notes in any case."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.perf_counter()
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str, step: int = 1) -> None:
        self.done += step
        if self.shown:
            left = (time.perf_counter() - self.began) * (self.total / max(1, self.done) - 1) / 60
            bar = ("#" * (30 * self.done // self.total)).ljust(30, ".")
            line = f"[{bar}] {self.done}/{self.total} {left:.0f} min left  {text}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\033[K", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(("\r\033[K" if self.shown else "") + text, file=sys.stderr, flush=True)


def start_ups(servers: list[Server], rounds: int, progress: Progress) -> dict[str, dict[str, Any]]:
    """Start-up times in ms and idle memory in MB, in turns. What does not start leaves the list."""
    facts: dict[str, dict[str, Any]] = {
        server.name: {"code": server.code(), "start-up": [], "idle": []} for server in servers}
    for number, server in itertools.product(range(rounds), list(servers)):
        progress(f"start {number + 1}/{rounds} {server.name}")
        if server not in servers or not server.program.path:
            continue
        try:
            facts[server.name]["start-up"].append(server.start() * 1000)
            time.sleep(0.5)
            facts[server.name]["idle"].append(server.usage().rss / KB)
        except RuntimeError as error:
            progress.note(str(error))
            servers.remove(server)
        finally:
            server.stop()
            shutil.rmtree(server.data, ignore_errors=True)
    return {server.name: facts[server.name] for server in servers}


def prepare(servers: list[Server], rows: list[Row], bench: Bench, progress: Progress) -> None:
    """Everything running, with buckets, and with keys in those that are to be listed."""
    buckets = sorted({row.listing[1] for row in rows if row.listing})
    files = [server.files for server in servers if server.program.files and server.program.s3]
    for bucket in buckets if files else []:
        progress(f"creating the files of bucket {bucket}", 0)
        create_files(files[0], bucket)
    for server in list(servers):
        progress(f"preparing {server.name}", 0)
        try:
            server.start()
            server.create_bucket("bench")
            for bucket in buckets if server.program.s3 else []:
                bench.fill_list(server, bucket)
        except (OSError, RuntimeError) as error:
            progress.note(f"{server.name} left out: {error}")
            server.stop()
            servers.remove(server)


def md5_rate() -> float:
    """MB/s of one core, of a body in memory: zeros would be one page, which no cache misses."""
    data = b"\1" * (64 * MB)
    began = time.perf_counter()
    hashlib.md5(data, usedforsecurity=False)
    return len(data) / 1e6 / (time.perf_counter() - began)


def play(servers: list[Server], rows: list[Row], bench: Bench, rounds: int, progress: Progress
         ) -> dict[str, Any]:
    """All rounds: row -> server -> a summary for each. What failed whole is not tried again."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {str(row): {} for row in rows}
    md5, dead = [], set()
    for number in range(rounds):
        progress.note(f"round {number + 1} of {rounds}")
        md5.append(md5_rate())
        for row, server in itertools.product(rows, servers):
            progress(f"round {number + 1}/{rounds} {row} {server.name}")
            if (row, server) in dead or server not in servers:
                continue
            try:
                cell = bench.cell(server, row)
            except (OSError, RuntimeError) as error:
                progress.note(f"{row} {server.name}: {error}")
                cell = {"errors": 1, "fault": str(error)}
                try:
                    server.restart()
                except (OSError, RuntimeError) as fatal:
                    progress.note(f"{server.name} given up: {fatal}")
                    servers.remove(server)
            if cell:
                cells[str(row)].setdefault(server.name, []).append(cell)
            if not cell or "rate" not in cell:
                dead.add((row, server))
    return {"md5": md5, "cells": cells}


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (f"{CORES} cores of {model[1] if model else platform.machine()}, "
            f"Linux {platform.release()}, Python {platform.python_version()}")


def measure(options: argparse.Namespace, programs: list[Program], rows: list[Row]
            ) -> dict[str, Any]:
    """The whole run. Servers are ended and folders removed whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="zs3-benchmark-", dir=options.dir))
    (folder / "files").mkdir()
    everyone = [Server(program, folder) for program in programs]
    everyone += [Server(Program(name, "", ""), folder, at) for name, at in options.server]
    servers = list(everyone)
    progress = Progress(len(servers) * options.rounds * (len(rows) + 1))
    bench = Bench(options)
    try:
        facts = start_ups(servers, options.rounds, progress)
        prepare(servers, rows, bench, progress)
        played = play(servers, rows, bench, options.rounds, progress)
    finally:
        progress("removing what was written", 0)
        for server in everyone:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        progress.note("")
    for server in everyone:
        if server.name in facts:
            facts[server.name]["listed"] = server.listed
    return {"date": f"{datetime.date.today()}", "machine": machine(), "rounds": options.rounds,
            "seconds": options.seconds, "servers": facts, **played}


# ---- 7 Ratios ------------------------------------------------------------------------------------

class Ratio(NamedTuple):
    show: int
    name: str
    values: list[float]  # one for each round: cells that were neighbours in time
    limit: float
    at_least: bool  # or else at most

    @property
    def passed(self) -> bool:
        middle = statistics.median(self.values)
        return middle >= self.limit if self.at_least else middle <= self.limit


def ours(result: dict[str, Any]) -> list[str]:
    """The standalone zs3 servers of a result."""
    return [name for name in result["servers"]
            if name.startswith("zs3") and name not in ("zs3-cluster", "zs3-zig")]


def pick(result: dict[str, Any], row: str, server: str, what: str = "rate") -> list[float]:
    """A number of each round; [] when it was not measured."""
    return [cell[what] for cell in result["cells"].get(row, {}).get(server, []) if what in cell]


def divide(left: list[float], right: list[float]) -> list[float]:
    return [a / b for a, b in zip(left, right, strict=False) if b]


def rivals(result: dict[str, Any]) -> Iterator[Ratio]:
    """1: ahead of what a user would pick instead."""
    rows = [f"{operation} {size} c{count}" for size in ("1KB", "1MB")
            for operation in ("GET", "PUT", "DELETE") for count in (1, 50)]
    rows += ["LIST 1000of100K c1", "LIST 1000of100K c50"]
    for row, other, name in itertools.product(rows, ("rclone", "seaweedfs", "moto"), ours(result)):
        values = divide(pick(result, row, name), pick(result, row, other))
        yield Ratio(1, f"{row}: {name} / {other}", values, 1.0, True)


def ceilings(result: dict[str, Any]) -> Iterator[Ratio]:
    """2: near what sockets, files and MD5 allow."""
    for name in ours(result):
        for row, limit, least in (("GET 1KB c1", "bare-loop", 0.30), ("GET 64MB c1", "nginx", 0.8)):
            values = divide(pick(result, row, name), pick(result, row, limit))
            yield Ratio(2, f"{row}: {name} / {limit}", values, least, True)
        for row in ("PUT 64MB c1", "PUT-unsigned 64MB c1"):
            values = divide(pick(result, row, name), result["md5"])
            yield Ratio(2, f"{row}: {name} / MD5 of one core", values, 0.8, True)


def tails(result: dict[str, Any]) -> Iterator[Ratio]:
    """3: no request waits for many others."""
    for name, size, operation in itertools.product(ours(result), STOCK, ("GET", "PUT")):
        row = f"{operation} {size} c50"
        values = divide(pick(result, row, name, "p99"), pick(result, row, name, "median"))
        yield Ratio(3, f"{row}: {name}, p99 / median", values, 5, False)


def listings(result: dict[str, Any]) -> Iterator[Ratio]:
    """4: a page costs what it shows, not what the bucket holds. To walk the folders of 1000x1000
    would take a hundred times as long as to walk those of 1000x10."""
    for name in ours(result):
        def median(row: str, name: str = name) -> list[float]:
            return pick(result, f"{row} c1", name, "median")

        yield Ratio(4, f"LIST 1000: {name}, of 1M / of 10K",
                    divide(median("LIST 1000of1M"), median("LIST 1000of10K")), 1.3, False)
        yield Ratio(4, f"LIST-cold 1000of1M: {name}, seconds",
                    [value / 1000 for value in median("LIST-cold 1000of1M")], 3, False)
        for row in ("FOLDERS", "FOLDERS-cold"):
            values = divide(median(f"{row} 1000of1000x1000"), median(f"{row} 1000of1000x10"))
            yield Ratio(4, f"{row}: {name}, of 1000x1000 / of 1000x10", values, 10, False)


def ratios(result: dict[str, Any]) -> list[Ratio]:
    every = itertools.chain(rivals(result), ceilings(result), tails(result), listings(result))
    return [ratio for ratio in every if ratio.values]


# ---- 8 Reports -----------------------------------------------------------------------------------

def short(value: float) -> str:
    """About three digits: 0.123, 12.3, 1230, 12.3k."""
    if value >= 10 * KB:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """Half the distance from lowest to highest, in percent of the median."""
    middle = statistics.median(values)
    return f"±{50 * (max(values) - min(values)) / middle if middle else 0:.0f}%"


def entry(values: list[float], marks: str = "") -> str:
    return f"{short(statistics.median(values))} {spread(values)}{marks}" if values else "-"


def print_table(title: str, rows: list[list[str]]) -> None:
    """The first row is the heading; the first column has the names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) if place else text.ljust(width)
                       for place, (text, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]
    print(f"\n{title}", lines[0], "-" * len(lines[0]), *lines[1:], sep="\n")


def cell_text(cells: list[dict[str, Any]], what: str) -> str:
    values = [cell[what] for cell in cells if what in cell]
    faulty = any(cell["errors"] for cell in cells)
    if faulty and not values:
        return "failed!"
    busy = what == "rate" and any(cell.get("busy", 0) > 0.9 for cell in cells)
    return entry(values, "*" * busy + "!" * faulty)


def print_cells(result: dict[str, Any]) -> None:
    names = list(result["servers"])
    megabytes = {str(row) for row in all_rows([1, 8, 50]) if row.megabytes}
    for what, title in (
            ("rate", "Throughput, requests/s or MB/s"), ("median", "Median latency, ms"),
            ("p99", "99th percentile of latency, ms"), ("cpu", "Server CPU, ms a request"),
            ("peak", "Peak memory, MB")):
        rows = [["", *names]]
        for row, servers in result["cells"].items():
            unit = " MB/s" if what == "rate" and row in megabytes else ""
            texts = [cell_text(servers.get(name, []), what) for name in names]
            rows.append([row + unit, *texts])
        print_table(title, rows)
    print("\n* the load generator may have been the limit   ! some replies were wrong")
    for row, servers in result["cells"].items():
        for name, cells in servers.items():
            for fault in sorted({cell["fault"] for cell in cells if cell["errors"]}):
                print(f"! {row} {name}: {fault}")
    for name, facts in result["servers"].items():
        for bucket, count in facts["listed"].items():
            if count < LISTS[bucket][0] * LISTS[bucket][1]:
                print(f"{name}: bucket {bucket} was filled by PUT, {count:,} keys in the time")


def report(result: dict[str, Any]) -> None:
    print(f"{result['date']}: {result['machine']}; {result['rounds']} rounds, "
          f"{result['seconds']} s a cell; MD5 of one core {entry(result['md5'])} MB/s")
    print_table("Servers: time to the first answer, resident memory of all processes", [
        ["", "start-up ms", "idle MB", "code"],
        *([name, entry(facts["start-up"]), entry(facts["idle"]), facts["code"]]
          for name, facts in result["servers"].items())])
    print_cells(result)
    found = ratios(result)
    if found:
        passed = sum(ratio.passed for ratio in found)
        print_table(f"Ratios, round by round: {passed} of {len(found)} as wanted", [
            ["", "median", "spread", "wanted", ""], *(
            [f"{ratio.show}  {ratio.name}", f"{statistics.median(ratio.values):.2f}",
             spread(ratio.values), f"{'>=' if ratio.at_least else '<='} {ratio.limit:g}",
             "pass" if ratio.passed else "FAIL"] for ratio in found)])


PANELS = [  # title, row and what of it, or a fact of the server; drawn when it was measured
    ("GET 1 KB, 1 connection: requests/s", "GET 1KB c1", "rate"),
    ("GET 1 KB, 50 connections: requests/s", "GET 1KB c50", "rate"),
    ("GET 1 KB, c50: p99 in ms, less is better", "GET 1KB c50", "p99"),
    ("PUT 1 KB, 1 connection: requests/s", "PUT 1KB c1", "rate"),
    ("PUT 1 KB, 50 connections: requests/s", "PUT 1KB c50", "rate"),
    ("PUT 1 KB, c50: p99 in ms, less is better", "PUT 1KB c50", "p99"),
    ("PUT 64 MB, 1 connection: MB/s", "PUT 64MB c1", "rate"),
    ("GET 64 MB, 1 connection: MB/s", "GET 64MB c1", "rate"),
    ("LIST, 1,000 of 100,000 keys: pages/s", "LIST 1000of100K c1", "rate"),
    ("DELETE, 50 connections: requests/s", "DELETE 1KB c50", "rate"),
    ("Memory when idle, MB, less is better", "", "idle"),
    ("Start-up, ms, less is better", "", "start-up"),
]
STYLE = """<style>text { font: 12px system-ui, sans-serif; fill: #1f2937 }
.title { font-weight: 600 } .name { text-anchor: end } .foot { fill: #6b7280 }
.ours { fill: #d97706 } .other { fill: #64748b } .limit { fill: #cbd5e1 }</style>"""
PANEL_WIDTH, BAR_WIDTH, BAR_STEP = 320, 160, 18


def panel(x: int, y: int, title: str, values: dict[str, float]) -> str:
    """SVG of one bar for each server, one below the other."""
    top = max(values.values()) or 1.0
    lines = [f'<text class="title" x="{x}" y="{y}">{html.escape(title)}</text>']
    for place, (name, value) in enumerate(values.items()):
        at = y + 10 + BAR_STEP * place
        kind = ("limit" if name in LIMITS
                else "ours" if name.startswith("zs3") and name != "zs3-zig" else "other")
        width = max(1.0, BAR_WIDTH * value / top)
        lines.append(
            f'<text class="name" x="{x + 82}" y="{at + 11}">{html.escape(name)}</text>'
            f'<rect class="{kind}" x="{x + 88}" y="{at}" width="{width:.1f}" height="14" rx="2"/>'
            f'<text x="{x + 93 + width:.1f}" y="{at + 11}">{short(value)}</text>')
    return "\n".join(lines)


def picture(result: dict[str, Any]) -> str:
    """An SVG: panels, three in a row. Light grey bars are limits, not S3 servers."""
    charts = []
    for title, row, what in PANELS:
        found = {name: pick(result, row, name, what) if row else facts[what]
                 for name, facts in result["servers"].items() if row or name not in LIMITS}
        values = {name: statistics.median(numbers) for name, numbers in found.items() if numbers}
        if values:
            charts.append((title, values))
    height = BAR_STEP * len(result["servers"]) + 40
    panels = [panel(20 + PANEL_WIDTH * (number % 3), 30 + height * (number // 3), title, values)
              for number, (title, values) in enumerate(charts)]
    bottom = 30 + height * -(-len(charts) // 3)
    foot = html.escape(f"{result['machine']}; benchmark.py, {result['date']}, median of "
                       f"{result['rounds']} rounds. Light grey: limits, not S3 servers.")
    body = "\n".join(panels)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {bottom + 10}">{STYLE}\n'
            f'<rect width="100%" height="100%" rx="8" fill="#fff"/>\n{body}\n'
            f'<text class="foot" x="20" y="{bottom - 4}">{foot}</text></svg>\n')


# ---- 9 Command line ------------------------------------------------------------------------------

def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def running(text: str) -> tuple[str, Endpoint]:
    """NAME=URL,ACCESS,SECRET"""
    name, _, rest = text.partition("=")
    url, access, secret = rest.split(",")
    host, _, port = url.partition("://")[2].rstrip("/").partition(":")
    return name, Endpoint([(host, int(port or 80))], access, secret)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--servers", type=names, default=["*"], metavar="NAMES",
        help="patterns, of: " + ", ".join(program.name for program in PROGRAMS)
        + " (default: all that are installed)")
    add("--program", type=lambda text: text.split("=", 1), action="append", default=[],
        metavar="NAME=PATH", help="where a program is; a new name is another zs3.py, to compare")
    add("--server", type=running, action="append", default=[], metavar="NAME=URL,ACCESS,SECRET",
        help="one more, that is running already; http only; what is stored there stays")
    add("--preset", choices=list(PRESETS), default="all", help="which rows (default: all)")
    add("--rows", type=names, metavar="NAMES", help="patterns of rows, instead of a preset")
    add("--connections", default="1,8,50", metavar="N,N,...", help="default: 1,8,50")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--seconds", type=float, default=1.0, help="most that a cell lasts (default: 1)")
    add("--fill-seconds", type=float, default=20.0, help="to fill a bucket by PUT (default: 20)")
    add("--quick", action="store_true",
        help="--preset=quick --rounds=3 --seconds=0.3 --fill-seconds=3")
    add("--generators", type=int, default=max(1, CORES // 4), metavar="N",
        help="processes that send (default: one for four cores)")
    add("--dir", metavar="FOLDER", help="where the servers' data goes (default: as for all tools)")
    add("--json", metavar="FILE", help="write all results")
    add("--picture", metavar="FILE.svg", help="draw the main rows")
    add("--report", metavar="FILE", help="measure nothing; show the results in a --json file")
    add("--list", action="store_true", help="measure nothing; show servers and rows chosen")
    add("--bare-loop", type=int, metavar="PORT", help=argparse.SUPPRESS)
    return parser


def chosen(options: argparse.Namespace) -> tuple[list[Program], list[Row]]:
    """Programs that are wanted and there, rows that are wanted."""
    paths = dict(options.program)
    programs = list(PROGRAMS)
    for name in paths.keys() - {program.name for program in PROGRAMS}:
        programs.insert(1, dataclasses.replace(PROGRAMS[0], name=name))
    for program in programs:
        given = paths.get(program.name)
        program.path = str(Path(given).resolve()) if given else locate(program)

    def wanted(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    rows = all_rows([int(text) for text in names(options.connections)])
    patterns = options.rows or PRESETS[options.preset]
    return ([program for program in programs
             if program.path and wanted(program.name, options.servers)],
            [row for row in rows if wanted(str(row), patterns)])


def interrupted(number: int, _: object) -> None:
    sys.exit(128 + number)  # by way of the clean-up


def main() -> None:
    options = arguments().parse_args()
    if options.bare_loop:
        bare_loop(options.bare_loop)
    if options.quick:
        options.preset, options.rounds = "quick", 3
        options.seconds, options.fill_seconds = 0.3, 3.0
    programs, rows = chosen(options)
    if options.list:
        print_table("Servers", [["", ""], *([program.name, program.path] for program in programs)])
        print_table("Rows", [["", ""], *([str(row), ""] for row in rows)])
        return
    signal.signal(signal.SIGTERM, interrupted)
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    result = (json.loads(Path(options.report).read_text()) if options.report
              else measure(options, programs, rows))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        Path(options.picture).write_text(picture(result))
    report(result)


if __name__ == "__main__":
    main()
