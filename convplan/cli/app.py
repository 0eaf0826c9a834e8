"""The commands and their options. What a command does is elsewhere and loads when it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convplan import __version__
from convplan.cli.arguments import byte_count
from convplan.cli.output import Result, command

app = typer.Typer(
    help="Find, prove, remember and explain the fastest engine for each PyTorch convolution.",
    epilog="Exit codes: 0 done, 1 failed or the answer is no, 2 wrong usage.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
InputFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE")]
ProblemFile = Annotated[
    Path | None,
    typer.Option("--problems", exists=True, dir_okay=False, readable=True, metavar="FILE.json", help="A problem file."),
]
ProblemLines = Annotated[
    list[str] | None,
    typer.Option("--problem", metavar="LINE", help="A problem as logs and errors write it; may be given repeatedly."),
]

# Which stored plans.
KeyPrefix = Annotated[str, typer.Option("--key", metavar="PREFIX", help="Only plans whose key begins like this.")]
EngineName = Annotated[str | None, typer.Option("--engine", metavar="NAME", help="Only plans that chose this engine.")]
DeviceName = Annotated[str | None, typer.Option("--device", metavar="TYPE", help="Only plans for this device type.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")]
WithSerialized = Annotated[
    bool,
    typer.Option("--serialized/--no-serialized", help="With the compiled parts of plans, which are native GPU code."),
]

# The policy.
Deterministic = Annotated[
    bool | None, typer.Option("--deterministic/--no-deterministic", help="Default: as torch's own flags say.")
]
Engines = Annotated[
    str | None, typer.Option("--engines", metavar="A,B", help="The engines to use, in order of preference.")
]
BudgetSeconds = Annotated[
    float | None, typer.Option("--budget-s", metavar="SECONDS", help="For racing one problem's candidates.")
]
Effort = Annotated[
    str | None,
    typer.Option("--effort", metavar="measure|exhaustive", help="How much work goes into a plan. Default: measure."),
]
SearchSeconds = Annotated[
    float | None, typer.Option("--search-s", metavar="SECONDS", help="For one problem's exhaustive search.")
]
WorkspaceLimit = Annotated[
    int | None,
    typer.Option("--workspace-limit", parser=byte_count, metavar="BYTES", help="Scratch memory, such as 0 or 64MiB."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"convplan {__version__}")
        raise typer.Exit


@app.callback()
def convplan(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
) -> None:
    """Find, prove, remember and explain the fastest engine for each PyTorch convolution."""


@app.command()
@command
def doctor(
    device_properties: Annotated[
        bool, typer.Option("--device-properties", help="Instead: describe this GPU, to build plans for it elsewhere.")
    ] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Write that JSON here.")] = None,
    as_json: AsJson = False,
) -> Result:
    """Say what was found, what is missing, and how to fix it. Works when torch is broken."""
    from convplan.cli import doctor

    if out is not None and not device_properties:
        raise typer.BadParameter("--out is for --device-properties")
    return doctor.device_properties(out) if device_properties else doctor.doctor()


@app.command()
@command
def demo(
    workloads: Annotated[list[str] | None, typer.Argument(metavar="[resnet] [convnext] [reverb] [fusion]")] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=0.01, help="For racing one problem's candidates.")] = 0.4,
    as_json: AsJson = False,
) -> Result:
    """Run a photograph through image models and an echo over a tune, stock torch beside convplan."""
    from convplan.cli import planning
    from convplan.cli.demo import WORKLOADS

    unknown = [name for name in workloads or () if name not in WORKLOADS]
    if unknown:
        raise typer.BadParameter(f"found {', '.join(unknown)}, expected any of {', '.join(WORKLOADS)}")
    return planning.demo(tuple(workloads or WORKLOADS), budget_s=budget_s)


@app.command()
@command
def tune(
    target: Annotated[
        str | None, typer.Argument(metavar="[FILE.py:callable]", help="Called once; what it runs is planned.")
    ] = None,
    problems: ProblemFile = None,
    problem: ProblemLines = None,
    deterministic: Deterministic = None,
    engines: Engines = None,
    budget_s: BudgetSeconds = None,
    workspace_limit: WorkspaceLimit = None,
    effort: Effort = None,
    search_s: SearchSeconds = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is stored already.")] = False,
    as_json: AsJson = False,
) -> Result:
    """Plan the convolutions that a callable runs, gradients included, or those of a problem file."""
    from convplan.cli import planning
    from convplan.cli.arguments import load_callable, load_problems, make_policy

    if (target is None) == (problems is None and not problem):
        raise typer.BadParameter('expected either FILE.py:callable, or --problems FILE.json or --problem "…"')
    policy = make_policy(
        deterministic=deterministic,
        engines=engines,
        budget_s=budget_s,
        workspace_limit_bytes=workspace_limit,
        effort=effort,
        search_s=search_s,
    )
    if target is None:
        return planning.tune(load_problems(problems, problem), policy, force=force)
    return planning.tune(load_callable(target), policy, force=force)


@app.command("replay-check")
@command
def replay_check(
    problems: ProblemFile = None,
    problem: ProblemLines = None,
    deterministic: Deterministic = None,
    engines: Engines = None,
    workspace_limit: WorkspaceLimit = None,
    as_json: AsJson = False,
) -> Result:
    """Say whether replay mode would find a stored plan for every problem of a file; exit 1 if one is missing."""
    from convplan.cli import planning
    from convplan.cli.arguments import load_problems, make_policy

    policy = make_policy(
        deterministic=deterministic, engines=engines, budget_s=None, workspace_limit_bytes=workspace_limit
    )
    return planning.replay_check(load_problems(problems, problem), policy)


@app.command()
@command
def bench(
    suite: Annotated[
        Path | None,
        typer.Option(
            "--suite",
            "--problems",
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="FILE.json",
            help="A problem file.",
        ),
    ] = None,
    problem: ProblemLines = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time the sides of a problem for this long.")] = 2.0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Instead of --seconds: so many samples of each side.")
    ] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Write raw samples as JSON.")] = None,
    compile_too: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile, in a third process; forward problems only.")
    ] = False,
    regret: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tune each problem N times anew and tell how good the choices are.")
    ] = 0,
    stock_benchmark: Annotated[
        str, typer.Option(metavar="on|off", help="Stock torch's benchmark mode, on a GPU.")
    ] = "on",
    stock_benchmark_limit: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="How many candidates that tries; 0: all. Default: as torch has it."),
    ] = None,
    deterministic: Deterministic = None,
    engines: Engines = None,
    budget_s: BudgetSeconds = None,
    workspace_limit: WorkspaceLimit = None,
    effort: Effort = None,
    search_s: SearchSeconds = None,
    as_json: AsJson = False,
) -> Result:
    """Time each problem of a file against stock torch, each in a process of its own, planning it first where needed."""
    from convplan._bench_processes import BenchOptions
    from convplan.cli import planning
    from convplan.cli.arguments import load_problems, make_policy

    if stock_benchmark not in ("on", "off"):
        raise typer.BadParameter(f"--stock-benchmark is {stock_benchmark!r}, expected on or off")
    policy = make_policy(
        deterministic=deterministic,
        engines=engines,
        budget_s=budget_s,
        workspace_limit_bytes=workspace_limit,
        effort=effort,
        search_s=search_s,
    )
    options = BenchOptions(
        seconds=seconds,
        rounds=rounds,
        compile=compile_too,
        regret=regret,
        benchmark=stock_benchmark == "on",
        benchmark_limit=stock_benchmark_limit,
    )
    return planning.bench(load_problems(suite, problem), policy, options, out=out)


@app.command()
@command
def configs(
    problems: ProblemFile = None,
    problem: ProblemLines = None,
    device: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="FILE.json",
            help="The GPU, as `doctor --device-properties` describes it. Default: the one of this machine.",
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(metavar="instant|measure", help="Which of cuDNN's lists to ask: those that planning would.")
    ] = "measure",
    deterministic: Deterministic = None,
    workspace_limit: WorkspaceLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object for each problem.")] = False,
) -> Result:
    """List what cuDNN proposes for each problem of a file, on a GPU that need not be here."""
    from convplan._errors import PolicyError
    from convplan.cli import gpus
    from convplan.cli.arguments import load_problems, make_policy

    policy = make_policy(
        deterministic=deterministic, engines=None, budget_s=None, workspace_limit_bytes=workspace_limit
    )
    try:
        policy = policy.replace(effort=effort)
    except PolicyError as exc:
        raise typer.BadParameter(str(exc)) from exc
    return gpus.configs(load_problems(problems, problem), policy, properties=device)


@app.command()
@command
def build(
    device: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="FILE.json",
            help="The GPU, as `doctor --device-properties` describes it.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the plans here, for `convplan import`.")],
    problems: ProblemFile = None,
    problem: ProblemLines = None,
    leading: Annotated[int, typer.Option(min=1, metavar="N", help="How many plans to build for each problem.")] = 3,
    deterministic: Deterministic = None,
    workspace_limit: WorkspaceLimit = None,
    as_json: AsJson = False,
) -> Result:
    """Build the plans that cuDNN proposes first for each problem of a file, for a GPU that need not be here."""
    from convplan.cli import ahead
    from convplan.cli.arguments import load_problems, make_policy

    policy = make_policy(
        deterministic=deterministic, engines=None, budget_s=None, workspace_limit_bytes=workspace_limit
    )
    return ahead.build(load_problems(problems, problem), policy, properties=device, out=out, leading=leading)


@app.command("list")
@command
def list_(key: KeyPrefix = "", engine: EngineName = None, device: DeviceName = None, as_json: AsJson = False) -> Result:
    """Show the stored plans."""
    from convplan.cli import stored

    return stored.list_plans(key_prefix=key, engine=engine, device=device)


@app.command()
@command
def explain(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A plan's key, or how it begins.")] = None,
    problem: Annotated[
        str | None, typer.Option("--problem", metavar="LINE", help="Instead: its problem, as logs and errors write it.")
    ] = None,
    every_rejection: Annotated[bool, typer.Option("--all", help="List every rejected candidate.")] = False,
    as_json: AsJson = False,
) -> Result:
    """Show a stored plan: its candidates' times, stock torch's, the hardware limit, and why others were rejected."""
    from convplan.cli import stored
    from convplan.cli.arguments import one_problem

    if key is not None and problem is None:
        return stored.explain(key, every_rejection=every_rejection)
    if problem is not None and key is None:
        return stored.explain_problem(one_problem(problem), every_rejection=every_rejection)
    raise typer.BadParameter('expected either a KEY or --problem "…"')


@app.command()
@command
def verify(
    key: KeyPrefix = "",
    engine: EngineName = None,
    every_rank: Annotated[bool, typer.Option("--every-rank", help="Also the plans behind the chosen ones.")] = False,
    as_json: AsJson = False,
) -> Result:
    """Run the stored plans of this environment again and compare them with the float64 reference."""
    from convplan.cli import stored

    return stored.verify(key_prefix=key, engine=engine, every_rank=every_rank)


@app.command()
@command
def export(
    file: Annotated[Path, typer.Argument(dir_okay=False, metavar="FILE")],
    key: KeyPrefix = "",
    engine: EngineName = None,
    device: DeviceName = None,
    serialized: WithSerialized = True,
    as_json: AsJson = False,
) -> Result:
    """Write stored plans to a JSON file."""
    from convplan.cli import stored

    return stored.export(file, key_prefix=key, engine=engine, device=device, serialized=serialized)


@app.command("import")
@command
def import_(
    file: InputFile, dry_run: DryRun = False, serialized: WithSerialized = True, as_json: AsJson = False
) -> Result:
    """Take the plans of a JSON file into the store."""
    from convplan.cli import stored

    return stored.import_(file, dry_run=dry_run, serialized=serialized)


@app.command()
@command
def check(as_json: AsJson = False) -> Result:
    """Look at every stored plan and at the store itself, changing nothing."""
    from convplan.cli import stored

    return stored.check()


@app.command()
@command
def clear(
    key: KeyPrefix = "",
    engine: EngineName = None,
    device: DeviceName = None,
    other_environments: Annotated[
        bool, typer.Option("--other-environments", help="Only plans of other machines, versions or thread counts.")
    ] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Really delete.")] = False,
    as_json: AsJson = False,
) -> Result:
    """Delete stored plans: those that all given options name, or every one."""
    from convplan.cli import stored

    if dry_run == yes:
        raise typer.BadParameter("expected either --dry-run, to look first, or --yes, to delete")
    return stored.clear(
        key_prefix=key, engine=engine, device=device, other_environments=other_environments, dry_run=dry_run
    )


errata = typer.Typer(help="Look after what was learned: configurations that failed here.", no_args_is_help=True)
app.add_typer(errata, name="errata")


@errata.command("list")
@command
def errata_list(as_json: AsJson = False) -> Result:
    """Show the learned errata: what failed, how, for which problems, and where that counts."""
    from convplan.cli import errata

    return errata.list_errata()


@errata.command("export")
@command
def errata_export(
    file: Annotated[Path, typer.Argument(dir_okay=False, metavar="FILE")], as_json: AsJson = False
) -> Result:
    """Write the learned errata to a JSON file."""
    from convplan.cli import errata

    return errata.export(file)


@errata.command("import")
@command
def errata_import(file: InputFile, dry_run: DryRun = False, as_json: AsJson = False) -> Result:
    """Take the learned errata of a JSON file into the store."""
    from convplan.cli import errata

    return errata.import_(file, dry_run=dry_run)


@errata.command("clear")
@command
def errata_clear(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="An erratum's id, or how it begins. Default: all.")] = "",
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Really forget.")] = False,
    as_json: AsJson = False,
) -> Result:
    """Forget one learned erratum, or every one: its configuration is tried again."""
    from convplan.cli import errata

    if dry_run == yes:
        raise typer.BadParameter("expected either --dry-run, to look first, or --yes, to forget")
    return errata.clear(key, dry_run=dry_run)
