"""Our training step beside that of TRL's ``DistillationTrainer``: the same work, timed in turns.

python -m benchmarks.speed
"""
