"""How much faster a window of a large frame is decoded than the whole frame, in one run.

Frames of 1062 x 1028 uint32, ``bslz4``, with a Poisson background of 1 count; the window is 256 x
256 pixels about the middle. Eight whole frames and eight windows are decoded in turn, into buffers
that are used again, as ingest does it; the median of the turns' ratios is the figure. The limit is
the share of the blocks that the window's rows lie in: they hold whole rows, however narrow the
window is. Beside it stands the window of a frame that comes as a message of DECTRIS version 2, read
and decoded.

    python benchmarks/crop.py
    python benchmarks/crop.py --size 128 --background 0.1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from ptycho_stream.messages import EncodedImage, Frame
from ptycho_stream.wire import DectrisV2Decoder, DectrisV2Encoder
from ptycho_stream.wire.compression import decode, decode_window, encode

SHAPE = (1062, 1028)
DIFFERENT = 8


def received(decoder: DectrisV2Decoder, parts: list[bytes]) -> EncodedImage:
    (frame,) = decoder.receive(parts)
    assert isinstance(frame, Frame)
    return frame.image


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the window")
    parser.add_argument("--background", type=float, default=1.0, help="counts a pixel")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    frames = [rng.poisson(options.background, SHAPE).astype("<u4") for _ in range(DIFFERENT)]
    images = [EncodedImage(encode(f, "bslz4"), "bslz4", "<u4", SHAPE) for f in frames]
    encoder, decoder = DectrisV2Encoder(1), DectrisV2Decoder()
    messages = [encoder.frame(n, {"threshold_1": f}) for n, f in enumerate(frames)]
    size = options.size
    top, left = ((length - size) // 2 for length in SHAPE)
    window = slice(top, top + size), slice(left, left + size)
    whole, part = np.empty(SHAPE, "<u4"), np.empty((size, size), "<u4")
    seconds: dict[str, list[float]] = {"whole": [], "window": [], "message": []}
    for _ in range(options.turns):
        for name, task in (
            ("whole", lambda n: decode(images[n], whole)),
            ("window", lambda n: decode_window(images[n], window, part)),
            ("message", lambda n: decode_window(received(decoder, messages[n]), window, part)),
        ):
            took_s: list[float] = []
            for n in range(DIFFERENT):
                part[:] = 0
                begun_s = time.perf_counter()
                task(n)
                took_s.append(time.perf_counter() - begun_s)
                if name != "whole" and not np.array_equal(part, frames[n][window]):
                    raise SystemExit("the window is not what the frame has there")
            seconds[name].append(statistics.median(took_s))
    rate = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    pairs = zip(seconds["whole"], seconds["window"], strict=True)
    result = {
        "window_px": size,
        "blob_bytes": len(images[0].blob),
        "whole_frames_per_s": rate["whole"],
        "window_frames_per_s": rate["window"],
        "window_of_message_frames_per_s": rate["message"],
        "ratio": statistics.median(a / b for a, b in pairs),
        "limit": SHAPE[0] / size,
    }
    print(json.dumps({name: round(value, 2) for name, value in result.items()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
