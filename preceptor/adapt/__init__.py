"""Keeping what was learnt (``preceptor adapt``): a student and the passages it is to know, and what became of it.

    subject.py      the passages, the probes and the replay corpus, read and checked
    measure.py      self-edits written, raced and measured again; which of them help
    joint.py        the one update on all that helps
    table.py        before and after, with intervals
    lineage.py      the record that goes with the weights
    weights.py      the adapter and the merged student as folders

No torch here: whatever trains is behind the services, and the merge is a child process.
"""
