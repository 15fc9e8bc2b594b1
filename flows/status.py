"""`selfcascade status`: the newest runs on a store, stage by stage."""

from __future__ import annotations

from typing import Annotated

import typer

from selfcascade_flows.store_commands import Config, Debug, Set

Runs = Annotated[int, typer.Option("--runs", "-n", min=1, max=1000, help="How many runs, the newest first.")]


def status(runs: Runs = 3, config: Config = "demo", set_: Set = None, debug: Debug = False) -> None:
    """Show the newest runs: which stages were done, skipped or failed, how long they took, and where their output is."""
    from rich.console import Console
    from rich.table import Table

    from selfcascade.storage import Store
    from selfcascade_flows.configuration import load
    from selfcascade_tasks.record import earlier_records
    from selfcascade_tasks.summary import WORDS, rows_of

    settings = load(config, set_)
    console = Console(highlight=False, soft_wrap=True)
    with Store.open(settings.store, read_only=True) as store:
        records = earlier_records(store, newest=runs)
        if not records:
            console.print(f"no run has left a record in {store.uri('runs/')}")
        for record in records:
            console.print(f"run {record.run}  begun {record.started}  on {record.host.get('name', '?')}, {record.host.get('cores', '?')} cores", markup=False)
            rows = rows_of(record, settings.execution.price)
            if not rows:
                continue
            table = Table(box=None, padding=(0, 2, 0, 0))
            needed = 0
            for name in rows[0]:
                last = name == "output or error"
                number = name not in WORDS
                table.add_column(name, justify="right" if number else "left", no_wrap=not last, overflow="fold", min_width=24 if last else None)
                needed += 2 + (24 if last else max(len(name), *(len(row[name]) for row in rows)))
            console.width = max(console.width, needed)  # what does not fit runs over the edge, rather than losing its end
            for row in rows:
                table.add_row(*row.values())
            console.print(table, markup=False)
