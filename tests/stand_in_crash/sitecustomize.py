"""A scan that kills whoever makes its image: series 666, in the reconstruct stage of a daemon."""

import os
import signal
import sys


def _install():
    from ptycho_stream.reconstruct.scan_image import ScanImage

    real = ScanImage.step

    def step(self, *arguments):
        if self.reader.header.series == "666":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)

    ScanImage.step = step


if "ptycho_streamd.reconstruct" in sys.orig_argv:
    _install()
