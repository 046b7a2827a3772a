"""What a label of a training example says beside a token."""

IGNORED_LABEL = -100  # the transformers convention: nothing is learned here, and nothing counts
