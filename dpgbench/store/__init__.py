"""What is on disk: run folders, locks, checkpoints, the collected parquet, a copy of the code."""
