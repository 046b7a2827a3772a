"""Statistics of a comparison.

over_seeds.py: intervals and paired tests; curves.py, equal_compute.py: along compute; aggregates.py, ranks.py: over tasks and
families of tests. Numbers in, numbers out: nothing here reads files or knows what was run.
"""
