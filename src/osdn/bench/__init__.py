"""Speed and memory of the operator beside what a user would fall back to: `python -m osdn.bench --suite cpu` or `gpu`.

`cases` is the registry and the correctness gate, `measure` the turns and the CPU's clock and memory, `device` those of
a GPU, `gpu` the suite there, `report` the files, `bars` what a GPU's result is held against.
"""
