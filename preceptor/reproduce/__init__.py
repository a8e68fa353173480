"""The paper's experiments on the shipped worlds, each with one command (``preceptor reproduce``).

    experiment.py   what an experiment is: its steps, what it gives back
    lab.py          what it works with: runs, self-edits, evaluations of a stack, all of them resumable
    table.py        arms over seeds: accuracy, intervals, paired differences, tokens, seconds, cost
    report.py       results.json, table.md, report.html and the pictures
    knowledge.py, fewshot.py, batch.py, transfer.py, continual.py: the experiments

No torch here: whatever trains is behind the services.
"""
