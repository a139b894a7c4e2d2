"""The run around dql.py: command line, loop, folder, evaluation, export, released checkpoints.

command.py     what `python dql.py` does
options.py     every option, its default by task, and what is refused
loop.py        train: epochs of updates, evaluations, saves, resuming
backends.py    what makes the updates and what acts: plain torch, compiled, graphs, fused kernels
data.py        a data set to dql.Transitions, rewards tuned
evaluation.py  scores; --eval
folder.py      a run's files
export.py      --export
released.py    checkpoints of the authors' code
terminal.py    what is said: output that cannot end a run, bars, commands to paste
interrupts.py  Ctrl-C and other signals, held back where a run is not whole
scores.py      mean and standard deviation over seeds
setup.py       the device and the agents that options ask for
provenance.py  commit, versions, machine
"""
