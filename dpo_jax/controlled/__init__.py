"""The embedded task: reviews with a known reward, their words, a tokenizer of words."""
