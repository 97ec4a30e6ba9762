"""Converts (or reverts) again and again, killed at random system calls, and each time goes on to the end.

    killer.py SOURCE TARGET REVERSE LIMIT SEED POINTS

Prints a line of JSON for each target directory: its path, and how its killed runs ended.
"""

import json
import os
import random
import sys

from kimi_vl.convert import ConversionError, convert, revert

source, target, *numbers = sys.argv[1:]
reverse, shard_bytes, seed, points = map(int, numbers)
CALLS = ("pwrite", "preadv", "replace", "fsync", "posix_fallocate", "ftruncate", "open", "unlink")


def work(directory, workers=2):
    if reverse:
        revert(source, directory, workers=workers)
    else:
        convert(source, directory, max_shard_size=shard_bytes, workers=workers)


def finish(directory, workers):
    try:
        work(directory, workers)
    except ConversionError as e:  # it was killed behind the very end
        if not any(text in str(e) for text in ("holds a converted checkpoint", "is not empty")):
            raise


def count_calls(limit):
    """Counts the calls that touch the disk, and kills this process at the one with the number `limit`."""
    count = [0]

    def wrap(call):
        def wrapped(*arguments, **options):
            count[0] += 1
            if count[0] == limit:
                os.kill(os.getpid(), 9)
            return call(*arguments, **options)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def in_a_child(limit, directory):
    """How many calls a run made, and how it ended."""
    read, write = os.pipe()
    if os.fork() == 0:
        count = count_calls(limit)
        work(directory)
        os.write(write, str(count[0]).encode())
        os._exit(0)
    _, status = os.wait()
    os.close(write)
    with open(read, "rb") as f:
        return int(f.read() or 0), os.waitstatus_to_exitcode(status)


total, _ = in_a_child(0, f"{target}-counted")
rng = random.Random(seed)
for number in range(points):
    directory = f"{target}-{number}"
    # Some are killed again while they go on.
    ends = [in_a_child(rng.randint(1, total), directory)[1] for _ in range(1 + number % 3)]
    finish(directory, workers=1 + number % 2)
    print(json.dumps([directory, ends]))
