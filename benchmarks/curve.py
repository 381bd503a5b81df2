"""What keys cost: how fast ingest takes frames with and without CurveZMQ, in turns.

The stage's process as the daemon runs it and the sender of ``benchmarks/ingest.py``: without keys
the sender binds and the stage connects; with keys the stage binds, asks for a key, decrypts, and
looks up each message's sender.  The median of the pairs' ratios is the figure.

    python benchmarks/curve.py --pairs 5 --frames 20000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from ingest import Bench

from ptycho_stream.allow_list import allow
from ptycho_stream.keys import ClientKeys, load_private_key, new_key


def keys(folder: Path) -> tuple[ClientKeys, str]:
    """Keys of the sender, and the settings that make the daemon ask for them."""
    server, client = (load_private_key(new_key(folder, name)[0]) for name in ("daemon", "sender"))
    allow(folder / "allowed-keys", "sender", client.public, ["publish"])
    settings = (
        "[viewer]\nenabled = false\n"
        '[security]\nkey_path = "daemon.key_secret"\nallowed_keys_path = "allowed-keys"\n'
    )
    return ClientKeys(client, server.public), settings


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the scans are written (deleted)")
    options = parser.parse_args()
    options.cold = False
    plain, keyed = Bench(options), Bench(options, keys)
    rates: list[tuple[float, float]] = []
    print(f"{'pair':>4} {'plain/s':>9} {'keys/s':>9} {'ratio':>6}", file=sys.stderr)
    try:
        for bench in (plain, keyed):
            bench.ingest()  # makes the files that the next ones use again
        for pair in range(options.pairs):
            now = plain.ingest()["frames_per_s"], keyed.ingest()["frames_per_s"]
            rates.append(now)
            print(f"{pair:4} {now[0]:9.0f} {now[1]:9.0f} {now[1] / now[0]:6.2f}", file=sys.stderr)
    finally:
        plain.close()
        keyed.close()
    result = {
        "frames": options.frames,
        "message_bytes": plain.message_bytes,
        "plain_frames_per_s": statistics.median(rate for rate, _ in rates),
        "keys_frames_per_s": statistics.median(rate for _, rate in rates),
        "ratio": statistics.median(keyed / plain for plain, keyed in rates),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
