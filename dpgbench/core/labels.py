"""The special label value for tokens that are not trained on."""

IGNORED_LABEL = -100  # the transformers convention: nothing is learned here, and nothing counts
