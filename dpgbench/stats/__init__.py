"""Statistics of a comparison.

over_seeds.py, effect_size.py: intervals, paired tests, effects; curves.py, equal_compute.py: along compute; aggregates.py, ranks.py: over
tasks; multiple_testing.py: claims on many comparisons. Numbers in, numbers out: nothing here reads files or knows what was run.
"""
