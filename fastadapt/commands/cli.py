"""The command `fastadapt`: convert, demo, doctor, generate, info, merge, train. Heavy imports wait for their use."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    # The console script imports this module before it calls anything in it: here alone can the cure be one line.
    print(f'fastadapt: the command line needs {missing.name}: pip install "fastadapt[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

from ..checks import printable
from ..progress import working
from ..training.recipes import recipes
from .convert import TARGETS, convert_to
from .info import describe_adapter
from .merge import merge_to
from .plugins import load_methods

app = typer.Typer(
    help="One fused engine for low-rank adapters: LoRA, DoRA, VeRA and their family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same as JSON.")]


def console() -> Console:
    """Where results go; all tables fit into the 80 columns that a pipe is given, and a narrow terminal has."""
    output = Console()
    return output if output.is_terminal else Console(width=80)


def say_on_stderr(what: str, color: str, message: str) -> None:
    """Prints one line there, whatever the message has."""
    text = Text(f"{what}: ", style=f"bold {color}") + Text(printable(" ".join(message.split())), style="not bold")
    Console(stderr=True).print(text, soft_wrap=True)


def fail(message: str) -> typer.Exit:
    """Prints one line on stderr; raise the result to leave with exit code 2."""
    say_on_stderr("error", "red", message)
    return typer.Exit(2)


# Which extra brings a module; the demo's has all others.
EXTRAS = {"rich": "cli", "typer": "cli", "matplotlib": "train", "transformers": "train", "triton": "triton"}


def needs(*modules: str) -> str:
    """What to say of modules that are not installed: the smallest extra that has them all."""
    extras = {EXTRAS.get(name.partition(".")[0], "demo") for name in modules}
    extra = next(name for name in ("demo", "train", "triton", "cli") if name in extras)
    return f'this command needs {", ".join(modules)}: pip install "fastadapt[{extra}]"'


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what a user can cure (bad input, a missing file or package) into one line; other errors are bugs."""
    from safetensors import SafetensorError

    try:
        yield
    except ModuleNotFoundError as error:
        raise fail(needs(error.name or "a module")) from None
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise fail(str(error) or type(error).__name__) from None


def require(*modules: str) -> None:
    """Fails with the cure before any work is done if one of the modules is not installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise fail(needs(*absent))


def require_writable(path: Path) -> None:
    """Fails now rather than after minutes of work if `path` cannot be a file to write."""
    if path.is_dir():
        raise fail(f"{path} is a directory: name a file to write")
    if path.exists() and not path.is_file():  # a pipe or a device: nothing is made beside it
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise fail(f"cannot write in {path.parent}")


@app.command()
def demo(
    json_file: JsonOption = None,
    model: Annotated[
        str | None, typer.Option(help="Local directory or hub name of a chat model; SmolLM2-135M by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the adapters go.")] = Path("fastadapt-demo"),
    every: Annotated[bool, typer.Option("--all", help="Every method, not just LoRA, DoRA and VeRA.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Governs the split, the order and the adapters' start.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the comparison with PEFT.")] = 3,
    device: Annotated[str, typer.Option(help="PyTorch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Train three adapters, ask them, measure them beside PEFT, and serve them in one batch; --all for every method."""
    require("transformers", "peft", "yaml", "matplotlib", *(() if model else ("gguf",)))
    with one_line_errors():
        if json_file is not None:
            require_writable(json_file)
        from .demo.command import Options, run

        options = Options(
            output=output,
            json=json_file,
            model=model,
            all=every,
            steps=steps,
            seed=seed,
            rounds=rounds,
            device=device,
        )
        run(options, console())


@app.command()
def doctor(json_file: JsonOption = None) -> None:
    """Show devices, versions and the backend of each operator, and test every operator against its reference here.

    Leaves with exit code 1 if an operator fails; one that has no self-test is named.
    """
    from ..environment import describe, devices, versions
    from . import doctor as checks
    from .report import write_json

    with one_line_errors():
        if json_file is not None:
            require_writable(json_file)
        out = console()
        found = devices()
        table = Table(title="Devices and versions", show_header=False)
        for device in found:
            table.add_row(str(device), describe(device))
        for package, version in versions().items():
            table.add_row(package, version or "not installed")
        out.print(table)
        choices = [choice for device in found for choice in checks.choices(device)]
        table = Table("operator", "device", "backend", "why", title='Backends that "auto" takes')
        for choice in choices:
            table.add_row(*(choice[key] for key in ("operator", "device", "backend", "why")))
        out.print(table)
        with working("self-test", out, log=False) as say:
            rows = checks.self_test(found, say)
        untested = checks.untested()
        out.print(_self_test_table(rows, list(checks.DTYPES), untested))
        failures = [row for row in rows if not row["ok"]]
        for row in failures:
            where = f"{row['operator']}, {row['case']}, {row['device']}, {row['backend']}, {row['dtype']}"
            out.print(Text(f"FAILED: {where}: {row['failed']}", style="red"))
        tested = "all operators" if not untested else "all operators with a self-test"
        out.print(f"{len(failures)} checks failed" if failures else f"{tested} agree with their reference")
        if untested:
            out.print(Text(f"UNTESTED, without a self-test: {', '.join(untested)}", style="yellow"))
        if json_file is not None:
            write_json(json_file, "doctor", rows, backends=choices, untested=untested)
    if failures:
        raise typer.Exit(1)


def _self_test_table(rows: list[dict[str, Any]], dtypes: list[str], untested: list[str]) -> Table:
    title = "Self-test: largest error of the result and every gradient,\nrelative to the largest exact value"
    table = Table("operator", "case", *dtypes, title=title, box=box.SIMPLE_HEAD)
    lines: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for row in rows:
        key = row["device"], row["backend"], row["operator"], row["case"]
        error = "" if row["max_error"] is None else f"{row['max_error']:.0e} "
        lines.setdefault(key, {})[row["dtype"]] = error + ("[green]ok" if row["ok"] else "[red]FAILED")
    last: tuple[str, str] | None = None
    for (device, backend, operator, case), cells in lines.items():
        if (device, backend) != last:
            table.add_section()
            table.add_row(f"[bold]{device}, {backend}")
            last = device, backend
        table.add_row(operator, case, *(cells.get(dtype, "cannot") for dtype in dtypes))
    for operator in untested:
        table.add_row(operator, "-", *["[yellow]untested"] * len(dtypes))
    return table


@app.command()
def info(directory: Annotated[Path, typer.Argument(help="A PEFT directory, or another library's file.")]) -> None:
    """Describe an adapter without loading a model, and say whether fastadapt can load it."""
    with one_line_errors():
        table = Table(show_header=False, title=Text(printable(str(directory))))
        for name, value in describe_adapter(directory).items():
            table.add_row(name, Text(value))
        console().print(table)


@app.command()
def merge(
    model_dir: Annotated[str, typer.Argument(help="Base model: local directory or hub name.")],
    adapter_dir: Annotated[Path, typer.Argument(help="PEFT adapter directory.")],
    output_dir: Annotated[Path, typer.Argument(help="Where the merged model goes.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUTPUT_DIR.")] = False,
) -> None:
    """Merge an adapter into its base model and save the result as an ordinary model, with its tokenizer."""
    require("transformers")
    out = console()
    with one_line_errors():
        if output_dir.exists() and not force:
            raise FileExistsError(f"{output_dir} exists: choose another place, or replace it with --force")
        if output_dir.exists() and not output_dir.is_dir():
            raise NotADirectoryError(f"{output_dir} is a file: choose another place")
        from .quiet import quiet_transformers

        with working("reading the adapter", out) as say, quiet_transformers():
            notes = merge_to(model_dir, adapter_dir, output_dir, say)
        for note in notes:
            out.print(Text(printable(note)), soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A PEFT directory, or diffusers', kohya's, MLX's file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A directory; a .safetensors file for kohya.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    model: Annotated[
        str | None, typer.Option(help="Base model: names for kohya's flat ones, sizes for --to lora and experts.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Part of the pipeline: unet, transformer, text_encoder, ...")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is in OUT.")] = False,
) -> None:
    """Write an adapter in another library's layout: the same tensors, nothing half written.

    peft: a PEFT directory. diffusers: pytorch_lora_weights.safetensors, with its config in the metadata. kohya: a file
    with flat names, as most programs for images read it. lora: a PEFT directory of a plain LoRA, out of VeRA for
    example, which computes the same; a DoRA is none. What a layout cannot hold is refused.
    """
    out = console()
    with one_line_errors():
        with working("reading the adapter", out) as say:
            notes = convert_to(source, output, to, model, component, force, say)
        for note in notes:
            out.print(Text(printable(note)), soft_wrap=True)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Base model: local directory or hub name.")],
    data: Annotated[Path, typer.Argument(help="A .jsonl or .csv file.")],
    output: Annotated[Path, typer.Argument(help="Where the adapter and its checkpoints go.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(recipes())}.")] = "lora",
    r: Annotated[int | None, typer.Option("--r", help="Rank; by default the method's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha; 2r by default.")] = None,
    dropout: Annotated[float, typer.Option(help="Drop probability of the adapters' input.")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help='Names of the layers to adapt with commas between, or "all-linear".')
    ] = "all-linear",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times that every row is seen; 3 by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that go through the model at once.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Such batches in one optimizer step.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Greatest learning rate; by default the method's.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the optimizer.")] = 0.0,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.05,
    schedule: Annotated[
        str, typer.Option(help="Learning rate behind it: linear (to 0), constant or cosine.")
    ] = "linear",
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm; 0 for none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Governs the adapters' start, the order, dropout and the split.")] = 0,
    device: Annotated[str | None, typer.Option(help="PyTorch device; cuda where there is one, else cpu.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the base model: float32 or bfloat16; adapters are float32.")
    ] = "float32",
    quantize: Annotated[
        str | None,
        typer.Option(help="The base's linear layers in nf4, products in --dtype, or int8, by bitsandbytes (QLoRA)."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Greatest length of a row in tokens; by default the model's positions, 1024 at most."),
    ] = None,
    evaluate: Annotated[Path | None, typer.Option("--eval", metavar="FILE", help="Rows to evaluate on.")] = None,
    eval_share: Annotated[
        float | None, typer.Option(help="Share of DATA to evaluate on instead, 0.1 by default; 0 for none.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; by default a tenth.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; by default a tenth.")] = None,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where OUTPUT is from a run with other options.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Fine-tune a model on DATA with any method; stopped at any moment, the same command goes on where it was.

    The columns of DATA decide what is trained. prompt and completion: the completion. messages: the assistant's turns.
    text: all of it. text and label: a classifier. OUTPUT is a PEFT directory with train.json and train.png.

    In several processes each takes --batch-size rows: torchrun --nproc-per-node 2 --no-python fastadapt train ...

    A run goes on only with the options, data, model and tokenizer that it was begun with. Of weights in large files
    that compares sizes, headers and blocks spread over them.
    """
    require("transformers", "matplotlib")
    with one_line_errors():
        if json_file is not None:
            require_writable(json_file)
        from .train.command import run
        from .train.loop import Interrupted
        from .train.options import Options

        options = Options(
            model=model,
            data=data,
            output=output,
            method=method,
            r=r,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            seed=seed,
            device=device,
            dtype=dtype,
            quantize=quantize,
            max_length=max_length,
            eval=evaluate,
            eval_share=eval_share,
            eval_every=eval_every,
            save_every=save_every,
            keep=keep,
            overwrite=overwrite,
            json=json_file,
        )
        out = console()
        try:
            run(options, out)
        except Interrupted as stop:
            out.print(str(stop), highlight=False, soft_wrap=True)
            raise typer.Exit(128 + stop.signum) from None


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Base model: local directory or hub name.")],
    adapters: Annotated[Path, typer.Argument(help="A directory with a PEFT directory for each adapter.")],
    data: Annotated[Path, typer.Argument(help="A .jsonl file of rows with a prompt or messages, and an adapter.")],
    output: Annotated[Path | None, typer.Option(help="Where the results go; the terminal by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(help="Longest prompt with its answer in tokens; by default the model's positions.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts through the chat template, as a user's turn.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Rows that go through the model at once.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Governs sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="PyTorch device; cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of model and adapters.")] = "float32",
    budget: Annotated[
        int | None, typer.Option(help="MiB for adapters in memory; by default as much as those of DATA take.")
    ] = None,
) -> None:
    """Answer every row of DATA with the adapter that it names, many adapters in one batch.

    A row is {"prompt": "...", "adapter": "name"}, or messages in place of prompt; without an adapter the base model
    answers. A prompt goes in as it is, and messages through the chat template, the adapter's own where its directory
    has one: a chat model often ends at once after a bare prompt, and --chat puts prompts into the template too. A row
    may have its own max_new_tokens, temperature, top_p, seed, and stop, a text or several that end its answer.

    Results are JSON lines in the same order, with text, tokens, and how the row ended: eos, stop or length. A bad row
    has an error instead.
    """
    require("transformers")
    with one_line_errors():
        import torch

        from ..progress import progress_bar
        from .generate import Options, run
        from .quiet import quiet_transformers

        if output is not None:
            require_writable(output)
            if output.exists() and data.exists() and output.samefile(data):
                raise ValueError(f"--output must be another file than DATA, got {output} for both")
        options = Options(
            model=model,
            adapters=adapters,
            data=data,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            budget=budget,
            max_length=max_length,
            chat=chat,
        )
        with quiet_transformers(), progress_bar("rows", None) as update:

            def advance(done: int, total: int) -> None:
                update(completed=done, total=total)

            def results() -> contextlib.AbstractContextManager[Any]:
                return contextlib.nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8")

            summary = run(options, results, advance)
        rate = summary.tokens / summary.seconds if summary.seconds else 0.0
        Console(stderr=True).print(
            f"{summary.rows} rows, {summary.failed} with an error, {summary.tokens} tokens in {summary.seconds:.1f} s "
            f"({rate:.0f} tokens/s)",
            highlight=False,
        )


def main() -> None:
    """The console script: every command knows the methods of other packages too."""
    for warning in load_methods():
        say_on_stderr("warning", "yellow", warning)
    # What is made here of the functions above, such as the help of --method, comes after them.
    app()
