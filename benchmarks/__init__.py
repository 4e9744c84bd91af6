"""Speed of every op against the machine's ceilings and against others; each op's file is `ops/bench_<op>.py`."""
