"""`laser-dist bench faults`: faults in every phase of a real run on two ranks, and what becomes of it.

table.py   the faults, each with the end that is right for it
acts.py    what they do to a process
data.py    what they do to shards, and to the server that has them
rank.py    a training rank with one fault in it
warm.py    ranks forked from one process
run.py     runs a row and judges how it ended
"""

from laser_dist.bench.faults.command import main

__all__ = ["main"]
