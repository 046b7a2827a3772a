"""The parts of the metagradient engine, each usable and tested alone; `dpgbench.metagrad` puts them together.

optimizers    SGD and AdamW with their vector-Jacobian products
loss          the per-example loss as a function of a dictionary of parameters
inputs        what a caller may get wrong, and the sentence that says so
derivatives   three exact ways to pull a cotangent back through the gradient of a step
memory        the budget: how many bytes a tape holds, where states are kept
parallel      the same over several processes
"""
