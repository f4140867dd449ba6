"""Text, speech and tokenizers."""
