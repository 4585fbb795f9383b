"""Throughput: attention by mask and kernel, training, data, peers, scaling. One file a benchmark.

Every figure is a median of alternating repetitions with its spread; inputs are random; what is
timed has been checked in the same run; the record says on what, with what and by which command.
"""
