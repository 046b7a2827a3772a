"""What several tasks share: Phi of a score, pictures in weights."""
