"""ptycho-stream: a ptychographic scan becomes an image while it is running.

The library of the daemon: the same functions, usable without any daemon.
"""

__version__ = "0.1.0"
