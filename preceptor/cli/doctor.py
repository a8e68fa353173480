"""``preceptor doctor``: what is installed, what runs, what is reachable, and what to do about it.

Every check answers with one finding or several; none raises for what it finds. A ``problem`` keeps the embedded stack
(or the one that is up) from working; a ``note`` is worth knowing.
"""

from __future__ import annotations

import click

from preceptor.cli.output import json_option

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red")}


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Checks the machine, the installation and the stack. Ends with 1 if something keeps Preceptor from working."""
    from dataclasses import asdict

    from rich.text import Text

    from preceptor.cli.checks import all_findings
    from preceptor.cli.output import print_json, print_table

    findings = all_findings()
    problems = sum(1 for finding in findings if finding.state == "problem")
    if as_json:
        print_json({"usable": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(
            ["", "what", "found", "what to do"],
            [
                [Text(MARKS[found.state][0], style=MARKS[found.state][1]), found.what, found.found, found.next_step]
                for found in findings
            ],
        )
        print(f"{problems} problem{'s' if problems > 1 else ''}" if problems else "Preceptor can be used here")
    if problems:
        context.exit(1)
