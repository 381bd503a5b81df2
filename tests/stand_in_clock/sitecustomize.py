"""A clock that tests can set: on the path of a daemon's processes it moves their wall clock.

The seconds by which it is ahead are a float64 in the file that ``PTYCHO_STREAM_TEST_CLOCK`` names;
the monotonic clock is left alone, as it is when an administrator or NTP sets the time.
"""

import mmap
import os
import struct
import time

_wall, _wall_ns = time.time, time.time_ns
with open(os.environ["PTYCHO_STREAM_TEST_CLOCK"], "rb") as _file:  # noqa: PTH123
    _ahead = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)


def _ahead_s():
    return struct.unpack_from("<d", _ahead)[0]


time.time = lambda: _wall() + _ahead_s()
time.time_ns = lambda: _wall_ns() + int(_ahead_s() * 1e9)
