"""The command line beside pytest's: subjects with weights and completions, figures, the atlas, and what moved."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lab.errors import UserError
from lab.snapshots.command import drift
from lab.subjects import fetching, weights
from lab.subjects.catalog import catalog, facts
from lab.subjects.facts import Facts, Hub
from lab.subjects.uncatalogued import named_model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Beside `pytest findings`: subjects and their weights, figures of what was found, the atlas, what moved.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A catalogued subject, a folder, a .gguf file or a hub id.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Subjects, folders, .gguf files or hub ids.")]

#: columns of a table that goes to a file or a pipe, where there is no terminal to fit it into
PIPE_WIDTH = 200


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a UserError becomes one red line on stderr and exit code 2."""
    # torchao, which Transformers imports where it is installed, warns here about its own enums.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        app(args=arguments)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise SystemExit(2) from None


@app.callback()
def _root() -> None:
    # With a callback Typer keeps command names even while there is one command only.
    pass


@app.command()
def subjects() -> None:
    """List the catalog: architecture, size, licence, source, and whether the weights are here."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("subject", "architecture", "layers", "parameters", "download", "weights", "licence", "source"):
        right = heading in ("layers", "parameters", "download")
        squeezed = heading in ("licence", "source")
        table.add_column(heading, justify="right" if right else "left", no_wrap=not squeezed, overflow="fold")
    for subject in catalog().values():
        table.add_row(*_row(subject))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(table)
    console.print("* the default; [bold]python -m lab fetch NAME[/] brings weights here", highlight=False)


@app.command()
def fetch(names: Names) -> None:
    """Bring weights here: download, check against the pinned digest, convert to safetensors."""
    for subject in [resolve(name) for name in names]:
        folder = _fetch(subject)
        Console(soft_wrap=True).print(f"{subject.name}: {folder}", highlight=False)


@app.command()
def complete(
    name: Name,
    generator: Annotated[Literal["vllm", "transformers"], typer.Option(help="What generates.")] = "vllm",
    max_tokens: Annotated[int, typer.Option(help="Longest completion, end token included.")] = 128,
    output: Annotated[
        Path | None, typer.Option(help="File to write (default: the committed one; for other models, the cache).")
    ] = None,
    device: Annotated[str, typer.Option(help="Where Transformers generates and the answers are checked.")] = "cpu",
) -> None:
    """Let a subject answer the prompt set, greedily, and save what it says."""
    from lab.corpora import completions, on_the_spot

    subject = resolve(name)
    folder = weights.required_location(subject)
    console = Console(soft_wrap=True)
    saved = completions.complete(
        subject,
        folder,
        output or on_the_spot.new_path(subject, folder),
        generator=generator,
        max_tokens=max_tokens,
        report=lambda line: console.print(escape(line), highlight=False),
        device=device,
    )
    console.print(f"{subject.name}: {saved}", highlight=False)


@app.command()
def figure(
    name: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="An experiment's name, or an agenda id such as T-2.")
    ],
    subject: Annotated[
        list[str] | None, typer.Option(help="A subject to draw; repeatable (default: all that are recorded).")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .svg, .png or .pdf file.")] = None,
) -> None:
    """Draw an experiment's figure from the committed snapshots."""
    from lab.report import commands

    for path in commands.draw(name, subject or [], output or Path(f"{name}.svg")):
        Console(soft_wrap=True).print(str(path), highlight=False, markup=False)


@app.command()
def report(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the site.")] = Path("results/atlas"),
    verdicts: Annotated[Path | None, typer.Option(help="Results of a fresh run, of pytest --verdicts FILE.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Write the results into this README, and no site.")] = None,
) -> None:
    """Write the atlas, a static site of claims and subjects, from the committed snapshots."""
    from lab.report import commands

    console = Console(soft_wrap=True)
    if readme is not None:
        for path in commands.update_readme(readme):
            console.print(str(path), highlight=False, markup=False)
        return
    page, size = commands.report(output, verdicts)
    console.print(f"{page} ({size / 1e6:.1f} MB)", highlight=False, markup=False)


@app.command()
def train(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Specimens, or sets of them such as spectral-peft.")
    ],
    device: Annotated[str, typer.Option(help="Where they are trained.")] = "cpu",
    again: Annotated[bool, typer.Option("--again", help="Train those that are here, too.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A new folder for the whole model that one specimen makes, adapter merged.")
    ] = None,
) -> None:
    """Make specimens: adapters with a recipe in data/specimens/recipes.toml. Minutes to hours on a CPU."""
    from lab.training import sets

    named = [one for name in names for one in sets.members(name)]
    if checkpoint is not None and len(named) != 1:
        raise UserError("--checkpoint writes one model; name one specimen")
    console = Console(soft_wrap=True)
    for path in sets.train(names, device, lambda line: console.print(line, highlight=False, markup=False), again=again):
        console.print(str(path), highlight=False, markup=False)
    if checkpoint is not None:
        from lab.training.checkpoints import write_checkpoint

        path = write_checkpoint(named[0], checkpoint.absolute())
        console.print(str(path), highlight=False, markup=False)


app.command()(drift)


def resolve(name: str) -> Facts:
    """Facts of a catalogued subject, or of a model given as a path or hub id.

    Raises:
        UserError: it is none of them.
    """
    is_model = name not in catalog() and ("/" in name or name.endswith(".gguf") or Path(name).exists())
    return named_model(name) if is_model else facts(name)


def _row(subject: Facts) -> tuple[str, ...]:
    parameters = f"{subject.parameters / 1e6:,.0f} M" if subject.parameters else "?"
    size = f"{subject.size_bytes / 1e6:,.0f} MB" if subject.size_bytes else "?"
    here = "[green]here[/]" if weights.location(subject) else "-"
    name = subject.name + (" *" if subject.default else "")
    source = escape(str(subject.source))
    return name, subject.architecture, str(subject.layers), parameters, size, here, subject.licence, source


def _fetch(subject: Facts) -> Path:
    if isinstance(subject.source, Hub):
        return fetching.fetch(subject)  # the hub's client has progress bars of its own
    columns = (SpinnerColumn(), TextColumn("{task.fields[name]}: {task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("looking", total=None, name=subject.name)
        return fetching.fetch(
            subject, lambda done, total, what: progress.update(task, description=what, completed=done, total=total)
        )
