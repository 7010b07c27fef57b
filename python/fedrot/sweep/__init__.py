"""Experiments: many methods over a range of conditions, tuned alike, over many seeds."""
