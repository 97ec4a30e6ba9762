"""Shared by all tests."""

import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
