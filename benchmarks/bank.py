"""Measures the reading of text without labels: ``python benchmarks/bank.py FILE ...`` prints seconds and memory."""

import os
import resource
import sys
import tempfile
import time

from l2a.data.bank import read_bank

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["L2A_CACHE"] = cache
        started = time.process_time()
        bank = read_bank(sys.argv[1:], is_pair=False)
        seconds = time.process_time() - started
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        print(f"{bank.summary}: {seconds:.1f} CPU seconds, at most {megabytes} MB")
