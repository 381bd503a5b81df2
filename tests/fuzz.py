"""``make fuzz``: a million mutated messages for every codec, guided by coverage where atheris is.

    python tests/fuzz.py [--runs 1000000] [CODEC ...]

Each codec runs in a process of its own, with limits on memory and on the time of 1000 messages.
A process that crashes, hangs, grows or raises what it must not ends the program with status 1, and
says how to see it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK = 1000
CHUNK_S = 60
MEMORY_BYTES = 1 << 30
"""Beyond what a process has at its start."""


def run_chunk(codec, seed: int, count: int = CHUNK) -> None:
    """A run of messages for a new decoder, good ones among them."""
    from fuzz_mutator import mutated

    rng = random.Random(f"{codec.name} {seed}")
    take = codec.make()
    for _ in range(count):
        if rng.random() < 0.05:
            take(list(rng.choice(codec.seeds)))
        else:
            take(mutated(codec.seeds, rng))


def limit_memory() -> None:
    """Let this process grow by ``MEMORY_BYTES`` and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def child(name: str, first: int, runs: int) -> None:
    """Mutate without guidance; prints the chunk that it is at."""
    from fuzz_codecs import all_codecs

    codec = all_codecs()[name]
    limit_memory()
    for seed in range(first, first + -(-runs // CHUNK)):
        print(seed, flush=True)
        signal.alarm(CHUNK_S)  # its default ends the process
        run_chunk(codec, seed)
        signal.alarm(0)


def guided_child(name: str, runs: int) -> None:
    """Mutate with atheris, which keeps what reaches code that nothing has reached before."""
    import atheris

    with atheris.instrument_imports(include=["ptycho_stream.wire", "ptycho_stream.messages"]):
        from fuzz_codecs import all_codecs
    from fuzz_mutator import mutated

    codec = all_codecs()[name]
    state = {"take": codec.make(), "count": 0}

    def one_input(data: bytes) -> None:
        state["count"] += 1
        if state["count"] % CHUNK == 0:
            state["take"] = codec.make()
        state["take"](unpacked(data))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        parts = unpacked(data)
        if parts and rng.random() < 0.5:
            at = rng.randrange(len(parts))
            parts[at] = atheris.Mutate(parts[at], min(len(parts[at]) + 64, 1 << 15))
        else:
            parts = mutated([parts, *codec.seeds] if rng.random() < 0.2 else [parts], rng)
        return packed(parts)[:max_size]

    with tempfile.TemporaryDirectory() as folder:
        for number, parts in enumerate(codec.seeds):
            (Path(folder) / str(number)).write_bytes(packed(parts))
        options = [f"-runs={runs}", "-rss_limit_mb=2048", f"-timeout={CHUNK_S}", "-max_len=65536"]
        atheris.Setup(
            ["fuzz", *options, "-verbosity=0", "-print_final_stats=1", folder],
            one_input,
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def packed(parts: list[bytes]) -> bytes:
    """Parts as one string of bytes."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def unpacked(data: bytes) -> list[bytes]:
    """The way back; whatever the bytes are."""
    parts: list[bytes] = []
    while len(data) >= 4:
        size = int.from_bytes(data[:4], "little") & 0xFFFF
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts


def fuzz(name: str, runs: int, guided: bool) -> bool:
    """Run a codec in a process of its own; whether it passed."""
    started_s = time.monotonic()
    mode = "--guided-child" if guided else "--child"
    command = [sys.executable, __file__, mode, name, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    took_s = time.monotonic() - started_s
    if done.returncode == 0:
        print(f"{name}: {runs} messages in {took_s:.0f} s", flush=True)
        return True
    chunk = (done.stdout.split() or ["?"])[-1]
    print(f"{name}: FAILED with status {done.returncode} after {took_s:.0f} s")
    print(done.stderr[-4000:])
    if not guided:
        print(f"again: python tests/fuzz.py --child {name} --first {chunk} --runs {CHUNK}")
    return False


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codecs", nargs="*", help="names; without any, all")
    parser.add_argument("--runs", type=int, default=1_000_000, help="messages a codec")
    parser.add_argument("--first", type=int, default=0, help="chunk to begin with")
    parser.add_argument("--unguided", action="store_true", help="also where atheris is installed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--guided-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.first, options.runs)
        return 0
    if options.guided_child:
        guided_child(options.guided_child, options.runs)
        return 0
    from fuzz_codecs import all_codecs

    guided = importlib.util.find_spec("atheris") is not None and not options.unguided
    print("guided by coverage" if guided else "not guided", flush=True)
    names = options.codecs or list(all_codecs())
    failed = [name for name in names if not fuzz(name, options.runs, guided)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
