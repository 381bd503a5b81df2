"""The ptycho-stream daemon: everything with a socket, a process or a clock."""
