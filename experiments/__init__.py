"""What is learned: scores and samples, not speed. Figures go to runs/experiments.

    bandit            the paper's 2-D bandit: diffusion against other policies, pictures and a table
    d4rl              the paper's table: Diffusion-QL on twenty tasks, on a laptop or a cluster
    d4rl_policies     what D4RL's and DAPG's own policies earn here, beside their published returns
    learning_curves   behaviour cloning against Diffusion-QL over several seeds
    precision         does it learn as well with products in fp16 or tf32?

Each is a command: python -m experiments.NAME --help. d4rl, learning_curves and precision train with
dql.py's own command line, through runs.py: a finished run is not made again, an interrupted one is
resumed. What README and docs/ quote is committed in experiments/results; bench/folders.py says how
to replace it.
"""
