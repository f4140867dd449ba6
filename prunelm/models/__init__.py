"""The language model and the recogniser, in plain torch."""
