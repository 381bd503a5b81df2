"""How much faster a window of a large frame is decoded than the whole frame, in one run.

Frames of 1062 x 1028 uint32, ``bslz4``, with a Poisson background of 1 count; the window is 256 x
256 pixels about the middle. Whole and window are decoded in turn into buffers that are used again,
as ingest does it; the median of the pairs' ratios is the figure. The limit is the share of the
blocks that the window's rows lie in: they hold whole rows, however narrow the window is. Beside it
stands the window of a frame that comes as a message of DECTRIS version 2, read and decoded.

    python benchmarks/crop.py
    python benchmarks/crop.py --size 128 --background 0.1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from ptycho_stream.messages import EncodedImage, Frame
from ptycho_stream.wire import DectrisV2Decoder, DectrisV2Encoder
from ptycho_stream.wire.compression import decode, decode_window, encode

SHAPE = (1062, 1028)
DIFFERENT = 8


def seconds(task: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    task()
    return time.perf_counter() - begun_s


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
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
    whole_s: list[float] = []
    window_s: list[float] = []
    message_s: list[float] = []

    def from_message(parts: list[bytes]) -> None:
        (frame,) = decoder.receive(parts)
        assert isinstance(frame, Frame)
        decode_window(frame.image, window, part)

    for pair in range(options.pairs):
        image = images[pair % DIFFERENT]
        whole_s.append(seconds(lambda image=image: decode(image, whole)))
        window_s.append(seconds(lambda image=image: decode_window(image, window, part)))
        if not np.array_equal(part, frames[pair % DIFFERENT][window]):
            raise SystemExit("the window is not what the frame has there")
        part[:] = 0
        parts = messages[pair % DIFFERENT]
        message_s.append(seconds(lambda parts=parts: from_message(parts)))
        if not np.array_equal(part, frames[pair % DIFFERENT][window]):
            raise SystemExit("the window of a message is not what the frame has there")
    result = {
        "window_px": size,
        "blob_bytes": len(images[0].blob),
        "whole_frames_per_s": 1 / statistics.median(whole_s),
        "window_frames_per_s": 1 / statistics.median(window_s),
        "window_of_message_frames_per_s": 1 / statistics.median(message_s),
        "ratio": statistics.median(a / b for a, b in zip(whole_s, window_s, strict=True)),
        "limit": SHAPE[0] / size,
    }
    print(json.dumps({name: round(value, 2) for name, value in result.items()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
