"""Speed and memory of the operator beside what a user would fall back to: `python -m osdn.bench --suite cpu`.

`cases` is the registry and the correctness gate, `measure` the clock and the memory, `report` the files.
"""
