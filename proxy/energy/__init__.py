"""The pure core: it does no I/O and imports nothing of ours outside itself."""
