"""What runs beside a Torch network, whosever it is: hooks that record it, and the process that runs a checkpoint's own code.

Only Torch and NumPy are imported (`worker` also takes transformers), nothing of this package: `worker` runs in another
environment, where this package is not installed.
"""
