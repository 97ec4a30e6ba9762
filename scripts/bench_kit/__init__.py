"""What the benchmarks are made of.

``bench_convert.py`` and ``bench_export.py``: `measure` runs a command and watches it, `load_all` is the conversion that one
writes in ten minutes, `ms_export` MindSpore's own export, `report` makes a table and a figure of the runs.

``bench_model.py``: `cases` are what is measured, `our_side`, `torch_side` and `llama_side` (for which `gguf_file` writes
the weights) run them, `turns` times two alternately, `costs` counts bytes and operations, `sessions` are what the
measuring processes do, `fresh` starts them, `engine_report` makes the table and the figure.
"""
