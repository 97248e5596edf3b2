"""The benchmark suite's engine: what ``llmfast bench`` runs.

It ships inside the package, so that everyone who installs llmfast can measure it on their own machine; a checkout's
`benchmarks/` holds the results, the log, and a pytest-benchmark view of the same cases.

    limits    what this machine can do at most, measured in the run
    harness   one case: check every provider first, then time them in turns
    memory    how much memory a call or a process needs
    cases     the ops and their sizes
    peers     how PyTorch computes them
    steps     training steps, prefill and decoding of whole models, each provider in a process of its own
    worker    what such a process does
    rows      one JSON line a case
    scale     training steps as models, sequences, batches and threads grow; the fitted trends
    tables    rows for people, in the terminal and in Markdown
    plots     rows as pictures
    report    rows to README.md
"""
