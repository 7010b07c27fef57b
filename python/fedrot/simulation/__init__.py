"""A whole federation on one machine: local training, rounds, runs on disk, comparisons."""
