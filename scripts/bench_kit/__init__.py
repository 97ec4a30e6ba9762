"""What ``bench_convert.py`` is made of: `measure` runs a command and watches it, `load_all` is the conversion that one
writes in ten minutes, `report` makes a table and a figure of the runs.
"""
