"""Training: the only part of the library that imports Lightning. Run by the CLI and the daemon."""
