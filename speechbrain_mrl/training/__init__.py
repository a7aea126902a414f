"""Training of a Matryoshka student."""
