"""Runnable examples; not part of the package that is installed.

Both variables are read once, when torch is loaded, so they are set before anything here imports it.
"""

import os

# Threads that wait go to sleep: spinning, they slow down a run that shares its processors with another job.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The profiler that measures memory would print its start and end to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
