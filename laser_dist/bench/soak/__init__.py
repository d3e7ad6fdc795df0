"""`laser-dist bench soak`: one run that is struck again and again, and what it came to.

strikes.py   what strikes, and the end that is right for each
rank.py      a training rank that takes its time, and strikes itself when it is asked to
job.py       one start of `laser-dist launch`
run.py       starts jobs, strikes them at random times, and follows what becomes of it
judge.py     weights, losses, ledger and verdicts, held to a run that nothing struck
"""

from laser_dist.bench.soak.command import main

__all__ = ["main"]
