"""The controlled task: reviews from a grammar, their known reward, and a word-level tokenizer."""
