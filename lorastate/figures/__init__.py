"""The published figures 1 to 6, and pictures of everything else."""
