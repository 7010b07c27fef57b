"""Measures the operators against plain PyTorch and against what the machine allows.

cases      problems of the sizes that people have, and sweeps over one size at a time
baselines  what users would write in plain PyTorch
floor      the least time a call can take: memory bandwidth and multiplication rate, measured
timing     forms of a computation, timed in turns
suites     what is measured: cases, stages, scaling, truncation
machine    what it was measured on
tables, pictures   what comes out
"""
