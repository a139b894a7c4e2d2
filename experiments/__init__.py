"""What is learned: scores and samples, not speed. Figures lie in experiments/results.

    bandit            the paper's 2-D bandit: diffusion against other policies, pictures and a table
    d4rl              the paper's table: Diffusion-QL on twenty tasks, on a laptop or a cluster
    learning_curves   behaviour cloning against Diffusion-QL over several seeds
    precision         does it learn as well with products in fp16 or tf32?

Each is a command: python -m experiments.NAME --help. The last three train with dql.py's own command
line, through runs.py: a finished run is not made again, an interrupted one is resumed.
"""
