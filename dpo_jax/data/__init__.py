"""Reads rows of data files and turns them into arrays of tokens, with NumPy and without JAX.

From files to rows: `readers`, with `file_kinds`, `json_rows`, `csv_rows`, `arrow_rows` and
`external`. From rows to examples: `detection`, `formats`, `fields`, then `encode` with `tokenizer`
and `chat_template`; `examples` has the records. From examples to batches: `packing`,
`collate`, `lines`, `batches`. `prepared` keeps examples on disk, `preview` shows them.
"""
