"""Who is dead, hung or stopped: ranks watch each other, and say in one line what ended the run.

pulse.py     what each rank is doing, in a small file of its own
judge.py     from all ranks' pulses: is something wrong, and with whom
watchdog.py  the thread that looks, and ends its rank when something is
stacks.py    where every thread is, for the one who has to find out why
verdict.py   the line: rank, step, phase, cause
"""
