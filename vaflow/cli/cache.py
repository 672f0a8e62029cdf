"""`vaflow cache info|verify|repair`."""

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a cache, check it, mend it.")


@app.command()
def info() -> int:
    """To be written."""
    return 1


@app.command()
def verify() -> int:
    """To be written."""
    return 1
