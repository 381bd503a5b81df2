"""Every error that ptycho-stream raises on purpose, as one tree.

Library and daemon raise these and nothing else for faults that a user can cause or mend; each text
says what is wrong, where, and what to do next.  ::

    PtychoStreamError
    ├── SettingsError           a configuration file or option is wrong (names the key)
    │   └── KeyFileError        a key or allow-list that is missing, damaged or open to others
    ├── GeometryError           energy, distance, pixel or position that makes no sense
    ├── WireError               a message that cannot be understood
    │   ├── MalformedMessage    not the JSON, msgpack or structure that the dialect asks for
    │   ├── TornMessage         parts are missing or out of order
    │   ├── DecodeError         a blob that does not decode to what its header promises
    │   └── LimitExceeded       a length, shape, depth or count above what is accepted
    ├── StoreError              the scan store
    │   ├── ScanNotFound        no scan of that id
    │   ├── ScanLocked          another process writes this scan
    │   ├── ScanSealed          the scan is closed for writing
    │   ├── DiskFull            no room for more frames
    │   └── CorruptRecord       a record or frame whose checksum does not match
    ├── ProbeError              a probe that is missing or unusable
    ├── ModelError              a model that is missing, damaged or does not fit
    │   └── DeviceError         a GPU that is not there, or fails
    ├── TrainingError           a training job that makes no sense, or that failed
    ├── FileFormatError         a file that is not what it should be
    ├── PtychoPinnError         a value that the PtychoPINN face cannot take (a ValueError too)
    ├── MissingPackage          an extra is not installed
    ├── EndpointError           a socket that cannot be bound, reached or trusted
    │   └── KeyRefused          the other end does not let this key in, or shows none itself
    └── ControlError            the daemon refused or failed a request (``code`` says which)
"""

from __future__ import annotations


class PtychoStreamError(Exception):
    """Base of all errors that ptycho-stream raises on purpose."""


class SettingsError(PtychoStreamError):
    """A configuration file or an option is wrong; the text names each key."""


class KeyFileError(SettingsError):
    """A key file or an allow-list that is missing, damaged, or open to others."""


class GeometryError(PtychoStreamError):
    """An energy, distance, pixel size or position that makes no sense."""


class WireError(PtychoStreamError):
    """A message from outside that cannot be understood."""

    reason = "undecodable"


class MalformedMessage(WireError):
    """Not the JSON, msgpack or structure that the dialect asks for."""

    reason = "malformed"


class TornMessage(WireError):
    """Parts of a message are missing or out of order."""

    reason = "torn"


class DecodeError(WireError):
    """A blob that does not decode to what its header promises."""

    reason = "undecodable"


class LimitExceeded(WireError):
    """A length, shape, depth or count from outside above what is accepted."""

    reason = "limit"


class StoreError(PtychoStreamError):
    """The scan store cannot do what was asked."""


class ScanNotFound(StoreError):
    """No scan of that id is in the store."""


class ScanLocked(StoreError):
    """Another process writes this scan."""


class ScanSealed(StoreError):
    """The scan is closed for writing."""


class DiskFull(StoreError):
    """There is no room for more frames."""


class CorruptRecord(StoreError):
    """A record or a frame whose checksum does not match."""


class ProbeError(PtychoStreamError):
    """A probe that is missing or unusable."""


class ModelError(PtychoStreamError):
    """A model that is missing, damaged or does not fit its network."""


class DeviceError(ModelError):
    """A device that models run on is not there, or fails."""


class TrainingError(PtychoStreamError):
    """A training job that makes no sense, cannot run here, or failed."""


class FileFormatError(PtychoStreamError):
    """A file that is not what it should be."""


class PtychoPinnError(PtychoStreamError, ValueError):
    """A configuration, an argument or an array that the PtychoPINN face cannot take.

    Also a ValueError, which is what programs that speak PtychoPINN expect.
    """


class MissingPackage(PtychoStreamError):
    """Something that needs an extra of this package was asked for without it.

    Args:
        what: was asked for.
        extra: that has it.
        cause: what failed to be imported.
    """

    def __init__(self, what: str, extra: str, cause: ImportError) -> None:
        super().__init__(
            f"{what} needs a package that is not installed ({cause}): "
            f"pip install 'ptycho-stream[{extra}]'"
        )


class EndpointError(PtychoStreamError):
    """A socket that cannot be bound, reached or trusted."""


class KeyRefused(EndpointError):
    """A handshake that failed because of keys; the text says whose and what to do."""


class ControlError(PtychoStreamError):
    """The daemon refused or failed a control request.

    Attributes:
        code: one of the codes listed in ``docs/protocol.md``, for programs.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
