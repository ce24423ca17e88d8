"""Programs that are compiled once and kept on disk. Knows JAX and disks, and no mathematics."""
