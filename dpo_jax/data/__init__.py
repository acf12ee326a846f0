"""From rows of files to arrays of tokens, in numpy alone."""
