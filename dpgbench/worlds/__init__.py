"""What a scale is made of: models, tokenizers, prompts, held-out texts; the embedded phrasebook."""
